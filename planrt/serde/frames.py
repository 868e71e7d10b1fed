"""Frames: one message and its tensors as bytes, and back; no sockets.

Layout of a frame::

    magic "PRT1" | header length, uint32 little-endian | header | payload

    header   MessagePack: [message, [[dtype name, [sizes]], ...]], at most `max_header` bytes
    payload  the tensors' elements, each tensor at a multiple of 64 bytes from the payload's start

To send, call `encode` and write what `Frame.fragments` yields, in order. To receive, make a `FrameAssembler`,
`feed` it whatever arrives, in pieces of any size, and call `finish` after the last one. The header is decoded
and validated before memory for the payload is taken, and the payload is written once, to where its tensors
then live. Who reads from a socket can read straight to there: into `room`, and says with `filled` how much it
was.
"""

from __future__ import annotations

import math
import mmap
import struct
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final, Generic, NoReturn, Protocol, TypeVar

import msgpack
import numpy as np
import torch

from planrt.errors import LocalError, MessageTooLargeError, OptionError, WireError
from planrt.serde.tensors import ALIGNMENT, Layout, header_entries, parse_layouts, raw_bytes, tensors_in

MAGIC = b"PRT1"
_PRELUDE = struct.Struct("<4sI")

FRAGMENT_BYTES = 1 << 20
"""Frames leave in pieces of at most this many bytes: a ping waits behind one piece, not a whole model. Longer
pieces are refused."""

MESSAGE_BYTES = 4 << 30
"""Tensors of one message take at most as much: longer ones are refused, unless a limit says otherwise."""

HEADER_BYTES = 1 << 20
"""Headers are small: longer ones are refused, unless a limit says otherwise."""

_OWN_FRAGMENT = 1 << 17
"""Pieces of at least this many bytes leave without being copied together with their neighbours."""

_LARGE = 8 << 20
"""Payloads from here on lie in blocks that are used again. malloc does the same for smaller ones, but for
larger ones it can keep several times what was in use at once."""

_SPOOL_BUFFER = 1 << 18
"""Bytes on their way to a file, at most."""

_PADDING = bytes(64)

