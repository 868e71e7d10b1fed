"""When a worker is told which of its answers have come: it keeps them until then, in case the connection is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from planrt.workers.client.session import ClientSession
from planrt.workers.client.unarrived import Sent
from planrt.workers.wire.delivery import LARGE_ANSWER, MESSAGES, SMALL_ANSWER, TELL_SECONDS


class Telling:
    """Counts the answers in `session` that the worker was not told of. Every message to it tells it; `tell` has one
    sent, once it is due and nothing else was."""

    def __init__(
        self, session: ClientSession[Sent], loop: asyncio.AbstractEventLoop, tell: Callable[[], None]
    ) -> None:
        self._session, self._loop, self._tell = session, loop, tell
        self._told = 0
        """Answers that it was told of."""
        self._nbytes = 0
        """Of those that came since."""
        self._later = False
        """Whether it is looked at in a moment, if nothing else is sent before."""
        self.due = False
        """Whether the worker is to be told now."""

    def told(self) -> None:
        """Takes note that a message leaves, which tells the worker."""
        self.due, self._told, self._nbytes = False, self._session.seen, 0

    def came(self, nbytes: int, *, knows: bool) -> None:
        """Takes note of an answer; `knows` says that the pipe tells the worker by itself of large ones."""
        if knows and nbytes >= SMALL_ANSWER:
            self._nbytes = 0
            return
        self._nbytes += nbytes
        if self._nbytes >= LARGE_ANSWER or self._session.seen - self._told >= MESSAGES:
            self._now()
        elif self._nbytes >= SMALL_ANSWER and not self._later:
            self._later = True
            self._loop.call_later(TELL_SECONDS, self._look)

    def _look(self) -> None:
        self._later = False
        if self._nbytes >= SMALL_ANSWER:
            self._now()

    def _now(self) -> None:
        self.due = True
        self._tell()
