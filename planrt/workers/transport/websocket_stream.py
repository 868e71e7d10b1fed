"""The data frames of one websocket connection, moved straight between its socket and the memory of tensors.

`websockets` opens the connection, and answers pings and closes for as long as it lives. Its own way for data copies
every byte four or five times, as it has to for messages of any kind; ours are as large as a model, and their header
says where each byte belongs. So a `FrameStream` sits between the transport and websockets' connection: control
frames go through to websockets, and payloads are read from the socket into the tensors' memory, and unmasked there.

A message is one binary message (RFC 6455, section 5.6), in fragments of at most `FRAGMENT_BYTES`. Nothing is read
ahead but what fits the buffer: while nobody receives, the peer waits. Pings behind its data wait with it, so a side
that does not read says in pongs of its own accord (section 5.5.3) that it is alive, and whoever hears nothing at all
for `keepalive` + `patience` seconds, and gets rid of nothing, takes the connection for lost.
"""

from __future__ import annotations

import asyncio

from websockets.asyncio.connection import Connection
from websockets.frames import CloseCode
from websockets.frames import apply_mask as unmasked  # type: ignore[attr-defined]  # in C, where that was built
from websockets.protocol import Side, State

from planrt.errors import MessageTooLargeError, WireError
from planrt.serde.frames import FRAGMENT_BYTES, Frame, FrameAssembler, Limits, Received
from planrt.workers.transport.pipes import Traffic
from planrt.workers.transport.websocket_frames import (
    BINARY,
    CONTINUATION,
    FrameHeader,
    header_bytes,
    mask,
    masked_frame,
    read_header,
    turned,
)
from planrt.workers.wire.messages import Envelope

_BUFFER = 1 << 16
"""Bytes that are read without knowing where they belong."""
_DIRECT = 1 << 14
"""A payload with at least this many bytes to come is read to where it belongs."""
_UNSENT = 2 * FRAGMENT_BYTES
"""Bytes that may wait to be sent: of a message at most one fragment, so more of them are pongs."""
_HEAD_ENDS = b"\r\n\r\n"
"""Ends the request and the response of the opening handshake (section 4); frames follow."""
_OWN_WRITE = 1 << 14
"""Payloads of at least this many bytes are written by themselves, not copied behind their header."""
_HEARTBEAT = 1.0
"""Seconds between signs of life of a side that does not read."""


