"""The client's half of a session: numbers requests, matches replies, turns failures into errors; no I/O.

Opening: send what ``hello`` returns. Hand the answer to ``challenged``; if that returns a message, send it, and
take the answer to it in place of the first. Hand the answer to ``welcome``, which returns nothing or raises.

From then on call ``request`` for each message to send, and ``reply`` for each one that arrives: it says which
request was answered, and how. Call ``forget`` where nobody waits for an answer any more.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from planrt.errors import (
    HandshakeError,
    RemoteError,
    WireError,
)
from planrt.serde.frames import Limits
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions
from planrt.workers.wire.proofs import ProofError, Proving
from planrt.workers.wire.refusals import RAISED


@dataclass(frozen=True, slots=True)
class Answered:
    """Request `id` was answered: with a message, or with an error to raise."""

    id: int
    result: m.Body | RemoteError


class ClientSession:
    """One identity on one worker. `worker_id` is the id the caller expects; the handshake checks it."""

    def __init__(self, worker_id: str, *, address: str, limits: Limits | None = None) -> None:
        self.worker_id = worker_id
        self._mine = own_versions(limits)
        self.address = address
        self.id = secrets.token_hex(16)
        self.versions = own_versions()  # the worker's, once the handshake has told
        self.datasets: dict[str, m.DatasetInfo] = {}
        self.line_of: Callable[[int | None], str | None] = lambda number: None
        """``file:line`` of a posted op by its number; the connection knows."""
        self.place_of: Callable[[int | None, int | None], str] = lambda number, index: ""
        """Where an op of a plan came from, by the number of its call and its place there; the connection knows."""
        self._proving: Proving | None = None
        self._last = 0
        self._pending: set[int] = set()
        self._abandoned: set[int] = set()

    # Opening: hello, challenged, and welcome at the end.

    def hello(self, token: str = "", binding: bytes | None = None, *, for_others: bool = False) -> m.Envelope:
        """Returns the first message of a connection; its answer goes to `challenged`. `token` is what the worker shall
        know its user by; it is proved, bound to the channel where that has a `binding`, and stays here.
        `for_others` is of a worker that acts for its clients.
        """
        self._proving = Proving(token, binding) if token else None
        first = self._proving.first if self._proving else ""
        return self.request(m.Hello(self.id, self._mine, proof=first, for_others=for_others))

    def challenged(self, envelope: m.Envelope) -> m.Envelope | None:
        """Returns the proof that the answer to `hello` asks for; send it, and give its answer to `welcome`. None if it
        asks for none: give that answer itself to `welcome`. Takes milliseconds.

        Raises:
            HandshakeError: it cannot be answered.
        """
        if self._proving is None or not isinstance(envelope.body, m.Challenge):
            return None
        self._pending.discard(envelope.id)
        try:
            return self.request(m.Prove(self._proving.answer(envelope.body.proof)))
        except ProofError as error:
            raise self._unproved(error) from None

    def welcome(self, envelope: m.Envelope) -> None:
        """Takes the answer to `hello`, or to the proof that was asked for. `request` may be called from then on.

        Raises:
            HandshakeError: refused, or another worker answers under this address, or one that does not know the token.
        """
        self._pending.discard(envelope.id)
        match envelope.body:
            case m.Welcome(worker=worker) as welcome if worker == self.worker_id:
                proving, self._proving = self._proving, None
                if proving is not None:
                    try:
                        proving.check(welcome.proof)
                    except ProofError as error:
                        raise self._unproved(error) from None
                self.versions, self.datasets = welcome.versions, welcome.datasets
            case m.Welcome(worker=worker):
                raise HandshakeError(
                    f"the worker at {self.address} is {worker!r}, not {self.worker_id!r}: check id and port",
                    address=self.address,
                )
            case m.Failure(message=message):
                raise HandshakeError(f"{self.address} refused the session: {message}", address=self.address)
            case other:
                raise HandshakeError(
                    f"{self.address} answered the handshake with {type(other).__name__}", address=self.address
                )

    def _unproved(self, error: ProofError) -> HandshakeError:
        return HandshakeError(
            f"{self.address} did not prove that it knows the token: {error}; is it the worker {self.worker_id!r}?",
            address=self.address,
        )

    def differences(self) -> list[tuple[str, str, str]]:
        """(what, here, there) where the worker runs something else: a plan may then be refused, or bits differ."""
        mine = self._mine
        fields = ("planrt", "torch", "ops")
        pairs = [(name, getattr(mine, name), getattr(self.versions, name)) for name in fields]
        return [(name, here, there) for name, here, there in pairs if here != there]

    # Once it is open: request for what is sent, reply for what arrives.

    def request(self, body: m.Body) -> m.Envelope:
        """Returns `body` under the next request number, to be sent; its answer goes to `reply`."""
        self._last += 1
        self._pending.add(self._last)
        return m.Envelope(self._last, body)

    def forget(self, id: int) -> None:
        """Notes that nobody waits for that request any more; `reply` drops a late answer to it."""
        if id in self._pending:
            self._pending.discard(id)
            self._abandoned.add(id)

    def reply(self, envelope: m.Envelope) -> Answered | None:
        """Takes a reply; None if nobody waits for it any more.

        Raises:
            WireError: it answers nothing that was asked, or is the worker's complaint about the connection.
        """
        if envelope.id in self._abandoned:
            self._abandoned.discard(envelope.id)
            return None
        if envelope.id not in self._pending:
            said = f": {envelope.body.message}" if isinstance(envelope.body, m.Failure) else ""
            raise WireError(
                f"worker {self.worker_id!r} answered a request that was never made (number {envelope.id}){said}",
                address=self.address,
            )
        self._pending.discard(envelope.id)
        if isinstance(envelope.body, m.Failure):
            return Answered(envelope.id, self._error(envelope.body))
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