M = TypeVar("M")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of what one side accepts, in bytes (`message`, `header`) and seconds (`keepalive`,
    `patience`); and of a worker how many connections, for how long it keeps sessions without one, and what may wait.

    Raises:
        OptionError: one of them is no number above 0.
    """

    message: int = MESSAGE_BYTES
    header: int = HEADER_BYTES
    keepalive: float = 20.0
    """Seconds of silence on a connection after which it is asked for a sign of life, again and again."""
    patience: float = 60.0
    """Seconds of silence from then on after which it counts as lost."""
    connections: int = 256
    """Connections that a worker takes from one network address at a time."""
    session_seconds: float = 120.0
    """Seconds that a worker keeps a session whose connection has ended, so that its client may go on with it. 0: not at
    all. The default is the time after which a silent connection counts as lost (`keepalive` + `patience`), and 40
    seconds for connecting again."""
    kept_sessions: int = 16
    """Sessions without a connection that a worker keeps of one user, or of one address of nobody's; of more, the one
    that has been without for longest ends."""
    arriving_memory: int | None = None
    """Bytes of messages above 1 MiB of one user, or of one address of nobody's, that a worker takes in at a time. None:
    as much as a quota lets it keep, 16 GiB without one, and at least one of the longest messages. No message is
    longer."""
    worker_arriving_memory: int | None = None
    """Those of all clients together. None: 64 GiB, and at least what one user may."""
    unread_answers: int = 1024
    """Answers that may wait for one client, since it does not read: with more it is cut off; or that it has not said to
    have: with more its session ends with its connection."""
    unread_memory: int = 4 << 30
    """Their bytes, the newest one left out."""
    unsent_messages: int = 10_000
    """Messages that may wait for one other worker, since that does not read: of more, the connection ends, and with it
    the session there."""
    unsent_memory: int = 4 << 30
    """Their bytes, the newest one left out."""
    round_plans: int = 256
    """Plans that a worker keeps of those that rounds send; clients send one that has gone again."""
    round_plan_memory: int = 64 << 20
    """Their bytes as files. No such plan is longer, nor than 64 MiB."""

    def __post_init__(self) -> None:
        for name in _WHOLE:
            value = getattr(self, name)
            if value is None and name in ("arriving_memory", "worker_arriving_memory"):
                continue
            if type(value) is not int or not 1 <= value < 2**63:
                raise OptionError(f"{name} must be a whole number, from 1 to {2**63 - 1}: got {value!r:.80}")
        for name in ("keepalive", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise OptionError(f"{name} must be a number of seconds above 0: got {value!r:.80}")
        arriving = [one for one in (self.arriving_memory, self.worker_arriving_memory) if one is not None]
        object.__setattr__(self, "message", min([self.message, *arriving]))


_WHOLE: Final = (
    "message", "header", "connections", "arriving_memory", "worker_arriving_memory", "unread_answers", "unread_memory",
    "unsent_messages", "unsent_memory", "round_plans", "round_plan_memory",
)  # fmt: skip


# ------------------------------------------------------------------------------------------- sending


class Frame:
    """An encoded message: a header and views of the tensors' memory, which must stay unchanged until sent."""

    __slots__ = ("nbytes", "pieces")

    def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
        self.pieces = pieces
        """The frame's bytes in order, as they lie in memory."""
        self.nbytes = sum(map(len, pieces))

    def fragments(self, size: int = FRAGMENT_BYTES) -> Iterator[bytes | memoryview]:
        """Yields the frame's bytes in order, in fragments of at most `size` bytes.

        Small pieces are gathered into one fragment; large ones are sliced, not copied.
        """
        gathered: list[bytes | memoryview] = []
        room = size
        for piece in self.pieces:
            large = len(piece) >= _OWN_FRAGMENT
            if gathered and (large or len(piece) > room):
                yield b"".join(gathered)
                gathered, room = [], size
            if large or len(piece) > size:
                view = memoryview(piece)
                yield from (view[start : start + size] for start in range(0, len(piece), size))
            else:
                gathered.append(piece)
                room -= len(piece)
        if gathered:
            yield b"".join(gathered)

    def split(self, size: int = FRAGMENT_BYTES) -> Iterator[list[bytes | memoryview]]:
        """Yields the frame's bytes in order, as lists of pieces that have `size` bytes together; the last one has what
        is left. For who copies them anyway: nothing is gathered or copied here.
        """
        found: list[bytes | memoryview] = []
        room = size
        for piece in self.pieces:
            rest = memoryview(piece)
            while len(rest) > room:
                found.append(rest[:room])
                yield found
                rest, found, room = rest[room:], [], size
            found.append(rest)
            room -= len(rest)
        if found:
            yield found


def encode(message: Any, tensors: Sequence[torch.Tensor] = (), *, max_header: int = HEADER_BYTES) -> Frame:
    """Encodes `message` (MessagePack-able builtins) and `tensors` into a `Frame` that shares their memory.

    Raises:
        LocalError: a tensor that does not travel, a message that has no byte form, or a header of more than
            `max_header` bytes.
    """
    views = list(map(raw_bytes, tensors))
    try:
        header = msgpack.packb([message, header_entries(tensors)])
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LocalError(f"the message has no byte form: {error}") from error
    size = len(header)
    if size > max_header:
        raise LocalError(
            f"the message's header takes {size:,} bytes, over the limit of {max_header:,}: "
            "send fewer tensors or options in one message"
        )
    pieces: list[bytes | memoryview] = [_PRELUDE.pack(MAGIC, size) + header]
    position = 0
    for view in views:
        if padding := -position % ALIGNMENT:
            pieces.append(_PADDING[:padding])
        pieces.append(view)
        position += padding + view.nbytes
    return Frame(pieces)


# ----------------------------------------------------------------------------------------- receiving


