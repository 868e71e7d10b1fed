"""Pipes: how frames move between a client and a worker, whatever the transport.

A `Pipe` is one end of a connection. `MemoryPipe` joins two ends within a process; it carries the same bytes
as a socket does, so whatever runs over it has been through the wire format. The websocket pipe is in
`planrt.workers.transport.websocket`. A new transport has one more class with these methods, and registers itself
(`planrt.workers.transport.addresses`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from planrt.errors import WireError
from planrt.serde.frames import Allocate, Frame, FrameAssembler, Limits, Received, in_memory
from planrt.workers.wire.channel import Channel
from planrt.workers.wire.messages import Ack, Envelope, from_wire


@dataclass(slots=True)
class Traffic:
    """The messages that went through one end of a pipe, and their bytes. An acknowledgement that travels alone (`Ack`)
    counts as bytes, and as no message."""

    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0

    def copy(self) -> Traffic:
        """Returns a copy of the counters, which counts no further."""
        return Traffic(self.messages_sent, self.messages_received, self.bytes_sent, self.bytes_received)

    def sent(self, frame: Frame, *, message: bool) -> None:
        """Counts a frame that has been sent."""
        self.messages_sent += message
        self.bytes_sent += frame.nbytes

    def received(self, arrived: Received[Envelope]) -> None:
        """Counts what has arrived."""
        self.messages_received += not isinstance(arrived.message.body, Ack)
        self.bytes_received += arrived.nbytes

    def add(self, other: Traffic) -> None:
        """Counts what went through another connection as well."""
        self.messages_sent += other.messages_sent
        self.messages_received += other.messages_received
        self.bytes_sent += other.bytes_sent
        self.bytes_received += other.bytes_received

    def since(self, before: Traffic) -> Traffic:
        """Returns the counts of what went through after `before` was copied."""
        return Traffic(
            self.messages_sent - before.messages_sent,
            self.messages_received - before.messages_received,
            self.bytes_sent - before.bytes_sent,
            self.bytes_received - before.bytes_received,
        )


class Pipe(Protocol):
    """One end of a connection. Sends are made one at a time; so are receives."""

    address: str
    traffic: Traffic
    channel: Channel
    hands_over: bool
    """Whether the other side has taken a frame once `send` has returned, so that nobody has to keep it for another
    connection. Else it may be lost on its way still."""

    async def send(self, frame: Frame, *, message: bool = True) -> None:
        """Sends a frame; once this returns, the tensors in it may change. `message` is whether its `traffic` counts it
        as one.

        Raises:
            ConnectionError: the connection has ended.
        """

    def send_now(self, frame: Frame) -> bool:
        """Sends a frame without waiting for anything, in a copy, so that the tensors in it may change; returns False,
        and has sent nothing, where that cannot be: another one is being sent, or the other side does not read.
        """

    async def receive(self, allocate: Allocate[Envelope] = in_memory) -> Received[Envelope] | None:
        """Waits for the next message and returns it, or None when the other side has closed.

        Raises:
            WireError, MessageTooLargeError: what arrived is not a valid message; the pipe cannot go on.
        """

    async def answers(self, seconds: float) -> bool:
        """Asks the other side for a sign of life, and returns whether one came within `seconds`."""

    async def gone(self) -> None:
        """Returns once this end knows that the connection has ended, also while nobody receives."""

    async def close(self) -> None:
        """Closes this end; the other end's `receive` then returns None. Closing twice is fine."""


def assembling(limits: Limits, address: str) -> Callable[[Allocate[Envelope]], FrameAssembler[Envelope]]:
    """Returns what makes the assembler to which a pipe feeds the pieces of one incoming frame."""
    decode = partial(from_wire, address=address)
    return partial(FrameAssembler, decode, limits=limits, address=address)


class MemoryPipe:
    """One end of an in-process connection; made in pairs by `memory_pipes`, both used on one event loop.

    A frame is handed over when the other end receives it, and copied once, then: nothing piles up between.
    """

    hands_over = True

    def __init__(self, address: str, limits: Limits) -> None:
        self.address = address
        self.traffic = Traffic()
        self.channel = Channel()
        self._assembler = assembling(limits, address)
        self._incoming: asyncio.Queue[tuple[Frame, asyncio.Future[None]] | None] = asyncio.Queue()
        self._other: MemoryPipe | None = None
        self._gone = asyncio.Event()

    async def send(self, frame: Frame, *, message: bool = True) -> None:
        """See `Pipe.send`."""
        if self._other is None:
            raise ConnectionResetError(f"the connection to {self.address} is closed")
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._other._incoming.put_nowait((frame, taken))
        await taken
        self.traffic.sent(frame, message=message)

    def send_now(self, frame: Frame) -> bool:
        """See `Pipe.send_now`. Never: a frame is copied when it is received."""
        return False

    async def receive(self, allocate: Allocate[Envelope] = in_memory) -> Received[Envelope] | None:
        """See `Pipe.receive`."""
        item = await self._incoming.get()
        if item is None:
            self._incoming.put_nowait(None)  # so that every further call says closed, too
            return None
        frame, taken = item
        try:
            parts = self._assembler(allocate)
            for fragment in frame.fragments():
                parts.feed(fragment)
            received = parts.finish()
        except BaseException as error:
            if not taken.done():
                taken.set_exception(ConnectionResetError(f"{self.address} did not take it"))
            if isinstance(error, WireError):
                await self.close()
            raise
        if not taken.done():
            taken.set_result(None)
        self.traffic.received(received)
        return received

    async def answers(self, seconds: float) -> bool:
        """See `Pipe.answers`."""
        return self._other is not None

    async def gone(self) -> None:
        """See `Pipe.gone`."""
        await self._gone.wait()

    async def close(self) -> None:
        """See `Pipe.close`."""
        other, self._other = self._other, None
        if other is None:
            return
        other._other = None
        for end in (self, other):
            end._gone.set()
            while not end._incoming.empty():
                item = end._incoming.get_nowait()
                if item is not None and not item[1].done():
                    item[1].set_exception(
                        ConnectionResetError(f"the connection to {self.address} was closed")
                    )
            end._incoming.put_nowait(None)


def memory_pipes(address: str, limits: Limits) -> tuple[MemoryPipe, MemoryPipe]:
    """Two ends of an in-process connection."""
    one, other = MemoryPipe(address, limits), MemoryPipe(address, limits)
    one._other, other._other = other, one
    return one, other
