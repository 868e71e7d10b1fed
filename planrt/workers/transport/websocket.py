"""Frames over websockets (RFC 6455), both ends: `dial` a worker, or `listen` for clients.

`websockets` opens and closes the connections, and `websocket_stream.py` moves the data over them. One frame is one
binary message, in fragments of at most 1 MiB, so that keepalive pings are answered between them; compression is off
(parameters do not compress, and deflate is many times slower than a socket).
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Protocol, cast
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import MultipleValuesError
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.http11 import Request, Response

from planrt.errors import ConnectError, HandshakeError, OptionError
from planrt.serde.frames import Allocate, Frame, Limits, Received, in_memory
from planrt.workers.transport.addresses import DialOptions, ListenOptions, ServePipe, register, scheme_of
from planrt.workers.transport.callers import Callers
from planrt.workers.transport.passing import Passed, let_go
from planrt.workers.transport.pipes import Traffic, assembling
from planrt.workers.transport.places import Handshakes, Places, most_of_all, placed
from planrt.workers.transport.tls import ServerTls, client_tls, fingerprint, user_of, why_not
from planrt.workers.transport.websocket_stream import FrameStream
from planrt.workers.wire.channel import Channel
from planrt.workers.wire.messages import Envelope

_CLOSE_TIMEOUT: Final = 2.0
_CLOSING_SECONDS: Final = 2 * _CLOSE_TIMEOUT
"""After which a connection is cut whose other end does not even take what waits before the last message."""

_UNDER_WAY: Final = 64
"""Connections of an address that may be about to open, beside those that are open."""
_TLS_SECONDS: Final = 10.0
"""Seconds that a handshake of TLS may take."""
_OPTIONS: dict[str, Any] = {
    "compression": None,
    "ping_interval": None,  # `FrameStream` listens for signs of life
    "close_timeout": _CLOSE_TIMEOUT,
}


class _ClientConnection(ClientConnection):
    """One whose data moves through `stream`."""

    stream: FrameStream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        super().connection_made(transport)
        self.stream = FrameStream(self, cast(asyncio.Transport, transport))


class _ServerConnection(ServerConnection):
    """One whose data moves through `stream`."""

    stream: FrameStream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        super().connection_made(transport)
        self.stream = FrameStream(self, cast(asyncio.Transport, transport))


class _Connect(connect):
    """One that goes where it was told to, and nowhere else."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        """Follows no redirection: a proof, and a worker that dials for its clients, are meant for one address."""
        return exc


class Streaming(Protocol):
    """A websocket connection whose data moves through `stream`."""

    stream: FrameStream

    async def close(self) -> None:
        """Closes it."""


class WebsocketPipe:
    """One end of a websocket connection."""

    hands_over = False

    def __init__(
        self,
        connection: Streaming,
        address: str,
        limits: Limits,
        channel: Channel,
    ) -> None:
        self.address = address
        self.traffic = Traffic()
        self.channel = channel
        self._connection = connection
        self._assembler = assembling(limits, address)
        connection.stream.start(address, limits)

    async def send(self, frame: Frame, *, message: bool = True) -> None:
        """See `Pipe.send`."""
        await self._connection.stream.send(frame)
        self.traffic.sent(frame, message=message)

    def send_now(self, frame: Frame) -> bool:
        """See `Pipe.send_now`."""
        sent = self._connection.stream.send_now(frame)
        if sent:
            self.traffic.sent(frame, message=True)
        return sent

    def receive(
        self, allocate: Allocate[Envelope] = in_memory
    ) -> Coroutine[Any, Any, Received[Envelope] | None]:
        """See `Pipe.receive`."""
        return self._connection.stream.receive(self._assembler(allocate), self.traffic)

    async def answers(self, seconds: float) -> bool:
        """See `Pipe.answers`. While data waits to be read, what comes behind it is not seen."""
        return await self._connection.stream.answers(seconds)

    async def gone(self) -> None:
        """See `Pipe.gone`. What keeps a side that does not read up to date is that it gives signs of life, unasked."""
        await self._connection.stream.gone.wait()

    async def let_go(self) -> Passed:
        """Lets another process go on with the connection, between two messages; see `passing`."""
        return await let_go(self._connection.stream)

    async def close(self) -> None:
        """See `Pipe.close`."""
        self._connection.stream.discard()
        try:
            await asyncio.wait_for(self._connection.close(), _CLOSING_SECONDS)
        except (
            TimeoutError
        ):  # the other side takes nothing any more, so that nothing can be said to it either
            self._connection.stream.abort()


class WebsocketTransport:
    """``ws://`` or, with `encrypted`, ``wss://``; see `planrt.workers.transport.addresses.Transport`."""

    within_process = False

    def __init__(self, *, encrypted: bool) -> None:
        self.encrypted = encrypted

    async def dial(self, address: str, options: DialOptions) -> WebsocketPipe:
        """Connects to the worker at `address`, ``ws://host:port`` or ``wss://host:port``.

        Raises:
            ConnectError: malformed address, nobody listens, refused, or no answer in time.
            HandshakeError: something listens there, but it is no websocket server, or its certificate is not trusted,
                or it does not let this client in.
            OptionError: a file of the options cannot be used, or is given for ``ws://``.
        """
        return await _dial(address, options, self._tls(address, options))

    def _tls(self, address: str, options: DialOptions) -> ssl.SSLContext | None:
        if self.encrypted:
            return client_tls(options.ca, options.cert, options.key)
        options.refuse_tls(f"{address} is without: write wss://, or secure=True")
        return None

    def listen(
        self, address: str, serve: ServePipe, options: ListenOptions
    ) -> AbstractAsyncContextManager[str]:
        """Listens at `address`, where port 0 takes a free one.

        Raises:
            ConnectError: malformed address, the port is taken, or the host is not one of this machine's.
            OptionError: ``wss://`` without a certificate, or ``ws://`` with one.
        """
        if self.encrypted != (options.tls is not None):
            raise OptionError(
                f"{address} and TLS: wss:// needs cert_path= and key_path=, and ws:// takes none of them"
            )
        return self._listen(address, serve, options)

    @asynccontextmanager
    async def _listen(self, address: str, serve: ServePipe, options: ListenOptions) -> AsyncIterator[str]:
        scheme = scheme_of(address)
        host, _, port = address.removeprefix(f"{scheme}://").rpartition(":")
        if not port.isdecimal():
            raise ConnectError(
                f"{address!r} is no address to listen at: write {scheme}://HOST:PORT", address=address
            )
        async with listen(
            host.removeprefix("[").removesuffix("]"),
            int(port),
            limits=options.limits,
            serve_pipe=serve,
            tls=options.tls,
            callers=options.callers,
        ) as bound:
            yield f"{scheme}://{host}:{bound}"


