"""Whether one op of a session may run under the owner's policy, and whether what it gives is released. No I/O.

The gate (`planrt.workers.machine.gate`) knows plans and rules, and nothing of sessions and objects. Here it is told
of these: which inputs of a plan are data that the session may not read, and with which tags. Apart from
`planrt.workers.machine.eager`, because a worker without a policy needs none of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from planrt.errors import ExecutionError, PolicyError, SharingError
from planrt.logs import get_logger
from planrt.plans.ir.graph import Graph
from planrt.plans.ir.traits import OpTraits
from planrt.plans.running import interpreter
from planrt.types import Ref, TensorSpec, leaves, map_leaves
from planrt.workers.machine.gate import Gate
from planrt.workers.machine.kinds import plan as plan_objects
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.kinds.plan import PlanObject
from planrt.workers.machine.labels import Label, join
from planrt.workers.machine.private import written_operands
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.store import ObjectStore
from planrt.workers.wire.posted import PostedOp

log = get_logger("planrt.worker")
_GRAD: Final = inspect.signature(torch.autograd.grad)


def admit(
    gate: Gate,
    store: ObjectStore,
    session: Session,
    op: PostedOp,
    traits: OpTraits,
    args: tuple[Any, ...],
    operands: Sequence[StoredObject],
) -> tuple[bool, float]:
    """Asks whether an op may run on the `operands`, which `args` have the values of. Says whether what a plan gives
    of private data may be released, and when it must be over.

    Raises:
        NotApproved, PolicyError: it may not run.
    """
    if not traits.calls_plan:
        if not traits.needs_no_policy:
            gate.admit_op(traits.name)
            if traits.computes_gradients or not traits.data_independent:
                values = iter([stored.value for stored in operands])
                filled = map_leaves(
                    (op.args, op.kwargs), lambda one: next(values) if type(one) is Ref else one
                )
                if traits.computes_gradients:
                    flops = _admit_gradients(gate, traits.name, *filled)
                else:
                    flops = gate.admit_size(op.name, *filled)
                store.spend(session.id, op.name, flops)
        return False, math.inf
    graph = plan_objects.called_graph(args)
    interpreter.check_inputs(graph, args[2:])
    tags: dict[int, frozenset[str]] = {}
    others = not session.may_read(store.label_of(operands[0]))  # the plan's own state
    for place, stored in enumerate(operands[1:]):
        if session.may_read(store.label_of(stored)):
            continue
        source = store.source_of(stored)
        if source is None:
            others = True
        else:
            tags[place] = source
    constants = args[0].constants() if gate.policy.approval != "open" else ()
    on = sorted({one for names in tags.values() for one in names})
    session.asks_for([gate.approving.asked(graph, constants, session.user, on)])
    report = gate.admit(graph, [TensorSpec.of(tensor) for tensor in args[2:]], tags, constants=constants)
    released = bool(tags) and not others and all(gate.covers(one) for one in tags.values())
    if released:
        check_failures(gate, session)
    store.spend(session.id, f"plan {graph.name!r}", report.totals.flops)
    if released:
        _check_memory(graph, args[0], args[2:])
    return released, gate.deadline()


def _admit_gradients(gate: Gate, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Raises unless `torch.autograd.grad` on these arguments keeps to the owner's limits; returns how many operations
    it computes."""
    given = _GRAD.bind(*args, **kwargs).arguments
    roots, inputs, gradients = (_tensors(given.get(word)) for word in ("outputs", "inputs", "grad_outputs"))
    batched = bool(given.get("is_grads_batched")) and gradients and gradients[0].dim()
    return gate.admit_pass(
        name, roots, inputs, create_graph=bool(given.get("create_graph")),
        times=len(gradients[0]) if batched else 1,
    )  # fmt: skip


def _tensors(nested: Any) -> list[torch.Tensor]:
    return [leaf for leaf in leaves(nested) if isinstance(leaf, torch.Tensor)]


