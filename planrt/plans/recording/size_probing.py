"""Whether a recording holds for other sizes than those of its examples: more runs, and what they have in
common.

The function must run with every free size doubled. It may run with odd sizes, first with a different one for
each free dimension, then with those that were equal staying so: what wants even sizes or equal ones fails
there, as it will at run time.

Why these sizes: doubling tells a size from a constant (3 and 6 differ), and keeps relations such as "even"
and "equal", so nearly every function that takes free sizes at all runs with it. Odd and different sizes show
what doubling keeps: ``int(x.shape[0]) % 2`` is 0 at 4 and at 8, and 1 at 9. A function that fails there only
says that it does not take such sizes, which is no error of the plan's.

For example `x` [4] with a free size, and ``return x / len(x)``: the runs have 4 and 8 elements, and divide by
4 and by 8, since `len` makes a plain number. The ops differ in an argument, so the size would have been
frozen: refused, with the line. ``x / x.shape[0]`` divides by the value `_1` of ``_1 = _0.size(0)`` in both.

Runs that succeed must agree: in the ops, their arguments and the results. Where the function
compared a free size, with one outcome in all runs, the plan checks that outcome at run time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from planrt.errors import PlanrtError
from planrt.plans.ir.graph import Op, refs_in
from planrt.plans.ir.ops import SIZE_ARITHMETIC, SIZE_OPS
from planrt.plans.ir.text import show
from planrt.plans.recording.recorder import RecordedOp, Run, SizesFixedError
from planrt.serde.values import encode, pack
from planrt.types import Nested, Ref, leaves, map_leaves

_INSTEAD = (
    "use x.shape[...] and + - * // % on it; int(), len(), range(), math functions and keys of dicts lose it"
)


def grown(
    examples: Sequence[torch.Tensor], free: Sequence[Sequence[int]], grow: Callable[[int], int]
) -> list[torch.Tensor]:
    """Returns the examples with `grow` applied to each free size. Entries are repeated, so that indices among
    them fit."""
    others = []
    for example, dims in zip(examples, free, strict=True):
        other = example.detach()
        for dim in dims:
            size = other.shape[dim]
            other = other.index_select(dim, torch.arange(grow(size), device=other.device) % size)
        others.append(other.requires_grad_(example.requires_grad))
    return others


def odd_runs(
    examples: Sequence[torch.Tensor],
    free: Sequence[Sequence[int]],
    run: Callable[[Sequence[torch.Tensor]], Run],
) -> list[Run]:
    """Runs the function with odd sizes, if it takes any; returns at most one run."""
    steps = itertools.count(1, 2)
    for grow in (lambda size: 2 * size + next(steps), lambda size: 2 * size + 1):
        try:
            return [run(grown(examples, free, grow))]
        except SizesFixedError:
            raise
        except PlanrtError:
            continue
    return []


def in_common(first: Run, others: Sequence[Run]) -> tuple[tuple[RecordedOp, ...], Nested]:
    """Returns the steps and outputs of all runs.

    Raises:
        SizesFixedError: they differ; names the line.
    """
    for other in others:
        _compare(first.recorder.steps, other.recorder.steps)
        if pack(first.encoded) != pack(other.encoded):
            raise SizesFixedError("the function returns something else when its free sizes change")
    readings = _checked_readings(first, others)
    assumed = [
        found
        for key, found in first.recorder.assumptions.items()
        if all(key in other.recorder.assumptions for other in others)
    ]
    assumed = sorted([*assumed, *readings], key=lambda found: found[0])
    return _folded(list(_merged(first.recorder.steps, assumed)), first.outputs)


def _checked_readings(first: Run, others: Sequence[Run]) -> list[tuple[int, RecordedOp]]:
    """What says that numbers which the function saw are the same at run time."""
    for key, (_, step) in first.recorder.readings.items():
        for other in others:
            _, same = other.recorder.readings.get(key, (0, step))
            if same.value != step.value:
                raise SizesFixedError(
                    f"a free size becomes a plain number ({step.value}, and {same.value} when the sizes changed), "
                    f"which a plan would freeze: {_INSTEAD}",
                    line=step.line,
                )
    return list(first.recorder.readings.values())


def _merged(steps: Sequence[RecordedOp], assumed: Sequence[tuple[int, RecordedOp]]) -> Iterator[RecordedOp]:
    """`steps` with each assumption where it was made."""
    done = 0
    for position, assumption in assumed:
        yield from steps[done:position]
        yield assumption
        done = position
    yield from steps[done:]


def _compare(first: Sequence[RecordedOp], second: Sequence[RecordedOp]) -> None:
    for one, other in zip(first, second, strict=False):
        if one.packed == other.packed:
            continue
        if one.op.name != other.op.name:
            raise SizesFixedError(
                f"the free sizes decide which op runs, {one.op.name} or {other.op.name}: a plan has one path",
                line=one.line,
            )
        differing = [
            (a, b)
            for a, b in zip(
                leaves((one.op.args, one.op.kwargs)), leaves((other.op.args, other.op.kwargs)), strict=False
            )
            if pack(encode(a)) != pack(encode(b))
        ]
        what = (
            f"{show(differing[0][0])} became {show(differing[0][1])}" if differing else "its results differ"
        )
        raise SizesFixedError(
            f"a free size is frozen in an argument of {one.op.name} ({what} when the sizes changed): "
            f"{_INSTEAD}",
            line=one.line,
        )
    if len(first) != len(second):
        longer = first if len(first) > len(second) else second
        raise SizesFixedError(
            "the free sizes decide how many ops run: a plan has one path",
            line=longer[min(len(first), len(second))].line,
        )


def _folded(steps: Sequence[RecordedOp], outputs: Nested) -> tuple[tuple[RecordedOp, ...], Nested]:
    """Arithmetic on constants becomes a constant; size ops that nothing uses go."""
    constants: dict[int, int | float] = {}

    def fold(leaf: Any) -> Any:
        return constants.get(leaf.index, leaf) if isinstance(leaf, Ref) else leaf

    folded: list[RecordedOp] = []
    for step in steps:
        op = Op(
            step.op.name, map_leaves(step.op.args, fold), map_leaves(step.op.kwargs, fold), step.op.results
        )
        if op.name in SIZE_ARITHMETIC and step.value is not None and not any(True for _ in refs_in(op.args)):
            constants[op.results.index] = step.value
            continue
        folded.append(replace(step, op=op))
    outputs = map_leaves(outputs, fold)

    used = {ref.index for ref in refs_in(outputs)}
    kept: list[RecordedOp] = []
    for step in reversed(folded):
        if step.op.name in SIZE_OPS and step.op.results.index not in used:
            continue
        used.update(ref.index for ref in refs_in((step.op.args, step.op.kwargs)))
        kept.append(step)
    return tuple(reversed(kept)), outputs
