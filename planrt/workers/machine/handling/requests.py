"""The requests that are under way: generators that run until they wait for other workers, and go on. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planrt.workers.machine.audit import Auditor
from planrt.workers.machine.events import (
    Close,
    Instruction,
    PeerAnswered,
    Release,
    Reply,
    Steps,
    TimePassed,
    ToPeer,
    Wait,
    Wake,
)
from planrt.workers.machine.failures import failure_of
from planrt.workers.machine.kinds.protocol import RunCancelledError
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.store import ObjectStore
from planrt.workers.wire import messages as m


@dataclass(slots=True)
class Request:
    """One request that is under way, from its first step to its answer, or what a client has posted."""

    connection: int
    """Over which it came: its answer goes over the one that its session has then."""
    id: int
    """Its number; 0: it has no answer."""
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


class Requests:
    """The requests of one worker that wait for others, by the keys that they wait for.

    `store` has the accounts that answers count against; `audit` is told of requests that fail.
    """

    def __init__(self, store: ObjectStore, audit: Auditor) -> None:
        self._store = store
        self._audit = audit
        self._waiting: dict[str, Request] = {}
        self.at_work: list[Session] = []
        """Whose requests run now: one may wake another."""
        self.deliver: Callable[[ToPeer | Reply], None] | None = None
        """Takes what requests post to other workers, and what those answer that they wake, while their event is
        handled."""

    def sessions(self) -> list[Session]:
        """Returns the session of each request that waits."""
        return [one.session for one in {id(one): one for one in list(self._waiting.values())}.values()]

    def waiting_for(self, key: str) -> m.Body | None:
        """Returns the request that waits for `key`, if one does."""
        request = self._waiting.get(key)
        return None if request is None else request.body

    def heard(self, sends: Sequence[ToPeer], keys: Sequence[str]) -> list[Instruction]:
        """Returns what goes to other workers, and what comes of it that requests under these keys go on."""
        instructions: list[Instruction] = [*sends]
        for key in keys:
            if (request := self._waiting.get(key)) is not None:
                instructions += self._go_on(request, TimePassed(key))
        return instructions

    def wake(self, key: str, sent: PeerAnswered | TimePassed | Exception) -> list[Instruction]:
        """Goes on with the request that waits for `key`, if there still is one; `sent` is what it waited for, or what
        it is to raise."""
        request = self._waiting.get(key)
        return [] if request is None else self._go_on(request, sent)

    def cancel(self, session: Session, run: int) -> list[Instruction]:
        """Ends a run of a protocol that waits."""
        request = next((one for one in self._of(session) if one.run == run), None)
        return [] if request is None else self._go_on(request, RunCancelledError("cancelled"))

    def end(self, session: Session) -> list[Instruction]:
        """Ends the requests that a session has under way, since it is over."""
        instructions: list[Instruction] = []
        for request in self._of(session):
            if request.run is not None:  # what it made on other workers must go
                instructions += self._go_on(request, RunCancelledError("its client is gone"))
            else:
                self._forget_keys(request)
                request.steps.close()
        return instructions

    def _go_on(self, request: Request, sent: PeerAnswered | TimePassed | Exception) -> list[Instruction]:
        self._forget_keys(request)
        kept = request.session.kept
        if kept is not None and kept.answers:
            kept.before_writing()
        return self.advance(request, sent)

    def _forget_keys(self, request: Request) -> None:
        if request.keys:
            request.session.waiting -= 1
        for key in request.keys:
            del self._waiting[key]
        request.keys = ()

    def _of(self, session: Session) -> list[Request]:
        """The requests of a session that wait for peers."""
        waiting = {id(one): one for one in self._waiting.values() if one.session is session}
        return list(waiting.values())

    def advance(
        self, request: Request, sent: PeerAnswered | TimePassed | Exception | None
    ) -> list[Instruction]:
        """Runs a request until it waits for a peer or is answered; `sent` is what it waited for."""
        instructions: list[Instruction] = []
        steps, deliver = request.steps, self.deliver
        self.at_work.append(request.session)
        try:
            step = steps.throw(sent) if isinstance(sent, Exception) else steps.send(sent)
            while True:
                match step:
                    case ToPeer(key="") if deliver is not None:
                        deliver(step)
                    case Wait(key, others):
                        request.keys = (key, *others)
                        request.session.waiting += 1
                        for key in request.keys:
                            self._waiting[key] = request
                        instructions.append(step)
                        return instructions
                    case Wake(key):
                        for one in self.wake(key, TimePassed(key)):
                            if deliver is not None and isinstance(one, Reply) and not instructions:
                                deliver(one)
                            else:
                                instructions.append(one)
                    case _:
                        instructions.append(step)
                step = steps.send(None)
        except StopIteration as stop:
            body, tensors = stop.value or (m.Done(), ())
        except Exception as error:  # whatever a request raises is its client's answer, never the worker's end
            body, tensors = failure_of(error), ()
            self._audit.request_failed(request.session, request.body, error)
        finally:
            self.at_work.pop()
        if not request.id:
            return [*instructions, Release(request.connection)] if request.holds else instructions
        session, kept = request.session, request.session.kept
        envelope = (
            m.Envelope(request.id, body)
            if kept is None
            else kept.answered(request.id, body, tensors, self._store.account_of(session.id))
        )
        if session.connection is not None:
            instructions.append(Reply(session.connection, envelope, tensors))
            if session.over:
                instructions.append(Close(session.connection))
        return instructions
