"""What a worker does for pointers: posted ops, and calls whose results nobody could foresee. No I/O.

A posted op is not answered. If it fails, its results are kept as failures, so is what depends on them, and the
first of them that is fetched tells why. Operands that a failed op was to change stay as they were; the failure
shows at their next fetch. A failure with no result at all shows at the session's next request.

Of values that a session may not read, it must not learn even whether an op failed on them: zeros then stand in
for the results.

Backward passes are `planrt.workers.machine.backward`; ops on pointers to objects elsewhere are passed on
(`planrt.workers.machine.peers`). With a policy the owner is asked first (`planrt.workers.machine.admission`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from planrt.errors import LocalError, PolicyError
from planrt.plans.ir import ops
from planrt.seeding import seeded
from planrt.serde.values import DEVICE, encode
from planrt.types import Nested, Ref, leaves, map_leaves
from planrt.workers.machine import plan_objects
from planrt.workers.machine.admission import admit, failed_on_data, label_overwritten, readable_label
from planrt.workers.machine.backward import BackwardPasses
from planrt.workers.machine.events import Steps, ToPeer
from planrt.workers.machine.failures import OpFailedError, cut, failure_of_op
from planrt.workers.machine.labels import Label, both
from planrt.workers.machine.objects import KeptObjects, freed_by, tensor_of
from planrt.workers.machine.peers import Outgoing, PeerOps
from planrt.workers.machine.plan_objects import PlanObject
from planrt.workers.machine.private import foresee, stand_in, unaliased, written_operands
from planrt.workers.machine.sessions import Session, users_of
from planrt.workers.machine.store import PeerRef, StoredObject, new_id, spec_of, tensors_of
from planrt.workers.wire import messages as m
from planrt.workers.wire import plan_call
from planrt.workers.wire.posted import PostedOp
from planrt.workers.wire.refusals import GetNotPermitted, NotApproved

_NEW_VERSION_COUNTERS = (*ops.MEMORY_WRITES, "Tensor.data", "torch.as_tensor", "torch.asarray")
"""Ops after which two tensors share memory, but not the version counter by which autograd sees writes."""


@dataclass(frozen=True, slots=True)
class _Result:
    """What an op gave; where it or an op before it is `lost`, a value that stands in."""

    value: Any
    label: Label
    lost: m.Failure | None


class EagerOps:
    """What sessions may compute on the objects of one worker."""

    def __init__(
        self, objects: KeptObjects, passes: BackwardPasses, peers: PeerOps, device: torch.device
    ) -> None:
        self._objects = objects
        self._store = objects.store
        self._gate = objects.gate
        self._passes = passes
        self._peers = peers
        self._device = device

    # ----------------------------------------------------------------------------------- posted ops

    def post(self, session: Session, body: m.Post) -> list[ToPeer]:
        """Runs the ops of `body`; returns what goes on to other workers."""
        outgoing: dict[m.PeerAddress, Outgoing] = {}
        grad_mode = torch.is_grad_enabled()
        try:
            for packed in body.ops:
                self._post_one(session, packed, outgoing)
            self._drop(session, body.drop, outgoing)
        finally:
            torch.set_grad_enabled(grad_mode)
        return [ToPeer(peer, m.Post(out.ops, out.drop)) for peer, out in outgoing.items()]

    def _post_one(self, session: Session, packed: bytes, outgoing: dict[m.PeerAddress, Outgoing]) -> None:
        number = session.posted
        session.posted += 1
        try:
            op = PostedOp.unpack(packed)
        except LocalError as error:
            session.failure = session.failure or m.Failure(
                type(error).__name__, cut(str(error)), number=number
            )
            return
        self._drop(session, op.drop, outgoing)
        if session.halted is not None:
            self._skip(session, op, session.halted)
            return
        used: list[StoredObject] = []
        try:
            made = self._run(session, op, used, outgoing)
            if made is not None:
                self._keep(session, op.results, made.value, made)
        except Exception as error:  # whatever an op raises is its client's to hear, never the worker's end
            refused = isinstance(error, NotApproved | PolicyError)  # nothing was computed
            self._poison(
                session, op, [] if refused else used, failure_of_op(error, op, number, used, self._store)
            )

    def _run(
        self,
        session: Session,
        op: PostedOp,
        used: list[StoredObject],
        outgoing: dict[m.PeerAddress, Outgoing],
    ) -> _Result | None:
        """What the op gave; None if it was passed on to another worker. `used` gets the operands."""
        function = _function(op)
        args, kwargs = self._operands(session, op, used)
        label: Label = None
        passed_on = False
        lost: m.Failure | None = None
        for stored in used:
            self._objects.check_failure(session, stored)
            lost = lost or stored.lost
            label = both(label, self._store.label_of(stored))
            passed_on = passed_on or isinstance(stored.value, PeerRef)
        if passed_on:
            self._peers.pass_on(session, op, used, outgoing)
            return None
        if op.name == "Tensor.grad":
            label = lost = None  # of its own: its memory has a label
        elif op.name == "autograd.grad":
            label = both(label, session.graphs.label)
        elif op.name in _NEW_VERSION_COUNTERS:
            session.graphs.unseen_writes = True
        if op.kwargs.get("out") is not None:
            raise LocalError("workers take no out=: use the result")
        if op.seed is None and (
            op.name in ops.RANDOM or (op.name == plan_call.CALL and plan_objects.called_graph(args).is_random)
        ):
            raise LocalError("an op that draws random numbers needs a seed")
        released, deadline = False, math.inf
        if self._gate is not None:
            released, deadline = admit(self._gate, self._store, session, op, args, used)
            if released:
                label = readable_label(self._store, session, used)
        # A released result has no history: its gradients would be of rows where it is of an aggregate.
        torch.set_grad_enabled(op.grad and not released)
        inner = self._passes.inner() if op.name == "autograd.grad" else []
        retained = self._passes.gradients_before(inner)
        foreseen = None if session.may_read(label) else foresee(op, function, [one.value for one in used])
        before = [] if label is None else [_version(stored.value) for stored in used]
        try:
            if op.name == plan_call.CALL:
                kwargs = {"deadline": deadline}
            result = self._compute(op, function, args, kwargs)
            if foreseen is not None and op.name == plan_call.CALL:
                result = unaliased(result, foreseen, self._device)
        except Exception as error:
            if released and self._gate is not None:
                failed_on_data(self._gate, session, error, plan=plan_objects.called_graph(args).hash)
            if foreseen is None:
                raise
            lost = lost or failure_of_op(error, op, None, used, self._store)
            result = stand_in(op, foreseen, [one.value for one in used], before, self._device)
        finally:  # a failed op may have written some of its values before
            if released:
                label_overwritten(self._store, session, op, used)
            if label is not None:
                self._label_what_changed(session, op, used, before, label)
            if op.name == "autograd.grad":
                self._passes.account(inner, retained, label)
        if op.name == "Tensor.grad" and isinstance(result, torch.Tensor):
            label = self._store.memory.of_gradient(result)
        elif op.name == "Tensor.grad.__set__" and len(used) > 1:
            self._store.memory.account(tensor_of(used[1]), label)
        elif op.name == "Tensor.retain_grad" or op.name == "Tensor.requires_grad_":
            session.leaves[_ids(op.args[0])[0]] = None
            if op.name == "Tensor.retain_grad":
                self._passes.retain(tensor_of(used[0]))
        if lost is not None:
            for operand in written_operands(op, [stored.value for stored in used]):
                if isinstance(operand, Ref):
                    written = self._store.objects[operand.index]
                    written.lost = written.lost or lost
        return _Result(result, label, lost)

    def _compute(
        self, op: PostedOp, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if op.seed is None:
            return function(*args, **kwargs)
        with seeded(op.seed, self._device):
            return function(*args, **kwargs)

    def _operands(
        self, session: Session, op: PostedOp, used: list[StoredObject]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def value_of(leaf: Any) -> Any:
            if type(leaf) is Ref:
                stored = self._store.find(session.id, leaf.index)
                used.append(stored)
                return stored.value
            return self._device if leaf is DEVICE else leaf

        args: tuple[Any, ...] = map_leaves(op.args, value_of)
        kwargs: dict[str, Any] = map_leaves(op.kwargs, value_of) if op.kwargs else {}
        if op.name in ops.FACTORIES and kwargs.get("device") is None and self._device.type != "cpu":
            kwargs["device"] = self._device
        return args, kwargs

    def _keep(self, session: Session, results: Nested, value: Any, of: _Result) -> None:
        """Stores the parts of `value`, of a result, under the ids that `results` gives them."""
        if results is None:
            return
        if isinstance(results, Ref):
            if isinstance(value, PlanObject):
                self._store.add(results.index, StoredObject(value, session.id, of.label, lost=of.lost))
                return
            if not isinstance(value, torch.Tensor):
                raise LocalError(f"the op gave a {type(value).__name__}, not a tensor")
            self._store.add(results.index, StoredObject(value, session.id, of.label, lost=of.lost))
            if value.requires_grad and value.is_leaf:
                session.leaves[results.index] = None
            return
        if (
            not isinstance(results, tuple | list)
            or not isinstance(value, tuple | list)
            or len(results) != len(value)
        ):
            count = len(value) if isinstance(value, tuple | list) else 1
            raise LocalError(f"the op gave {count} results, not as many as were expected")
        for part, item in zip(results, value, strict=True):
            self._keep(session, part, item, of)

    def _skip(self, session: Session, op: PostedOp, failure: m.Failure) -> None:
        """An op after a backward pass whose failure its client has not heard of: nothing runs then."""
        for id in _ids(op.results):
            with contextlib.suppress(LocalError):  # the id is in use, or the worker is full
                self._store.add(id, StoredObject(None, session.id, failure=failure))

    def _poison(
        self, session: Session, op: PostedOp, used: Sequence[StoredObject], failure: m.Failure
    ) -> None:
        label: Label = None
        for stored in used:
            label = both(label, self._store.label_of(stored))
        for id in _ids(op.results):
            try:
                self._store.add(id, StoredObject(None, session.id, label, failure=failure))
            except LocalError:  # the id is in use, or the worker is full
                session.failure = session.failure or failure
        if op.name == plan_call.CALL:  # None stands for a size, and the plan itself is as good as before
            if not _ids(op.results):
                session.failure = session.failure or failure
        elif any(leaf is None for leaf in leaves(op.results)):
            if used:
                used[0].failure = used[0].failure or failure
            else:
                session.failure = session.failure or failure

    def _label_what_changed(
        self,
        session: Session,
        op: PostedOp,
        used: Sequence[StoredObject],
        before: Sequence[int],
        label: Label,
    ) -> None:
        """Gives the op's label to the memory that it wrote to, or may have: also where it failed, since whether it
        failed can depend on private values."""
        written = [
            stored.value
            for stored, version in zip(used, before, strict=True)
            if isinstance(stored.value, torch.Tensor) and _version(stored.value) != version
        ]
        seen = not (op.name == plan_call.CALL or ops.writes_unseen(op.name))
        for operand in written_operands(op, [stored.value for stored in used]):
            if isinstance(operand, Ref):
                written += tensors_of(self._store.objects[operand.index].value)
        for tensor in written:
            self._store.memory.add(tensor, label)
        if written and (session.graphs.unseen_writes or not seen):
            session.graphs.label = both(session.graphs.label, label)

    def _drop(self, session: Session, ids: Sequence[int], outgoing: dict[m.PeerAddress, Outgoing]) -> None:
        for id in ids:
            stored = self._store.drop(session.id, id)
            if stored is None:
                continue
            session.leaves.pop(id, None)
            for peer, freed in freed_by(stored):
                outgoing.setdefault(peer, Outgoing()).drop.extend(freed)

    # ------------------------------------------------------------------------------------- requests

    def call(self, session: Session, body: m.Call) -> Steps:
        """An op whose results the client could not foresee."""
        op = PostedOp.unpack(body.op)
        used: list[StoredObject] = []
        outgoing: dict[m.PeerAddress, Outgoing] = {}
        self._drop(session, op.drop, outgoing)
        yield from [ToPeer(peer, m.Post([], out.drop)) for peer, out in outgoing.items()]
        grad_mode = torch.is_grad_enabled()
        try:
            function_args = self._operands(session, op, used)
            label: Label = None
            for stored in used:
                label = both(label, self._store.label_of(stored))
            if (
                not session.may_read(label) and op.name != plan_call.CALL
            ):  # of which `_run` foresees the results
                raise GetNotPermitted(
                    f"{op.name} on private data: what its results look like depends on the values, and those may be "
                    f"seen by {users_of(label)} only"
                )
            if any(isinstance(stored.value, PeerRef) for stored in used):
                return (yield from self._peers.call(session, op, used))
            del function_args
            used.clear()
            made = self._run(session, op, used, outgoing)
            assert made is not None  # noqa: S101 - passed on above
        except (OpFailedError, GetNotPermitted, NotApproved, PolicyError):
            raise
        except Exception as error:
            raise OpFailedError(failure_of_op(error, op, None, used, self._store)) from error
        finally:
            torch.set_grad_enabled(grad_mode)
        objects: list[tuple[int, m.ObjectSpec]] = []

        def numbered(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            id = new_id()
            self._keep(session, Ref(id), leaf, made)
            objects.append((id, spec_of(leaf)))
            return Ref(len(objects) - 1)

        named = map_leaves(_plain(made.value), numbered)
        return m.Made(encode(named), objects), ()


_OF_PLANS: Final[dict[str, Callable[..., Any]]] = {
    plan_call.CALL: plan_objects.call,
    plan_call.COPY: PlanObject.copy,
    plan_call.STATE: PlanObject.tensors,
}


def _function(op: PostedOp) -> Callable[..., Any]:
    return _OF_PLANS.get(op.name) or ops.lookup_eager(op.name)


def _ids(nested: Nested) -> list[int]:
    return [leaf.index for leaf in leaves(nested) if isinstance(leaf, Ref)]


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) else 0


def _plain(result: Any) -> Any:
    """Named tuples of torch as plain ones."""
    return tuple(result) if isinstance(result, tuple) else result
