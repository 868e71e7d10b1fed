"""Where the rows of an input are in a value that was computed from it, and over how many rows it was
aggregated.

Dimension 0 of an input holds its *rows*: one person, one record each. A `Trace` says what a value knows of
them:

* it has *axes*: an entry depends on one row (or on an aggregate over a group of rows), and which one, its
  position along the axis tells. Different positions are different rows. So an operation that combines all
  positions of an axis, such as a sum, aggregates over as many rows as the axis has.
* every other dependence goes through aggregates over `least` rows or more.
* or the rows are *lost*: some operation did with them what cannot be followed. A lost value counts as raw.

An axis need not be one dimension. ``x.view(-1, f)`` merges rows with others, ``x.view(10, 100, f)`` spreads
them over two. So an axis is a list of `Digit`s: its position is a number in a mixed radix, and each digit
stands in some dimension. Summing the 100 away leaves an axis of ten positions whose entries aggregate 100
rows each (`done`).

What one operation does with the dimensions of one argument is again a list of traces, one for each dimension
(its *fates*), as though that dimension held the rows. `compose` puts the two together. It is all there is to
following rows: through a kernel, through a whole op, and through a plan.

An example, `x` with six rows of four numbers, as the traces of its rows go (`tests/plans/test_rows.py` holds
it):

    x                      [6, 4]     axis of 6: one digit, dim 0.                       rows 1: raw
    y = x.view(2, 3, 4)    [2, 3, 4]  axis of 6: position = 3 * dim 0 + dim 1,
                                      so the digits (dim 1, size 3, weight 1)
                                      and (dim 0, size 2, weight 3).                     rows 1: raw
    z = y.sum(1)           [2, 4]     the digit of dim 1 is folded: 3 rows are in each
                                      entry; left is an axis of 2, dim 0, done 3.        rows 3
    z.sum(0)               [4]        the last digit is folded too: no axis, least 6.    rows 6
    y.sum(0)               [3, 4]     instead of z: axis of 3, dim 1, done 2.            rows 2

Why rows are lost, by three cases:

* ``x[1:] - x[:-1]``: both operands have an axis of 5 in dim 0, and at one position stand rows n + 1 and n. A
  sum over it would count as an aggregate of 5, and is ``x[5] - x[0]``, of two rows. So two axes that share a
  dimension must have the same rows at the same positions (`_clash`), or the value is lost.
* ``x.max(0)``: the entry *is* one row's. What selects loses the dimension that it selects from, however many
  rows it looked at.
* ``x.view(4, 6)``: four rows of six numbers out of six of four. A new row has parts of two old ones, and no
  digit of the old position stands in one dimension: `_place` finds no room for it.

This is an information-flow rule about the program's form, not about numbers: see what it does not stop in
`planrt.plans.policy.rules`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import combinations, product
from typing import Any, Final, NamedTuple

NO_AGGREGATE: Final = sys.maxsize
"""`Trace.least` of a value that went through no aggregate."""

_MAX_AXES = 16  # more than any real program has; a hostile one is lost instead


class Digit(NamedTuple):
    """Part of an axis: ``position // weight % size`` equals ``index // inner % size`` in dimension `dim`."""

    dim: int
    inner: int
    size: int
    weight: int


class Axis(NamedTuple):
    """`length` positions, each with its own `done` rows. `order` tells which rows were picked, in which
    order: axes of equal order and digits have the same rows at the same positions. `partial`: the rest of the
    dimension is others'."""

    length: int
    digits: tuple[Digit, ...]
    done: int = 1
    order: tuple[Any, ...] = ()
    partial: bool = False


class Trace(NamedTuple):
    """The trace of one input's rows in a value. `lost` names the kernel that could not be followed, and the
    place of its op in the plan (-1: not said)."""

    axes: tuple[Axis, ...] = ()
    least: int = NO_AGGREGATE
    kinds: frozenset[str] = frozenset()
    lost: tuple[str, int] | None = None

    @property
    def rows(self) -> int:
        """Over how many rows everything was aggregated; 1 when raw."""
        return 1 if self.lost else min([self.least, *[axis.done for axis in self.axes]])

    @property
    def raw(self) -> bool:
        """Tells whether the value may show single rows."""
        return self.rows <= 1


NOTHING: Final = Trace()


@lru_cache(maxsize=1024)
def lost(kernel: str) -> Trace:
    """Returns the fate of a dimension that `kernel` takes apart."""
    return Trace((), 0, frozenset(), (kernel, -1))


