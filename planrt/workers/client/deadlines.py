"""How long calls wait: `waiting` sets it for a block, and every wait for a worker's answer keeps it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from planrt.errors import OptionError
from planrt.types import plain

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deadline:
    """A time on the clock of `time.monotonic`, and how many seconds that was away."""

    at: float
    seconds: float


_deadline: ContextVar[Deadline | None] = ContextVar("planrt_deadline", default=None)
"""Of the calls in this context. What is started on planrt's loop has the context of who started it."""


def seconds_of(value: object, name: str = "timeout") -> float | None:
    """Returns a number of seconds that a user gave; None for as long as it takes.

    Raises:
        OptionError: it is no number above 0.
    """
    if value is None:
        return None
    number = plain(value)
    if (
        isinstance(number, bool)
        or not isinstance(number, int | float)
        or not number > 0
        or math.isnan(number)
    ):
        raise OptionError(
            f"{name} is a number of seconds above 0, or None for as long as it takes, not {value!r:.80}"
        )
    return None if math.isinf(number) else float(number)


@contextmanager
def waiting(timeout: object) -> Iterator[None]:
    """Within the block every wait for a worker ends after `timeout` seconds, counted from here, and together; None
    changes nothing. Of two blocks around a wait, the one that ends first counts.

    Raises:
        OptionError: `timeout` is no number above 0. WorkerTimeoutError: by the waits within.
    """
    seconds = seconds_of(timeout)
    if seconds is None:
        yield
        return
    mine, outer = Deadline(time.monotonic() + seconds, seconds), _deadline.get()
    token = _deadline.set(mine if outer is None or mine.at < outer.at else outer)
    try:
        yield
    finally:
        _deadline.reset(token)


async def in_time(future: asyncio.Future[T], default: float | None, late: Callable[[float], Exception]) -> T:
    """Waits for `future` until the deadline of this context, or `default` seconds where it has none (None: for as long
    as it takes). Then it raises what `late` returns, which is given the seconds, and cancels `future`.
    """
    deadline = _deadline.get()
    if deadline is None and default is None:
        return await future
    loop = asyncio.get_running_loop()
    if deadline is not None:
        seconds, left = deadline.seconds, deadline.at - time.monotonic()
    else:
        assert default is not None  # noqa: S101 - for the type checker
        seconds = left = default
    try:
        async with asyncio.timeout_at(loop.time() + left) as limit:
            return await future
    except TimeoutError:
        if limit.expired():
            raise late(seconds) from None
        raise
