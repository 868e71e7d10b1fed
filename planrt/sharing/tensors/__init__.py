"""Tensors in shares: PyTorch above, protocols below, and sessions that say where the parts are."""