def admit_shared(
    gate: Gate,
    session: Session,
    graph: Graph,
    given: Sequence[torch.Tensor | TensorSpec],
    about: str,
) -> None:
    """Asks whether a plan may run on shares. `given` are its inputs and then its state, of what is in shares the spec.
    `about` says among whom they are. Nothing of private data
    is released by it: results are as private as operands.

    Raises:
        NotApproved, PolicyError: it may not run. SharingError: a constant of the plan is in shares, so nobody could say
            what was approved.
    """
    count = len(graph.inputs)
    state = given[count:]
    for entry, tensor in zip(graph.state, state, strict=True):
        if entry.kind == "constant" and not isinstance(tensor, torch.Tensor):
            raise SharingError(f"a constant of plan {graph.name!r} is in shares: give it as an argument")
    filled = [
        one if isinstance(one, torch.Tensor) else torch.empty(one.shape, dtype=one.dtype, device="meta")
        for one in state
    ]
    constants = gate.approving.constants(graph, filled)
    gate.approving.asked(graph, constants, session.user, [about])
    specs = [one if isinstance(one, TensorSpec) else TensorSpec.of(one) for one in given[:count]]
    gate.admit(graph, specs, constants=constants)


def check_failures(gate: Gate, session: Session) -> None:
    """Raises unless a run on data which the session may not see could fail: that would tell its client something.

    Raises:
        PolicyError: so many of its user's have, today.
    """
    seconds = gate.failures.seconds(session.counts_for, nobody=session.user is None)
    if seconds:
        raise PolicyError(
            f"{gate.policy.max_daily_failures} runs of yours failed on data that you may not see, as many as the owner "
            "lets a user's runs fail in a day, over all sessions: [max_daily_failures] nothing of yours runs on such "
            f"data for the next {math.ceil(seconds):,} s; what else you do goes on",
            rule="max_daily_failures",
        )


def failed_on_data(gate: Gate, session: Session, error: Exception, **on: Any) -> None:
    """Counts a run that failed on data which the session may not see, and tells the owner; `on` says on what.

    That it failed is a fact about the data, so a session has only so many of them, and a user in all sessions. The
    reason is for who looks at the worker's debug log: it can hold a value.
    """
    counted = session if session.by is None else session.by.client  # or each ticket would bring more of them
    counted.failures += 1
    most = gate.policy.max_failures
    counted.over = counted.over or (most is not None and counted.failures >= most)
    session.failures, session.over = counted.failures, counted.over
    seconds = gate.failures.add(session.counts_for, nobody=session.user is None)
    failed = error.op if isinstance(error, ExecutionError) else ""
    log.warning(
        "failed_on_private_data", user=session.user or "nobody", session=session.id, op=failed,
        kind=type(error).__name__, failures=session.failures, ended=session.over, **on,
    )  # fmt: skip
    if seconds:
        log.warning(
            "no_more_failures", user=session.user or "nobody", whose=session.counts_for, seconds=seconds
        )
        gate.auditor.no_more_failures(session)
    log.debug("failed_on_private_data", session=session.id, exc_info=error)


def readable_label(store: ObjectStore, session: Session, operands: Sequence[StoredObject]) -> Label:
    """Returns the label of what is computed from those operands that the session may read."""
    label: Label = None
    for stored in operands:
        own = store.label_of(stored)
        if session.may_read(own):
            label = join(label, own)
    return label


def label_overwritten(
    store: ObjectStore, session: Session, op: PostedOp, traits: OpTraits, operands: Sequence[StoredObject]
) -> None:
    """Private inputs of a released plan that it wrote to are no longer the data that its owner put here."""
    for operand in written_operands(op, traits, [stored.value for stored in operands]):
        stored = store.objects[operand.index]
        own = store.label_of(stored)
        if isinstance(stored.value, torch.Tensor) and not session.may_read(own):
            store.memory.add(stored.value, own)


def _check_memory(graph: Graph, plan: PlanObject, inputs: Sequence[torch.Tensor]) -> None:
    """Raises unless the operands of a plan lie in memory as the analysis of plans takes for granted.

    Raises:
        PolicyError: what would be released of private data cannot be told.
    """
    if not plan_objects.written(graph, inputs):
        return
    everything = [*inputs, *plan.state]
    if _share_memory(everything) or not all(tensor.is_contiguous() for tensor in everything):
        raise PolicyError(
            f"plan {graph.name!r} writes in place, and two of its inputs share memory or one is not contiguous: "
            "what would be released of private data cannot be told; pass x.clone() for such an input",
            rule="release",
        )


def _share_memory(tensors: Sequence[torch.Tensor]) -> bool:
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
    return len(places) < sum(1 for tensor in tensors if tensor.numel())
