"""Frames between two ends, in this process or over a websocket; who may open a connection."""
