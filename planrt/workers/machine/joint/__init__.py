"""Joint runs on one worker: what its table gives, what it tells the other parties, and its owner's say. No I/O."""
