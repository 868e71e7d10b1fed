"""What a worker's host counts, and what is told of the worker to whoever watches it."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Protocol, get_args

import msgspec

import planrt.errors as errors
from planrt.errors import PlanrtError
from planrt.metrics import OTHER, Counter, Distribution, Family, Health, counted, gauge
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

_MOST: Final = 1 << 53
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The figures of one process of a worker, as it tells them to the worker's own one. Counts only go up."""

    bytes_sent: _Count = 0
    bytes_received: _Count = 0
    messages_sent: _Count = 0
    messages_received: _Count = 0
    answers: dict[str, _Count] = {}
    refusals: dict[str, _Count] = {}
    failures: dict[str, _Count] = {}
    bad_messages: dict[str, _Count] = {}
    sessions: _Count = 0
    objects: _Count = 0
    bytes: _Count = 0
    waiting: _Count = 0

    @classmethod
    def told(cls, said: object, before: Figures) -> Figures:
        """Returns what a process says, which may have been taken over by a client; `before` is what it said last.

        Raises:
            ValueError: these are no figures, or they have a name that there is none of, or a count went down.
        """
        new = msgspec.convert(said, cls)
        for name in cls.__struct_fields__[:-_PASSING]:
            now, then = getattr(new, name), getattr(before, name)
            known = _NAMES.get(name)
            if known is not None and not known.issuperset(now):
                raise ValueError(f"{name} with a name that there is none of")
            if (now < then) if known is None else any(now.get(one, 0) < count for one, count in then.items()):
                raise ValueError(f"{name} went down")
        return new

    def counts(self) -> Iterator[tuple[int, int]]:
        """Yields the counts that are not 0, each with its place (below `PLACES`): as memory has them that outlives a
        process."""
        for name in self.__struct_fields__[:-_PASSING]:
            value = getattr(self, name)
            for key, count in value.items() if isinstance(value, dict) else [("", value)]:
                if count:
                    yield _PLACES[name, key], count

    def with_counts(self, found: Sequence[int]) -> Figures:
        """Returns these figures with the counts at their places, as that memory has them: a client may have taken the
        process over, so none goes down, and what is no count is left out."""
        new: dict[str, Any] = {}
        for (name, key), place in _PLACES.items():
            value = getattr(self, name)
            before = value.get(key, 0) if isinstance(value, dict) else value
            count = max(before, found[place] if found[place] < _MOST else 0)
            if not count:
                continue
            if isinstance(value, dict):
                new.setdefault(name, {})[key] = count
            else:
                new[name] = count
        return msgspec.structs.replace(self, **new)

    def ended(self) -> Figures:
        """Returns what is left of the figures of a process that has ended: its counts."""
        return msgspec.structs.replace(self, sessions=0, objects=0, bytes=0, waiting=0)


_PASSING: Final = 4
"""How many of the fields, the last ones, are no counts."""
_NAMES: Final = {
    "answers": {str(one.__struct_config__.tag) for one in get_args(m.Body)},
    "refusals": {*REFUSALS, OTHER},
    "failures": {*_FAILURES, OTHER},
    "bad_messages": {*_BAD, OTHER},
}


_PLACES: Final = {
    place: number
    for number, place in enumerate(
        (name, key)
        for name in Figures.__struct_fields__[:-_PASSING]
        for key in (sorted(_NAMES[name]) if name in _NAMES else [""])
    )
}
"""(count, name) -> its place."""
PLACES: Final = len(_PLACES)


def added_up(all: Iterable[Figures]) -> Figures:
    """Returns the sum of figures."""
    everything = list(all)

    def total(name: str) -> object:
        values = [getattr(one, name) for one in everything]
        if name not in _NAMES:
            return sum(values)
        found: Tally[str] = Tally()
        for one in values:
            found.update(one)
        return dict(found)

    return msgspec.convert({name: total(name) for name in Figures.__struct_fields__}, Figures)


class Elsewhere(Protocol):
    """Other processes that do a worker's work. May be asked from any thread."""

    def figures(self) -> Figures:
        """Returns the sum of what they have counted, those included that have ended, and of what they hold."""

    def families(self) -> Iterable[Family]:
        """Returns the figures that are about these processes themselves."""

    def number(self) -> int:
        """Returns how many there are."""

    def computing(self) -> bool:
        """Returns whether one of them computes."""


