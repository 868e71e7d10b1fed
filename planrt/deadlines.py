"""How long calls wait: `waiting` sets it for a block, and every wait for a worker's answer keeps it."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from planrt.errors import OptionError
from planrt.shown import shown

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


MOST_SECONDS: Final = 315_360_000
"""Ten years: seconds that a wait may take, at most."""

LONGEST_ROUND: Final = 30 * 24 * 3600.0
"""Seconds that a round may wait for its workers, at most."""


SLOWEST: Final = 1 << 20
"""Bytes a second that a link is taken to carry at least, where what is sent may be large."""


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
        OptionError: it is no number above 0, or one of more than ten years.
    """
    if value is None:
        return None
    from planrt.types import plain  # commands read their options before torch loads

    number = plain(value)
    known = isinstance(number, int | float) and not isinstance(number, bool)
    if not (known and 0 < number <= MOST_SECONDS):  # which NaN is not
        raise OptionError(
            f"{name} is a number of seconds above 0 and up to {MOST_SECONDS:,} (ten years), or None for as long as it "
            f"takes, not {shown(repr(value), 80)}"
        )
    return float(number)


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


def bounded(function: F) -> F:
    """Makes ``timeout=`` of a call, which its signature has, bound all that it waits for, in seconds; see `waiting`.

    The call raises `OptionError` for what is no number above 0, before it does anything.
    """
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, timeout: object = None, **kwargs: Any) -> Any:
            with waiting(timeout):
                return await function(*args, **kwargs)

        return cast(F, awaited)

    @functools.wraps(function)
    def called(*args: Any, timeout: object = None, **kwargs: Any) -> Any:
        if timeout is None:
            return function(*args, **kwargs)
        with waiting(timeout):
            return function(*args, **kwargs)

    return cast(F, called)


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
