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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planrt.errors import LocalError, PolicyError
from planrt.plans.ir import ops
from planrt.plans.running import progress
from planrt.seeding import seeded
from planrt.serde.values import DEVICE, encode
from planrt.types import Nested, Ref, leaves, map_leaves
from planrt.workers.machine.admission import admit, failed_on_data, label_overwritten, readable_label
from planrt.workers.machine.audit import about, shapes_of
from planrt.workers.machine.backward import BackwardPasses
from planrt.workers.machine.events import Steps, ToPeer
from planrt.workers.machine.failures import OpFailedError, cut, failure_of_op
from planrt.workers.machine.kinds import plan as plan_objects
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.kinds.tensor import spec_of, tensor_of
from planrt.workers.machine.labels import Label, join
from planrt.workers.machine.objects import KeptObjects
from planrt.workers.machine.operations import (
    NOTHING_WATCHED,
    OPERATIONS,
    UNKNOWN,
    UNLABELLED,
    Admitted,
    Foreseen,
    Resolved,
    Result,
)
from planrt.workers.machine.peers import Forwarded, PeerOps
from planrt.workers.machine.private import in_own_memory, infer_results, placeholder_results, written_operands
from planrt.workers.machine.sessions import Session, users_of
from planrt.workers.machine.sharing.parties import PartyOps
from planrt.workers.machine.store import new_id
from planrt.workers.machine.waiting import Exchange
from planrt.workers.wire import messages as m
from planrt.workers.wire import shared_plan
from planrt.workers.wire.posted import PROGRAM, PostedOp
from planrt.workers.wire.refusals import GetNotPermitted, NotApproved, UnknownObject

_SHORT_OP = 1 << 14
"""Bytes of an op that is unpacked to see whether it takes long."""


@dataclass(slots=True)
class Posted:
    """The outcome of a message of ops."""

    sends: list[ToPeer]
    """For other workers."""
    run: Exchange | None = None
    """The run of a program on shares, before which nothing else of it runs."""
    left: m.Post | None = None
    """What has not been run."""


