"""Running a graph: the interpreter, and what results will be like without values."""
