"""Torch work of each user in a process of its own: what begins, confines, watches and ends these processes."""
