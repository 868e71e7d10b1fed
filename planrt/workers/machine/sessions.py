"""One client's session on a worker, and what is asked of other workers for it. No I/O."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from planrt.errors import LocalError
from planrt.serde.tensors import payload_bytes
from planrt.sharing.secure_sum.member import Member
from planrt.workers.machine.events import (
    Alarm,
    Introduce,
    Part,
    PeerAnswered,
    PeerFor,
    TimePassed,
    ToPeer,
    Wait,
)
from planrt.workers.machine.failures import OpFailedError, replace_message
from planrt.workers.machine.keeping.answers import Keeping
from planrt.workers.machine.labels import Label, join
from planrt.workers.wire import messages as m
from planrt.workers.wire.channel import caller
from planrt.workers.wire.refusals import ReplyTooLarge

MOST_LINKS: Final = 64
"""Other workers at which a worker acts in the name of one session."""
MOST_SESSIONS: Final = 8
"""Sessions of that client at one of these, for one purpose, in whose names it acts: a program may be several users
there."""
_MAX_ASKED: Final = 10_000


@dataclass(slots=True, eq=False)
class Graphs:
    """A record of the autograd graphs of sessions that handed objects to one another.

    A label says who may read what an op computed from the values of its time. A graph computes once more, later,
    with tensors that it has kept. Autograd refuses where it sees that one of them was written to meanwhile, but
    writes past its version counters it does not see: from such a write of private values on, gradients count as
    computed from them.
    """

    members: list[Session] = field(default_factory=list)
    """The sessions whose graphs these are; each has this very record as its `graphs`. `Session.share_graphs` joins two
    records; one leaves when it is
    over, and nothing else parts them, since a graph may keep what was handed over."""
    unseen_writes: bool = False
    """Whether there may be tensors that share memory without sharing a version counter. An op that makes such tensors
    sets it, before it runs; it is never taken back."""
    label: Label = None
    """Joins that of every backward pass. An op that writes private values where `unseen_writes` holds, or that itself
    writes unseen, adds its label; so it only gets stricter."""


@dataclass(frozen=True, slots=True)
class KeptOptimizer:
    """The values that an optimizer keeps between rounds of training, as `planrt.plans.training.train` takes it."""

    state: dict[Any, Any] | None
    leaves: bool
    """Whether its client may have it: all that it comes from left as updates that nothing masked."""


@dataclass(frozen=True, slots=True, eq=False)
class Acting:
    """In whose name a session acts that another worker opened with a ticket; see `keeping/tickets.py`."""

    worker: str
    """Who acts, as the client calls it."""
    client: Session = field(repr=False)
    """The session that gave the ticket: this one ends with it."""
    permits: m.For
    ticket: str
    token: str
    """The id of the token that the worker proved for itself; ``""`` of one that proved none."""
    user: str
    """Who the worker is here, by that token or its certificate; ``""`` for nobody."""


@dataclass(slots=True, eq=False)
class Session:
    """One client's session on this worker: what is its own besides objects, which the store has."""

    id: str
    """Its name on this worker: unique, whatever a client claims. Objects belong to it by this name."""
    user: str | None = None
    """Whose session it is, as proved in the handshake; None for nobody's. Nothing changes it afterwards."""
    client: m.Versions | None = None
    """What the client runs and accepts, from its handshake: no answer may be larger."""
    connection: int | None = None
    """The connection that it is over now; None while it has none. What opens, resumes and loses connections sets it."""
    kept: Keeping | None = None
    """How it goes on after its connection; None if it ends with it. Opening it sets this."""
    posted: int = 0
    """Ops taken so far, those that failed included. It agrees with the count of the client, which finds by it the line
    that made an op (`Failure.number`)."""
    failure: m.Failure | None = None
    """Of an op or message that left no result to keep it. The first one stays; `KeptObjects.raise_unseen` takes it away
    when the next request tells it."""
    failures: int = 0
    """Runs that failed on data which it may not see: each tells it something of that data. Only goes up."""
    halted: m.Failure | None = None
    """Of a backward pass whose client has not heard of it yet: ops are not run (see `Backward` of the messages). A pass
    sets it, and the client's `Resume` takes it away."""
    over: bool = False
    """Whether `failures` has come to what the owner allows: it gets no more than the answer that is under way."""
    leaves: dict[int, None] = field(default_factory=dict)
    """Ids of objects that a backward pass may give a gradient to, in the order in which they came. Whoever stores,
    finds, claims or marks such an object adds it, whoever removes one takes it away; an id whose object has gone or
    has another owner is taken away after the next pass."""
    optimizer_states: dict[tuple[str, str, str, int], KeptOptimizer] = field(default_factory=dict)
    """(plan, data set, optimizer, first object of the state or 0) -> what the optimizer keeps. Rounds of training set
    it; `KeptObjects.forget_optimizers` takes away what belongs to objects that are gone."""
    purposes: dict[str, str] = field(default_factory=dict)
    """Hash of a plan that was sent -> what its client says it is for: shown to the owner who is asked to approve it."""
    asked: dict[str, None] = field(default_factory=dict)
    """Hashes of plans that it sent or asked for, as decisions about them are filed: whose status it is told."""
    counts_for: str = ""
    """For whom it counts (`whose`); set where it is opened."""
    token: str = ""
    """The id of the token that was proved for it; ``""`` of a session that no token opened."""
    by: Acting | None = None
    """Who acts in its user's name, where another worker opened it with a ticket."""
    links: dict[tuple[m.PeerAddress, m.For], PeerFor] = field(default_factory=dict)
    """(another worker, what for) -> that worker, as it is reached in the name of this session's client: as the client's
    latest tickets say."""
    acts: dict[PeerFor, tuple[m.PeerAddress, m.For]] = field(default_factory=dict)
    """All of these that have not ended, the latest last: what was made over one is asked for over that one."""
    sums: dict[str, Member] = field(default_factory=dict)
    """Name -> this worker's side of a secure aggregation that its client has begun; see `SecureSums`."""
    waiting: int = 0
    """How many of its requests wait for other workers; `WorkerState` keeps it."""
    sibling: bool = False
    """Whether another process of the same worker speaks here (`planrt.workers.machine.siblings`)."""
    graphs: Graphs = field(init=False)
    """What is known of its autograd graphs; shared with the sessions that it has had objects from."""

    def __post_init__(self) -> None:
        self.graphs = Graphs([self])

    def whose(self, host: str) -> str:
        """Returns for whom it counts, opened from that address: its user, or nobody there."""
        return f"nobody at {caller(host)}" if self.user is None else f"user {self.user}"

    def reached(self, peer: m.PeerAddress, permits: m.For) -> m.PeerAddress:
        """Returns another worker as it is reached for this session: in the client's name, where there is a ticket."""
        whose = self if self.by is None else self.by.client
        plain = m.PeerAddress(peer.worker, peer.address)
        return whose.links.get((plain, permits), plain)

    def act_for(self, body: m.ActFor) -> list[Introduce | Part]:
        """Takes the ticket for acting in this session's name at another worker, or goes on with one that it has taken.

        The program that this session is of may be several users there. So earlier ones go on, up to `MOST_SESSIONS`.

        Raises:
            LocalError: it acts at so many already that no other one is taken.
        """
        key = body.peer, body.permits
        peers = {peer for peer, _ in self.links}
        if body.peer not in peers and len(peers) >= MOST_LINKS:
            raise LocalError(f"a session acts at {MOST_LINKS} other workers at the most")
        peer = PeerFor(body.peer.worker, body.peer.address, body.ticket, self.id, self.counts_for)
        self.links[key] = peer
        self.acts.pop(peer, None)
        self.acts[peer] = key
        parted = [one for one, of in self.acts.items() if of == key][:-MOST_SESSIONS]
        for one in parted:
            del self.acts[one]
        return [*([Part(parted)] if parted else []), Introduce(peer, body.secret)]

    def asks_for(self, filed: Sequence[str]) -> None:
        """Takes note of plans that this session sent or asked for."""
        self.asked |= dict.fromkeys(filed)
        while len(self.asked) > _MAX_ASKED:
            del self.asked[next(iter(self.asked))]

    def share_graphs(self, other: Session) -> None:
        """Joins what is known of the graphs of two sessions: an object went from one to the other, and with it the
        graphs that have kept it."""
        mine, theirs = self.graphs, other.graphs
        if mine is theirs:
            return
        mine.members += theirs.members
        mine.unseen_writes |= theirs.unseen_writes
        mine.label = join(mine.label, theirs.label)
        for member in theirs.members:
            member.graphs = mine

    def leave_graphs(self) -> None:
        """Is over: what is known of graphs stays with those who have had objects from it, and keeps it no longer."""
        self.graphs.members.remove(self)
        self.graphs = Graphs([self])

    def may_read(self, label: Label) -> bool:
        """Returns whether this session's user may read what has that label."""
        return label is None or (self.user is not None and self.user in label)