class Store(Protocol):
    """A place for a payload while it arrives."""

    def room(self) -> memoryview:
        """Memory for the next bytes; may be shorter than what is still to come, but is empty only at the
        end."""

    def filled(self, nbytes: int) -> None:
        """Notes that the first `nbytes` of `room` have been written."""

    def payload(self) -> torch.Tensor:
        """Returns the whole payload, uint8, writable, at a multiple of 64 bytes; called once, after the last
        `write`."""


class _Blocks:
    """Large blocks of memory, used again when the last tensor in them is gone.

    The system's page faults take longer than copying into a block (1.4 GB/s in all, against 8), and rounds
    need blocks of the same size again and again. Free blocks of another size than asked for are let go, so no
    more is ever kept than was in use at once. A block may hold older bytes: a payload is only looked at when
    all of it has been written.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor of `nbytes`, whose block comes back when nothing uses its memory any more."""
        with self._lock:
            if self._free and len(self._free[0]) != nbytes:
                self._free = []
            pages = self._free.pop() if self._free else mmap.mmap(-1, nbytes)
        array = np.frombuffer(pages, dtype=np.uint8)
        weakref.finalize(array, self._give_back, pages).atexit = False
        return torch.frombuffer(array, dtype=torch.uint8)

    def _give_back(self, pages: mmap.mmap) -> None:
        with self._lock:
            if not self._free or len(self._free[0]) == len(pages):
                self._free.append(pages)


_blocks = _Blocks()


class MemoryStore:
    """A payload of `nbytes` in memory.

    Aligned as torch's own tensors are: the last bits of a matrix product can depend on where its operands
    lie.
    """

    def __init__(self, nbytes: int) -> None:
        self._payload = _blocks.take(nbytes) if nbytes >= _LARGE else torch.empty(nbytes, dtype=torch.uint8)
        self._view = memoryview(self._payload.numpy())  # type: ignore[arg-type]
        self._end = 0

    def room(self) -> memoryview:
        """See `Store.room`."""
        return self._view[self._end :]

    def filled(self, nbytes: int) -> None:
        """See `Store.filled`."""
        self._end += nbytes

    def payload(self) -> torch.Tensor:
        """Returns the payload."""
        return self._payload


class SpoolStore:
    """A payload in an unnamed temporary file: for replies that must wait while memory is short."""

    def __init__(self, nbytes: int) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with the mapping
        self._nbytes = nbytes
        self._missing = nbytes
        self._buffer = memoryview(bytearray(min(nbytes, _SPOOL_BUFFER)))

    def room(self) -> memoryview:
        """See `Store.room`."""
        return self._buffer[: self._missing]

    def filled(self, nbytes: int) -> None:
        """See `Store.filled`."""
        self._missing -= nbytes
        view = self._buffer[:nbytes]
        while view:
            view = view[self._file.write(view) :]

    def payload(self) -> torch.Tensor:
        """Returns the payload, mapped copy-on-write from the file, which goes away with the mapping."""
        with self._file:
            pages = mmap.mmap(self._file.fileno(), self._nbytes, access=mmap.ACCESS_COPY)
        return torch.frombuffer(pages, dtype=torch.uint8)

    def __del__(self) -> None:
        self._file.close()  # of a frame that never came to its end


class _Nothing:
    """The payload of a message without tensors. Most are, and making a tensor takes longer than reading
    one."""

    def room(self) -> memoryview:
        return memoryview(b"")

    def filled(self, nbytes: int) -> None:
        pass

    def payload(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)


_NOTHING = _Nothing()

Allocate = Callable[[M, int], Store]
"""(decoded message, payload size in bytes) -> where the payload goes; asked of messages with tensors."""


def in_memory(message: object, nbytes: int) -> Store:
    """Allocates every payload in memory: the default `Allocate`."""
    return MemoryStore(nbytes)


@dataclass(slots=True)
class Received(Generic[M]):
    """A decoded message, its tensors and the frame's size in bytes."""

    message: M
    tensors: list[torch.Tensor]
    nbytes: int


