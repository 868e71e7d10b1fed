"""A worker whose users each have a process of their own: what these processes have of one another. No I/O."""
