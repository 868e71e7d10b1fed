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
    """Of one group at one worker: what is computed in several steps, one after the other."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Hashable, list[float]] = OrderedDict()
        self._steps: list[float] = []
        self._step = 0
        self._took = self._clock = 0.0
        self.next = math.inf
        """Seconds of a processor's time that the next step took when the computation ran last; infinite if none did."""

    def begin(self, what: Hashable) -> None:
        """Begins the first step of a computation; `what` is None of one that is not known again."""
        self._steps = [] if what is None else self._seen.setdefault(what, [])
        if what is not None:
            self._seen.move_to_end(what)
        if len(self._seen) > _MOST:
            self._seen.popitem(last=False)
        self._step, self._took = 0, 0.0
        self.next = self._steps[0] if self._steps else math.inf
        self.go_on()

    def rest(self) -> None:
        """Stops the clock: what follows is no part of it, and may be done by another thread."""
        self._took += time.thread_time() - self._clock

    def go_on(self) -> None:
        """Starts the clock again."""
        self._clock = time.thread_time()

    def end_step(self) -> None:
        """Ends a step, and stops the clock."""
        steps, ended = self._steps, self._step
        steps[ended : ended + 1] = [self._took + time.thread_time() - self._clock]
        self._step, self._took = ended + 1, 0.0
        self.next = steps[ended + 1] if ended + 1 < len(steps) else math.inf

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
    if not isinstance(refs, tuple) or not {Ref}.issuperset(map(type, refs)):
        return None
    found = op.name, what, tuple([shape_of(one.index) for one in refs])
    try:
        hash(found)
    except TypeError:  # no client of ours sends that
        return None
    return found
