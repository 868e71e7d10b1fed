"""A worker as the dealer of sharing groups: it gives each party a seed, and the last one its corrections. No I/O.

The dealer dials; nobody has to reach it. It asks the last party what that needs, a request that waits there until
there is something, makes it, and asks again; what a loop is likely to ask for next it makes meanwhile (`ahead.py`).
What it hands out is a function of its seeds and of the requests alone.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from planrt.errors import LocalError, PlanrtError, SharingError
from planrt.sharing.correlated import Dealer
from planrt.sharing.programs.asking import Asked, Told
from planrt.sharing.randomness import new_seed
from planrt.sharing.requests import Request, size_of
from planrt.workers.machine.counting.work import of_request
from planrt.workers.machine.events import Alarm, PeerAnswered, Steps, ToPeer, Wait
from planrt.workers.machine.kinds.protocol import PeerError
from planrt.workers.machine.sessions import Session, answer_of, ask
from planrt.workers.machine.sharing.ahead import Ahead
from planrt.workers.machine.sharing.groups import check_number
from planrt.workers.machine.sharing.pace import SHORT, Pace
from planrt.workers.machine.store import ObjectStore
from planrt.workers.machine.waiting import Exchange
from planrt.workers.wire import messages as m

_WAITED_FOR = 1 << 15
"""Bytes of corrections that leave once they are complete as the last party needs them: it may wait for them already."""
_THERE = 1 << 19
"""The same, of what was made ahead: it is all there, and each message takes both sides something."""
_AT_ONCE = 1_000_000
"""Bytes that leave in one message at most, unless one correction has more: so much fits into one frame."""
_ALONE = 1 << 19
"""With more bytes, what is made first is to leave while the rest is made."""
_AHEAD = 1 << 25
"""Bytes of corrections that are made at most before they are asked for, for each group."""
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
    ahead: Ahead = field(default_factory=Ahead)
    pace: Pace = field(default_factory=Pace)
    """How long it takes to make what is asked for."""
    working_ahead: Pace = field(default_factory=Pace)
    """How long to make what is expected."""
    dealing: bool = False
    needed: bool = True
    """Whether its client has not said yet that it needs the group no more."""
    ended: bool = False

    @property
    def ahead_key(self) -> str:
        """The key that it waits under for its turn to work ahead."""
        return f"ahead:{self.about.group}"


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
                    answer = yield from self._asked(group, last)
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
            group.ahead.drop()
            self._groups.pop(body.group, None)
        return m.Done(), ()

    def is_short_ahead(self, group: str, key: str) -> bool:
        """Returns whether a group's turn under `key` is to work ahead, and that takes no more than `SHORT` seconds."""
        found = self._groups.get(group)
        expected = found.ahead.expected() if found is not None and key == found.ahead_key else None
        if found is None or expected is None:
            return False
        return found.working_ahead.first(_kind(expected, ahead=True)) <= SHORT

    def is_short(self, group: str, answer: m.Body) -> bool:
        """Returns whether what the last party of a group asks for is made in `SHORT` seconds, or so much of it as
        leaves at once, as far as is known.
        """
        found = self._groups.get(group)
        asked = (
            found.told.known(answer.requests) if found is not None and isinstance(answer, m.Needs) else None
        )
        if found is None or asked is None:
            return False
        ahead = found.ahead.fits(asked)
        if not ahead and sum(piece.size for piece, _ in asked) > _ALONE:
            return False
        return found.pace.first(_kind(asked, ahead=ahead)) <= SHORT

    def _asked(self, group: _Dealt, last: m.PeerAddress) -> Exchange:
        """Asks the last party what it needs; makes what it is likely to say while it does not."""
        key = secrets.token_hex(8)
        yield ToPeer(last, m.AskNeeds(group.about.group), key=key)
        expected = group.ahead.expected()
        if expected is not None and sum(piece.size for piece, _ in expected) <= _AHEAD:
            yield Alarm(0.0, group.ahead_key)
            answered = yield Wait(key, (group.ahead_key,))
            if isinstance(answered, PeerAnswered):
                return answer_of(last, answered)
            self._work_ahead(group, expected)
        answered = yield Wait(key)
        assert isinstance(answered, PeerAnswered)  # noqa: S101 - no time is set for it
        return answer_of(last, answered)

    def _work_ahead(self, group: _Dealt, expected: list[Asked]) -> None:
        """Makes what is expected, where its client's user may keep and compute so much."""
        try:
            free = self._store.keep_bytes(group.owner, sum(piece.size for piece, _ in expected))
        except LocalError:
            return
        made: dict[int, list[torch.Tensor]] = {}
        counts = self._store.counts_work(group.owner)
        group.working_ahead.begin(_kind(expected, ahead=True))
        try:
            for piece, base in expected:
                for told, request in piece.requests:
                    if counts:
                        self._pay(group, request)
                    made[base.number(told)] = group.dealer.made(base.number(told), request, base)
        except PlanrtError:  # what it cannot have is refused when it is asked for
            free()
            return
        group.working_ahead.end_step()
        group.ahead.keep(expected, made, free)

    def _pay(self, group: _Dealt, request: Request) -> None:
        flops = len(group.parties) * of_request(request)
        self._store.spend(group.owner, "dealing for shares", flops)

    def _make(self, group: _Dealt, last: m.PeerAddress, asked: list[Asked]) -> Steps:
        requests = [(number, request, base) for piece, base in asked for number, request in piece.requests]
        group.pace.begin(_kind(asked, ahead=group.ahead.fits(asked)))
        ahead = group.ahead.take(asked)
        waited_for = _THERE if ahead else _WAITED_FOR
        numbers: list[int] = []
        tensors: list[torch.Tensor] = []
        size = in_turn = 0
        counts = self._store.counts_work(group.owner)
        for place, (told, request, base) in enumerate(requests, 1):
            number = base.number(told)
            # A number that is left out is a mask's, and what its party opens next needs all that was asked for before.
            complete = size >= waited_for and number != numbers[-1] + 1
            if numbers and (complete or size + size_of(request.fixed) > _AT_ONCE):
                yield ToPeer(last, m.Corrections(group.about.group, numbers), tensors)
                numbers, tensors, size = [], [], 0
            if in_turn >= _IN_TURN:
                in_turn = 0
                key = f"turn:{group.about.group}"
                group.pace.end_step()
                yield Alarm(0.0, key)
                yield Wait(key)
                group.pace.go_on()
            group.dealer.hand_out(number)
            made = ahead.pop(number, None)
            if made is None:
                if counts:
                    self._pay(group, request)
                made = group.dealer.made(number, request, base)
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


def _kind(asked: Sequence[Asked], *, ahead: bool) -> tuple[Any, ...]:
    """What takes the same time again."""
    return (ahead, *[piece for piece, _ in asked])
