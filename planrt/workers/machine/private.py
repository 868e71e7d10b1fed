"""Ops on values that their client may not read: what it must not learn from how they go. No I/O.

Results keep their labels (`planrt.workers.machine.labels`). Beyond that, a client must not see

* what results look like, where that depends on the values (`infer_results` refuses such ops);
* whether an op failed, where that depends on the values: an index out of range, for one, would tell about one
  private value per op. Zeros stand in for the results (`placeholder_results`);
* gradients that a graph computes later, from private values that were written past autograd
  (`planrt.workers.machine.sessions.Graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge, increment_version

from planrt.plans.ir.traits import OpTraits
from planrt.plans.running import inference
from planrt.plans.running.inference import Inferred, Same, Spec
from planrt.types import Ref, leaves, map_leaves
from planrt.workers.machine.kinds import plan as plan_objects
from planrt.workers.machine.kinds.plan import PlanObject
from planrt.workers.wire import plan_call
from planrt.workers.wire.plan_call import PlanTwin
from planrt.workers.wire.posted import PostedOp
from planrt.workers.wire.refusals import GetNotPermitted


@dataclass(frozen=True, slots=True, eq=False)
class _Operand:
    """An operand as `planrt.plans.running.inference` takes it."""

    _spec: Spec


def infer_results(
    op: PostedOp, traits: OpTraits, function: Callable[..., Any], operands: Sequence[Any]
) -> Inferred | None:
    """Returns what the results of `op` will be like, told from what its operands are like, without their values. None
    for ops that are data-independent: gradients and other memory, whose ops fail or not whatever the values.

    Raises:
        GetNotPermitted: it depends on the values. Or what torch raises for operands that do not fit.
    """
    if traits.data_independent:
        return None
    rest = iter(operands)
    twins: dict[int, _Operand] = {}

    def twin(leaf: Any) -> Any:
        if type(leaf) is not Ref:
            return leaf
        value = next(rest)
        if not isinstance(value, torch.Tensor):
            return value
        return twins.setdefault(id(value), _Operand(inference.Spec.of(value)))

    args, kwargs = map_leaves(op.args, twin), map_leaves(op.kwargs, twin)
    if traits.calls_plan:
        function = plan_call.call_on_meta
        args = (PlanTwin(args[0].record.graph(training=args[1])), *args[2:])
    foreseen = inference.infer(op.name, function, args, kwargs, _Operand)
    if foreseen is None:
        raise GetNotPermitted(f"{op.name} on private data: what its results look like depends on the values")
    if traits.calls_plan:
        _check_changes(foreseen, operands[1:])
    return foreseen


def _check_changes(foreseen: Inferred, inputs: Sequence[torch.Tensor]) -> None:
    """A plan that fails on the way may not have come to its last ops: what these change must not show."""
    for number, after in foreseen.changed:
        before = inference.Spec.of(inputs[number])
        joins_graph = after.requires_grad and not after.leaf
        if (after.shape, after.stride, after.dtype) != (
            before.shape,
            before.stride,
            before.dtype,
        ) or not joins_graph:
            raise GetNotPermitted(
                "a plan on private data may change the values of its inputs, not their shapes or autograd flags"
            )


def entries_once(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the view of a tensor that has every entry once which an expanded one repeats: a thousand million million
    times, as somebody may want it.
    """
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def in_own_memory(values: tuple[Any, ...], foreseen: Inferred, device: torch.device) -> tuple[Any, ...]:
    """Returns what a plan returned, in memory of its own: where it fails, `placeholder_results` cannot share what the
    plan would have shared."""

    def alone(value: Any, like: Any) -> Any:
        if not isinstance(like, Spec):
            return value
        value = value.detach() if like.leaf else value
        made = torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device=device)
        if made.stride() == value.stride():
            entries_once(made).copy_(entries_once(value))
            return made
        return made.copy_(value)

    return tuple(alone(value, like) for value, like in zip(values, foreseen.results, strict=True))


