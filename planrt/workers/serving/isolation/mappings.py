"""Memory that a process for clients' work would share with the owner's, such as a data set that is mapped from a file.

A process is a copy of the worker's own one, and memory that was mapped to be shared (`mmap(2)`, MAP_SHARED) stays
shared between the two: whoever takes the process over could write to the owner's data, and to those of other users.
Such mappings are made private before any client is served: what the owner writes is seen still, and what the process
writes is a copy of its own. Taking the right to write away would not do, as a process may give that to itself again
(`mprotect(2)`).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from planrt.errors import IsolationError

_READ, _WRITE, _EXECUTE = 1, 2, 4
_PRIVATE, _FIXED, _ANONYMOUS = 0x02, 0x10, 0x20
_MAY_MOVE, _MOVE_THERE = 1, 2
_FAILED: Final = ctypes.c_void_p(-1).value
_NOT_MEMORY: Final = ("anon_inode:", "/dev/")
_MEMORY_UNDER_DEV: Final = ("/dev/zero", "/dev/shm/")  # noqa: S108 - how the kernel names shared memory


@dataclass(frozen=True, slots=True)
class _Mapping:
    start: int
    end: int
    rights: str
    offset: int
    device: tuple[int, int]
    inode: int
    path: str

    @property
    def protection(self) -> int:
        return sum(bit for bit, mark in ((_READ, "r"), (_WRITE, "w"), (_EXECUTE, "x")) if mark in self.rights)


def shared_mappings() -> Iterator[tuple[int, int, str]]:
    """Yields (first byte, byte after the last, rights) of the memory that this process shares with others."""
    for one in _shared():
        yield one.start, one.end, one.rights


def _shared() -> list[_Mapping]:
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, offset, device, inode, *path = line.split(maxsplit=5)
        start, end = (int(one, 16) for one in span.split("-"))
        name = path[0] if path else ""
        memory = name.startswith(_MEMORY_UNDER_DEV) or not name.startswith(_NOT_MEMORY)
        if rights[3] == "s" and memory:
            major, minor = (int(one, 16) for one in device.split(":"))
            found.append(_Mapping(start, end, rights, int(offset, 16), (major, minor), int(inode), name))
    return found


def make_private(kept: tuple[int, int] | None = None) -> None:
    """Makes all memory private that this process shares with others, but for the bytes from ``kept[0]`` to ``kept[1]``:
    whole pages. This process has one thread.

    Raises:
        IsolationError: the system refuses that.
    """
    if sys.platform != "linux":
        return
    for one in _shared():
        inside = kept is not None and one.start <= kept[0] and kept[1] <= one.end
        spans = [(one.start, one.end)]
        if inside and kept is not None:
            spans = [(one.start, kept[0]), (kept[1], one.end)]
        file = _opened(one)
        try:
            for start, end in spans:
                if start < end:
                    _replace(one, start, end, file)
        finally:
            if file >= 0:
                os.close(file)


def _opened(one: _Mapping) -> int:
    """The file of a mapping, for reading; -1 where it cannot be opened, as one that has no name any more."""
    for path in (f"/proc/self/map_files/{one.start:x}-{one.end:x}", one.path):
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError):
            continue
        about = os.fstat(file)
        if (os.major(about.st_dev), os.minor(about.st_dev)) == one.device and about.st_ino == one.inode:
            return file
        os.close(file)
    return -1


def _replace(one: _Mapping, start: int, end: int, file: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    size, nothing = ctypes.c_size_t(end - start), ctypes.c_int(-1)
    there = ctypes.c_void_p(start)
    if file >= 0:
        offset = ctypes.c_long(one.offset + start - one.start)
        made = libc.mmap(there, size, one.protection, _PRIVATE | _FIXED, ctypes.c_int(file), offset)
        if made == start:
            return
    copy = libc.mmap(None, size, _READ | _WRITE, _PRIVATE | _ANONYMOUS, nothing, ctypes.c_long(0))
    if copy == _FAILED:
        raise _refused()
    if one.protection & _READ:
        ctypes.memmove(copy, start, end - start)
    if libc.mprotect(ctypes.c_void_p(copy), size, one.protection) != 0:
        raise _refused()
    moved = libc.mremap(ctypes.c_void_p(copy), size, size, _MAY_MOVE | _MOVE_THERE, there)
    if moved != start:
        raise _refused()


def _refused() -> IsolationError:
    why = os.strerror(ctypes.get_errno())
    return IsolationError(f"a process cannot be confined: shared memory stays shared: {why}")
