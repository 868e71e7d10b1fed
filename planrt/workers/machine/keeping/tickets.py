"""Acting in a client's name: the tickets that a worker gives, and the sessions that these open. No I/O.

A client that is connected to two workers may let one of them act in its name at the other one. It asks the other one,
over its own session, for a ticket, and gives that to the first::

    client -> bob      Delegate("alice", "put")          bob draws a secret, and keeps what checks it
    client -> alice    ActFor(bob, "put", the ticket)    before the Move that needs it
    alice  -> bob      Hello(ticket=...)                 alice proves the secret, and who she is; nothing travels
                                                         that proves it again

What comes over that connection is bob's to treat as the client's: its user, its labels, its quota, and in the audit log
the user's name and the worker's. It is a session of its own, so that it has nothing but what it puts there and what the
client handed over: it searches, trains, evaluates and asks for nothing (`check_permitted`).

The parties of computations on shares and of joint runs draw a secret for each, too, which says which computation is
meant. Where its client is a user here they take part in it with tickets of that client's session, each as the worker
that its ticket names (`check_speaks`): a ticket is of no use in the computations of others, nor in another party's
place.

A ticket opens one session, within `SECONDS`, and ends with the client's. It is for one worker: where that one has a
user of this worker, or shows its certificate here, it must be this that it proves.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from planrt.errors import LocalError, PolicyError
from planrt.workers.machine.sessions import Acting, Session
from planrt.workers.wire import messages as m
from planrt.workers.wire.proofs import FEWEST_ITERATIONS, Verifier, fake_verifier
from planrt.workers.wire.refusals import TICKET_REFUSED

SECONDS: Final = 30.0
"""For how long a ticket opens a session."""
MOST: Final = 256
"""Tickets that one session may have at a time, those that opened a session included."""

_ANY: Final = (m.Ack, m.Bye)
_PUT: Final = (*_ANY, m.Put, m.StorePlan, m.Remove)
_PERMITTED: Final[dict[str, tuple[type[m.Message], ...]]] = {
    "put": _PUT,
    "compute": (
        *_PUT, m.Post, m.Call, m.Backward, m.Resume, m.Claim, m.HandOver, m.Fetch, m.Move, m.PutPointer,
    ),
    "share": (
        *_ANY, m.GiveSeed, m.JoinGroup, m.Opening, m.AskNeeds, m.AskGroup, m.Corrections, m.FailGroup, m.PutShare,
        m.Remove,
    ),
    "joint": (*_ANY, m.JoinJoint, m.AskJoint, m.Parcel, m.FailJoint),
}  # fmt: skip
"""What a session may ask for that a ticket opened."""
_IN_WORDS: Final = {
    "put": "put objects here",
    "compute": "compute here with what it was given",
    "share": "take part in computations on shares here",
    "joint": "take part in joint runs here",
}


class TicketRefusedError(LocalError):
    """A ticket that opens nothing, or not for who shows it; the message tells it why."""

    kind = TICKET_REFUSED


@dataclass(slots=True, eq=False)
class _Given:
    """A ticket that was given."""

    verifier: Verifier = field(repr=False)
    client: Session
    asked: m.Delegate
    user: str
    """Who must prove it: a user of this worker; ``""`` where the worker has none here."""
    certificate: str
    """The SHA-256 of the certificate that must be shown; ``""`` where none is."""
    until: float
    used: bool = False


@dataclass(frozen=True, slots=True)
class Bearer:
    """The bearer of a ticket, which it has proved: its user here, the id of its token, the hash of its certificate."""

    user: str = ""
    token: str = ""
    certificate: str = ""
    checked: bool = False
    """Whether another process of this worker has found that the ticket is for it."""


class Elsewhere(Protocol):
    """Another process of this worker, to which tickets are proved."""

    def given(self, id: str, verifier: Verifier, asked: m.Delegate) -> None:
        """Takes note of a ticket. Raises LocalError where it cannot."""

    def over(self, id: str) -> None:
        """Forgets a ticket."""


class Tickets:
    """The tickets of one worker. `clock` tells the time in seconds, and `elsewhere` is who is shown them, if not this
    process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.elsewhere: Elsewhere | None = None
        self._secret = secrets.token_bytes(32)
        self._given: dict[str, _Given] = {}

    def give(
        self, session: Session, body: m.Delegate, *, is_user: Callable[[str], bool], certificates: bool
    ) -> m.Ticket:
        """Returns a ticket for acting in the name of `session`. `is_user` says of which names there are users here, and
        `certificates` whether this worker sees its clients' certificates.

        Raises:
            LocalError: the session is nobody's, or in another one's name, or has as many as it may have.
        """
        if session.user is None or session.by is not None:
            raise LocalError("a ticket is for acting in a user's name: show a token or a certificate first")
        if self.of(session) >= MOST:
            raise LocalError(f"a session has {MOST} tickets at the most: close one that is not needed")
        id, secret = secrets.token_hex(16), secrets.token_hex(32)
        verifier = Verifier.of_secret(id, secret)
        if self.elsewhere is not None:
            self.elsewhere.given(id, verifier, body)
        self.note(id, verifier, session, body, is_user=is_user, certificates=certificates)
        return m.Ticket(id, secret, SECONDS)

    def note(
        self,
        id: str,
        verifier: Verifier,
        session: Session,
        asked: m.Delegate,
        *,
        is_user: Callable[[str], bool],
        certificates: bool,
    ) -> None:
        """Takes note of a ticket, that is proved to this process; as `give`."""
        self._given[id] = _Given(
            verifier, session, asked, asked.user if is_user(asked.user) else "",
            asked.certificate if certificates else "", self._clock() + SECONDS,
        )  # fmt: skip

    def of(self, session: Session) -> int:
        """Returns how many tickets a session has."""
        self._forget_old()
        return sum(one.client is session for one in list(self._given.values()))

    def _forget_old(self) -> None:
        now = self._clock()
        for id, one in list(self._given.items()):
            if not one.used and one.until <= now:
                self.forget(id)

    def is_of(self, id: str, session: Session) -> bool:
        """Returns whether a session gave that ticket."""
        given = self._given.get(id)
        return given is not None and given.client is session

    def forget(self, id: str) -> None:
        """Forgets a ticket: it opens nothing any more."""
        if self._given.pop(id, None) is not None and self.elsewhere is not None:
            self.elsewhere.over(id)

    def find(self, id: str) -> Verifier:
        """Returns what checks the ticket of that id, or something that nothing proves and that looks the same."""
        given = self._given.get(id)
        return fake_verifier(id, self._secret, FEWEST_ITERATIONS) if given is None else given.verifier

    def use(self, id: str, bearer: Bearer, *, resumes: bool) -> tuple[Session, Acting]:
        """Takes a ticket whose secret was proved; returns the session in whose name its bearer acts, and how.

        Raises:
            TicketRefusedError: it opens nothing, or not for this one.
        """
        given = self._given.get(id)
        if given is None:
            raise TicketRefusedError(
                "there is no such ticket, or it is over: its client has to ask for another"
            )
        worker = given.asked.worker
        if given.client.over:
            raise TicketRefusedError("the session that gave this ticket is over")
        if given.used and not resumes:
            raise TicketRefusedError(f"this ticket for worker {worker!r} was used: it opens one session")
        if not given.used and self._clock() >= given.until:
            raise TicketRefusedError(f"this ticket for worker {worker!r} has expired: ask for another")
        if (given.user or given.certificate) and not bearer.checked:
            right = (given.user and _same(bearer.user, given.user)) or (
                given.certificate and _same(bearer.certificate, given.certificate)
            )
            if not right:
                raise TicketRefusedError(f"this ticket is for worker {worker!r}, which is somebody else here")
        given.used = True
        return given.client, Acting(worker, given.client, given.asked.permits, id, bearer.token, bearer.user)

    def ended(self, session: Session) -> None:
        """Forgets the tickets of a session that is over, and the one that opened it."""
        if session.by is not None:
            self.forget(session.by.ticket)
            return
        for id, one in list(self._given.items()):
            if one.client is session:
                self.forget(id)


