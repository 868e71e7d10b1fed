"""The worker without sockets, loop or threads: events in, instructions out."""
