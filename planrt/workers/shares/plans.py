"""Plans on shares, as their client sees them: sent once to each party, and called by one message to each."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from planrt.errors import OptionError, SharingError
from planrt.plans.ir.graph import Graph
from planrt.plans.ir.record import PlanRecord
from planrt.sharing.kernels.parts import digest
from planrt.sharing.programs.lowering import Argument, Looks, Lowered, Made
from planrt.sharing.programs.preflight import Preflight, cost
from planrt.sharing.programs.ranges import Interval
from planrt.sharing.tensors.batches import Value
from planrt.sharing.tensors.shared import SharedTensor, brought
from planrt.types import Ref, map_leaves
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import new_id
from planrt.workers.wire.posted import PostedOp
from planrt.workers.wire.shared_plan import CALL, lowered_plan

if TYPE_CHECKING:
    from planrt.workers.shares.session import WorkersSession

_PLANS = 64
_KNOWN = 64
_KNOWN_BYTES = 1 << 26
"""Plans, and tensors that all know, that the parties keep for one session."""


class SharedPlans:
    """The plans that the parties of one session have, and the tensors that all know of their arguments."""

    def __init__(self, session: WorkersSession) -> None:
        self._session = session
        self._plans: OrderedDict[str, int] = OrderedDict()
        """Hash of a record -> its id at the parties."""
        self._known: OrderedDict[Any, tuple[int, int]] = OrderedDict()
        """Looks and digest of a tensor -> its id at the parties, and its bytes."""
        self._known_bytes = 0

    def call(
        self,
        record: PlanRecord,
        inputs: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
        *,
        training: bool,
    ) -> Any:
        """Runs a plan at the parties; see `SharingSession.call_plan`."""
        tensors = [*inputs, *state]
        try:
            tensors = [self._brought(one) for one in tensors]
        except SharingError:  # of other parties: the operation that they meet in says so
            return NotImplemented
        if not all(self._takes(one) for one in tensors):
            return NotImplemented
        graph = record.graph(training=training)
        known = [_looks(one) for one in tensors]
        grad = torch.is_grad_enabled()
        lowered = lowered_plan(graph, known, scale=self._session.scale, grad=grad)
        if lowered is None or lowered.has_history:
            return NotImplemented
        shared = [one for one in tensors if isinstance(one, SharedTensor)]
        own = [one for one in (*inputs, *state) if isinstance(one, SharedTensor)]
        if any(own[number] is not shared[number] for number in lowered.changed):
            return NotImplemented  # it is to change, and not the copy here
        values = self._post(record, training, tensors, known, lowered, grad) if lowered.program.calls else {}
        for number in lowered.changed:
            torch.autograd.graph.increment_version(shared[number])

        def result(leaf: Any) -> Any:
            if isinstance(leaf, Argument):
                given = shared[leaf.number]
                return SharedTensor(self._session, given.handle, given.shape, given.dtype)
            if isinstance(leaf, Made):
                return SharedTensor(
                    self._session, values[leaf.number], leaf.shape, leaf.dtype,
                    strides=leaf.strides, offset=leaf.offset,
                )  # fmt: skip
            return leaf

        return map_leaves(lowered.results, result)

    def _brought(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns whole numbers of another session of the same parties in this one; all else as it is."""
        if isinstance(tensor, SharedTensor) and not tensor.is_floating_point():
            return brought(tensor, self._session, "plan", [tensor])
        return tensor

    def _takes(self, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, SharedTensor):
            return tensor.session is self._session and tensor.is_contiguous()
        return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"

    def _post(
        self,
        record: PlanRecord,
        training: bool,
        tensors: Sequence[torch.Tensor],
        known: Sequence[Looks | torch.Tensor],
        lowered: Lowered,
        grad: bool,
    ) -> dict[int, Value]:
        session = self._session
        wanted = lowered.wanted
        with session.in_turn():
            plan = self._plan(record, training)
            refs: list[Ref] = []
            for tensor, one in zip(tensors, known, strict=True):
                if isinstance(tensor, SharedTensor):
                    refs.append(Ref(tensor.handle.place))
                elif isinstance(one, torch.Tensor):
                    refs.append(Ref(self._of_all(one)))
            looks = tuple(
                [
                    (one.shape, one.dtype, one.requires_grad) if isinstance(one, Looks) else None
                    for one in known
                ]
            )
            program = lowered.program
            numbers = range(program.operands, program.values)
            made = {number: Value(session, place=new_id()) for number in numbers if number in wanted}
            results = tuple([Ref(made[number].place) if number in made else None for number in numbers])
            args = (session.group, Ref(plan), training, lowered.identity, looks, tuple(refs))
            session.post_op(PostedOp(CALL, args, {}, results, grad))
            self._forget_oldest()
        return made

    def _plan(self, record: PlanRecord, training: bool) -> int:
        id = self._plans.get(record.hash)
        if id is None:
            id = self._plans[record.hash] = new_id()
            data = torch.frombuffer(bytearray(record.to_bytes()), dtype=torch.uint8)
            self._session.post_to_all(m.StorePlan(id, training, bare=True), [data])
        self._plans.move_to_end(record.hash)
        return id

    def _of_all(self, tensor: torch.Tensor) -> int:
        """Returns the id of a tensor that all parties know, which is sent unless they have it."""
        key = tensor.dtype, tuple(tensor.shape), digest(tensor)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = new_id(), tensor.nbytes
            self._known_bytes += tensor.nbytes
            self._session.post_to_all(m.Put([m.PutItem(found[0])]), [tensor.contiguous().clone()])
        self._known.move_to_end(key)
        return found[0]

    def _forget_oldest(self) -> None:
        while len(self._known) > _KNOWN or self._known_bytes > _KNOWN_BYTES:
            id, nbytes = self._known.popitem(last=False)[1]
            self._known_bytes -= nbytes
            self._session._forget(id)
        while len(self._plans) > _PLANS:
            self._session._forget(self._plans.popitem(last=False)[1])