def check_permitted(session: Session, body: m.Body) -> None:
    """Raises PolicyError where a session that a ticket opened asks for what that does not permit."""
    by = session.by
    if by is None or isinstance(body, _PERMITTED[by.permits]):
        return
    raise PolicyError(
        f"worker {by.worker!r} acts for user {session.user!r} here, and may {_IN_WORDS[by.permits]}, which does not "
        f"include {type(body).__name__}: the user can do that in a session of its own",
        rule="ticket",
    )


def check_speaks(session: Session, client: Session, what: str, worker: str = "") -> None:
    """Raises PolicyError unless a session may take part in `what`, a computation that `client` has begun: as that
    `worker`, or as whichever.

    Where that client has a name here, others take part in it, with a ticket that was given in that very session. Those
    of nobody's are nobody, too.
    """
    by = session.by
    if client.user is None or (by is not None and by.client is client and by.worker == (worker or by.worker)):
        return
    whose = f"{what} is of user {client.user!r}"
    if by is None:
        shown = "nobody" if session.user is None else f"user {session.user!r}"
        why = f"{whose}: a worker takes part in it in that user's name, with a ticket, and not as {shown}"
    elif by.client is not client:
        why = f"{whose}, and worker {by.worker!r} acts here for another session: each has tickets of its own"
    else:
        why = f"worker {by.worker!r} acts for user {session.user!r} here, and is not {worker!r} in {what}"
    raise PolicyError(why, rule="ticket")


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
