"""A worker as a party of computations on shares, or as their dealer. No I/O."""
