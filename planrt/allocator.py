"""How a worker's process uses memory: what was freed is kept for the next batch, and cleared before others
have it.

A training step makes and frees tens of megabytes. By default glibc's malloc gives most of that back to the
system after each step, and more so on a thread that is not the main one, as a worker's compute thread is; the
next step then waits for the system to clear the same pages again (1,200 page faults a step of the MNIST
network, a tenth of its time). And such a thread has an arena of its own, of pieces of 64 MB, of which malloc
gives back each that is empty, whatever it is told to keep: so all threads share one arena (a product of a
million elements in shares, which hands blocks of 8 MB around, had 3,600 page faults, and took 1.06 times as
long).

Memory that is used again still holds what others freed, and a kernel that leaves part of its result
unwritten, or reads past its operand, would show it. So where a worker has users, a policy or private data,
malloc writes over memory twice: when it is freed (ones), and when it is handed out (zeros). That takes
malloc's own cache for small blocks to be off, which only the environment can say before a process starts:
`begin_clearing` starts it again for that. Measured on one thread: a training step of the MNIST network takes
1.1 times as long, sums of two 20 MB tensors, which are nothing but memory, 2.4 times, small ops and products
of matrices as long as before within what can be told. (torch's own `fill_uninitialized_memory` costs less,
but knows nothing of results that kernels allocate for themselves, nor of reads past an operand; clearing in
`torch.empty` alone, which `planrt.plans.ir.ops` does on every worker, neither.) GPU memory comes from torch's
own allocator, and is not cleared.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Final

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _PERTURB, _ARENA_MAX = -1, -3, -6, -8  # mallopt(3)

KEPT = 128 << 20
"""Bytes that malloc may keep, free at the end of its memory."""
LARGEST = 32 << 20
"""Bytes of the largest block that is kept; larger ones go back to the system at once. malloc takes no
more."""

_SETTINGS = (
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES",
)  # fmt: skip

_FILL: Final = 0xFF
"""What malloc writes into memory that is freed; what it hands out holds the complement."""
CLEARING: Final = f"glibc.malloc.perturb={_FILL}:glibc.malloc.tcache_count=0"
"""What GLIBC_TUNABLES says in a process that clears its memory."""


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's mallopt; None with another C library."""
    found = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return None if found is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version") else found


def keep_freed_memory() -> bool:
    """Tells malloc to keep up to `KEPT` bytes, for this whole process and before it has other threads: for
    processes that do nothing but work.

    Returns whether it did: not where the environment sets malloc up already, nor without glibc.
    """
    elsewhere = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
    if clears_from_the_start():
        del elsewhere["GLIBC_TUNABLES"]
    if elsewhere or (mallopt := _mallopt()) is None:
        return False
    told = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, LARGEST), (_TRIM_THRESHOLD, KEPT))
    return all(bool(mallopt(what, value)) for what, value in told)


def clears_from_the_start() -> bool:
    """Returns whether malloc was told to clear memory before this process began."""
    return set(CLEARING.split(":")) <= set(os.environ.get("GLIBC_TUNABLES", "").split(":"))


def begin_clearing() -> None:
    """Starts the command of this process again, with a malloc that clears memory, if it is not so already.

    For a command that has done nothing yet; does not return then. Without glibc it does nothing.
    """
    if clears_from_the_start() or _mallopt() is None:
        return
    before = os.environ.get("GLIBC_TUNABLES")
    tunables = f"{before}:{CLEARING}" if before else CLEARING
    os.execve(  # noqa: S606 - itself
        sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": tunables}
    )


def clear_new_memory() -> bool:
    """Tells malloc to clear memory from now on, in this whole process. Returns whether that is all memory:
    where it was not said before the process began, small blocks (up to 1 KiB) may still hold what was freed.
    """
    mallopt = _mallopt()
    return mallopt is not None and bool(mallopt(_PERTURB, _FILL)) and clears_from_the_start()
