"""What is awaited in a round, until when, and where it waits: deadlines, answers in order, memory for replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, TypeVar

from planrt.serde.frames import MemoryStore, SpoolStore, Store

T = TypeVar("T")

SMALL = 1 << 20
"""Replies under this many bytes are not worth a temporary file."""

LARGE = 8 << 20
"""Folding states over this many bytes leaves the loop thread, which has pings to answer. Of replies over this
many bytes one less is held: what connections have in hand while they receive (about 10 MB in all) takes its
place."""

ROUND_TIMEOUT: Final = 3600.0
"""Seconds that a round waits for its workers, unless it is told otherwise."""


class Deadline:
    """A point in time, `seconds` from now; never, if that is None."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self, *, at_most: float | None = None) -> float | None:
        """Returns the seconds until then, 0.0 when it has passed and None where there is no end; `at_most` bounds
        that."""
        if self._end is None:
            return at_most
        left = max(0.0, self._end - time.monotonic())
        return left if at_most is None else min(left, at_most)


class LateError(Exception):
    """No answer came before the deadline; `task` still waits for it."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        super().__init__("no answer before the deadline")
        self.task = task


class Answers(Generic[T]):
    """The answers to what all workers were asked at once, to be taken one after the other.

    `failed` is called at once with each task that fails, in whatever order they end; it may raise, which ends the wait.
    """

    def __init__(
        self,
        tasks: Mapping[str, asyncio.Task[T]],
        deadline: Deadline,
        failed: Callable[[str, BaseException], None],
    ) -> None:
        self._tasks = dict(tasks)
        self._deadline = deadline
        self._failed = failed
        self._told: set[str] = set()

    async def take(self, id: str) -> T:
        """Waits for the answer of `id` and returns it; nothing here refers to it any more.

        Raises:
            LateError: there was none before the deadline; the task goes on, and is left to the caller.
            Whatever the task failed with, or `failed` raised.
        """
        task = self._tasks[id]
        while True:
            self._tell()
            if task.done():
                del self._tasks[id]
                return task.result()
            left = self._deadline.left()
            if left == 0:
                raise LateError(self._tasks.pop(id))
            await asyncio.wait(
                [one for one in self._tasks.values() if not one.done()],
                timeout=left,
                return_when=asyncio.FIRST_COMPLETED,
            )

    def rest(self) -> list[asyncio.Task[T]]:
        """Returns the tasks that were not taken."""
        return list(self._tasks.values())

    def _tell(self) -> None:
        for id, task in self._tasks.items():
            if task.done() and id not in self._told and (error := task.exception()) is not None:
                self._told.add(id)
                self._failed(id, error)


class Leases:
    """Bounds the replies of a round that are in memory: the accumulator, and `hold` more."""

    def __init__(self, hold: int) -> None:
        self.free = hold

    def lease(self, *, first: bool) -> Lease:
        """Returns the place of one worker's reply; the first in order becomes the accumulator."""
        return Lease(self, first)


class Lease:
    """The place of one worker's reply."""

    def __init__(self, leases: Leases, first: bool) -> None:
        self._leases = leases
        self._first = first
        self._taken = False
        self._late = False

    def allocate(self, message: object, nbytes: int) -> Store:
        """Returns where a reply of `nbytes` bytes goes: memory while there is room, else a temporary file."""
        if nbytes < SMALL or (self._first and not self._late):
            return MemoryStore(nbytes)
        if self._late or not self._leases.free:
            return SpoolStore(nbytes)
        self._leases.free -= 1
        self._taken = True
        return MemoryStore(nbytes)

    def release(self) -> None:
        """Gives the place back: the reply has been added up."""
        self._leases.free += self._taken
        self._taken = False

    def too_late(self) -> None:
        """Notes that the reply will not be looked at any more, whenever it comes: it takes no memory."""
        self._late = True
        self.release()
