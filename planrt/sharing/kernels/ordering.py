"""PyTorch's comparisons on shares, and what follows from them: choices, extremes, places, secret indices.

A comparison gives a share of whole numbers, 0 or 1. Exact: what is compared are the integers that hold the values, so
a number that all know counts as the multiple of 1 / scale nearest to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from planrt.errors import SharingError
from planrt.sharing import selection
from planrt.sharing.comparisons import equal_to, negative, zero
from planrt.sharing.kernels.arithmetic import (
    Kernel,
    One,
    add,
    as_fine_as,
    multiply,
    subtract,
    subtract_from,
    total,
)
from planrt.sharing.kernels.orders import top
from planrt.sharing.kernels.parts import Context, Share, Value, aligned, at, fractional, masked
from planrt.sharing.kernels.shapes import scatter_add_public, scatter_public
from planrt.sharing.kernels.sizes import needs_fractions
from planrt.sharing.masked import Bit, mask
from planrt.sharing.products import bit_times, bit_times_bit
from planrt.sharing.rounds import Protocol


def of_bit(context: Context, bit: Bit) -> Share:
    """Returns a secret bit as a share of whole numbers."""
    return Share(bit.share(context.party), 1, bit=bit)


def bit_of(context: Context, value: Share) -> Protocol[Bit]:
    """Returns [x != 0], which costs nothing for a secret bit."""
    if value.bit is not None:
        return value.bit
    (opened,) = yield from mask(context.party, value.part)
    equal = yield from zero(context.party, opened)
    return equal.negated()


def _kernel_of(name: str, finite: Kernel) -> One:
    """A comparison; with an infinity the answer is known, for shares hold none."""
    compared = getattr(torch, name)

    def kernel(context: Context, left: Value, right: Value) -> Protocol[Share]:
        values = [
            torch.zeros(()) if isinstance(one, Share) else torch.as_tensor(one) for one in (left, right)
        ]
        if any(one.dim() == 0 and one.is_floating_point() and bool(one.isinf()) for one in values):
            share = left if isinstance(left, Share) else right
            return context.share_of(compared(*values).long().expand(share.shape))
        found: Share = yield from finite(context, left, right)
        return found

    return kernel


def _below(context: Context, left: Value, right: Value) -> Protocol[Bit]:
    difference = yield from subtract(context, left, right)
    (opened,) = yield from mask(context.party, difference.part)
    return (yield from negative(context.party, opened))


def _less(context: Context, left: Value, right: Value) -> Protocol[Share]:
    return of_bit(context, (yield from _below(context, left, right)))


def _greater(context: Context, left: Value, right: Value) -> Protocol[Share]:
    return of_bit(context, (yield from _below(context, right, left)))


def _at_least(context: Context, left: Value, right: Value) -> Protocol[Share]:
    return of_bit(context, (yield from _below(context, left, right)).negated())


def _at_most(context: Context, left: Value, right: Value) -> Protocol[Share]:
    return of_bit(context, (yield from _below(context, right, left)).negated())


def _equal(context: Context, left: Value, right: Value) -> Protocol[Share]:
    difference = yield from subtract(context, left, right)
    (opened,) = yield from mask(context.party, difference.part)
    return of_bit(context, (yield from zero(context.party, opened)))


def _unequal(context: Context, left: Value, right: Value) -> Protocol[Share]:
    difference = yield from subtract(context, left, right)
    return of_bit(context, (yield from bit_of(context, difference)))


def _not(context: Context, value: Share) -> Protocol[Share]:
    return of_bit(context, (yield from bit_of(context, value)).negated())


def _both_bits(context: Context, left: Value, right: Value) -> Protocol[tuple[Share, Value, Share]]:
    """Both as bits, and their product."""
    if not isinstance(left, Share):
        left, right = right, left
    first = yield from bit_of(context, left)
    if not isinstance(right, Share):
        known = (torch.as_tensor(right) != 0).long()
        return of_bit(context, first), known, (yield from multiply(context, of_bit(context, first), known))
    second = yield from bit_of(context, right)
    shape = np.broadcast_shapes(first.shape, second.shape)
    both = bit_times_bit(context.party, first.expand(shape), second.expand(shape))
    return of_bit(context, first), of_bit(context, second), Share(both, 1)


def both(context: Context, left: Value, right: Value) -> Protocol[Share]:
    """Returns whether neither is 0."""
    return (yield from _both_bits(context, left, right))[2]


def _or(context: Context, left: Value, right: Value) -> Protocol[Share]:
    first, second, both = yield from _both_bits(context, left, right)
    return (yield from subtract(context, (yield from add(context, first, second)), both))


def _xor(context: Context, left: Value, right: Value) -> Protocol[Share]:
    first, second, both = yield from _both_bits(context, left, right)
    return (yield from add(context, (yield from add(context, first, second)), both, alpha=-2))


def where(context: Context, condition: Value, first: Value, second: Value) -> Protocol[Share]:
    """Chooses by a condition that all know, or by a secret one: one round for a secret bit."""
    if not isinstance(condition, Share):
        first, second = context.share_of(first), context.share_of(second)
        scale = yield from aligned(context, first, second)
        return Share(
            torch.where(torch.as_tensor(condition).bool(), at(first, scale), at(second, scale)), scale
        )
    bit = yield from bit_of(context, condition)
    if not isinstance(first, Share) and not isinstance(second, Share):
        one, other = torch.as_tensor(first), torch.as_tensor(second)
        whole = not one.is_floating_point() and not other.is_floating_point()
        difference = one.long() - other.long() if whole else one.double() - other.double()
        chosen = yield from multiply(context, of_bit(context, bit), difference)
        return (yield from add(context, chosen, second))
    first, second = context.share_of(first), context.share_of(second)
    scale = yield from aligned(context, first, second)
    rest = at(second, scale)
    difference = at(first, scale) - rest
    shape = np.broadcast_shapes(bit.shape, difference.shape)
    (opened,) = yield from mask(context.party, difference)
    return Share(rest + bit_times(context.party, bit.expand(shape), opened.expand(shape)), scale)


def _masked_fill(context: Context, value: Share, condition: Value, known: Value) -> Protocol[Share]:
    return (yield from where(context, condition, known, value))


def _maximum(context: Context, left: Value, right: Value) -> Protocol[Share]:
    left, right = context.share_of(left), context.share_of(right)
    scale = yield from aligned(context, left, right)
    found = yield from selection.maximum(context.party, at(left, scale), at(right, scale))
    return as_fine_as(Share(found, scale), left, right)


def _minimum(context: Context, left: Value, right: Value) -> Protocol[Share]:
    left, right = context.share_of(left), context.share_of(right)
    scale = yield from aligned(context, left, right)
    found = yield from selection.minimum(context.party, at(left, scale), at(right, scale))
    return as_fine_as(Share(found, scale), left, right)


def clamp(context: Context, value: Value, min: Value = None, max: Value = None) -> Protocol[Share]:
    """Clamps to bounds: both at once where they are numbers; as in torch, `max` wins."""
    if not isinstance(value, Share):
        value = context.share_of(value)
    if all(one is None or isinstance(one, int | float) for one in (min, max)):
        if value.scale == 1 and any(one is not None and needs_fractions(one) for one in (min, max)):
            (value,) = yield from fractional(context, value)
        low, high = (None if one is None else _bound(one, value.scale) for one in (min, max))
        return Share((yield from selection.clamp(context.party, value.part, low, high)), value.scale)
    if min is not None:
        value = yield from _maximum(context, value, min)
    return value if max is None else (yield from _minimum(context, value, max))


def _bound(number: float, scale: int) -> int | None:
    if math.isnan(number):
        raise SharingError("shares are clamped to numbers: a bound is not one")
    return None if math.isinf(number) else round(number * scale)


def _clamp_min(context: Context, value: Share, min: Value) -> Protocol[Share]:
    return (yield from clamp(context, value, min))


def _clamp_max(context: Context, value: Share, max: Value) -> Protocol[Share]:
    return (yield from clamp(context, value, None, max))


def _abs(context: Context, value: Share) -> Protocol[Share]:
    return Share((yield from selection.absolute(context.party, value.part)), value.scale)


def _sgn(context: Context, value: Share) -> Protocol[Share]:
    return Share((yield from selection.sign(context.party, value.part)), 1)


def _everywhere(answer: int) -> One:
    """What holds of all that shares can hold, or of none."""

    def kernel(context: Context, value: Share) -> Protocol[Share]:
        yield from ()
        return context.share_of(torch.full(value.shape, answer))

    return kernel


# --------------------------------------------------------------------------------------------------- the largest


def _at_end(value: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """The dimensions `dims` as one, at the end."""
    if not value.dim():
        return value.reshape(1)
    chosen = sorted(dim % value.dim() for dim in dims) if dims else list(range(value.dim()))
    rest = [dim for dim in range(value.dim()) if dim not in chosen]
    moved = value.permute([*rest, *chosen])
    return moved.reshape([*moved.shape[: len(rest)], math.prod(moved.shape[len(rest) :])])


def _extreme(sign: int) -> One:
    """amax or amin."""

    def kernel(
        context: Context, value: Share, dim: Sequence[int] = (), keepdim: bool = False
    ) -> Protocol[Share]:
        found, _ = yield from selection.largest(context.party, _at_end(sign * value.part, dim), -1)
        if keepdim:
            chosen = {one % max(value.part.dim(), 1) for one in dim} or set(range(value.part.dim()))
            found = found.reshape([1 if at_ in chosen else size for at_, size in enumerate(value.shape)])
        return Share(sign * found, value.scale)

    return kernel


def _chosen(sign: int) -> Kernel:
    """max or min: of all, or with places along a dimension."""
    whole = _extreme(sign)

    def kernel(
        context: Context, value: Share, dim: int | None = None, keepdim: bool = False
    ) -> Protocol[Any]:
        if dim is None:
            one: Share = yield from whole(context, value)
            return one
        if not value.part.dim():
            return value.copied(), context.share_of(torch.tensor(0))
        found = yield from selection.leading(context.party, sign * value.part, dim, index=True)
        best, place = found.value, found.place
        if keepdim:
            best, place = best.unsqueeze(dim), place.unsqueeze(dim)
        return Share(sign * best, value.scale), Share(place, 1, winners=found.winners)

    return kernel


def _place_of(sign: int) -> One:
    """argmax or argmin: the first of the largest."""
    along = _chosen(sign)

    def kernel(
        context: Context, value: Share, dim: int | None = None, keepdim: bool = False
    ) -> Protocol[Share]:
        if dim is not None:
            one: Share = (yield from along(context, value, dim, keepdim))[1]
            return one
        flat = Share(value.part.reshape(-1), value.scale)
        _, place = yield from along(context, flat, 0)
        return Share(place.part.reshape([1] * value.part.dim()), 1) if keepdim else place

    return kernel


def _top(
    context: Context, value: Share, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Protocol[tuple[Share, Share]]:
    if k != 1:
        return (yield from top(context, value, k, dim, largest))
    found: tuple[Share, Share] = yield from _chosen(1 if largest else -1)(context, value, dim, True)
    return found


# ------------------------------------------------------------------------------------------------ secret indices


def one_hot(context: Context, index: Share, count: int) -> Protocol[Bit]:
    """Returns [index == c] for c from 0 to `count` - 1: bits of shape (count, *index.shape), three rounds.

    An index out of range has no bit set.
    """
    if index.scale != 1:
        raise SharingError("a shared index is a share of whole numbers, such as argmax gives: share integers")
    if index.winners is not None and index.winners.shape[0] == count:
        return index.winners.reshape((count, *index.shape))
    (opened,) = yield from masked(context, index)
    return (yield from equal_to(context.party, opened, range(count)))


def _one_hot(context: Context, index: Share, count: int = -1) -> Protocol[Share]:
    if count < 1:
        raise SharingError("how many classes there are is not opened: write one_hot(x, num_classes)")
    bits = yield from one_hot(context, index, count)
    return Share(bits.share(context.party).movedim(0, -1), 1)


def _gather(
    context: Context, value: Value, dim: int, index: Value, sparse_grad: bool = False
) -> Protocol[Share]:
    if not isinstance(index, Share):
        return Share(value.part.gather(dim, index), value.scale)
    value = context.share_of(value)
    dim = dim % value.part.dim()
    bits = yield from one_hot(context, index, value.shape[dim])
    part = value.part
    for at_, size in enumerate(index.shape):
        part = part if at_ == dim else part.narrow(at_, 0, size)
    (opened,) = yield from mask(context.party, part)
    moved = opened.permute([dim, *[one for one in range(part.dim()) if one != dim]])
    wide = moved.reshape([*moved.shape[: dim + 1], 1, *moved.shape[dim + 1 :]]).expand(bits.shape)
    return Share(bit_times(context.party, bits, wide).sum(0), value.scale)


def _scatter(
    context: Context, value: Value, dim: int, index: Value, source: Value, **options: Any
) -> Protocol[Share]:
    if options:
        raise SharingError("scatter of shares replaces: write scatter_add to add, leave reduce out")
    if not isinstance(index, Share):
        return (yield from scatter_public(context, value, dim, index, source))
    value = context.share_of(value)
    dim = dim % value.part.dim()
    if index.shape[dim] != 1:
        return (yield from _scatter_all(context, value, dim, index, source))
    bits = yield from one_hot(context, index, value.shape[dim])
    hot = of_bit(context, bits.transpose(0, dim + 1).reshape(_with(index.shape, dim, value.shape[dim])))
    if value.shape != hot.shape:
        raise SharingError(
            f"scatter at secret places has an index of {list(hot.shape)} but for 1 in dimension {dim}"
        )
    wide = (
        Share(source.part.expand(hot.shape), source.scale)
        if isinstance(source, Share)
        else torch.as_tensor(source).expand(hot.shape)
    )
    return (yield from where(context, hot, wide, value))


def _scatter_all(context: Context, value: Share, dim: int, index: Share, source: Value) -> Protocol[Share]:
    """Writes to several secret places along a dimension, which are known to be different: those that `sort` gives."""
    if index.along != dim or index.winners is None or len(index.winners.opened) != value.shape[dim]:
        raise SharingError(
            "one secret place along the dimension is written to, or those that sort and topk give: others may be "
            "the same"
        )
    bits = yield from one_hot(context, index, value.shape[dim])
    hot = of_bit(context, bits)
    if isinstance(source, Share):
        part = source.part
        for at_, size in enumerate(index.shape):
            part = part.narrow(at_, 0, size)
        (opened,) = yield from mask(context.party, part)
        put = Share(bit_times(context.party, bits, opened.expand(bits.shape)), source.scale)
    else:
        known = torch.as_tensor(source)
        places = tuple(slice(size) for size in index.shape) if known.dim() else ()
        put = yield from multiply(context, hot, known[places].expand(bits.shape))
    put = Share(put.part.sum(dim + 1).movedim(0, dim), put.scale)
    if put.shape != value.shape:
        raise SharingError(
            f"scatter at secret places has an index of {list(value.shape)} but in dimension {dim}"
        )
    taken = Share(hot.part.sum(dim + 1).movedim(0, dim), 1)
    left = yield from multiply(context, value, (yield from subtract_from(context, taken, 1)))
    return (yield from add(context, left, put))


def _scatter_add(context: Context, value: Value, dim: int, index: Value, source: Value) -> Protocol[Share]:
    if not isinstance(index, Share):
        return (yield from scatter_add_public(context, value, dim, index, source))
    value, source = context.share_of(value), context.share_of(source)
    dim = dim % value.part.dim()
    bits = yield from one_hot(context, index, value.shape[dim])
    part = source.part
    for at_, size in enumerate(index.shape):
        part = part.narrow(at_, 0, size)
    (opened,) = yield from mask(context.party, part)
    summed = bit_times(context.party, bits, opened.expand(bits.shape)).sum(dim + 1).movedim(0, dim)
    if summed.shape != value.shape:
        raise SharingError(
            f"scatter_add at secret places has an index of {list(value.shape)} but in dimension {dim}"
        )
    return (yield from add(context, value, Share(summed, source.scale)))


def _with(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return tuple(size if at_ == dim else one for at_, one in enumerate(shape))


def any_of(context: Context, value: Share, dim: Any = None, keepdim: bool = False) -> Protocol[Share]:
    """Returns whether one is not 0."""
    counted = yield from _counted(context, value, dim, keepdim)
    return of_bit(context, (yield from bit_of(context, counted)))


def all_of(context: Context, value: Share, dim: Any = None, keepdim: bool = False) -> Protocol[Share]:
    """Returns whether none is 0."""
    counted = yield from _counted(context, value, dim, keepdim)
    missing = yield from subtract(context, counted, value.part.numel() // max(1, counted.part.numel()))
    return of_bit(context, (yield from bit_of(context, missing)).negated())


def _counted(context: Context, value: Share, dim: Any, keepdim: bool) -> Protocol[Share]:
    bits = of_bit(context, (yield from bit_of(context, value)))
    return (yield from total(context, bits, [dim] if isinstance(dim, int) else dim, keepdim))


less = _kernel_of("lt", _less)
greater = _kernel_of("gt", _greater)
largest = _extreme(1)

ORDERING: dict[str, Kernel] = {
    "lt": less,
    "gt": greater,
    "ge": _kernel_of("ge", _at_least),
    "le": _kernel_of("le", _at_most),
    "eq": _kernel_of("eq", _equal),
    "ne": _kernel_of("ne", _unequal),
    "logical_not": _not,
    "logical_and": both,
    "logical_or": _or,
    "logical_xor": _xor,
    "any": any_of,
    "all": all_of,
    "isnan": _everywhere(0),
    "isinf": _everywhere(0),
    "isfinite": _everywhere(1),
    "where": where,
    "masked_fill": _masked_fill,
    "maximum": _maximum,
    "minimum": _minimum,
    "clamp": clamp,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    "abs": _abs,
    "sgn": _sgn,
    "sign": _sgn,
    "amax": largest,
    "amin": _extreme(-1),
    "max": _chosen(1),
    "min": _chosen(-1),
    "argmax": _place_of(1),
    "argmin": _place_of(-1),
    "topk": _top,
    "one_hot": _one_hot,
    "gather": _gather,
    "scatter": _scatter,
    "scatter_add": _scatter_add,
}
"""ATen name -> protocol; see `kernels.ARITHMETIC`."""
