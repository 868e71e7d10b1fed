"""The owner's audit log of a worker: a file of JSON lines, each with the hash of the line before (`planrt.chained`).

The machine hands events in from its compute thread, and the host has them written before it sends what came of them:
nothing leaves that is not in the log. Where a line cannot be written the worker therefore refuses what it was about to
send, until lines can be written again; it logs that once.

No client fills the owner's disk: of what did not leave (`summing.py`) the same is summed up in one line a minute, where
there is too much of it. What left, and what ran, has its own line always; so these are bounded by refusing the user who
has had too many in an hour (`full`).

Lines are in the hands of the operating system then. They outlive the worker's process, and a failure of power can take
the last ones.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock, Timer
from typing import Any, Final

from planrt.chained import FIRST, ChainError, links, sealed, write_whole
from planrt.errors import LocalError, OptionError
from planrt.logs import get_logger
from planrt.workers.serving.audit_parts import SIZE, begun_after, check_goes_on, check_size, numbered, turn
from planrt.workers.serving.summing import MINUTE, Summing

log = get_logger("planrt.worker")

MAX_WAITING: Final = 10_000
"""Events that are kept while they cannot be written; of those beyond it the number is told."""


class AuditError(LocalError):
    """The log cannot be written."""


class AuditFile:
    """The log of the worker named `worker`, at `path`; it is made if it is not there, for its owner only.

    Several workers may share a file: each line says which one wrote it. With more than `size` bytes the next file is
    begun, and the chain goes on there (`audit_parts.py`).

    Raises:
        OptionError: it cannot be read or written, others may, or its chain is broken.
    """

    def __init__(self, path: str | Path, worker: str, size: int = SIZE) -> None:
        if os.name != "posix":
            raise OptionError("audit logs are for systems with POSIX locks")
        self.path, self._most = Path(path), check_size(size)
        self._worker = worker
        self._events: list[dict[str, Any]] = []
        self._dropped = 0
        self._events_lock, self._writing = Lock(), Lock()
        self._summing = Summing()
        self._timer: Timer | None = None
        self._refusing = False
        self._size, self._head, self._lines = 0, FIRST, 0
        try:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
            try:
                about = os.fstat(file)
                if not stat.S_ISREG(about.st_mode):
                    raise OptionError(f"the audit log {self.path} is no regular file")
                if about.st_mode & 0o077:
                    raise OptionError(f"others may read {self.path}, or write to it: chmod 600 {self.path}")
                self._place = about.st_dev, about.st_ino
                with _locked(file):
                    self._head, before = begun_after(self.path)
                    self._follow(file, self.path, before)
            finally:
                os.close(file)
        except OSError as error:
            raise OptionError(f"the audit log {self.path}: {error.strerror or error}") from None
        except ChainError as error:
            raise OptionError(f"{error}; planrt audit {self.path} --check; begin a new file") from None
        self.record({"event": "started"})  # sessions are counted from here on
        try:
            self.write()
        except AuditError as error:
            raise OptionError(f"the audit log {self.path}: {error}") from None

    @property
    def waiting(self) -> bool:
        """True where there are events to write."""
        return bool(self._events)

    def record(self, event: Mapping[str, Any]) -> None:
        """Takes an event, which `write` writes; any thread may call it."""
        with self._events_lock:
            for one in self._summing.take(event, time.monotonic(), _now()):
                self._add(one)
            if self._summing.waits and self._timer is None:
                self._timer = Timer(MINUTE, self._minute_over)
                self._timer.daemon = True
                self._timer.start()

    def full(self, user: str) -> str:
        """Returns why nothing more is done for a user (``""``: nobody) this hour; ``""`` where all is well."""
        return self._summing.full(user)

    def finish(self) -> None:
        """Writes what was summed up so far, as far as it can be written: the worker stops."""
        self._minute_over()

    def _minute_over(self) -> None:
        with self._events_lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
            for one in self._summing.sums(_now()):
                self._add(one)
        try:
            self.write()
        except AuditError:
            return  # it has said so, and keeps the lines

    def _add(self, event: Mapping[str, Any]) -> None:
        if len(self._events) < MAX_WAITING:
            self._events.append({"time": _now(), "worker": self._worker, **event})
        else:
            self._dropped += 1

    def write(self) -> None:
        """Writes the events that were taken, all of them or none; any thread may call it.

        Raises:
            AuditError: they cannot be written, now; they are kept.
        """
        with self._writing:
            with self._events_lock:
                events, dropped = list(self._events), self._dropped
            if not events:
                return
            kept = len(events)
            if dropped:
                events.append({**events[-1], "event": "gap", "lines": dropped})
            try:
                self._append(events)
            except (OSError, ChainError) as error:
                why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
                if not self._refusing:
                    log.error("audit_log_cannot_be_written", worker=self._worker, why=why)
                self._refusing = True
                raise AuditError(
                    "the worker's audit log cannot be written: its owner must look there"
                ) from None
            if self._refusing:
                log.warning("audit_log_is_written_again", worker=self._worker)
            self._refusing = False
            with self._events_lock:
                del self._events[:kept]
                self._dropped -= dropped

    def _append(self, events: list[dict[str, Any]]) -> None:
        while not self._appended(events):
            pass  # the next file was begun, here or by another worker

    def _appended(self, events: list[dict[str, Any]]) -> bool:
        """Writes events, and returns True; or False, where they are for another file than there was."""
        file = os.open(self.path, os.O_RDWR | os.O_APPEND)
        try:
            with _locked(file):
                if not os.path.samestat(os.fstat(file), os.stat(self.path)):
                    return False
                self._catch_up(file)
                head, data = self._head, []
                for event in events:
                    line, head = sealed(event, head)
                    data.append(line)
                whole = b"".join(data)
                if self._lines > 1 and self._size + len(whole) > self._most:
                    turn(self.path, {"time": _now(), "worker": self._worker}, self._head)
                    return False
                write_whole(file, whole)
                self._size, self._head, self._lines = self._size + len(whole), head, self._lines + len(data)
        finally:
            os.close(file)
        return True

    def _catch_up(self, file: int) -> None:
        """Takes note of what others have written since, into this file and those before it.

        Raises:
            ChainError: it is no file that goes on after the one that there was.
        """
        about = os.fstat(file)
        place = about.st_dev, about.st_ino
        if place != self._place:
            full = list(numbered(self.path).values())
            known = [(one.stat().st_dev, one.stat().st_ino) for one in full]
            if self._place not in known:
                raise ChainError("it is another file than before")
            before: Path | None = None
            for one in full[known.index(self._place) :]:
                other = os.open(one, os.O_RDONLY)
                try:
                    self._check_size(other)
                    self._follow(other, one, before)
                finally:
                    os.close(other)
                self._size, self._lines, before = 0, 0, one
            self._place = place
            self._follow(file, self.path, before)
        else:
            self._check_size(file)
            self._follow(file, self.path, None)

    def _check_size(self, file: int) -> None:
        if os.fstat(file).st_size < self._size:
            raise ChainError("lines were cut off")

    def _follow(self, file: int, path: Path, before: Path | None) -> None:
        """Takes note of the lines that were written since, by another worker; the file goes on after `before`."""
        with open(os.dup(file), "rb") as reading:
            if not self._size:
                check_goes_on(path, reading.readline(), before)
            reading.seek(self._size)
            for link in links(reading, str(path), previous=self._head, first=self._lines + 1):
                self._head, self._lines = link.hash, link.number
            self._size = reading.tell()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextmanager
def _locked(file: int) -> Iterator[None]:
    """Keeps other writers away while a batch is written; closing the file ends it as well."""
    import fcntl  # Windows has no such module

    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
