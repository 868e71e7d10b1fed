"""How sessions end: with their connection, later, or with their user or the session that they act for. No I/O."""

from __future__ import annotations

from planrt.workers.machine.events import Close, Instruction, Part, Reply
from planrt.workers.machine.handling.parts import Parts
from planrt.workers.machine.handling.requests import Requests
from planrt.workers.machine.handshakes import REVOKED, Users
from planrt.workers.machine.sessions import Session
from planrt.workers.wire import messages as m
from planrt.workers.wire.refusals import TICKET_REFUSED


class Endings:
    """Ends the sessions of one worker; each method returns what is to be done about it."""

    def __init__(self, parts: Parts, requests: Requests) -> None:
        self._parts = parts
        self._requests = requests

    def users_changed(self, users: Users) -> list[Instruction]:
        """Ends the sessions whose token counts no longer, and those of them that wait for their client to come back."""
        self._parts.handshakes.change_users(users)
        instructions = self._parts.openings.forget_revoked()
        for connection, session in list(self._parts.sessions.items()):
            if self._parts.handshakes.counts(session) or connection not in self._parts.sessions:
                continue
            if session.kept is not None:
                session.kept.give_up()
            failure = m.Failure("HandshakeError", REVOKED)
            instructions += [Reply(connection, m.Envelope(0, failure)), *self.disconnected(connection)]
            instructions.append(Close(connection))
        for session in self._parts.kept.away():
            if not self._parts.handshakes.counts(session) and self._parts.kept.has(session):
                instructions += self.end(session)
        return instructions

    def disconnected(self, connection: int) -> list[Instruction]:
        """Takes note that a connection has ended: its session waits for its client to come back, or is over."""
        session = self._parts.openings.disconnected(connection)
        if session is None:
            return []
        session.connection = None
        alone = self.end_computations(session)
        if self._parts.siblings is not None:
            alone += self._parts.siblings.gone(session)
            self._parts.tell_computations()
        keep, over = self._parts.kept.left(session)
        ended = [session] if keep is None else over
        return [
            *alone,
            *(() if keep is None else (keep,)),
            *(one for other in ended for one in self.end(other)),
        ]

    def end_computations(self, session: Session) -> list[Instruction]:
        """Ends the computations on shares and the joint runs of a session, which do not go on after a cut: the others
        hear so at once."""
        return [
            *self._parts.dealers.end(session),
            *self._requests.heard(*self._parts.parties.gone(session)),
            *self._requests.heard(*self._parts.joint.gone(session)),
        ]

    def end(self, session: Session) -> list[Instruction]:
        """Ends a session, with all that it has and all that is done in its name."""
        self._parts.kept.ended(session)
        session.leave_graphs()
        self._parts.audit.ended(session)
        self._parts.handshakes.tickets.ended(session)
        instructions = [*self._end_those_for(session), *self._requests.end(session)]
        parted = [Part(list(session.acts))] if session.acts else []
        return [*instructions, *self._parts.objects.end(session), *parted]

    def _end_those_for(self, client: Session) -> list[Instruction]:
        """Ends the sessions that other workers opened in the name of one that is over."""
        instructions: list[Instruction] = []
        for connection, session in list(self._parts.sessions.items()):
            if session.by is not None and session.by.client is client:
                if session.kept is not None:
                    session.kept.give_up()
                failure = m.Failure(TICKET_REFUSED, "the session that gave the ticket is over")
                instructions += [Reply(connection, m.Envelope(0, failure)), *self.disconnected(connection)]
                instructions.append(Close(connection))
        for session in self._parts.kept.away():
            if session.by is not None and session.by.client is client:
                instructions += self.end(session)
        return instructions
