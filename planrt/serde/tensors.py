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
    """The way one tensor lies in a payload: dtype, shape and strides (elements), size (bytes)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
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
    if (
        type(tensor) is torch.Tensor
        and tensor.dtype in _WHOLE
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and tensor.nbytes
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    ):  # its memory is its values, one after the other: so is most of what parties open to each other
        return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]
    check_dense(tensor)
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if plain._is_zerotensor():  # autograd's zeros have no memory before somebody copies them
        plain = plain.clone()
    if plain.numel() == 0:
        return memoryview(b"")
    flat = plain.as_strided((plain.numel(),), (1,))  # the stride of a dimension of size 1 can be anything
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


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
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
            check_dense(tensor)  # says why
        position += -position % ALIGNMENT + tensor.nbytes
    return position


def header_entries(tensors: Sequence[torch.Tensor]) -> list[list[Any]]:
    """Returns the header entries ``[dtype name, [sizes]]`` of `tensors`."""
    entries: list[list[Any]] = []
    for tensor in tensors:
        entries.append([DTYPE_NAMES[tensor.dtype], [*tensor.shape]])
    return entries


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
        if type(entry) is not list or len(entry) != 2 or type(entry[1]) is not list:
            raise WireError(f"malformed header: bad tensor entry {entry!r:.80}", address=address)
        try:
            layout = _layout(entry[0], *entry[1])
        except (TypeError, ValueError) as error:  # a TypeError: a name or a size that is a list or a dict
            why = error if isinstance(error, ValueError) else f"bad tensor entry {entry!r:.80}"
            raise WireError(f"malformed header: {why}", address=address) from None
        layouts.append(layout)
        position += -position % ALIGNMENT + layout.nbytes
    return layouts, position


@lru_cache(maxsize=1024, typed=True)  # typed: True and 1.0 are equal to 1, and are no sizes
def _layout(name: object, *sizes: object) -> Layout:
    """Returns the layout that a header's entry describes.

    Raises:
        ValueError: it describes none. TypeError: it holds something that is no name or size at all.
    """
    if type(name) is not str or name not in DTYPES or len(sizes) > MAX_DIMS:
        raise ValueError(f"bad tensor entry {[name, list(sizes)]!r:.80}")
    dtype = DTYPES[name]
    shape: list[int] = []
    strides: list[int] = []
    for size in sizes:
        if type(size) is not int or not 0 <= size <= MAX_ELEMENTS:
            raise ValueError(f"bad tensor shape {list(sizes)!r:.80}")
        shape.append(size)
    elements = math.prod(shape)
    if elements > MAX_ELEMENTS:
        raise ValueError(f"tensor of {elements:.3g} elements")
    step = 1
    for size in reversed(shape):  # in row-major order, as torch counts them
        strides.append(step)
        step *= max(size, 1)
    return Layout(dtype, tuple(shape), tuple(reversed(strides)), elements * dtype.itemsize)


def tensors_in(payload: torch.Tensor, layouts: Sequence[Layout], *, address: str) -> list[torch.Tensor]:
    """Returns the tensors that lie in `payload` (uint8), in its memory.

    They are no views of one another, as those that were sent were none: autograd counts their changes apart,
    so that ``num_batches_tracked.add_(1)`` is no change of a weight that came along.

    Raises:
        WireError: a bool tensor with bytes other than 0 and 1 (undefined behaviour in torch).
    """
    storage = payload.untyped_storage()
    tensors = []
    end = 0
    for layout in layouts:
        start = end + -end % ALIGNMENT
        end = start + layout.nbytes
        dtype = layout.dtype
        tensor = torch.empty(0, dtype=dtype)
        if not layout.nbytes:
            tensors.append(tensor.view(layout.shape))
            continue
        if dtype is torch.bool and bool((payload[start:end] > 1).any()):
            raise WireError(
                "malformed payload: a bool tensor holds bytes other than 0 and 1", address=address
            )
        tensors.append(tensor.set_(storage, start // dtype.itemsize, layout.shape, layout.strides))
    return tensors
