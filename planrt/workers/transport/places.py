"""How many connections a server takes, from their first byte on: so many of an address, and so many of all together.

Each takes a file of the process, which needs some for other things: its log, decisions, processes, connections that it
opens itself.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from typing import Final, Literal, cast

from websockets.asyncio.server import ServerConnection

from planrt.logs import get_logger
from planrt.workers.wire.channel import caller

MOST_FILES: Final = 1 << 16
"""Files that a worker asks the system for, as most systems give a process 1,024 unless it asks for more."""
_LOGGED_EVERY: Final = 60.0
"""Seconds."""
log = get_logger("planrt.worker")


def take_files() -> None:
    """Lets this process have as many files open as the system allows, up to `MOST_FILES`."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_of_all(part: float = 0.75) -> int:
    """Returns how many connections a server takes: that part of the files that its process may have open."""
    try:
        import resource
    except ImportError:  # Windows
        return int(MOST_FILES * part)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return int(MOST_FILES * part) if soft == resource.RLIM_INFINITY else max(1, int(soft * part))


class Counted:
    """So many connections of an address (`caller`), and so many of all together."""

    def __init__(self, most: int, of_all: int) -> None:
        self.most, self.of_all = most, of_all
        self.open: Counter[str] = Counter()
        """Address -> its connections."""
        self.total = 0

    def take(self, host: str) -> Literal["", "address", "all"]:
        """Counts a connection from `host`, or returns which of the two has as many as it may."""
        name = caller(host)
        if self.open.get(name, 0) >= self.most:
            return "address"
        if self.total >= self.of_all:
            return "all"
        self.open[name] += 1
        self.total += 1
        return ""

    def leave(self, host: str) -> None:
        """No longer counts one."""
        name = caller(host)
        self.total -= 1
        self.open[name] -= 1
        if not self.open[name]:
            del self.open[name]


class Places:
    """The connections of one server.

    Args:
        most: connections from one address at a time.
        of_all: those of all addresses together.
    """

    def __init__(self, most: int, of_all: int) -> None:
        self._counted = Counted(most, of_all)
        self.leave = self._counted.leave
        self._logged = -_LOGGED_EVERY

    def take(self, host: str) -> bool:
        """Takes a place for a connection from `host`, if there is one. Of those for which there is none the log tells,
        at most once a minute."""
        if not self._counted.take(host):
            return True
        if time.monotonic() >= self._logged + _LOGGED_EVERY:
            self._logged = time.monotonic()
            name = caller(host)
            log.warning(
                "connections_refused", client=name, open_from_there=self._counted.open.get(name, 0),
                open=self._counted.total,
            )  # fmt: skip
        return False


class Placed(ServerConnection):
    """A connection that has a place. `placed` makes classes of such."""

    places: Places
    host: str | None = None
    """Whose place it has."""
    begun = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        if self.host is None:
            host = host_of(transport)
            if not self.places.take(host):
                cast(asyncio.Transport, transport).abort()
                return
            self.host = host
        self.begun = True
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        if self.begun and self.host is not None:
            self.places.leave(self.host)
            super().connection_lost(exc)


def placed(base: type[ServerConnection], of: Places) -> type[Placed]:
    """Returns a class of connections for `websockets`' servers that are `base`, and have places of `of`.

    One for which there is no place is cut off without a word.
    """

    class Here(Placed, base):  # type: ignore[valid-type,misc]
        places = of

    return Here


def host_of(transport: asyncio.BaseTransport) -> str:
    """Returns the other end's address."""
    return str((transport.get_extra_info("peername") or ("",))[0])


class Handshakes:
    """The TLS handshakes that are under way at a server: each has a place from its connection's first moment on.

    A server hears of a connection with TLS once that handshake is over. So it is told of connections without, and each
    is begun anew, on the same socket, with TLS.

    Args:
        seconds: that a client may take for it.
    """

    def __init__(self, context: ssl.SSLContext, places: Places, seconds: float) -> None:
        self._context, self._places, self._seconds = context, places, seconds
        self._tasks: set[asyncio.Task[None]] = set()

    def before(self, connection: type[Placed]) -> Callable[..., asyncio.Protocol]:
        """Returns what is made in place of `connection`."""
        return lambda *args, **options: _Accepted(self, connection(*args, **options))

    def begin(self, transport: asyncio.Transport, connection: Placed) -> None:
        """Shakes hands over a connection that was accepted just now, if there is a place for it."""
        host = host_of(transport)
        own = transport.get_extra_info("socket")
        if own is not None and self._places.take(host):
            connection.host = host
            accepted = socket.socket(fileno=os.dup(own.fileno()))
            accepted.setblocking(False)
            task = asyncio.get_running_loop().create_task(self._shake(accepted, connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        transport.abort()  # nothing has been read of it

    async def _shake(self, accepted: socket.socket, connection: Placed) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection, accepted, ssl=self._context, ssl_handshake_timeout=self._seconds
            )
        except OSError:  # TLS's own errors and those of time are such, too
            return
        finally:
            if not connection.begun:
                accepted.close()
                self._places.leave(connection.host or "")

    def end(self) -> None:
        """Ends those that are under way."""
        for task in self._tasks:
            task.cancel()


class _Accepted(asyncio.Protocol):
    """A connection before its TLS handshake."""

    def __init__(self, handshakes: Handshakes, connection: Placed) -> None:
        self._handshakes, self._connection = handshakes, connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        self._handshakes.begin(cast(asyncio.Transport, transport), self._connection)
