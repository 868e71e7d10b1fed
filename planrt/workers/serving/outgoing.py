"""What waits to be sent on a connection, since its client reads slowly or not at all.

A connection whose own message is answered waits until the answer has left: nothing more of it is read meanwhile. But
one event can have answers for others, whose requests waited: what another worker says lets a client's program go on,
and the owner's new users end sessions. Nobody waits for those clients. What they have not taken is kept here, so much
of it; who leaves more is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Final

from planrt.serde.frames import Frame, Limits
from planrt.workers.transport.pipes import Pipe
from planrt.workers.wire.delivery import SMALL_ANSWER

CLOSING_SECONDS: Final = 2.0
"""Seconds that a client has to take what was said before its connection is closed."""


class Outgoing:
    """Keeps what waits to be sent through one pipe, in its order. Used on the loop.

    So much may wait as a session may leave unacknowledged (`Limits.unread_answers`, `Limits.unread_memory`). `arrived`
    is told of each large answer that the other side has taken, by the number of its request, where the pipe knows that.
    """

    def __init__(self, pipe: Pipe, limits: Limits, arrived: Callable[[int], None]) -> None:
        self._pipe, self._limits, self._arrived = pipe, limits, arrived
        self._waiting: deque[tuple[Frame, int, asyncio.Future[None] | None]] = deque()
        self._nbytes = 0
        self.sender: asyncio.Task[None] | None = None
        """What sends that, while something waits."""

    async def send(self, frame: Frame, id: int) -> None:
        """Sends the answer to request `id` after those that wait; once this returns, the tensors in it may change.

        Raises:
            ConnectionError: the connection has ended.
        """
        if self.sender is None:
            await self._send(frame, id)
            return
        left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._put(frame, id, left)
        await left

    async def _send(self, frame: Frame, id: int) -> None:
        await self._pipe.send(frame)
        if self._pipe.hands_over and frame.nbytes >= SMALL_ANSWER:
            self._arrived(id)

    def add(self, frame: Frame, id: int) -> bool:
        """Takes the answer to request `id`, to be sent after those that wait, or at once; False, and nothing was taken,
        where too much waits.
        """
        if self.sender is None and self._pipe.send_now(frame):
            return True
        if len(self._waiting) >= self._limits.unread_answers or self._nbytes > self._limits.unread_memory:
            return False
        self._put(frame, id, None)
        if self.sender is None:
            self.sender = asyncio.create_task(self._send_all())
        return True

    def _put(self, frame: Frame, id: int, left: asyncio.Future[None] | None) -> None:
        self._waiting.append((frame, id, left))
        self._nbytes += frame.nbytes

    async def empty(self) -> None:
        """Returns once nothing waits, or the connection has ended."""
        while self.sender is not None:
            await asyncio.wait([self.sender])

    async def _send_all(self) -> None:
        error: BaseException = ConnectionResetError("the connection is being closed")
        try:
            while self._waiting:
                frame, id, left = self._waiting[0]
                await self._send(frame, id)
                self._waiting.popleft()
                self._nbytes -= frame.nbytes
                if left is not None and not left.done():
                    left.set_result(None)
                del frame
        except ConnectionError as lost:
            error = lost
        finally:
            self.sender = None
            for *_, left in self._waiting:
                if left is not None and not left.done():
                    left.set_exception(error)
            self._waiting.clear()
            self._nbytes = 0

    async def close(self) -> None:
        """Closes the connection, after what waits where its client takes that within a moment."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.empty(), CLOSING_SECONDS)
        self.drop()
        await self._pipe.close()

    def drop(self) -> None:
        """Sends nothing more of what waits."""
        if self.sender is not None:
            self.sender.cancel()
