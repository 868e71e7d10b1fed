"""Forms of a plan: what it is recorded into for arguments of other sizes, ranks or dtypes than it was built
with.

A plan that still has its Python code is recorded again for such arguments, as `torch.compile` and `jax.jit`
do. Each form is a plan of its own, with its own hash, which a worker is sent and an owner approves by itself;
all share the modules of the plan, so there is one state here. On a worker a form has a copy of the state. So
a plan that writes to its state has no forms there: they would part.
"""

from __future__ import annotations

import secrets
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from planrt.errors import PlanArgumentError, TraceError
from planrt.plans.ir.ops import GRADIENTS, written_operands
from planrt.types import TensorSpec, map_leaves

if TYPE_CHECKING:
    from planrt.plans.ir.graph import Graph
    from planrt.plans.plan import Plan

MOST: Final = 16
"""Forms that are kept for a plan: the one used longest ago goes first."""

Forms = OrderedDict[tuple[TensorSpec, ...], "Plan"]


def form_for(
    plan: Plan,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[torch.Tensor],
    error: PlanArgumentError,
) -> Plan:
    """Returns the form of `plan` that takes `inputs`, recorded if there is none yet. They may be pointers.

    Args:
        plan: a plan that was built.
        args, kwargs: a call of it.
        inputs: the tensors of that call.
        error: why the plan itself does not take them, which is raised where nothing else does.

    Raises:
        PlanArgumentError: the plan is strict, has no Python code, or cannot be recorded for them.
    """
    if fits(plan, inputs):
        raise error  # it is about something else
    for key, form in plan._forms.items():
        if fits(form, inputs):
            plan._forms.move_to_end(key)
            form.training = plan.training
            return form
    if plan.strict or not has_code(plan):
        why = "It is strict" if plan.strict else "It came without its Python code"
        raise PlanArgumentError(f"{error}. {why}, and takes what it was built with: {INSTEAD}") from None
    form = _shadow(plan)
    try:
        form.build(*map_leaves(tuple(args), _example), **map_leaves(dict(kwargs), _example))
    except TraceError as refused:
        raise PlanArgumentError(f"{error}; and it cannot be recorded for these: {refused}") from refused
    plan._forms[tuple(TensorSpec.of(one) for one in inputs)] = form
    while len(plan._forms) > MOST:
        plan._forms.popitem(last=False)
    return form


INSTEAD: Final = (
    "build it with args_shape=[(-1,)], -1 for a size that is free, or with example tensors of these sizes"
)


def has_code(plan: Plan) -> bool:
    """Returns whether the plan has the Python code that it was recorded from."""
    from planrt.plans.plan import Plan  # it imports this module

    return plan._function is not None or type(plan).forward is not Plan.forward


def fits(plan: Any, inputs: Sequence[torch.Tensor]) -> bool:
    """Returns whether the plan (or a pointer to one) was recorded for such tensors."""
    specs = plan.record.graphs[0].inputs
    return len(specs) == len(inputs) and all(
        isinstance(one, torch.Tensor) and spec.accepts(one) for spec, one in zip(specs, inputs, strict=True)
    )


def writes(graph: Graph) -> bool:
    """Returns whether the plan may change its state: whether any op of it writes to anything."""
    return any(op.name in GRADIENTS or written_operands(op.name, op.args, op.kwargs) for op in graph.ops)


def _shadow(plan: Plan) -> Plan:
    """A plan with the same code and modules, themselves and not copies, that was not built yet."""
    made: Plan = object.__new__(type(plan))
    made.__dict__.update(plan.__dict__)
    made._record, made._captured = None, {}
    made._pointers, made._forms = weakref.WeakKeyDictionary(), OrderedDict()
    made._sent_to = weakref.WeakValueDictionary()
    made._tags, made._description = (), ""
    made.id = secrets.randbits(40)
    made.strict = True
    return made


def _example(leaf: Any) -> Any:
    """What stands for an argument that is on a worker, or in shares, while the form is recorded."""
    away = getattr(leaf, "location", None) is not None or getattr(type(leaf), "in_shares", False)
    if not away or not isinstance(leaf, torch.Tensor):
        return leaf
    return torch.zeros(tuple(leaf.shape), dtype=leaf.dtype)
