"""Says what a plan will do, from its inputs' shapes alone: sizes, memory, cost, and what each output depends
on.

Every op runs on meta tensors, or rather, each kind of op once per process: a plan that does not differentiate
is put together from what its ops do one by one (`planrt.plans.analysis.op_by_op`). A plan with backward
passes cannot be: what a pass computes hangs on the autograd graph that the ops before it left. It runs whole
(`planrt.plans.analysis.run_whole`). Both ways gather the same findings (`planrt.plans.analysis.findings`) and
use the same rules for rows (`planrt.plans.analysis.rows`).

This module is the way in: it checks what is asked, and chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from planrt.errors import ExecutionError, PlanArgumentError
from planrt.plans.analysis.findings import AnalysisTimeError, Clock
from planrt.plans.analysis.op_by_op import Composed
from planrt.plans.analysis.report import Report
from planrt.plans.analysis.run_whole import Whole
from planrt.plans.ir.graph import Graph
from planrt.types import FREE, TensorSpec


def analyse(
    graph: Graph,
    inputs: Sequence[TensorSpec | None] = (),
    *,
    gradients: bool = False,
    seconds: float | None = None,
) -> Report:
    """Analyses what `graph` does with inputs of these specs, without running it.

    Inputs and state are taken to be contiguous, and none to share memory with another: who runs the plan on
    the strength of this report has to make them so.

    Args:
        graph: the plan.
        inputs: shape and dtype of each input, without free sizes. One that the plan itself fixes may be None,
            and all may be left out where it fixes all.
        gradients: as a training loop runs the plan: trainable parameters require gradients, autograd keeps
            what a backward pass needs, and if the first output is a scalar that depends on them, the pass is
            run from it. Plans that differentiate do all that by themselves, where they say so.
        seconds: of processor time that the analysis may take; None for any.

    Raises:
        PlanArgumentError: specs that do not fit the plan's inputs, or leave a size free.
        ExecutionError: an op cannot run on such inputs; names it.
        AnalysisTimeError: the analysis takes longer than `seconds`.
    """
    given = concrete_inputs(graph, inputs)
    clock = Clock(seconds)
    whole = gradients or graph.differentiates
    try:
        return (Whole(graph, given, clock, gradients) if whole else Composed(graph, given, clock)).report()
    except ExecutionError as error:
        if isinstance(error.__cause__, AnalysisTimeError):  # not the op's fault at which it was over
            raise error.__cause__ from None
        raise


def concrete_inputs(graph: Graph, inputs: Sequence[TensorSpec | None]) -> tuple[TensorSpec, ...]:
    """Returns the specs of all inputs, from those that were given and those that the plan fixes; see
    `analyse`."""
    specs = list(inputs) if inputs else [None] * len(graph.inputs)
    if len(specs) != len(graph.inputs):
        raise PlanArgumentError(
            f"plan {graph.name!r} takes {len(graph.inputs)} inputs, got the specs of {len(specs)}"
        )
    found = []
    for index, (wanted, have) in enumerate(zip(graph.inputs, specs, strict=True)):
        name = graph.input_name(index)
        have = wanted if have is None else have
        if FREE in have.shape:
            raise PlanArgumentError(
                f"{name} of plan {graph.name!r} is {wanted}: say which sizes to check it for, for example "
                f"TensorSpec({tuple(32 if size == FREE else size for size in have.shape)}, {have.dtype})"
            )
        fits = len(have.shape) == len(wanted.shape) and all(
            size in (FREE, real) for size, real in zip(wanted.shape, have.shape, strict=True)
        )
        if not fits or have.dtype != wanted.dtype:
            raise PlanArgumentError(f"{name} of plan {graph.name!r}: wanted {wanted}, got {have}")
        if any(type(size) is not int or size < 0 for size in have.shape) or math.prod(have.shape) >= 2**48:
            raise PlanArgumentError(f"{name} of plan {graph.name!r}: {have} is no possible tensor")
        found.append(have)
    return tuple(found)
