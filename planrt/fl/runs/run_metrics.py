"""What is counted of a run's rounds, and told to whoever watches it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from planrt.metrics import Counter, Family, Health, Histogram, counted, gauge

REASONS: Final = ("lost", "late", "busy", "failed", "refused", "left")
"""The kinds of `planrt.fl.attendance.Missing`."""


class RunMetrics:
    """Counts the rounds of one scheduler: see `planrt.metrics.Watched`.

    Args:
        workers: the ids of all of them. needed: how many must count in a round.
        waiting: returns those that have not answered the round under way, and since when (seconds, as of `time.time`).
        next_round: returns the number of the round that comes next; 0 where the caller numbers them.
        checkpoints: returns how many were written, and when the last one was (0 for never).
    """

    def __init__(
        self,
        workers: Sequence[str],
        needed: int,
        *,
        waiting: Callable[[], Mapping[str, float]],
        next_round: Callable[[], int],
        checkpoints: Callable[[], tuple[int, float]],
    ) -> None:
        self._workers, self._needed = list(workers), needed
        self._waiting, self._next_round, self._checkpoints = waiting, next_round, checkpoints
        self._rounds = Counter("planrt_rounds", "Rounds.", "outcome", ("completed", "failed"))
        self._seconds = Histogram("planrt_round_seconds", "Seconds of completed rounds, without evaluation.")
        self._bytes = Counter(
            "planrt_round_bytes",
            "Bytes to and from the workers in completed rounds.",
            "direction",
            ("in", "out"),
        )
        self._missing = {
            id: Counter("planrt_missing_workers", "Workers that did not count in a round.", "reason", REASONS)
            for id in self._workers
        }
        self._last, self._loss = 0, float("nan")
        self._failed = ""

    def completed(
        self,
        number: int,
        seconds: float,
        loss: float,
        traffic: Iterable[tuple[int, int]],
        missing: Mapping[str, str],
    ) -> None:
        """Counts a round that was completed: `traffic` is (bytes sent, bytes received) of each worker that counted,
        and `missing` the kind of reason for each that did not."""
        self._rounds.add("completed")
        self._seconds.add(seconds)
        for sent, received in traffic:
            self._bytes.add("out", sent)
            self._bytes.add("in", received)
        self._note(missing)
        self._last, self._loss, self._failed = number, loss, ""

    def failed(self, why: str, missing: Mapping[str, str]) -> None:
        """Counts a round that failed, in a word why; `missing` as of `completed`."""
        self._rounds.add("failed")
        self._note(missing)
        self._failed = why

    def _note(self, missing: Mapping[str, str]) -> None:
        for id, reason in missing.items():
            if id in self._missing:
                self._missing[id].add(reason)

    def metrics(self) -> Iterable[Family]:
        """See `planrt.metrics.Watched`."""
        yield self._rounds.family()
        yield self._seconds.family()
        yield self._bytes.family()
        for id, counter in self._missing.items():
            yield counter.family().of("worker", id)
        now, waiting = time.time(), self._waiting()
        yield Family(
            "planrt_waiting_seconds",
            "gauge",
            "Seconds for which a round has waited for a worker; 0 while it does not.",
            ("worker",),
            {(id,): max(0.0, now - waiting[id]) if id in waiting else 0.0 for id in self._workers},
        )
        yield gauge("planrt_run_workers", "Workers of the run.", len(self._workers))
        yield gauge("planrt_run_workers_needed", "Workers that must count in a round.", self._needed)
        yield gauge("planrt_last_round", "The number of the round that was completed last.", self._last)
        yield gauge("planrt_last_loss", "The mean loss of that round.", self._loss)
        written, at = self._checkpoints()
        yield counted("planrt_checkpoints", "Checkpoints written.", written)
        yield gauge("planrt_last_checkpoint_time_seconds", "When the last one was, in Unix time.", at)

    def health(self) -> Health:
        """See `planrt.metrics.Watched`: a run whose last round failed is not well."""
        waiting = self._waiting()
        facts: dict[str, Any] = {
            "round": self._last,
            "next_round": self._next_round(),
            "waiting": {id: round(time.time() - since, 3) for id, since in waiting.items()},
        }
        if self._failed:
            facts["failed"] = self._failed
        return Health(not self._failed, "last round failed" if self._failed else "running", facts)


class WatchedJob:
    """A job as monitoring sees it, before it has a scheduler too."""

    def __init__(self) -> None:
        self.run: RunMetrics | None = None
        self._stopping = False

    def stop(self) -> None:
        """Notes that the job ends."""
        self._stopping = True

    def metrics(self) -> Iterable[Family]:
        """See `planrt.metrics.Watched`."""
        yield gauge("planrt_run_up", "Whether the run goes on.", self.health().ok)
        if self.run is not None:
            yield from self.run.metrics()

    def health(self) -> Health:
        """See `planrt.metrics.Watched`."""
        if self._stopping:
            return Health(False, "stopping")
        return Health(True, "starting") if self.run is None else self.run.health()
