"""What a connection may take before it has a session: time, memory and places.

Whoever reaches a worker's address can open connections, before any token. One that says nothing holds a file of the
process, of which there are about a thousand, and one that announces a large message the memory for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from planrt.errors import HandshakeError, WireError
from planrt.serde.frames import Store
from planrt.workers.transport.places import Counted

OPENING_SECONDS: Final = 10.0
"""Seconds that a connection may take for each message of the handshake."""


def no_tensors(message: object, nbytes: int) -> Store:
    """Makes room for none: an `Allocate` for the handshake, whose messages have no tensors.

    Raises:
        WireError: always.
    """
    raise WireError(f"a handshake has no tensors, and these are {nbytes:,} bytes", address="")


class Openings:
    """Counts the connections of each address.

    Args:
        most: connections from one address at a time (`caller`).
        of_all: those of all addresses together.
    """

    def __init__(self, most: int, of_all: int) -> None:
        self._counted = Counted(most, of_all)

    @contextmanager
    def place(self, host: str) -> Iterator[None]:
        """Holds a place for a connection from `host`; one within the process (``""``) needs none.

        Raises:
            HandshakeError: that address has all its places, or all have theirs.
        """
        if not host:
            yield
            return
        counted = self._counted
        match counted.take(host):
            case "address":
                raise HandshakeError(
                    f"{counted.most:,} connections from your address are open, as many as it may have: close some",
                    address=host,
                )
            case "all":
                raise HandshakeError(
                    f"{counted.of_all:,} connections are open here, as many as this worker takes: try again later",
                    address=host,
                )
        try:
            yield
        finally:
            counted.leave(host)
