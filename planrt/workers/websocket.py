"""Frames over websockets (RFC 6455), both ends: `dial` a worker, or `listen` for clients.

One frame is one binary message, in fragments of at most 1 MiB, so that keepalive pings are answered between
them; compression is off (parameters do not compress, and deflate is many times slower than a socket).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import connect
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

from planrt.errors import ConnectError, HandshakeError, MessageTooLargeError
from planrt.serde.frames import (
    FRAGMENT_BYTES,
    Allocate,
    Frame,
    Limits,
    Received,
    in_memory,
)
from planrt.workers.messages import Envelope
from planrt.workers.pipes import Traffic, assembler

_TOO_BIG = 1009  # RFC 6455, section 7.4.1


class WebsocketPipe:
    """One end of a websocket connection."""

    def __init__(self, connection: Connection, address: str, limits: Limits) -> None:
        self.address = address
        self.traffic = Traffic()
        self._connection = connection
        self._limits = limits

    async def send(self, frame: Frame) -> None:
        """See `Pipe.send`."""
        try:
            if frame.nbytes <= FRAGMENT_BYTES:
                await self._connection.send(b"".join(frame.fragments()))
            else:
                await self._connection.send(frame.fragments())
        except ConnectionClosed as error:
            raise ConnectionResetError(_why_closed(error)) from error
        self.traffic.messages_sent += 1
        self.traffic.bytes_sent += frame.nbytes

    async def receive(self, allocate: Allocate[Envelope] = in_memory) -> Received[Envelope] | None:
        """See `Pipe.receive`."""
        parts = assembler(allocate, self._limits, self.address)
        try:
            async for fragment in self._connection.recv_streaming(decode=False):
                parts.feed(fragment)
            received = parts.finish()
        except ConnectionClosed as error:
            if error.sent is not None and error.sent.code == _TOO_BIG:
                raise MessageTooLargeError(
                    f"a message over the limit of {self._limits.message:,} bytes", address=self.address
                ) from error
            return None
        self.traffic.messages_received += 1
        self.traffic.bytes_received += received.nbytes
        return received

    async def close(self) -> None:
        """See `Pipe.close`."""
        await self._connection.close()


def _why_closed(error: ConnectionClosed) -> str:
    return f"{type(error).__name__}: {error}"


def _options(limits: Limits) -> dict[str, Any]:
    return {
        "compression": None,
        "max_size": (limits.message + limits.header + FRAGMENT_BYTES, FRAGMENT_BYTES),
        "max_queue": 3,  # fragments that wait to be taken; each is memory on top of the payload's
        "write_limit": FRAGMENT_BYTES,
        "ping_interval": limits.keepalive,
        "ping_timeout": limits.patience,
        "close_timeout": 2.0,
    }


async def dial(uri: str, *, timeout: float, limits: Limits) -> WebsocketPipe:
    """Connects to the worker at `uri` (``ws://host:port`` or ``wss://host:port``) within `timeout` seconds.

    Raises:
        ConnectError: malformed address, nobody listens, refused, or no answer in time.
        HandshakeError: something listens there, but it is no websocket server.
    """
    try:
        parts = urlsplit(uri)
        valid = parts.scheme in ("ws", "wss") and bool(parts.hostname) and parts.port is not None
    except ValueError:
        valid = False
    if not valid:
        raise ConnectError(f"{uri!r} is no worker address: write ws://HOST:PORT", address=uri)
    try:
        connection = await connect(uri, open_timeout=timeout, proxy=None, **_options(limits))
    except TimeoutError as error:
        raise ConnectError(
            f"no answer from {uri} within {timeout:g} s: is the worker's host up?", address=uri
        ) from error
    except (InvalidHandshake, InvalidURI, EOFError) as error:
        raise HandshakeError(f"{uri} does not speak websocket: {error}", address=uri) from error
    except socket.gaierror as error:
        raise ConnectError(f"the host of {uri} is not known: check the name", address=uri) from error
    except OSError as error:
        raise ConnectError(
            f"nobody answers at {uri} ({error.strerror or error}): is the worker started?", address=uri
        ) from error
    return WebsocketPipe(connection, uri, limits)


def _why_not_listening(error: OSError, host: str, port: int) -> str:
    if isinstance(error, socket.gaierror):
        return f"the host {host!r} is not known"
    reasons = {
        errno.EADDRINUSE: f"port {port} is taken, maybe by another worker: choose another one",
        errno.EADDRNOTAVAIL: f"{host} is no address of this machine",
        errno.EACCES: f"this user may not listen on port {port}: choose one from 1024 on",
    }
    return reasons.get(error.errno or 0, str(error.strerror or error))


@asynccontextmanager
async def listen(
    host: str, port: int, *, limits: Limits, serve_pipe: Callable[[WebsocketPipe], Awaitable[None]]
) -> AsyncIterator[int]:
    """Listens on `host`:`port` (0: a free port) and runs `serve_pipe` for every client; yields the port.

    Raises:
        ConnectError: the port is taken, or the host is not one of this machine's.
    """

    async def handler(connection: Connection) -> None:
        peer = connection.remote_address
        await serve_pipe(
            WebsocketPipe(connection, f"client {peer[0]}:{peer[1]}" if peer else "client", limits)
        )

    address = f"ws://{host}:{port}"
    try:
        server = await serve(handler, host, port, **_options(limits))
    except OSError as error:
        raise ConnectError(
            f"cannot listen on {address}: {_why_not_listening(error, host, port)}", address=address
        ) from error
    async with server:
        bound = next(iter(server.sockets)).getsockname()[1]
        yield int(bound)
