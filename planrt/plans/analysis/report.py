"""What is known of a plan before it runs: the data, and the page that a data owner reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from planrt.cards import card
from planrt.errors import PolicyError
from planrt.plans.ir.constants import Constant, approval_hash, known_constants
from planrt.plans.ir.graph import Graph
from planrt.shown import shown
from planrt.types import TensorSpec

How = Literal["raw", "aggregated", "used"]


@dataclass(frozen=True, slots=True)
class Unforeseen:
    """A tensor whose size depends on values. `at_most` bytes where a bound is known."""

    at_most: int | None = None

    def __str__(self) -> str:
        bound = f", at most {count_bytes(self.at_most)}" if self.at_most is not None else ""
        return f"size depends on values{bound}"


@dataclass(frozen=True, slots=True)
class Dependence:
    """That a value depends on an input or a state entry, and how.

    `how`: "raw" (single rows may show), "aggregated" (everything went through aggregates over at least `rows`
    rows), or "used" for what has no rows: state, and inputs without dimensions. `aggregates` names the kinds
    it went through. `lost`: the kernel through which rows could not be followed, and its op's place (-1: not
    one op's).
    """

    source: int
    kind: Literal["input", "parameter", "buffer", "constant"]
    name: str
    how: How
    rows: int | None = None
    aggregates: tuple[str, ...] = ()
    lost: tuple[str, int] | None = None

    def __str__(self) -> str:
        if self.how == "used":
            return f"{self.name}: used"
        if self.how == "raw":
            why = ""
            if self.lost:
                place = f" in op {self.lost[1]}" if self.lost[1] >= 0 else ""
                why = f" (its rows cannot be followed through {self.lost[0].strip('_')}{place})"
            return f"{self.name}: raw{why}"
        return f"{self.name}: aggregated over {_count(self.rows or 0, 'row')} ({', '.join(self.aggregates)})"


@dataclass(frozen=True, slots=True)
class OpReport:
    """One op: what it returns, the bytes it allocates for that (0 for views) and its floating-point
    operations.

    None where that depends on values. `line` is the op as a plan prints it, `source` the file and line it was
    traced at, where known.
    """

    index: int
    outputs: tuple[TensorSpec | Unforeseen, ...]
    bytes: int | None
    flops: int | None
    graph: Graph = field(repr=False)

    @property
    def name(self) -> str:
        """The op's name in the table."""
        return self.graph.ops[self.index].name

    @property
    def line(self) -> str:
        """The op as the plan prints it."""
        return str(self.graph.ops[self.index])

    @property
    def source(self) -> str | None:
        """``file:line`` of the user's code, where the plan still knows it."""
        lines = self.graph.lines
        return lines[self.index] if self.index < len(lines) else None


