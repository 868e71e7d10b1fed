"""What the processes of one worker say to each other: MessagePack over pairs of Unix sockets that nobody else reaches.

Two kinds. *Gifts* come from the worker's own process, each in one packet with the file descriptors that belong to it.
*Calls* come from a process for clients' work: some are answered, and whoever asked waits for that. What such a process
says is checked by who hears it: it may have been taken over by a client.
"""

from __future__ import annotations

import array
import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgpack

from planrt.errors import IsolationError

MAX_GIFT: Final = 128 << 10
"""Bytes of one packet."""
MAX_CALL: Final = 512 << 20
"""Bytes of one call: a plan that waits for its owner can be large."""
_LENGTH = struct.Struct("<I")
_MOST_FILES: Final = 4


def gift_sockets() -> tuple[socket.socket, socket.socket]:
    """Returns a pair of sockets for gifts."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for one in pair:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_GIFT)
    return pair


def give(to: socket.socket, gift: Sequence[Any], files: Sequence[int] = ()) -> None:
    """Sends a gift.

    Raises:
        OSError: the other process has ended, or takes nothing. IsolationError: it is too large.
    """
    data = msgpack.packb(list(gift))
    if len(data) > MAX_GIFT:
        raise IsolationError(f"a message of {len(data):,} bytes between processes of one worker")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    to.sendmsg([data], rights)


def take(of: socket.socket) -> tuple[list[Any], list[int]] | None:
    """Receives a gift with its files; None where the other process has ended.

    Raises:
        BlockingIOError: there is none, and the socket does not wait.
    """
    room = socket.CMSG_SPACE(_MOST_FILES * array.array("i").itemsize)
    try:
        data, rights, _, _ = of.recvmsg(MAX_GIFT, room)
    except ConnectionError:
        return None
    files = array.array("i")
    for level, kind, content in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(content[: len(content) - len(content) % files.itemsize])
    if not data:
        return None
    return msgpack.unpackb(data), list(files)


class Calls:
    """The end of a process for clients' work. Any thread may use it."""

    def __init__(self, through: socket.socket) -> None:
        self._socket = through
        self._sending, self._asking = threading.Lock(), threading.Lock()

    def tell(self, what: str, *about: Any) -> None:
        """Makes a call that is not answered; where the other process has ended it is lost."""
        try:
            self._send([what, *about])
        except OSError:
            return

    def ask(self, what: str, *about: Any) -> Any:
        """Makes a call, and waits for its answer.

        Raises:
            IsolationError: there is none; its words are what the other side says.
        """
        with self._asking:
            try:
                self._send([what, *about])
                answered, answer = msgpack.unpackb(self._receive())
            except (OSError, EOFError) as error:
                raise IsolationError(f"the worker has ended: {error}") from None
        if not answered:
            raise IsolationError(str(answer))
        return answer

    def _send(self, call: list[Any]) -> None:
        data = msgpack.packb(call)
        with self._sending:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def _receive(self) -> bytes:
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return self._exactly(length)

    def _exactly(self, nbytes: int) -> bytes:
        data = bytearray()
        while len(data) < nbytes:
            piece = self._socket.recv(nbytes - len(data))
            if not piece:
                raise EOFError("no answer")
            data += piece
        return bytes(data)


Handler = Callable[[list[Any]], Awaitable[tuple[bool, Any] | None]]
"""Takes a call; returns the answer, and whether it is one, or None where nothing is answered."""


async def hear(calls: socket.socket, handle: Handler) -> None:
    """Takes the calls of a process, one after the other, until it ends. One that is no call ends it, too."""
    reader, writer = await asyncio.open_unix_connection(sock=calls, limit=1 << 20)
    try:
        while True:
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            if length > MAX_CALL:
                return
            call = msgpack.unpackb(await reader.readexactly(length))
            if not isinstance(call, list) or not call or not isinstance(call[0], str):
                return
            answer = await handle(call)
            if answer is not None:
                data = msgpack.packb(list(answer))
                writer.write(_LENGTH.pack(len(data)) + data)
                await writer.drain()
            await asyncio.sleep(0)  # one that asks without end keeps nobody else waiting
    except (asyncio.IncompleteReadError, ConnectionError, ValueError, msgpack.UnpackException):
        return
    finally:
        writer.close()
