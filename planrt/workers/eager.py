"""What a worker does for pointers: posted ops, and the requests that bring values back. No I/O.

A posted op is not answered. If it fails, its results are kept as failures, so is what depends on them, and the
first of them that is fetched tells why. Operands that a failed op was to change stay as they were; the failure
shows at their next fetch. A failure with no result at all shows at the session's next request.

Of values that a session may not read, it must not learn even whether an op failed on them: zeros then stand in
for the results.

Where operands are pointers to objects on another worker, the op is passed on to that worker, and the results
are pointers again: a chain of any length works alike.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from planrt.errors import ExecutionError, LocalError, PolicyError
from planrt.plans import interpreter, ops
from planrt.plans.graph import Graph
from planrt.seeding import seeded
from planrt.serde.values import DEVICE, encode
from planrt.types import Nested, Ref, TensorSpec, leaves, map_leaves
from planrt.workers import messages as m
from planrt.workers import plan_objects
from planrt.workers.events import Steps, ToPeer
from planrt.workers.gate import Gate, NotApprovedError
from planrt.workers.labels import Label, both
from planrt.workers.objects_kept import KeptObjects, freed_by, grad_of, tensor_of
from planrt.workers.plan_objects import PlanObject
from planrt.workers.posted import PostedOp
from planrt.workers.private import (
    GetNotPermittedError,
    foresee,
    leaf_tensors,
    stand_in,
    unaliased,
    written_operands,
)
from planrt.workers.sessions import OpFailedError, Session, ask, in_plan, users_of
from planrt.workers.store import (
    ObjectStore,
    PeerRef,
    StoredObject,
    new_id,
    spec_of,
    tensors_of,
)

_NEW_VERSION_COUNTERS = (*ops.MEMORY_WRITES, "Tensor.data", "torch.as_tensor", "torch.asarray")
"""Ops after which two tensors share memory, but not the version counter by which autograd sees writes."""


@dataclass(slots=True)
class _Outgoing:
    """What a batch of ops passes on to one peer."""

    ops: list[bytes] = field(default_factory=list)
    drop: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Result:
    """What an op gave; where it or an op before it is `lost`, a value that stands in."""

    value: Any
    label: Label
    lost: m.Failure | None


class EagerOps(KeptObjects):
    """The objects of one worker, and what sessions may compute on them."""

    def __init__(
        self, worker_id: str, store: ObjectStore, device: torch.device, gate: Gate | None = None
    ) -> None:
        super().__init__(worker_id, store, device, gate)
        self._retaining = WeakTensorKeyDictionary()
        """Tensors on which `retain_grad` was called, with ids here or without."""

    # ----------------------------------------------------------------------------------- posted ops

    def post(self, session: Session, body: m.Post) -> list[ToPeer]:
        """Runs the ops of `body`; returns what goes on to other workers."""
        outgoing: dict[m.PeerAddress, _Outgoing] = {}
        grad_mode = torch.is_grad_enabled()
        try:
            for packed in body.ops:
                self._post_one(session, packed, outgoing)
            self._drop(session, body.drop, outgoing)
        finally:
            torch.set_grad_enabled(grad_mode)
        return [ToPeer(peer, m.Post(out.ops, out.drop)) for peer, out in outgoing.items()]

    def _post_one(self, session: Session, packed: bytes, outgoing: dict[m.PeerAddress, _Outgoing]) -> None:
        number = session.posted
        session.posted += 1
        try:
            op = PostedOp.unpack(packed)
        except LocalError as error:
            session.failure = session.failure or m.Failure(type(error).__name__, str(error), number=number)
            return
        self._drop(session, op.drop, outgoing)
        used: list[StoredObject] = []
        try:
            made = self._run(session, op, used, outgoing)
            if made is not None:
                self._keep(session, op.results, made.value, made)
        except Exception as error:  # whatever an op raises is its client's to hear, never the worker's end
            refused = isinstance(error, NotApprovedError | PolicyError)  # nothing was computed
            self._poison(session, op, [] if refused else used, self._failure(error, op, number, used))

    def _run(
        self,
        session: Session,
        op: PostedOp,
        used: list[StoredObject],
        outgoing: dict[m.PeerAddress, _Outgoing],
    ) -> _Result | None:
        """What the op gave; None if it was passed on to another worker. `used` gets the operands."""
        function = _function(op)
        args, kwargs = self._operands(session, op, used)
        label: Label = None
        passed_on = False
        lost: m.Failure | None = None
        for stored in used:
            self.check_failure(session, stored)
            lost = lost or stored.lost
            label = both(label, self.store.label_of(stored))
            passed_on = passed_on or isinstance(stored.value, PeerRef)
        if passed_on:
            self._pass_on(session, op, used, outgoing)
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
            op.name in ops.RANDOM or (op.name == plan_objects.CALL and _graph(args).is_random)
        ):
            raise LocalError("an op that draws random numbers needs a seed")
        released, deadline = False, math.inf
        if self.gate is not None:
            released, deadline = self._admit(session, op, args, used)
            if released:
                label = self._readable_label(session, used)
        # A released result has no history: its gradients would be of rows where it is of an aggregate.
        torch.set_grad_enabled(op.grad and not released)
        retained = self._retained_gradients() if op.name == "autograd.grad" else {}
        foreseen = None if session.may_read(label) else foresee(op, function, [one.value for one in used])
        before = [] if label is None else [_version(stored.value) for stored in used]
        try:
            if op.name == plan_objects.CALL:
                kwargs = {"deadline": deadline}
            result = self._compute(op, function, args, kwargs)
            if foreseen is not None and op.name == plan_objects.CALL:
                result = unaliased(result, foreseen, self._device)
        except Exception as error:
            if foreseen is None:
                raise
            lost = lost or self._failure(error, op, None, used)
            result = stand_in(op, foreseen, [one.value for one in used], before, self._device)
        finally:  # a failed op may have written some of its values before
            if released:
                self._label_held(session, op, used)
            if label is not None:
                self._label_what_changed(session, op, used, before, label)
            if op.name == "autograd.grad":
                self._label_retained(retained, label)
        if op.name == "Tensor.grad.__set__" and len(used) > 1:
            self.store.memory.add(tensor_of(used[1]), label)
        elif op.name == "Tensor.retain_grad" or op.name == "Tensor.requires_grad_":
            session.leaves[_ids(op.args[0])[0]] = None
            if op.name == "Tensor.retain_grad":
                self._retaining[tensor_of(used[0])] = None
        if lost is not None:
            for operand in written_operands(op, [stored.value for stored in used]):
                if isinstance(operand, Ref):
                    written = self.store.objects[operand.index]
                    written.lost = written.lost or lost
        return _Result(result, label, lost)

    def _admit(
        self, session: Session, op: PostedOp, args: tuple[Any, ...], used: Sequence[StoredObject]
    ) -> tuple[bool, float]:
        """Whether what a plan gives of private data may be released, and when it must be over.

        Raises:
            NotApprovedError, PolicyError: it may not run.
        """
        assert self.gate is not None  # noqa: S101 - asked by the caller
        if op.name != plan_objects.CALL:
            if op.name != plan_objects.COPY:
                self.gate.admit_op(op.name)
            return False, math.inf
        graph = _graph(args)
        interpreter.check_inputs(graph, args[2:])
        tags: dict[int, frozenset[str]] = {}
        others = not session.may_read(self.store.label_of(used[0]))  # the plan's own state
        for place, stored in enumerate(used[1:]):
            if session.may_read(self.store.label_of(stored)):
                continue
            source = self.store.source_of(stored)
            if source is None:
                others = True
            else:
                tags[place] = source
        self.gate.admit(graph, [TensorSpec.of(tensor) for tensor in args[2:]], tags)
        released = bool(tags) and not others and all(self.gate.covers(one) for one in tags.values())
        if released:
            self._check_memory(graph, args[0], args[2:])
        return released, self.gate.deadline()

    @staticmethod
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

    def _readable_label(self, session: Session, used: Sequence[StoredObject]) -> Label:
        """The label of what is computed from those operands that the session may read."""
        label: Label = None
        for stored in used:
            own = self.store.label_of(stored)
            if session.may_read(own):
                label = both(label, own)
        return label

    def _label_held(self, session: Session, op: PostedOp, used: Sequence[StoredObject]) -> None:
        """Private inputs of a released plan that it wrote to are no longer the data that its owner put here."""
        for operand in written_operands(op, [stored.value for stored in used]):
            stored = self.store.objects[operand.index]
            own = self.store.label_of(stored)
            if isinstance(stored.value, torch.Tensor) and not session.may_read(own):
                self.store.memory.add(stored.value, own)

    def _compute(
        self, op: PostedOp, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if op.seed is None:
            return function(*args, **kwargs)
        with seeded(op.seed, self._device):
            return function(*args, **kwargs)

    def _retained_gradients(self) -> dict[int, tuple[torch.Tensor | None, Label]]:
        return {
            id(tensor): (tensor.grad, self._grad_label(tensor))
            for tensor in self._retaining
            if tensor.retains_grad
        }

    def _label_retained(self, before: dict[int, tuple[torch.Tensor | None, Label]], label: Label) -> None:
        """Labels the gradients that a pass left at inner tensors, which retain theirs."""
        for tensor in list(self._retaining):
            grad = tensor.grad if tensor.retains_grad else None
            old, old_label = before.get(id(tensor), (None, None))
            if grad is not None and grad is not old:
                self.store.memory.add(grad, both(label, old_label))

    def _grad_label(self, tensor: torch.Tensor) -> Label:
        grad = grad_of(tensor)
        return None if grad is None else self.store.memory.of(grad)

    def _operands(
        self, session: Session, op: PostedOp, used: list[StoredObject]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def value_of(leaf: Any) -> Any:
            if type(leaf) is Ref:
                stored = self.store.find(session.id, leaf.index)
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
                self.store.add(results.index, StoredObject(value, session.id, of.label, lost=of.lost))
                return
            if not isinstance(value, torch.Tensor):
                raise LocalError(f"the op gave a {type(value).__name__}, not a tensor")
            self.store.add(
                results.index,
                StoredObject(value, session.id, of.label, lost=of.lost),
            )
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

    def _poison(
        self, session: Session, op: PostedOp, used: Sequence[StoredObject], failure: m.Failure
    ) -> None:
        label: Label = None
        for stored in used:
            label = both(label, self.store.label_of(stored))
        for id in _ids(op.results):
            try:
                self.store.add(id, StoredObject(None, session.id, label, failure=failure))
            except LocalError:  # the id is in use, or the worker is full
                session.failure = session.failure or failure
        if op.name == plan_objects.CALL:  # None stands for a size, and the plan itself is as good as before
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
        seen = not (op.name == plan_objects.CALL or ops.writes_unseen(op.name))
        for operand in written_operands(op, [stored.value for stored in used]):
            if isinstance(operand, Ref):
                written += tensors_of(self.store.objects[operand.index].value)
        for tensor in written:
            self.store.memory.add(tensor, label)
        if written and (session.graphs.unseen_writes or not seen):
            session.graphs.label = both(session.graphs.label, label)

    # ---------------------------------------------------------------------------- pointers to pointers

    def _pass_on(
        self,
        session: Session,
        op: PostedOp,
        used: Sequence[StoredObject],
        outgoing: dict[m.PeerAddress, _Outgoing],
    ) -> None:
        peer = self._common_peer(used)

        def there(leaf: Any) -> Any:
            return Ref(self._peer_id(session, leaf.index)) if isinstance(leaf, Ref) else leaf

        def made(leaf: Any) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            ref = PeerRef(peer, new_id())
            self.store.add(leaf.index, StoredObject(ref, session.id))
            return Ref(ref.id)

        passed = replace(
            op, args=map_leaves(op.args, there), kwargs=map_leaves(op.kwargs, there),
            results=map_leaves(op.results, made), drop=(),
        )  # fmt: skip
        outgoing.setdefault(peer, _Outgoing()).ops.append(passed.pack())

    def _common_peer(self, used: Sequence[StoredObject]) -> m.PeerAddress:
        peers = {stored.value.peer if isinstance(stored.value, PeerRef) else None for stored in used}
        if len(peers) > 1:
            places = sorted(self._worker_id if peer is None else peer.worker for peer in peers)
            raise LocalError(f"operands on different workers: {' and '.join(places)}")
        (peer,) = peers
        if peer is None:
            raise LocalError("not a pointer to another worker")
        return peer

    def _peer_id(self, session: Session, id: int) -> int:
        value = self.store.find(session.id, id).value
        if not isinstance(value, PeerRef):
            raise LocalError(f"object {id} is not a pointer to another worker")
        return value.id

    def _drop(self, session: Session, ids: Sequence[int], outgoing: dict[m.PeerAddress, _Outgoing]) -> None:
        for id in ids:
            stored = self.store.drop(session.id, id)
            if stored is None:
                continue
            session.leaves.pop(id, None)
            for peer, freed in freed_by(stored):
                outgoing.setdefault(peer, _Outgoing()).drop.extend(freed)

    # ------------------------------------------------------------------------------------- requests

    def call(self, session: Session, body: m.Call) -> Steps:
        """An op whose results the client could not foresee."""
        op = PostedOp.unpack(body.op)
        used: list[StoredObject] = []
        outgoing: dict[m.PeerAddress, _Outgoing] = {}
        self._drop(session, op.drop, outgoing)
        yield from [ToPeer(peer, m.Post([], out.drop)) for peer, out in outgoing.items()]
        grad_mode = torch.is_grad_enabled()
        try:
            function_args = self._operands(session, op, used)
            label: Label = None
            for stored in used:
                label = both(label, self.store.label_of(stored))
            if (
                not session.may_read(label) and op.name != plan_objects.CALL
            ):  # of which `_run` foresees the results
                raise GetNotPermittedError(
                    f"{op.name} on private data: what its results look like depends on the values, and those may be "
                    f"seen by {users_of(label)} only"
                )
            if any(isinstance(stored.value, PeerRef) for stored in used):
                return (yield from self._call_peer(session, op, used))
            del function_args
            used.clear()
            made = self._run(session, op, used, outgoing)
            assert made is not None  # noqa: S101 - passed on above
        except (OpFailedError, GetNotPermittedError, NotApprovedError, PolicyError):
            raise
        except Exception as error:
            raise OpFailedError(self._failure(error, op, None, used)) from error
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

    def _call_peer(self, session: Session, op: PostedOp, used: Sequence[StoredObject]) -> Steps:
        peer = self._common_peer(used)

        def there(leaf: Any) -> Any:
            return Ref(self._peer_id(session, leaf.index)) if isinstance(leaf, Ref) else leaf

        passed = replace(op, args=map_leaves(op.args, there), kwargs=map_leaves(op.kwargs, there), drop=())
        answer = yield from ask(peer, m.Call(passed.pack()))
        if not isinstance(answer, m.Made):
            raise LocalError(f"worker {peer.worker!r} answered with {type(answer).__name__}")
        made = []
        for there_id, spec in answer.objects:
            id = new_id()
            self.store.add(id, StoredObject(PeerRef(peer, there_id), session.id))
            made.append((id, spec))
        return m.Made(answer.results, made), ()

    def backward(self, session: Session, body: m.Backward) -> Steps:
        """A backward pass; says which objects have gradients then."""
        if not body.roots:
            raise LocalError("a backward pass starts somewhere: no tensors were given")
        if len(body.roots) != len(body.gradients):
            raise LocalError(
                f"{len(body.roots)} tensors and {len(body.gradients)} gradients for them do not fit"
            )
        roots = [self.ready(session, id) for id in body.roots]
        given = [None if id is None else self.ready(session, id) for id in body.gradients]
        inputs = None if body.inputs is None else [self.ready(session, id) for id in body.inputs]
        everything = [*roots, *(one for one in given if one is not None), *(inputs or [])]
        if any(isinstance(stored.value, PeerRef) for stored in everything):
            return (yield from self._backward_there(session, body, everything))
        label = session.graphs.label
        for stored in everything:
            label = both(label, self.store.label_of(stored))
        if self.gate is not None:
            self.gate.admit_op("Tensor.backward")
        labelled = label is not None or bool(self.store.memory)
        reached = leaf_tensors([tensor_of(stored) for stored in inputs or roots]) if labelled else []
        labels = [both(label, self._grad_label(tensor)) for tensor in reached]
        retained = self._retained_gradients() if labelled else {}
        with torch.enable_grad():
            try:
                torch.autograd.backward(
                    [tensor_of(stored) for stored in roots],
                    [None if one is None else tensor_of(one) for one in given],
                    retain_graph=body.retain_graph,
                    create_graph=body.create_graph,
                    inputs=None if inputs is None else [tensor_of(stored) for stored in inputs],
                )
            except Exception as error:
                op = PostedOp("Tensor.backward", (), {}, None, True)
                raise OpFailedError(self._failure(error, op, None, everything)) from error
            finally:  # a pass that fails may have left gradients before
                for tensor, its_label in zip(reached, labels, strict=True):
                    if tensor.grad is not None:  # the old one and what was added to it
                        self.store.memory.add(tensor.grad, its_label)
                self._label_retained(retained, label)
        return m.Gradients(list(self._gradients(session))), ()

    def _gradients(self, session: Session) -> Iterator[tuple[int, m.ObjectSpec]]:
        for id in list(session.leaves):
            stored = self.store.objects.get(id)
            if stored is None or stored.owner != session.id:
                del session.leaves[id]  # handed over
            elif isinstance(stored.value, torch.Tensor) and (grad := grad_of(stored.value)) is not None:
                yield id, spec_of(grad)

    def _backward_there(
        self, session: Session, body: m.Backward, everything: Sequence[StoredObject]
    ) -> Steps:
        peer = self._common_peer(everything)
        answer = yield from ask(
            peer,
            m.Backward(
                [self._peer_id(session, id) for id in body.roots],
                [None if id is None else self._peer_id(session, id) for id in body.gradients],
                body.retain_graph,
                body.create_graph,
                None if body.inputs is None else [self._peer_id(session, id) for id in body.inputs],
            ),
        )
        if not isinstance(answer, m.Gradients):
            raise LocalError(f"worker {peer.worker!r} answered with {type(answer).__name__}")
        here = {
            stored.value: id for id, stored in self.store.of(session.id) if isinstance(stored.value, PeerRef)
        }
        found = [(here.get(PeerRef(peer, id)), spec) for id, spec in answer.objects]
        return m.Gradients([(id, spec) for id, spec in found if id is not None]), ()

    def _failure(
        self, error: Exception, op: PostedOp, number: int | None, used: Sequence[StoredObject]
    ) -> m.Failure:
        """`error` as the client is told of it; of private operands nothing is told."""
        if isinstance(error, OpFailedError):
            return error.failure
        kind = type(error).__name__
        if isinstance(error, GetNotPermittedError | NotApprovedError):
            return m.Failure(kind, str(error), op.name, number=number)
        if isinstance(error, PolicyError):  # of shapes and ops, never of values
            return m.Failure(
                kind, str(error), error.op or op.name, error.line, index=error.index, number=number
            )
        if any(self.store.label_of(stored) is not None for stored in used):
            return m.Failure(
                "ExecutionError", f"op {op.name} failed; its operands are private, so the worker does not say why",
                op.name, number=number,
            )  # fmt: skip
        reason = (str(error).strip().splitlines() or [kind])[0]
        text = reason if isinstance(error, LocalError) else f"op {op.name} failed: {reason}"
        trace = "".join(traceback.format_exception(error))
        kind = kind if isinstance(error, LocalError) else "ExecutionError"
        inside = in_plan(error) if isinstance(error, ExecutionError) else {"op": op.name}
        return m.Failure(kind, text[:60_000], traceback=trace[-60_000:], number=number, **inside)


def _function(op: PostedOp) -> Callable[..., Any]:
    if op.name == plan_objects.CALL:
        return plan_objects.call
    return PlanObject.copy if op.name == plan_objects.COPY else ops.lookup_eager(op.name)


def _graph(args: tuple[Any, ...]) -> Graph:
    if len(args) < 2 or not isinstance(args[0], PlanObject):
        raise LocalError("a call names a plan, its mode, and its inputs")
    return args[0].record.graph(training=args[1] is True)


def _share_memory(tensors: Sequence[torch.Tensor]) -> bool:
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
    return len(places) < sum(1 for tensor in tensors if tensor.numel())


def _ids(nested: Nested) -> list[int]:
    return [leaf.index for leaf in leaves(nested) if isinstance(leaf, Ref)]


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) else 0


def _plain(result: Any) -> Any:
    """Named tuples of torch as plain ones."""
    return tuple(result) if isinstance(result, tuple) else result
