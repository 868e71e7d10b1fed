"""What clients post: messages that are not answered. What they could not do shows at the session's next request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from planrt.errors import LocalError
from planrt.workers.machine.counting.work import pay_for_message
from planrt.workers.machine.events import Again, Hold, Instruction, Received, Steps, ToPeer
from planrt.workers.machine.failures import failure_of
from planrt.workers.machine.handling.answering import claim, hand_over, remove
from planrt.workers.machine.handling.parts import Parts
from planrt.workers.machine.handling.requests import Request, Requests
from planrt.workers.machine.keeping.tickets import check_permitted
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.siblings.neighbours import Neighbours
from planrt.workers.wire import messages as m


class Posts:
    """Takes what is posted to one worker."""

    def __init__(self, parts: Parts, requests: Requests) -> None:
        self._parts = parts
        self._requests = requests

    def take(self, session: Session, event: Received, over: Callable[[], bool]) -> list[Instruction]:
        """Does what a message asks for that is not answered, until its turn is `over`; returns what is to be done."""
        match event.envelope.body:
            case m.Post() as body:
                return self._post(event.connection, session, body, over)
            case m.ActFor() as body:
                return self._acts_for(session, body)
            case m.CancelRun(run):
                return self._requests.cancel(session, run)
            case body:
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
            self._parts.objects.audit.check_room(session)
            posted = self._parts.eager.post(session, body, over)
        except Exception as error:  # as in `Requests.advance`
            session.failure = session.failure or failure_of(error)
            return []
        instructions: list[Instruction] = [*posted.sends]
        left = (
            None if posted.left is None else Received(connection, m.Envelope(0, posted.left), [], rest=True)
        )
        if posted.run is not None:
            request = Request(connection, 0, posted.run, session, body)
            instructions += self._requests.advance(request, None)
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
            pay_for_message(self._parts.store, session, body, tensors)
            if self._parts.siblings is not None:
                self._parts.siblings.check(session, body)
                if (peer := self._parts.siblings.computing(session, body)) is not None:
                    return [ToPeer(peer, body, tensors)]
                if isinstance(body, m.Claim) and self._parts.siblings.is_elsewhere(body):
                    return self._claim_elsewhere(self._parts.siblings, connection, session, body)
            self._parts.access.check_publish(session.user, body)
            match body:
                case m.Opening() | m.Corrections() | m.FailGroup():
                    sends, keys = self._parts.parties.heard(session, body, tensors)
                    return self._requests.heard(sends, keys) if sends or keys else []
                case m.Parcel() | m.FailJoint():
                    return self._requests.heard(*self._parts.joint.heard(session, body, tensors))
                case m.EndJoint():
                    ended = self._requests.heard(*self._parts.joint.end(session, body))
                    self._parts.tell_computations()
                    return ended
                case m.EndGroup():
                    self._parts.dealers.stop(session, body.group)
                    ended = self._requests.heard(*self._parts.parties.end(session, body))
                    self._parts.tell_computations()
                    return ended
                case m.Deal():
                    request = Request(connection, 0, self._parts.dealers.deal(session, body), session, body)
                    return self._requests.advance(request, None)
                case _:
                    return [*self._do_posted(session, body, tensors)]
        except Exception as error:  # as in `Requests.advance`
            session.failure = session.failure or failure_of(error)
            self._parts.audit.request_failed(session, body, error)
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

        request = Request(connection, 0, steps(), session, body)
        instructions = self._requests.advance(request, None)
        if not request.keys:
            return instructions
        request.holds = True
        return [*instructions, Hold(connection, None)]

    def _do_posted(self, session: Session, body: m.Body, tensors: list[torch.Tensor]) -> Sequence[ToPeer]:
        match body:
            case m.Put():
                self._parts.objects.put(session, body, tensors)
            case m.StorePlan():
                self._parts.objects.store_plan(session, body, tensors)
            case m.PutShare():
                self._parts.parties.put(session, body, tensors)
            case m.StoreProtocol():
                self._parts.protocols.store(session, body, tensors)
            case m.DeployProtocol():
                return self._parts.protocols.deploy(session, body)
            case m.PutPointer():
                return self._parts.objects.post_pointer(session, body)
            case m.Describe():
                self._parts.objects.describe(session, body)
            case m.Remove():
                return remove(self._parts, session, body)
            case m.Claim():
                claim(self._parts, session, body)
            case m.HandOver():
                hand_over(self._parts, session, body)
            case _:
                raise LocalError(f"messages of type {type(body).__name__} are requests: number them")
        return ()
