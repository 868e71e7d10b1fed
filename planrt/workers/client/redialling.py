"""When a connection that was lost is tried again: at once, then after pauses that grow, each with jitter."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from planrt.errors import PlanrtError, TransportError
from planrt.workers.client.session import RefusedError
from planrt.workers.transport.pipes import Pipe
from planrt.workers.wire.proofs import TicketProof, Token

_jitter = random.Random()  # noqa: S311 - of pauses; its own, so that whoever seeds Python's generator draws the same

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
        token, for_others, ticket: as of `ClientSession.hello`.
        seconds: for how long it is tried after it was lost; 0 for not at all, unless its user says so.
    """

    dial: Callable[[], Awaitable[Pipe]]
    token: Token = field(default="", repr=False)
    for_others: bool = False
    ticket: TicketProof | None = None
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


async def try_again(
    redialling: Redialling,
    go_on: Callable[[Pipe], Awaitable[object]],
    why: PlanrtError,
    *,
    over: Callable[[], bool],
) -> PlanrtError | None:
    """Opens pipes until `go_on` has taken one, or until it is `over`; the connection before was lost, `why` says.

    Returns:
        None once a pipe was taken; else why it is given up.
    """
    until = asyncio.get_running_loop().time() + redialling.seconds
    latest: Exception = why
    pauses = Pauses(_jitter)
    while not over():
        pipe: Pipe | None = None
        try:
            async with asyncio.timeout_at(until):
                pipe = await redialling.dial()
            # A worker that computes answers when it is done, and the pipe notices if it is gone.
            await go_on(pipe)
            pipe = None
            return None
        except RefusedError as error:
            return error
        except (TransportError, TimeoutError, OSError) as error:
            latest = error
        except PlanrtError as error:  # such as a file of a certificate that cannot be read
            return error
        finally:
            if pipe is not None:
                await pipe.close()
        if (pause := pauses.next()) > until - asyncio.get_running_loop().time():
            return PlanrtError(f"{why}; tried to go on for {redialling.seconds:g} s: {latest or why}")
        await asyncio.sleep(pause)
    return None
