"""Websocket connections that another process has opened and let go of (`passing.py`), as pipes of this one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final, cast

from websockets.asyncio.connection import Connection
from websockets.protocol import Protocol, Side, State

from planrt.serde.frames import Allocate, Frame, Limits, Received, in_memory
from planrt.workers.transport.websocket import WebsocketPipe
from planrt.workers.transport.websocket_stream import FrameStream
from planrt.workers.wire.channel import Channel
from planrt.workers.wire.messages import Envelope

_CLOSE_TIMEOUT: Final = 2.0
_AT_ONCE: Final = 1 << 15
"""Bytes of a message that the system takes as a whole: who dies has sent all of it, or nothing."""


class _TakenUp(Connection):
    """A websocket connection whose opening handshake another process has had. Its data moves through `stream`."""

    stream: FrameStream
    read_before = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        super().connection_made(transport)
        self.stream = FrameStream(self, cast(asyncio.Transport, transport))
        self.stream.take_up(self.read_before)


class TakenPipe(WebsocketPipe):
    """One end of such a connection.

    `first` is a message that the other process has taken already: it is received before all others. `sending` is told
    when a message begins to be sent that goes in pieces, and when it has been.
    """

    def __init__(
        self,
        connection: _TakenUp,
        address: str,
        limits: Limits,
        channel: Channel,
        first: Envelope | None,
        sending: Callable[[int], None],
    ) -> None:
        super().__init__(connection, address, limits, channel)
        self._first = first
        self._sending = sending

    async def send(self, frame: Frame, *, message: bool = True) -> None:
        """See `Pipe.send`."""
        if frame.nbytes <= _AT_ONCE:
            await super().send(frame, message=message)
            return
        self._sending(1)
        try:
            await super().send(frame, message=message)
        finally:
            self._sending(-1)

    def send_now(self, frame: Frame) -> bool:
        """See `Pipe.send_now`."""
        return frame.nbytes <= _AT_ONCE and super().send_now(frame)

    async def receive(self, allocate: Allocate[Envelope] = in_memory) -> Received[Envelope] | None:
        """See `Pipe.receive`."""
        first, self._first = self._first, None
        return await super().receive(allocate) if first is None else Received(first, [], 0)


async def taken_up(
    given: socket.socket,
    read: bytes,
    *,
    address: str,
    limits: Limits,
    channel: Channel,
    dialled: bool = False,
    first: Envelope | None = None,
    sending: Callable[[int], None] = lambda more: None,
) -> TakenPipe:
    """Goes on with a connection that another process has let go of; `dialled` says which end of it this is.

    Raises:
        OSError: it has ended meanwhile.
    """

    def connection() -> _TakenUp:
        side = Side.CLIENT if dialled else Side.SERVER
        protocol = Protocol(side, state=State.OPEN)
        made = _TakenUp(protocol, ping_interval=None, close_timeout=_CLOSE_TIMEOUT)
        made.read_before = read
        return made

    given.setblocking(False)
    _, made = await asyncio.get_running_loop().connect_accepted_socket(connection, given)
    return TakenPipe(made, address, limits, channel, first, sending)