@lru_cache(maxsize=4096)
def keep(dim: int, size: int) -> Trace:
    """Returns the fate of a dimension of `size` that becomes dimension `dim`."""
    return Trace((Axis(size, (Digit(dim, 1, size, 1),)),))


@lru_cache(maxsize=4096)
def fold(size: int, kind: str) -> Trace:
    """Returns the fate of a dimension of `size` that an aggregate of this `kind` makes disappear."""
    return Trace((), size, frozenset((kind,)))


def moved(dim: int, size: int, *how: Any, partial: bool = False) -> Trace:
    """Returns the fate of a dimension of which `size` entries go to dimension `dim`, others or in another
    order than before."""
    return Trace((Axis(size, (Digit(dim, 1, size, 1),), 1, (how,), partial),))


def reshaped(stride: int, size: int, shape: Sequence[int], kernel: str) -> Trace:
    """Returns the fate of a dimension (its row-major stride and size) in a tensor of the same elements with
    another `shape`."""
    digits = _place(stride, size, 1, _slots(shape))
    return lost(kernel) if digits is None else Trace((Axis(size, digits),))


def _slots(shape: Sequence[int]) -> list[tuple[int, int, int, int]]:
    slots, stride = [], 1
    for dim in range(len(shape) - 1, -1, -1):
        slots.append((stride, shape[dim], dim, 1))
        stride *= shape[dim]
    return slots


