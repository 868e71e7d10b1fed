"""When a connection that was lost is tried again: at once, then after pauses that grow, each with jitter."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from planrt.workers.transport.pipes import Pipe

RECONNECT_SECONDS: Final = 0.0
"""For how long a client tries to go on with its session, unless it says more: who counts on being told at once of a
worker that is lost is told at once."""
FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 5.0
"""Seconds; each pause is up to twice the one before."""


@dataclass(frozen=True, slots=True)
class Redialling:
    """The way to open a connection again, as it was opened the first time.

    Attributes:
        dial: opens a pipe to the worker.
        token, for_others: as of `ClientSession.hello`.
        seconds: for how long it is tried after it was lost; 0 for not at all, unless its user says so.
    """

    dial: Callable[[], Awaitable[Pipe]]
    token: str = field(default="", repr=False)
    for_others: bool = False
    seconds: float = RECONNECT_SECONDS


class Pauses:
    """The pauses between tries. So many clients that lost one worker at the same time do not all come back at once."""

    def __init__(self, jitter: random.Random) -> None:
        self._jitter = jitter
        self._next = FIRST_PAUSE

    def next(self) -> float:
        """Returns how long to wait before the next try, in seconds."""
        longest, self._next = self._next, min(LONGEST_PAUSE, 2 * self._next)
        return self._jitter.uniform(longest / 2, longest)
