"""What clients ask for: one generator per request, which returns its answer. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from planrt.errors import LocalError
from planrt.plans.policy.approvals import Status
from planrt.workers.machine.counting.work import pay_for_message
from planrt.workers.machine.events import Answer, Steps, ToPeer
from planrt.workers.machine.handling.parts import Parts
from planrt.workers.machine.keeping.tickets import check_permitted
from planrt.workers.machine.sessions import Session
from planrt.workers.wire import messages as m

MOST_WAITING: Final = 10_000
"""Requests of one session that may wait for other workers at a time."""


def answer(parts: Parts, session: Session, body: m.Body, tensors: list[torch.Tensor]) -> Steps:
    """Does what a request asks for, waiting for other workers where it needs them; returns its answer.

    Raises:
        PlanrtError: what its client is told instead.
    """
    check_permitted(session, body)
    if session.waiting >= MOST_WAITING:
        raise LocalError(
            f"{session.waiting:,} requests of this session wait for other workers, as many as may: await some first"
        )
    if isinstance(body, m.Resume):  # which nothing keeps from being heard
        return parts.passes.resume(session)
    parts.objects.raise_unseen(session)
    parts.objects.audit.check_room(session)
    pay_for_message(parts.store, session, body, tensors)
    if parts.siblings is not None:
        parts.siblings.check(session, body)
        if (peer := parts.siblings.computing(session, body)) is not None:
            return (yield from parts.siblings.relayed(session, peer, body, tensors))
    parts.access.check_publish(session.user, body)
    match body:
        case m.Fetch():
            return (yield from parts.objects.fetch(session, body))
        case m.Backward():
            return (yield from parts.passes.run(session, body))
        case m.Call():
            return (yield from parts.eager.call(session, body))
        case m.Put():
            return parts.objects.put(session, body, tensors)
        case m.StorePlan():
            return parts.objects.store_plan(session, body, tensors)
        case m.ReadPlan():
            return parts.objects.read_plan(session, body)
        case m.StoreProtocol():
            return parts.protocols.store(session, body, tensors)
        case m.DeployProtocol():
            yield from parts.protocols.deploy(session, body)
            return m.Done(), ()
        case m.ReadRun():
            return parts.protocols.read_run(session, body)
        case m.RunProtocol():
            return (yield from parts.protocols.run(session, body))
        case m.Search():
            here = parts.objects.search(session, body)
            return here if parts.siblings is None else (yield from parts.siblings.search(session, body, here))
        case m.Lend() if parts.siblings is not None:
            return parts.siblings.lend(session, body, parts.sessions_by_id())
        case m.Move():
            return (yield from parts.objects.move(session, body))
        case m.HandOver():
            return hand_over(parts, session, body)
        case m.Delegate():
            return parts.handshakes.give_ticket(session, body), ()
        case m.ActFor():
            yield from session.act_for(body)
            return m.Done(), ()
        case m.Claim():
            if parts.siblings is not None and parts.siblings.is_elsewhere(body):
                return (yield from parts.siblings.claim(session, body))
            claim(parts, session, body)
            return m.Done(), ()
        case m.Remove():
            yield from remove(parts, session, body)
            return m.Done(), ()
        case m.PutPointer():
            return (yield from parts.objects.put_pointer(session, body))
        case m.Clear():
            yield from parts.objects.clear(session)
            return m.Done(), ()
        case m.ListObjects():
            return parts.objects.listing(session)
        case m.MakeGroup():
            if parts.siblings is not None:
                parts.siblings.check_new(body)
            made = parts.parties.make(session, body)
            parts.tell_computations()
            return made
        case m.MakeDealer():
            return (yield from parts.dealers.make(session, body))
        case m.GiveSeed():
            return (yield from parts.parties.take_seed(session, body))
        case m.AskGroup():
            return parts.parties.told_waits(session, body)
        case m.JoinGroup():
            return parts.parties.join(session, body)
        case m.AskNeeds():
            return (yield from parts.parties.ask_needs(session, body))
        case m.PutShare():
            return parts.parties.put(session, body, tensors)
        case m.ShareOut():
            return (yield from parts.parties.share_out(session, body))
        case m.ReadTraffic():
            return parts.parties.traffic(session, body)
        case m.AskStatus():
            return parts.overview.told_to(session), ()
        case m.ReadTable():
            return parts.joint.read_table(session, body)
        case m.OpenJoint():
            if parts.siblings is not None:
                parts.siblings.check_new(body)
            opened = yield from parts.joint.open(session, body)
            parts.tell_computations()
            return opened
        case m.AskJoint():
            return parts.joint.told_waits(session, body)
        case m.JoinJoint():
            return parts.joint.join(session, body)
        case m.WorkJoint():
            return (yield from parts.joint.work(session, body, tensors))
        case m.CountObjects():
            return m.Counted(parts.store.count(session.id)), ()
        case m.RunPlan():
            return parts.training.run_plan(session, body, tensors)
        case m.PutPlan():
            return parts.training.put_plan(session, body, tensors)
        case m.AskApproval():
            status = Status("approved")
            if parts.gate is not None:
                status = parts.gate.approving.told(body.plan, session.user, sent=body.plan in session.asked)
            return m.Approval(status.status, status.why), ()
        case m.Fit():
            return parts.training.fit(session, body, tensors)
        case m.ReadOptimizer():
            return parts.training.read_optimizer(session, body)
        case m.PutOptimizer():
            return parts.training.put_optimizer(session, body, tensors)
        case m.Evaluate():
            return parts.training.evaluate(session, body, tensors)
        case m.JoinSum():
            return parts.sums.join(session, body)
        case m.ShareSecrets():
            return parts.sums.share(session, body)
        case m.FitMasked():
            return parts.training.fit_masked(session, body, tensors)
        case m.SignSurvivors():
            return parts.sums.sign(session, body)
        case m.RevealShares():
            return parts.sums.reveal(session, body)
        case _:
            raise LocalError(f"a worker does not take messages of type {type(body).__name__}")


def remove(parts: Parts, session: Session, body: m.Remove) -> Sequence[ToPeer]:
    """Lets objects go, here and where another process has them; returns what other workers are told."""
    elsewhere = [] if parts.siblings is None else parts.siblings.removed(session, body)
    return [*parts.objects.remove(session, body), *elsewhere]


def hand_over(parts: Parts, session: Session, body: m.HandOver) -> Answer:
    """Gives objects to another session, or takes back what another process was lent."""
    if parts.siblings is not None and session.sibling:
        parts.siblings.came_back(body.ids)
    return parts.objects.hand_over(session, body)


def claim(parts: Parts, session: Session, body: m.Claim) -> None:
    """Takes over what another session has handed over."""
    parts.objects.claim(session, body, parts.sessions_by_id())
