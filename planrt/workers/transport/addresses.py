"""Which transport an address means: ``ws://127.0.0.1:8777`` is dialled over a websocket, because of what stands before
``://``. Nothing else in planrt looks at that.

A transport is one module. It has a class with the attributes and methods of `Transport`, and calls `register` once::

    register("quic", QuicTransport())

From then on every client and every worker of the process dials ``quic://...`` addresses, and a worker listens at one
with ``WebsocketServerWorker("alice", uri="quic://0.0.0.0:9000")``. `tests/workers/test_addresses.py` has a whole one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from planrt.errors import ConnectError, OptionError

if TYPE_CHECKING:
    from planrt.serde.frames import Limits
    from planrt.workers.transport.callers import Callers
    from planrt.workers.transport.pipes import Pipe
    from planrt.workers.transport.tls import ServerTls


@dataclass(frozen=True, slots=True)
class DialOptions:
    """The options of dialling a worker. A transport that cannot do what an option asks for refuses it with
    `OptionError`.

    Attributes:
        timeout: seconds until the connection must stand.
        limits: the sizes of messages that this side takes.
        ca: a file of the authorities to trust, in place of the system's, where the transport encrypts.
        cert, key: files of what this side shows of itself, where the other one asks for it.
    """

    timeout: float
    limits: Limits
    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None

    def refuse_tls(self, why: str) -> None:
        """Raises OptionError if an option is for TLS: the transport has none."""
        for name in ("ca", "cert", "key"):
            if getattr(self, name) is not None:
                raise OptionError(f"{name}= is for TLS, and {why}")


@dataclass(frozen=True, slots=True)
class ListenOptions:
    """The options of a worker that listens.

    Attributes:
        limits: the sizes of messages that it takes.
        tls: its certificate and private key, where the transport encrypts.
        callers: who may connect; None for the transport's default.
    """

    limits: Limits
    tls: ServerTls | None = field(default=None, repr=False)
    callers: Callers | None = None


ServePipe = Callable[["Pipe"], Awaitable[None]]
"""Serves one connection until it ends."""


class Transport(Protocol):
    """A way to reach the workers whose addresses begin with one scheme."""

    @property
    def within_process(self) -> bool:
        """True if only the worker's own process reaches it there."""

    @property
    def encrypted(self) -> bool:
        """True if what travels is encrypted."""

    async def dial(self, address: str, options: DialOptions) -> Pipe:
        """Connects to the worker at `address`; called on the loop that the pipe is used on.

        Raises:
            ConnectError: malformed address, or nobody answers. HandshakeError: something else answers there.
            OptionError: an option that this transport does not take.
        """

    def listen(
        self, address: str, serve: ServePipe, options: ListenOptions
    ) -> AbstractAsyncContextManager[str]:
        """Serves everyone who dials `address`, for the block; yields the address that they are to dial, which has the
        port where `address` leaves that free.

        Raises:
            ConnectError: nobody can listen there. OptionError: an option that this transport does not take.
        """


_HOMES: Final = {
    "memory": "planrt.workers.transport.memory",
    "ws": "planrt.workers.transport.websocket",
    "wss": "planrt.workers.transport.websocket",
}
"""The schemes that planrt comes with, and the modules that register them, imported at first use."""

_transports: dict[str, Transport] = {}


def register(scheme: str, transport: Transport) -> None:
    """Makes `transport` the one that addresses ``scheme://...`` mean.

    Raises:
        OptionError: `scheme` is no name in lower case, or means another transport already.
    """
    if not (scheme.isascii() and scheme.isalnum() and scheme == scheme.lower()):
        raise OptionError(
            f"{scheme!r} is no scheme of an address: write a word in lower case, such as 'quic'"
        )
    if scheme in _transports or (scheme in _HOMES and type(transport).__module__ != _HOMES[scheme]):
        raise OptionError(f"{scheme}:// means a transport already: choose another word")
    _transports[scheme] = transport


def schemes() -> list[str]:
    """Returns the schemes that are known, sorted."""
    return sorted({*_HOMES, *_transports})


def scheme_of(address: str) -> str:
    """Returns the part of `address` before ``://``; ``""`` where that is missing."""
    scheme, found, _ = address.partition("://")
    return scheme if found else ""


def transport_of(address: str) -> Transport:
    """Returns the transport that `address` means.

    Raises:
        ConnectError: its scheme is unknown; names those that are known.
    """
    scheme = scheme_of(address)
    if scheme not in _transports and scheme in _HOMES:
        import_module(_HOMES[scheme])
    found = _transports.get(scheme)
    if found is None:
        known = ", ".join(f"{one}://" for one in schemes())
        raise ConnectError(
            f"{address!r} is no worker address: write ws://HOST:PORT; planrt knows {known} here",
            address=address,
        )
    return found


async def dial(address: str, options: DialOptions) -> Pipe:
    """Connects to the worker at `address`, over the transport that it means.

    Raises:
        ConnectError, HandshakeError, OptionError: see `Transport.dial`; ConnectError for an unknown scheme, too.
    """
    return await transport_of(address).dial(address, options)


def listen(address: str, serve: ServePipe, options: ListenOptions) -> AbstractAsyncContextManager[str]:
    """Serves everyone who dials `address`; see `Transport.listen`.

    Raises:
        ConnectError, OptionError: see `Transport.listen`; ConnectError for an unknown scheme, too.
    """
    return transport_of(address).listen(address, serve, options)


def reaches(source: str, target: str) -> bool:
    """Returns whether a worker at the address `source` can dial one at `target`, as far as that shows from here.

    A worker that only its own process reaches is out of reach for one that others reach too: that one may be elsewhere.
    An unknown scheme counts as reachable, since dialling says what is wrong with it.
    """
    here, there = _transports_within(source), _transports_within(target)
    return here or not there


def _transports_within(address: str) -> bool:
    try:
        return transport_of(address).within_process
    except ConnectError:
        return False
