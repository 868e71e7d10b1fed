"""What happens when a pointer to a plan is called, copied or asked for its state: one posted op, as for any torch call
on pointers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from planrt.errors import MixedLocationsError
from planrt.plans.running.inference import infer, spec
from planrt.plans.running.interpreter import check_inputs
from planrt.types import Ref, map_leaves
from planrt.workers.pointers.handle import Handle, alive
from planrt.workers.pointers.ops import calling_line, packed, place_of, post
from planrt.workers.pointers.tensor import PointerTensor, make_pointer
from planrt.workers.wire import plan_call
from planrt.workers.wire.objects import contiguous_stride, new_id
from planrt.workers.wire.plan_call import PlanTwin
from planrt.workers.wire.posted import Line, PostedOp

if TYPE_CHECKING:
    from planrt.workers.pointers.plan import PointerPlan


def call_plan(plan: PointerPlan, args: Sequence[Any], kwargs: Mapping[str, Any], seed: int | None) -> Any:
    """Runs `plan` where it is; see `PointerPlan.__call__`."""
    handle = alive(plan)
    graph = plan.graph
    inputs = plan.record.signature.bind(plan.name, args, kwargs)
    operands: list[PointerTensor] = []
    for name, tensor in zip(graph.input_names, inputs, strict=True):
        if (
            not isinstance(tensor, PointerTensor)
            or alive(tensor).worker is not handle.worker
            or tensor._handle.via != handle.via
        ):
            raise MixedLocationsError(
                f"plan {plan.name!r} is on worker {handle.worker.id!r}, its argument {name} in {place_of(tensor)}: "
                + _advice(tensor, inputs)
            )
        operands.append(tensor)
    check_inputs(graph, operands)
    if seed is None and graph.is_random:
        seed = handle.place.draw_seed()
    called = calling_line()
    line: Line | None = (called[0], called[1], weakref.ref(graph)) if called is not None else None
    inferred = infer(plan_call.CALL, plan_call.call_on_meta, (PlanTwin(graph), *operands), {}, PointerTensor)
    wire = (Ref(handle.id), plan.training, *(Ref(one._handle.id) for one in operands))
    values = iter(post(plan_call.CALL, wire, {}, handle, inferred, operands, seed, line))
    if any(one._spec.requires_grad for one in operands):
        handle.place.gradients.histories.rewrite()  # a plan may write to its operands
    return map_leaves(graph.outputs, lambda leaf: next(values) if isinstance(leaf, Ref) else leaf)


def _advice(tensor: object, inputs: Sequence[Any]) -> str:
    if isinstance(tensor, PointerTensor):
        return "move it there with .move(worker)"
    if not getattr(tensor, "in_shares", False):
        return "send it there with .send(worker)"
    if any(isinstance(one, PointerTensor) for one in inputs):
        return (
            "write pointer.fix_precision().share(...).get() of its other arguments with the same workers, or get() the "
            "one in shares"
        )
    return "a plan that is sent runs on pointers; on shares call the plan that is here, which goes to their parties"


def copy_plan(plan: PointerPlan) -> PointerPlan:
    """Makes a copy of the plan on the same worker; returns a pointer to it."""
    from planrt.workers.pointers.plan import PointerPlan  # it imports this module

    handle = alive(plan)
    made = Handle(handle.worker, new_id(), handle.via)
    op = PostedOp(
        plan_call.COPY,
        (Ref(handle.id),),
        {},
        Ref(made.id),
        torch.is_grad_enabled(),
        None,
        handle.place.take_drops(),
    )
    handle.place.post_op(packed(op, handle), calling_line())
    return PointerPlan(
        made, name=plan.name, record=plan._record, origin=plan._origin, training=plan.training,
        description=plan.description,
    )  # fmt: skip


def state_pointers(plan: PointerPlan) -> list[PointerTensor]:
    """Pointers to the tensors of the plan's state on its worker, in the order of its record; posts one op."""
    handle = alive(plan)
    entries = plan.record.state
    if not entries:
        return []
    made = [Handle(handle.worker, new_id(), handle.via) for _ in entries]
    results = tuple([Ref(one.id) for one in made])
    op = PostedOp(
        plan_call.STATE,
        (Ref(handle.id),),
        {},
        results,
        torch.is_grad_enabled(),
        None,
        handle.place.take_drops(),
    )
    handle.place.post_op(packed(op, handle), calling_line())
    likes = [
        spec(one.spec.shape, contiguous_stride(one.spec.shape), one.spec.dtype, one.trainable, True)
        for one in entries
    ]
    return [make_pointer(one, like) for one, like in zip(made, likes, strict=True)]
