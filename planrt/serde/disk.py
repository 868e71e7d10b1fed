"""Files that are whole or not there, whatever happens meanwhile: kill, power cut, full disk.

A file is written beside its place, flushed to the disk, and takes the place by a rename; then its folder is flushed.
Every change of the disk goes through a `Disk`, so that tests can make each of them fail, or be the last.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_SYNC_EVERY: Final = 32 << 20
"""Bytes of a large file after which the disk is given them, so that it works while the next ones are made."""


class Disk:
    """The operations that change files of a folder."""

    def create(self, path: Path) -> int:
        """Opens a new file for writing, in place of one that was left half-written; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)

    def open_to_append(self, path: Path) -> int:
        """Opens a file for writing at its end; returns its descriptor."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)

    def write(self, file: int, data: bytes | memoryview) -> None:
        """Writes all of `data`.

        Raises:
            OSError: there is no room for it, for instance.
        """
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(file, view) :]

    def cut(self, file: int, size: int) -> None:
        """Shortens a file to `size` bytes."""
        os.ftruncate(file, size)

    def sync(self, file: int) -> None:
        """Returns once the disk has all that was written to the file."""
        os.fsync(file)

    def replace(self, new: Path, path: Path) -> None:
        """Gives the file `new` the name `path`; one that had it is gone."""
        os.replace(new, path)

    def sync_folder(self, folder: Path) -> None:
        """Returns once the disk has the folder's names, where the system can do that."""
        with contextlib.suppress(PermissionError, IsADirectoryError):  # Windows opens no folders
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Removes a file, if it is there."""
        path.unlink(missing_ok=True)

    def write_whole(self, path: Path, parts: Iterable[bytes | memoryview], *, durable: bool = True) -> None:
        """Puts a file with the bytes of `parts` in the place of `path`: all of it, or what was there before.

        Without `durable`, a power cut may lose it; then it is not waited for the disk.

        Raises:
            OSError: it could not be written; what was there before still is.
        """
        beside = path.with_name(f".{path.name}.tmp")
        try:
            file = self.create(beside)
            try:
                behind = 0
                for part in parts:
                    self.write(file, part)
                    behind += len(part)
                    if durable and behind >= _SYNC_EVERY:
                        self.sync(file)
                        behind = 0
                if durable:
                    self.sync(file)
            finally:
                os.close(file)
            self.replace(beside, path)
        except OSError:
            with contextlib.suppress(OSError):
                self.remove(beside)
            raise
        if durable:
            self.sync_folder(path.parent)

    def try_room(self, folder: Path, nbytes: int) -> None:
        """Raises OSError unless a file of `nbytes` bytes can be written to `folder`; it is gone afterwards."""
        path = folder / f".room-{os.getpid()}.tmp"
        block = bytes(1 << 20)
        try:
            file = self.create(path)
            try:
                for start in range(0, nbytes, len(block)):
                    self.write(file, block[: nbytes - start])
                self.sync(file)
            finally:
                os.close(file)
        finally:
            with contextlib.suppress(OSError):
                self.remove(path)
