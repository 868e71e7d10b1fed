"""How a plan is recorded: from example arguments to a record, in both modes of its modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from planrt.errors import PlanArgumentError, TraceError
from planrt.plans.ir.graph import Graph
from planrt.plans.ir.record import PlanRecord
from planrt.plans.ir.signature import Signature
from planrt.plans.recording.lifting import StateRegistry
from planrt.plans.recording.tracer import assemble, record
from planrt.types import FREE

_EXAMPLE_SIZE = 2  # what a free size is while recording; the tracer doubles it


def examples_of(
    name: str, python: inspect.Signature, shapes: Sequence[Sequence[int]]
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Float32 tensors of these shapes, one per argument of plan `name`, and their free dimensions (-1).

    Raises:
        PlanArgumentError: a wrong number of shapes, or something that is no shape.
    """
    required = [
        one.name
        for one in python.parameters.values()
        if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) and one.default is one.empty
    ]
    takes_more = len(python.parameters) > len(required)
    if len(shapes) < len(required) or (len(shapes) > len(required) and not takes_more):
        raise PlanArgumentError(
            f"{name} takes {len(required)} arguments ({', '.join(required)}), got {len(shapes)} shapes in "
            "args_shape: check that there is one shape for each, and none for numbers, which need a default"
        )
    names = [*required, *map(str, range(len(required), len(shapes)))]
    for argument, shape in zip(names, shapes, strict=True):
        if not isinstance(shape, tuple | list | torch.Size) or any(
            isinstance(size, bool) or not isinstance(size, int) or size < FREE for size in shape
        ):
            raise PlanArgumentError(
                f"{name}: {shape!r} is not a shape for argument {argument}: sizes are whole numbers from 0, or "
                "-1 for any size"
            )
    examples = [torch.zeros([_EXAMPLE_SIZE if size == FREE else size for size in shape]) for shape in shapes]
    free = [[dim for dim, size in enumerate(shape) if size == FREE] for shape in shapes]
    return examples, free


def record_in_both_modes(
    call: Callable[..., Any],
    own: Sequence[torch.nn.Module],
    signature: Signature,
    tensors: Sequence[torch.Tensor],
    modules: Mapping[str, torch.nn.Module],
    free_dims: Sequence[Sequence[int]],
    *,
    name: str,
    doc: str,
    moody: bool,
) -> tuple[PlanRecord, StateRegistry]:
    """Records ``call(...)`` on example tensors, in both modes; returns the record, and whose tensors its
    state is.

    Args:
        call: the plan's Python code.
        own: modules whose parameters and buffers are state, the plan first. It is recorded in the mode they
            are in, and in the other one, as far as the examples allow that.
        signature, tensors, modules: as `recorded_signature` returns them.
        free_dims: as `Plan.build` takes them.
        name, doc: what the plan is called, and what is said about it.
        moody: whether there are modules whose mode could make a difference.

    Warns:
        PlanWarning: of tensors from outside that became state.

    Raises:
        TraceError: it cannot be recorded in the mode that it is in.
    """
    registry = StateRegistry(own, also_undo=list(modules.values()))

    def flat(*inputs: torch.Tensor) -> Any:
        with _holding(modules, dict(zip(signature.input_names, inputs, strict=True))):
            return signature.call(call, inputs, modules)

    mode = own[0].training
    recordings = {mode: record(flat, tensors, registry=registry, free_dims=free_dims)}
    if moody:
        try:
            with _switched(own):
                recordings[not mode] = record(flat, tensors, registry=registry, free_dims=free_dims)
        except TraceError:
            pass  # the other mode asks for other examples; `PlanRecord.graph` says so when it is wanted
    else:
        recordings[not mode] = recordings[mode]

    def graph(training: bool) -> Graph | None:
        if training not in recordings:
            return None
        return assemble(recordings[training], registry, name=name, input_names=signature.input_names, doc=doc)

    registry.warn_of_captures(name)
    evaluation, training = graph(False), graph(True)
    if evaluation is not None and evaluation == training:
        training = evaluation
    return PlanRecord(name, doc, signature, evaluation, training), registry


def leading_dims(
    signature: Signature, tensors: Sequence[torch.Tensor], modules: Mapping[str, torch.nn.Module]
) -> list[list[tuple[int, ...]]]:
    """Lists which inputs may have a free dimension 0: `free_dims` to be tried in this order, the most free
    first.

    Modules' tensors have none. That no input has one is not among them: it needs no trying.
    """
    of_modules = {
        index
        for index, path in enumerate(signature.input_names)
        if any(path.startswith(f"{one}.") for one in modules)
    }
    batched = [
        index for index, one in enumerate(tensors) if one.dim() and one.shape[0] and index not in of_modules
    ]
    if not batched:
        return []
    first = batched[0]
    alike = [index for index in batched if tensors[index].shape[0] == tensors[first].shape[0]]
    tried: list[list[int]] = []
    for chosen in (batched, alike, [first]):
        if chosen not in tried:
            tried.append(chosen)
    return [[(0,) if index in chosen else () for index in range(len(tensors))] for chosen in tried]


@contextmanager
def _holding(modules: Mapping[str, torch.nn.Module], inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """`modules` with the tensors of `inputs` in place of their own; `lifting.Undo` puts these back."""
    placed: list[tuple[dict[str, Any], str, str, torch.Tensor]] = []
    for path, module in modules.items():
        new = {
            id(tensor): inputs[f"{path}.{name}"]
            for tensors in (module.named_parameters(), module.named_buffers())
            for name, tensor in tensors
        }
        for where, part in module.named_modules():
            for registered in (part._parameters, part._buffers):
                for name, tensor in registered.items():
                    if tensor is not None:
                        registered[name] = new[id(tensor)]
                        placed.append((registered, name, f"{path}.{where}.{name}", new[id(tensor)]))
    yield
    for registered, name, full, tensor in placed:
        if registered.get(name) is not tensor:
            raise TraceError(
                f"the function binds another tensor to {full.replace('..', '.')} of a module that was passed to it: "
                "change it in place (copy_), so that the plan can"
            )


@contextmanager
def _switched(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """`modules` in the other mode than the first one is in; each submodule gets its own back."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    training = not modules[0].training
    for part, _ in before:
        part.training = training
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode
