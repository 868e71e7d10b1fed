"""Records a PyTorch function into a `Graph` by running it on example arguments.

A `TorchFunctionMode` sees every public torch call and writes one op each, with the arguments as written. The
function runs again with other free sizes (`planrt.plans.recording.size_probing`). What is equal in all runs
is a constant; what follows the sizes stays computed from them; anything else that differs would silently
freeze the example's sizes, and is a `TraceError` that names the line. Tensors that the function uses but did
not make become state of the plan. The function's side effects on modules, tensors, optimizers and generators
are undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch

from planrt.errors import PlanrtError, TraceError
from planrt.plans.ir.graph import Graph, Op, refs_in
from planrt.plans.ir.ops import GRADIENTS, REQUIRES_GRAD
from planrt.plans.ir.source import user_line
from planrt.plans.recording import torch_calls
from planrt.plans.recording.lifting import StateRegistry, Undo, check_plain
from planrt.plans.recording.python_rng import why_not
from planrt.plans.recording.python_state import (
    KeptError,
    KeptState,
    Left,
    Snapshot,
    warn_of_changes,
    why_kept,
)
from planrt.plans.recording.recorder import (
    FIRST_STATE,
    DrawnError,
    RecordedOp,
    Run,
    SecondRunError,
    SizesFixedError,
)
from planrt.plans.recording.size_probing import grown, in_common, odd_runs
from planrt.plans.recording.trace_warnings import quiet, told_once
from planrt.plans.recording.traced_run import SeededError, recording, run_once
from planrt.types import Nested, Ref, TensorSpec, map_leaves

_TRIES: Final = 4  # of a run during which somebody seeded torch's generator


@dataclass(frozen=True, slots=True)
class Recording:
    """The record of one traced function: steps and outputs, values numbered as while recording."""

    inputs: tuple[TensorSpec, ...]
    steps: tuple[RecordedOp, ...]
    outputs: Nested
    trained_inputs: frozenset[int]
    """Inputs that require gradients."""
    own_gradients: bool
    """Whether it differentiates, on gradients of its own."""


@told_once()
def trace(
    function: Callable[..., Any],
    examples: Sequence[torch.Tensor],
    *,
    modules: Sequence[torch.nn.Module] = (),
    free_dims: Sequence[Sequence[int]] | None = None,
    name: str = "plan",
    input_names: Sequence[str] = (),
    doc: str = "",
    notice: bool = True,
) -> Graph:
    """Record ``function(*examples)`` into a plan.

    A function may differentiate: call `backward`, read `.grad`, update parameters under `torch.no_grad()` or
    by an optimizer. Such a plan begins without gradients at every run, on new leaves that share the memory of
    its parameters (the first ops, `detach` and `requires_grad_`, show them), and its results carry no
    history.

    Args:
        function: takes tensors, returns tensors (also nested in tuples, lists and dicts with string keys).
        examples: one tensor per input; values matter only where the function depends on them.
        modules: modules the function uses; their parameters and buffers become named state, in module order.
        free_dims: per input, the dimensions that may have other sizes at run time; default: none.
        name: what the plan is called when printed.
        input_names: names of the inputs in error messages.
        doc: a docstring to carry along.
        notice: whether to warn (`PlanWarning`) of tensors from outside that become state.

    Raises:
        TraceError: the function cannot be recorded faithfully; the message names the line.
    """
    registry = StateRegistry(modules)
    recording = record(function, examples, registry=registry, free_dims=free_dims)
    graph = assemble(recording, registry, name=name, input_names=input_names, doc=doc)
    if notice:
        registry.warn_of_captures(name)
    return graph


@told_once()
def record(
    function: Callable[..., Any],
    examples: Sequence[torch.Tensor],
    *,
    registry: StateRegistry,
    free_dims: Sequence[Sequence[int]] | None = None,
    own_gradients: bool = True,
) -> Recording:
    """Run `function` with several sizes and return what the runs have in common; see `trace`.

    With `own_gradients` False, a recording that differentiates works on the gradients of whoever runs it: for
    callers that run autograd over the plan as a whole, on tensors that are theirs.
    """
    if recording():
        raise TraceError(
            "a plan cannot be built while another one is recorded: build it before, and call it",
            line=user_line(),
        )
    free = _checked_free_dims(examples, free_dims)
    specs = tuple(
        TensorSpec.of(example, free_dims=dims) for example, dims in zip(examples, free, strict=True)
    )
    _check_hooks(registry, trained=not own_gradients)
    kept = KeptState(function, registry.modules)
    with Undo(registry) as undo:

        def once(
            inputs: Sequence[torch.Tensor], values: list[torch.Tensor] | None, left: Left | None
        ) -> tuple[Run, Snapshot]:
            if left is not None:
                kept.restore(left.snapshot)
            try:
                with quiet() if values is not None else nullcontext():  # what warns warns in the first run
                    done = run_once(function, inputs, specs, registry, undo.optimizers, values, left)
                return done, kept.snapshot()
            finally:
                undo.restore()
                kept.restore(kept.start)

        def run(
            inputs: Sequence[torch.Tensor],
            values: list[torch.Tensor] | None = None,
            left: Left | None = None,
        ) -> tuple[Run, Snapshot]:
            for _ in range(_TRIES - 1):
                try:
                    return once(inputs, values, left)
                except (SeededError, DrawnError):  # by another thread, perhaps
                    continue
            return once(inputs, values, left)

        first, after = run(examples)
        values = first.recorder.values
        _check_kept(kept, first, after, lambda left: run(examples, values, left))
        try:
            others = [run(grown(examples, free, lambda size: 2 * size), values)[0]]
        except SecondRunError:
            raise
        except PlanrtError as error:
            refused = SizesFixedError(f"cannot leave the free sizes open, with them doubled: {error}")
            refused.line = error.line if isinstance(error, TraceError) else None  # which is in the message
            raise refused from error
        if any(free):
            others += odd_runs(examples, free, lambda examples: run(examples, values)[0])
        for entry in registry.entries:
            if entry.reshaped:
                raise TraceError(
                    f"the function gives its state {entry.name!r} another shape in place: a plan cannot"
                )
        try:
            steps, outputs = in_common(first, others)
        except SizesFixedError as error:
            _check_repeats(first, lambda: run(examples, values)[0], error)
            raise
    return Recording(
        specs,
        steps,
        outputs,
        frozenset(index for index, example in enumerate(examples) if example.requires_grad),
        own_gradients and any(step.op.name in GRADIENTS for step in steps),
    )


def _check_hooks(registry: StateRegistry, *, trained: bool) -> None:
    """Raises TraceError for hooks that nobody would call where the plan runs. Forward hooks run while
    recording."""
    for path, module in _named_modules(registry.modules):
        what = torch_calls.backward_hooks(module)
        if what is not None:
            raise TraceError(
                f"module {path} has a backward hook ({what}), which a plan would lose: compute with the gradients "
                "after backward() instead"
            )
    for what, tensor in registry.named(()) if trained else ():
        if tensor.requires_grad and torch_calls.hooked(tensor):
            raise TraceError(
                f"{what} has hooks on its gradient (register_hook or register_post_accumulate_grad_hook), which nobody "
                "would call where a round trains it: freeze with requires_grad_(False), mask the weight in forward, or "
                "let a plan compute with .grad after loss.backward()"
            )


def _named_modules(modules: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Each module once, with its path in the first one that holds it, or its class's name."""
    met: set[int] = set()
    for root in modules:
        for path, part in root.named_modules():
            if id(part) not in met:
                met.add(id(part))
                yield repr(path) if path else type(part).__name__, part


