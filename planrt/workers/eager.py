"""What a worker does for pointers: posted ops, and the requests that bring values back. No I/O.

A posted op is not answered. If it fails, its results are kept as failures, so is what depends on them, and the
first of them that is fetched tells why. Operands that a failed op was to change stay as they were; the failure
shows at their next fetch. A failure with no result at all shows at the session's next request.

Where operands are pointers to objects on another worker, the op is passed on to that worker, and the results
are pointers again: a chain of any length works alike.
"""

from __future__ import annotations

import hmac
import secrets
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from planrt.errors import LocalError
from planrt.plans import ops
from planrt.seeding import seeded
from planrt.serde.values import DEVICE, encode
from planrt.types import Nested, Ref, leaves, map_leaves
from planrt.workers import messages as m
from planrt.workers.events import Answer, Steps, ToPeer, Wait
from planrt.workers.posted import PostedOp
from planrt.workers.store import (
    Label,
    ObjectStore,
    PeerRef,
    StoredObject,
    UnknownObjectError,
    both,
    new_id,
    spec_of,
)

_OWN_MEMORY_BYTES = 1 << 20
"""Tensors that arrived together share one block of memory; up to this size they get memory of their own."""

_GRAD_READS = ("Tensor.grad",)
_GRAD_WRITES = ("Tensor.grad.__set__",)
_MEMORY_WRITES = ("Tensor.data.__set__", "Tensor.set_")
_UNMARKED_WRITES = {
    "torch.batch_norm": (3, 4),
    "nn.functional.batch_norm": (1, 2),
    "nn.functional.instance_norm": (1, 2),
}
"""Ops that change operands in place without saying so in their version counters: running statistics."""


class GetNotPermittedError(LocalError):
    """Reported to the client under this kind."""


