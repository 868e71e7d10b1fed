"""Tensors <-> (dtype name, shape, raw bytes).

A tensor on the wire is a `Layout` in the frame's header and its elements in row-major order, native
(little-endian) byte order, in the frame's payload. Every tensor starts at a multiple of `ALIGNMENT` bytes,
so that the receiver can use the payload in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from planrt.errors import LocalError, WireError
from planrt.serde.dtypes import DTYPE_NAMES, DTYPES

ALIGNMENT = 64
"""Tensors start at multiples of this many bytes (a cache line, and what vectorised kernels like)."""

_WHOLE = (torch.int64, torch.uint8, torch.int16)
"""Dtypes that need no gradient and are never conjugated."""

MAX_DIMS = 64
MAX_ELEMENTS = 1 << 48


@dataclass(frozen=True, slots=True)
class Layout:
    """The place of one tensor in a payload: dtype, shape (elements), offset and size (bytes)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def aligned(position: int) -> int:
    """Returns the first multiple of `ALIGNMENT` at or after `position` (bytes)."""
    return -(-position // ALIGNMENT) * ALIGNMENT


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Returns the elements of `tensor` as bytes: no copy for a contiguous CPU tensor, else one.

    The view keeps the memory alive; the caller must not change the tensor while the view is in use.

    Raises:
        LocalError: a sparse, quantised or otherwise layout-less tensor, or a dtype that does not travel.
    """
    check_dense(tensor)
    if _is_plain(tensor):  # as most are of what parties open to each other
        return memoryview(tensor.numpy().reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if plain._is_zerotensor():  # autograd's zeros have no memory before somebody copies them
        plain = plain.clone()
    if plain.numel() == 0:
        return memoryview(b"")
    flat = plain.as_strided((plain.numel(),), (1,))  # the stride of a dimension of size 1 can be anything
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor is its values, one after the other; False for many of which it is."""
    whole = type(tensor) is torch.Tensor and tensor.dtype in _WHOLE and tensor.is_cpu and tensor.numel() > 0
    return whole and tensor.is_contiguous() and not tensor.is_neg() and not tensor._is_zerotensor()


def check_dense(tensor: torch.Tensor) -> None:
    """Raises LocalError for a tensor whose elements cannot travel."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise LocalError(
            f"only dense tensors with data travel, not {tensor.layout} on {tensor.device}: "
            "send tensor.to_dense(), or materialise it first"
        )
    if tensor.dtype not in DTYPE_NAMES:
        raise LocalError(f"tensors of dtype {tensor.dtype} do not travel: convert to one of {sorted(DTYPES)}")


def payload_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Returns how many bytes the payload of a frame with `tensors` takes.

    Raises:
        LocalError: one of them cannot travel.
    """
    position = 0
    for tensor in tensors:
        check_dense(tensor)
        position = aligned(position) + tensor.numel() * tensor.dtype.itemsize
    return position


def header_entries(tensors: Sequence[torch.Tensor]) -> list[list[Any]]:
    """Returns the header entries ``[dtype name, [sizes]]`` of `tensors`."""
    return [[DTYPE_NAMES[tensor.dtype], list(tensor.shape)] for tensor in tensors]


def parse_layouts(described: object, *, address: str) -> tuple[list[Layout], int]:
    """Validates header entries and lays the tensors out; returns the layouts and the payload size in bytes.

    Raises:
        WireError: anything but a list of ``[known dtype name, [non-negative sizes]]``.
    """
    if not isinstance(described, list):
        raise WireError("malformed header: the tensor list is not a list", address=address)
    layouts: list[Layout] = []
    position = 0
    for entry in described:
        fits = type(entry) is list and len(entry) == 2 and type(entry[0]) is str and type(entry[1]) is list
        if not fits or entry[0] not in DTYPES or len(entry[1]) > MAX_DIMS:
            raise WireError(f"malformed header: bad tensor entry {entry!r:.80}", address=address)
        dtype, sizes = DTYPES[entry[0]], entry[1]
        for size in sizes:
            if type(size) is not int or not 0 <= size <= MAX_ELEMENTS:
                raise WireError(f"malformed header: bad tensor shape {sizes!r:.80}", address=address)
        elements = math.prod(sizes)
        if elements > MAX_ELEMENTS:
            raise WireError(f"malformed header: tensor of {elements:.3g} elements", address=address)
        nbytes = elements * dtype.itemsize
        position = aligned(position)
        layouts.append(Layout(dtype, tuple(sizes), position, nbytes))
        position += nbytes
    return layouts, position


def tensors_in(payload: torch.Tensor, layouts: Sequence[Layout], *, address: str) -> list[torch.Tensor]:
    """Returns the tensors that lie in `payload` (uint8), in its memory.

    They are no views of one another, as those that were sent were none: autograd counts their changes apart,
    so that ``num_batches_tracked.add_(1)`` is no change of a weight that came along.

    Raises:
        WireError: a bool tensor with bytes other than 0 and 1 (undefined behaviour in torch).
    """
    storage = payload.untyped_storage()
    tensors = []
    for layout in layouts:
        tensor = torch.empty(0, dtype=layout.dtype)
        if layout.nbytes == 0:
            tensors.append(tensor.view(layout.shape))
            continue
        if layout.dtype == torch.bool:
            raw = payload[layout.offset : layout.offset + layout.nbytes]
            if bool((raw > 1).any()):
                raise WireError(
                    "malformed payload: a bool tensor holds bytes other than 0 and 1", address=address
                )
        offset = layout.offset // layout.dtype.itemsize
        tensors.append(tensor.set_(storage, offset, layout.shape, _contiguous(layout.shape)))
    return tensors


@lru_cache(maxsize=4096)
def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor in row-major order, as torch counts them."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
