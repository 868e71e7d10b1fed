"""``python -m fuzz.rows --plans N --seed S``: what is claimed about rows, against finite differences.

Release rules rely on a claim: that a result is aggregated over so many rows of an input, or does not depend on it. Here
random ops of the table are put together to plans of two tables with six rows; then one row at a time gets other values,
at several random points. An entry that is called aggregated over k rows has to follow k of them, or none; one that does
not depend on an input, none. Every entry that some points leave alone (a clamp, a maximum) has other points to move.

Exit codes: 0 nothing found, 1 findings, 2 wrong options.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from fuzz.arguments import Draw, draw
from planrt.errors import PlanrtError
from planrt.plans.analysis.analysing import analyse
from planrt.plans.ir import ops
from planrt.plans.ir.graph import Graph, Op, StateSpec
from planrt.plans.running.interpreter import execute
from planrt.types import Nested, Ref, TensorSpec, leaves, map_leaves

ROWS: Final = 6
_COLUMNS: Final = 4
_POINTS: Final = 12
_TRIES: Final = 12
_LARGEST: Final = 2_000
_AGGREGATES: Final = ("torch.sum", "torch.mean", "torch.amax", "torch.logsumexp", "torch.var")


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim that does not hold: about which output and input, and how many rows move an entry of it."""

    seed: str
    output: int
    source: int
    claim: str
    moved_by: int
    plan: str


@dataclass(slots=True)
class Summary:
    """How many plans ran, and claims were tried: of which so many of aggregates."""

    plans: int = 0
    claims: int = 0
    aggregates: int = 0
    ops: int = 0
    findings: tuple[Finding, ...] = ()


def names() -> list[str]:
    """The ops whose claims are tried: those that compute, and always the same."""
    left = {
        *ops.RANDOM,
        *ops.GRADIENTS,
        *ops.SIZE_OPS,
        *ops.ASSUMPTIONS,
        "torch.set_grad_enabled",
        ops.REQUIRES_GRAD,
    }
    return sorted(set(ops.TABLE) - left)


def random_plan(seed: str, known: Sequence[str]) -> tuple[Graph, list[torch.Tensor]]:
    """A plan of x and y, both float64[6, 4], and the values of its state; its outputs are all that it computed."""
    drawn = Draw(seed)
    state: list[torch.Tensor] = []
    inputs = [_table(drawn.generator), _table(drawn.generator)]
    steps: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
    values: dict[str, Any] = {f"input {number}": one for number, one in enumerate(inputs)}
    for step in range(drawn.random.randrange(1, 4)):
        for attempt in range(_TRIES):
            name = drawn.random.choice(known)
            args, kwargs = draw(name, f"{seed} {step} {attempt}", plain=True)
            if step and drawn.chance(0.4):
                name, args, kwargs = drawn.random.choice(_AGGREGATES), (torch.zeros(1), 0), {}
            made = _tried(drawn, name, args, kwargs, values, state)
            if made is None:
                continue
            args, kwargs, result, constants = made
            state += constants
            steps.append((name, args, kwargs, result))
            for place, one in enumerate(leaves(result)):
                values[f"{len(steps) - 1} {place}"] = one
            break
    return _graph(inputs, state, steps), state


def _table(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(ROWS, _COLUMNS, generator=generator, dtype=torch.float64) + 0.5


def _tried(
    drawn: Draw, name: str, args: Any, kwargs: Any, values: dict[str, Any], state: Sequence[torch.Tensor]
) -> tuple[Any, Any, Any, list[torch.Tensor]] | None:
    """The op's arguments with tensors exchanged for values of the plan (as names), if it takes them; its result."""
    tensors = [name for name, one in values.items() if isinstance(one, torch.Tensor)]
    constants: list[torch.Tensor] = []
    used = 0

    def chosen(leaf: Any) -> Any:
        nonlocal used
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if used and drawn.chance(0.3):
            constants.append(leaf.detach().contiguous())
            return _Name(f"state {len(state) + len(constants) - 1}")
        used += 1
        return _Name(drawn.random.choice(tensors[-4:] if drawn.chance(0.6) else tensors))

    args, kwargs = map_leaves(args, chosen), map_leaves(kwargs, chosen)
    if not used:
        return None
    everything = {**values, **{f"state {len(state) + place}": one for place, one in enumerate(constants)}}

    def value(leaf: Any) -> Any:
        return everything[leaf.name].clone() if isinstance(leaf, _Name) else leaf

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = ops.TABLE[name](*map_leaves(args, value), **map_leaves(kwargs, value))
    except Exception:
        return None
    result = tuple(result) if isinstance(result, tuple | list) else result
    found = list(leaves(result))
    usable = found and all(isinstance(one, torch.Tensor) and 0 < one.numel() <= _LARGEST for one in found)
    if not usable or any(one.layout != torch.strided for one in found) or len(found) > 8:
        return None
    return args, kwargs, result, constants


@dataclass(frozen=True, slots=True)
class _Name:
    name: str


def _graph(inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor], steps: Sequence[Any]) -> Graph:
    numbers = {f"input {place}": place for place in range(len(inputs))}
    numbers |= {f"state {place}": len(inputs) + place for place in range(len(state))}
    made, outputs = [], []
    for number, (name, args, kwargs, result) in enumerate(steps):
        place = 0

        def numbered(leaf: Any, number: int = number) -> Ref:
            nonlocal place
            key = f"{number} {place}"
            place += 1
            numbers[key] = len(numbers)
            outputs.append(Ref(numbers[key]))
            return outputs[-1]

        def referred(leaf: Any) -> Any:
            return Ref(numbers[leaf.name]) if isinstance(leaf, _Name) else leaf

        args, kwargs = map_leaves(args, referred), map_leaves(kwargs, referred)
        results: Nested = map_leaves(result, numbered)
        made.append(Op(name, args, kwargs, results))
    entries = [
        StateSpec(f"s{place}", TensorSpec.of(one), "constant", False) for place, one in enumerate(state)
    ]
    specs = tuple(TensorSpec.of(one) for one in inputs)
    return Graph(specs, tuple(entries), tuple(made), tuple(outputs))