@dataclass(frozen=True, slots=True)
class ValueReport:
    """Something that leaves a plan: an output, or an input or state entry that it changed in place.

    `path` says which (``output['loss']``), `ops` are the places of the ops on the way to it, `written_by`
    those that changed it. `spec` is None for a number, which depends on sizes alone. `source` is the value's
    number where it is an input or state.
    """

    path: str
    spec: TensorSpec | Unforeseen | None
    depends: tuple[Dependence, ...]
    ops: tuple[int, ...]
    written_by: tuple[int, ...] = ()
    source: int | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """Of the whole plan. Where sizes depend on values, bounds stand for them; `unbounded` are the ops without
    one, and then the totals say at least so much.

    `peak_bytes`: inputs and state, which their owner holds throughout, and the most that the interpreter
    needs beside them, each value freed after its last use and each op's own intermediate results included.
    What a kernel uses inside (workspaces) is not seen.
    """

    flops: int
    input_bytes: int
    state_bytes: int
    output_bytes: int
    peak_bytes: int
    unbounded: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule of a policy that a plan breaks: at an op (its place, name and line), or as a whole."""

    rule: str
    message: str
    op_index: int | None = None
    op: str | None = None
    line: str | None = None

    def __str__(self) -> str:
        where = f"op {self.op_index}, {self.line}: " if self.op_index is not None else ""
        return f"[{self.rule}] {where}{self.message}"


@dataclass(frozen=True, repr=False)
class Report:
    """The findings of `planrt.plans.analysis.analyse`, and the policy's `violations`, if the plan was held
    against one.

    `gradients` are those that a training loop gets of the plan's parameters, where it was analysed for
    training. `constants` are those of the plan, None where their values are not known.
    """

    graph: Graph
    inputs: tuple[TensorSpec, ...]
    ops: tuple[OpReport, ...]
    outputs: tuple[ValueReport, ...]
    written: tuple[ValueReport, ...]
    totals: Totals
    unknown_kernels: tuple[str, ...] = ()
    gradients: tuple[ValueReport, ...] = ()
    violations: tuple[Violation, ...] = ()
    policy_version: str | None = None
    tags: dict[int, tuple[str, ...]] = field(default_factory=dict)
    constants: tuple[Constant, ...] | None = None

    @property
    def filed(self) -> str | None:
        """The hash that decisions about the plan are filed under; None where its constants are not known."""
        constants = known_constants(self.graph) if self.constants is None else self.constants
        return None if constants is None else approval_hash(self.graph, constants)

    @property
    def ok(self) -> bool:
        """Tells whether nothing was violated."""
        return not self.violations

    @property
    def exact(self) -> bool:
        """Tells whether all sizes are known or bounded."""
        return not self.totals.unbounded

    def raise_for_violations(self) -> Report:
        """Return self, or raise the first violation.

        Raises:
            PolicyError: names op, line and rule, and says how many violations there are.
        """
        if not self.violations:
            return self
        first, more = self.violations[0], len(self.violations) - 1
        rest = f" (and {_count(more, 'more violation')})" if more else ""
        raise PolicyError(
            f"plan {self.graph.name!r} breaks the policy: {first}{rest}",
            op=first.op,
            index=first.op_index,
            line=first.line,
            rule=first.rule,
        )

    def with_violations(
        self, violations: Sequence[Violation], version: str | None, tags: dict[int, tuple[str, ...]]
    ) -> Report:
        """Returns a copy with what a policy (by its version, None for none) says, and the tags of inputs."""
        return replace(self, violations=tuple(violations), policy_version=version, tags=tags)

    def with_constants(self, constants: Sequence[Constant] | None) -> Report:
        """Returns a copy that knows the plan's constants."""
        return replace(self, constants=None if constants is None else tuple(constants))

    def __str__(self) -> str:
        return "\n".join(_page(self))

    def __repr__(self) -> str:
        verdict = ""
        if self.policy_version is not None:
            verdict = f", keeps policy {self.policy_version}"
            if not self.ok:
                verdict = (
                    f", breaks policy {self.policy_version}: {_count(len(self.violations), 'violation')}"
                )
        inside = f"{_count(len(self.ops), 'op')}{verdict}"
        return f"<Report of plan {shown(self.graph.name)}: {inside}; print() shows the page>"

    def _repr_html_(self) -> str:
        return card(f"Report of plan {self.graph.name}", text=str(self))

    def as_json(self) -> dict[str, Any]:
        """Returns everything in values that JSON has."""
        return {
            "plan": {
                "name": self.graph.name,
                "hash": self.graph.hash,
                "filed": self.filed,
                "ops": len(self.graph.ops),
            },
            "policy": self.policy_version,
            "ok": self.ok,
            "violations": [
                {
                    "rule": one.rule,
                    "message": one.message,
                    "op_index": one.op_index,
                    "op": one.op,
                    "line": one.line,
                }
                for one in self.violations
            ],
            "inputs": [
                {
                    "name": self.graph.input_name(index),
                    "spec": str(spec),
                    "tags": list(self.tags.get(index, ())),
                }
                for index, spec in enumerate(self.inputs)
            ],
            "state": [
                {"name": one.name, "kind": one.kind, "spec": str(one.spec)} for one in self.graph.state
            ],
            "constants": [
                {"name": name, "sha256": one.digest, "values": one.listed()}
                for name, one in _named_constants(self)
            ],
            "ops": [
                {
                    "index": one.index,
                    "name": one.name,
                    "line": one.line,
                    "source": one.source,
                    "outputs": [str(spec) for spec in one.outputs],
                    "bytes": one.bytes,
                    "flops": one.flops,
                }
                for one in self.ops
            ],
            "outputs": [_value_json(one) for one in self.outputs],
            "written": [_value_json(one) for one in self.written],
            "gradients": [_value_json(one) for one in self.gradients],
            "totals": {
                "flops": self.totals.flops,
                "input_bytes": self.totals.input_bytes,
                "state_bytes": self.totals.state_bytes,
                "output_bytes": self.totals.output_bytes,
                "peak_bytes": self.totals.peak_bytes,
                "exact": self.exact,
            },
        }


