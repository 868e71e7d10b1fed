"""A run folder: the journal of a run, its checkpoints, and what goes on in it just now.

    run.lock                held by the one process that runs it
    journal.jsonl           what happened, a line each, chained (`planrt.chained`): how the run began, every round
    checkpoint-000012.run   what to go on from; the two newest are kept
    options.json            the options of `planrt run`, where that made the folder
    now.json                who is waited for at the moment; replaced all the time, and not flushed to the disk

A line of the journal is on the disk before the checkpoint of its round. So there may be lines of rounds that no
checkpoint has: these are made again after a crash, and their newest line counts. Half a line at the end, which a
crash left, is cut off. Nothing here needs torch, so that `planrt status` answers at once.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from planrt.chained import FIRST, ChainError, finite, links, sealed
from planrt.errors import RunFolderError
from planrt.serde.disk import Disk

VERSION: Final = 1
KEPT: Final = 2
"""Checkpoints that are kept: the newest, and one in case that is damaged."""

LOCK, JOURNAL, NOW, OPTIONS = "run.lock", "journal.jsonl", "now.json", "options.json"


def time_now() -> str:
    """Returns the time in UTC, to the second, as in ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Journal:
    """The lines of a run's journal, read: `began` is the first, `rounds` the newest line of each round."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.began: dict[str, Any] | None = None
        self.rounds: dict[int, dict[str, Any]] = {}
        self.finished = False
        self.failed = ""
        """Why the last round failed, if it did."""
        self.run = ""
        """What no other run has: the digest of the first line."""
        self.head, self.size, self.broken = FIRST, 0, ""
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            with open(self.path, "rb") as file:
                lines = file.readlines()
        except OSError as error:
            raise RunFolderError(f"cannot read {self.path}: {error.strerror or error}") from error
        entries = links(lines, str(self.path))
        while True:
            try:
                link = next(entries)
            except StopIteration:
                return
            except ChainError as error:
                self.broken = str(error)
                return
            self.head, self.size = link.hash, self.size + len(lines[link.number - 1])
            self.run = self.run or link.hash
            self._take(link.values)

    def _take(self, values: dict[str, Any]) -> None:
        if self.began is None:
            version = values.get("version")
            if values.get("what") != "began" or not isinstance(version, int):
                raise RunFolderError(f"{self.path} is no journal of a run of planrt")
            if version > VERSION:
                raise RunFolderError(
                    f"{self.path} is of a newer planrt (journals of version {version}; this one reads {VERSION})"
                )
            self.began = values
        elif values.get("what") == "round" and isinstance(number := values.get("round"), int):
            self.rounds[number] = values
            self.finished, self.failed = False, ""
        elif values.get("what") == "failed":
            self.failed = str(values.get("why", ""))
        elif values.get("what") == "finished":
            self.finished = True

    def until(self, number: int) -> list[dict[str, Any]]:
        """Returns the lines of the rounds up to `number`, in order."""
        return [self.rounds[one] for one in sorted(self.rounds) if one <= number]


class RunFolder:
    """One run's folder, held by this process until `close`.

    Raises:
        RunFolderError: another process holds it, or it cannot be written or read.
    """

    def __init__(self, path: str | os.PathLike[str], *, disk: Disk | None = None) -> None:
        self.path = Path(path)
        self.disk = disk or Disk()
        self._lock, self._file = -1, -1
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunFolderError(
                f"cannot write to the run folder {path}: {error.strerror or error}"
            ) from error
        try:
            _hold(self._lock, self.path)
            self.journal = Journal(self.path)
        except BaseException:
            self.close()
            raise
        self._head = self.journal.head

    def close(self) -> None:
        """Lets go of the folder. Closing twice is fine."""
        held, self._lock, self._file = (self._file, self._lock), -1, -1
        for descriptor in held:
            if descriptor >= 0:
                os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------- journal

    def write_down(self, what: str, **values: Any) -> None:
        """Adds a line to the journal; it is on the disk when this returns.

        Raises:
            RunFolderError: it cannot be written; half a line is taken away again.
        """
        line, head = sealed({"what": what, "time": time_now(), **values}, self._head)
        path = self.path / JOURNAL
        try:
            if self._file < 0:
                self._file = self.disk.open_to_append(path)
                if os.fstat(self._file).st_size != self.journal.size:  # half a line that a crash left
                    self.disk.cut(self._file, self.journal.size)
                self.disk.sync_folder(self.path)
            size = os.fstat(self._file).st_size
            try:
                self.disk.write(self._file, line)
                self.disk.sync(self._file)
            except OSError:
                self.disk.cut(self._file, size)
                raise
        except OSError as error:
            raise no_room(path, error) from error
        self._head = head
        self.journal.run = self.journal.run or head

    # ------------------------------------------------------------------------------------ checkpoints

    def checkpoint_path(self, number: int) -> Path:
        """Returns the place of the checkpoint of round `number`."""
        return self.path / f"checkpoint-{number:06d}.run"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Returns the (round, file) of the checkpoints that there are, the newest first."""
        return checkpoints_in(self.path)

    def forget_old(self, keep: int = KEPT) -> None:
        """Removes all checkpoints but the newest `keep`."""
        for _, path in self.checkpoints()[keep:]:
            self.disk.remove(path)

    # -------------------------------------------------------------------------------------------- now

    def show(self, now: Mapping[str, Any]) -> None:
        """Replaces what `planrt status` shows of this moment. A disk that has no room for it changes nothing."""
        content = json.dumps(finite({**now, "pid": os.getpid(), "host": socket.gethostname()})).encode()
        try:
            self.disk.write_whole(self.path / NOW, [content], durable=False)
        except OSError:
            return


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """Returns the (round, file) of a folder's checkpoints, the newest first."""
    found = []
    for path in folder.glob("checkpoint-*.run"):
        digits = path.stem.removeprefix("checkpoint-")
        if digits.isascii() and digits.isdigit():
            found.append((int(digits), path))
    return sorted(found, reverse=True)


def no_room(path: Path, error: OSError) -> RunFolderError:
    """Returns the error of a file of the run folder that could not be written."""
    return RunFolderError(f"cannot write {path}: {error.strerror or error}")


def is_held(folder: Path) -> bool:
    """Returns whether a process runs this run folder at the moment."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        _flock(descriptor)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _hold(descriptor: int, folder: Path) -> None:
    try:
        _flock(descriptor)
    except OSError:
        who = os.read(descriptor, 200).decode(errors="replace").strip()
        raise RunFolderError(
            f"the run folder {folder} is in use by another coordinator"
            + (f" ({who})" if who.isprintable() and who else "")
            + (": await close() of the scheduler that has it here" if who.startswith(_here()) else "")
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{_here()}, since {time_now()}".encode())


def _here() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _flock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
