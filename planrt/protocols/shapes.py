"""Whether the results of steps fit the arguments of others, as far as that is known before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final, Literal, TypeAlias

import torch

from planrt.errors import ProtocolError
from planrt.plans.ir.chain import Chain
from planrt.plans.ir.graph import Graph
from planrt.plans.running import interpreter
from planrt.types import FREE, Ref, TensorSpec, leaves

_SIZES = (2, 4)
"""What free sizes are while a plan is tried out: as in the tracer. Sizes of results that differ then are
free."""
_NUMBER: Final = "a number"
Known: TypeAlias = TensorSpec | Literal["a number"]


def check_shapes(chain: Chain) -> None:
    """Compares what each step takes with what is known of it.

    Raises:
        ProtocolError: they do not fit; names the step, the argument and the value.
    """
    known: dict[int, tuple[Known, str]] = {}
    for number, step in enumerate(chain.steps):
        graph = chain.plans[step.plan].graph
        for index, (ref, wanted) in enumerate(zip(step.arguments, graph.inputs, strict=True)):
            what = f"step {step.name!r} wants {wanted} for {graph.input_name(index)}"
            if ref.index not in known:
                if ref.index < len(chain.inputs):  # what one step wants of an input, others must want as well
                    known[ref.index] = (wanted, what)
                continue
            spec, why = known[ref.index]
            if isinstance(spec, str):
                raise ProtocolError(f"{what}, and {why} is {spec} there: steps hand on tensors only")
            if not _fit(spec, wanted):
                raise ProtocolError(
                    f"{what}, and {why}" + ("" if ref.index < len(chain.inputs) else f" is {spec}")
                )
        for value, result in zip(chain.results[number], result_specs(graph), strict=True):
            if result is not None:
                known[value] = (result, chain.name_of(value))


def check_inputs(chain: Chain, given: Mapping[int, torch.Tensor]) -> None:
    """Compares the tensors (or pointers) that a run is given, by their numbers, with what the steps take.

    Raises:
        ProtocolError: one does not fit; names the step and the argument.
    """
    for step in chain.steps:
        graph = chain.plans[step.plan].graph
        for index, (ref, wanted) in enumerate(zip(step.arguments, graph.inputs, strict=True)):
            if ref.index in given and not wanted.accepts(given[ref.index]):
                raise ProtocolError(
                    f"{chain.name_of(ref.index)} is {TensorSpec.of(given[ref.index])}, and step {step.name!r} wants "
                    f"{wanted} for {graph.input_name(index)}"
                )


@lru_cache(maxsize=256)
def result_specs(graph: Graph) -> tuple[Known | None, ...]:
    """Infers the specs of a plan's results, one for each `Ref` in its outputs; None where only a run can
    tell."""
    wanted = [leaf for leaf in leaves(graph.outputs) if isinstance(leaf, Ref)]
    try:
        tries = [_on_meta(graph, size) for size in _SIZES]
    except Exception:  # sizes that do not fit, or depend on values: it will show when the plan runs
        return (None,) * len(wanted)
    return tuple(_spec(*pair) for pair in zip(*tries, strict=True))


def _on_meta(graph: Graph, size: int) -> list[object]:
    def empty(spec: TensorSpec, requires_grad: bool = False) -> torch.Tensor:
        shape = [size if one == FREE else one for one in spec.shape]
        return torch.empty(shape, dtype=spec.dtype, device="meta", requires_grad=requires_grad)

    inputs = [empty(spec) for spec in graph.inputs]
    state = [empty(entry.spec, entry.trainable) for entry in graph.state]
    with torch.enable_grad():
        outputs = interpreter.execute(graph, inputs, state, device="meta")
    pairs = zip(leaves(outputs), leaves(graph.outputs), strict=True)
    return [value for value, leaf in pairs if isinstance(leaf, Ref)]


def _spec(one: object, other: object) -> Known | None:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return _NUMBER
    if one.dim() != other.dim() or one.dtype != other.dtype:
        return None
    sizes = (a if a == b else FREE for a, b in zip(one.shape, other.shape, strict=True))
    return TensorSpec(tuple(sizes), one.dtype)


def _fit(given: TensorSpec, wanted: TensorSpec) -> bool:
    return (
        given.dtype == wanted.dtype
        and len(given.shape) == len(wanted.shape)
        and all(FREE in (a, b) or a == b for a, b in zip(given.shape, wanted.shape, strict=True))
    )