async def dial(uri: str, *, timeout: float, limits: Limits, ca: str | Path | None = None) -> WebsocketPipe:
    """Connects to the worker at `uri`; see `WebsocketTransport.dial` and `DialOptions`."""
    transport = WebsocketTransport(encrypted=scheme_of(uri) == "wss")
    return await transport.dial(uri, DialOptions(timeout, limits, ca))


async def _dial(uri: str, options: DialOptions, context: ssl.SSLContext | None) -> WebsocketPipe:
    timeout, limits = options.timeout, options.limits
    try:
        parts = urlsplit(uri)
        valid = parts.scheme in ("ws", "wss") and bool(parts.hostname) and parts.port is not None
    except ValueError:
        valid = False
    if not valid:
        raise ConnectError(f"{uri!r} is no worker address: write ws://HOST:PORT", address=uri)
    try:
        connection = await _Connect(
            uri,
            open_timeout=timeout,
            proxy=None,
            create_connection=_ClientConnection,
            ssl=context,
            **_OPTIONS,
        )
    except ssl.SSLError as error:
        raise HandshakeError(why_not(error, uri), address=uri) from error
    except TimeoutError as error:
        raise ConnectError(
            f"no answer from {uri} within {timeout:g} s: is the worker's host up?", address=uri
        ) from error
    except (InvalidHandshake, InvalidURI, ConnectionClosed, EOFError) as error:
        if isinstance(error, InvalidStatus) and error.response.status_code == HTTPStatus.FORBIDDEN:
            said = (error.response.body or b"")[:500].decode(errors="replace").strip()
            raise HandshakeError(f"{uri} refused the connection: {said or error}", address=uri) from error
        if context is not None and isinstance(error.__cause__, EOFError):
            # In TLS 1.3 a server looks at its client's certificate when that has begun to talk; it hangs up, no more.
            known = "does not take your certificate" if options.cert else "knows its clients by certificates"
            raise HandshakeError(
                f"{uri} closed the connection at once: maybe it {known}, then show one (cert=..., key=...) of the "
                "authority that its owner trusts",
                address=uri,
            ) from error
        if isinstance(error, ConnectionClosed):
            raise ConnectError(
                f"{uri} closed the connection at once: maybe it has as many as it takes, from your address or in all; "
                "close some, or try again later",
                address=uri,
            ) from error
        hint = "" if context else "; if it is served with TLS, write wss://"
        raise HandshakeError(f"{uri} does not speak websocket: {error}{hint}", address=uri) from error
    except socket.gaierror as error:
        raise ConnectError(f"the host of {uri} is not known: check the name", address=uri) from error
    except OSError as error:
        if context is not None and isinstance(error, ConnectionResetError):
            raise HandshakeError(
                f"{uri} does not speak TLS: is it served without, at ws://?", address=uri
            ) from error
        raise ConnectError(
            f"nobody answers at {uri} ({error.strerror or error}): is the worker started?", address=uri
        ) from error
    shown = _certificate(connection) if context else b""
    channel = Channel(parts.hostname or "", fingerprint(shown) if shown else None)
    return WebsocketPipe(cast(_ClientConnection, connection), uri, limits, channel)


