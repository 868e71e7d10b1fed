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

`WorkerState` is what its owner and the host see. What it consists of (`handling.parts`) is shared by those who handle
its events: `handling.requests` (generators that wait and go on), `handling.answering` (what is asked for),
`handling.posting` (what is not answered) and `handling.endings` (sessions that are over).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch

from planrt.errors import OptionError, WireError
from planrt.logs import get_logger
from planrt.plans.policy.approvals import Approvals, Decisions
from planrt.plans.policy.budgets import CountsFailures
from planrt.plans.policy.quotas import Account, Quota
from planrt.plans.policy.rules import Policy
from planrt.serde.frames import Limits
from planrt.sharing.secure_sum.signing import Identity
from planrt.workers.machine.access import Access
from planrt.workers.machine.audit import Audit, Auditor
from planrt.workers.machine.backward import BackwardPasses
from planrt.workers.machine.counting.accounts import Accounts
from planrt.workers.machine.devices import prepared
from planrt.workers.machine.eager import EagerOps
from planrt.workers.machine.events import (
    Arrived,
    Close,
    Connected,
    Cut,
    Disconnected,
    Event,
    Expired,
    Happening,
    Instruction,
    PeerAnswered,
    PeerFailed,
    Probed,
    Received,
    Reply,
    TimePassed,
    ToPeer,
    UsersChanged,
)
from planrt.workers.machine.gate import Gate
from planrt.workers.machine.handling.answering import answer
from planrt.workers.machine.handling.endings import Endings
from planrt.workers.machine.handling.parts import Parts
from planrt.workers.machine.handling.posting import Posts
from planrt.workers.machine.handling.requests import Request, Requests
from planrt.workers.machine.handling.short import is_short
from planrt.workers.machine.handshakes import Handshakes, Users
from planrt.workers.machine.joint.kept import Keeps
from planrt.workers.machine.joint.runs import JointOps
from planrt.workers.machine.keeping.openings import Openings
from planrt.workers.machine.keeping.sessions import KeptSessions
from planrt.workers.machine.keeping.tickets import Elsewhere as ShownElsewhere
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.kinds.protocol import PeerError
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

log = get_logger("planrt.worker")

_OF_SESSIONS: Final = frozenset({m.Hello, m.Prove, m.Ack, m.Bye})
"""Messages that are about the session itself."""


