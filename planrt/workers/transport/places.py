"""How many connections a server takes, from their first byte on: so many of an address, and so many of all together.

Each takes a file of the process, which needs some for other things: its log, decisions, processes, connections that it
opens itself.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Final, cast

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


class Places:
    """The connections of one server.

    Args:
        most: connections from one address at a time (`caller`).
        of_all: those of all addresses together.
    """

    def __init__(self, most: int, of_all: int) -> None:
        self._most, self._of_all = most, of_all
        self._open: Counter[str] = Counter()
        self._total = 0
        self._logged = -_LOGGED_EVERY

    def take(self, host: str) -> bool:
        """Takes a place for a connection from `host`, if there is one. Of those for which there is none the log tells,
        at most once a minute."""
        name = caller(host)
        if self._open[name] >= self._most or self._total >= self._of_all:
            self._tell(name)
            return False
        self._open[name] += 1
        self._total += 1
        return True

    def leave(self, host: str) -> None:
        """Gives back a place that was taken."""
        name = caller(host)
        self._total -= 1
        self._open[name] -= 1
        if not self._open[name]:
            del self._open[name]

    def _tell(self, name: str) -> None:
        if time.monotonic() >= self._logged + _LOGGED_EVERY:
            self._logged = time.monotonic()
            log.warning(
                "connections_refused", client=name, open_from_there=self._open[name], open=self._total
            )
        if not self._open[name]:
            del self._open[name]  # else it grew with each address that is refused


def placed(base: type[ServerConnection], places: Places) -> type[ServerConnection]:
    """Returns a class of connections for `websockets`' servers that are `base`, and have places of `places`.

    One for which there is no place is cut off without a word. Over TLS a connection has its place from the end of that
    handshake on: before, nobody is told of it.
    """

    class Placed(base):  # type: ignore[valid-type,misc]
        host: str | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            host = str((transport.get_extra_info("peername") or ("",))[0])
            if not places.take(host):
                cast(asyncio.Transport, transport).abort()
                return
            self.host = host
            super().connection_made(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            if self.host is None:
                return
            places.leave(self.host)
            super().connection_lost(exc)

    return Placed