def _value_json(value: ValueReport) -> dict[str, Any]:
    return {
        "path": value.path,
        "spec": str(value.spec) if value.spec is not None else "number",
        "depends": [
            {
                "name": one.name,
                "kind": one.kind,
                "how": one.how,
                "rows": one.rows,
                "aggregates": list(one.aggregates),
                "lost_in": {"kernel": one.lost[0], "op": one.lost[1]} if one.lost else None,
            }
            for one in value.depends
        ],
        "ops": list(value.ops),
        "written_by": list(value.written_by),
    }


# The page


_SHOWN_CONSTANTS = 100
_SHOWN_OPS = 400  # a longer table is cut in the middle: `as_json` has everything
_LINE = 60


def _page(report: Report) -> list[str]:
    graph, totals = report.graph, report.totals
    at_least = "" if report.exact else "at least "
    lines = [f"Plan {graph.name}  {graph.hash}"]
    if report.filed != graph.hash:
        lines.append(
            f"  approve as {report.filed}: its ops, and the constants below"
            if report.filed
            else "  An approval is of its constants too, whose values are not here: inspect the plan that waits."
        )
    if graph.doc:
        lines.append(f"  {graph.doc.splitlines()[0]}")
    if graph.name or graph.doc or graph.input_names:
        lines.append(
            "  (Names and words are its author's, and may say anything; the hash, ops and sizes are what runs.)"
        )
    lines += _verdict(report)
    lines += ["", "Takes"]
    for index, spec in enumerate(report.inputs):
        tags = "  " + " ".join(report.tags[index]) if report.tags.get(index) else ""
        lines.append(f"  _{index} {graph.input_name(index)}: {spec}{tags}")
    lines += _state_lines(report)
    lines += ["", "Gives back"]
    for value in report.outputs:
        lines += _value_lines(value)
    if report.written:
        lines += ["", "Changes in place"]
        for value in report.written:
            lines += _value_lines(value)
    if report.gradients:
        lines += ["", "Gradients in training"]
        for value in _gradient_groups(report.gradients):
            lines += _value_lines(value)
    lines += [
        "",
        "Costs",
        f"  computation  {at_least}{count_flops(totals.flops)}",
        f"  memory       {at_least}{count_bytes(totals.peak_bytes)} at its peak",
        f"  bytes in     {count_bytes(totals.input_bytes)} inputs, {count_bytes(totals.state_bytes)} state",
        f"  bytes out    {at_least}{count_bytes(totals.output_bytes)}",
    ]
    if not report.exact:
        places = ", ".join(str(index) for index in totals.unbounded[:8])
        lines.append(f"  sizes depend on values, without a bound, from op {places} on")
    if report.unknown_kernels:
        names = ", ".join(name.strip("_") for name in report.unknown_kernels)
        lines.append(f"  rows are not followed through: {names}")
    return [*[shown(line) for line in lines], "", *_op_lines(report)]


def _verdict(report: Report) -> list[str]:
    if report.policy_version is None:
        return []
    if report.ok:
        return ["", f"Keeps policy {report.policy_version}."]
    head = f"BREAKS policy {report.policy_version}: {_count(len(report.violations), 'violation')}"
    return ["", head, *[f"  ! {one}" for one in report.violations]]