class WorkerState:
    """One worker: its data sets and objects, the plans it was sent, its sessions, and requests that wait for peers.

    `id` names the worker; `device` is where its torch work runs. `users` maps the name of each user to the
    token that proves it, or to a verifier of that: private objects name the users who may see them. With `require_user`
    nobody gets a session who is none. With a `policy` nothing runs that breaks it;
    `approvals` are the owner's decisions about plans. `limits` is what it accepts, as clients are told.
    `deterministic`: whether only torch's deterministic kernels run; None: on everything but a CPU. `reaches` says
    whether a worker at one address can dial one at another. `access` says which user may do what with which data.
    `audit` is told what happens. `joint_runs` is where parts of joint runs are kept. `quota` is what one
    user, and what all together may keep: of it and of the policy the stricter. `certificates` says whether its clients
    show some, and `dials` what it shows itself where it dials other workers. `knows_users`: whether it has users, where
    they are told later (`UsersChanged`). `signs_sums` is who it is in secure aggregations.
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
        kept = KeptSessions(self._limits)
        self.versions = own_versions(limits, resumes=kept.seconds > 0, dials=dials or m.Dials())
        self.store = ObjectStore()
        self.access = access or Access()
        """Which user may do what with which data."""
        auditor = Auditor(audit)
        gate = None if policy is None else Gate(policy, approvals, auditor)
        peers = PeerOps(id, self.store)
        objects = KeptObjects(self.store, self.device, gate, self.access, auditor)
        passes = BackwardPasses(objects, peers)
        parties = PartyOps(objects)
        sums = SecureSums(id, gate, signs_sums)
        training = TrainingOps(id, self.device, gate, objects, self.access, sums, self._limits)
        self.accounts = Accounts((quota or Quota()).with_policy(policy), self.store, self._make_room)
        """For whom sessions count, where that is limited."""
        self._besides: list[Instruction] = []
        """What comes of sessions that gave way while something else was handled."""
        handshakes = Handshakes(
            self.versions, Users(users), require_user=require_user, certificates=certificates
        )
        self._requests = Requests(self.store, auditor)
        self.overview = Overview(
            self.store,
            self.device,
            self._clients_sessions,
            self._requests.sessions,
            knows_users=bool(users) or require_user if knows_users is None else knows_users,
        )
        self._parts = Parts(
            device=self.device,
            store=self.store,
            gate=gate,
            access=self.access,
            audit=auditor,
            objects=objects,
            passes=passes,
            parties=parties,
            dealers=DealerOps(self.store),
            eager=EagerOps(objects, passes, peers, parties, self.device),
            protocols=ProtocolOps(id, objects, self.device, reaches),
            sums=sums,
            training=training,
            joint=JointOps(training, gate, self.access, auditor, self.store, joint_runs),
            handshakes=handshakes,
            openings=self._new_openings(handshakes, kept, auditor, training),
            kept=kept,
            overview=self.overview,
        )
        self.is_short: Callable[[Event], bool] = partial(is_short, self._parts, self._requests)
        """Returns whether `handle` takes no more than some milliseconds for an event, as far as is known. To be asked
        while no event is being handled."""
        self._posts = Posts(self._parts, self._requests)
        self._endings = Endings(self._parts, self._requests)

    def _clients_sessions(self) -> list[Session]:
        parts = self._parts
        return [one for one in (*list(parts.sessions.values()), *parts.kept.away()) if not one.sibling]

    # ------------------------------------------------------------------------------ the owner's side

    def add_dataset(
        self, dataset: Any, key: str, *, tags: Sequence[str] = (), description: str = ""
    ) -> m.DatasetInfo:
        """See `TrainingOps.add_dataset`."""
        return self._parts.training.add_dataset(dataset, key, tags=tags, description=description)

    def remove_dataset(self, key: str) -> None:
        """See `TrainingOps.remove_dataset`."""
        self._parts.training.remove_dataset(key)

    def read_items(self) -> None:
        """See `TrainingOps.read_items`."""
        self._parts.training.read_items()

    def add_tensor(self, id: int, tensor: torch.Tensor) -> None:
        """Holds `tensor` as the worker's own; clients find it by its tags. If a release rule of the worker's policy is
        about one of these, nobody may read it; if none is, and everybody may, the log says so.

        Raises:
            DuplicateIdError: the id is taken.
        """
        tags, description = tensor.__dict__.get("_tags", ()), tensor.__dict__.get("_description", "")
        with torch.no_grad():
            value = tensor.detach().to(self.device).requires_grad_(tensor.requires_grad)
        label = (
            frozenset[str]()
            if self._parts.gate is not None and self._parts.gate.covers(tags)
            else self.access.label(tags)
        )
        if label is None and self._parts.gate is not None and (told := self._parts.gate.without_rule(tags)):
            log.warning("no_release_rule", worker=self.id, object=id, **told)
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
        self._parts.openings.hands_on = True

    def knows(self, token: str) -> bool:
        """Returns whether sessions that a token of that id has opened may go on; True for none."""
        return self._parts.handshakes.knows(token)

    def serve_alone(
        self,
        audit: Audit | None,
        approvals: Decisions | None,
        board: Board,
        tickets: ShownElsewhere | None = None,
        joint_runs: Keeps | None = None,
        failures: CountsFailures | None = None,
    ) -> None:
        """Makes this the state of a process that serves the sessions of one user, after another process has found out
        who its clients are. `audit`, `approvals`, `board`, `tickets`, `joint_runs` and `failures` are that one's."""
        parts = self._parts
        parts.siblings = Neighbours(board, parts.objects, self.access, self.device)
        parts.kept = KeptSessions(self._limits)  # of this process: sessions of the one before it are over
        parts.handshakes = Handshakes(self.versions, Users(None))
        parts.openings = self._new_openings(parts.handshakes, parts.kept, parts.audit, parts.training)
        parts.handshakes.tickets.elsewhere = tickets
        parts.openings.gives_tickets = tickets is not None
        parts.audit.to(audit)
        parts.joint.folder = joint_runs
        if parts.gate is not None:
            parts.gate.approving.ask(approvals)
            if failures is not None and parts.gate.policy.max_daily_failures is not None:
                parts.gate.failures = failures

    def _new_openings(
        self, handshakes: Handshakes, kept: KeptSessions, audit: Auditor, training: TrainingOps
    ) -> Openings:
        return Openings(
            self.id, handshakes, kept, audit, datasets=training.seen_by, when_opened=self.accounts.open
        )

    @property
    def failures(self) -> CountsFailures | None:
        """Counts of runs on data that failed, over all sessions; None without a policy."""
        return None if self._parts.gate is None else self._parts.gate.failures

    @property
    def max_pending(self) -> int | None:
        """Plans of one user that may wait for the owner; None for any number."""
        return None if self._parts.gate is None else self._parts.gate.policy.max_pending

    def note_ticket(self, client: Session, id: str, verifier: Verifier, asked: m.Delegate) -> None:
        """Takes note of a ticket that another process gave, for which `client` stands, and that is proved here."""
        self._parts.handshakes.note_ticket(client, id, verifier, asked)

    def tickets_of(self, client: Session) -> int:
        """Returns how many of that process' tickets there are."""
        return self._parts.handshakes.tickets.of(client)

    def forget_tickets(self, client: Session, id: str = "") -> None:
        """Forgets one of that process' tickets, or all of them."""
        if id and self._parts.handshakes.tickets.is_of(id, client):
            self._parts.handshakes.tickets.forget(id)
        elif not id:
            self._parts.handshakes.tickets.ended(client)

    def kept_name(self, connection: int) -> str | None:
        """Returns the name under which the session of a connection goes on over another one; None if it does not."""
        session = self._parts.sessions.get(connection)
        return session.kept.name if session is not None and session.kept is not None else None

    @property
    def has_sessions(self) -> bool:
        """True where there are sessions, or some that may be gone on with."""
        return bool(self._parts.sessions or len(self._parts.kept))

    @property
    def gives_way(self) -> bool:
        """True where there are only sessions that their clients have closed, which may come back if nobody needs the
        room."""
        return not self._parts.sessions and self._parts.kept.all_give_way()

    def is_open(self, connection: int) -> bool:
        """Returns whether a connection has a session: its handshake is over."""
        return connection in self._parts.sessions

    def whose(self, connection: int) -> str:
        """Returns for whom the session of a connection counts; ``""`` where it has none."""
        session = self._parts.sessions.get(connection)
        return "" if session is None else session.whose(self._parts.handshakes.host(connection))

    def keep_no_longer(self, connection: int) -> None:
        """Lets the session of a connection end with it; answers that it has not heard are gone."""
        session = self._parts.sessions.get(connection)
        if session is not None and session.kept is not None:
            session.kept.give_up()

    def accepted_by(self, connection: int) -> m.Versions:
        """Returns what the client of a connection accepts; what everybody does, before it has said so."""
        session = self._parts.sessions.get(connection)
        return session.client if session is not None and session.client is not None else self.versions

    @property
    def datasets(self) -> Mapping[str, m.DatasetInfo]:
        """key -> what clients are told about the data set."""
        return self._parts.training.datasets

    # ------------------------------------------------------------------------------------ the machine

    def handle(
        self,
        event: Event,
        over: Callable[[], bool] = lambda: False,
        deliver: Callable[[ToPeer | Reply], None] | None = None,
    ) -> list[Instruction]:
        """Takes one event and returns what to do about it, in this order; never raises for anything a client sent.

        Between ops that a client posted it asks whether the turn of this event is `over`: what is left then is an event
        of its own, which it returns (`Again`), so that the ops of one client never keep all others waiting.

        What a request posts to another worker is given to `deliver` at once, where there is one, and not returned: it
        leaves while the request computes on. So is the reply of a request that it wakes.

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
        self._requests.deliver = deliver
        instructions = self._received(event, over) if isinstance(event, Received) else self._happened(event)
        if self._besides:
            besides, self._besides = self._besides, []
            return [*instructions, *besides]
        return instructions

    def _happened(self, event: Happening) -> list[Instruction]:
        """Takes an event that is no message."""
        match event:
            case Connected(connection, channel):
                self._parts.openings.connected(connection, channel)
                return []
            case PeerAnswered(key) | TimePassed(key):
                return self._requests.wake(key, event)
            case PeerFailed(key, reason):
                return self._requests.wake(key, PeerError(reason, key))
            case Arrived(connection, id):
                session = self._parts.sessions.get(connection)
                if session is not None and session.kept is not None:
                    session.kept.arrived(id)
                return []
            case Disconnected(connection):
                return self._endings.disconnected(connection)
            case Cut(connection):
                session = self._parts.sessions.get(connection)
                return [] if session is None else self._endings.end_computations(session)
            case Probed(connection, alive):
                return self._parts.openings.probed(connection, alive=alive)
            case Expired(name, absence):
                session = self._parts.kept.expired(name, absence)
                return [] if session is None else self._endings.end(session)
            case UsersChanged(users):
                return self._endings.users_changed(Users(users))

    def _received(self, event: Received, over: Callable[[], bool]) -> list[Instruction]:
        connection, envelope, body = event.connection, event.envelope, event.envelope.body
        session = self._parts.openings.sessions.get(connection)
        of_session = type(body) in _OF_SESSIONS
        if of_session and isinstance(body, m.Hello | m.Prove):
            return self._parts.openings.open(connection, envelope, body)
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
        if of_session:
            return self._leaves(connection, session, body) if isinstance(body, m.Bye) else []
        if envelope.id == 0:
            instructions = self._posts.take(session, event, over)
        else:
            steps = answer(self._parts, session, body, event.tensors)
            request = Request(connection, envelope.id, steps, session, body)
            if isinstance(body, m.RunProtocol):
                request.run = body.run
            instructions = self._requests.advance(request, None)
        kept = session.kept
        if kept is not None and session.connection is not None and kept.due(event.tensors):
            # The client is told that its messages were taken, where no answer has said so for long.
            instructions.append(Reply(session.connection, m.Envelope(0, m.Ack(), kept.taken)))
        return instructions

    def _leaves(self, connection: int, session: Session, bye: m.Bye) -> list[Instruction]:
        """The client closes its session, for good or not."""
        if session.kept is not None and bye.comes_back:
            session.kept.gives_way = True
        elif session.kept is not None:
            session.kept.give_up()
        return [*self._endings.disconnected(connection), Close(connection)]

    def _make_room(self, whose: str, account: Account) -> bool:
        """Lets a plan of a user's rounds go, which its client can send again, or ends a session that was closed, where
        the others of the same user need the room."""
        if self._parts.training.give_way(account):
            return True
        session = self._parts.kept.to_give_way(whose, self._requests.at_work)
        if session is not None:
            self._besides += self._endings.end(session)
        return session is not None