def check_fits(client: m.Versions | None, tensors: Sequence[torch.Tensor]) -> None:
    """Raises ReplyTooLarge if `client` does not take an answer with `tensors`; called before anything is removed
    that the answer brings.
    """
    nbytes = payload_bytes(tensors)
    if client is not None and nbytes > client.message_limit:
        raise ReplyTooLarge(
            f"the answer takes {nbytes:,} bytes, over the limit of {client.message_limit:,} bytes that the client "
            "takes, and was not sent; nothing was removed here: fetch it in parts, or connect with "
            "limits=Limits(message=...)"
        )


def ask(
    peer: m.PeerAddress,
    body: m.Body,
    tensors: Sequence[torch.Tensor] = (),
    *,
    seconds: float | None = None,
    late: type[LocalError] = LocalError,
) -> Any:
    """Sends `body` to another worker and waits for its answer, `seconds` at most: to be used with ``yield from``.

    Raises:
        LocalError: the other worker could not do it; as `late` where it did not answer in time.
    """
    key = secrets.token_hex(8)
    yield ToPeer(peer, body, tensors, key)
    if seconds is not None:
        yield Alarm(seconds, key)
    answered = yield Wait(key)
    if isinstance(answered, TimePassed):
        raise late(f"worker {peer.worker!r} did not answer within {seconds:g} s")
    return answer_of(peer, answered)


def answer_of(peer: m.PeerAddress, answered: PeerAnswered) -> m.Body:
    """Returns what another worker answers.

    Raises:
        OpFailedError: it could not do what it was asked for.
    """
    if isinstance(answered.body, m.Failure):
        raise OpFailedError(
            replace_message(answered.body, f"worker {peer.worker!r}: {answered.body.message}")
        )
    return answered.body


def allowed_list(label: Label) -> list[str] | None:
    """Returns a label as messages have it: the names in order, or None."""
    return None if label is None else sorted(label)


def users_of(label: Label) -> str:
    """Returns who may read what has that label, in words."""
    return ", ".join(sorted(label)) if label else "nobody"