def _certificate(connection: ClientConnection | ServerConnection) -> bytes:
    """The certificate (DER) of the other end of a connection; empty if it showed none."""
    tls = connection.transport.get_extra_info("ssl_object")
    return b"" if tls is None else tls.getpeercert(binary_form=True) or b""


def why_not_listening(error: OSError, host: str, port: int) -> str:
    """Returns the reason why nothing can listen on `host`:`port`, in words."""
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
    host: str,
    port: int,
    *,
    limits: Limits,
    serve_pipe: ServePipe,
    tls: ServerTls | None = None,
    callers: Callers | None = None,
) -> AsyncIterator[int]:
    """Listens on `host`:`port` (0: a free port) and runs `serve_pipe` for every client; yields the port. With `tls`
    clients connect to ``wss://``. `callers` says who may; by default no web page.

    Raises:
        ConnectError: the port is taken, or the host is not one of this machine's.
    """

    async def handler(connection: ServerConnection) -> None:
        peer = connection.remote_address
        address = f"client {peer[0]}:{peer[1]}" if peer else "client"
        user, shown = None, b""
        if tls is not None and tls.asks_clients:
            user = user_of(connection.transport.get_extra_info("peercert") or {})
            shown = _certificate(connection)
        channel = Channel(
            str(peer[0]) if peer else "",
            tls.binding if tls else None,
            user,
            fingerprint(shown).hex() if shown else "",
        )
        await serve_pipe(WebsocketPipe(cast(_ServerConnection, connection), address, limits, channel))

    welcome = callers or Callers(host, tls=tls is not None)

    def check(connection: ServerConnection, request: Request) -> Response | None:
        try:
            refusal = welcome.refusal(request.headers)
        except MultipleValuesError:
            refusal = "one Host and one Origin at most"
        if tls is not None and tls.denied is not None and tls.denied.denies(_certificate(connection)):
            refusal = "the worker's owner takes this certificate no longer"
        return None if refusal is None else connection.respond(HTTPStatus.FORBIDDEN, f"{refusal}\n")

    address = f"ws://{host}:{port}"
    places = Places(limits.connections + _UNDER_WAY, most_of_all())
    made = placed(_ServerConnection, places)
    handshakes = None if tls is None else Handshakes(tls.context, places, _TLS_SECONDS)
    try:
        server = await serve(
            handler,
            host,
            port,
            create_connection=cast(Any, made if handshakes is None else handshakes.before(made)),
            process_request=check,
            **_OPTIONS,
        )
    except OSError as error:
        raise ConnectError(
            f"cannot listen on {address}: {why_not_listening(error, host, port)}", address=address
        ) from error
    async with server:
        bound = next(iter(server.sockets)).getsockname()[1]
        try:
            yield int(bound)
        finally:
            if handshakes is not None:
                handshakes.end()


register("ws", WebsocketTransport(encrypted=False))
register("wss", WebsocketTransport(encrypted=True))
