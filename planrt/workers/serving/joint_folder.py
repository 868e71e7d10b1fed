"""The folder where a worker keeps its part of joint runs: checkpoints, whole or not there.

    3f0c...-91ab...-0000004.run     after 4 epochs: the user, the name of the run, as hashes
    3f0c...-91ab...-0000003.run     the epoch before: another party may not have come further

A file is data only (`planrt.serde.checkpoints`). It has values that follow from the owner's table: the folder is its
owner's alone to read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from planrt.errors import JointError, OptionError, RunFolderError
from planrt.serde.checkpoints import Checkpoint, checkpoint_from, write_checkpoint
from planrt.serde.disk import Disk

MOST_RUNS: Final = 100
"""Runs of one user that are kept."""
MOST_BYTES: Final = 4 << 30
"""Bytes that the kept runs of one user may take."""
_KEPT: Final = 2
_NAME = re.compile(r"^(?P<user>[0-9a-f]{16})-(?P<run>[0-9a-f]{32})-(?P<epoch>[0-9]{7})\.run$")


class JointFolder:
    """A worker's folder for joint runs. It is the worker's alone; it is made if it is not there.

    Raises:
        OptionError: it cannot be written to.
    """

    def __init__(self, path: str | Path, worker: str, disk: Disk | None = None) -> None:
        self.path = Path(path)
        self._worker = worker
        self._disk = disk or Disk()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._disk.try_room(self.path, 1)
        except OSError as error:
            raise OptionError(
                f"joint runs cannot be kept in {self.path}: {error.strerror or error}"
            ) from None

    def epochs(self, user: str, name: str) -> Sequence[int]:
        """Returns the epochs after which the run was kept: the newest first, two at most."""
        who, run = self._hashes(user, name)
        return sorted((epoch for a, b, epoch, _ in self._files() if (a, b) == (who, run)), reverse=True)[
            :_KEPT
        ]

    def read(self, user: str, name: str, epoch: int) -> Checkpoint:
        """Returns what was kept after `epoch` epochs.

        Raises:
            JointError: nothing was, or it is damaged.
        """
        return kept_in(self.read_bytes(user, name, epoch), self._worker, name)

    def read_bytes(self, user: str, name: str, epoch: int) -> bytes:
        """Returns the bytes of the file that `read` reads.

        Raises:
            JointError: there is none, or it cannot be read.
        """
        try:
            return self._path(user, name, epoch).read_bytes()
        except FileNotFoundError:
            raise JointError(
                f"party {self._worker!r} has kept nothing of {name!r} after {epoch} epochs"
            ) from None
        except OSError as error:
            raise JointError(
                f"what party {self._worker!r} has kept of {name!r} cannot be read: {error.strerror or error}"
            ) from None

    def check_room(self, user: str, name: str) -> None:
        """Raises JointError if the user has kept as many runs, or as many bytes, as there is room for."""
        who, run = self._hashes(user, name)
        mine = [(found, path) for a, found, _, path in self._files() if a == who]
        others = {found for found, _ in mine} - {run}
        if len(others) >= MOST_RUNS:
            raise JointError(
                f"party {self._worker!r} keeps {MOST_RUNS} joint runs of this user, its limit: forget() some"
            )
        if sum(_size(path) for found, path in mine if found != run) > MOST_BYTES:
            raise JointError(
                f"party {self._worker!r} keeps {MOST_BYTES:,} bytes of joint runs of this user, its limit: "
                "forget() some"
            )

    def write(self, user: str, name: str, epoch: int, kept: Checkpoint) -> None:
        """Keeps it: all of it, or what was there before stays. Of other epochs the one before stays.

        Raises:
            JointError: it could not be written.
        """
        self._put(user, name, epoch, lambda path: write_checkpoint(self._disk, path, kept))

    def write_bytes(self, user: str, name: str, epoch: int, data: bytes) -> None:
        """Keeps a checkpoint that is bytes already; see `write`."""
        self._put(user, name, epoch, lambda path: self._disk.write_whole(path, [data]))

    def _put(self, user: str, name: str, epoch: int, write: Callable[[Path], None]) -> None:
        self.check_room(user, name)
        try:
            write(self._path(user, name, epoch))
            who, run = self._hashes(user, name)
            for a, b, other, path in self._files():
                if (a, b) == (who, run) and other not in (epoch, epoch - 1):
                    self._disk.remove(path)
        except OSError as error:
            raise JointError(
                f"party {self._worker!r} cannot keep {name!r}: {error.strerror or error}; what it kept before is there"
            ) from None

    def forget(self, user: str, name: str) -> None:
        """Removes all that was kept of a run."""
        who, run = self._hashes(user, name)
        try:
            for a, b, _, path in self._files():
                if (a, b) == (who, run):
                    self._disk.remove(path)
        except OSError as error:
            raise JointError(
                f"party {self._worker!r} cannot remove {name!r}: {error.strerror or error}"
            ) from None

    def _files(self) -> list[tuple[str, str, int, Path]]:
        found = [(path, _NAME.match(path.name)) for path in self.path.iterdir()]
        return [
            (match["user"], match["run"], int(match["epoch"]), path)
            for path, match in found
            if match is not None
        ]

    def _hashes(self, user: str, name: str) -> tuple[str, str]:
        def hashed(*parts: str) -> str:
            return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

        return hashed(self._worker, user)[:16], hashed(self._worker, user, name)[:32]

    def _path(self, user: str, name: str, epoch: int) -> Path:
        who, run = self._hashes(user, name)
        return self.path / f"{who}-{run}-{epoch:07d}.run"


def kept_in(data: bytes, worker: str, name: str) -> Checkpoint:
    """Returns what a worker has kept of a run, from the bytes of its file.

    Raises:
        JointError: it is damaged.
    """
    try:
        return checkpoint_from(data, "its file")
    except RunFolderError as error:
        raise JointError(f"what party {worker!r} has kept of {name!r} is damaged: {error}") from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it was just removed
        return 0