def _state_lines(report: Report) -> list[str]:
    first, state = len(report.inputs), report.graph.state
    lines = {
        place: f"  _{first + place} {one.name}: {one.kind} {one.spec}" for place, one in enumerate(state)
    }
    known = dict(_named_constants(report))
    constants = [
        f"{lines.pop(place)}  {known.get(one.name, '')}".rstrip()
        for place, one in enumerate(state)
        if one.kind == "constant"
    ]
    shown = list(lines.values())
    if len(shown) > 12:
        shown = [*shown[:6], f"  ... {len(shown) - 8} more ...", *shown[-2:]]
    if shown:
        shown += ["  (Values of parameters and buffers are the client's, and no part of what you approve.)"]
    if len(constants) > _SHOWN_CONSTANTS:
        constants = [
            *constants[:_SHOWN_CONSTANTS],
            f"  ... {len(constants) - _SHOWN_CONSTANTS} more: see --json",
        ]
    return [*shown, *(["", "Constants, which you approve with it", *constants] if constants else [])]


def _named_constants(report: Report) -> list[tuple[str, Constant]]:
    names = [one.name for one in report.graph.state if one.kind == "constant"]
    constants = known_constants(report.graph) if report.constants is None else report.constants
    return [] if constants is None else list(zip(names, constants, strict=True))


def _value_lines(value: ValueReport) -> list[str]:
    spec = "a number, from sizes alone" if value.spec is None else str(value.spec)
    by = f"  (by op {_places(value.written_by)})" if value.written_by else ""
    lines = [f"  {value.path}: {spec}{by}"]
    followed = [one for one in value.depends if one.how != "used"]
    used = [one for one in value.depends if one.how == "used"]
    lines += [f"      {one}" for one in followed]
    if used:
        names = [one.name for one in used]
        rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"      uses {', '.join(names[:4])}{rest}")
    if not value.depends and value.spec is not None:
        lines.append("      depends on no input and no state")
    if value.ops:
        lines.append(f"      through {_count(len(value.ops), 'op')}: {_places(value.ops)}")
    return lines


def _gradient_groups(gradients: Sequence[ValueReport]) -> list[ValueReport]:
    """Gradients that depend on the inputs in the same way as one: a network has hundreds."""
    groups: dict[tuple[Dependence, ...], list[ValueReport]] = {}
    for value in gradients:
        followed = tuple([one for one in value.depends if one.how != "used"])
        groups.setdefault(followed, []).append(value)
    merged = []
    for followed, values in groups.items():
        more = f" and {len(values) - 1} more" if len(values) > 1 else ""
        merged.append(replace(values[0], path=f"{values[0].path}{more}", depends=followed, ops=()))
    return merged


def _op_lines(report: Report) -> list[str]:
    rows = []
    for one in report.ops:
        outputs = ", ".join(str(spec) for spec in one.outputs[:3]) + (", ..." if len(one.outputs) > 3 else "")
        line = one.line if len(one.line) <= _LINE else one.line[: _LINE - 3] + "..."
        size = (
            "?"
            if one.bytes is None
            else count_bytes(one.bytes)
            if one.bytes
            else "view"
            if one.outputs
            else ""
        )
        flops = "?" if one.flops is None else count_flops(one.flops, unit="") if one.flops else ""
        rows.append((str(one.index), line, outputs, size, flops))
    if len(rows) > _SHOWN_OPS:
        half = _SHOWN_OPS // 2
        rows = [*rows[:half], ("...", f"{len(rows) - 2 * half} more ops", "", "", ""), *rows[-half:]]
    head = ("op", "line", "gives", "allocates", "FLOP")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(5)]
    aligned = ">", "<", "<", ">", ">"
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True)
        ).rstrip()
        for row in [head, *rows]
    ]


def _places(places: Sequence[int]) -> str:
    """Op numbers, runs of them as 3-7."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][1] + 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    return ", ".join(texts[:8]) + (", ..." if len(texts) > 8 else "")


def count_bytes(count: int) -> str:
    """Bytes for people: 1.50 MiB."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):  # noqa: B007 - the last one is used
        value /= 1024
        if value < 1024:
            break
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def count_flops(count: int, unit: str = "FLOP") -> str:
    """Floating-point operations for people: 2.1 GFLOP."""
    prefixes, value = ["", "k", "M", "G", "T", "P"], float(count)
    while value >= 1000 and len(prefixes) > 1:
        value /= 1000
        del prefixes[0]
    return f"{value:.3g} {prefixes[0]}{unit}".strip()


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
