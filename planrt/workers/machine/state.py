"""The worker as a state machine: events in, instructions out; no sockets, no loop, no threads.

The host (`planrt.workers.serving.host`) turns what happens into events and calls ``handle``, one event at a time::

    Connected(connection, channel)             a connection was opened
    Received(connection, envelope, tensors)    a message arrived
    Disconnected(connection)                   a connection ended
    Probed(connection, alive)                  what came of a Probe
    Expired(session, absence)                  the time of a Keep is over
    PeerAnswered(key, body, tensors)           another worker answered a waiting request
    PeerFailed(key, reason)                    it never will
    TimePassed(key)                            the time of an Alarm is over

and carries out, in order, the instructions it returns::

    Reply(connection, envelope, tensors)       send this to the client
    ToPeer(peer, body, tensors, key)           send this to another worker
    Wait(key, others)                          nothing to do until PeerAnswered with one of these keys
    Close(connection)                          close the connection (after the replies before it)
    Distrust(connection)                       its proof was wrong: let the next one from there wait
    Again(event)                               hand in this event, after those of others that wait
    Alarm(seconds, key)                        hand in TimePassed(key) after so many seconds
    Hold(connection, left)                     hand in nothing more of the connection ...
    Release(connection)                        ... until now; what was left comes first
    HandOn(connection, ...)                    another process serves it from now on
    Probe(connection, held_by)                 find out whether the connection `held_by` still gives signs of life
    Keep(session, absence, seconds)            hand in Expired then
    Introduce(peer, secret)                    reach this one with a ticket, from now on
    Part(peers)                                end what was opened with these tickets

A request is handled by a generator. It yields `ToPeer` and `Wait` where it needs another worker and returns
its answer; while it waits, the machine takes other events, so two requests that meet on two workers in
opposite order cannot lock each other out. Every request gets exactly one reply, a `Failure` if it raised; a
message under the number 0 is posted and gets none. Replies belong to the session: while it has no connection they wait
for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakValueDictionary

import torch

from planrt.errors import LocalError, OptionError, WireError
from planrt.plans.policy.approvals import Approvals, Decisions, Status
from planrt.plans.policy.quotas import Account, Quota
from planrt.plans.policy.rules import Policy
from planrt.serde.frames import Limits
from planrt.sharing.secure_sum.signing import Identity
from planrt.workers.machine.access import Access
from planrt.workers.machine.audit import Audit, Auditor
from planrt.workers.machine.backward import BackwardPasses
from planrt.workers.machine.devices import prepared
from planrt.workers.machine.eager import EagerOps
from planrt.workers.machine.events import (
    Again,
    Answer,
    Close,
    Connected,
    Cut,
    Disconnected,
    Event,
    Expired,
    Hold,
    Instruction,
    Part,
    PeerAnswered,
    PeerFailed,
    Probed,
    Received,
    Release,
    Reply,
    Steps,
    TimePassed,
    ToPeer,
    UsersChanged,
    Wait,
    Wake,
)
from planrt.workers.machine.failures import failure_of
from planrt.workers.machine.gate import Gate
from planrt.workers.machine.handshakes import REVOKED, Handshakes, Users
from planrt.workers.machine.joint.kept import Keeps
from planrt.workers.machine.joint.runs import JointOps
from planrt.workers.machine.keeping.openings import Openings
from planrt.workers.machine.keeping.sessions import KeptSessions
from planrt.workers.machine.keeping.tickets import Elsewhere as ShownElsewhere
from planrt.workers.machine.keeping.tickets import check_permitted
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.kinds.protocol import PeerError, RunCancelledError
from planrt.workers.machine.objects import KeptObjects
from planrt.workers.machine.peers import PeerOps
from planrt.workers.machine.protocols import ProtocolOps
from planrt.workers.machine.rounds.secure_sums import SecureSums
from planrt.workers.machine.rounds.training import TrainingOps
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.sharing.dealers import DealerOps
from planrt.workers.machine.sharing.parties import PartyOps
from planrt.workers.machine.siblings.neighbours import Board, Neighbours
from planrt.workers.machine.store import ObjectStore, Overview
from planrt.workers.wire import messages as m
from planrt.workers.wire.chain_runs import Reaches, always
from planrt.workers.wire.messages import own_versions
from planrt.workers.wire.proofs import Verifier
from planrt.workers.wire.refusals import TICKET_REFUSED

MOST_WAITING: Final = 10_000
"""Requests of one session that may wait for other workers at a time."""


@dataclass(slots=True)
class _Request:
    connection: int
    """Over which it came: its answer goes over the one that its session has then."""
    id: int
    steps: Steps
    session: Session
    body: m.Body
    """What was asked for."""
    keys: tuple[str, ...] = ()
    """Of the answers that it waits for."""
    run: int | None = None
    """Its number, where it is the run of a protocol."""
    holds: bool = False
    """Whether it keeps its connection waiting: what was posted on it. It has no reply then."""


class WorkerState:
    """One worker: its data sets and objects, the plans it was sent, its sessions, and requests that wait for peers.

    `id` names the worker; `device` is where its torch work runs. `users` maps the name of each user to the
    token that proves it, or to a verifier of that: private objects name the users who may see them. With `require_user`
    nobody gets a session who is none. With a `policy` nothing runs that breaks it;
    `approvals` are the owner's decisions about plans. `limits` is what it accepts, as clients are told.
    `deterministic`: whether only torch's deterministic kernels run; None: on everything but a CPU. `reaches` says
    whether a worker at one address can dial one at another. `access` says which user may do what with which data.
    `audit` is told what happens. `joint_runs` is where parts of joint runs are kept. `quota` is what the sessions of
    one user may keep; of it and of the policy's the stricter counts. `certificates` says whether its clients show some,
    and `dials` what it shows itself where it dials other workers. `knows_users`: whether it has users, where they are
    told later (`UsersChanged`). `signs_sums` is who it is in secure aggregations.
    """

    def __init__(
        self,
        id: str,
        *,
        device: str | torch.device = "cpu",
        users: Mapping[str, str] | None = None,
        require_user: bool = False,
        policy: Policy | None = None,
        approvals: Approvals | None = None,
        limits: Limits | None = None,
        deterministic: bool | None = None,
        reaches: Reaches = always,
        access: Access | None = None,
        audit: Audit | None = None,
        quota: Quota | None = None,
        joint_runs: Keeps | None = None,
        certificates: bool = False,
        dials: m.Dials | None = None,
        knows_users: bool | None = None,
        signs_sums: Identity | None = None,
    ) -> None:
        if not 1 <= len(id) <= 200:
            raise OptionError(f"a worker id has 1 to 200 characters, not {len(id)}")
        self.id = id
        self.device, self.deterministic = prepared(device, deterministic)
        """Whether whoever hands it events must see to deterministic kernels."""
        self._limits = limits or Limits()
        self._kept = KeptSessions(self._limits)
        self._siblings: Neighbours | None = None
        """The other processes of this worker, where this one serves the sessions of one user."""
        self.versions = own_versions(limits, resumes=self._kept.seconds > 0, dials=dials or m.Dials())
        self.store = ObjectStore()
        self._audit = Auditor(audit)
        self._gate = None if policy is None else Gate(policy, approvals, self._audit)
        self.access = access or Access()
        """Which user may do what with which data."""
        peers = PeerOps(id, self.store)
        self._objects = KeptObjects(self.store, self.device, self._gate, self.access, self._audit)
        self._passes = BackwardPasses(self._objects, peers)
        self._parties = PartyOps(self._objects)
        self._dealers = DealerOps()
        self._eager = EagerOps(self._objects, self._passes, peers, self._parties, self.device)
        self._protocols = ProtocolOps(id, self._objects, self.device, reaches)
        self._sums = SecureSums(id, self._gate, signs_sums)
        self._training = TrainingOps(id, self.device, self._gate, self._objects, self.access, self._sums)
        self._joint = JointOps(self._training, self._gate, self.access, self._audit, self.store, joint_runs)
        self._quota = (quota or Quota()).with_policy(policy)
        self._accounts: WeakValueDictionary[str, Account] = WeakValueDictionary()
        """Whose sessions and published objects there are, where that is limited."""
        self._handshakes = Handshakes(
            self.versions, Users(users), require_user=require_user, certificates=certificates
        )
        self._openings = self._new_openings(self._handshakes)
        self._sessions = self._openings.sessions
        """Connection -> its session."""
        self._waiting: dict[str, _Request] = {}
        self._at_work: list[Session] = []
        """Whose requests run now: one may wake another."""
        self._besides: list[Instruction] = []
        """What comes of sessions that gave way while something else was handled."""
        self._deliver: Callable[[ToPeer], None] | None = None
        """Takes what requests post to other workers, while their event is handled."""
        self.overview = Overview(
            self.store,
            self.device,
            lambda: [one for one in (*list(self._sessions.values()), *self._kept.away()) if not one.sibling],
            self._under_way,
            knows_users=bool(users) or require_user if knows_users is None else knows_users,
        )

    def _under_way(self) -> list[Session]:
        return [one.session for one in {id(one): one for one in list(self._waiting.values())}.values()]

    # ------------------------------------------------------------------------------ the owner's side

    def add_dataset(
        self, dataset: Any, key: str, *, tags: Sequence[str] = (), description: str = ""
    ) -> m.DatasetInfo:
        """See `TrainingOps.add_dataset`."""
        return self._training.add_dataset(dataset, key, tags=tags, description=description)

    def remove_dataset(self, key: str) -> None:
        """See `TrainingOps.remove_dataset`."""
        self._training.remove_dataset(key)

    def read_items(self) -> None:
        """See `TrainingOps.read_items`."""
        self._training.read_items()

    def add_tensor(self, id: int, tensor: torch.Tensor) -> None:
        """Holds `tensor` as the worker's own; clients find it by its tags. If a release rule of the worker's policy is
        about one of these, nobody may read it.

        Raises:
            DuplicateIdError: the id is taken.
        """
        tags, description = tensor.__dict__.get("_tags", ()), tensor.__dict__.get("_description", "")
        with torch.no_grad():
            value = tensor.detach().to(self.device).requires_grad_(tensor.requires_grad)
        label = (
            frozenset[str]()
            if self._gate is not None and self._gate.covers(tags)
            else self.access.label(tags)
        )
        self.store.add(
            id,
            StoredObject(
                value,
                "",
                label,
                tags=tuple(tags),
                description=description,
                source=frozenset(tags),
                original=True,
            ),
        )

    def has_tensor(self, tensor: torch.Tensor) -> bool:
        """Returns whether the worker holds such a tensor of its own: the same values, tags and description."""
        tags, description = tensor.__dict__.get("_tags", ()), tensor.__dict__.get("_description", "")
        return any(
            isinstance(stored.value, torch.Tensor)
            and (stored.tags, stored.description) == (tuple(tags), description)
            and torch.equal(stored.value.detach().to(tensor.device), tensor.detach())
            for stored in self.store.objects.values()
            if stored.owner == ""
        )

    def hand_on_sessions(self) -> None:
        """Lets other processes serve the sessions: clients only prove who they are to this one (`HandOn`)."""
        self._openings.hands_on = True

    def knows(self, token: str) -> bool:
        """Returns whether sessions that a token of that id has opened may go on; True for none."""
        return self._handshakes.knows(token)

    def serve_alone(
        self,
        audit: Audit | None,
        approvals: Decisions | None,
        board: Board,
        tickets: ShownElsewhere | None = None,
        joint_runs: Keeps | None = None,
    ) -> None:
        """Makes this the state of a process that serves the sessions of one user, after another process has found out
        who its clients are. `audit`, `approvals`, `board`, `tickets` and `joint_runs` are that one's."""
        self._siblings = Neighbours(board, self._objects, self.access, self.device)
        self._kept = KeptSessions(self._limits)  # of this process: sessions of the one before it are over
        self._handshakes = Handshakes(self.versions, Users(None))
        self._openings = self._new_openings(self._handshakes)
        self._handshakes.tickets.elsewhere = tickets
        self._openings.gives_tickets = tickets is not None
        self._sessions = self._openings.sessions
        self._audit.to(audit)
        self._joint.folder = joint_runs
        if self._gate is not None:
            self._gate.approving.ask(approvals)

    def _new_openings(self, handshakes: Handshakes) -> Openings:
        return Openings(
            self.id,
            handshakes,
            self._kept,
            self._audit,
            datasets=self._training.seen_by,
            when_opened=self._open_account,
        )

    def note_ticket(self, client: Session, id: str, verifier: Verifier, asked: m.Delegate) -> None:
        """Takes note of a ticket that another process gave, for which `client` stands, and that is proved here."""
        self._handshakes.note_ticket(client, id, verifier, asked)

    def tickets_of(self, client: Session) -> int:
        """Returns how many of that process' tickets there are."""
        return self._handshakes.tickets.of(client)

    def forget_tickets(self, client: Session, id: str = "") -> None:
        """Forgets one of that process' tickets, or all of them."""
        if id and self._handshakes.tickets.is_of(id, client):
            self._handshakes.tickets.forget(id)
        elif not id:
            self._handshakes.tickets.ended(client)

    def kept_name(self, connection: int) -> str | None:
        """Returns the name under which the session of a connection goes on over another one; None if it does not."""
        session = self._sessions.get(connection)
        return session.kept.name if session is not None and session.kept is not None else None

    @property
    def has_sessions(self) -> bool:
        """True where there are sessions, or some that may be gone on with."""
        return bool(self._sessions or len(self._kept))

    def is_open(self, connection: int) -> bool:
        """Returns whether a connection has a session: its handshake is over."""
        return connection in self._sessions

    @property
    def quota(self) -> Quota:
        """The limits of what one user may keep."""
        return self._quota

    def whose(self, connection: int) -> str:
        """Returns for whom the session of a connection counts; ``""`` where it has none."""
        session = self._sessions.get(connection)
        return "" if session is None else session.whose(self._handshakes.host(connection))

    def keep_no_longer(self, connection: int) -> None:
        """Lets the session of a connection end with it; answers that it has not heard are gone."""
        session = self._sessions.get(connection)
        if session is not None and session.kept is not None:
            session.kept.give_up()

    def accepted_by(self, connection: int) -> m.Versions:
        """Returns what the client of a connection accepts; what everybody does, before it has said so."""
        session = self._sessions.get(connection)
        return session.client if session is not None and session.client is not None else self.versions

    @property
    def datasets(self) -> Mapping[str, m.DatasetInfo]:
        """key -> what clients are told about the data set."""
        return self._training.datasets

    # ------------------------------------------------------------------------------------ the machine

    def handle(
        self,
        event: Event,
        over: Callable[[], bool] = lambda: False,
        deliver: Callable[[ToPeer], None] | None = None,
    ) -> list[Instruction]:
        """Takes one event and returns what to do about it, in this order; never raises for anything a client sent.

        Between ops that a client posted it asks whether the turn of this event is `over`: what is left then is an event
        of its own, which it returns (`Again`), so that the ops of one client never keep all others waiting.

        What a request posts to another worker is given to `deliver` at once, where there is one, and not returned: it
        leaves while the request computes on.

        What comes next is the caller's. It hands in the next event only when this has returned, and it carries out
        instructions in the order in which they were returned. After

        * ``Connected``: hand in what arrives on the connection.
        * ``Received``: for each ``ToPeer`` with a key in what is returned, hand in ``PeerAnswered`` or ``PeerFailed``
          with that key once; until then the request has no ``Reply``. Other events may come in between.
        * ``PeerAnswered``, ``PeerFailed``: as after ``Received``; a key that nothing waits for any more is no error.
        * ``Again`` in what is returned: hand in its event before anything else of the same connection.
        * ``Hold`` in what is returned: hand in nothing else of that connection, until a ``Release`` for it has been
          returned for another event; then what was left, and go on. Where the connection ends meanwhile, hand in
          ``Cut``: what it is held for ends, if it does not go on after a cut. ``Disconnected`` comes last, as always.
        * ``Disconnected``, or a ``Close`` that was carried out: nothing more for that connection. ``Disconnected`` is
          handed in once, after the last message. What other workers answer is handed in as before.
        * ``Probe``: hand in ``Probed`` once, before anything else of that connection.
        """
        self._deliver = deliver
        instructions = self._handle(event, over)
        besides, self._besides = self._besides, []
        return [*instructions, *besides]

    def _handle(self, event: Event, over: Callable[[], bool]) -> list[Instruction]:
        match event:
            case Connected(connection, channel):
                self._openings.connected(connection, channel)
                return []
            case Received():
                return self._received(event, over)
            case PeerAnswered(key) | TimePassed(key):
                return self._wake(self._waiting.get(key), event)
            case PeerFailed(key, reason):
                return self._wake(self._waiting.get(key), PeerError(reason, key))
            case Disconnected(connection):
                return self._disconnected(connection)
            case Cut(connection):
                session = self._sessions.get(connection)
                return [] if session is None else self._end_computations(session)
            case Probed(connection, alive):
                return self._openings.probed(connection, alive=alive)
            case Expired(name, absence):
                session = self._kept.expired(name, absence)
                return [] if session is None else self._end(session)
            case UsersChanged(users):
                return self._users_changed(Users(users))

    def _users_changed(self, users: Users) -> list[Instruction]:
        """Sessions whose token counts no longer end now, and so do those that wait for their client to come back."""
        self._handshakes.change_users(users)
        instructions = self._openings.forget_revoked()
        for connection, session in list(self._sessions.items()):
            if self._handshakes.counts(session) or connection not in self._sessions:
                continue
            if session.kept is not None:
                session.kept.give_up()
            failure = m.Failure("HandshakeError", REVOKED)
            instructions += [Reply(connection, m.Envelope(0, failure)), *self._disconnected(connection)]
            instructions.append(Close(connection))
        for session in self._kept.away():
            if not self._handshakes.counts(session) and self._kept.has(session):
                instructions += self._end(session)
        return instructions

    def _disconnected(self, connection: int) -> list[Instruction]:
        session = self._openings.disconnected(connection)
        if session is None:
            return []
        session.connection = None
        alone = self._end_computations(session)
        if self._siblings is not None:
            alone += self._siblings.gone(session)
            self._tell_computations()
        keep, over = self._kept.left(session)
        ended = [session] if keep is None else over
        return [
            *alone,
            *(() if keep is None else (keep,)),
            *(one for other in ended for one in self._end(other)),
        ]

    def _end_computations(self, session: Session) -> list[Instruction]:
        """Computations on shares and joint runs do not go on after a cut: the others hear so at once."""
        return [
            *self._dealers.end(session),
            *self._heard(*self._parties.gone(session)),
            *self._heard(*self._joint.gone(session)),
        ]

    def _end(self, session: Session) -> list[Instruction]:
        """A session is over."""
        self._kept.ended(session)
        session.leave_graphs()
        self._audit.ended(session)
        self._handshakes.tickets.ended(session)
        instructions: list[Instruction] = self._end_those_for(session)
        for request in self._of(session):
            if request.run is not None:  # what it made on other workers must go
                instructions += self._wake(request, RunCancelledError("its client is gone"))
            else:
                self._forget_keys(request)
                request.steps.close()
        parted = [Part(list(session.links.values()))] if session.links else []
        return [*instructions, *self._objects.end(session), *parted]

    def _end_those_for(self, client: Session) -> list[Instruction]:
        """Ends the sessions that other workers opened in the name of one that is over."""
        instructions: list[Instruction] = []
        for connection, session in list(self._sessions.items()):
            if session.by is not None and session.by.client is client:
                if session.kept is not None:
                    session.kept.give_up()
                failure = m.Failure(TICKET_REFUSED, "the session that gave the ticket is over")
                instructions += [Reply(connection, m.Envelope(0, failure)), *self._disconnected(connection)]
                instructions.append(Close(connection))
        for session in self._kept.away():
            if session.by is not None and session.by.client is client:
                instructions += self._end(session)
        return instructions

    def _of(self, session: Session) -> list[_Request]:
        """The requests of a session that wait for peers."""
        waiting = {id(one): one for one in self._waiting.values() if one.session is session}
        return list(waiting.values())

    def _run_of(self, session: Session, run: int) -> _Request | None:
        return next((one for one in self._of(session) if one.run == run), None)

    def _heard(self, sends: Sequence[ToPeer], keys: Sequence[str]) -> list[Instruction]:
        """What goes to other workers, and what comes of it that requests under these keys go on."""
        instructions: list[Instruction] = [*sends]
        for key in keys:
            instructions += self._wake(self._waiting.get(key), TimePassed(key))
        return instructions

    def _wake(
        self, request: _Request | None, sent: PeerAnswered | TimePassed | Exception
    ) -> list[Instruction]:
        """A request goes on that waited, if it still does."""
        if request is None:
            return []
        self._forget_keys(request)
        if request.session.kept is not None:
            request.session.kept.before_writing()
        return self._advance(request, sent)

    def _forget_keys(self, request: _Request) -> None:
        if request.keys:
            request.session.waiting -= 1
        for key in request.keys:
            del self._waiting[key]
        request.keys = ()

    def _received(self, event: Received, over: Callable[[], bool]) -> list[Instruction]:
        connection, envelope, body = event.connection, event.envelope, event.envelope.body
        session = self._sessions.get(connection)
        if isinstance(body, m.Hello | m.Prove):
            return self._openings.open(connection, envelope, body)
        if session is None:
            failure = m.Failure("HandshakeError", "the first message of a connection must be Hello")
            return [Reply(connection, m.Envelope(envelope.id, failure)), Close(connection)]
        if session.over:
            return [Close(connection)]
        if session.kept is not None and not event.rest:
            try:
                session.kept.takes(envelope)
            except WireError as error:
                session.kept.give_up()
                failure = m.Failure("WireError", str(error))
                return [Reply(connection, m.Envelope(0, failure)), Close(connection)]
        if isinstance(body, m.Ack | m.Bye):
            return self._leaves(connection, session, body) if isinstance(body, m.Bye) else []
        if envelope.id == 0:
            return [*self._posts(session, event, over), *self._acknowledges(session, event)]
        request = _Request(connection, envelope.id, self._steps(session, body, event.tensors), session, body)
        if isinstance(body, m.RunProtocol):
            request.run = body.run
        return [*self._advance(request, None), *self._acknowledges(session, event)]

    def _leaves(self, connection: int, session: Session, bye: m.Bye) -> list[Instruction]:
        """The client closes its session, for good or not."""
        if session.kept is not None and bye.comes_back:
            session.kept.gives_way = True
        elif session.kept is not None:
            session.kept.give_up()
        return [*self._disconnected(connection), Close(connection)]

    def _acknowledges(self, session: Session, event: Received) -> list[Instruction]:
        """Tells the client that its messages were taken, where no answer has said so for long."""
        kept = session.kept
        if kept is None or session.connection is None or not kept.due(event.tensors):
            return []
        return [Reply(session.connection, m.Envelope(0, m.Ack(), kept.taken))]

    def _posts(self, session: Session, event: Received, over: Callable[[], bool]) -> list[Instruction]:
        """Does what a message asks for that is not answered."""
        body = event.envelope.body
        if isinstance(body, m.ActFor):
            return self._acts_for(session, body)
        if isinstance(body, m.CancelRun):
            return self._wake(self._run_of(session, body.run), RunCancelledError("cancelled"))
        if isinstance(body, m.Post):
            return self._post(event.connection, session, body, over)
        return self._posted(event.connection, session, body, event.tensors)

    def _acts_for(self, session: Session, body: m.ActFor) -> list[Instruction]:
        """Takes the ticket for acting in the name of a session's client at another worker."""
        try:
            check_permitted(session, body)
            return [*session.act_for(body)]
        except LocalError as error:
            session.failure = session.failure or failure_of(error)
            return []

    def _post(
        self, connection: int, session: Session, body: m.Post, over: Callable[[], bool]
    ) -> list[Instruction]:
        """Runs what was posted, until its turn is over, or until it has to wait for other workers: then everything that
        comes after it on this connection waits, too."""
        try:
            check_permitted(session, body)
            posted = self._eager.post(session, body, over)
        except Exception as error:  # as in _advance
            session.failure = session.failure or failure_of(error)
            return []
        instructions: list[Instruction] = [*posted.sends]
        left = (
            None if posted.left is None else Received(connection, m.Envelope(0, posted.left), [], rest=True)
        )
        if posted.run is not None:
            request = _Request(connection, 0, posted.run, session, body)
            instructions += self._advance(request, None)
            if request.keys:
                request.holds = True
                return [*instructions, Hold(connection, left)]
        return instructions if left is None else [*instructions, Again(left)]

    def _posted(
        self, connection: int, session: Session, body: m.Body, tensors: list[torch.Tensor]
    ) -> list[Instruction]:
        """Does what a message asks for that is not answered; what it could not do shows at the session's next
        request."""
        try:
            check_permitted(session, body)  # before anything is passed on to another process
            if self._siblings is not None:
                self._siblings.check(session, body)
                if (peer := self._siblings.computing(session, body)) is not None:
                    return [ToPeer(peer, body, tensors)]
                if isinstance(body, m.Claim) and self._siblings.is_elsewhere(body):
                    return self._claim_elsewhere(self._siblings, connection, session, body)
            self.access.check_publish(session.user, body)
            match body:
                case m.Opening() | m.Corrections() | m.FailGroup():
                    return self._heard(*self._parties.heard(session, body, tensors))
                case m.Parcel() | m.FailJoint():
                    return self._heard(*self._joint.heard(session, body, tensors))
                case m.EndJoint():
                    ended = self._heard(*self._joint.end(session, body))
                    self._tell_computations()
                    return ended
                case m.EndGroup():
                    self._dealers.stop(session, body.group)
                    ended = self._heard(*self._parties.end(session, body))
                    self._tell_computations()
                    return ended
                case m.Deal():
                    request = _Request(connection, 0, self._dealers.deal(session, body), session, body)
                    return self._advance(request, None)
                case _:
                    return [*self._do_posted(session, body, tensors)]
        except Exception as error:  # as in _advance
            session.failure = session.failure or failure_of(error)
            self._audit.request_failed(session, body, error)
        return []

    def _claim_elsewhere(
        self, siblings: Neighbours, connection: int, session: Session, body: m.Claim
    ) -> list[Instruction]:
        """Takes over what another process has, while what its client posts next waits."""

        def steps() -> Steps:
            try:
                yield from siblings.claim(session, body)
            except Exception as error:  # as in _posted
                session.failure = session.failure or failure_of(error)
            return m.Done(), ()

        request = _Request(connection, 0, steps(), session, body)
        instructions = self._advance(request, None)
        if not request.keys:
            return instructions
        request.holds = True
        return [*instructions, Hold(connection, None)]

    def _tell_computations(self) -> None:
        if self._siblings is not None:
            self._siblings.computations_are([*self._parties.names, *self._joint.names])

    def _do_posted(self, session: Session, body: m.Body, tensors: list[torch.Tensor]) -> Sequence[ToPeer]:
        match body:
            case m.Put():
                self._objects.put(session, body, tensors)
            case m.StorePlan():
                self._objects.store_plan(session, body, tensors)
            case m.PutShare():
                self._parties.put(session, body, tensors)
            case m.StoreProtocol():
                self._protocols.store(session, body, tensors)
            case m.DeployProtocol():
                return self._protocols.deploy(session, body)
            case m.PutPointer():
                return self._objects.post_pointer(session, body)
            case m.Describe():
                self._objects.describe(session, body)
            case m.Remove():
                return self._remove(session, body)
            case m.Claim():
                self._claim(session, body)
            case m.HandOver():
                self._hand_over(session, body)
            case _:
                raise LocalError(f"messages of type {type(body).__name__} are requests: number them")
        return ()

    def _remove(self, session: Session, body: m.Remove) -> Sequence[ToPeer]:
        elsewhere = [] if self._siblings is None else self._siblings.removed(session, body)
        return [*self._objects.remove(session, body), *elsewhere]

    def _hand_over(self, session: Session, body: m.HandOver) -> Answer:
        if self._siblings is not None and session.sibling:
            self._siblings.came_back(body.ids)
        return self._objects.hand_over(session, body)

    def _claim(self, session: Session, body: m.Claim) -> None:
        self._objects.claim(session, body, self._by_id())

    def _by_id(self) -> dict[str, Session]:
        return {one.id: one for one in (*self._sessions.values(), *self._kept.away())}

    def _open_account(self, session: Session, host: str) -> None:
        if not self._quota:
            return
        whose = session.whose(host)
        account = self._accounts.get(whose)
        if account is None:
            account = self._accounts[whose] = Account(self._quota, lambda: self._make_room(whose))
        self.store.open_account(session.id, account)

    def _make_room(self, whose: str) -> bool:
        """Lets a plan of a user's rounds go, which its client can send again, or ends a session that was closed, where
        the others of the same user need the room."""
        account = self._accounts.get(whose)
        if account is not None and self._training.give_way(account):
            return True
        session = self._kept.to_give_way(whose, self._at_work)
        if session is not None:
            self._besides += self._end(session)
        return session is not None

    def _advance(
        self, request: _Request, sent: PeerAnswered | TimePassed | Exception | None
    ) -> list[Instruction]:
        """Runs a request until it waits for a peer or is answered; `sent` is what it waited for."""
        instructions: list[Instruction] = []
        self._at_work.append(request.session)
        try:
            while True:
                step = request.steps.throw(sent) if isinstance(sent, Exception) else request.steps.send(sent)
                sent = None
                if isinstance(step, Wake):
                    instructions += self._wake(self._waiting.get(step.key), TimePassed(step.key))
                    continue
                if self._deliver is not None and isinstance(step, ToPeer) and not step.key:
                    self._deliver(step)
                    continue
                instructions.append(step)
                if isinstance(step, Wait):
                    request.keys = (step.key, *step.others)
                    request.session.waiting += 1
                    self._waiting.update(dict.fromkeys(request.keys, request))
                    return instructions
        except StopIteration as stop:
            body, tensors = stop.value or (m.Done(), ())
        except Exception as error:  # whatever a request raises is its client's answer, never the worker's end
            body, tensors = failure_of(error), ()
            self._audit.request_failed(request.session, request.body, error)
        finally:
            self._at_work.pop()
        if not request.id:
            return [*instructions, Release(request.connection)] if request.holds else instructions
        session, kept = request.session, request.session.kept
        envelope = (
            m.Envelope(request.id, body)
            if kept is None
            else kept.answered(request.id, body, tensors, self.store.account_of(session.id))
        )
        if session.connection is not None:
            instructions.append(Reply(session.connection, envelope, tensors))
            if session.over:
                instructions.append(Close(session.connection))
        return instructions

    # ----------------------------------------------------------------------------------- the requests

    def _steps(self, session: Session, body: m.Body, tensors: list[torch.Tensor]) -> Steps:
        check_permitted(session, body)
        if session.waiting >= MOST_WAITING:
            raise LocalError(
                f"{session.waiting:,} requests of this session wait for other workers, as many as may: await some first"
            )
        if isinstance(body, m.Resume):  # which nothing keeps from being heard
            return self._passes.resume(session)
        self._objects.raise_unseen(session)
        if self._siblings is not None:
            self._siblings.check(session, body)
            if (peer := self._siblings.computing(session, body)) is not None:
                return (yield from self._siblings.relayed(session, peer, body, tensors))
        self.access.check_publish(session.user, body)
        match body:
            case m.Fetch():
                return (yield from self._objects.fetch(session, body))
            case m.Backward():
                return (yield from self._passes.run(session, body))
            case m.Call():
                return (yield from self._eager.call(session, body))
            case m.Put():
                return self._objects.put(session, body, tensors)
            case m.StorePlan():
                return self._objects.store_plan(session, body, tensors)
            case m.ReadPlan():
                return self._objects.read_plan(session, body)
            case m.StoreProtocol():
                return self._protocols.store(session, body, tensors)
            case m.DeployProtocol():
                yield from self._protocols.deploy(session, body)
                return m.Done(), ()
            case m.ReadRun():
                return self._protocols.read_run(session, body)
            case m.RunProtocol():
                return (yield from self._protocols.run(session, body))
            case m.Search():
                here = self._objects.search(session, body)
                return (
                    here
                    if self._siblings is None
                    else (yield from self._siblings.search(session, body, here))
                )
            case m.Lend() if self._siblings is not None:
                return self._siblings.lend(session, body, self._by_id())
            case m.Move():
                return (yield from self._objects.move(session, body))
            case m.HandOver():
                return self._hand_over(session, body)
            case m.Delegate():
                return self._handshakes.give_ticket(session, body), ()
            case m.ActFor():
                yield from session.act_for(body)
                return m.Done(), ()
            case m.Claim():
                if self._siblings is not None and self._siblings.is_elsewhere(body):
                    return (yield from self._siblings.claim(session, body))
                self._claim(session, body)
                return m.Done(), ()
            case m.Remove():
                yield from self._remove(session, body)
                return m.Done(), ()
            case m.PutPointer():
                return (yield from self._objects.put_pointer(session, body))
            case m.Clear():
                yield from self._objects.clear(session)
                return m.Done(), ()
            case m.ListObjects():
                return self._objects.listing(session)
            case m.MakeGroup():
                if self._siblings is not None:
                    self._siblings.check_new(body)
                made = self._parties.make(session, body)
                self._tell_computations()
                return made
            case m.MakeDealer():
                return (yield from self._dealers.make(session, body))
            case m.GiveSeed():
                return (yield from self._parties.take_seed(session, body))
            case m.JoinGroup():
                return self._parties.join(session, body)
            case m.AskNeeds():
                return (yield from self._parties.ask_needs(session, body))
            case m.PutShare():
                return self._parties.put(session, body, tensors)
            case m.ShareOut():
                return (yield from self._parties.share_out(session, body))
            case m.ReadTraffic():
                return self._parties.traffic(session, body)
            case m.AskStatus():
                return self.overview.told_to(session), ()
            case m.ReadTable():
                return self._joint.read_table(session, body)
            case m.OpenJoint():
                if self._siblings is not None:
                    self._siblings.check_new(body)
                opened = yield from self._joint.open(session, body)
                self._tell_computations()
                return opened
            case m.JoinJoint():
                return self._joint.join(session, body)
            case m.WorkJoint():
                return (yield from self._joint.work(session, body, tensors))
            case m.CountObjects():
                return m.Counted(self.store.count(session.id)), ()
            case m.RunPlan():
                return self._training.run_plan(session, body, tensors)
            case m.PutPlan():
                return self._training.put_plan(session, body, tensors)
            case m.AskApproval():
                status = Status("approved")
                if self._gate is not None:
                    status = self._gate.approving.told(
                        body.plan, session.user, sent=body.plan in session.asked
                    )
                return m.Approval(status.status, status.why), ()
            case m.Fit():
                return self._training.fit(session, body, tensors)
            case m.ReadOptimizer():
                return self._training.read_optimizer(session, body)
            case m.PutOptimizer():
                return self._training.put_optimizer(session, body, tensors)
            case m.Evaluate():
                return self._training.evaluate(session, body, tensors)
            case m.JoinSum():
                return self._sums.join(session, body)
            case m.ShareSecrets():
                return self._sums.share(session, body)
            case m.FitMasked():
                return self._training.fit_masked(session, body, tensors)
            case m.SignSurvivors():
                return self._sums.sign(session, body)
            case m.RevealShares():
                return self._sums.reveal(session, body)
            case _:
                raise LocalError(f"a worker does not take messages of type {type(body).__name__}")
