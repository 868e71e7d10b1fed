"""One sharing group, as a party of it sees it: who the others are, what they have opened, why it has failed. No I/O.

Parties open what a protocol yields, one opening after the other. Opening `n` is over when the parts of all others are
there; a party that is ahead can be ahead by one, since it cannot go on without this one's part. Anything else that
arrives is no part of the protocol, and ends the group.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from msgspec.structs import replace

from planrt.errors import RandomnessError, SharingError
from planrt.plans.policy.quotas import PLAN_BYTES
from planrt.sharing.correlated import Stock, Supply
from planrt.sharing.kernels import Context
from planrt.sharing.programs.asking import Asked, Telling
from planrt.sharing.programs.needs import MOST_BYTES, MOST_REQUESTS, Needs
from planrt.sharing.programs.running import shown_parts
from planrt.sharing.requests import ALL, Base, Request
from planrt.sharing.rounds import Party, combined
from planrt.workers.machine.events import Alarm, Wait
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.sharing.pace import Pace
from planrt.workers.machine.waiting import Exchange
from planrt.workers.wire import messages as m
from planrt.workers.wire.shared_programs import KeptPrograms

MAX_GROUPS = 1_000
"""Groups that a worker is a party of, and as many that it deals for."""
MAX_OF_SESSION = 100
"""Of these, groups of one client's session."""


class _Owned(Protocol):
    @property
    def owner(self) -> str: ...


def check_number(groups: Collection[_Owned], session: Session, what: str) -> None:
    """Raises SharingError if the worker has so many `groups`, or the session, that another one is not taken."""
    if len(groups) >= MAX_GROUPS:
        raise SharingError(f"the worker {what} {MAX_GROUPS:,} groups, its limit")
    if sum(one.owner == session.id for one in groups) >= MAX_OF_SESSION:
        raise SharingError(f"the worker {what} {MAX_OF_SESSION} groups of this session, its limit: end some")


class GroupFailedError(SharingError):
    """A group that has ended already: whoever ended it has said why."""


