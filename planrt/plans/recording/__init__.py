"""From Python to a graph: a function is run under a recorder, tried again with other sizes, and looked
after."""