class FrameStream(asyncio.BufferedProtocol):
    """Takes the place of websockets' `connection` as the protocol of its `transport`.

    Sends wait for each other; one `receive` at a time may be under way.
    """

    def __init__(self, connection: Connection, transport: asyncio.Transport) -> None:
        self._address = ""
        self._connection = connection
        self._protocol = connection.protocol
        self._transport = transport
        self._loop = connection.loop
        self._masks = connection.protocol.side is Side.CLIENT  # section 5.1: clients do, servers do not
        self._open = False
        self._lost: Exception | None = None
        self.gone = asyncio.Event()
        """Set once the connection has ended."""
        self._gave_up = False
        self._eof = False  # whether websockets knows that nothing more arrives
        # reading: buffer[start:end] has arrived and belongs to no payload yet
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._direct: memoryview | None = None
        self._frame: FrameHeader | None = None  # whose payload is arriving
        self._left = 0  # bytes of that payload that are still to come
        self._key = b""  # what they are masked with, or nothing
        self._in_message = False
        self._assembler: FrameAssembler[Envelope] | None = None
        self._discards = False  # data that arrives
        self._deaf = False  # to everything that arrives
        self._paused = False
        self._result: Received[Envelope] | Exception | None = None
        self._receiver: asyncio.Future[None] | None = None
        # writing
        self._full = False
        self._drained: asyncio.Future[None] | None = None
        self._sending = asyncio.Lock()
        # keepalive
        self._limits = Limits()
        self._silence = 0.0  # seconds since something was heard
        self._heard: asyncio.Event | None = None  # set when something is
        self._asked = 0.0  # the silence at the latest ping
        self._unsent = 0
        self._interval = _HEARTBEAT
        self._timer: asyncio.TimerHandle | None = None
        # A write is over when the system has all of it. TLS transports pause from `high` bytes on, others above it.
        tls = transport.get_extra_info("sslcontext") is not None
        transport.set_write_buffer_limits(high=1 if tls else 0, low=0)
        transport.set_protocol(self)

    # ---------------------------------------------------------------------------------------- using it

    async def send(self, frame: Frame) -> None:
        """Sends a message; once this returns, its memory may change.

        Raises:
            ConnectionError: the connection has ended.
        """
        async with self._sending:
            sent = 0
            try:
                if self._masks:
                    for pieces in frame.split():
                        opcode = CONTINUATION if sent else BINARY
                        nbytes = sum(map(len, pieces))
                        sent += nbytes
                        self._check_open()
                        self._transport.write(
                            masked_frame(opcode, pieces, nbytes, final=sent == frame.nbytes)
                        )
                        await self._drain()
                else:
                    for fragment in frame.fragments():
                        opcode = CONTINUATION if sent else BINARY
                        sent += len(fragment)
                        self._check_open()
                        self._write(opcode, fragment, final=sent == frame.nbytes)
                        await self._drain()
            except asyncio.CancelledError:
                if sent:  # the rest of the message would have to follow, and its memory may be gone
                    self._transport.abort()
                raise

    def send_now(self, frame: Frame) -> bool:
        """Hands a message over to the system at once, in one frame and in a copy; returns False, and has sent nothing,
        where other messages wait, or those before it have not left, or a copy takes longer than it is worth.
        """
        is_open = not self._lost and self._protocol.state is State.OPEN
        if not is_open or self._full or self._sending.locked():
            return False
        nbytes = frame.nbytes
        if nbytes > (FRAGMENT_BYTES if self._masks else _OWN_WRITE):  # masking copies it anyway
            return False
        if self._masks:
            self._transport.write(masked_frame(BINARY, frame.pieces, nbytes, final=True))
        else:
            self._transport.write(b"".join([header_bytes(BINARY, nbytes, final=True), *frame.pieces]))
        return True

    async def receive(
        self, assembler: FrameAssembler[Envelope], traffic: Traffic
    ) -> Received[Envelope] | None:
        """Waits for the next message, which `assembler` puts together and `traffic` counts; returns None when the other
        side has closed the connection.

        Raises:
            TransportError: what arrived is no message. ConnectionError: no sign of life from the other side.
        """
        if self._result is None and not self._discards:
            self._assembler = assembler
            if self._start < self._end:
                self._parse()
        try:
            if self._result is None and not self._lost:
                if self._paused:
                    self._resume()
                self._receiver = self._loop.create_future()
                await self._receiver
        except asyncio.CancelledError:
            if self._in_message:
                self.discard()  # the rest of the message is for nobody
            raise
        finally:
            self._assembler = self._receiver = None
        result, self._result = self._result, None
        if result is None:
            if self._gave_up:
                raise ConnectionResetError(str(self._lost))
            return None
        if isinstance(result, Exception):
            try:
                raise result
            finally:
                del result  # or the error's traceback would show the error, and both stay
        traffic.received(result)
        return result

    async def answers(self, seconds: float) -> bool:
        """Asks for a sign of life, and returns whether anything at all arrived within `seconds`."""
        if self._lost or self._protocol.state is not State.OPEN:
            return False
        if self._heard is None or self._heard.is_set():  # several may ask at once
            self._heard = asyncio.Event()
        heard = self._heard
        self._protocol.send_ping(b"")
        self._connection.send_data()
        try:
            await asyncio.wait_for(heard.wait(), seconds)
        except TimeoutError:
            return False
        return not self._lost

    def discard(self) -> None:
        """From here on, data that arrives is thrown away: only what belongs to closing the connection counts."""
        self._discards = True
        self._assembler = None
        self._parse()
        self._resume()
        self._release()

    def abort(self) -> None:
        """Cuts the connection: what waits to be sent is lost."""
        self._transport.abort()

    def _release(self) -> None:
        """Lets go of the buffer where nothing arrives any more and nobody reads: what is left of a connection that
        failed refers to itself, and stays until Python looks for such garbage."""
        if self._lost and self._discards:
            self._holds(bytearray(), 0)

    def _holds(self, buffer: bytearray, nbytes: int) -> None:
        """Goes on with another buffer, the first `nbytes` of which have arrived."""
        self._buffer, self._view = buffer, memoryview(buffer)
        self._start, self._end = 0, nbytes

    def start(self, address: str, limits: Limits) -> None:
        """Starts to ask for signs of life, and to give them, once the opening handshake is over. `address` is for
        error messages.
        """
        self._address, self._limits = address, limits
        self._interval = min(limits.keepalive, _HEARTBEAT)
        if not self._lost:
            self._timer = self._loop.call_later(self._interval, self._beat)

    def let_go(self) -> tuple[asyncio.Transport, bytes]:
        """Lets another process go on with the connection, between two messages; returns the transport, from which this
        side reads nothing more, and what had arrived that nobody has received."""
        self._transport.pause_reading()
        if self._timer is not None:
            self._timer.cancel()
        read = bytes(self._buffer[self._start : self._end])
        self._start = self._end
        return self._transport, read

    def take_up(self, read: bytes) -> None:
        """Goes on with a connection that was opened elsewhere, beginning with what was `read` there."""
        self._open = True
        if read:
            self._holds(bytearray(read) + bytes(_BUFFER), len(read))

    # ---------------------------------------------------------------------------- asyncio's callbacks

    def get_buffer(self, sizehint: int) -> memoryview:
        """See `asyncio.BufferedProtocol`."""
        if self._start == self._end:
            if self._frame is not None and self._assembler is not None:
                room = self._assembler.room()
                if room is not None:
                    room = room[: self._left]
                    if len(room) >= _DIRECT:
                        self._direct = room
                        return room
            self._start = self._end = 0
            return self._view
        if self._end == len(self._buffer):
            rest = self._buffer[self._start : self._end]
            # a new one: an error's traceback may still show the old one
            self._holds(rest + bytes(_BUFFER), len(rest))
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """See `asyncio.BufferedProtocol`."""
        self._silence = 0.0
        if self._heard is not None:
            self._heard.set()
        if self._direct is not None:
            direct, self._direct = self._direct, None
            self._take(direct[:nbytes], arrived=True)
            return
        self._end += nbytes
        if self._open or self._shake_hands():
            self._parse()

    def eof_received(self) -> None:
        """See `asyncio.BufferedProtocol`."""
        self._eof = True
        self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        if exc is not None:
            exc.__traceback__ = None  # it shows the transport, and so this connection
        self._lost = self._lost or exc or ConnectionResetError("the connection has ended")
        self.gone.set()
        if self._timer is not None:
            self._timer.cancel()
        for waiter in (self._receiver, self._drained):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
        self._eof = True
        self._connection.connection_lost(exc)
        self._release()

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._full = True
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._full = False
        self._silence = 0.0  # the other side takes what it is sent
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._connection.resume_writing()

    # --------------------------------------------------------------------------------------- reading

    def _shake_hands(self) -> bool:
        """Hands what has arrived to websockets while the opening handshake lasts: whether that is over.

        A head that comes in pieces ends where a piece ends, as far as we can see: its sender waits for our answer,
        or we for its first frame.
        """
        while not self._open and self._start < self._end:
            self._open = self._protocol.state is State.OPEN
            if not self._open:
                head = self._buffer.find(_HEAD_ENDS, self._start, self._end)
                start, self._start = self._start, self._end if head < 0 else head + len(_HEAD_ENDS)
                self._connection.data_received(bytes(self._buffer[start : self._start]))
        return self._open

    def _parse(self) -> None:
        """Takes what has arrived, as far as somebody waits for it."""
        if self._deaf:
            self._start = self._end
        while self._start < self._end:
            if self._frame is None and not self._begin_frame():
                return
            start, end = self._start, self._start + self._left  # the same in an empty fragment
            self._start = end if end < self._end else self._end
            self._take(self._view[start : self._start])

    def _begin_frame(self) -> bool:
        """Reads the header of the next data frame; control frames before it go to websockets.

        False if it has not arrived, or if nobody waits for it yet.
        """
        while self._start < self._end:
            try:
                header = read_header(self._view[self._start : self._end], address=self._address)
                if header is None:
                    return False
                if header.control:
                    if not self._pass_on(header):
                        return False
                    continue
                if self._assembler is None and not self._discards:
                    # who has just been given a message may come back at once for the one behind it
                    if self._receiver is None or self._end == len(self._buffer):
                        self._pause()
                    return False
                if bool(header.key) == self._masks:
                    raise WireError(
                        "malformed websocket frame: clients mask, servers do not", address=self._address
                    )
                if (header.opcode == CONTINUATION) != self._in_message and not self._discards:
                    raise WireError(
                        "malformed websocket message: fragments out of order", address=self._address
                    )
            except WireError as error:
                self._fail(error, CloseCode.PROTOCOL_ERROR)
                return False
            self._start += header.size
            self._frame, self._left, self._key = header, header.nbytes, header.key
            self._in_message = True
            if header.nbytes > FRAGMENT_BYTES:
                self._fail(
                    MessageTooLargeError(
                        f"a websocket frame of {header.nbytes:,} bytes is over the limit of {FRAGMENT_BYTES:,}: "
                        "send longer messages in fragments",
                        address=self._address,
                    )
                )
            return True
        return False

    def _pass_on(self, header: FrameHeader) -> bool:
        """Hands the control frame that comes next to websockets. False if it has not arrived."""
        start, end = self._start, self._start + header.size + header.nbytes
        if end > self._end:
            return False
        self._start = end
        if not self._eof:  # what was read late is behind the end, for websockets
            self._connection.data_received(bytes(self._view[start:end]))
        if self._transport.get_write_buffer_size() > _UNSENT:
            self._give_up(ConnectionResetError("it asks for signs of life and does not read them"))
        return True

    def _take(self, data: memoryview, *, arrived: bool = False) -> None:
        """Bytes of the frame's payload; `arrived` where they belong, or still in the buffer."""
        frame, assembler, key = self._frame, self._assembler, self._key
        assert frame is not None, "a payload follows its header"  # noqa: S101 - for the type checker
        nbytes = len(data)
        self._left -= nbytes
        ended = not self._left
        if ended:
            self._frame = None
            self._in_message = not frame.final
        if assembler is None:
            return
        try:
            if arrived:
                if key:
                    mask(data, key)
                assembler.filled(nbytes)
            else:
                assembler.feed(unmasked(data, key) if key else data)
            if ended:
                if frame.final:
                    self._settle(assembler.finish())
            elif nbytes % 4:
                self._key = turned(key, nbytes)
        except Exception as error:  # whatever it is: it belongs to who receives, not to the event loop
            self._fail(error)

    def _settle(self, result: Received[Envelope] | Exception) -> None:
        """The message that is waited for is there, or will never be."""
        self._assembler = None
        self._result = result
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)

    def _fail(self, error: Exception, code: CloseCode | None = None) -> None:
        """What arrives from here on is for nobody. With `code`, websockets closes the connection for that reason."""
        if not self._discards:
            self._settle(error)
            self._discards = True
        if code is not None:
            self._deaf = True
            self._start = self._end
            if self._protocol.state is State.OPEN:
                self._protocol.fail(code, str(error))
                self._connection.send_data()

    def _give_up(self, why: OSError) -> None:
        """Ends the connection at once: there is nobody to talk to."""
        self._lost = why
        self._gave_up = self._deaf = True
        self._start = self._end
        self._transport.abort()

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and not self._lost:
            self._paused = False
            self._silence = 0.0
            self._transport.resume_reading()

    # --------------------------------------------------------------------------------------- writing

    def _write(self, opcode: int, payload: bytes | memoryview, *, final: bool) -> None:
        """Writes one frame that is not masked."""
        header = header_bytes(opcode, len(payload), final=final)
        if len(payload) < _OWN_WRITE:
            self._transport.write(header + payload)
        else:  # not `writelines`: before Python 3.12.8 and 3.13.1 asyncio's never pauses the protocol
            self._transport.write(header)
            self._transport.write(payload)

    async def _drain(self) -> None:
        """Returns when the system has all that was written: its memory is free then."""
        if not self._full:
            return
        self._drained = self._loop.create_future()
        try:
            await self._drained
        finally:
            self._drained = None
        if self._lost:
            self._check_open()

    def _check_open(self) -> None:
        if self._lost or self._protocol.state is not State.OPEN:
            why = str(self._lost) if self._lost else "the connection is being closed"
            raise ConnectionResetError(why)

    # ------------------------------------------------------------------------------------- keepalive

    def _beat(self) -> None:
        if self._lost:
            return
        keepalive, patience = self._limits.keepalive, self._limits.patience
        unsent = self._transport.get_write_buffer_size()
        progress = unsent < self._unsent  # on a slow link, answers wait behind what is being sent
        self._unsent = unsent
        # Counted, not measured: a loop that stood still had no chance to hear anything.
        silence = self._silence = 0.0 if progress else self._silence + self._interval
        if silence < keepalive:
            self._asked = 0.0
        if self._protocol.state is State.OPEN:
            protocol = self._protocol
            if self._paused:
                if not self._full:  # else the other side has bytes to read anyway
                    protocol.send_pong(b"")
            elif silence >= keepalive + patience:
                self._give_up(TimeoutError(f"no sign of life for {silence:.3g} s"))
            elif silence - self._asked >= keepalive:
                self._asked = silence
                protocol.send_ping(b"")
            self._connection.send_data()
        self._timer = self._loop.call_later(self._interval, self._beat)
