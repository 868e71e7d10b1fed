"""PyTorch's functions that put entries in order: sort, topk above one, kthvalue, median.

As torch does, equal entries stay in their order where it says so (`sort`); where it does not (`topk`, `kthvalue`,
`median`) these are the first of them. See `sharing.orders` for how, and for how many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from planrt.errors import SharingError
from planrt.sharing.kernels.arithmetic import Kernel
from planrt.sharing.kernels.parts import Context, Share
from planrt.sharing.orders import check_entries, ordered
from planrt.sharing.rounds import Protocol


def _along(
    context: Context, what: str, value: Share, ranks: Sequence[int], dim: int, largest: bool
) -> Protocol[tuple[Share, Share]]:
    """The entries of those ranks along `dim`, and their places there."""
    if not value.part.dim():
        return value.copied(), context.share_of(torch.tensor(0))
    dim = dim % value.part.dim()
    count = value.shape[dim]
    check_entries(what, count, math.prod(value.shape) // max(count, 1))
    sign = 1 if largest else -1
    found = yield from ordered(context.party, sign * value.part.movedim(dim, 0), ranks)
    winners = found.winners
    if winners is not None:
        order = list(range(2, winners.opened.dim()))
        order.insert(dim, 1)
        winners = winners.permute([0, *order])
    place = Share(found.place.movedim(0, dim), 1, winners=winners)
    place.along = dim
    return Share(sign * found.value.movedim(0, dim), value.scale), place


def _sort(
    context: Context, value: Share, dim: int = -1, descending: bool = False, *, stable: bool | None = None
) -> Protocol[tuple[Share, Share]]:
    count = value.shape[dim] if value.part.dim() else 1
    return (yield from _along(context, "sort", value, range(count), dim, descending))


def top(
    context: Context, value: Share, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Protocol[tuple[Share, Share]]:
    """Returns the first `k` and their places, in order also where that is not asked for."""
    return (yield from _along(context, "topk", value, range(k), dim, largest))


def _of_rank(
    what: str, context: Context, value: Share, rank: int, dim: int, keepdim: bool
) -> Protocol[tuple[Share, Share]]:
    best, place = yield from _along(context, what, value, [rank], dim, False)
    if keepdim or not value.part.dim():
        return best, place
    dim = dim % value.part.dim()
    winners = place.winners
    if winners is not None:
        winners = winners.reshape((len(winners.opened), *place.part.squeeze(dim).shape))
    return Share(best.part.squeeze(dim), best.scale), Share(place.part.squeeze(dim), 1, winners=winners)


def _kth(
    context: Context, value: Share, k: int, dim: int = -1, keepdim: bool = False
) -> Protocol[tuple[Share, Share]]:
    return (yield from _of_rank("kthvalue", context, value, k - 1, dim, keepdim))


def _median(
    context: Context, value: Share, dim: int | None = None, keepdim: bool = False
) -> Protocol[object]:
    """The lower one of two in the middle, as torch has it."""
    if dim is not None:
        count = value.shape[dim] if value.part.dim() else 1
        _not_empty(count)
        return (yield from _of_rank("median", context, value, (count - 1) // 2, dim, keepdim))
    flat = Share(value.part.reshape(-1), value.scale)
    _not_empty(len(flat.part))
    found, _ = yield from _of_rank("median", context, flat, (len(flat.part) - 1) // 2, 0, False)
    return found


def _not_empty(count: int) -> None:
    if not count:
        raise SharingError("median: there is none of nothing")


ORDERS: dict[str, Kernel] = {
    "sort": _sort,
    "kthvalue": _kth,
    "median": _median,
    "nanmedian": _median,
}
"""ATen name -> protocol; see `kernels.ARITHMETIC`. `topk` is among `ORDERING`, which takes the first by a tree."""
