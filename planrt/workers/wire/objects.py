"""What tensors look like to a worker and to its clients: as they travel, and as messages describe them. No I/O."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator, Sequence

import torch

from planrt.errors import UnsupportedTensorError
from planrt.plans.running.inference import Spec, spec
from planrt.serde.dtypes import DTYPE_NAMES, DTYPES
from planrt.workers.wire import messages as m

_ids: Iterator[int]


def _begin() -> None:
    """Has ids begin at a place that is this process's own, also if it is a copy of another one (a fork)."""
    global _ids
    _ids = itertools.count(secrets.randbits(40) << 10)


_begin()
if hasattr(os, "register_at_fork"):  # not on Windows, which makes no copies
    os.register_at_fork(after_in_child=_begin)


def new_id() -> int:
    """Returns an object id, in [0, 2**63), that no other process will choose either."""
    return next(_ids)


def spec_from_wire(wire: m.ObjectSpec) -> Spec:
    """Returns the spec that a worker sent.

    Raises:
        KeyError: a dtype that does not travel.
    """
    return spec(tuple(wire.shape), tuple(wire.stride), DTYPES[wire.dtype], wire.requires_grad, wire.leaf)


def check_travels(tensor: torch.Tensor) -> None:
    """Raises UnsupportedTensorError for a tensor that cannot go to a worker, with what to do instead."""
    kind = ""
    if tensor.is_quantized:
        kind, instead = "a quantised tensor", "dequantize()"
    elif tensor.layout != torch.strided:
        kind, instead = f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}", "to_dense()"
    elif tensor.is_nested:
        kind, instead = "a nested tensor", "to_padded_tensor()"
    elif tensor.is_meta:
        kind, instead = "a meta tensor (it has no values)", "to_empty()"
    elif tensor.dtype not in DTYPE_NAMES:
        kind, instead = (
            f"a tensor of {tensor.dtype}",
            f".to(one of {', '.join(sorted(DTYPE_NAMES.values()))})",
        )
    if kind:
        raise UnsupportedTensorError(f"{kind} cannot go to a worker: convert it first, with {instead}")


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the strides of a contiguous tensor of that shape, in elements."""
    stride = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def contiguous(tensor: torch.Tensor) -> Spec:
    """Returns the spec that `tensor` has once it has travelled: contiguous, and a leaf."""
    s = Spec.of(tensor)
    return spec(s.shape, contiguous_stride(s.shape), s.dtype, s.requires_grad, True)
