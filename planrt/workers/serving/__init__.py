"""Serving a worker: its state machine between pipes and a compute thread, and its links to other workers."""
