"""Protocols: plans chained across workers. The room is kept free for them; nothing lives here yet."""