class HostCounts:
    """Counts what happens at a host. `opened` and `closed` once a connection, `told` once an answer; nothing else."""

    def __init__(self) -> None:
        self.told_first: Callable[[], None] = lambda: None
        """Called once an answer has been counted, and before it leaves."""
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
        self.told_first()

    @property
    def open(self) -> int:
        """The number of connections that there are."""
        return len(self._open)

    @property
    def traffic(self) -> Traffic:
        """The messages and bytes of all connections so far."""
        return _sum([self._closed, *self._open])

    def figures(self) -> Figures:
        """Returns the counts as another process is told them."""
        traffic = self.traffic
        return Figures(
            traffic.bytes_sent,
            traffic.bytes_received,
            traffic.messages_sent,
            traffic.messages_received,
            {_tag(kind): count for kind, count in list(self._answers.items())},
            self.refusals.counts(),
            self.failures.counts(),
            self.bad_messages.counts(),
        )

    def families(self, elsewhere: Figures | None = None) -> Iterable[Family]:
        """Returns the figures, and in them those of other processes that do this one's work."""
        all = self.figures() if elsewhere is None else added_up([self.figures(), elsewhere])
        yield counted("planrt_worker_connections", "Connections so far.", self.connections)
        yield gauge("planrt_worker_connections_open", "Connections that there are.", self.open)
        for what, sent, received in (
            ("bytes", all.bytes_sent, all.bytes_received),
            ("messages", all.messages_sent, all.messages_received),
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
            _samples(all.answers),
        )
        for counter, counts in (
            (self.refusals, all.refusals),
            (self.failures, all.failures),
            (self.bad_messages, all.bad_messages),
        ):
            yield Family(counter.name, "counter", counter.help, ("kind",), _samples(counts))


def _samples(counts: Mapping[str, int]) -> dict[tuple[str, ...], float | Distribution]:
    return {(kind,): float(count) for kind, count in counts.items()}


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
        elsewhere: other processes that do its work.
    """

    def __init__(
        self,
        id: str,
        overview: Overview,
        counts: HostCounts,
        *,
        busy: Callable[[], bool],
        trouble: Callable[[], str],
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._id, self._overview, self._counts = id, overview, counts
        self._busy, self._trouble, self._elsewhere = busy, trouble, elsewhere
        self.certificate_until: float | None = None
        """When the certificate that it serves with expires (seconds, as of `time.time`); None without one."""

    def metrics(self) -> Iterable[Family]:
        """See `planrt.metrics.Watched`."""
        yield from (one.of("worker", self._id) for one in self._families(*self._now()))

    def _now(self) -> tuple[Figures, Figures | None]:
        """What the worker holds now, in all of its processes; and what others than this one count and hold."""
        held = self._overview.held()
        own = Figures(
            sessions=held.sessions, objects=held.objects, bytes=held.bytes, waiting=self._overview.waiting()
        )
        if self._elsewhere is None:
            return own, None
        others = self._elsewhere.figures()
        return added_up([own, others]), others

    def _computes(self) -> bool:
        return self._busy() or (self._elsewhere is not None and self._elsewhere.computing())

    def _families(self, holds: Figures, others: Figures | None) -> Iterable[Family]:
        yield gauge("planrt_worker_up", "Whether the worker serves.", not self._why_unwell())
        yield gauge("planrt_worker_start_time_seconds", "When it began, in Unix time.", self._overview.since)
        yield gauge("planrt_worker_computing", "Whether it computes at the moment.", self._computes())
        yield gauge("planrt_worker_waiting_requests", "Requests that wait for others.", holds.waiting)
        yield gauge(
            "planrt_worker_sessions", "Sessions, those included whose clients may come back.", holds.sessions
        )
        yield gauge("planrt_worker_objects", "Objects that it holds.", holds.objects)
        yield gauge("planrt_worker_object_bytes", "Bytes of these objects.", holds.bytes)
        if self._elsewhere is not None:
            yield from self._elsewhere.families()
        if self.certificate_until is not None:
            yield gauge(
                "planrt_worker_certificate_expiry_time_seconds",
                "When its certificate expires, in Unix time.",
                self.certificate_until,
            )
        yield from self._counts.families(others)

    def _why_unwell(self) -> str:
        expired = self.certificate_until is not None and self.certificate_until < time.time()
        return self._trouble() or ("certificate expired" if expired else "")

    def health(self) -> Health:
        """See `planrt.metrics.Watched`."""
        trouble, (holds, _) = self._why_unwell(), self._now()
        until: dict[str, object] = {}
        if self.certificate_until is not None:
            until["certificate_until"] = self.certificate_until
        if self._elsewhere is not None:
            until["processes"] = self._elsewhere.number()
        return Health(
            not trouble,
            trouble or "serving",
            until
            | {
                "worker": self._id,
                "since": self._overview.since,
                "seconds": round(time.time() - self._overview.since, 3),
                "sessions": holds.sessions,
                "objects": holds.objects,
                "bytes": holds.bytes,
                "computing": self._computes(),
                "waiting": holds.waiting,
            },
        )