def check_shared(
    session: WorkersSession,
    graph: Graph,
    inputs: Sequence[torch.Tensor],
    state: Sequence[torch.Tensor],
    bounds: Mapping[str, Any],
) -> Preflight:
    """Returns what a plan will cost on these arguments; see `Plan.check`.

    Raises:
        SharingError: arguments of different sessions, or a plan that has no program of its own.
        OptionError: bounds of no argument in shares, or that are none.
    """
    tensors = [*inputs, *state]
    names = [*graph.input_names, *[entry.name for entry in graph.state]]
    shared = {name: one for name, one in zip(names, tensors, strict=True) if isinstance(one, SharedTensor)}
    for one in shared.values():
        if one.session is not session and (one.is_floating_point() or not session.is_of(one.session)):
            raise SharingError("the arguments are shared by different parties, precisions or providers")
    for name in bounds:
        if name not in shared:
            raise OptionError(f"bounds: {name!r} is no argument in shares; there are {', '.join(shared)}")
    known = [_looks(one) for one in tensors]
    lowered = lowered_plan(graph, known, scale=session.scale, grad=torch.is_grad_enabled())
    if lowered is None:
        raise SharingError(
            f"plan {graph.name!r} runs op by op: it draws random numbers, changes in place what all know, or returns "
            "nothing in shares"
        )
    given = [_interval(name, bounds.get(name)) for name in shared]
    return cost(
        lowered, list(shared.values()), parties=len(session.parties), scale=session.scale, bounds=given
    )


def _looks(tensor: torch.Tensor) -> Looks | torch.Tensor:
    if isinstance(tensor, SharedTensor):
        return Looks(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
    return tensor.detach()


def _interval(name: str, given: Any) -> Interval | None:
    if given is None:
        return None
    try:
        low, high = (float(one) for one in given)
    except (TypeError, ValueError):
        raise OptionError(
            f"bounds: {name} has a least and a greatest value, (low, high), not {given!r}"
        ) from None
    if not low <= high or math.isinf(low) or math.isinf(high):
        raise OptionError(f"bounds: {name} is from {low:g} to {high:g}, which is no range")
    return low, high
