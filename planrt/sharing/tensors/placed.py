"""Operations at public places that ATen has beside indexing, in terms of it: places in a row, masks, diagonals, blocks.

Each takes what the operation of ATen takes, and is called below autograd, as all rewritings are (`rewritten`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from planrt.errors import SharingError


def take(x: Any, index: torch.Tensor) -> Any:
    """Returns the entries at `index`, of any shape, of `x` as one row."""
    return x.reshape(-1)[index]


def put(x: Any, index: torch.Tensor, source: Any, accumulate: bool = False) -> Any:
    """Returns `x` with the entries of `source` at `index` of `x` as one row, or with them added there.

    Raises:
        RuntimeError: not one entry for each place.
    """
    if index.numel() != source.numel():
        raise RuntimeError(f"put: {source.numel()} entries for {index.numel()} places")
    written = x.reshape(-1).index_put((index.reshape(-1),), source.reshape(-1), accumulate)
    return written.reshape(x.shape)


def masked_select(x: Any, mask: torch.Tensor) -> Any:
    """Returns the entries where a mask is true, which all know, as one row.

    Raises:
        SharingError: the mask is in shares: how many there are would show it.
    """
    mask, shape = _broadcast(x, mask, "masked_select")
    return x.expand(shape).reshape(-1)[_where(mask)]


def masked_scatter(x: Any, mask: torch.Tensor, source: Any) -> Any:
    """Returns `x` with the first entries of `source` where a mask is true, which all know.

    Raises:
        SharingError: the mask is in shares. RuntimeError: `source` has too few entries.
    """
    mask, shape = _broadcast(x, mask, "masked_scatter")
    places = _where(mask)
    if source.numel() < len(places):
        raise RuntimeError(f"masked_scatter: {source.numel()} entries for {len(places)} places")
    written = x.expand(shape).reshape(-1).index_put((places,), source.reshape(-1)[: len(places)])
    return written.reshape(shape)


def masked_scatter_backward(gradient: Any, mask: torch.Tensor, sizes: Sequence[int]) -> Any:
    """Returns the gradient of `source`, of shape `sizes`: zero for the entries that were not taken."""
    taken = masked_select(gradient, mask)
    rest = torch.Size(sizes).numel() - taken.numel()
    return torch.nn.functional.pad(taken, (0, rest)).reshape(list(sizes))


def _broadcast(x: Any, mask: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Size]:
    if getattr(mask, "in_shares", False):
        raise SharingError(
            f"{name} has no protocol on shares with a mask in shares, it would show values: write torch.where, or "
            "get() the mask first"
        )
    if mask.dtype != torch.bool:
        raise RuntimeError(f"{name}: expected a mask of torch.bool, not {mask.dtype}")
    shape = torch.broadcast_shapes(x.shape, mask.shape)  # type: ignore[no-untyped-call]
    return mask.expand(shape), shape


def _where(mask: torch.Tensor) -> torch.Tensor:
    return mask.reshape(-1).nonzero().reshape(-1)


def diagonal_scatter(x: Any, source: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """Returns `x` with `source` as a diagonal.

    Raises:
        RuntimeError: the diagonal has another shape.
    """
    places = torch.arange(x.numel()).reshape(x.shape).diagonal(offset, dim1, dim2)
    if places.shape != source.shape:
        raise RuntimeError(f"diagonal_scatter: {list(source.shape)} for a diagonal of {list(places.shape)}")
    return put(x, places, source)


def block_diag(tensors: Sequence[Any]) -> Any:
    """Returns matrices, or rows, as the blocks along the diagonal of one matrix."""
    blocks = [one.reshape(1, -1) if one.dim() < 2 else one for one in tensors]
    width, rows, before = sum(one.shape[1] for one in blocks), [], 0
    for one in blocks:
        after = width - before - one.shape[1]
        rows.append(torch.nn.functional.pad(one, (before, after)))
        before += one.shape[1]
    return torch.cat(rows)