def written_operands(op: PostedOp, traits: OpTraits, operands: Sequence[Any]) -> list[Any]:
    """Returns those of an op's arguments that it may write to, `operands` being what its `Ref`s stand for."""
    if not traits.calls_plan:
        return traits.written_arguments(op.args, op.kwargs)
    if not operands or not isinstance(operands[0], PlanObject):
        return []
    written = plan_objects.written(operands[0].record.graph(training=op.args[1]), operands[1:])
    refs = [op.args[0], *op.args[2:]]
    return [ref for number, ref in enumerate(refs) if number in written]


def placeholder_results(
    op: PostedOp,
    traits: OpTraits,
    foreseen: Inferred,
    operands: Sequence[Any],
    versions: Sequence[int],
    device: torch.device,
) -> Any:
    """Returns zeros for the results of an op that failed, in the autograd graph that the results would have had.

    `versions` are those of the operands before the op.

    Whether the op failed must not show to who may not read its operands. Such a client sees of an op: an error or
    none, what its results look like, which operands have other versions (autograd refuses a backward pass by them),
    and which leaves have gradients after a pass. All of that has to be the same as if the op had succeeded:

    1. No error: this returns something, and the failure is kept for those who may read it
       (`StoredObject.hidden_failure`).
    2. Results look like what was inferred before the op ran, from the operands' looks alone: shape, stride, dtype,
       flags. Where the op returns an operand itself, that operand is returned.
    3. The values are zeros, which nobody reads who may not read the operands: the results have their label.
    4. A result that would have a history gets one that leads to the same operands, and to a plan's state: the same
       leaves have gradients after a pass, zeros, under the pass's label. (It is that of a linear op: gradients of
       gradients may tell the difference, as ARCHITECTURE.md says under "What privacy does not stop".)
    5. An operand that the op changes in place counts as changed, whether the op came to that or not: it joins the graph
       where the op would have made it join, else its version alone goes up, if it has not yet. Ops that write past
       the version counters leave the version as it is when they succeed, so it stays here too.
    """
    # 1. The caller keeps the failure. What follows needs the operands by their numbers in `foreseen`.
    written = written_operands(op, traits, operands)
    refs = [leaf for leaf in leaves((op.args, op.kwargs)) if isinstance(leaf, Ref)]
    state: Sequence[torch.Tensor] = ()
    if traits.calls_plan:  # inference counts tensors only
        state = operands[0].state
        if refs[0] in written:
            for tensor in state:
                increment_version(tensor)
        operands, versions, refs = operands[1:], versions[1:], refs[1:]
    sources = [one for one in (*operands, *state) if isinstance(one, torch.Tensor) and one.requires_grad]

    # 2 to 4.
    def zeros(like: Spec) -> torch.Tensor:
        made = torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device=device)
        entries_once(made).zero_()
        if like.requires_grad and not like.leaf:
            for source in sources:
                made = made + (source * 0).sum().to(like.dtype)
        return made

    def result(leaf: Any) -> Any:
        if isinstance(leaf, Same):
            return operands[leaf.operand]
        return zeros(leaf) if isinstance(leaf, Spec) else leaf

    results = inference.rebuild(foreseen.results, result)
    # 5.
    changed = dict(foreseen.changed)
    same = {
        leaf.operand
        for leaf in leaves(inference.rebuild(foreseen.results, lambda leaf: leaf))
        if isinstance(leaf, Same)
    }
    for number, (operand, version) in enumerate(zip(operands, versions, strict=True)):
        if refs[number] not in written:
            continue
        like = changed.get(number) or inference.Spec.of(operand)
        # Others are changed behind autograd's back, or the plan that changes them gives them back as they are.
        joins = number in changed or (number in same and not traits.calls_plan)
        if joins and like.requires_grad and not like.leaf and torch.is_grad_enabled():
            operand.add_(zeros(like))
        elif operand._version == version and not traits.writes_unseen:
            increment_version(operand)
    return results


def leaf_tensors(roots: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the tensors at which a backward pass from `roots` accumulates gradients, with ids here or without."""
    nodes = [get_gradient_edge(root).node for root in roots if root.requires_grad]
    met = set(nodes)
    found = []
    while nodes:
        node = nodes.pop()
        if (leaf := getattr(node, "variable", None)) is not None:  # an AccumulateGrad
            found.append(leaf)
        for following, _ in node.next_functions:
            if following is not None and following not in met:
                met.add(following)
                nodes.append(following)
    return found
