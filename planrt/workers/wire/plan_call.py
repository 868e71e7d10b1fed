"""A call of a plan as an op: its name, and what its results will be like. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch

from planrt.plans.ir.graph import Graph
from planrt.plans.ir.traits import OpTraits
from planrt.plans.running import interpreter
from planrt.types import Ref, leaves

CALL: Final = "plan"
"""Runs a plan: args are the plan's object, its mode, and its inputs; results are those of `output_values`."""
COPY: Final = "plan.copy"
"""Copies a plan's object, its state included."""
STATE: Final = "plan.state"
"""The tensors of a plan's state, themselves, as objects: whoever writes to one changes the plan."""

TRAITS: Final = {
    CALL: OpTraits(CALL, calls_plan=True),
    COPY: OpTraits(COPY, data_independent=True, needs_no_policy=True, copies_plan=True),
    STATE: OpTraits(STATE, data_independent=True),
}
"""Name -> what sets it apart, as `planrt.plans.ir.ops.TRAITS` has it for torch's ops."""


@dataclass(frozen=True, eq=False)
class PlanTwin:
    """A plan as inference sees it: what its results are like depends on its graph alone."""

    graph: Graph
    _hash: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.graph.hash))

    @property
    def cache_key(self) -> str:
        """Its hash stands for it in the keys of caches, which must not keep plans that are gone."""
        return self.graph.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlanTwin) and self.graph.hash == other.graph.hash

    def __hash__(self) -> int:
        return self._hash


def call_on_meta(twin: PlanTwin, *inputs: torch.Tensor) -> tuple[Any, ...]:
    """`call`, for inference: on tensors without values."""
    graph = twin.graph
    return output_values(graph, interpreter.execute(graph, inputs, meta_state(graph), device="meta"))


def meta_state(graph: Graph) -> list[torch.Tensor]:
    """Returns the state of a plan, as tensors without values."""
    return [
        torch.empty(entry.spec.shape, dtype=entry.spec.dtype, device="meta", requires_grad=entry.trainable)
        for entry in graph.state
    ]


def output_values(graph: Graph, outputs: Any) -> tuple[Any, ...]:
    """Returns the leaves of a plan's outputs that it computed, in their order; constants are left out."""
    pairs = zip(leaves(outputs), leaves(graph.outputs), strict=True)
    return tuple(value for value, leaf in pairs if isinstance(leaf, Ref))