def check(seed: str, known: Sequence[str], summary: Summary, *, points: int = _POINTS) -> None:
    """Tries the claims about one plan; what looks wrong is tried at many more points before it is a finding.

    Results that are no floating-point numbers are left alone: a comparison follows each of its rows only rarely.
    """
    try:
        graph, state = random_plan(seed, known)
        report = analyse(graph)
    except PlanrtError:  # it has no bytes, or cannot be looked at without values: it would be refused
        return
    if not graph.ops:
        return
    generator = Draw(f"{seed} points").generator
    moved: list[list[Any]] = [[None] * len(graph.outputs) for _ in range(2)]
    for kind in range(points):
        point = [_values(generator, kind) for _ in range(2)]
        before = _run(graph, point, state)
        if before is None:
            continue
        for source in range(2):
            for row in range(2 * ROWS):
                changed = [one.clone() for one in point]
                changed[source][row % ROWS] = _values(generator, kind)[0]
                after = _run(graph, changed, state)
                for place, (one, other) in enumerate(zip(before, after or (), strict=False)):
                    if moved[source][place] is None:
                        moved[source][place] = torch.zeros(ROWS + 1, *one.shape, dtype=torch.int64)
                    seen = moved[source][place]
                    if one.shape == other.shape == seen.shape[1:]:
                        differs, known_here = _compared(one, other)
                        seen[row % ROWS] += differs
                        seen[ROWS] += known_here
    findings: list[Finding] = []
    summary.plans += 1
    summary.ops += len(graph.ops)
    for source in range(2):
        for place, value in enumerate(report.outputs):
            summary.claims += 1
            claim = next((one for one in value.depends if one.source == source), None)
            seen = moved[source][place]
            floating = isinstance(value.spec, TensorSpec) and value.spec.dtype.is_floating_point
            if seen is None or not floating or (claim is not None and claim.how != "aggregated"):
                continue
            summary.aggregates += claim is not None
            counts, known_well = (seen[:ROWS] > 0).sum(0), seen[ROWS] > points * ROWS
            least = 1 if claim is None else (claim.rows or 0)
            wrong = known_well & (counts > 0) & (counts < least) if claim is not None else counts > 0
            if wrong.any():
                says = "no dependence" if claim is None else str(claim)
                findings.append(Finding(seed, place, source, says, int(counts[wrong].min()), str(graph)))
    if findings and points == _POINTS:
        again = Summary()
        check(seed, known, again, points=8 * points)
        findings = list(again.findings)
    summary.findings = (*summary.findings, *findings)


def _values(generator: torch.Generator, kind: int) -> torch.Tensor:
    """A table: of values about 1, between 0 and 1, or on both sides of 0."""
    if kind % 3 == 2:
        return torch.randn(ROWS, _COLUMNS, generator=generator, dtype=torch.float64) * 2
    made = torch.rand(ROWS, _COLUMNS, generator=generator, dtype=torch.float64)
    return made + 0.5 if kind % 3 else made * 0.9 + 0.05


def _run(
    graph: Graph, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = [one.clone() for one in inputs], [one.clone() for one in state]
            made: Sequence[torch.Tensor] = [one.clone() for one in execute(graph, *given)]
            return made
    except (PlanrtError, RuntimeError):
        return None


def _compared(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where two results differ by more than rounding, and where they are numbers at all: infinity hides the rest."""
    if not (one.is_floating_point() or one.is_complex()):
        return one != other, torch.ones_like(one, dtype=torch.bool)
    one, other = (part.to(torch.complex128) for part in (one, other))
    finite = one.isfinite() & other.isfinite()
    return finite & ((one - other).abs() > 1e-9 * (1 + one.abs())), finite


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the fuzzer; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.rows", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plans", type=int, default=1_000, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all plans (%(default)s)")
    parser.add_argument(
        "--first", type=int, default=0, metavar="N", help="number of the first plan (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.plans < 1 or options.first < 0:
        parser.error("--plans must be above 0, --first at least 0")
    torch.set_num_threads(1)
    summary, known = Summary(), names()
    for number in range(options.first, options.first + options.plans):
        found = len(summary.findings)
        check(f"{options.seed}/{number}", known, summary)
        for one in summary.findings[found:]:
            print(
                f"FOUND plan {number} of seed {options.seed}: output {one.output} of input {one.source} claims "
                f"{one.claim}, and {one.moved_by} rows move an entry\n{one.plan}",
                flush=True,
            )
    print(f"{summary.plans:,} plans of {summary.ops:,} ops, {summary.claims:,} claims, {summary.aggregates:,} of "
          f"aggregates, {len(summary.findings)} findings")  # fmt: skip
    return 1 if summary.findings else 0


if __name__ == "__main__":
    sys.exit(main())
