"""PyTorch's operations on shares, each a protocol over one party's view, by ATen name: `table` is the whole."""

from planrt.sharing.kernels.parts import Context, Share

__all__ = ["Context", "Share"]
