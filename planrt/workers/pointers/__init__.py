"""Tensors and plans that live on a worker, as their client holds them, and what happens to calls on them."""
