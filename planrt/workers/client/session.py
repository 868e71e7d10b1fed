"""The client's half of a session: numbers requests, matches replies, turns failures into errors; no I/O.

Opening: send what ``hello`` returns. Hand the answer to ``challenged``; if that returns a message, send it, and
take the answer to it in place of the first. Hand the answer to ``welcome``, which returns nothing or raises.

From then on call ``request`` or ``posted`` for each message to send, note what becomes of it in ``sent``, and hand each
one that arrives to ``reply``: it says which request was answered, and how. Call ``forget`` where nobody waits for an
answer any more.

After the connection was lost: open another one in the same way. ``welcome`` says whether the session goes on; then what
is left in ``sent`` is to be sent again, in order, and else ``renewed`` is the session that there is now.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from planrt.errors import (
    HandshakeError,
    RemoteError,
    WireError,
)
from planrt.serde.frames import Limits
from planrt.workers.wire import messages as m
from planrt.workers.wire.delivery import Unacknowledged
from planrt.workers.wire.messages import own_versions
from planrt.workers.wire.proofs import ProofError, Prover, Proving, TicketProof, Token, proving
from planrt.workers.wire.refusals import RAISED, SESSION_ENDED, SESSION_IN_USE, TICKET_REFUSED

T = TypeVar("T")


class ByeError(WireError):
    """The worker has ended the session."""


class EndedError(WireError):
    """The process that served the session has ended: nothing of it is left."""


class RefusedError(HandshakeError):
    """Somebody answered, and does not let this client in: to ask again is of no use."""


class TicketRefusedError(RefusedError):
    """The ticket that was shown opens nothing; its client may have another one."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Request `id` was answered: with a message, or with an error to raise."""

    id: int
    result: m.Body | RemoteError
    once: bool = False
    """Whether it is a failure that the worker keeps no longer: somebody has to hear of it now, or later."""