def _check_repeats(first: Run, again: Callable[[], Run], error: SizesFixedError) -> None:
    """Raises TraceError where a run with the same arguments differs too: the sizes are not to blame."""
    try:
        in_common(first, [again()])
    except SizesFixedError as same:
        raise TraceError(
            "the function does something else each time it is called, with the same arguments too: a clock, a counter, "
            "a generator or random numbers that are not torch's have a part in it, and a plan would freeze what they "
            "gave; pass it as an argument, keep it in a buffer, or draw with torch.rand",
            line=same.line or error.line,
        ) from None


def _check_kept(
    kept: KeptState, first: Run, after: Snapshot, again: Callable[[Left], tuple[Run, Snapshot]]
) -> None:
    """Finds out whether what the first run left behind has a part in what the next one does (`python_state`
    has why).

    Raises:
        KeptError: it has. DrawnError: a random generator that the function holds was drawn from.
    """
    changes = kept.changes(kept.start, after, tensors=True)
    for change in changes:
        if change.is_generator:
            raise DrawnError(why_not(f"the random numbers of {change.name}"), line=change.line)
    if not changes:
        return
    try:
        second, later = again(Left(kept, after, first.recorder.known))
        if not second.recorder.reused:  # else its ops differ, by those that made what it used again
            in_common(first, [second])
    except KeptError:
        raise
    except PlanrtError as error:
        raise KeptError(
            why_kept(changes), line=next((one.line for one in changes if one.line), None)
        ) from error
    going_on = kept.changes(after, later, tensors=False)
    if going_on:
        warn_of_changes(going_on, "the function")


