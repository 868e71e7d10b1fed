"""A worker as the dealer of sharing groups: it gives each party a seed, and the last one its corrections. No I/O.

The dealer dials; nobody has to reach it. It asks the last party what that needs, a request that waits there until
there is something, makes it, and asks again. What it hands out is a function of its seeds and of the requests alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from planrt.errors import LocalError, SharingError
from planrt.sharing.correlated import Dealer
from planrt.sharing.programs.asking import Asked, Told
from planrt.sharing.randomness import new_seed
from planrt.workers.machine.counting.work import of_request
from planrt.workers.machine.events import Alarm, Steps, ToPeer, Wait
from planrt.workers.machine.kinds.protocol import PeerError
from planrt.workers.machine.sessions import Session, ask
from planrt.workers.machine.sharing.groups import check_number
from planrt.workers.machine.sharing.pace import SHORT, Pace
from planrt.workers.machine.store import ObjectStore
from planrt.workers.wire import messages as m

_WAITED_FOR = 1 << 15
"""Bytes of corrections that leave once they are complete as the last party needs them: it may wait for them already."""
_AT_ONCE = 1 << 21
"""Bytes that leave in one message at most, about."""
_IN_TURN = 1 << 23
"""Bytes that are made before others of this worker's clients take their turn."""


@dataclass(slots=True, eq=False)
class _Dealt:
    """A group that this worker deals for."""

    about: m.MakeDealer
    owner: str
    parties: list[m.PeerAddress]
    """As they are reached in the client's name."""
    dealer: Dealer
    told: Told = field(default_factory=Told)
    pace: Pace = field(default_factory=Pace)
    """How long it takes to make what is asked for."""
    dealing: bool = False
    needed: bool = True
    """Whether its client has not said yet that it needs the group no more."""
    ended: bool = False


class DealerOps:
    """The groups that one worker deals for; `store` has whose they count for."""

    def __init__(self, store: ObjectStore) -> None:
        self._groups: dict[str, _Dealt] = {}
        self._store = store

    def make(self, session: Session, body: m.MakeDealer) -> Steps:
        """Draws a seed for each party and gives it to that party alone.

        Raises:
            SharingError: the group is known here. LocalError: a party does not take its seed.
        """
        if body.group in self._groups:
            raise SharingError(f"group {body.group!r} has this dealer already")
        check_number(self._groups.values(), session, "deals for")
        seeds = [new_seed() for _ in body.parties]
        parties = [session.reached(one, "share") for one in body.parties]
        group = self._groups[body.group] = _Dealt(body, session.id, parties, Dealer(seeds))
        try:
            for party, seed in zip(parties, seeds, strict=True):
                yield from ask(party, m.GiveSeed(body.group, body.token, seed))
        except BaseException:
            self._groups.pop(body.group, None)
            group.ended = True
            raise
        return m.Done(), ()

    def deal(self, session: Session, body: m.Deal) -> Steps:
        """Makes what the last party needs, until the group ends."""
        group = self._groups.get(body.group)
        if group is None or group.owner != session.id:
            raise SharingError(f"group {body.group!r} has no dealer here")
        last = group.parties[-1]
        group.dealing = True
        try:
            while not group.ended:
                try:
                    answer = yield from ask(last, m.AskNeeds(body.group))
                except Exception:
                    if group.needed:
                        raise
                    break  # it has ended the group, too; the others may still be a little behind
                if not isinstance(answer, m.Needs):
                    raise LocalError(f"worker {last.worker!r} answered with {type(answer).__name__}")
                yield from self._make(group, last, group.told.read(answer.requests))
        except PeerError as error:
            yield from self._fail(group, f"the dealer cannot reach party {last.worker!r}: {error}")
        except Exception as error:  # whatever was wrong with what it asked for ends this group alone
            yield from self._fail(group, f"the dealer could not go on: {error}")
        finally:
            group.ended = True
            self._groups.pop(body.group, None)
        return m.Done(), ()

    def is_short(self, group: str, answer: m.Body) -> bool:
        """Returns whether what the last party of a group asks for is made in `SHORT` seconds, or so much of it as
        leaves at once, as far as is known.
        """
        found = self._groups.get(group)
        pieces = (
            found.told.kept(answer.requests) if found is not None and isinstance(answer, m.Needs) else None
        )
        return found is not None and pieces is not None and found.pace.first(tuple(pieces)) <= SHORT

    def _make(self, group: _Dealt, last: m.PeerAddress, asked: Sequence[Asked]) -> Steps:
        requests = [(number, request, base) for piece, base in asked for number, request in piece.requests]
        group.pace.begin(tuple([piece for piece, _ in asked]))
        numbers: list[int] = []
        tensors: list[torch.Tensor] = []
        size = in_turn = 0
        counts = self._store.counts_work(group.owner)
        for place, (told, request, base) in enumerate(requests, 1):
            number = base.number(told)
            # A number that is left out is a mask's, and what its party opens next needs all that was asked for before.
            complete = size >= _WAITED_FOR and number != numbers[-1] + 1
            if complete or size >= _AT_ONCE:
                yield ToPeer(last, m.Corrections(group.about.group, numbers), tensors)
                numbers, tensors, size = [], [], 0
            if in_turn >= _IN_TURN:
                in_turn = 0
                key = f"turn:{group.about.group}"
                group.pace.end_step()
                yield Alarm(0.0, key)
                yield Wait(key)
                group.pace.go_on()
            if counts:
                flops = len(group.parties) * of_request(request)
                self._store.spend(group.owner, "dealing for shares", flops)
            made = group.dealer.correction(number, request, base)
            numbers.append(number)
            tensors += made
            nbytes = sum(tensor.nbytes for tensor in made)
            size, in_turn = size + nbytes, in_turn + nbytes
            if place == len(requests):
                yield ToPeer(last, m.Corrections(group.about.group, numbers), tensors)
        group.pace.end_step()
        return m.Done(), ()

    def _fail(self, group: _Dealt, reason: str) -> Steps:
        if not group.ended:
            group.ended = True
            for party in group.parties:
                yield ToPeer(party, m.FailGroup(group.about.group, reason))
        return m.Done(), ()

    def stop(self, session: Session, group: str) -> None:
        """Takes note that this session needs a group no more. What the parties compute in it already they finish, so
        it is dealt for until the last party has ended it, behind that.
        """
        found = self._groups.get(group)
        if found is not None and found.owner == session.id:
            found.needed = False
            if not found.dealing:
                self._groups.pop(group).ended = True

    def end(self, session: Session) -> list[ToPeer]:
        """Forgets the groups of a session that is over; returns what their parties are told."""
        sends: list[ToPeer] = []
        for id in [id for id, group in self._groups.items() if group.owner == session.id]:
            group = self._groups.pop(id)
            group.ended = True
            ended = m.FailGroup(id, "its client's session at the dealer is over")
            sends += [ToPeer(party, ended) for party in group.parties]
        return sends
