"""The ops that sessions may post, and what each stage of one hands on to the next. No I/O.

An op goes through five stages (`planrt.workers.machine.eager`)::

    resolve   Resolved   its name and its references are looked up
    admit     Admitted   it may run; on what terms
    foresee   Foreseen   what may change is noted, and what private results will look like
    compute   Result     the function is called
    label     Result     what it returned and what it wrote to may be read by those who may read its operands

Only `Resolved` and `Result` are made for every op: where nothing is private and there is no policy, the other two are
constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from planrt.plans.ir import ops
from planrt.plans.ir.traits import OpTraits
from planrt.plans.running.inference import Inferred
from planrt.workers.machine.backward import GradientsBefore
from planrt.workers.machine.kinds import plan as plan_objects
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.labels import Label
from planrt.workers.wire import messages as m
from planrt.workers.wire import plan_call
from planrt.workers.wire.posted import PostedOp


@dataclass(frozen=True, slots=True)
class Operation:
    """An op that a session may post: what runs, and what sets it apart."""

    function: Callable[..., Any]
    traits: OpTraits


def _operations() -> dict[str, Operation]:
    of_torch = {
        name: Operation(ops.lookup_eager(name), traits)
        for name, traits in ops.TRAITS.items()
        if not traits.plans_only
    }
    of_plans: dict[str, Callable[..., Any]] = {
        plan_call.CALL: plan_objects.call,
        plan_call.COPY: plan_objects.PlanObject.copy,
        plan_call.STATE: plan_objects.PlanObject.tensors,
    }
    return of_torch | {
        name: Operation(function, plan_call.TRAITS[name]) for name, function in of_plans.items()
    }


OPERATIONS: Final = _operations()
"""Name -> op: all that sessions may post, looked up once per op."""


# What the stages hand on.


@dataclass(slots=True)
class Resolved:
    """An op with what its name and its references stand for."""

    op: PostedOp
    operation: Operation
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """As the op has them, with values in place of references."""
    operands: list[StoredObject]
    """What the references stand for, in their order; with `missing` those before the first that is not there."""
    label: Label
    """Who may read what is computed from the operands."""
    elsewhere: bool
    """Whether an operand is a pointer to another worker."""
    missing: bool
    """Whether there is no such op, or not all of its operands are there."""

    @property
    def values(self) -> list[Any]:
        """The values of the operands."""
        return [stored.value for stored in self.operands]


@dataclass(frozen=True, slots=True)
class Admitted:
    """On what terms an op runs."""

    label: Label = None
    """Who may read what it returns and what it writes to."""
    hidden_failure: m.Failure | None = None
    """Of an op before it, so that its operands only stand in for values."""
    released: bool = False
    """Whether an owner's release rules let out what a plan makes of private data."""
    deadline: float = math.inf
    """When a plan must be over, on `time.monotonic`'s clock."""


@dataclass(frozen=True, slots=True)
class Foreseen:
    """Facts from before an op runs, to be compared with what is there after it."""

    results: Inferred | None = None
    """What its results look like, where the session may not learn that from the values."""
    versions: Sequence[int] = ()
    """Versions of the operands, where writes to them have to be labelled."""
    gradients: GradientsBefore = ()
    """Gradients that it may change."""


@dataclass(slots=True)
class Result:
    """The value that an op returned, who may read it, and the failure that it hides if it only stands in for one."""

    value: Any
    label: Label
    hidden_failure: m.Failure | None


UNLABELLED: Final = Admitted()
NOTHING_WATCHED: Final = Foreseen()
UNKNOWN: Final = Operation(ops.lookup_eager, OpTraits(""))
"""Stands for an op that there is not; it is never run."""
