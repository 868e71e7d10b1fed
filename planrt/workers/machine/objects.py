"""What is asked about a worker's objects: put, fetch, describe, search, move, hand over. No I/O.

Every object is looked up together with the session that asks, and its label says who may read it.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterator, Mapping, Sequence

import torch

from planrt.errors import LocalError
from planrt.plans.running import interpreter
from planrt.workers.machine import plan_objects
from planrt.workers.machine.events import Answer, Steps, ToPeer
from planrt.workers.machine.failures import OpFailedError
from planrt.workers.machine.gate import Gate
from planrt.workers.machine.labels import both
from planrt.workers.machine.plan_objects import PlanObject
from planrt.workers.machine.protocol_objects import ProtocolObject
from planrt.workers.machine.sessions import Session, allowed_list, ask, check_fits, users_of
from planrt.workers.machine.store import ObjectStore, PeerRef, StoredObject, grad_of, spec_of
from planrt.workers.wire import messages as m
from planrt.workers.wire.refusals import GetNotPermitted, UnknownObject


class KeptObjects:
    """What sessions may do with the objects of one worker, besides computing on them."""

    def __init__(self, store: ObjectStore, device: torch.device, gate: Gate | None = None) -> None:
        self.store = store
        self.gate = gate
        self._device = device

    def end(self, session: Session) -> list[ToPeer]:
        """The session is over: frees what it held; returns what other workers can free."""
        return _drops(self.store.end(session.id))

    def clear(self, session: Session) -> list[ToPeer]:
        """Removes everything that is the session's."""
        session.leaves.clear()
        return _drops(self.store.clear(session.id))

    def raise_unseen(self, session: Session) -> None:
        """Raises a failure that no result carries; called by every request that is answered."""
        failure, session.failure = session.failure, None
        if failure is not None:
            raise OpFailedError(failure)

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
                value, session.id, label, tags=tuple(item.tags), description=item.description
            )
            stored.handover = body.handover
            stored.source, stored.original = frozenset(item.tags), True
            self.store.add(item.id, stored)
            if value.grad is not None:
                self.store.memory.account(value.grad, label)
            if item.requires_grad:
                session.leaves[item.id] = None
        return m.Done(), ()

    def store_plan(self, session: Session, body: m.StorePlan, tensors: Sequence[torch.Tensor]) -> Answer:
        """Stores a plan that a client or another worker sends."""
        if not tensors or tensors[0].dtype != torch.uint8:
            raise LocalError("a plan travels as its record, a uint8 tensor, and its state")
        record = plan_objects.record_of(tensors[0])
        if self.gate is not None:
            interpreter.check_state(record.graphs[0], tensors[1:])
            self.gate.arrived(record.graphs, record.to_bytes(), tensors[1:], session.user, body.purpose)
        state = [self._own(tensor, alone=False) for tensor in tensors[1:]]
        plan = plan_objects.new_plan_object(record, state, training=body.training, device=self._device)
        label = None if body.allowed is None else frozenset(body.allowed)
        stored = StoredObject(plan, session.id, label, tags=tuple(body.tags), description=body.description)
        stored.handover = body.handover
        self.store.add(body.id, stored)
        return m.Done(), ()

    def read_plan(self, session: Session, body: m.ReadPlan) -> Answer:
        """What a plan or a protocol does, without its state."""
        value = self.ready(session, body.id).value
        if isinstance(value, ProtocolObject):
            return m.FetchedProtocol(), [value.chain_bytes()]
        if not isinstance(value, PlanObject):
            raise LocalError(f"object {body.id} is no plan")
        return m.FetchedPlan(value.training), [value.record_bytes()]

    def _own(self, tensor: torch.Tensor, *, alone: bool) -> torch.Tensor:
        if tensor.device != self._device:
            return tensor.to(self._device)
        return tensor if alone else tensor.clone()

    def put_pointer(self, session: Session, body: m.PutPointer) -> Steps:
        """Claims an object elsewhere, and stores a pointer to it."""
        self.store.check_free(body.id)
        yield from ask(body.peer, m.Claim([body.object], body.token))
        self.store.add(body.id, StoredObject(PeerRef(body.peer, body.object), session.id))
        return m.Done(), ()

    def post_pointer(self, session: Session, body: m.PutPointer) -> list[ToPeer]:
        """Stores a pointer to an object elsewhere, and claims the object."""
        self.store.add(body.id, StoredObject(PeerRef(body.peer, body.object), session.id))
        return [ToPeer(body.peer, m.Claim([body.object], body.token))]

    def fetch(self, session: Session, body: m.Fetch) -> Steps:
        """A value, or a pointer's target."""
        stored = self.store.find(session.id, body.id)
        label = self.store.label_of(stored)
        if not session.may_read(label):
            raise GetNotPermitted(
                f"object {body.id} is private, or was computed from private data: {users_of(label)} may get it"
            )
        try:
            self.check_failure(session, stored)
        finally:
            if (
                stored.value is not None
            ):  # a change in place that did not happen: told now, the value is as it was
                stored.failure = None
        value = stored.value
        if isinstance(value, PeerRef):
            token = secrets.token_hex(16)
            yield from ask(value.peer, m.HandOver([value.id], token))
            if body.delete:
                self.store.discard(session.id, body.id)
            return m.FetchedPointer(value.peer, value.id, token), ()
        assert value is not None  # noqa: S101 - an object without a value has a failure
        if isinstance(value, PlanObject):
            parts = [value.record_bytes(), *(one.detach() for one in value.state)]
            if body.delete:
                check_fits(session.client, parts)
                self.store.discard(session.id, body.id)
            return m.FetchedPlan(value.training, allowed_list(label)), parts
        if isinstance(value, ProtocolObject):
            parts = [value.chain_bytes(), *(one.detach() for one in value.state)]
            if body.delete:
                check_fits(session.client, parts)
                yield from self._removed(session, [body.id])
            return m.FetchedProtocol(), parts
        tensors, shared = [value.detach()], label
        grad = grad_of(value)
        if grad is not None:
            label = self.store.memory.of_gradient(grad)
            if not session.may_read(label):
                raise GetNotPermitted(
                    f"the gradient of object {body.id} was computed from private data: {users_of(label)} may get it; "
                    "set .grad = None to fetch the value alone"
                )
            tensors.append(grad.detach())
            shared = both(shared, label)
        if body.delete:
            check_fits(session.client, tensors)
            self.store.discard(session.id, body.id)
            session.leaves.pop(body.id, None)
        return m.Fetched(
            value.requires_grad, len(tensors) > 1, list(stored.tags), stored.description, allowed_list(shared)
        ), tensors

    def remove(self, session: Session, body: m.Remove) -> list[ToPeer]:
        """Forgets objects of the session that have arrived elsewhere; returns what other workers can free."""
        return self._removed(session, body.ids)

    def _removed(self, session: Session, ids: Sequence[int]) -> list[ToPeer]:
        gone = []
        for id in ids:
            session.leaves.pop(id, None)
            stored = self.store.objects.get(id)
            if stored is not None and stored.owner == session.id:
                gone.append(self.store.remove(id))
        return _drops(gone)

    def listing(self, session: Session) -> Answer:
        """What the session has here, without values."""
        return m.Listed([_listed(id, stored) for id, stored in self.store.of(session.id)]), ()

    def describe(self, session: Session, body: m.Describe) -> None:
        """Sets tags and description."""
        stored = self.store.find(session.id, body.id)
        stored.tags, stored.description = tuple(body.tags), body.description
        if stored.original and stored.source is not None:  # a tag that is taken away still counts
            stored.source |= frozenset(body.tags)

    def search(self, session: Session, body: m.Search) -> Answer:
        """Published objects that match."""
        found = []
        for id, stored in self.store.search(session.id, body.query):
            private = self.store.label_of(stored) is not None
            snapshot = self.store.objects[id] is not stored
            if isinstance(plan := stored.value, PlanObject):
                found.append(
                    m.FoundItem(
                        id, None, list(stored.tags), stored.description, private, snapshot, "plan",
                        plan.record.name[:200], plan.training,
                    )
                )  # fmt: skip
                continue
            if isinstance(stored.value, ProtocolObject):
                found.append(
                    m.FoundItem(
                        id, None, list(stored.tags), stored.description, private, snapshot, "protocol"
                    )
                )
                continue
            value = tensor_of(stored)
            found.append(
                m.FoundItem(id, spec_of(value), list(stored.tags), stored.description, private, snapshot)
            )
            if value.requires_grad and value.is_leaf:
                session.leaves[id] = None
        return m.Found(found), ()

    def move(self, session: Session, body: m.Move) -> Steps:
        """Sends an object to another worker, and forgets it; or sends a copy."""
        stored = self.store.find(session.id, body.id)
        grad = grad_of(stored.value) if isinstance(stored.value, torch.Tensor) and not body.copy else None
        label = self.store.label_of(stored)
        if grad is not None:
            label = both(label, self.store.memory.of_gradient(grad))
        if not session.may_read(label):
            raise GetNotPermitted(
                f"object {body.id} is private, or was computed from private data: {users_of(label)} may move it"
            )
        value = self.ready(session, body.id).value
        if isinstance(value, PlanObject):
            if body.copy:
                raise LocalError("copies of plans are not sent on: copy() it, and move the copy")
            message = m.StorePlan(
                body.target, value.training, list(stored.tags), stored.description,
                allowed_list(label), body.token,
            )  # fmt: skip
            yield from ask(body.peer, message, [value.record_bytes(), *(one.detach() for one in value.state)])
            if not body.keep:
                self.store.discard(session.id, body.id)
            return m.Done(), ()
        if not isinstance(value, torch.Tensor):
            raise LocalError(
                "pointers to other workers and protocols cannot be moved: get() it, and move what that gives"
            )
        if body.copy:
            values = m.PutItem(body.target, value.requires_grad, allowed=allowed_list(label))
            # Ops that come after this one may change the object while it waits to be sent.
            yield from ask(body.peer, m.Put([values], body.token), [value.detach().clone()])
            return m.Done(), ()
        item = m.PutItem(
            body.target, value.requires_grad, grad is not None, list(stored.tags), stored.description,
            allowed_list(label),
        )  # fmt: skip
        tensors = [value.detach(), *([] if grad is None else [grad.detach()])]
        if body.keep:  # ops that come after this one may change the object while it waits to be sent
            tensors = [one.clone() for one in tensors]
        yield from ask(body.peer, m.Put([item], body.token), tensors)
        if not body.keep:
            self.store.discard(session.id, body.id)
            session.leaves.pop(body.id, None)
        return m.Done(), ()

    def hand_over(self, session: Session, body: m.HandOver) -> Answer:
        """Lets the bearer of a token become the owner."""
        for id in body.ids:
            self.store.find(session.id, id).handover = body.token
        return m.Done(), ()

    def claim(self, session: Session, body: m.Claim, sessions: Mapping[str, Session]) -> None:
        """Becomes the owner of what was handed over; `sessions` are those of the worker, by their ids."""
        for id in body.ids:
            stored = self.store.objects.get(id)
            if (
                stored is None
                or not stored.handover
                or not hmac.compare_digest(stored.handover.encode(), body.token.encode())
            ):
                raise UnknownObject(f"no object {id} was handed over to this session")
            stored.handover = ""
            if giver := sessions.get(stored.owner):
                giver.leaves.pop(id, None)
                session.share_graphs(giver)
            self.store.change_owner(id, session.id)
            if isinstance(stored.value, torch.Tensor) and stored.value.requires_grad and stored.value.is_leaf:
                session.leaves[id] = None

    def ready(self, session: Session, id: int) -> StoredObject:
        """The session's object `id`; raises the failure that keeps it from being there."""
        stored = self.store.find(session.id, id)
        self.check_failure(session, stored)
        return stored

    def state(self, session: Session, ids: Sequence[int]) -> list[torch.Tensor]:
        """The session's tensors `ids`, for a plan that is run on them as its state.

        Raises:
            UnknownObject, OpFailedError: one is not there. GetNotPermitted: one that the session may not
            read, as the figures of a run would tell of it. LocalError: one is no tensor.
        """
        values = []
        for id in ids:
            stored = self.ready(session, id)
            if not isinstance(stored.value, torch.Tensor):
                raise LocalError(f"object {id} is no tensor: it cannot be the state of a plan")
            if not session.may_read(self.store.label_of(stored)):
                raise GetNotPermitted(
                    f"object {id} is private: it cannot be the state of a plan that is trained"
                )
            values.append(stored.value.detach())
        return values

    def replace_state(self, session: Session, id: int, value: torch.Tensor) -> None:
        """What a plan made of a tensor of its state takes that tensor's place, with its label."""
        stored = self.store.find(session.id, id)
        stored.label = self.store.label_of(stored)
        stored.value = value
        stored.source = None

    def forget_optimizers(self, session: Session) -> None:
        """Drops what optimizers keep for objects that are gone."""
        gone = [key for key in session.optimizer_states if key[3] and key[3] not in self.store.objects]
        for key in gone:
            del session.optimizer_states[key]

    def check_failure(self, session: Session, stored: StoredObject) -> None:
        """Raises why there is no value, unless that tells somebody about values that are not for them."""
        if stored.failure is not None:
            raise OpFailedError(stored.failure)
        if stored.hidden_failure is not None and session.may_read(self.store.label_of(stored)):
            raise OpFailedError(stored.hidden_failure)


