"""Websocket connections that one process opens and another one goes on with.

The first one accepts or dials, has seen what the opening handshake says, and lets go of the connection (`let_go`); the
other one gets a file descriptor, and the bytes that had been read already, and makes a pipe of them (`taken.py`). Data
then moves between that process and the client alone, as fast as before. Only what is encrypted goes through the first
process still, which has the keys: it copies bytes between the encrypted connection and a socket to the other process.

Who let go keeps a hand on the connection (`Passed`), and can say a last message when the other process has died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import cast

from planrt.serde.frames import Frame
from planrt.workers.transport.websocket_frames import BINARY, header_bytes
from planrt.workers.transport.websocket_stream import FrameStream

_LINGER = 2.0
"""Seconds that the other side has to read the last message."""
_CLOSE_TIMEOUT = 2.0


class Passed:
    """A connection that another process goes on with: `give` is for that one, with the bytes `read` before."""

    def __init__(self, give: socket.socket, read: bytes, copying: Copying | None) -> None:
        self.give = give
        self.read = read
        self._copying = copying

    def given(self) -> None:
        """Lets go of what was given, where this side does not need it any more."""
        if self._copying is not None:
            self.give.close()

    @property
    def copies(self) -> bool:
        """True where bytes of it go through this process."""
        return self._copying is not None

    async def over(self) -> None:
        """Waits until nothing of it goes through this process any more."""
        if self._copying is not None:
            await asyncio.shield(self._copying.over)

    async def say(self, frame: Frame) -> None:
        """Sends a last message, after the other process has ended between two messages of its own."""
        parts = list(frame.fragments())
        data = b"".join([header_bytes(BINARY, frame.nbytes, final=True), *parts])
        if self._copying is not None:
            await self._copying.say(data)
            return
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_LINGER):
                await loop.sock_sendall(self.give, data)
                self.give.shutdown(socket.SHUT_WR)
                while await loop.sock_recv(
                    self.give, 1 << 16
                ):  # or what is unread would take the message back
                    pass

    async def close(self) -> None:
        """Ends the connection, as far as that is with this process."""
        self.give.close()
        if self._copying is not None:
            await self._copying.close()


class Copying(asyncio.Protocol):
    """One direction between two transports of this process, and the way to the other one."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self.other: Copying | None = None
        self._transport: asyncio.Transport | None = None
        self._ended = ended
        self._waiting: list[bytes] = []
        self._paused = False
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def join(self, other: Copying) -> None:
        """Copies to and from `other` from now on."""
        self.other, other.other = other, self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        self._transport = cast(asyncio.Transport, transport)
        for data in self._waiting:
            self._transport.write(data)
        self._waiting = []

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self.other is not None:
            self.other.write(data)

    def write(self, data: bytes) -> None:
        """Sends what arrived at the other end."""
        if self._transport is None:
            self._waiting.append(data)
        elif not self._transport.is_closing():
            self._transport.write(data)

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        if self.other is not None and self.other._transport is not None:
            self.other._transport.pause_reading()

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        if self.other is not None and self.other._transport is not None:
            self.other._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        if not self.over.done():
            self.over.set_result(None)
        self._ended()

    def end(self) -> None:
        """Closes this end once everything is written."""
        if self._transport is not None:
            self._transport.close()

    async def say(self, data: bytes) -> None:
        """Sends a last message, once everything has been copied that the other process had said."""
        if self.other is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self.other.over), _LINGER)
        self.write(data)

    async def close(self) -> None:
        """Closes both ends, and waits for that a little."""
        for one in (self, self.other):
            if one is not None:
                one.end()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.over), _CLOSE_TIMEOUT)


async def let_go(stream: FrameStream) -> Passed:
    """Lets go of a connection between two of its messages."""
    transport, read = stream.let_go()
    if transport.get_extra_info("sslcontext") is None:
        whole = transport.get_extra_info("socket")
        give = socket.socket(fileno=os.dup(whole.fileno()))
        give.setblocking(False)
        transport.abort()  # only this process's own hold on it
        return Passed(give, read, None)
    ours, give = socket.socketpair()
    ours.setblocking(False)
    loop = asyncio.get_running_loop()
    outside, inside = Copying(lambda: inside.end()), Copying(lambda: None)
    outside.join(inside)
    outside.connection_made(transport)
    lost = stream.connection_lost

    def gone() -> None:
        inside.end()
        lost(None)

    outside._ended = gone
    transport.set_write_buffer_limits()
    transport.set_protocol(outside)
    await loop.connect_accepted_socket(lambda: inside, ours)
    if not transport.is_closing():
        transport.resume_reading()
    return Passed(give, read, outside)
