"""Samples, rows and goals; interleaved timing; memory.

Whatever is compared is measured in turns within one run, because a machine's speed drifts: its load, its clock
and its neighbours then hit both sides alike. A ratio is the median over the turns of (ours / floor in that turn).
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PAUSE = 0.02
"""Seconds between two measurements, in which OpenMP threads of the last one stop spinning."""


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Their median."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Half of the measurements lie between these two."""
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third

    def map(self, function: Callable[[float], float]) -> Sample:
        """The sample of ``function(value)``."""
        return Sample(tuple(function(value) for value in self.values))

    def over(self, other: Sample) -> Sample:
        """Ours over theirs, turn by turn; over the other's only value if it has one."""
        theirs = other.values * len(self.values) if len(other.values) == 1 else other.values
        return Sample(tuple(one / two for one, two in zip(self.values, theirs, strict=True)))

    def as_json(self) -> dict[str, Any]:
        """Median, quartiles and every value."""
        return {"median": self.median, "quartiles": list(self.quartiles), "values": list(self.values)}


@dataclass(frozen=True)
class Goal:
    """A bound for the row's ratio, or with `absolute` for its own figure."""

    at_most: float | None = None
    at_least: float | None = None
    absolute: bool = False

    def met_by(self, row: Row) -> bool:
        """Whether the median keeps the bound."""
        sample = row.ours if self.absolute else row.ratio
        if sample is None:
            raise ValueError(f"row {row.name!r} has a goal for its ratio but no floor")
        return (self.at_most is None or sample.median <= self.at_most) and (
            self.at_least is None or sample.median >= self.at_least
        )

    def text(self, unit: str) -> str:
        """As the table shows it."""
        bound = f"<= {self.at_most:.4g}" if self.at_most is not None else f">= {self.at_least:.4g}"
        return f"{bound} {unit}" if self.absolute else f"{bound} x"


@dataclass(frozen=True)
class Row:
    """One claim: our figure, the floor's, and the goal. Rows without a goal are there for comparison."""

    name: str
    unit: str
    ours: Sample
    floor: Sample | None = None
    floor_name: str = ""
    goal: Goal | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> Sample | None:
        """Ours over the floor."""
        return self.ours.over(self.floor) if self.floor is not None else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        return self.goal.met_by(self) if self.goal else None

    def as_json(self) -> dict[str, Any]:
        """All there is to know, for the results file."""
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": self.ours.as_json(),
            "floor": self.floor.as_json() if self.floor else None,
            "floor_name": self.floor_name,
            "ratio": self.ratio.as_json() if self.ratio else None,
            "goal": self.goal.text(self.unit) if self.goal else None,
            "met": self.met,
            "note": self.note,
            "details": dict(self.details),
        }


def table(rows: Sequence[Row]) -> str:
    """The rows as text: medians, quartiles in brackets."""
    lines = [("", "ours", "floor", "ratio", "goal", "")]
    for row in rows:
        lines.append(
            (
                row.name,
                f"{_figure(row.ours)} {row.unit}",
                f"{_figure(row.floor)} {row.unit}, {row.floor_name}" if row.floor else "",
                f"{_figure(row.ratio)}" if row.ratio else "",
                row.goal.text(row.unit) if row.goal else "",
                {True: "met", False: "MISSED", None: ""}[row.met],
            )
        )
        if row.note:
            lines.append((f"  {row.note}", "", "", "", "", ""))
    widths = [max(len(line[column]) for line in lines if any(line[1:])) for column in range(6)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _figure(sample: Sample) -> str:
    low, high = sample.quartiles
    median = _short(sample.median)
    return median if _short(low) == _short(high) else f"{median} ({_short(low)}-{_short(high)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def in_turns(
    candidates: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 2, lead: int = 0
) -> dict[str, Sample]:
    """Seconds of each candidate, called in turns `repeats` times, each time in another order.

    `warmup` calls of each come first and do not count. Neither do `lead` calls right before each one that does: then it
    is as in a loop. After a pause of `PAUSE` seconds a processor takes two or three times as long for the first few
    tenths of a millisecond of work, in each process.
    """
    names = list(candidates)
    for name in names:
        for _ in range(warmup):
            candidates[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            time.sleep(PAUSE)
            for _ in range(lead):
                candidates[name]()
            began = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - began)
    return {name: Sample(tuple(values)) for name, values in seconds.items()}


def resident_bytes(pid: int | None = None) -> int:
    """Resident memory of a process, this one by default, without pages of files (which the system takes back).

    Anonymous shared mappings, which `mmap.mmap(-1, n)` makes, count: they are memory like any other.
    """
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.exists():
        lines = (line.split() for line in status.read_text().splitlines())
        return sum(int(line[1]) * 1024 for line in lines if line and line[0] in ("RssAnon:", "RssShmem:"))
    import psutil  # type: ignore[import-untyped]

    return int(psutil.Process(pid).memory_info().rss)


def peak_resident_bytes(pid: int) -> int:
    """The most that a process has had in memory since it began, pages of files included; Linux alone tells it."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return next(int(line[1]) * 1024 for line in lines if line and line[0] == "VmHWM:")


class PeakMemory:
    """Samples `resident_bytes` in a thread while its `with` block runs; `bytes` is the highest seen."""

    def __init__(self, *, interval: float = 0.002, pid: int | None = None) -> None:
        self._pid = pid
        self.bytes = resident_bytes(pid)
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self.bytes = max(self.bytes, resident_bytes(self._pid))