class FrameAssembler(Generic[M]):
    """Builds one message from the pieces of its frame.

    Call `feed` with each piece; or, where `room` returns memory, read the next bytes into that and call `filled`
    with their number, which copies nothing. Call `finish` once the frame has ended.

    `decode` turns the header's builtins into a typed message and raises WireError for anything else;
    `allocate` then says where the payload goes. `address` is for error messages.
    """

    def __init__(
        self,
        decode: Callable[[object], M],
        allocate: Allocate[M] = in_memory,
        *,
        limits: Limits | None = None,
        address: str = "",
    ) -> None:
        self._decode = decode
        self._allocate = allocate
        self._limits = limits or Limits()
        self._address = address
        self._head = bytearray()  # the prelude, and then the header, as far as they have come
        self._head_missing = _PRELUDE.size
        self._sized = False  # whether that is the header's, whose size the prelude says
        self._message: M
        self._layouts: list[Layout] = []
        self._store: Store | None = None
        self._missing = 0
        self._nbytes = 0

    def feed(self, data: bytes | memoryview) -> None:
        """Takes the next piece of the frame.

        Raises:
            WireError: not a planrt frame, a malformed header, or more bytes than announced.
            MessageTooLargeError: the header announces more than the limits allow.
        """
        size = len(data)
        self._nbytes += size
        data = memoryview(data)
        while self._store is None:
            wanted = self._head_missing
            self._head += data[:wanted]
            if size < wanted:
                self._head_missing -= size
                return
            data = data[wanted:]
            size -= wanted
            if self._sized:
                self._store = self._read_header()
                break
            magic, wanted = _PRELUDE.unpack(self._head)
            if magic != MAGIC or not 0 < wanted <= self._limits.header:
                self._refuse(magic, wanted)
            self._head, self._head_missing, self._sized = bytearray(), wanted, True
        store = self._store
        self._missing -= size
        if self._missing < 0:
            raise WireError("the frame is longer than its header announced", address=self._address)
        while size:
            room = store.room()[:size]
            taken = len(room)
            room[:] = data[:taken]
            store.filled(taken)
            data = data[taken:]
            size -= taken

    def room(self) -> memoryview | None:
        """Returns the memory into which the next bytes of the payload belong; None while the header is
        incomplete, and after the end."""
        return self._store.room() if self._store is not None and self._missing else None

    def filled(self, nbytes: int) -> None:
        """Notes that the first `nbytes` of `room` have arrived."""
        assert self._store is not None, "there was room"  # noqa: S101 - for the type checker
        self._nbytes += nbytes
        self._missing -= nbytes
        self._store.filled(nbytes)

    def finish(self) -> Received[M]:
        """Returns the message, after the last piece.

        Raises:
            WireError: bytes are missing.
        """
        if self._store is None or self._missing:
            raise WireError("the frame ended early", address=self._address)
        layouts = self._layouts
        tensors = tensors_in(self._store.payload(), layouts, address=self._address) if layouts else []
        return Received(self._message, tensors, self._nbytes)

    def _refuse(self, magic: bytes, header_size: int) -> NoReturn:
        if magic != MAGIC:
            raise WireError("not a planrt frame: wrong first bytes", address=self._address)
        if header_size == 0:
            raise WireError("malformed header: empty", address=self._address)
        raise MessageTooLargeError(
            f"a header of {header_size:,} bytes is over the limit of {self._limits.header:,}",
            address=self._address,
        )

    def _read_header(self) -> Store:
        """Takes the header, which has just become complete; returns where the payload goes."""
        try:
            unpacked = msgpack.unpackb(self._head)
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise WireError(f"malformed header: {error}", address=self._address) from error
        if type(unpacked) is not list or len(unpacked) != 2:
            raise WireError("malformed header: not a message and its tensors", address=self._address)
        message, described = unpacked
        self._layouts, payload = parse_layouts(described, address=self._address)
        if payload > self._limits.message:
            raise MessageTooLargeError(
                f"a message of {payload:,} bytes is over the limit of {self._limits.message:,}",
                address=self._address,
            )
        self._message, self._missing = self._decode(message), payload
        return self._allocate(self._message, payload) if self._layouts else _NOTHING
