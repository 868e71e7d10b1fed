"""How a worker's process keeps memory that was freed, for the next batch.

A training step makes and frees tens of megabytes. By default glibc's malloc gives most of that back to the system
after each step, and more so on a thread that is not the main one, as a worker's compute thread is; the next step then
waits for the system to clear the same pages again (1,200 page faults a step of the MNIST network, a tenth of its time).
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)

KEPT = 128 << 20
"""Bytes that malloc may keep for each of its arenas, free at its end."""
LARGEST = 32 << 20
"""Bytes of the largest block that is kept; larger ones go back to the system at once. malloc takes no more."""

_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tells malloc to keep up to `KEPT` bytes, for this whole process: for processes that do nothing but work.

    Returns whether it did: not where the environment sets malloc up already, nor without glibc.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, KEPT))
