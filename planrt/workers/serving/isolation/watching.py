"""What the processes for clients' work are at, where the worker's own process sees it: memory that each shares with it.

Each process has a slot, a page of its own (`mappings.py` takes the others' from it). It writes there what it
begins, with a time: half a microsecond an op, and no message, so that
it can be read of a process that has crashed or will never answer. So are its counts, before each answer leaves.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import time
from dataclasses import dataclass
from typing import Final

from planrt.workers.serving.counts import PLACES, Figures

SLOTS: Final = 256
"""Processes at a time."""
_SLOT = struct.Struct("<dII80s")
_BEGAN = struct.Struct("<d")
_NAME = struct.Struct("<80s")
_COUNT = struct.Struct("<I")
_SIZE: Final = mmap.PAGESIZE
_OBJECTS_AT: Final = _BEGAN.size
_SENT_AT: Final = _OBJECTS_AT + _COUNT.size
_NAME_AT: Final = _SENT_AT + _COUNT.size
_FIGURE = struct.Struct("<Q")
_FIGURES = struct.Struct(f"<{PLACES}Q")
_FIGURES_AT: Final = 128
assert _SLOT.size <= _FIGURES_AT and _FIGURES_AT + _FIGURES.size <= _SIZE  # noqa: S101, PT018


@dataclass(frozen=True, slots=True)
class Seen:
    """Holds what a slot says: what runs since when (`time.monotonic`, 0 for nothing), how many objects the process has,
    and whether it is in the middle of a message to a client."""

    what: str
    since: float
    objects: int
    sending: bool


class Slot:
    """The slot of one process. `began`, `idle` are for its thread that computes, `sending` for the other one."""

    def __init__(self, page: mmap.mmap, index: int) -> None:
        self._page = page
        self._at = index * _SIZE
        self._objects = self._sent = 0

    @property
    def memory(self) -> tuple[int, int]:
        """Returns where it is in memory: its first byte, and the one after its last."""
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._page)) + self._at
        return start, start + _SIZE

    def clear(self) -> None:
        """Makes it the slot of a new process."""
        self._page[self._at : self._at + _SIZE] = bytes(_SIZE)

    def began(self, what: str) -> None:
        """Notes that `what` begins."""
        _NAME.pack_into(self._page, self._at + _NAME_AT, what.encode())
        _BEGAN.pack_into(self._page, self._at, time.monotonic())

    def idle(self, objects: int) -> None:
        """Notes that nothing runs, and how many objects there are."""
        _BEGAN.pack_into(self._page, self._at, 0.0)
        if objects != self._objects:
            self._objects = objects
            _COUNT.pack_into(self._page, self._at + _OBJECTS_AT, objects)

    def sending(self, more: int) -> None:
        """Notes that so many more messages are being sent."""
        self._sent += more
        _COUNT.pack_into(self._page, self._at + _SENT_AT, self._sent)

    def count(self, figures: Figures) -> None:
        """Notes what has been counted, so that it is not lost with the process."""
        for place, count in figures.counts():
            _FIGURE.pack_into(self._page, self._at + _FIGURES_AT + place * _FIGURE.size, count)

    def counted(self, told: Figures) -> Figures:
        """Returns what a process had counted that has ended; `told` is what it said last."""
        return told.with_counts(_FIGURES.unpack_from(self._page, self._at + _FIGURES_AT))

    def read(self) -> Seen:
        """Returns what it says."""
        since, objects, sent, name = _SLOT.unpack_from(self._page, self._at)
        return Seen(name.rstrip(b"\0").decode(errors="replace"), since, objects, sent > 0)


def new_page() -> mmap.mmap:
    """Returns the pages of the slots of processes that are made from now on."""
    return mmap.mmap(-1, SLOTS * _SIZE)