class ClientSession(Generic[T]):
    """One identity on one worker. `worker_id` is the id the caller expects; the handshake checks it. `T` is what its
    connection keeps of each message until the worker has it."""

    def __init__(self, worker_id: str, *, address: str, limits: Limits | None = None) -> None:
        self.worker_id = worker_id
        self._limits = limits
        self._mine = own_versions(limits, resumes=True)
        self.address = address
        self.kept: m.Kept | None = None
        """How the session outlives its connection; None if it does not."""
        self.sent: Unacknowledged[T] = Unacknowledged()
        """What was sent and may have to be sent again; of use while `kept` is there."""
        self.seen = 0
        """Answers taken so far."""
        self.id = secrets.token_hex(16)
        self.versions = own_versions()  # the worker's, once the handshake has told
        self.datasets: dict[str, m.DatasetInfo] = {}
        self.line_of: Callable[[int | None], str | None] = lambda number: None
        """``file:line`` of a posted op by its number; the connection knows."""
        self.place_of: Callable[[int | None, int | None], str] = lambda number, index: ""
        """Where an op of a plan came from, by the number of its call and its place there; the connection knows."""
        self._proving: Prover | None = None
        self._proving_ticket: Prover | None = None
        self._renewed: m.Welcome | None = None
        self._shaking_hands = 0
        """The number of the latest message of a handshake."""
        self._last = 0
        self._pending: set[int] = set()
        self._abandoned: set[int] = set()

    # Opening: hello, challenged, and welcome at the end.

    def hello(
        self,
        token: Token = "",
        binding: bytes | None = None,
        *,
        for_others: bool = False,
        ticket: TicketProof | None = None,
    ) -> m.Envelope:
        """Returns the first message of a connection; its answer goes to `challenged`. `token` is what the worker shall
        know its user by; it is proved, bound to the channel where that has a `binding`, and stays here.
        `for_others` is of a worker that acts for its clients, and `ticket` of one that acts in the name of one of them.
        """
        self._proving = proving(token, binding) if token else None
        self._proving_ticket = Proving(ticket.secret, binding, id=ticket.id) if ticket else None
        shown = self._proving_ticket.first if self._proving_ticket else ""
        first = self._proving.first if self._proving else ""
        resume = None
        if self.kept is not None and self.kept.secret is not None:
            resume = m.Resumption(self.kept.session, self.kept.secret, self.seen)
        self._pending.discard(self._shaking_hands)  # of an earlier try
        hello = m.Hello(self.id, self._mine, proof=first, for_others=for_others, resume=resume, ticket=shown)
        return self._asks(hello)

    def challenged(self, envelope: m.Envelope) -> m.Envelope | None:
        """Returns the proof that the answer to `hello` asks for; send it, and give its answer to `welcome`. None if it
        asks for none: give that answer itself to `welcome`. Takes milliseconds.

        Raises:
            HandshakeError: it cannot be answered.
        """
        token, ticket = self._proving, self._proving_ticket
        if (token is None and ticket is None) or not isinstance(envelope.body, m.Challenge):
            return None
        self._pending.discard(envelope.id)
        try:
            proved = "" if token is None else token.answer(envelope.body.proof)
            shown = "" if ticket is None else ticket.answer(envelope.body.ticket)
            return self._asks(m.Prove(proved, shown))
        except ProofError as error:
            raise self._unproved(error) from None

    def welcome(self, envelope: m.Envelope) -> bool:
        """Takes the answer to `hello`, or to the proof that was asked for. `request` may be called from then on.

        Returns:
            Whether this session is open. False: there was one before, it is over, and `renewed` is another one.

        Raises:
            HandshakeError: refused, or another worker answers under this address, or one that does not know the token.
        """
        self._pending.discard(envelope.id)
        match envelope.body:
            case m.Welcome(worker=worker) as welcome if worker == self.worker_id:
                proofs = (self._proving, welcome.proof), (self._proving_ticket, welcome.ticket)
                self._proving = self._proving_ticket = None
                try:
                    for one, proof in proofs:
                        if one is not None:
                            one.check(proof)
                except ProofError as error:
                    raise self._unproved(error) from None
                return self._welcomed(welcome)
            case m.Welcome(worker=worker):
                raise RefusedError(
                    f"the worker at {self.address} is {worker!r}, not {self.worker_id!r}: check id and port",
                    address=self.address,
                )
            case m.Failure(message=message, kind=kind):
                refusal = {SESSION_IN_USE: HandshakeError, TICKET_REFUSED: TicketRefusedError}.get(
                    kind, RefusedError
                )
                raise refusal(f"{self.address} refused the session: {message}", address=self.address)
            case other:
                raise HandshakeError(
                    f"{self.address} answered the handshake with {type(other).__name__}", address=self.address
                )

    def _welcomed(self, welcome: m.Welcome) -> bool:
        before, self.versions, self.datasets = self.kept, welcome.versions, welcome.datasets
        if before is None:
            self.sent, self.seen = Unacknowledged(), 0  # also where there was a session that could not go on
            self.kept = welcome.kept if self._mine.resumes else None
            return True
        if welcome.kept is not None and welcome.kept.resumed:
            self.kept = msgspec.structs.replace(welcome.kept, secret=before.secret)
            return True
        self._renewed = welcome
        return False

    def renewed(self) -> tuple[ClientSession[T], str]:
        """Returns the session that the worker has opened in the place of this one, and why it has, in words."""
        welcome, before = self._renewed, self.kept
        assert welcome is not None and before is not None  # noqa: S101, PT018 - `welcome` has returned False
        other = ClientSession[T](self.worker_id, address=self.address, limits=self._limits)
        other.id, other._last = self.id, self._last
        other._welcomed(welcome)
        if welcome.kept is not None and welcome.kept.epoch == before.epoch:
            return (
                other,
                f"it keeps a session for {before.seconds:g} s without a connection, and that is over",
            )
        return other, "it was started again"

    def _asks(self, body: m.Body) -> m.Envelope:
        """A message of the handshake, which nobody counts."""
        envelope = m.Envelope(self._last + 1, body)
        self._last = self._shaking_hands = envelope.id
        self._pending.add(envelope.id)
        return envelope

    def _unproved(self, error: ProofError) -> HandshakeError:
        return RefusedError(
            f"{self.address} did not prove that it knows the token: {error}; is it the worker {self.worker_id!r}?",
            address=self.address,
        )

    def differences(self) -> list[tuple[str, str, str]]:
        """(what, here, there) where the worker runs something else: a plan may then be refused, or bits differ."""
        mine = self._mine
        fields = ("planrt", "torch", "ops")
        pairs = [(name, getattr(mine, name), getattr(self.versions, name)) for name in fields]
        return [(name, here, there) for name, here, there in pairs if here != there]

    # Once it is open: request for what is sent, reply for what arrives. With each message goes how many answers have
    # been taken.

    def request(self, body: m.Body) -> m.Envelope:
        """Returns `body` under the next request number, to be sent; its answer goes to `reply`."""
        self._last += 1
        self._pending.add(self._last)
        return m.Envelope(self._last, body, self.seen if self.kept is not None else 0)

    def posted(self, body: m.Body) -> m.Envelope:
        """Returns `body` as a message that is not answered."""
        return m.Envelope(0, body, self.seen if self.kept is not None else 0)

    def forget(self, id: int) -> None:
        """Notes that nobody waits for that request any more; `reply` drops a late answer to it."""
        if id in self._pending:
            self._pending.discard(id)
            self._abandoned.add(id)

    def reply(self, envelope: m.Envelope) -> Answered | None:
        """Takes a reply; None if nobody waits for it any more, or it is none. What it acknowledges is for its caller.

        Raises:
            WireError: it answers nothing that was asked, or is the worker's complaint about the connection.
            ByeError: the worker has ended the session. EndedError: what served the session there has.
        """
        if envelope.id == 0 and isinstance(envelope.body, m.Ack):
            return None
        if envelope.id == 0 and isinstance(envelope.body, m.Bye):
            raise ByeError(f"worker {self.worker_id!r} has stopped", address=self.address)
        if envelope.id == 0 and isinstance(envelope.body, m.Failure) and envelope.body.kind == SESSION_ENDED:
            raise EndedError(envelope.body.message, address=self.address)
        if envelope.id == 0 and isinstance(envelope.body, m.Failure):
            said = envelope.body.message
            raise WireError(f"worker {self.worker_id!r} ends the connection: {said}", address=self.address)
        if envelope.id:
            self.seen += 1
        if envelope.id in self._abandoned:
            self._abandoned.discard(envelope.id)
            if isinstance(envelope.body, m.Failure) and envelope.body.once:
                return Answered(envelope.id, self._error(envelope.body), once=True)
            return None
        if envelope.id not in self._pending:
            raise WireError(
                f"worker {self.worker_id!r} answered a request that was never made (number {envelope.id})",
                address=self.address,
            )
        self._pending.discard(envelope.id)
        if isinstance(envelope.body, m.Failure):
            return Answered(envelope.id, self._error(envelope.body), once=envelope.body.once)
        return Answered(envelope.id, envelope.body)

    def _error(self, failure: m.Failure) -> RemoteError:
        where = f" [{failure.line}]" if failure.line and failure.line not in failure.message else ""
        made_at = self.line_of(failure.number)
        if made_at is not None:
            where = f" (at {made_at})"
        return RAISED.get(failure.kind, RemoteError)(
            failure.message + where,
            worker_id=self.worker_id,
            kind=failure.kind,
            op=failure.op,
            line=failure.line or made_at,
            remote_traceback=failure.traceback,
            index=failure.index,
            cause=failure.cause,
            step=failure.step,
        ).found_at(self.place_of(failure.number, failure.index))
