"""What is asked about a worker's objects: put, fetch, describe, search, move, hand over. No I/O.

Every object is looked up together with the session that asks, and its label says who may read it.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence

import msgspec
import torch

from planrt.errors import LocalError
from planrt.plans.policy.quotas import PLAN_BYTES
from planrt.plans.running import interpreter
from planrt.serde.tensors import payload_bytes
from planrt.workers.machine.access import Access
from planrt.workers.machine.audit import Auditor
from planrt.workers.machine.counting.work import entries
from planrt.workers.machine.events import Answer, Steps, ToPeer
from planrt.workers.machine.failures import OpFailedError
from planrt.workers.machine.gate import Gate
from planrt.workers.machine.kinds import plan as plan_objects
from planrt.workers.machine.kinds.base import Freed, StoredObject
from planrt.workers.machine.kinds.pointer import PeerRef
from planrt.workers.machine.kinds.tensor import grad_of
from planrt.workers.machine.sessions import Session, ask, check_fits, users_of
from planrt.workers.machine.store import ObjectStore
from planrt.workers.wire import messages as m
from planrt.workers.wire.refusals import GetNotPermitted, UnknownObject


class KeptObjects:
    """The objects of one worker, and what sessions may ask about them."""

    def __init__(
        self,
        store: ObjectStore,
        device: torch.device,
        gate: Gate | None = None,
        access: Access | None = None,
        audit: Auditor | None = None,
    ) -> None:
        self.audit = audit or Auditor()
        self.store = store
        self._access = access or Access()
        self.gate = gate
        self._device = device

    def end(self, session: Session) -> list[ToPeer]:
        """Frees what a session held that is over; returns what other workers can free."""
        return _drops(self._freed(self.store.end(session.id)))

    def clear(self, session: Session) -> list[ToPeer]:
        """Removes everything that is the session's."""
        session.leaves.clear()
        return _drops(self._freed(self.store.clear(session.id)))

    def raise_unseen(self, session: Session) -> None:
        """Raises a failure that no result carries; called by every request that is answered."""
        failure, session.failure = session.failure, None
        if failure is not None:
            raise OpFailedError(msgspec.structs.replace(failure, once=True))

    def put(self, session: Session, body: m.Put, tensors: Sequence[torch.Tensor]) -> Answer:
        """Stores tensors that a client or another worker sends."""
        if len(tensors) != len(body.items) + sum(item.has_grad for item in body.items):
            raise LocalError(f"{len(tensors)} tensors do not fit {len(body.items)} items")
        self.store.check_room(session.id, tensors, objects=len(body.items))
        rest = iter(tensors)
        alone = len(tensors) == 1
        for item in body.items:
            value = self._on_device(next(rest), alone=alone)
            if item.requires_grad:
                value.requires_grad_()
            label = None if item.allowed is None else frozenset(item.allowed)
            if item.has_grad:
                value.grad = self._on_device(next(rest), alone=alone)
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
        self.store.check_bytes(session.id, tensors[0].nbytes * PLAN_BYTES)  # before its ops take so much
        record = plan_objects.record_of(tensors[0])
        bare = body.bare and len(tensors) == 1
        if self.gate is not None:
            if not bare:
                interpreter.check_state(record.graphs[0], tensors[1:])
            given = None if bare and record.state else tensors[1:]
            filed = self.gate.approving.arrived(
                record.graphs, record.to_bytes(), given, session.user, body.purpose
            )
            session.asks_for(filed)
        state = [self._on_device(tensor, alone=False) for tensor in tensors[1:]]
        plan = plan_objects.new_plan_object(
            record, state, training=body.training, device=self._device, bare=bare
        )
        label = None if body.allowed is None else frozenset(body.allowed)
        stored = StoredObject(plan, session.id, label, tags=tuple(body.tags), description=body.description)
        stored.handover = body.handover
        self.store.add(body.id, stored)
        return m.Done(), ()

    def read_plan(self, session: Session, body: m.ReadPlan) -> Answer:
        """Answers what a plan or a protocol does, without its state."""
        value = self.ready(session, body.id).value
        return self.store.kinds.of(value).read(value, body.id)

    def _on_device(self, tensor: torch.Tensor, *, alone: bool) -> torch.Tensor:
        if tensor.device != self._device:
            return tensor.to(self._device)
        return tensor if alone else tensor.clone()

    def put_pointer(self, session: Session, body: m.PutPointer) -> Steps:
        """Claims an object elsewhere, and stores a pointer to it."""
        self.store.check_free(body.id)
        peer = session.reached(body.peer, "compute")
        yield from ask(peer, m.Claim([body.object], body.token))
        self.store.add(body.id, StoredObject(PeerRef(peer, body.object), session.id))
        return m.Done(), ()

    def post_pointer(self, session: Session, body: m.PutPointer) -> list[ToPeer]:
        """Stores a pointer to an object elsewhere, and claims the object."""
        peer = session.reached(body.peer, "compute")
        self.store.add(body.id, StoredObject(PeerRef(peer, body.object), session.id))
        return [ToPeer(peer, m.Claim([body.object], body.token))]

    def fetch(self, session: Session, body: m.Fetch) -> Steps:
        """Answers with an object: a value with its gradient, a program with its state, or where a pointer points to.

        Raises:
            GetNotPermitted: it is private, and the session's user is not among those who may read it.
            UnknownObject, OpFailedError: it is not there. ReplyTooLarge: the client does not take it.
            PolicyError: it is more than the owner's policy lets out at once.
        """
        stored = self.store.find(session.id, body.id)
        label = self.store.label_of(stored)
        if not session.may_read(label):
            raise GetNotPermitted(
                f"object {body.id} is private, or was computed from private data: {users_of(label)} may get it"
            )
        try:
            self.check_failure(session, stored)
        except OpFailedError as error:
            if (
                stored.value is not None and stored.failure is not None
            ):  # a change in place that did not happen
                error.failure = msgspec.structs.replace(error.failure, once=True)
            raise
        finally:
            if stored.value is not None:  # told now, the value is as it was
                stored.failure = None
        value = stored.value
        kind = self.store.kinds.of(value)
        answer, tensors = yield from kind.fetch(session, body.id, stored, label, self.store.memory)
        if self.gate is not None:
            self.gate.admit_answer(tensors)
            self.store.spend(session.id, "a fetch", entries(tensors))
        if body.delete:
            check_fits(session.client, tensors)
            self.forget(session, body.id)
            yield from _drops(kind.freed_by_fetch(value))
        self.audit.left(session, "fetch", stored, label, tensors)
        return answer, tensors

    def forget(self, session: Session, id: int) -> None:
        """Removes the session's object `id`, published or not, if it is still there."""
        session.leaves.pop(id, None)
        self.store.discard(session.id, id)

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
        return _drops(self._freed(gone))

    def _freed(self, gone: Sequence[StoredObject]) -> Freed:
        for stored in gone:
            yield from self.freed_by(stored)

    def freed_by(self, stored: StoredObject) -> Freed:
        """Returns what other workers can free now that an object is gone."""
        return self.store.kinds.of(stored.value).freed(stored.value)

    def listing(self, session: Session) -> Answer:
        """Answers what the session has here, without values."""
        of = self.store.kinds.of
        return m.Listed([of(stored.value).listed(id, stored) for id, stored in self.store.of(session.id)]), ()

    def describe(self, session: Session, body: m.Describe) -> None:
        """Sets tags and description."""
        stored = self.store.find(session.id, body.id)
        self.store.describe(body.id, tuple(body.tags), body.description)
        if stored.original and stored.source is not None:  # a tag that is taken away still counts
            stored.source |= frozenset(body.tags)

    def search(self, session: Session, body: m.Search) -> Answer:
        """Answers with the objects that match."""
        found = []
        for id, stored in self.store.search(
            session.id, body.query, lambda tags: self._access.finds(session.user, tags)
        ):
            kind = self.store.kinds.of(stored.value)
            private = self.store.label_of(stored) is not None
            snapshot = self.store.objects[id] is not stored
            found.append(kind.found(id, stored, private=private, snapshot=snapshot))
            if kind.gains_gradient(stored.value):
                session.leaves[id] = None
        return m.Found(found), ()

    def move(self, session: Session, body: m.Move) -> Steps:
        """Sends an object to another worker, and forgets it; or sends a copy."""
        stored = self.store.find(session.id, body.id)
        kind = self.store.kinds.of(stored.value)
        label = self.store.label_of(stored)
        if not body.copy:
            label = kind.label_with_gradient(stored.value, label, self.store.memory)
        if not session.may_read(label):
            raise GetNotPermitted(
                f"object {body.id} is private, or was computed from private data: {users_of(label)} may move it"
            )
        self.check_failure(session, stored)
        self.check_leaves(stored)
        self.store.spend(session.id, "a move to another worker", entries(self.store.tensors_of(stored)))
        self.audit.left(
            session, "move", stored, label, self.store.tensors_of(stored), to=body.peer.worker
        )  # before it goes
        there = msgspec.structs.replace(body, peer=session.reached(body.peer, "put"))
        answer = yield from kind.move(stored, there, label)
        if not (body.copy or body.keep):
            self.forget(session, body.id)
        return answer

    def check_leaves(self, stored: StoredObject) -> None:
        """Raises unless the owner's policy lets so much as an object holds go to another worker.

        Raises:
            PolicyError: it is more than may leave in one piece.
        """
        if self.gate is not None:
            tensors = self.store.tensors_of(stored)
            gradients = [grad for one in tensors if (grad := grad_of(one)) is not None]
            self.gate.admit_answer([*tensors, *gradients], "a move to another worker")

    def check_copy(self, session: Session, plan: object) -> None:
        """Raises unless the session may have a copy of a plan; looked at before it is made.

        Raises:
            PolicyError: its user may keep no more, or the owner's policy does not allow so much memory.
        """
        if not isinstance(plan, plan_objects.PlanObject):
            return  # which the op itself says
        if self.gate is not None:
            self.gate.admit_copy(plan.state)
            self.store.spend(session.id, "a copy of a plan", entries(plan.state))
        beside = self.store.kinds.of(plan).bytes_beside(plan)
        self.store.check_bytes(session.id, payload_bytes(plan.state) + beside)

    def hand_over(self, session: Session, body: m.HandOver) -> Answer:
        """Lets the bearer of a token become the owner."""
        for id in body.ids:
            self.store.find(session.id, id)
            self.store.offer(id, body.token)
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
            giver = sessions.get(stored.owner)
            self.store.change_owner(id, session.id)
            self.store.offer(id, "")
            if giver is not None:
                giver.leaves.pop(id, None)
                session.share_graphs(giver)
            if self.store.kinds.of(stored.value).gains_gradient(stored.value):
                session.leaves[id] = None

    def ready(self, session: Session, id: int) -> StoredObject:
        """Returns the session's object `id`; raises the failure that keeps it from being there."""
        stored = self.store.find(session.id, id)
        self.check_failure(session, stored)
        return stored

    def state(self, session: Session, ids: Sequence[int]) -> list[torch.Tensor]:
        """Returns the session's tensors `ids`, for a plan that is run on them as its state.

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
        """Puts what a plan made of a tensor of its state in that tensor's place, under its label."""
        stored = self.store.find(session.id, id)
        stored.label = self.store.label_of(stored)
        stored.value = value
        if stored.account is not None:  # as much as before, in other memory
            stored.account.take([value])
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


def _drops(freed: Freed) -> list[ToPeer]:
    by_peer: dict[m.PeerAddress, list[int]] = {}
    for peer, ids in freed:
        by_peer.setdefault(peer, []).extend(ids)
    return [ToPeer(peer, m.Post([], ids)) for peer, ids in by_peer.items()]