class EagerOps:
    """Runs the ops of sessions on the objects of one worker."""

    def __init__(
        self,
        objects: KeptObjects,
        passes: BackwardPasses,
        peers: PeerOps,
        parties: PartyOps,
        device: torch.device,
    ) -> None:
        self._objects = objects
        self._store = objects.store
        self._kinds = objects.store.kinds
        self._gate = objects.gate
        self._audit = objects.audit
        self._passes = passes
        self._peers = peers
        self._parties = parties
        self._looked_at: tuple[bytes, PostedOp] | None = None
        """What `is_short` has unpacked, for `post`."""
        self._peer_ops: dict[str, Callable[[Session, PostedOp, int], Exchange]] = {
            PROGRAM: parties.run,
            shared_plan.CALL: parties.run,
        }
        """Ops that may have to wait for other workers before they have results."""
        self._device = device

    # ----------------------------------------------------------------------------------- posted ops

    def post(self, session: Session, body: m.Post, over: Callable[[], bool]) -> Posted:
        """Runs the ops of `body` until the turn is `over`, one of them at least, or until one is a program on shares,
        which may have to wait for other workers.
        """
        forwarded = Forwarded()
        grad_mode = torch.is_grad_enabled()
        try:
            for number, packed in enumerate(body.ops, 1):
                run = self._post_one(session, packed, forwarded)
                left = number < len(body.ops) or body.drop
                if run is not None or (number < len(body.ops) and over()):
                    rest = m.Post(body.ops[number:], body.drop) if left else None
                    return Posted(forwarded.messages(), run, rest)
            self._drop(session, body.drop, forwarded)
        finally:
            torch.set_grad_enabled(grad_mode)
        return Posted(forwarded.messages())

    def is_short(self, session: Session, body: m.Post) -> bool:
        """Returns whether `post` takes no more than a moment for `body`, as far as is known: it is a program on shares
        that has run before, or lets go of shares.
        """
        if not body.ops:
            return self._parties.are_parts(body.drop)
        if len(body.ops) != 1 or self._gate is not None or len(body.ops[0]) > _SHORT_OP:
            return False
        try:
            op = PostedOp.unpack(body.ops[0])
        except LocalError:
            return False
        self._looked_at = body.ops[0], op
        dropped = (*op.drop, *body.drop)
        return self._parties.is_short_run(session, op, dropped)

    def _unpacked(self, packed: bytes) -> PostedOp:
        looked_at, self._looked_at = self._looked_at, None
        if looked_at is not None and looked_at[0] is packed:
            return looked_at[1]
        return PostedOp.unpack(packed)

    def _post_one(self, session: Session, packed: bytes, forwarded: Forwarded) -> Exchange | None:
        number = session.posted
        session.posted += 1
        try:
            op = self._unpacked(packed)
        except LocalError as error:
            session.failure = session.failure or m.Failure(
                type(error).__name__, cut(str(error)), number=number
            )
            return None
        if op.drop:
            self._drop(session, op.drop, forwarded)
        if session.halted is not None:
            self._skip(session, op, session.halted)
            return None
        start = self._peer_ops.get(op.name)
        if start is not None:
            return start(session, op, number)
        resolved = self._resolve(session, op)
        try:
            if resolved.elsewhere:
                self._check_ready(session, resolved)
                forwarded.op(*self._peers.pass_on(session, op, resolved.operands))
            else:
                result = self._run(session, resolved)
                self._check_room(session, result.value)
                self._keep(session, op.results, result.value, result)
        except Exception as error:  # whatever an op raises is its client's to hear, never the worker's end
            self._poison(session, resolved, error, number)
        return None

    # ------------------------------------------------------------------------- the stages of one op

    def _run(self, session: Session, resolved: Resolved) -> Result:
        """Runs an op whose operands are here, which `_resolve` has found: the other stages, in their order."""
        admitted = self._admit(session, resolved)
        # A released result has no history: its gradients would be of rows where it is of an aggregate.
        torch._C._set_grad_enabled(resolved.op.grad and not admitted.released)
        foreseen = self._foresee(session, resolved, admitted)
        try:
            result = self._compute(session, resolved, admitted, foreseen)
        finally:  # an op that fails may have written before, and whether it fails can depend on private values
            self._label_written(session, resolved, admitted, foreseen)
        result = self._label_result(session, resolved, result)
        if self._store.limits(session.id):
            # An op that writes in place may return nothing, and has a node of its own all the same.
            there = leaves([_plain(result.value), *resolved.values])
            self._store.keep_graphs(session.id, [one for one in there if isinstance(one, torch.Tensor)])
        if resolved.operation.traits.calls_plan and self._audit.on:
            new = result.hidden_failure if admitted.hidden_failure is None else None
            outcome = {"outcome": "done"} if new is None else {"outcome": "failed", "kind": new.kind}
            shapes = shapes_of(result.value) if admitted.released else None
            self._log_call(session, resolved, released=admitted.released, shapes=shapes, **outcome)
        return result

    def _resolve(self, session: Session, op: PostedOp) -> Resolved:
        """Finds the op and its operands by their names. It never raises: where something is missing, those operands
        that are there still say who may hear of it."""
        operation = OPERATIONS.get(op.name)
        operands: list[StoredObject] = []
        if operation is None:
            return Resolved(op, UNKNOWN, (), {}, operands, None, elsewhere=False, missing=True)
        label: Label = None
        elsewhere = missing = False
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}

        def value_of(leaf: Any) -> Any:
            nonlocal label, elsewhere
            if type(leaf) is Ref:
                stored = self._store.find(session.id, leaf.index)
                operands.append(stored)
                label = join(label, self._store.label_of(stored))
                elsewhere = elsewhere or self._kinds.of(stored.value).elsewhere
                return stored.value
            return self._device if leaf is DEVICE else leaf

        try:
            args = map_leaves(op.args, value_of)
            if op.kwargs:
                kwargs = map_leaves(op.kwargs, value_of)
        except UnknownObject:
            missing = True
        if operation.traits.factory and kwargs.get("device") is None and self._device.type != "cpu":
            kwargs["device"] = self._device
        return Resolved(op, operation, args, kwargs, operands, label, elsewhere, missing)

    def _admit(self, session: Session, resolved: Resolved) -> Admitted:
        """Raises unless the op may run: its operands are ready, it has the seed that it needs, and the owner's policy
        allows it. Nothing has been computed or written to before."""
        op, traits, label = resolved.op, resolved.operation.traits, resolved.label
        hidden_failure = self._check_ready(session, resolved)
        if traits.reads_gradient:
            label = hidden_failure = None  # of its own: its memory has a label
        elif traits.computes_gradients:
            label = join(label, session.graphs.label)
        elif traits.new_version_counter:
            session.graphs.unseen_writes = True
        if op.kwargs and op.kwargs.get("out") is not None:
            raise LocalError("workers take no out=: use the result")
        if op.seed is None and (
            traits.random or (traits.calls_plan and plan_objects.called_graph(resolved.args).is_random)
        ):
            raise LocalError("an op that draws random numbers needs a seed")
        if traits.copies_plan and resolved.args:
            self._objects.check_copy(session, resolved.args[0])
        if self._gate is not None:
            released, deadline = admit(
                self._gate, self._store, session, op, traits, resolved.args, resolved.operands
            )
            if released:
                label = readable_label(self._store, session, resolved.operands)
            return Admitted(label, hidden_failure, released, deadline)
        if label is None and hidden_failure is None:
            return UNLABELLED
        return Admitted(label, hidden_failure)

    def _foresee(self, session: Session, resolved: Resolved, admitted: Admitted) -> Foreseen:
        """Notes what the op may change. Where the session may not read what it computes from, also what its results
        will look like, told from what the operands look like; raises where that depends on their values."""
        traits, label = resolved.operation.traits, admitted.label
        if label is None and not traits.computes_gradients:
            return NOTHING_WATCHED
        gradients = self._passes.before_autograd_grad() if traits.computes_gradients else ()
        results = None
        if not session.may_read(label):
            results = infer_results(resolved.op, traits, resolved.operation.function, resolved.values)
        versions = () if label is None else [_version(value) for value in resolved.values]
        return Foreseen(results, versions, gradients)

    def _compute(
        self, session: Session, resolved: Resolved, admitted: Admitted, foreseen: Foreseen
    ) -> Result:
        """Calls the function. Where the results were foreseen it returns some that look like that, whether the op
        fails or not; else it raises what the op raises."""
        op, traits, function = resolved.op, resolved.operation.traits, resolved.operation.function
        args, kwargs = resolved.args, resolved.kwargs
        if traits.calls_plan:
            kwargs = {"deadline": admitted.deadline}
        progress.began(op.name)
        try:
            if op.seed is None:
                value = function(*args, **kwargs)
            else:
                with seeded(op.seed, self._device):
                    value = function(*args, **kwargs)
            if foreseen.results is not None and traits.calls_plan:
                value = in_own_memory(value, foreseen.results, self._device)
            return Result(value, admitted.label, admitted.hidden_failure)
        except Exception as error:
            if admitted.released and self._gate is not None:
                failed_on_data(self._gate, session, error, plan=plan_objects.called_graph(args).hash)
            if foreseen.results is None:
                raise
            hidden_failure = admitted.hidden_failure or failure_of_op(error, op, None, private=True)
            if not traits.calls_plan:
                self._audit.op_failed(session, op.name, error, private=True)
            value = placeholder_results(
                op, traits, foreseen.results, resolved.values, foreseen.versions, self._device
            )
            return Result(value, admitted.label, hidden_failure)

    def _label_written(
        self, session: Session, resolved: Resolved, admitted: Admitted, foreseen: Foreseen
    ) -> None:
        """Gives the op's label to all memory that it wrote to, or may have, whether it failed or not."""
        op, traits = resolved.op, resolved.operation.traits
        if admitted.released:
            label_overwritten(self._store, session, op, traits, resolved.operands)
        if admitted.label is not None:
            self._label_operands(session, resolved, admitted.label, foreseen.versions)
        if traits.computes_gradients:
            self._passes.account(foreseen.gradients, admitted.label)

    def _label_result(self, session: Session, resolved: Resolved, result: Result) -> Result:
        """Sees to it that what the op returned has the label of what it was made from, and operands that it should
        have changed the failure that it hides."""
        traits, operands = resolved.operation.traits, resolved.operands
        if traits.reads_gradient and isinstance(result.value, torch.Tensor):
            result.label = self._store.memory.of_gradient(result.value)
        elif traits.sets_gradient and len(operands) > 1:
            self._store.memory.account(tensor_of(operands[1]), result.label)
            self._store.may_keep_itself(tensor_of(operands[0]))
        elif traits.gains_gradient:
            session.leaves[_ids(resolved.op.args[0])[0]] = None
            if traits.retains_gradient:
                self._passes.retain(tensor_of(operands[0]))
        if result.hidden_failure is not None:
            for operand in written_operands(resolved.op, traits, resolved.values):
                if isinstance(operand, Ref):
                    written = self._store.objects[operand.index]
                    written.hidden_failure = written.hidden_failure or result.hidden_failure
        return result

    # ------------------------------------------------------------------------ what the stages share

    def _log_call(self, session: Session, resolved: Resolved, **facts: Any) -> None:
        labels = [self._store.label_of(stored) for stored in resolved.operands]
        graph = plan_objects.called_graph(resolved.args)
        approved = self._gate is not None and self._gate.policy.approval != "open"
        constants = resolved.args[0].constants() if approved else ()
        self._audit.called(session, graph, constants, resolved.operands, labels, **facts)

    def _log_failure(self, session: Session, resolved: Resolved, error: Exception) -> None:
        """The owner's log has what was refused, and what failed on private data."""
        if not self._audit.on:
            return
        plan = resolved.args[0] if len(resolved.args) > 1 else None
        if resolved.operation.traits.calls_plan and isinstance(plan, plan_objects.PlanObject):
            self._log_call(session, resolved, **about(error))
        else:
            private = self._label_of_all(resolved.operands) is not None
            self._audit.op_failed(session, resolved.op.name, error, private=private)

    def _check_found(self, session: Session, resolved: Resolved) -> None:
        """Raises what keeps an op from being resolved."""
        if not resolved.missing:
            return
        if resolved.operation is UNKNOWN:
            ops.lookup_eager(resolved.op.name)
        for id in _ids((resolved.op.args, resolved.op.kwargs)):
            self._store.find(session.id, id)

    def _check_ready(self, session: Session, resolved: Resolved) -> m.Failure | None:
        """Raises what keeps the operands from having values; returns the first failure that one of them hides."""
        self._check_found(session, resolved)
        hidden: m.Failure | None = None
        for stored in resolved.operands:
            if stored.failure is not None or stored.hidden_failure is not None:
                self._objects.check_failure(session, stored)
                hidden = hidden or stored.hidden_failure
        return hidden

    def _keep(self, session: Session, results: Nested, value: Any, of: Result) -> None:
        """Stores the parts of `value`, of a result, under the ids that `results` gives them."""
        if results is None:
            return
        if isinstance(results, Ref):
            kind = self._kinds.find(value)
            if kind is None or not kind.made_by_ops:
                raise LocalError(f"the op gave a {type(value).__name__}, not a tensor")
            self._store.add(
                results.index, StoredObject(value, session.id, of.label, hidden_failure=of.hidden_failure)
            )
            if kind.gains_gradient(value):
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

    def _check_room(self, session: Session, value: Any) -> None:
        """Raises unless all results may be kept: all of them are, or none."""
        if self._store.limits(session.id) and isinstance(value, tuple | list):
            tensors = [one for one in leaves(value) if isinstance(one, torch.Tensor)]
            self._store.check_room(session.id, tensors, objects=len(tensors))

    def _skip(self, session: Session, op: PostedOp, failure: m.Failure) -> None:
        """An op after a backward pass whose failure its client has not heard of: nothing runs then."""
        for id in _ids(op.results):
            with contextlib.suppress(LocalError):  # the id is in use, or the worker is full
                self._store.add(id, StoredObject(None, session.id, failure=failure))

    def _poison(self, session: Session, resolved: Resolved, error: Exception, number: int) -> None:
        """Keeps the failure of a posted op as its results. An operand that it was to change tells it at the next fetch;
        if there is nobody else to tell it, the session's next request does."""
        op, operands = resolved.op, resolved.operands
        self._log_failure(session, resolved, error)
        label = self._label_of_all(operands)
        failure = failure_of_op(error, op, number, private=label is not None)
        if isinstance(error, NotApproved | PolicyError):  # nothing was computed from them
            label, operands = None, []
        for id in _ids(op.results):
            try:
                self._store.add(id, StoredObject(None, session.id, label, failure=failure))
            except LocalError:  # the id is in use, or the worker is full
                session.failure = session.failure or failure
        if (
            resolved.operation.traits.calls_plan
        ):  # None stands for a size, the plan itself is as good as before
            if not _ids(op.results):
                session.failure = session.failure or failure
        elif any(leaf is None for leaf in leaves(op.results)):
            if operands:
                operands[0].failure = operands[0].failure or failure
            else:
                session.failure = session.failure or failure

    def _label_of_all(self, operands: Sequence[StoredObject]) -> Label:
        label: Label = None
        for stored in operands:
            label = join(label, self._store.label_of(stored))
        return label

    def _label_operands(
        self, session: Session, resolved: Resolved, label: Label, versions: Sequence[int]
    ) -> None:
        """Labels the memory of those operands that were written to since they had these `versions`, and of those that
        the op may write to."""
        traits = resolved.operation.traits
        written = [
            value
            for value, version in zip(resolved.values, versions, strict=True)
            if isinstance(value, torch.Tensor) and value._version != version
        ]
        for operand in written_operands(resolved.op, traits, resolved.values):
            if isinstance(operand, Ref):
                written += self._store.tensors_of(self._store.objects[operand.index])
        for tensor in written:
            self._store.memory.add(tensor, label)
        unseen = session.graphs.unseen_writes or traits.calls_plan or traits.writes_unseen
        if written and unseen:
            session.graphs.label = join(session.graphs.label, label)

    def _drop(self, session: Session, ids: Sequence[int], forwarded: Forwarded) -> None:
        for id in ids:
            stored = self._store.drop(session.id, id)
            if stored is None:
                continue
            session.leaves.pop(id, None)
            for peer, freed in self._objects.freed_by(stored):
                forwarded.drop(peer, freed)

    # ------------------------------------------------------------------------------------- requests

    def call(self, session: Session, body: m.Call) -> Steps:
        """Runs an op whose results the client could not foresee; answers with ids for them, and what they look like."""
        op = PostedOp.unpack(body.op)
        forwarded = Forwarded()
        self._drop(session, op.drop, forwarded)
        yield from forwarded.messages()
        resolved = self._resolve(session, op)
        grad_mode = torch.is_grad_enabled()
        try:
            self._check_found(session, resolved)
            # What a plan returns is foreseen, as it is for posted ops; of other ops that are called it cannot be.
            if not (session.may_read(resolved.label) or resolved.operation.traits.calls_plan):
                raise GetNotPermitted(
                    f"{op.name} on private data: what its results look like depends on the values, and those may be "
                    f"seen by {users_of(resolved.label)} only"
                )
            if resolved.elsewhere:
                return (yield from self._peers.call(session, op, resolved.operands))
            made = self._run(session, resolved)
            self._check_room(session, _plain(made.value))
        except (OpFailedError, GetNotPermitted, NotApproved, PolicyError) as error:
            self._log_failure(session, resolved, error)
            raise
        except Exception as error:
            self._log_failure(session, resolved, error)
            private = self._label_of_all(resolved.operands) is not None
            raise OpFailedError(failure_of_op(error, op, None, private=private)) from error
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
        if self._audit.on and not resolved.operation.traits.calls_plan:
            self._audit.told(session, op.name, resolved.operands, resolved.label)
        return m.Made(encode(named), objects), ()


def _ids(nested: Nested) -> list[int]:
    return [leaf.index for leaf in leaves(nested) if isinstance(leaf, Ref)]


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) else 0


def _plain(result: Any) -> Any:
    """Named tuples of torch as plain ones."""
    return tuple(result) if isinstance(result, tuple) else result