def assemble(
    recording: Recording,
    registry: StateRegistry,
    *,
    name: str = "plan",
    input_names: Sequence[str] = (),
    doc: str = "",
) -> Graph:
    """Assembles the plan of a recording, with everything in `registry` as its state."""
    renumber = _Numbers(recording, registry)
    return Graph(
        inputs=recording.inputs,
        state=tuple(entry.spec() for entry in registry.entries),
        ops=(
            *renumber.leaf_ops,
            *(
                Op(
                    step.op.name,
                    map_leaves(step.op.args, renumber),
                    map_leaves(step.op.kwargs, renumber),
                    map_leaves(step.op.results, renumber),
                )
                for step in recording.steps
            ),
        ),
        outputs=map_leaves(recording.outputs, renumber),
        name=name,
        input_names=tuple(input_names),
        state_values=tuple(entry.tensor.detach() for entry in registry.entries),
        lines=(*[None] * len(renumber.leaf_ops), *(step.line for step in recording.steps)),
        modules=(*[None] * len(renumber.leaf_ops), *(step.module for step in recording.steps)),
        doc=doc,
    )


class _Numbers:
    """From the numbers of a recording to those of its plan: call it with the leaves of arguments and results.

    Where a plan has gradients of its own, `leaf_ops` make a new leaf for each input and parameter that
    requires gradients and is used; everything after them refers to that leaf.
    """

    def __init__(self, recording: Recording, registry: StateRegistry) -> None:
        self._inputs = len(recording.inputs)
        self._numbers: dict[int, Ref] = {}
        self.leaf_ops: list[Op] = []
        free = self._inputs + len(registry.entries)
        if recording.own_gradients:
            used = {ref.index for step in recording.steps for ref in refs_in((step.op.args, step.op.kwargs))}
            trained = sorted(recording.trained_inputs) + [
                FIRST_STATE + index for index, entry in enumerate(registry.entries) if entry.requires_grad
            ]
            for index in trained:
                if index in used:
                    leaf = Ref(free)
                    self.leaf_ops.append(Op("Tensor.detach", (self(Ref(index)),), {}, leaf))
                    self.leaf_ops.append(Op(REQUIRES_GRAD, (leaf,), {}, None))
                    self._numbers[index] = leaf
                    free += 1
        for step in recording.steps:
            for ref in refs_in(step.op.results):
                self._numbers[ref.index] = Ref(free)
                free += 1

    def __call__(self, leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        known = self._numbers.get(leaf.index)
        if known is not None:
            return known
        return leaf if leaf.index < FIRST_STATE else Ref(self._inputs + leaf.index - FIRST_STATE)


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
        if not all(example.shape[dim] for dim in dims):  # nothing to repeat for the other runs
            raise TraceError(f"example argument {index} is empty on a free dimension: give it some entries")
        checked.append(tuple(sorted({dim % example.dim() for dim in dims})))
    return checked
