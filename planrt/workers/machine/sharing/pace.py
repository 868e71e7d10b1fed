"""How long computations of a group take at a time, as it was seen. No I/O.

A program that runs again on operands of the same shapes takes as long as before, and so does what the dealer makes for
it. So a worker knows what is short enough to be done where the message arrives that it waits for (`handling.short`).
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Final

from planrt.types import Ref
from planrt.workers.wire.posted import PROGRAM, PostedOp
from planrt.workers.wire.shared_plan import CALL

SHORT: Final = 0.01
"""Seconds of a processor's time that a worker may compute for a group while it answers nobody."""

_MOST: Final = 256
"""Computations that are remembered."""


class Pace:
    """Of one group at one worker: what is computed in several steps, one after the other.

    What was short is timed on the wall's clock: that is read in a twentieth of the time, and never shows less than the
    processor's. Where it shows more than `SHORT`, the processor's is looked at when the computation runs next.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[Hashable, list[float]] = OrderedDict()
        self._steps: list[float] = []
        self._step = 0
        self._took = self._begun = 0.0
        self._clock = time.thread_time
        self.next = math.inf
        """Seconds that the next step took when the computation ran last; infinite if none did."""

    def begin(self, what: Hashable) -> None:
        """Begins the first step of a computation; `what` is None of one that is not known again."""
        self._steps = [] if what is None else self._seen.setdefault(what, [])
        if what is not None:
            self._seen.move_to_end(what)
        if len(self._seen) > _MOST:
            self._seen.popitem(last=False)
        self._come_to(0)
        self.go_on()

    def _come_to(self, step: int) -> None:
        self._step, self._took = step, 0.0
        self.next = self._steps[step] if step < len(self._steps) else math.inf
        self._clock = time.perf_counter if self.next < SHORT else time.thread_time

    def rest(self) -> None:
        """Stops the clock: what follows is no part of it, and may be done by another thread."""
        self._took += self._clock() - self._begun

    def go_on(self) -> None:
        """Starts the clock again."""
        self._begun = self._clock()

    def end_step(self) -> None:
        """Ends a step, and stops the clock."""
        took = self._took + self._clock() - self._begun
        if self.next < SHORT < took:
            took = SHORT
        self._steps[self._step : self._step + 1] = [took]
        self._come_to(self._step + 1)

    def first(self, what: Hashable) -> float:
        """Returns how long the first step of a computation took then."""
        steps = self._seen.get(what)
        return steps[0] if steps else math.inf


def known_again(op: PostedOp, shape_of: Callable[[int], Any]) -> Hashable:
    """Returns what tells that a posted program or plan takes as long as another one; None where nothing does.

    `shape_of` returns the shape of an object.
    """
    if op.name == PROGRAM and len(op.args) == 4:
        _, text, refs, told = op.args
        what: Any = (told,)
        if text:
            return None
    elif op.name == CALL and len(op.args) == 6:
        _, plan, training, identity, looks, refs = op.args
        what = (plan, training, identity, looks, op.grad)
    else:
        return None
    if not isinstance(refs, tuple) or not {Ref, float, int}.issuperset(map(type, refs)):
        return None
    found = op.name, what, tuple([shape_of(one.index) if type(one) is Ref else None for one in refs])
    try:
        hash(found)
    except TypeError:  # no client of ours sends that
        return None
    return found
