"""Figures for whoever watches a process: counters as plain objects, which are read when somebody asks. No I/O.

What is watched has the methods of `Watched`. `planrt.workers.serving.metrics_end` shows it to Prometheus; without that
nothing reads these, and they need no package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

OTHER: Final = "other"
"""The value of a label for everything that is not among its known values: so there are never more of them."""

SECONDS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0)
"""The upper bounds of a histogram of rounds, in seconds."""

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Distribution:
    """The values that a histogram was told: `counts` for each of `bounds` (those up to it) and of all, their sum."""

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its samples by the values of its `labels`. Names of counters are without ``_total``."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Labels = ()
    samples: Mapping[Labels, float | Distribution] = field(default_factory=dict)

    def of(self, label: str, value: str) -> Family:
        """Returns the same metric with one label more, which has that value in every sample."""
        samples = {(value, *labels): sample for labels, sample in self.samples.items()}
        return Family(self.name, self.kind, self.help, (label, *self.labels), samples)


@dataclass(frozen=True, slots=True)
class Health:
    """The health of what is watched: whether it does what it is there for, in a word, and plain facts of it."""

    ok: bool
    status: str
    facts: Mapping[str, object] = field(default_factory=dict)


class Watched(Protocol):
    """Something that can be watched. Both methods are called from any thread, at any time."""

    def metrics(self) -> Iterable[Family]:
        """Returns the figures of this moment."""

    def health(self) -> Health:
        """Returns whether it works."""


class Counter:
    """A number that goes up, one for each of the known values of a label; see `OTHER`."""

    def __init__(self, name: str, help: str, label: str = "", known: Iterable[str] = ()) -> None:
        self.name, self.help, self.label = name, help, label
        self._known = frozenset(known)
        self._counts: dict[str, float] = dict.fromkeys(sorted(self._known), 0.0) if label else {"": 0.0}

    def add(self, value: str = "", amount: float = 1) -> None:
        """Counts `amount` more."""
        value = value if not self.label or value in self._known else OTHER
        self._counts[value] = self._counts.get(value, 0.0) + amount

    def counts(self) -> dict[str, int]:
        """Returns value of the label -> how often, of a counter that counts by ones."""
        return {value: int(count) for value, count in list(self._counts.items())}

    def family(self) -> Family:
        """Returns the counts."""
        counts = list(self._counts.items())
        samples: dict[Labels, float | Distribution] = {
            (value,) if self.label else (): count for value, count in counts
        }
        return Family(self.name, "counter", self.help, (self.label,) if self.label else (), samples)


class Histogram:
    """The distribution of values that it is told."""

    def __init__(self, name: str, help: str, bounds: Sequence[float] = SECONDS) -> None:
        self.name, self.help = name, help
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Takes one value."""
        self._total += value
        for place, bound in enumerate(self._bounds):
            if value <= bound:
                self._counts[place] += 1
        self._counts[-1] += 1

    def family(self) -> Family:
        """Returns the distribution."""
        told = Distribution(self._bounds, tuple(self._counts), self._total)
        return Family(self.name, "histogram", self.help, (), {(): told})


def gauge(name: str, help: str, value: float) -> Family:
    """Returns a metric of one number that goes up and down."""
    return Family(name, "gauge", help, (), {(): float(value)})


def counted(name: str, help: str, value: float) -> Family:
    """Returns a metric of one number that only goes up."""
    return Family(name, "counter", help, (), {(): float(value)})


def merged(families: Iterable[Family]) -> list[Family]:
    """Returns each metric once, in the order in which they come first, with the samples of all of its name."""
    found: dict[str, Family] = {}
    for one in families:
        before = found.get(one.name)
        samples = dict(one.samples) if before is None else {**before.samples, **one.samples}
        found[one.name] = Family(one.name, one.kind, one.help, one.labels, samples)
    return list(found.values())
