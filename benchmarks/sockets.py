"""Floors for the wire: a plain websockets echo, and a bare TCP socket, each with a process at the other end.

As a child process (``python -m benchmarks.sockets echo|tcp``) it listens on loopback and says on which port.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve

from benchmarks import child
from planrt.loop import new_event_loop

PIECE = 1 << 20
_LENGTH = struct.Struct("<Q")
_OPTIONS: dict[str, Any] = {"compression": None, "max_size": None, "ping_interval": None}


class Echoes:
    """Websocket connections to `count` echo processes."""

    def __init__(self, count: int) -> None:
        self._stack = ExitStack()
        self._runner = self._stack.enter_context(asyncio.Runner(loop_factory=new_event_loop))
        ports = [self._stack.enter_context(child.Child("sockets", "echo")).ask() for _ in range(count)]
        self._connections = self._runner.run(self._connect(ports))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._close())
        self._stack.close()

    def round_trip(self, payload: bytes) -> None:
        """`payload` to all processes at once, and back."""
        self._runner.run(self._round_trip(payload))

    async def _connect(self, ports: list[int]) -> list[ClientConnection]:
        return [await connect(f"ws://127.0.0.1:{port}", proxy=None, **_OPTIONS) for port in ports]

    async def _close(self) -> None:
        await asyncio.gather(*(connection.close() for connection in self._connections))

    async def _round_trip(self, payload: bytes) -> None:
        async def one(connection: ClientConnection) -> None:
            await connection.send(payload)
            assert len(await connection.recv()) == len(payload)

        await asyncio.gather(*(one(connection) for connection in self._connections))


class BareSockets:
    """TCP connections to `count` processes that take what is sent and then send as much back."""

    def __init__(self, count: int) -> None:
        self._stack = ExitStack()
        ports = [self._stack.enter_context(child.Child("sockets", "tcp")).ask() for _ in range(count)]
        self._sockets = [
            self._stack.enter_context(socket.create_connection(("127.0.0.1", port))) for port in ports
        ]
        self._pool = self._stack.enter_context(ThreadPoolExecutor(count))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def round_trip(self, nbytes: int, connections: int) -> None:
        """`nbytes` there and back on the first `connections` connections at once."""
        chosen = self._sockets[:connections]
        list(self._pool.map(lambda connection: _there_and_back(connection, nbytes), chosen))


def _there_and_back(connection: socket.socket, nbytes: int) -> None:
    connection.sendall(_LENGTH.pack(nbytes))
    _send(connection, nbytes)
    _receive(connection, nbytes)


def _send(connection: socket.socket, nbytes: int) -> None:
    piece = memoryview(bytes(PIECE))
    while nbytes:
        connection.sendall(piece[:nbytes])
        nbytes -= min(nbytes, PIECE)


def _receive(connection: socket.socket, nbytes: int) -> None:
    piece = memoryview(bytearray(PIECE))
    while nbytes:
        received = connection.recv_into(piece[:nbytes])
        if not received:
            raise ConnectionResetError("the other end has closed")
        nbytes -= received


async def _serve_echo() -> None:
    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with serve(echo, "127.0.0.1", 0, **_OPTIONS) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        # The pipe to the parent is read in a thread; its end ends this process.
        await asyncio.to_thread(child.answer_with, lambda _: port)


def _serve_tcp() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve_one() -> None:
        connection, _ = listener.accept()
        while length := connection.recv(_LENGTH.size, socket.MSG_WAITALL):
            (nbytes,) = _LENGTH.unpack(length)
            _receive(connection, nbytes)
            _send(connection, nbytes)

    threading.Thread(target=serve_one, daemon=True).start()
    child.answer_with(lambda _: listener.getsockname()[1])


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve_echo())
    else:
        _serve_tcp()
