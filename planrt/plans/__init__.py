"""Plans: PyTorch programs as lists of named ops. `ops` is the vocabulary, `interpreter` runs it."""
