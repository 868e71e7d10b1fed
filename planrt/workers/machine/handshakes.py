"""How sessions open: who a client is, as it proves, and what it is told then. No I/O.

A client proves a token (`planrt.workers.wire.proofs`), or has shown a certificate when it connected, or is nobody. A
wrong token, and one of nobody's, take as long and are told the same.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from planrt.errors import OptionError, PlanrtError
from planrt.workers.machine.keeping.tickets import Bearer, TicketRefusedError, Tickets
from planrt.workers.machine.sessions import Session
from planrt.workers.wire import messages as m
from planrt.workers.wire.channel import Channel
from planrt.workers.wire.proofs import Checking, ProofError, Verifier, fake_verifier, is_verifier
from planrt.workers.wire.refusals import TICKET_REFUSED

_CLEAR: Final = (
    "this worker takes no tokens that are sent in clear: install the same planrt on both sides. Whoever listened has "
    "this one now: the worker's owner should give you another"
)
_WHO: Final = "this worker takes users only: show a token (token=...) or a certificate (cert=..., key=...)"
_NOBODY: Final = (
    "this worker takes users only, and the one that dials it acts for nobody here: its client has to be a user of this "
    "worker, and connected to it, so that it can give a ticket"
)

REVOKED: Final = (
    "the token of this session counts no longer: its user was taken off this worker's list, or has another"
)


class RefusedError(PlanrtError):
    """No session for this client; the message tells it why."""

    def __init__(self, message: str, *, distrusted: bool = False, kind: str = "HandshakeError") -> None:
        super().__init__(message)
        self.kind = kind
        """As the client's message calls it."""
        self.distrusted = distrusted
        """Whether it gave a proof that does not hold."""


class Users:
    """The users of a worker: name -> token, or what proves it, as a `Verifier` in words.

    Raises:
        OptionError: a user without a token, or two with the same.
    """

    def __init__(self, given: Mapping[str, str] | None) -> None:
        self._by_id: dict[str, tuple[str, Verifier]] = {}
        for user, text in (given or {}).items():
            if not user or not text:
                raise OptionError("every user needs a token of its own, and not an empty one")
            verifier = Verifier.parse(text) if is_verifier(text) else Verifier.of(text)
            if verifier.id in self._by_id:
                raise OptionError("every user needs a token of its own, and not an empty one")
            self._by_id[verifier.id] = user, verifier
        keys = sorted(verifier.server_key for _, verifier in self._by_id.values())
        self._secret = hashlib.sha256(b"".join(keys) or secrets.token_bytes(32)).digest()

    def find(self, id: str) -> Verifier:
        """Returns the verifier of a token's id, or one that nothing proves and that looks like any other."""
        fake = fake_verifier(id, self._secret)
        return self._by_id.get(id, ("", fake))[1]

    def has(self, user: str) -> bool:
        """Returns whether there is a user of that name."""
        return any(user == one for one, _ in self._by_id.values())

    def user(self, id: str) -> str | None:
        """Returns whose token has that id, which was proved; None for nobody's any more."""
        return self._by_id.get(id, (None,))[0]


@dataclass(frozen=True, slots=True)
class Opened:
    """A new session, the proofs for its client where it gave some, and the session that it would rather go on with."""

    session: Session
    proof: str = ""
    resume: m.Resumption | None = None
    ticket: str = ""


