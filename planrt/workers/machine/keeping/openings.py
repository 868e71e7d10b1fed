"""Connections get their sessions: new ones, or one that goes on. No I/O."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from planrt.workers.machine.audit import Auditor
from planrt.workers.machine.events import Close, Distrust, HandOn, Instruction, Probe, Reply
from planrt.workers.machine.handshakes import REVOKED, Handshakes, Opened, RefusedError
from planrt.workers.machine.keeping.sessions import KeptSessions
from planrt.workers.machine.sessions import Session
from planrt.workers.wire import messages as m
from planrt.workers.wire.channel import Channel, Shown
from planrt.workers.wire.refusals import SESSION_IN_USE, TICKET_REFUSED


class Openings:
    """The connections of one worker, from their first message on.

    Args:
        worker: its id. handshakes: who gets in. kept: the sessions that may go on. audit: is told.
        datasets: user -> what that user is told of the worker's data sets.
        when_opened: called with each new session and the address that it was opened from.
    """

    def __init__(
        self,
        worker: str,
        handshakes: Handshakes,
        kept: KeptSessions,
        audit: Auditor,
        *,
        datasets: Callable[[str | None], dict[str, m.DatasetInfo]],
        when_opened: Callable[[Session, str], None],
    ) -> None:
        self._worker = worker
        self._handshakes = handshakes
        self._kept = kept
        self._audit = audit
        self._datasets = datasets
        self._when_opened = when_opened
        self.gives_tickets = True
        """Whether sessions of users may have tickets."""
        self.hands_on = False
        """Whether other processes open and serve the sessions of clients that have proved here who they are."""
        self.sessions: dict[int, Session] = {}
        """Connection -> its session."""
        self._asked: dict[int, tuple[int, Opened, Session]] = {}
        """Connection -> (number of its message, what it would get, the session that it asks for), while another
        connection has that session."""

    def connected(self, connection: int, channel: Channel) -> None:
        """Takes note of a connection that was opened."""
        self._handshakes.connected(connection, channel)

    def disconnected(self, connection: int) -> Session | None:
        """Forgets a connection that has ended; returns the session that it had."""
        self._handshakes.disconnected(connection)
        self._asked.pop(connection, None)
        return self.sessions.pop(connection, None)

    def forget_revoked(self) -> list[Instruction]:
        """Refuses those that wait to go on with a session, and whose token counts no longer."""
        gone = [
            one for one, (_, opened, _) in self._asked.items() if not self._handshakes.counts(opened.session)
        ]
        instructions: list[Instruction] = []
        for connection in gone:
            id, _, _ = self._asked.pop(connection)
            instructions += self._refused(connection, id, RefusedError(REVOKED))
        return instructions

    def open(self, connection: int, envelope: m.Envelope, body: m.Hello | m.Prove) -> list[Instruction]:
        """Takes a message of a handshake: opens a session, resumes one, asks on, or refuses."""
        try:
            if connection in self.sessions or connection in self._asked:
                raise RefusedError("this connection has a session already")
            if isinstance(body, m.Prove):
                opened: Opened | m.Challenge = self._handshakes.proven(connection, body)
            else:
                opened = self._handshakes.hello(connection, body)
            if isinstance(opened, m.Challenge):
                return [Reply(connection, m.Envelope(envelope.id, opened))]
            if self.hands_on:
                return [_handed_on(connection, envelope.id, opened)]
            before = self._before(opened)
        except RefusedError as error:
            return self._refused(connection, envelope.id, error)
        if before is None:
            return self._opened(connection, envelope.id, opened)
        if before.connection is not None:
            self._asked[connection] = envelope.id, opened, before
            return [Probe(connection, before.connection)]
        return self._resumed(connection, envelope.id, opened, before)

    def _before(self, opened: Opened) -> Session | None:
        """The session that a client would go on with; None if there is none.

        Raises:
            RefusedError: it is not its own, or was opened with a ticket, which opens no other one.
        """
        if opened.resume is None:
            return None
        before, by = self._kept.find(opened.resume, opened.session.user), opened.session.by
        if by is not None and before is None:
            raise RefusedError("the session that this ticket opened is over", kind=TICKET_REFUSED)
        if before is not None and (before.by and before.by.ticket) != (by and by.ticket):
            raise RefusedError("this session was opened in another way: show what opened it")
        return before

    def _refused(self, connection: int, id: int, error: RefusedError) -> list[Instruction]:
        self._audit.not_opened(self._handshakes.host(connection), wrong_proof=error.distrusted)
        distrust: list[Instruction] = [Distrust(connection)] if error.distrusted else []
        failure = m.Failure(error.kind, str(error))
        return [*distrust, Reply(connection, m.Envelope(id, failure)), Close(connection)]

    def _opened(self, connection: int, id: int, opened: Opened) -> list[Instruction]:
        """A client gets a new session."""
        session = self.sessions[connection] = opened.session
        host = self._handshakes.host(connection)
        self._when_opened(session, host)
        kept = None if session.sibling else self._kept.opened(session, host)
        self._audit.opened(session, host)
        welcome = self._welcome(session, opened, kept)
        return [Reply(connection, m.Envelope(id, welcome))]

    def _resumed(self, connection: int, id: int, opened: Opened, session: Session) -> list[Instruction]:
        """A client goes on with its session: with what it has not heard of yet."""
        assert opened.resume is not None and session.kept is not None  # noqa: S101, PT018 - as `find` has seen
        self.sessions[connection] = session
        kept = self._kept.resumed(session, connection, opened.resume)
        session.client = opened.session.client
        self._audit.resumed(session, self._handshakes.host(connection))
        welcome = self._welcome(session, opened, kept)
        again = [Reply(connection, one.envelope, one.tensors) for one in session.kept.answers]
        return [Reply(connection, m.Envelope(id, welcome)), *again]

    def _welcome(self, session: Session, opened: Opened, kept: m.Kept | None) -> m.Welcome:
        gives = session.user is not None and session.by is None and self.gives_tickets
        versions = msgspec.structs.replace(self._handshakes.versions, tickets=gives)
        datasets = {} if session.by is not None else self._datasets(session.user)
        return m.Welcome(self._worker, versions, datasets, opened.proof, kept, opened.ticket)

    def probed(self, connection: int, *, alive: bool) -> list[Instruction]:
        """Goes on with a connection that asked for the session of another one, which is `alive` or has ended."""
        if connection not in self._asked:
            return []  # it has gone meanwhile
        id, opened, before = self._asked[connection]
        if not alive and before.connection is not None:
            return [Probe(connection, before.connection)]  # it came back over another one, before this one
        del self._asked[connection]
        try:
            if alive:
                raise RefusedError(
                    "another connection has this session, and answers: close that one", kind=SESSION_IN_USE
                )
            found = self._before(opened)
        except RefusedError as error:
            return self._refused(connection, id, error)
        if found is None:
            return self._opened(connection, id, opened)
        return self._resumed(connection, id, opened, found)


def _handed_on(connection: int, id: int, opened: Opened) -> HandOn:
    session = opened.session
    name, versions = session.id.partition(":")[2], session.client
    assert versions is not None  # noqa: S101 - a handshake has told
    hello = m.Hello(name, versions, resume=opened.resume)
    by = session.by
    shown = None if by is None else Shown(by.ticket, by.user, opened.ticket)
    return HandOn(connection, id, session.user, opened.proof, hello, session.token, shown)
