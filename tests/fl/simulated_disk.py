"""A disk in memory that forgets what was not flushed, tears what is being written, and fills up: by a seed."""

from __future__ import annotations

import errno
import random
from pathlib import Path

from planrt.serde.disk import Disk
from tests.fl.dying import KilledError


class SimulatedDisk(Disk):
    """Real files under `folder`, and what a power cut would leave of them.

    Each file has what is written and what is flushed; names are flushed by `sync_folder`. At step `last` the process is
    gone: `crash` then leaves each unflushed change or not, as the seed says, and of unflushed bytes a part.
    """

    def __init__(self, seed: int, *, last: int = 10**9, room: int = 10**12) -> None:
        self.random = random.Random(seed)
        self.steps, self.last, self.room = 0, last, room
        self.flushed: dict[Path, bytes] = {}
        """The bytes that a name has for sure."""
        self.before: dict[Path, bytes | None] = {}
        """Names that were changed since their folder was flushed: what they had before; None for nothing."""
        self.paths: dict[int, Path] = {}
        self.dead = False

    def _step(self) -> None:
        self.steps += 1
        if self.dead or self.steps >= self.last:
            self.dead = True
            raise KilledError(f"at step {self.steps}")

    def create(self, path: Path) -> int:
        self._step()
        if path in self.flushed or path.exists():
            self.before.setdefault(path, self.flushed.get(path))
        else:
            self.before.setdefault(path, None)
        file = super().create(path)
        self.paths[file] = path
        self.flushed[path] = b""
        return file

    def open_to_append(self, path: Path) -> int:
        self._step()
        if not path.exists():
            self.before.setdefault(path, None)
            self.flushed[path] = b""
        else:
            self.flushed.setdefault(path, path.read_bytes())
        file = super().open_to_append(path)
        self.paths[file] = path
        return file

    def write(self, file: int, data: bytes | memoryview) -> None:
        data = bytes(data)
        fits = min(len(data), self.room)
        try:
            self._step()
        except KilledError:
            super().write(file, data[: self.random.randrange(fits + 1)])
            raise
        super().write(file, data[:fits])
        self.room -= fits
        if fits < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def cut(self, file: int, size: int) -> None:
        self._step()
        super().cut(file, size)

    def sync(self, file: int) -> None:
        self._step()
        self.flushed[self.paths[file]] = self.paths[file].read_bytes()

    def replace(self, new: Path, path: Path) -> None:
        self._step()
        self.before.setdefault(path, self.flushed.get(path) if path in self.flushed else _bytes(path))
        self.flushed[path] = self.flushed.pop(new, b"")
        self.before.pop(new, None)
        super().replace(new, path)
        for file, name in self.paths.items():
            if name == new:
                self.paths[file] = path

    def sync_folder(self, folder: Path) -> None:
        self._step()
        for path in [path for path in self.before if path.parent == folder]:
            del self.before[path]

    def remove(self, path: Path) -> None:
        self._step()
        self.before.setdefault(path, self.flushed.get(path) if path in self.flushed else _bytes(path))
        self.flushed.pop(path, None)
        super().remove(path)

    def crash(self) -> None:
        """Leaves what a power cut at this moment would: every name as it was flushed or as it is, and of the bytes that
        a file has beyond its flushed ones any part, the last of it possibly wrong."""
        for path, kept in list(self.flushed.items()):
            if not path.exists():
                continue
            there = path.read_bytes()
            if there == kept:
                continue
            common = next((i for i, (a, b) in enumerate(zip(kept, there, strict=False)) if a != b), None)
            common = min(len(kept), len(there)) if common is None else common
            left = there[: self.random.randrange(common, len(there) + 1)] if len(there) > common else there
            if self.random.random() < 0.2 and len(left) > common:
                left = left[:-1] + bytes([left[-1] ^ 0x40])
            path.write_bytes(left if self.random.random() < 0.8 else kept)
        for path, before in self.before.items():
            if self.random.random() < 0.5:
                continue
            if before is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(before)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
