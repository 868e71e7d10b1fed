"""What a worker does with protocols for its sessions: keeps them, deploys them, runs them. No I/O."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TypeAlias

import torch

from planrt.errors import LocalError
from planrt.plans.policy.quotas import PLAN_BYTES
from planrt.workers.machine.counting.work import entries
from planrt.workers.machine.events import Answer, PeerAnswered, Steps, ToPeer, Wait
from planrt.workers.machine.failures import OpFailedError, cut
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.kinds.pointer import PeerRef
from planrt.workers.machine.kinds.protocol import (
    PeerError,
    ProtocolObject,
    RunCancelledError,
    made_by,
    new_protocol_object,
    new_run,
)
from planrt.workers.machine.labels import Label
from planrt.workers.machine.objects import KeptObjects
from planrt.workers.machine.sessions import Session, allowed_list, users_of
from planrt.workers.wire import messages as m
from planrt.workers.wire.chain_runs import ChainRun, Given, Reaches, Send, StepState, always
from planrt.workers.wire.refusals import GetNotPermitted

_Exchange: TypeAlias = Generator[ToPeer | Wait, PeerAnswered | None, None]


class ProtocolOps:
    """The protocols of one worker, among its objects."""

    def __init__(
        self, worker_id: str, objects: KeptObjects, device: torch.device, reaches: Reaches = always
    ) -> None:
        self._worker_id = worker_id
        self._objects = objects
        self._store = objects.store
        self._device = device
        self._reaches = reaches
        self._runs: dict[tuple[str, int], dict[str, StepState]] = {}
        """(session, number of a run) -> where its steps stand."""

    def store(self, session: Session, body: m.StoreProtocol, tensors: Sequence[torch.Tensor]) -> Answer:
        """Stores a protocol that a client sends."""
        if tensors:
            self._store.check_bytes(session.id, tensors[0].nbytes * PLAN_BYTES)  # before its ops take so much
        protocol = new_protocol_object(tensors, self._device)
        label = None if body.allowed is None else frozenset(body.allowed)
        self._store.add(
            body.id,
            StoredObject(protocol, session.id, label, tags=tuple(body.tags), description=body.description),
        )
        return m.Done(), ()

    def deploy(self, session: Session, body: m.DeployProtocol) -> list[ToPeer]:
        """Puts workers at the places of a protocol."""
        return self._put_at(session, self._protocol(session, body.id), body.places)

    def _put_at(
        self, session: Session, protocol: ProtocolObject, places: Mapping[str, m.PeerAddress]
    ) -> list[ToPeer]:
        """Puts workers at places, as they are reached in the client's name by now; returns what is freed by that."""
        reached = {place: session.reached(peer, "compute") for place, peer in places.items()}
        return [ToPeer(peer, m.Post([], ids)) for peer, ids in protocol.deploy(reached)]

    def read_run(self, session: Session, body: m.ReadRun) -> Answer:
        """Answers where the steps of a run stand."""
        return m.RunStates(list(self._runs.get((session.id, body.run), {}).items())), ()

    def run(self, session: Session, body: m.RunProtocol) -> Steps:
        """Runs a protocol; its results are pointers to where they are."""
        if (session.id, body.run) in self._runs:
            raise LocalError(f"run {body.run} is under way already: give each run a number of its own")
        states = self._runs[session.id, body.run] = {}
        try:
            return (yield from self._run(session, body, states))
        finally:
            self._runs.pop((session.id, body.run), None)

    def _run(self, session: Session, body: m.RunProtocol, states: dict[str, StepState]) -> Steps:
        protocol = self._protocol(session, body.id)
        for id in body.results:
            self._store.check_free(id)
        if protocol.places:
            yield from self._put_at(session, protocol, protocol.places)
        places, plans = dict(protocol.places), protocol.deployed
        label = self._store.label_of(self._store.find(session.id, body.id))
        if not session.may_read(label):
            raise GetNotPermitted(
                f"the protocol's plans are private: {users_of(label)} may have them sent to other workers"
            )
        self._store.spend(session.id, "a run of a protocol", entries(protocol.state))  # which may be sent
        given = [self._given(session, protocol, number, id) for number, id in enumerate(body.inputs)]
        run = new_run(protocol, given, allowed_list(label), body, states, self._reaches)
        yield from self._to_the_end(run, run.start(), places)
        for (plan, place), id in plans.items():  # deployed elsewhere meanwhile, or gone
            if protocol.gone or protocol.deployed.get((plan, place)) != id:
                yield ToPeer(places[place], m.Post([], [id]))
        if protocol.gone:
            plans.clear()
        if run.failure is not None:
            raise OpFailedError(_told(run))
        if run.cancelled:
            raise RunCancelledError("the run was cancelled")
        answer, outputs = made_by(run, protocol.chain, body.results)
        for id, output in outputs:
            self._store.add(id, StoredObject(PeerRef(places[output.place], output.id), session.id))
        return answer, ()

    def _to_the_end(
        self, run: ChainRun, sends: Sequence[Send], places: dict[str, m.PeerAddress]
    ) -> _Exchange:
        while True:
            for one in sends:
                yield ToPeer(places[one.place], one.body, one.tensors, one.key)
            if not run.outstanding:
                return
            first, *others = run.outstanding
            try:
                answered = yield Wait(first, tuple(others))
            except PeerError as error:
                sends = run.failed(error.key, error)
            except RunCancelledError:
                sends = run.cancel()
            else:
                assert isinstance(answered, PeerAnswered)  # noqa: S101 - that is what a Wait gives
                if isinstance(answered.body, m.Failure):
                    sends = run.failed(answered.key, OpFailedError(answered.body), answered.body.kind)
                else:
                    sends = run.answered(answered.key, answered.body, answered.tensors)

    def _given(self, session: Session, protocol: ProtocolObject, number: int, id: int) -> Given:
        """An object of the session as input of a run."""
        stored = self._objects.ready(session, id)
        value = stored.value
        places = {
            step.place for step in protocol.chain.steps if number in {ref.index for ref in step.arguments}
        }
        if isinstance(value, PeerRef):
            there = {place for place in places if protocol.places.get(place) == value.peer}
            if not there:
                raise LocalError(
                    f"input {_name(protocol, number)} is on worker {value.peer.worker!r}, and taken on "
                    f"{', '.join(repr(place) for place in sorted(places)) or 'none'}: move it there"
                )
            return Given(placed=dict.fromkeys(there, value.id))
        if not isinstance(value, torch.Tensor):
            raise LocalError(f"input {_name(protocol, number)} is no tensor")
        label: Label = self._store.label_of(stored)
        if not session.may_read(label):
            raise GetNotPermitted(
                f"input {_name(protocol, number)} is private, or was computed from private data: {users_of(label)} may "
                "send it to other workers"
            )
        self._objects.check_leaves(stored)
        for place in sorted(places):
            peer = protocol.places.get(place)
            to = place if peer is None else peer.worker
            self._objects.audit.left(session, "move", stored, label, [value], to=to)
        if stored.account is not None:
            stored.account.check(beside=value.numel() * value.element_size())
        self._store.spend(session.id, "a run of a protocol", value.numel())
        # A copy, as it may change while it waits to be sent.
        tensor = value.detach().clone().requires_grad_(value.requires_grad)
        if stored.account is not None:
            stored.account.take([tensor])
        return Given(tensor, allowed_list(label))

    def _protocol(self, session: Session, id: int) -> ProtocolObject:
        value = self._objects.ready(session, id).value
        if not isinstance(value, ProtocolObject):
            raise LocalError(f"object {id} is no protocol")
        return value


def _name(protocol: ProtocolObject, number: int) -> str:
    names = protocol.chain.inputs
    return repr(names[number]) if number < len(names) else str(number)


def _told(run: ChainRun) -> m.Failure:
    """Why a run failed, as the client is told of it."""
    failed = run.failure
    assert failed is not None  # noqa: S101 - the caller has looked
    if isinstance(failed.error, OpFailedError):
        failure = failed.error.failure
    else:
        failure = m.Failure(type(failed.error).__name__, str(failed.error))
    text = f"{failed.where(worker=True)}: {failure.message}"
    return m.Failure(  # without its number, which counts the ops of another session
        failure.kind, cut(text), failure.op, failure.line, failure.traceback, failure.index, failure.cause,
        step=failed.name,
    )  # fmt: skip