class Handshakes:
    """The handshakes of one worker.

    Args:
        versions: what the worker runs.
        users: its users.
        require_user: whether nobody gets in who is nobody.
        certificates: whether its clients show certificates.
    """

    def __init__(
        self, versions: m.Versions, users: Users, *, require_user: bool = False, certificates: bool = False
    ) -> None:
        self.versions = versions
        """As clients are told."""
        self._users = users
        self._require_user = require_user
        self._certificates = certificates
        self.tickets = Tickets()
        self._channels: dict[int, Channel] = {}
        self._checking: dict[int, tuple[m.Hello, Checking | None, Checking | None]] = {}
        """Connection -> its first message, and what checks the proofs of a token and a ticket, where there are some."""

    def connected(self, connection: int, channel: Channel) -> None:
        """Takes note of a connection that was opened."""
        self._channels[connection] = channel

    def host(self, connection: int) -> str:
        """Returns the address at the other end of a connection; ``""`` within one process."""
        return self._channels.get(connection, Channel()).host

    def disconnected(self, connection: int) -> None:
        """Forgets a connection that has ended, whatever was said on it."""
        self._channels.pop(connection, None)
        self._checking.pop(connection, None)

    def change_users(self, users: Users) -> None:
        """Takes the users that there are from now on; `counts` says of which sessions the token is still one."""
        self._users = users

    def counts(self, session: Session) -> bool:
        """Returns whether the token that opened a session is still that of a user, and that of the worker that acts in
        it; those without stay as they are."""
        return self.knows(session.token) and (session.by is None or self.knows(session.by.token))

    def knows(self, token: str) -> bool:
        """Returns whether a token of that id is still that of a user; True for none."""
        return not token or self._users.user(token) is not None

    def give_ticket(self, session: Session, body: m.Delegate) -> m.Ticket:
        """Returns a ticket for acting in the name of a session; see `Tickets.give`."""
        return self.tickets.give(session, body, is_user=self._users.has, certificates=self._certificates)

    def note_ticket(self, client: Session, id: str, verifier: Verifier, asked: m.Delegate) -> None:
        """Takes note of a ticket that another process of this worker gave; see `Tickets.note`."""
        self.tickets.note(
            id, verifier, client, asked, is_user=self._users.has, certificates=self._certificates
        )

    def hello(self, connection: int, hello: m.Hello) -> Opened | m.Challenge:
        """Answers a client that wants a session: it gets one, or is asked for the rest of its proof.

        Raises:
            RefusedError: it gets none.
        """
        mine, theirs = self.versions, hello.versions
        if theirs.protocol != mine.protocol:
            raise RefusedError(
                f"protocol version {theirs.protocol} (planrt {theirs.planrt}) does not fit this "
                f"worker's {mine.protocol} (planrt {mine.planrt}): install the same planrt on both sides"
            )
        if connection in self._checking:
            raise RefusedError("this connection is being asked for a proof")
        if hello.token:
            raise RefusedError(_CLEAR, distrusted=True)
        channel = self._channels.get(connection, Channel())
        if channel.shown is not None:  # and proved, to another process of this worker
            shown, who = channel.shown, Bearer(channel.shown.user, checked=True)
            return self._in_a_clients_name(connection, hello, shown.ticket, shown.proof, channel.proof, who)
        if not hello.proof and not hello.ticket:
            return Opened(self._session(connection, hello, channel.user), channel.proof, hello.resume)
        token = ticket = None
        try:
            if hello.proof:
                token = Checking(hello.proof, self._users.find, channel.binding)
            if hello.ticket:
                ticket = Checking(hello.ticket, self.tickets.find, channel.binding)
        except ProofError as error:
            raise RefusedError(str(error)) from None
        self._checking[connection] = hello, token, ticket
        return m.Challenge(token.challenge if token else "", ticket.challenge if ticket else "")

    def proven(self, connection: int, proof: m.Prove) -> Opened:
        """Takes the proof that a client was asked for.

        Raises:
            RefusedError: it was asked for none, or this is not it.
        """
        if connection not in self._checking:
            raise RefusedError("this connection was not asked for a proof")
        hello, checking, ticket = self._checking.pop(connection)
        channel = self._channels.get(connection, Channel())
        user, token, own = channel.user, "", channel.proof
        if checking is not None:
            try:
                own = checking.verify(proof.proof)
            except ProofError as error:
                raise RefusedError(str(error), distrusted=True) from None
            user, token = self._users.user(checking.id), checking.id
            if user is None:  # it was taken away meanwhile
                raise RefusedError(REVOKED)
        if ticket is not None:
            return self._with_ticket(connection, hello, ticket, proof.ticket, user, token, own)
        session = self._session(connection, hello, user)
        session.token = token
        return Opened(session, own, hello.resume)

    def _with_ticket(
        self,
        connection: int,
        hello: m.Hello,
        ticket: Checking,
        proof: str,
        user: str | None,
        token: str,
        own: str,
    ) -> Opened:
        """A session in the name of the client whose ticket is proved; `user` is who the worker is that proves it."""
        try:
            shown = ticket.verify(proof)
        except ProofError:
            raise RefusedError("no ticket of this worker's was proved", kind=TICKET_REFUSED) from None
        channel = self._channels.get(connection, Channel())
        who = Bearer(user or "", token, channel.certificate)
        return self._in_a_clients_name(connection, hello, ticket.id, shown, own, who)

    def _in_a_clients_name(
        self, connection: int, hello: m.Hello, ticket: str, shown: str, own: str, bearer: Bearer
    ) -> Opened:
        try:
            client, by = self.tickets.use(ticket, bearer, resumes=hello.resume is not None)
        except TicketRefusedError as error:
            raise RefusedError(str(error), kind=TICKET_REFUSED) from None
        session = Session(
            f"{connection}:{hello.session}", client.user, client=hello.versions, connection=connection
        )
        session.token, session.by = client.token, by
        return Opened(session, own, hello.resume, shown)

    def _session(self, connection: int, hello: m.Hello, user: str | None) -> Session:
        if user is None and self._require_user:
            raise RefusedError(_WHO)
        if hello.for_others and (self._require_user or self._certificates):
            raise RefusedError(_NOBODY)  # or its clients, who may not come in themselves, would be in with it
        if hello.for_others:
            user = None  # whoever it acts for is to have no more here than it would have by itself
        # The number makes the session's name unique here, whatever id a client claims: objects belong to that name.
        sibling = self._channels.get(connection, Channel()).sibling
        name = f"{connection}:{hello.session}"
        return Session(name, user, client=hello.versions, connection=connection, sibling=sibling)
