"""What the values of a plan depend on, kept per piece of memory, so that writes through views reach every
view.

Values that share memory are nodes of one tree: a view hangs below what it was taken from, with the fates of
the dimensions on the way (`planrt.plans.analysis.rows`). A write adds to its node, then to everything above
(which may hold more than what was written), then to everything below that. For example

    a = torch.zeros(4, 3)
    b, c = a[0], a.view(12)         two nodes below that of a
    b.add_(x)                       b depends on x; so does a, because b's memory is part of a's;
                                    and so does c, because it looks at all of a

Upwards a write keeps rows only where the view left their dimension as it was (`rows.upwards`): a row of x
that was written into ``a[0]`` stands in one row of a, and nothing says in which.

What a value depended on before a write is never taken away: `Node.write` has the reason.
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


class _Writes:
    """How often values of one piece of memory were written to."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Node:
    """A value: a tensor of some shape in a piece of memory, as a whole or as a view of another value.

    A write reaches what the value is a view of at once, up to the whole, and its other views when they are
    next asked about. A plan may have as many views as it has ops, and write to each: reaching all of them at
    each write would take time that grows with the square of its length.
    """

    __slots__ = ("_info", "_met", "_seen", "_writes", "children", "fates", "parent", "shape")

    def __init__(
        self, info: Info, shape: tuple[int, ...], parent: Node | None = None, fates: Fates = ()
    ) -> None:
        self._info = info
        self.shape = shape
        self.parent = parent
        self.fates = fates
        """Those of the parent's dimensions, in this view."""
        self.children: list[Node] = []
        self._writes = _Writes()
        """Of its memory: all views of it have the same object."""
        self._met = 0
        """How many of the writes `_info` has met."""
        self._seen: Info | None = None
        """The parent's info that `_info` has met."""
        if parent is not None:
            self._join(parent)

    def attach(self, parent: Node, fates: Fates) -> None:
        """From now on the value, which stood for itself, is a view of `parent`."""
        self.parent, self.fates = parent, fates
        self._join(parent)

    def _join(self, parent: Node) -> None:
        parent.children.append(self)
        self._seen = parent.info
        left = [self]
        while left:
            node = left.pop()
            node._writes, node._met = parent._writes, parent._writes.count
            left.extend(node.children)

    @property
    def info(self) -> Info:
        """Returns what the value depends on, after all writes so far."""
        if self._met != self._writes.count:
            self._meet_writes()
        return self._info

    def write(self, info: Info) -> None:
        """Notes that the value now depends on something else too, and so does what shares its memory.

        What was there before counts still, even where all of it was overwritten: whether ``y.contiguous()``
        is `y` or a copy hangs on strides, and those of a real run may be others than these.
        """
        self._info = joined(self.info, info)
        self._writes.count += 1
        node = self
        while True:
            node._met = (
                node._writes.count
            )  # what goes up from here need not come down here again, with less detail
            parent = node.parent
            if parent is None:
                break
            rows = {source: upwards(trace, node.fates) for source, trace in node._info.rows.items()}
            parent._info = joined(parent._info, Info(node._info.sources, node._info.ops, rows))
            node._seen = parent._info
            node = parent

    def _meet_writes(self) -> None:
        """Takes over, from the whole down to this view, what was written to the values it is a view of."""
        path = [self]
        while (above := path[-1].parent) is not None:
            path.append(above)
        for node in reversed(path):
            parent = node.parent
            if parent is not None and node._seen is not parent._info:  # an Info never changes
                node._info = joined(node._info, parent._info.through(parent.shape, node.fates))
                node._seen = parent._info
            node._met = node._writes.count