def _place(
    stride: int, size: int, weight: int, slots: Sequence[tuple[int, int, int, int]]
) -> tuple[Digit, ...] | None:
    """The digit ``index // stride % size`` as digits in `slots` (stride, size, dim, inner); None if it does
    not fit.

    A slot is a digit of the new index: ``index // stride % size`` of the flat index is ``// inner`` of
    dimension `dim`. A digit goes into the slot in whose range its stride lies, as much of it as there is
    room, and the rest into the next slot up. Where the borders of digit and slot are no multiples of each
    other, an entry of the slot would hold parts of several positions, and nothing could be said about its
    rows: None.
    """
    digits = []
    while size > 1:
        slot = next((one for one in slots if one[0] <= stride < one[0] * one[1]), None)
        if slot is None:
            return None
        low, extent, dim, inner = slot
        room, uneven = divmod(low * extent, stride)
        if stride % low or uneven:
            return None
        taken = min(room, size)
        if room % taken or size % taken:
            return None
        digits.append(Digit(dim, inner * (stride // low), taken, weight))
        stride, size, weight = stride * taken, size // taken, weight * taken
    return tuple(digits)


def compose(trace: Trace, shape: Sequence[int], fates: Sequence[Trace]) -> Trace:
    """Returns the trace of what an operation makes of a value of `shape` with `trace`, by the fates of its
    dimensions."""
    if not trace.axes:
        return trace
    axes: list[Axis] = []
    least, kinds = trace.least, trace.kinds
    for axis in trace.axes:
        part = _follow(axis, shape, fates)
        if part.lost:
            return part
        axes += part.axes
        least, kinds = min(least, part.least), kinds | part.kinds
    return _checked(axes, least, kinds)


def _follow(axis: Axis, shape: Sequence[int], fates: Sequence[Trace]) -> Trace:
    if len(axis.digits) == 1:
        digit = axis.digits[0]
        size = shape[digit.dim]
        if digit.inner == 1 and digit.size == size and not axis.partial:
            return _follow_whole(axis, fates[digit.dim])
        if axis.partial:
            return _follow_partial(axis, size, fates[digit.dim])
    options: list[list[tuple[Digit, ...] | None]] = []  # None: this digit is folded
    kinds: frozenset[str] = frozenset()
    for digit in axis.digits:
        fate, size = fates[digit.dim], shape[digit.dim]
        if fate.lost:
            return fate
        found: list[tuple[Digit, ...] | None] = []
        if fate.least != NO_AGGREGATE:
            if (
                fate.least != size
            ):  # over a part of the dimension: how many of this axis's rows, cannot be told
                return lost("partial aggregate")
            found.append(None)
            kinds |= fate.kinds
        for new in fate.axes:
            slots = [(one.weight, one.size, one.dim, one.inner) for one in new.digits]
            digits = _place(digit.inner, digit.size, digit.weight, slots)
            if digits is None or new.order or new.partial or new.done != 1:
                return lost("reordered groups")
            found.append(digits)
        options.append(found)
    # An argument may reach the result in several ways (as a sum and as it is, in layer norm). Each choice of one way
    # for every digit is a way for the axis: its folded digits multiply into `done`, the others are the axis that is
    # left; and where none is left, all that comes this way is an aggregate over `done` rows.
    axes, least = [], NO_AGGREGATE
    for choice in product(*options):
        done = axis.done
        rest: list[Digit] = []
        for digit, placed in zip(axis.digits, choice, strict=True):
            if placed is None:
                done *= digit.size
            else:
                rest += placed
        if rest or not axis.digits:
            length = axis.length * axis.done // done
            axes.append(axis._replace(length=length, digits=_joined(rest), done=done))
        else:
            least = min(least, done)
    return Trace(tuple(axes), least, kinds)


def _follow_whole(axis: Axis, fate: Trace) -> Trace:
    """An axis that is one whole dimension: the usual case."""
    if fate.lost:
        return fate
    axes = []
    for new in fate.axes:
        axes.append(Axis(new.length, new.digits, axis.done * new.done, axis.order + new.order, new.partial))
    least = fate.least if fate.least == NO_AGGREGATE else axis.done * fate.least
    return Trace(tuple(axes), least, fate.kinds)


def _follow_partial(axis: Axis, size: int, fate: Trace) -> Trace:
    """An axis that shares its dimension with the rows of others (by `torch.cat`)."""
    if fate.lost:
        return fate
    if fate.least not in (NO_AGGREGATE, size):
        return lost("partial aggregate")
    axes = []
    for new in fate.axes:
        if new.length != size or len(new.digits) != 1 or new.partial or new.done != 1:
            return lost("part of joined rows")
        axes.append(axis._replace(digits=new.digits, order=axis.order + new.order))
    least = NO_AGGREGATE if fate.least == NO_AGGREGATE else axis.done * axis.length
    return Trace(tuple(axes), least, fate.kinds)


def _joined(digits: Iterable[Digit]) -> tuple[Digit, ...]:
    """Neighbouring digits of one dimension as one."""
    merged: list[Digit] = []
    for digit in sorted(digits, key=lambda one: one.weight):
        if merged:
            low = merged[-1]
            if (
                low.dim == digit.dim
                and digit.weight == low.weight * low.size
                and digit.inner == low.inner * low.size
            ):
                merged[-1] = low._replace(size=low.size * digit.size)
                continue
        merged.append(digit)
    return tuple(merged)


def join(one: Trace, other: Trace) -> Trace:
    """Returns the trace of a value that depends on rows in both ways."""
    if one is other or other == one:
        return one
    if one.lost or other.lost:
        return one if one.lost else other
    least, kinds = min(one.least, other.least), one.kinds | other.kinds
    if not other.axes or one.axes == other.axes:
        return Trace(one.axes, least, kinds)
    if not one.axes:
        return Trace(other.axes, least, kinds)
    return _checked([*one.axes, *other.axes], least, kinds)


def _checked(axes: list[Axis], least: int, kinds: frozenset[str]) -> Trace:
    """A trace with these axes, unless two of them put different rows at one place.

    Of ``x[1:] - x[:-1]`` a sum leaves two rows, however long it is: positions would no longer stand for rows.
    """
    if len(axes) > 1:
        axes = sorted(set(axes), key=repr)
        if len(axes) > _MAX_AXES or any(_clash(one, two) for one, two in combinations(axes, 2)):
            return lost("different rows at one place")
    return Trace(tuple(axes), least, kinds)


def _clash(one: Axis, two: Axis) -> bool:
    if not {digit.dim for digit in one.digits} & {digit.dim for digit in two.digits}:
        return False
    if one.order != two.order or one.partial or two.partial:
        return True
    digits = set(one.digits), set(two.digits)
    return not (digits[0] <= digits[1] or digits[1] <= digits[0])


def upwards(trace: Trace, fates: Sequence[Trace]) -> Trace:
    """Returns what a tensor gets when a view of it, made with these `fates`, is written with a value of
    `trace`."""
    back = dict(_unchanged(fates))
    axes = []
    for axis in trace.axes:
        if any(digit.dim not in back for digit in axis.digits):
            return lost("write through a view")
        axes.append(
            axis._replace(digits=tuple([digit._replace(dim=back[digit.dim]) for digit in axis.digits]))
        )
    return trace._replace(axes=tuple(axes))


def _unchanged(fates: Sequence[Trace]) -> Iterator[tuple[int, int]]:
    """(dimension of the view, dimension of its base) where these are the same."""
    for dim, fate in enumerate(fates):
        if len(fate.axes) == 1 and fate.least == NO_AGGREGATE:
            axis = fate.axes[0]
            if len(axis.digits) == 1 and axis == keep(axis.digits[0].dim, axis.length).axes[0]:
                yield axis.digits[0].dim, dim