@dataclass(slots=True, eq=False)
class Group:
    """A sharing group at one of its parties."""

    about: m.MakeGroup
    """What its client said."""
    client: Session
    """The client's session here."""
    parties: list[m.PeerAddress]
    """The parties as they are reached in that client's name."""
    context: Context | None = None
    """This party with its correlated randomness, from when the dealer has given it a seed."""
    members: dict[str, int] = field(default_factory=dict)
    """Session of another party here -> its number. What is opened is taken from these sessions alone."""
    dealer: str = ""
    """The dealer's session here."""
    failure: str = ""
    """Why it has ended; nothing is opened afterwards."""
    opened: int = 0
    """How many openings are over, or under way: the number of the next one."""
    alarm: float = 0.0
    """When somebody will look whether it has waited too long, on `time.monotonic`'s clock."""
    waits: bool = False
    """Whether one of its programs waits now, for those that are `missing` or the dealer."""
    pace: Pace = field(default_factory=Pace)
    """How long its programs compute at a time."""
    traffic: m.GroupTraffic = field(default_factory=m.GroupTraffic)
    programs: KeptPrograms = field(default_factory=KeptPrograms)
    """Programs that its client has sent."""
    _came: dict[int, int] = field(default_factory=dict)
    """Party -> how many of its openings have arrived."""
    _parts: dict[int, deque[list[torch.Tensor]]] = field(default_factory=dict)
    """Party -> what it has opened that this one has not taken yet, oldest first."""
    _stock: Stock | None = None
    _telling: Telling = field(default_factory=Telling)
    _asked: deque[Asked] = field(default_factory=deque)
    """What the dealer has not been told of."""
    _outstanding: deque[tuple[int, Request, Base]] = field(default_factory=deque)
    """Requests that it was told of, and has not answered, with their numbers."""

    @property
    def owner(self) -> str:
        """The name of the client's session here."""
        return self.client.id

    @property
    def key(self) -> str:
        """The key that its runs wait under."""
        return f"sharing:{self.about.group}"

    @property
    def dealing_key(self) -> str:
        """The key that the dealer's question waits under, while there is nothing to be answered."""
        return f"dealing:{self.about.group}"

    @property
    def others(self) -> list[m.PeerAddress]:
        """The other parties, in their order."""
        return [one for number, one in enumerate(self.parties) if number != self.about.number]

    @property
    def me(self) -> m.PeerAddress:
        """This party, as the client says."""
        return self.about.parties[self.about.number]

    @property
    def is_last(self) -> bool:
        """True for the one party that the dealer sends corrections."""
        return self.about.number == len(self.about.parties) - 1

    def name_of(self, number: int) -> str:
        """Returns a party, or the dealer, as messages call it."""
        if number == len(self.about.parties):
            return f"the dealer, worker {self.about.dealer.worker!r},"
        return f"party {self.about.parties[number].worker!r}"

    def begin(self, seed: bytes) -> None:
        """Takes the dealer's seed.

        Raises:
            SharingError: there is one already: two dealers, or one who begins again, would tell masks.
        """
        if self.context is not None:
            raise SharingError(f"group {self.about.group!r} has its seed already")
        self._stock = Stock() if self.is_last else None
        supply = Supply(seed, self._stock)
        party = Party(self.about.number, len(self.about.parties), supply)
        self.context = Context(party, self.about.scale)

    def turn(self) -> Exchange:
        """Lets others of this worker's clients take their turn, before something that takes long and is done once."""
        key = f"turn:{self.about.group}"
        self.pace.rest()
        yield Alarm(0.0, key)
        yield Wait(key)
        self.check()

    def check(self) -> None:
        """Raises GroupFailedError once the group has failed."""
        if self.failure:
            raise GroupFailedError(self.failure)

    def fail(self, reason: str) -> None:
        """Ends the group: what waits is told, nothing is opened any more. The first reason stays."""
        self.failure = self.failure or reason
        self._parts.clear()
        self._asked.clear()
        self._outstanding.clear()

    # Openings

    def sending(self, parts: Sequence[torch.Tensor]) -> m.Opening:
        """Begins an opening, of which this party's parts go to all others; returns what goes with them."""
        number, self.opened = self.opened, self.opened + 1
        nbytes = sum(part.nbytes for part in parts) * (len(self.about.parties) - 1)
        self.traffic = replace(self.traffic, rounds=self.traffic.rounds + 1, sent=self.traffic.sent + nbytes)
        return m.Opening(self.about.group, number)

    def arrived(self, session: str, body: m.Opening, parts: list[torch.Tensor]) -> None:
        """Takes another party's parts of an opening.

        Raises:
            SharingError: they come from somebody else, or out of order.
        """
        number = self.members.get(session)
        if number is None:
            raise SharingError(f"an opening of group {body.group!r} came from none of its parties")
        expected = self._came.get(number, 0)
        if body.number != expected or expected > self.opened:
            raise SharingError(
                f"{self.name_of(number)} sent opening {body.number} where {min(expected, self.opened)} comes next: "
                "openings come in order"
            )
        self._came[number] = expected + 1
        self._parts.setdefault(number, deque()).append(parts)
        received = self.traffic.received + sum(part.nbytes for part in parts)
        self.traffic = replace(self.traffic, received=received)

    @property
    def held_bytes(self) -> int:
        """The bytes of what others have opened and this party has not taken yet, and of its client's programs."""
        parts = sum(one.nbytes for came in self._parts.values() for parts in came for one in parts)
        return parts + self.programs.size * PLAN_BYTES

    @property
    def missing(self) -> list[int]:
        """The parties whose parts of the opening under way have not arrived."""
        opened, came = self.opened, self._came
        me = self.about.number
        return [
            number for number in range(len(self.parties)) if came.get(number, 0) < opened and number != me
        ]

    @property
    def awaited(self) -> list[int]:
        """Whom its program waits for now; the dealer has the number after those of the parties."""
        return (self.missing or [len(self.about.parties)]) if self.waits else []

    def combined(self, mine: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns what the parts of all parties add up to; `mine` are this party's.

        Raises:
            SharingError: somebody's have other shapes or dtypes.
        """
        everybody = [list(mine)]
        looks = [(part.shape, part.dtype) for part in mine]
        for number in sorted(self._parts):
            parts = self._parts[number].popleft()
            if [(part.shape, part.dtype) for part in parts] != looks:
                raise SharingError(
                    f"{self.name_of(number)} opened {shown_parts(parts)} where this one opens {shown_parts(mine)}: "
                    "parties run the same protocol"
                )
            everybody.append(parts)
        return [combined(parts) for parts in zip(*everybody, strict=True)]

    # What the dealer makes, of whom the last party asks it

    def want(self, needs: Needs, base: Base) -> None:
        """Notes what the dealer is to be asked for."""
        self._asked.extend((piece, base) for piece in needs.pieces)

    def wanted(self) -> list[Any]:
        """Takes out what the dealer is told of next, as it is sent; nothing if it knows of all."""
        told: list[Asked] = []
        count = size = 0
        while self._asked:
            piece, base = self._asked[0]
            count, size = count + len(piece.requests), size + piece.size
            if told and (count > MOST_REQUESTS or size > MOST_BYTES):
                break
            told.append(self._asked.popleft())
            self._outstanding.extend((base.number(number), one, base) for number, one in piece.requests)
        return self._telling.data(told)

    def dealt(self, session: str, body: m.Corrections, tensors: Sequence[torch.Tensor]) -> None:
        """Takes corrections.

        Raises:
            SharingError: they are not the dealer's. RandomnessError: they were not asked for, or do not fit; names it.
        """
        if not self.dealer or session != self.dealer or self._stock is None:
            raise SharingError(
                f"corrections for group {body.group!r} came from somebody who is not its dealer"
            )
        whose = self.name_of(len(self.about.parties))
        rest = iter(tensors)
        for number in body.numbers:
            wanted, request, base = self._outstanding.popleft() if self._outstanding else (-1, None, ALL)
            if number != wanted or request is None:
                raise RandomnessError(f"{whose} sent correlated randomness {number}, which was not asked for")
            try:
                self._stock.put(number, request, list(islice(rest, len(request.fixed))), base)
            except RandomnessError as error:
                raise RandomnessError(f"{whose} sent what does not fit: {error}") from error
        if next(rest, None) is not None:
            raise RandomnessError(f"{whose} sent more than was asked for")
        dealt = self.traffic.dealt + sum(one.nbytes for one in tensors)
        self.traffic = replace(self.traffic, dealt=dealt)

    def is_over(self, dealt: int) -> bool:
        """Returns whether the opening under way is over, and all corrections below the number `dealt` are here."""
        return not self.missing and not (dealt and self._first_to_come < dealt)

    @property
    def _first_to_come(self) -> float:
        """The number of the first correction that is not here."""
        if self._outstanding:
            return self._outstanding[0][0]
        if self._asked:
            piece, base = self._asked[0]
            return base.number(piece.requests[0][0])
        return math.inf
