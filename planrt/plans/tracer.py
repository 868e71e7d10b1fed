"""Records a PyTorch function into a `Graph` by running it on example arguments.

A `TorchFunctionMode` sees every public torch call and writes one op each, with the arguments as written. The
function runs twice, the second time with the free dimensions doubled. What is equal in both runs is a
constant; what follows the sizes stays computed from them; anything else that differs would silently freeze
the example's sizes, and is a `TraceError` that names the line. Tensors that the function uses but did not
make become state of the plan. The function's side effects on modules, tensors and generators are undone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planrt.errors import TraceError
from planrt.plans.graph import Graph, Op, refs_in
from planrt.plans.lifting import StateRegistry, Undo, check_plain
from planrt.plans.ops import SIZE_ARITHMETIC, SIZE_OPS
from planrt.plans.recorder import FIRST_RESULT, FIRST_STATE, MadeUnseenError, SizesFixedError, Step, run_once
from planrt.plans.text import show
from planrt.serde.values import encode, pack
from planrt.types import Nested, Ref, TensorSpec, leaves, map_leaves

# Ops whose result shapes depend on the data: repeated data can give equal sizes, which prove nothing then.
_DATA_SHAPED = frozenset(
    f"{home}.{name}"
    for home in ("torch", "Tensor", "nn.functional")
    for name in ("unique", "unique_consecutive", "nonzero", "argwhere", "masked_select", "bincount",
                 "one_hot", "repeat_interleave", "where")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recording:
    """What one traced function did: steps and outputs, values numbered as while recording."""

    inputs: tuple[TensorSpec, ...]
    steps: tuple[Step, ...]
    outputs: Nested


def trace(
    function: Callable[..., Any],
    examples: Sequence[torch.Tensor],
    *,
    modules: Sequence[torch.nn.Module] = (),
    free_dims: Sequence[Sequence[int]] | None = None,
    name: str = "plan",
    input_names: Sequence[str] = (),
    doc: str = "",
) -> Graph:
    """Record ``function(*examples)`` into a plan.

    Args:
        function: takes tensors, gives tensors (also nested in tuples, lists and dicts with string keys).
        examples: one tensor per input; values matter only where the function depends on them.
        modules: modules the function uses; their parameters and buffers become named state, in module order.
        free_dims: per input, the dimensions that may have other sizes at run time; default: none.
        name: what the plan is called when printed.
        input_names: names of the inputs in error messages.
        doc: a docstring to carry along.

    Raises:
        TraceError: the function cannot be recorded faithfully; the message names the line.
    """
    registry = StateRegistry(modules)
    recording = record(function, examples, registry=registry, free_dims=free_dims)
    return assemble(recording, registry, name=name, input_names=input_names, doc=doc)


def record(
    function: Callable[..., Any],
    examples: Sequence[torch.Tensor],
    *,
    registry: StateRegistry,
    free_dims: Sequence[Sequence[int]] | None = None,
) -> Recording:
    """Run `function` twice and return what both runs have in common; see `trace`."""
    free = _checked_free_dims(examples, free_dims)
    specs = tuple(
        TensorSpec.of(example, free_dims=dims) for example, dims in zip(examples, free, strict=True)
    )
    with Undo(registry) as undo:
        first, outputs = run_once(function, examples, specs, registry)
        undo.restore()
        try:
            others = [_extended(example, dims) for example, dims in zip(examples, free, strict=True)]
            second, other_outputs = run_once(function, others, specs, registry, values=first.values)
        except MadeUnseenError:
            raise
        except TraceError as error:
            raise SizesFixedError(f"cannot leave the free sizes open, with them doubled: {error}") from error
    _compare(first.steps, second.steps)
    if pack(outputs[1]) != pack(other_outputs[1]):
        raise SizesFixedError("the function returns something else when its free sizes change")
    is_free = any(free) and not any(step.op.name in _DATA_SHAPED for step in first.steps)
    same = [
        is_free and one.value is not None and one.value == other.value
        for one, other in zip(first.steps, second.steps, strict=True)
    ]
    return Recording(specs, *_folded(first.steps, same, outputs[0]))


def assemble(
    recording: Recording,
    registry: StateRegistry,
    *,
    name: str = "plan",
    input_names: Sequence[str] = (),
    doc: str = "",
) -> Graph:
    """The plan of a recording, with everything in `registry` as its state."""
    count = len(recording.inputs)
    results = [ref.index for step in recording.steps for ref in refs_in(step.op.results)]
    first_result = count + len(registry.entries)
    number = {key: Ref(first_result + index) for index, key in enumerate(results)}

    def renumber(leaf: Any) -> Any:
        if not isinstance(leaf, Ref) or leaf.index < FIRST_STATE:
            return leaf
        return Ref(count + leaf.index - FIRST_STATE) if leaf.index < FIRST_RESULT else number[leaf.index]

    return Graph(
        inputs=recording.inputs,
        state=tuple(entry.spec() for entry in registry.entries),
        ops=tuple(
            Op(
                step.op.name,
                map_leaves(step.op.args, renumber),
                map_leaves(step.op.kwargs, renumber),
                map_leaves(step.op.results, renumber),
            )
            for step in recording.steps
        ),
        outputs=map_leaves(recording.outputs, renumber),
        name=name,
        input_names=tuple(input_names),
        state_values=tuple(entry.tensor.detach() for entry in registry.entries),
        lines=tuple(step.line for step in recording.steps),
        doc=doc,
    )


def _checked_free_dims(
    examples: Sequence[torch.Tensor], free_dims: Sequence[Sequence[int]] | None
) -> list[tuple[int, ...]]:
    """The free dimensions of each example, counted from 0; none by default."""
    for index, example in enumerate(examples):
        check_plain(example, f"example argument {index}")
    if free_dims is None:
        return [()] * len(examples)
    if len(free_dims) != len(examples):
        raise TraceError(f"free_dims has {len(free_dims)} entries for {len(examples)} example arguments")
    checked = []
    for index, (example, dims) in enumerate(zip(examples, free_dims, strict=True)):
        if not all(-example.dim() <= dim < example.dim() for dim in dims):
            raise TraceError(
                f"free_dims {tuple(dims)} of example argument {index}, which is {example.dim()}-d"
            )
        if not all(example.shape[dim] for dim in dims):  # nothing to repeat for the second run
            raise TraceError(f"example argument {index} is empty on a free dimension: give it some entries")
        checked.append(tuple(sorted({dim % example.dim() for dim in dims})))
    return checked


def _extended(example: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """`example` with its free dimensions doubled by repeating its own entries: indices in it stay valid."""
    other = example.detach()
    for dim in dims:
        other = torch.cat([other, other], dim)
    return other.requires_grad_(example.requires_grad)


def _compare(first: list[Step], second: list[Step]) -> None:
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
            for a, b in zip(leaves((one.op.args, one.op.kwargs)), leaves((other.op.args, other.op.kwargs)),
                            strict=False)
            if pack(encode(a)) != pack(encode(b))
        ]  # fmt: skip
        what = (
            f"{show(differing[0][0])} became {show(differing[0][1])}" if differing else "its results differ"
        )
        raise SizesFixedError(
            f"a free size is frozen in an argument of {one.op.name} ({what} when the sizes doubled): use "
            "x.shape[...] and + - * // % on it; int(), len(), range() and math functions lose it",
            line=one.line,
        )
    if len(first) != len(second):
        longer = first if len(first) > len(second) else second
        raise SizesFixedError(
            "the free sizes decide how many ops run: a plan has one path",
            line=longer[min(len(first), len(second))].line,
        )


def _folded(steps: list[Step], same: list[bool], outputs: Nested) -> tuple[tuple[Step, ...], Nested]:
    """Sizes that no run can change become constants; size ops that nothing uses go."""
    constants: dict[int, int | float] = {}

    def fold(leaf: Any) -> Any:
        return constants.get(leaf.index, leaf) if isinstance(leaf, Ref) else leaf

    folded: list[Step] = []
    for step, is_same in zip(steps, same, strict=True):
        op = Op(
            step.op.name, map_leaves(step.op.args, fold), map_leaves(step.op.kwargs, fold), step.op.results
        )
        if step.value is not None:
            reads_tensor = op.name not in SIZE_ARITHMETIC
            if is_same if reads_tensor else not any(True for _ in refs_in(op.args)):
                constants[op.results.index] = step.value
                continue
        folded.append(Step(op, step.line, step.packed, step.value))
    outputs = map_leaves(outputs, fold)

    used = {ref.index for ref in refs_in(outputs)}
    kept: list[Step] = []
    for step in reversed(folded):
        if step.op.name in SIZE_OPS and step.op.results.index not in used:
            continue
        used.update(ref.index for ref in refs_in((step.op.args, step.op.kwargs)))
        kept.append(step)
    return tuple(reversed(kept)), outputs
