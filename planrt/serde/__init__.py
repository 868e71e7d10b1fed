"""Messages and plan values to bytes and back; nothing here opens a socket or runs an op."""
