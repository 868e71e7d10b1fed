"""Plans as objects of a worker: an op list with its state, called like any other op. No I/O.

A call of a plan is one posted op, `CALL`, whose first operand is the plan's object. So it is pipelined, fails and
is labelled as ops are; what it does in between is the interpreter's.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch

from planrt.errors import LocalError, PlanArgumentError
from planrt.plans.ir import ops
from planrt.plans.ir.constants import Constant, constants_of
from planrt.plans.ir.graph import Graph
from planrt.plans.ir.record import PlanRecord
from planrt.plans.policy.quotas import PLAN_BYTES
from planrt.plans.running import interpreter
from planrt.plans.running.inference import Spec
from planrt.types import Ref
from planrt.workers.machine.events import Answer, Steps
from planrt.workers.machine.kinds.base import ObjectKind, StoredObject
from planrt.workers.machine.kinds.tensor import shared_copy
from planrt.workers.machine.labels import Label, MemoryLabels
from planrt.workers.machine.rounds.sent_plans import check_size
from planrt.workers.machine.sessions import Session, allowed_list, ask
from planrt.workers.wire import messages as m
from planrt.workers.wire.plan_call import meta_state, output_values

_MOST_FORMS: Final = 64
"""Forms of a plan's inputs for which it is known what a call writes to."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class PlanObject:
    """A plan that a worker holds for a client."""

    record: PlanRecord
    state: list[torch.Tensor]
    training: bool
    _constants: tuple[Constant, ...] | None = None

    @property
    def bare(self) -> bool:
        """Returns whether its state is given with every call."""
        return bool(self.record.state) and not self.state

    def constants(self) -> tuple[Constant, ...]:
        """Returns its constants as they were when this was first asked for, without values.

        A worker that wants plans approved asks before the first run. What planrt records never writes to constants;
        what another approved plan writes to them later is its own doing.
        """
        if self._constants is None:
            found = constants_of(self.record.graphs[0], self.state)
            self._constants = tuple([Constant(one.digest) for one in found])
        return self._constants

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Returns its state, each tensor itself."""
        return tuple(self.state)

    def record_bytes(self) -> torch.Tensor:
        """Returns its record, as it travels."""
        return torch.frombuffer(bytearray(self.record.to_bytes()), dtype=torch.uint8)

    def parts(self) -> list[torch.Tensor]:
        """Returns all of it, as it travels: its record, and its state."""
        return [self.record_bytes(), *(one.detach() for one in self.state)]

    def copy(self) -> PlanObject:
        """Returns a plan with a state of its own."""
        return PlanObject(self.record, [_again(tensor, tensor.detach().clone()) for tensor in self.state],
                          self.training, self._constants)  # fmt: skip

    def snapshot(self) -> PlanObject:
        """Returns the same plan, sharing memory until somebody writes."""
        with torch.no_grad():
            return PlanObject(
                self.record,
                [_again(tensor, shared_copy(tensor)) for tensor in self.state],
                self.training,
                self._constants,
            )


def _again(like: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return value.requires_grad_(like.requires_grad)


class PlanKind(ObjectKind[PlanObject]):
    """Plans, with the tensors of their state."""

    python_type = PlanObject
    name: ClassVar[Literal["plan"]] = "plan"
    made_by_ops = True

    def tensors(self, value: PlanObject) -> Sequence[torch.Tensor]:
        """Returns the tensors of its state."""
        return value.state

    def bytes_beside(self, value: PlanObject) -> int:
        """Returns what its ops take."""
        return len(value.record.to_bytes()) * PLAN_BYTES

    def can_be_found(self, value: PlanObject) -> bool:
        """Returns True."""
        return True

    def snapshot(self, value: PlanObject) -> PlanObject:
        """Returns a plan whose state shares the memory until somebody writes."""
        return value.snapshot()

    def found(self, id: int, stored: StoredObject, *, private: bool, snapshot: bool) -> m.FoundItem:
        """Returns its name and its mode, with its tags."""
        plan: PlanObject = stored.value
        return m.FoundItem(
            id, None, list(stored.tags), stored.description, private, snapshot, self.name,
            plan.record.name[:200], plan.training,
        )  # fmt: skip

    def read(self, value: PlanObject, id: int) -> Answer:
        """Returns its record."""
        return m.FetchedPlan(value.training), [value.record_bytes()]

    def fetch(
        self, session: Session, id: int, stored: StoredObject, label: Label, memory: MemoryLabels
    ) -> Steps:
        """Returns its record and its state."""
        yield from ()  # asks nobody
        plan: PlanObject = stored.value
        return m.FetchedPlan(plan.training, allowed_list(label)), plan.parts()

    def move(self, stored: StoredObject, body: m.Move, label: Label) -> Steps:
        """Sends its record and its state; a copy is not sent."""
        plan: PlanObject = stored.value
        if body.copy:
            raise LocalError("copies of plans are not sent on: copy() it, and move the copy")
        message = m.StorePlan(
            body.target, plan.training, list(stored.tags), stored.description, allowed_list(label), body.token,
            bare=plan.bare,
        )  # fmt: skip
        yield from ask(body.peer, message, plan.parts())
        return m.Done(), ()


def new_plan_object(
    record: PlanRecord,
    state: Sequence[torch.Tensor],
    *,
    training: bool,
    device: torch.device,
    bare: bool = False,
) -> PlanObject:
    """Returns a plan's object with that state, which it owns from here on; `bare`, without any.

    Raises:
        PlanArgumentError: tensors that are not its state.
    """
    if bare and not state:
        return PlanObject(record, [], training)
    interpreter.check_state(record.graphs[0], state)
    held = [
        tensor.detach().to(device).requires_grad_(entry.trainable)
        for entry, tensor in zip(record.state, state, strict=True)
    ]
    return PlanObject(record, held, training)


def call(
    plan: PlanObject, training: bool, *inputs: torch.Tensor, deadline: float = math.inf
) -> tuple[Any, ...]:
    """Runs a plan; returns the values that its outputs refer to, in their order. `deadline` is on `time.monotonic`'s
    clock, in seconds.

    Raises:
        PlanError, PlanArgumentError, ExecutionError: as the interpreter has them.
    """
    if not isinstance(plan, PlanObject) or type(training) is not bool:
        raise PlanArgumentError("a call names a plan, its mode, and its inputs")
    graph = plan.record.graph(training=training)
    try:
        return output_values(graph, interpreter.execute(graph, inputs, plan.state, deadline=deadline))
    finally:
        # State that was written to keeps the values, not the graph: it would grow with every call.
        plan.state[:] = [tensor if tensor.grad_fn is None else tensor.detach() for tensor in plan.state]


def called_graph(args: tuple[Any, ...]) -> Graph:
    """Returns the graph that a call with these arguments runs.

    Raises:
        LocalError: they are no call's.
    """
    if len(args) < 2 or not isinstance(args[0], PlanObject):
        raise LocalError("a call names a plan, its mode, and its inputs")
    return args[0].record.graph(training=args[1] is True)


def _find_written(graph: Graph, specs: tuple[Spec, ...]) -> frozenset[int]:
    everything = frozenset(range(1 + len(specs)))
    count = len(graph.inputs)

    def position(ref: Ref) -> frozenset[int]:
        if ref.index >= count + len(graph.state):
            return everything  # memory of a value in between, which may be anybody's
        return frozenset({ref.index + 1 if ref.index < count else 0})

    found: frozenset[int] = frozenset()
    for op in graph.ops:
        traits = ops.TRAITS[op.name]
        if traits.writes_unseen:
            for operand in traits.written_arguments(op.args, op.kwargs):
                found |= position(operand) if isinstance(operand, Ref) else frozenset()
    inputs, state = [one.twin() for one in specs], meta_state(graph)
    tensors = [*inputs, *state]
    before = [tensor._version for tensor in tensors]
    try:
        interpreter.execute(graph, inputs, state, device="meta")
    except Exception:  # it cannot be told without values
        return everything
    for index, (tensor, version) in enumerate(zip(tensors, before, strict=True)):
        if tensor._version != version:
            found |= position(Ref(index))
    return found


def written(graph: Graph, inputs: Sequence[torch.Tensor]) -> frozenset[int]:
    """Returns which operands of a call may be written to: 0 for the plan's state, 1 and up for its inputs."""
    known: dict[object, frozenset[int]] = graph.__dict__.setdefault("_written", {})  # goes with the plan
    specs = tuple([Spec.of(one) for one in inputs])
    key = (specs, torch.is_grad_enabled())
    found = known.get(key)
    if found is None:
        if len(known) >= _MOST_FORMS:
            known.clear()
        found = known[key] = _find_written(graph, specs)
    return found


_records: weakref.WeakValueDictionary[str, PlanRecord] = weakref.WeakValueDictionary()
"""Records that some worker of this process holds: many virtual workers share one, and its compiled programs."""


def record_of(data: torch.Tensor) -> PlanRecord:
    """Returns the record that arrived as bytes.

    Raises:
        PlanFormatError, OpNotAllowedError: as `PlanRecord.from_bytes`. PlanError: it is too long.
    """
    check_size(data)
    raw = data.numpy().tobytes()
    key = hashlib.sha256(raw).hexdigest()
    record = _records.get(key)
    if record is None:
        record = _records[key] = PlanRecord.from_bytes(raw)
    return record
