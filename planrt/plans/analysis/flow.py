"""What the values of a plan depend on, kept per piece of memory, so that writes through views reach every view.

Values that share memory are nodes of one tree: a view hangs below what it was taken from, with the fates of the
dimensions on the way (`planrt.plans.analysis.rows`). A write adds to its node, then to everything above (which may
hold more than what was written), then to everything below that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from planrt.plans.analysis.rows import Trace, compose, join, keep, upwards

Fates = tuple[Trace, ...]


@lru_cache(maxsize=4096)
def same_place(shape: tuple[int, ...]) -> Fates:
    """Returns the fates of dimensions of which each stays what it is, as elementwise operations have it."""
    return tuple([keep(dim, size) for dim, size in enumerate(shape)])


@dataclass(frozen=True, slots=True)
class Info:
    """The sources, ops and rows that a value depends on.

    `sources` and `ops` are bit masks: bit n for the plan's value n (inputs, then state), and for its op n.
    `rows` has a trace for each source whose rows are followed.
    """

    sources: int = 0
    ops: int = 0
    rows: Mapping[int, Trace] = field(default_factory=dict)

    def through(self, shape: tuple[int, ...], fates: Fates) -> Info:
        """Returns what the result of an operation with these fates depends on."""
        if not self.rows or fates == same_place(shape):
            return self
        rows = {source: compose(trace, shape, fates) for source, trace in self.rows.items()}
        return Info(self.sources, self.ops, rows)


INDEPENDENT = Info()


def joined(one: Info, other: Info) -> Info:
    """Returns what a value depends on that depends on both."""
    if other is one or other is INDEPENDENT:
        return one
    if one is INDEPENDENT:
        return other
    if not one.rows:
        rows = other.rows
    elif not other.rows or one.rows is other.rows:
        rows = one.rows
    else:
        rows = dict(one.rows)
        for source, trace in other.rows.items():
            before = rows.get(source)
            rows[source] = trace if before is None else join(before, trace)
    return Info(one.sources | other.sources, one.ops | other.ops, rows)


def all_lost(info: Info, kernel: str, index: int = -1) -> Info:
    """Returns what a value depends on that `kernel` made of one with `info`, if rows cannot be followed
    through it.

    `index`: the place of its op in the plan, -1 if that is not said.
    """
    rows = {
        source: Trace((), 0, frozenset(), (kernel, index)) if trace.axes else trace
        for source, trace in info.rows.items()
    }
    return Info(info.sources, info.ops, rows)


class Node:
    """A value: a tensor of some shape in a piece of memory."""

    __slots__ = ("children", "fates", "info", "parent", "shape")

    def __init__(
        self, info: Info, shape: tuple[int, ...], parent: Node | None = None, fates: Fates = ()
    ) -> None:
        self.info = info
        self.shape = shape
        self.parent = parent
        self.fates = fates
        """Those of the parent's dimensions, in this view."""
        self.children: list[Node] = []
        if parent is not None:
            parent.children.append(self)

    def write(self, info: Info) -> None:
        """Notes that the value now depends on something else too, and so does what shares its memory.

        What was there before counts still, even where all of it was overwritten: whether ``y.contiguous()`` is `y` or a
        copy hangs on strides, and those of a real run may be others than these.
        """
        self.info = joined(self.info, info)
        node = self
        while node.parent is not None:
            parent = node.parent
            rows = {source: upwards(trace, node.fates) for source, trace in node.info.rows.items()}
            parent.info = joined(parent.info, Info(node.info.sources, node.info.ops, rows))
            node._refresh_others(parent)
            node = parent
        self._refresh()

    def _refresh_others(self, parent: Node) -> None:
        for child in parent.children:
            if child is not self:
                child._take(parent)

    def _refresh(self) -> None:
        for child in self.children:
            child._take(self)

    def _take(self, parent: Node) -> None:
        self.info = joined(self.info, parent.info.through(parent.shape, self.fates))
        self._refresh()