class OpFailedError(LocalError):
    """Carries a failure that is already in the client's words."""

    def __init__(self, failure: m.Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(slots=True)
class Session:
    """One client's session on this worker. `user` is None for a client that showed no token."""

    id: str
    user: str | None = None
    posted: int = 0
    """Ops taken so far."""
    failure: m.Failure | None = None
    """Of an op or message that left no result; shows at the next request."""
    leaves: dict[int, None] = field(default_factory=dict)
    """Objects that a backward pass may give a gradient to."""
    optimizer_states: dict[tuple[str, str, str], Any] = field(default_factory=dict)

    def may_read(self, label: Label) -> bool:
        """Whether this session's user may read what has that label."""
        return label is None or (self.user is not None and self.user in label)


@dataclass(slots=True)
class _Outgoing:
    """What a batch of ops passes on to one peer."""

    ops: list[bytes] = field(default_factory=list)
    drop: list[int] = field(default_factory=list)


class EagerOps:
    """The objects of one worker, and what sessions may do with them."""

    def __init__(self, worker_id: str, store: ObjectStore, device: torch.device) -> None:
        self._worker_id = worker_id
        self.store = store
        self._device = device

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
            result, label = self._run(session, op, used, outgoing)
            if result is not None:
                self._keep(session, op.results, result, label)
        except Exception as error:  # whatever an op raises is its client's to hear, never the worker's end
            self._poison(session, op, used, _failure(error, op, number, used))

    def _run(
        self,
        session: Session,
        op: PostedOp,
        used: list[StoredObject],
        outgoing: dict[m.PeerAddress, _Outgoing],
    ) -> tuple[Any, Label]:
        """The op's result and its label; (None, None) if it was passed on. `used` gets the operands."""
        function = ops.lookup_eager(op.name)
        args, kwargs = self._operands(session, op, used)
        label: Label = None
        passed_on = False
        for stored in used:
            if stored.failure is not None:
                raise OpFailedError(stored.failure)
            label = both(label, stored.label)
            passed_on = passed_on or isinstance(stored.value, PeerRef)
        if passed_on:
            self._pass_on(session, op, used, outgoing)
            return None, None
        if op.name in _GRAD_READS:
            label = used[0].grad_label
        torch.set_grad_enabled(op.grad)
        before = [] if label is None else [_version(stored.value) for stored in used]
        if op.seed is None:
            result = function(*args, **kwargs)
        else:
            with seeded(op.seed, self._device):
                result = function(*args, **kwargs)
        if label is not None:
            self._label_what_changed(op, used, before, label)
        if op.name in _MEMORY_WRITES:
            used[0].label = both(used[0].label, label)
        elif op.name in _GRAD_WRITES:
            used[0].grad_label = used[1].label if len(used) > 1 else None
        elif op.name == "Tensor.retain_grad" or op.name == "Tensor.requires_grad_":
            session.leaves[_ids(op.args[0])[0]] = None
        return result, label

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

    def _keep(self, session: Session, results: Nested, value: Any, label: Label) -> None:
        """Stores the parts of `value` under the ids that `results` gives them."""
        if results is None:
            return
        if isinstance(results, Ref):
            if not isinstance(value, torch.Tensor):
                raise LocalError(f"the op gave a {type(value).__name__}, not a tensor")
            self.store.add(results.index, StoredObject(value, session.id, label))
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
            self._keep(session, part, item, label)

    def _poison(
        self, session: Session, op: PostedOp, used: Sequence[StoredObject], failure: m.Failure
    ) -> None:
        label: Label = None
        for stored in used:
            label = both(label, stored.label)
        ids = _ids(op.results)
        for id in ids:
            if id in self.store.objects:
                session.failure = session.failure or failure
            else:
                self.store.add(id, StoredObject(None, session.id, label, failure=failure))
        if any(leaf is None for leaf in leaves(op.results)):
            if used:
                used[0].failure = used[0].failure or failure
                if isinstance(used[0].value, torch.Tensor):
                    self.store.share_label(
                        used[0].value, label
                    )  # it may have been written to before it failed
            else:
                session.failure = session.failure or failure

    def _label_what_changed(
        self, op: PostedOp, used: Sequence[StoredObject], before: Sequence[int], label: Label
    ) -> None:
        for stored, version in zip(used, before, strict=True):
            if isinstance(stored.value, torch.Tensor) and _version(stored.value) != version:
                self.store.share_label(stored.value, label)
        for position in _UNMARKED_WRITES.get(op.name, ()):
            if position < len(op.args) and isinstance(op.args[position], Ref):
                value = self.store.objects[op.args[position].index].value
                if isinstance(value, torch.Tensor):
                    self.store.share_label(value, label)
        for name in ("running_mean", "running_var"):
            if isinstance(op.kwargs.get(name), Ref):
                value = self.store.objects[op.kwargs[name].index].value
                if isinstance(value, torch.Tensor):
                    self.store.share_label(value, label)

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
            session.leaves.pop(id, None)
            if stored is not None and isinstance(stored.value, PeerRef):
                outgoing.setdefault(stored.value.peer, _Outgoing()).drop.append(stored.value.id)

    def end(self, session: Session) -> list[ToPeer]:
        """The session is over: frees what it held; returns what other workers can free."""
        return _drops(self.store.end(session.id))

    def clear(self, session: Session) -> list[ToPeer]:
        """Removes everything that is the session's."""
        session.leaves.clear()
        return _drops(self.store.clear(session.id))

    # ------------------------------------------------------------------------------------- requests

    def raise_unseen(self, session: Session) -> None:
        """Raises a failure that no result carries; called by every request that is answered."""
        failure, session.failure = session.failure, None
        if failure is not None:
            raise OpFailedError(failure)

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
                label = both(label, stored.label)
            if not session.may_read(label):
                raise GetNotPermittedError(
                    f"{op.name} on private data: what its results look like depends on the values, and those may be "
                    f"seen by {_users(label)} only"
                )
            if any(isinstance(stored.value, PeerRef) for stored in used):
                return (yield from self._call_peer(session, op, used))
            del function_args
            used.clear()
            result, label = self._run(session, op, used, outgoing)
        except (OpFailedError, GetNotPermittedError):
            raise
        except Exception as error:
            raise OpFailedError(_failure(error, op, None, used)) from error
        finally:
            torch.set_grad_enabled(grad_mode)
        made: list[tuple[int, m.ObjectSpec]] = []

        def numbered(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            id = new_id()
            self._keep(session, Ref(id), leaf, label)
            made.append((id, spec_of(leaf)))
            return Ref(len(made) - 1)

        named = map_leaves(_plain(result), numbered)
        return m.Made(encode(named), made), ()

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

    def put(self, session: Session, body: m.Put, tensors: Sequence[torch.Tensor]) -> Answer:
        """Stores tensors that a client or another worker sends."""
        if len(tensors) != len(body.items) + sum(item.has_grad for item in body.items):
            raise LocalError(f"{len(tensors)} tensors do not fit {len(body.items)} items")
        rest = iter(tensors)
        alone = len(tensors) == 1
        for item in body.items:
            value = self._own(next(rest), alone=alone)
            if item.requires_grad:
                value.requires_grad_()
            label = None if item.allowed is None else frozenset(item.allowed)
            if item.has_grad:
                value.grad = self._own(next(rest), alone=alone)
            stored = StoredObject(
                value, session.id, label, label, tags=tuple(item.tags), description=item.description
            )
            stored.handover = body.handover
            self.store.add(item.id, stored)
            if item.requires_grad:
                session.leaves[item.id] = None
        return m.Done(), ()

    def _own(self, tensor: torch.Tensor, *, alone: bool) -> torch.Tensor:
        if tensor.device != self._device:
            return tensor.to(self._device)
        return tensor if alone else tensor.clone()

    def put_pointer(self, session: Session, body: m.PutPointer) -> list[ToPeer]:
        """Stores a pointer to an object elsewhere, and claims the object."""
        self.store.add(body.id, StoredObject(PeerRef(body.peer, body.object), session.id))
        return [ToPeer(body.peer, m.Claim([body.object], body.token))]

    def fetch(self, session: Session, body: m.Fetch) -> Steps:
        """A value, or a pointer's target."""
        stored = self.store.find(session.id, body.id)
        if not session.may_read(stored.label):
            raise GetNotPermittedError(
                f"object {body.id} is private, or was computed from private data: {_users(stored.label)} may get it"
            )
        if stored.failure is not None:
            failure = stored.failure
            if (
                stored.value is not None
            ):  # a change in place that did not happen: told now, the value is as it was
                stored.failure = None
            raise OpFailedError(failure)
        value = stored.value
        if isinstance(value, PeerRef):
            token = secrets.token_hex(16)
            yield from ask(value.peer, m.HandOver([value.id], token))
            if body.delete:
                self.store.remove(body.id)
            return m.FetchedPointer(value.peer, value.id, token), ()
        assert value is not None  # noqa: S101 - an object without a value has a failure
        tensors = [value.detach()]
        grad = _grad_of(value)
        if grad is not None:
            if not session.may_read(stored.grad_label):
                raise GetNotPermittedError(
                    f"the gradient of object {body.id} was computed from private data: {_users(stored.grad_label)} may "
                    "get it; set .grad = None to fetch the value alone"
                )
            tensors.append(grad.detach())
        if body.delete:
            self.store.remove(body.id)
            session.leaves.pop(body.id, None)
        return m.Fetched(
            value.requires_grad, len(tensors) > 1, list(stored.tags), stored.description
        ), tensors

    def backward(self, session: Session, body: m.Backward) -> Steps:
        """A backward pass; says which objects have gradients then."""
        roots = [self._ready(session, id) for id in body.roots]
        given = [None if id is None else self._ready(session, id) for id in body.gradients]
        inputs = None if body.inputs is None else [self._ready(session, id) for id in body.inputs]
        everything = [*roots, *(one for one in given if one is not None), *(inputs or [])]
        if any(isinstance(stored.value, PeerRef) for stored in everything):
            return (yield from self._backward_there(session, body, everything))
        label: Label = None
        for stored in everything:
            label = both(label, stored.label)
        before = (
            {}
            if label is None
            else {id: _grad_version(self.store.objects[id].value) for id in session.leaves}
        )
        with torch.enable_grad():
            try:
                torch.autograd.backward(
                    [_tensor(stored) for stored in roots],
                    [None if one is None else _tensor(one) for one in given],
                    retain_graph=body.retain_graph,
                    create_graph=body.create_graph,
                    inputs=None if inputs is None else [_tensor(stored) for stored in inputs],
                )
            except Exception as error:
                op = PostedOp("Tensor.backward", (), {}, None, True)
                raise OpFailedError(_failure(error, op, None, everything)) from error
        found = []
        for id in session.leaves:
            stored = self.store.objects[id]
            value = stored.value
            if not isinstance(value, torch.Tensor) or value.grad is None:
                continue
            if label is not None and before.get(id) != _grad_version(value):
                stored.grad_label = both(stored.grad_label, label)
                self.store.share_label(value.grad, label)  # pointers to the gradient that exist already
            found.append((id, spec_of(value.grad)))
        return m.Gradients(found), ()

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

    def _ready(self, session: Session, id: int) -> StoredObject:
        stored = self.store.find(session.id, id)
        if stored.failure is not None:
            raise OpFailedError(stored.failure)
        return stored

    def describe(self, session: Session, body: m.Describe) -> None:
        """Sets tags and description."""
        stored = self.store.find(session.id, body.id)
        stored.tags, stored.description = tuple(body.tags), body.description

    def search(self, session: Session, body: m.Search) -> Answer:
        """Published objects that match."""
        found = [
            m.FoundItem(
                id, spec_of(stored.value), list(stored.tags), stored.description, stored.label is not None,
                self.store.objects[id] is not stored,
            )
            for id, stored in self.store.search(session.id, body.query)
            if isinstance(stored.value, torch.Tensor)
        ]
        return m.Found(found), ()

    def move(self, session: Session, body: m.Move) -> Steps:
        """Sends an object to another worker, and forgets it."""
        stored = self._ready(session, body.id)
        value = stored.value
        if not isinstance(value, torch.Tensor):
            raise LocalError(
                "a pointer to another worker cannot be moved: get() it, and move what it points to"
            )
        if not (session.may_read(stored.label) and session.may_read(stored.grad_label)):
            raise GetNotPermittedError(
                f"object {body.id} is private, or was computed from private data: {_users(stored.label)} may move it"
            )
        grad = _grad_of(value)
        label = both(stored.label, None if grad is None else stored.grad_label)
        item = m.PutItem(
            body.target, value.requires_grad, grad is not None, list(stored.tags), stored.description,
            None if label is None else sorted(label),
        )  # fmt: skip
        tensors = [value.detach(), *([] if grad is None else [grad.detach()])]
        yield from ask(body.peer, m.Put([item], body.token), tensors)
        self.store.remove(body.id)
        session.leaves.pop(body.id, None)
        return m.Done(), ()

    def hand_over(self, session: Session, body: m.HandOver) -> Answer:
        """Lets the bearer of a token become the owner."""
        for id in body.ids:
            self.store.find(session.id, id).handover = body.token
        return m.Done(), ()

    def claim(self, session: Session, body: m.Claim) -> None:
        """Becomes the owner of what was handed over."""
        for id in body.ids:
            stored = self.store.objects.get(id)
            if stored is None or not stored.handover or not hmac.compare_digest(stored.handover, body.token):
                raise UnknownObjectError(f"no object {id} was handed over to this session")
            stored.handover = ""
            self.store.change_owner(id, session.id)
            if isinstance(stored.value, torch.Tensor) and stored.value.requires_grad and stored.value.is_leaf:
                session.leaves[id] = None


def ask(peer: m.PeerAddress, body: m.Body, tensors: Sequence[torch.Tensor] = ()) -> Any:
    """Sends `body` to another worker and waits for its answer: to be used with ``yield from``.

    Raises:
        LocalError: the other worker could not do it.
    """
    key = secrets.token_hex(8)
    yield ToPeer(peer, body, tensors, key)
    answered = yield Wait(key)
    if isinstance(answered.body, m.Failure):
        raise OpFailedError(
            replace_message(answered.body, f"worker {peer.worker!r}: {answered.body.message}")
        )
    return answered.body


def replace_message(failure: m.Failure, message: str) -> m.Failure:
    """`failure` with another text; it was not this session's op that failed, so the number goes."""
    return m.Failure(failure.kind, message[:60_000], failure.op, failure.line, failure.traceback, None)


def _failure(error: Exception, op: PostedOp, number: int | None, used: Sequence[StoredObject]) -> m.Failure:
    """`error` as the client is told of it; of private operands nothing is told."""
    if isinstance(error, OpFailedError):
        return error.failure
    kind = type(error).__name__
    if any(stored.label is not None for stored in used):
        return m.Failure(
            "ExecutionError", f"op {op.name} failed; its operands are private, so the worker does not say why",
            op.name, None, "", number,
        )  # fmt: skip
    reason = (str(error).strip().splitlines() or [kind])[0]
    text = reason if isinstance(error, LocalError) else f"op {op.name} failed: {reason}"
    trace = "".join(traceback.format_exception(error))
    kind = kind if isinstance(error, LocalError) else "ExecutionError"
    return m.Failure(kind, text[:60_000], op.name, None, trace[-60_000:], number)


def _drops(gone: Sequence[StoredObject]) -> list[ToPeer]:
    by_peer: dict[m.PeerAddress, list[int]] = {}
    for stored in gone:
        if isinstance(stored.value, PeerRef):
            by_peer.setdefault(stored.value.peer, []).append(stored.value.id)
    return [ToPeer(peer, m.Post([], ids)) for peer, ids in by_peer.items()]


def _ids(nested: Nested) -> list[int]:
    return [leaf.index for leaf in leaves(nested) if isinstance(leaf, Ref)]


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) else 0


def _grad_version(value: Any) -> tuple[int, int] | None:
    if not isinstance(value, torch.Tensor) or value.grad is None:
        return None
    return id(value.grad), value.grad._version


def _tensor(stored: StoredObject) -> torch.Tensor:
    if not isinstance(stored.value, torch.Tensor):
        raise LocalError("not a tensor")
    return stored.value


def _grad_of(value: torch.Tensor) -> torch.Tensor | None:
    """The gradient, where a tensor can have one: torch warns about the question elsewhere."""
    return value.grad if value.is_leaf or value.retains_grad else None


def _plain(result: Any) -> Any:
    """Named tuples of torch as plain ones."""
    return tuple(result) if isinstance(result, tuple) else result


def _users(label: Label) -> str:
    return ", ".join(sorted(label)) if label else "nobody"
