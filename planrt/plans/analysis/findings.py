"""What an analysis gathers on its way through a plan, and the report that it makes of that.

Kept separate from `planrt.plans.analysis.analyse`, because both ways of analysing build on it
(`planrt.plans.analysis.op_by_op`, `planrt.plans.analysis.run_whole`): they differ in how they find out what
an op does, and agree in what is then said of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from planrt.errors import LocalError
from planrt.plans.analysis.flow import Info
from planrt.plans.analysis.report import Dependence, OpReport, Report, Totals, Unforeseen, ValueReport
from planrt.plans.analysis.rows import Trace, keep, lost
from planrt.plans.ir.graph import Graph
from planrt.types import Nested, TensorSpec

COPIES_BY_STRIDES = frozenset(
    f"{home}.{word}"
    for home in ("torch", "Tensor")
    for word in ("reshape", "reshape_as", "contiguous", "flatten", "ravel", "to", "type_as")
)
"""Ops whose result may be their argument's memory or a copy, depending on its strides. Those of a real run
may differ from these, so what is written into such a copy counts as written into the argument."""

Output = tuple[str, TensorSpec | Unforeseen | None, Info]
"""An output of a plan: where it stands, what it is like (None for a constant), and what it depends on."""

_NO_ROWS = lost("a tensor without dimensions")


class AnalysisTimeError(LocalError):
    """The analysis of a plan took longer than it may."""


class Clock:
    """Counts the processor time of this thread, so that a busy machine shortens no analysis.

    Args:
        seconds: of processor time that the analysis may take from now on; None for any.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._end = math.inf if seconds is None else time.thread_time() + seconds

    def check(self) -> None:
        """Raises AnalysisTimeError if the time is over."""
        if time.thread_time() > self._end:
            raise AnalysisTimeError(f"looking at the plan takes more than {self._seconds:g} s")


class Findings:
    """The facts that are known of a plan so far. Each way of analysing derives from it, takes notes, and
    makes the report.

    Attributes:
        graph: the plan. inputs: their specs. clock: when the analysis must be over.
        sources: the specs of inputs and state, in this order. A source's number is its place here.
        ops: what was noted of each op. flops: the sum of theirs.
        unbounded: places of ops whose memory has no known bound.
        unknown: names of kernels that rows could not be followed through.
        written: source -> places of the ops that write to it.
    """

    def __init__(self, graph: Graph, inputs: tuple[TensorSpec, ...], clock: Clock) -> None:
        self.graph = graph
        self.clock = clock
        self.inputs = inputs
        self.sources = [*inputs, *[entry.spec for entry in graph.state]]
        self.input_bytes = sum(bytes_of(one) for one in inputs)
        self.state_bytes = sum(bytes_of(entry.spec) for entry in graph.state)
        self.ops: list[OpReport] = []
        self.unbounded: list[int] = []
        self.unknown: set[str] = set()
        self.flops = 0
        self.written: dict[int, list[int]] = {}

    def note(
        self, index: int, outputs: tuple[TensorSpec | Unforeseen, ...], size: int | None, flops: int | None
    ) -> None:
        """Notes of op `index`, and its results, the bytes it allocates for them and its floating-point
        operations.

        `size` and `flops` are None where they depend on values.
        """
        self.clock.check()
        self.ops.append(OpReport(index, outputs, size, flops, self.graph))
        if size is None:
            self.unbounded.append(index)
        self.flops += flops or 0

    def make(
        self,
        outputs: Sequence[Output],
        sources: Sequence[Info],
        output_bytes: int,
        peak: int,
    ) -> Report:
        """Returns the report, once all ops were noted.

        Args:
            outputs: those of the plan. output_bytes: their size.
            sources: what each source depends on in the end: on more than itself if it was written to.
            peak: the most bytes in use at once, inputs and state aside.
        """
        written = [
            self.value_report(
                self._describe(source)[1], self.sources[source], sources[source], tuple(by), source
            )
            for source, by in sorted(self.written.items())
        ]
        return Report(
            graph=self.graph,
            inputs=self.inputs,
            ops=tuple(self.ops),
            outputs=tuple([self.value_report(path, like, info) for path, like, info in outputs]),
            written=tuple(written),
            totals=Totals(
                self.flops,
                self.input_bytes,
                self.state_bytes,
                output_bytes,
                self.input_bytes + self.state_bytes + peak,
                tuple(self.unbounded),
            ),
            unknown_kernels=tuple(sorted(self.unknown)),
        )

    def value_report(
        self,
        path: str,
        like: TensorSpec | Unforeseen | None,
        info: Info,
        by: tuple[int, ...] = (),
        source: int | None = None,
    ) -> ValueReport:
        """Makes the report on the value at `path`; if it is a source, with its number, and the ops that write
        to it."""
        depends = tuple([self._dependence(one, info.rows.get(one)) for one in _bits(info.sources)])
        return ValueReport(path, like, depends, tuple(_bits(info.ops)), by, source)

    def _dependence(self, source: int, trace: Trace | None) -> Dependence:
        kind, name = self._describe(source)
        if trace is None or not self.sources[source].shape:
            return Dependence(source, kind, name, "used")
        if trace.raw:
            return Dependence(source, kind, name, "raw", 1, tuple(sorted(trace.kinds)), trace.lost)
        return Dependence(source, kind, name, "aggregated", trace.rows, tuple(sorted(trace.kinds)))

    def _describe(self, source: int) -> tuple[Any, str]:
        if source < len(self.inputs):
            return "input", self.graph.input_name(source)
        entry = self.graph.state[source - len(self.inputs)]
        return entry.kind, entry.name


def source_info(source: int, like: TensorSpec, rows: bool) -> Info:
    """Returns what a source depends on before the first op: on itself. `rows` says whether its rows are
    followed."""
    trace = {} if not rows else {source: keep(0, like.shape[0]) if like.shape else _NO_ROWS}
    return Info(1 << source, 0, trace)


def bytes_of(like: TensorSpec) -> int:
    """Returns the bytes that the entries of such a tensor take."""
    return math.prod(like.shape) * like.dtype.itemsize


def paths(outputs: Nested, path: str = "output") -> Iterator[tuple[str, Any]]:
    """Yields every leaf of the outputs with its place, as Python would write it."""
    if isinstance(outputs, tuple | list):
        for index, item in enumerate(outputs):
            yield from paths(item, f"{path}[{index}]")
    elif isinstance(outputs, dict):
        for key, item in outputs.items():
            yield from paths(item, f"{path}[{key!r}]")
    else:
        yield path, outputs


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
