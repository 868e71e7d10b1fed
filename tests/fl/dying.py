"""A disk on which everything ends at a chosen step, as by ``kill -9`` or a full disk."""

from __future__ import annotations

import errno
import itertools

from planrt.serde.disk import Disk


class KilledError(BaseException):
    """The process is gone."""


class DyingDisk(Disk):
    """Dies at step `last`: half of what is written there is, and nothing changes the disk from then on."""

    def __init__(self, last=10**9):
        self.last = last
        self.steps = 0

    def _step(self):
        self.steps += 1
        if self.steps >= self.last:
            raise KilledError(f"at step {self.last}")

    def create(self, path):
        self._step()
        return super().create(path)

    def open_to_append(self, path):
        self._step()
        return super().open_to_append(path)

    def write(self, file, data):
        try:
            self._step()
        except KilledError:
            if self.steps == self.last:
                super().write(file, bytes(data)[: len(data) // 2])
            raise
        super().write(file, data)

    def cut(self, file, size):
        self._step()
        super().cut(file, size)

    def sync(self, file):
        self._step()

    def replace(self, new, path):
        self._step()
        super().replace(new, path)

    def sync_folder(self, folder):
        self._step()

    def remove(self, path):
        self._step()
        super().remove(path)

    def write_whole(self, path, parts, *, durable=True):
        if durable:  # what `planrt status` shows may be lost, and is no step
            super().write_whole(path, parts)


class FullDisk(Disk):
    """Has room for `nbytes` more bytes."""

    def __init__(self, nbytes):
        self.room = nbytes
        self.writes = itertools.count()

    def write(self, file, data):
        size = len(data)
        fits = min(size, self.room)
        super().write(file, bytes(data)[:fits])
        self.room -= fits
        if fits < size:
            raise OSError(errno.ENOSPC, "No space left on device")
