"""What a worker's host counts, and what is told of the worker to whoever watches it."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable
from typing import Final

import planrt.errors as errors
from planrt.errors import PlanrtError
from planrt.metrics import Counter, Family, Health, counted, gauge
from planrt.workers.machine.store import Overview
from planrt.workers.transport.pipes import Traffic
from planrt.workers.wire import messages as m
from planrt.workers.wire.refusals import RAISED

REFUSALS: Final = frozenset(RAISED) | {"HandshakeError", "AuditError"}
"""Kinds of failures with which a worker says no; all others are failures of what was asked for."""

_FAILURES: Final = frozenset(
    name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, PlanrtError)
)
_BAD: Final = ("WireError", "MessageTooLargeError", "HandshakeError")


class HostCounts:
    """Counts what happens at a host. `opened` and `closed` once a connection, `told` once an answer; nothing else."""

    def __init__(self) -> None:
        self.connections = 0
        self._open: list[Traffic] = []
        self._closed = Traffic()
        self._answers: Tally[type[m.Message]] = Tally()
        self.refusals = Counter(
            "planrt_worker_refusals", "Requests that the worker refused.", "kind", REFUSALS
        )
        self.failures = Counter("planrt_worker_failures", "Requests that failed.", "kind", _FAILURES)
        self.bad_messages = Counter(
            "planrt_worker_bad_messages",
            "Connections that ended as what arrived was no message.",
            "kind",
            _BAD,
        )

    def opened(self, traffic: Traffic) -> None:
        """Notes a connection, whose pipe counts its `traffic`."""
        self.connections += 1
        self._open.append(traffic)

    def closed(self, traffic: Traffic) -> None:
        """Notes that a connection has ended."""
        self._open = [one for one in self._open if one is not traffic]
        self._closed = _sum([self._closed, traffic])

    def told(self, body: m.Body) -> None:
        """Notes an answer to a client."""
        self._answers[type(body)] += 1
        if isinstance(body, m.Failure):
            (self.refusals if body.kind in REFUSALS else self.failures).add(body.kind)

    @property
    def open(self) -> int:
        """The number of connections that there are."""
        return len(self._open)

    @property
    def traffic(self) -> Traffic:
        """The messages and bytes of all connections so far."""
        return _sum([self._closed, *self._open])

    def families(self) -> Iterable[Family]:
        """Returns the figures."""
        traffic = self.traffic
        yield counted("planrt_worker_connections", "Connections so far.", self.connections)
        yield gauge("planrt_worker_connections_open", "Connections that there are.", self.open)
        for what, sent, received in (
            ("bytes", traffic.bytes_sent, traffic.bytes_received),
            ("messages", traffic.messages_sent, traffic.messages_received),
        ):
            yield Family(
                f"planrt_worker_{what}",
                "counter",
                f"{what.capitalize()} to and from clients.",
                ("direction",),
                {("out",): float(sent), ("in",): float(received)},
            )
        yield Family(
            "planrt_worker_answers",
            "counter",
            "Answers to clients, by the kind of message.",
            ("kind",),
            {(_tag(kind),): float(count) for kind, count in list(self._answers.items())},
        )
        yield self.refusals.family()
        yield self.failures.family()
        yield self.bad_messages.family()


def _tag(kind: type[m.Message]) -> str:
    return str(kind.__struct_config__.tag)


def _sum(all: Iterable[Traffic]) -> Traffic:
    found = Traffic()
    for one in all:
        found.messages_sent += one.messages_sent
        found.messages_received += one.messages_received
        found.bytes_sent += one.bytes_sent
        found.bytes_received += one.bytes_received
    return found


class WatchedWorker:
    """A worker, as its owner's monitoring sees it: figures of all of its clients together, and no names.

    Args:
        id: the worker's.
        overview: what it holds.
        counts: what its host counted.
        busy: whether it computes. trouble: why it does not serve, in a word; ``""`` while it does.
    """

    def __init__(
        self,
        id: str,
        overview: Overview,
        counts: HostCounts,
        *,
        busy: Callable[[], bool],
        trouble: Callable[[], str],
    ) -> None:
        self._id, self._overview, self._counts = id, overview, counts
        self._busy, self._trouble = busy, trouble
        self.certificate_until: float | None = None
        """When the certificate that it serves with expires (seconds, as of `time.time`); None without one."""

    def metrics(self) -> Iterable[Family]:
        """See `planrt.metrics.Watched`."""
        held = self._overview.held()
        yield from (
            one.of("worker", self._id) for one in self._families(held.sessions, held.objects, held.bytes)
        )

    def _families(self, sessions: int, objects: int, nbytes: int) -> Iterable[Family]:
        yield gauge("planrt_worker_up", "Whether the worker serves.", not self._why_unwell())
        yield gauge("planrt_worker_start_time_seconds", "When it began, in Unix time.", self._overview.since)
        yield gauge("planrt_worker_computing", "Whether it computes at the moment.", self._busy())
        yield gauge(
            "planrt_worker_waiting_requests", "Requests that wait for others.", self._overview.waiting()
        )
        yield gauge(
            "planrt_worker_sessions", "Sessions, those included whose clients may come back.", sessions
        )
        yield gauge("planrt_worker_objects", "Objects that it holds.", objects)
        yield gauge("planrt_worker_object_bytes", "Bytes of these objects.", nbytes)
        if self.certificate_until is not None:
            yield gauge(
                "planrt_worker_certificate_expiry_time_seconds",
                "When its certificate expires, in Unix time.",
                self.certificate_until,
            )
        yield from self._counts.families()

    def _why_unwell(self) -> str:
        expired = self.certificate_until is not None and self.certificate_until < time.time()
        return self._trouble() or ("certificate expired" if expired else "")

    def health(self) -> Health:
        """See `planrt.metrics.Watched`."""
        trouble, held = self._why_unwell(), self._overview.held()
        until = {} if self.certificate_until is None else {"certificate_until": self.certificate_until}
        return Health(
            not trouble,
            trouble or "serving",
            until
            | {
                "worker": self._id,
                "since": self._overview.since,
                "seconds": round(time.time() - self._overview.since, 3),
                "sessions": held.sessions,
                "objects": held.objects,
                "bytes": held.bytes,
                "computing": self._busy(),
                "waiting": self._overview.waiting(),
            },
        )