def _listed(id: int, stored: StoredObject) -> m.ListedItem:
    value, about = stored.value, (list(stored.tags), stored.description)
    if isinstance(value, PeerRef):
        return m.ListedItem(id, "pointer", None, *about, value.peer, value.id)
    if isinstance(value, PlanObject):
        return m.ListedItem(id, "plan", None, *about)
    if isinstance(value, ProtocolObject):
        return m.ListedItem(id, "protocol", None, *about)
    if value is None:
        return m.ListedItem(id, "failed", None, *about)
    return m.ListedItem(id, "tensor", spec_of(value), *about)


def _drops(gone: Sequence[StoredObject]) -> list[ToPeer]:
    by_peer: dict[m.PeerAddress, list[int]] = {}
    for stored in gone:
        for peer, ids in freed_by(stored):
            by_peer.setdefault(peer, []).extend(ids)
    return [ToPeer(peer, m.Post([], ids)) for peer, ids in by_peer.items()]


def freed_by(stored: StoredObject) -> Iterator[tuple[m.PeerAddress, list[int]]]:
    """What other workers can free now that an object is gone."""
    if isinstance(stored.value, PeerRef):
        yield stored.value.peer, [stored.value.id]
    elif isinstance(stored.value, ProtocolObject):
        yield from stored.value.freed()


def tensor_of(stored: StoredObject) -> torch.Tensor:
    """The value, if it is a tensor; a LocalError if not."""
    if not isinstance(stored.value, torch.Tensor):
        raise LocalError("not a tensor")
    return stored.value
