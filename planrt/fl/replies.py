"""Memory for the replies of a round: how many wait in it, and which go to temporary files."""

from __future__ import annotations

from planrt.serde.frames import MemoryStore, SpoolStore, Store

SMALL = 1 << 20
"""Replies under this many bytes are not worth a temporary file."""

LARGE = 8 << 20
"""Folding states over this many bytes leaves the loop thread, which has pings to answer. Of replies over this
many bytes one less is held: what connections have in hand while they receive (about 10 MB in all) takes its
place."""


class Leases:
    """Bounds the replies of a round that are in memory: the accumulator, and `hold` more."""

    def __init__(self, hold: int) -> None:
        self.free = hold

    def lease(self, *, first: bool) -> Lease:
        """Returns the place of one worker's reply; the first in order becomes the accumulator."""
        return Lease(self, first)


class Lease:
    """The place of one worker's reply."""

    def __init__(self, leases: Leases, first: bool) -> None:
        self._leases = leases
        self._first = first
        self._taken = False
        self._late = False

    def allocate(self, message: object, nbytes: int) -> Store:
        """Returns where a reply of `nbytes` bytes goes: memory while there is room, else a temporary file."""
        if nbytes < SMALL or (self._first and not self._late):
            return MemoryStore(nbytes)
        if self._late or not self._leases.free:
            return SpoolStore(nbytes)
        self._leases.free -= 1
        self._taken = True
        return MemoryStore(nbytes)

    def release(self) -> None:
        """Gives the place back: the reply has been added up."""
        self._leases.free += self._taken
        self._taken = False

    def too_late(self) -> None:
        """Notes that the reply will not be looked at any more, whenever it comes: it takes no memory."""
        self._late = True
        self.release()
