"""One sharing group, as a party of it sees it: who the others are, what they have opened, why it has failed. No I/O.

Parties open what a protocol yields, one opening after the other. Opening `n` is over when the parts of all others are
there; a party that is ahead can be ahead by one, since it cannot go on without this one's part. Anything else that
arrives is no part of the protocol, and ends the group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import torch

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
from planrt.workers.machine.waiting import Exchange, Late, wait
from planrt.workers.wire import messages as m
from planrt.workers.wire.shared_programs import KeptPrograms

MAX_GROUPS = 1_000
"""Groups that a worker is a party of, and as many that it deals for."""
MAX_OF_SESSION = 100
"""Of these, groups of one client's session."""

_NBYTES = attrgetter("nbytes")
_LOOK = attrgetter("shape", "dtype")


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
    owner: str = field(init=False)
    """The name of the client's session here."""
    key: str = field(init=False)
    """The key that its runs wait under."""
    dealing_key: str = field(init=False)
    """The key that the dealer's question waits under, while there is nothing to be answered."""
    others: list[m.PeerAddress] = field(init=False)
    """The other parties, in their order."""
    is_last: bool = field(init=False)
    """True for the one party that the dealer sends corrections."""
    opened: int = 0
    """How many openings are over, or under way: the number of the next one."""
    needed: int = 0
    """Its program goes on only when all corrections below this number are here."""
    alarm: float = 0.0
    """When somebody will look whether it has waited too long, on `time.monotonic`'s clock."""
    waits: bool = False
    """Whether one of its programs waits now (`wait`), for those that are `missing` or the dealer."""
    pace: Pace = field(default_factory=Pace)
    """How long its programs compute at a time."""
    programs: KeptPrograms = field(default_factory=KeptPrograms)
    """Programs that its client has sent."""
    _came: dict[int, int] = field(default_factory=dict)
    """Party -> how many of its openings have arrived."""
    _here: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Party -> its parts of the opening under way."""
    _ahead: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Party -> its parts of the next one, of those that are ahead."""
    _to_come: int = 0
    """How many parties are `missing`."""
    _nbytes: int = 0
    """The bytes of this party's parts of the opening under way, and so of each other's."""
    _sent: int = 0
    _received: int = 0
    _dealt: int = 0
    """Bytes: see `traffic`."""
    _stock: Stock | None = None
    _telling: Telling = field(default_factory=Telling)
    _asked: deque[Asked] = field(default_factory=deque)
    """What the dealer has not been told of."""
    _outstanding: deque[tuple[int, Request, Base]] = field(default_factory=deque)
    """Requests that it was told of, and has not answered, with their numbers."""

    def __post_init__(self) -> None:
        me = self.about.number
        self.owner = self.client.id
        self.key, self.dealing_key = f"sharing:{self.about.group}", f"dealing:{self.about.group}"
        self.others = [one for number, one in enumerate(self.parties) if number != me]
        self.is_last = me == len(self.parties) - 1

    @property
    def me(self) -> m.PeerAddress:
        """This party, as the client says."""
        return self.about.parties[self.about.number]

    @property
    def traffic(self) -> m.GroupTraffic:
        """The openings that it took part in, and the bytes of these and of corrections."""
        return m.GroupTraffic(self.opened, self._sent, self._received, self._dealt)

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
        self.waits = False
        self._here.clear()
        self._ahead.clear()
        self._asked.clear()
        self._outstanding.clear()

    # Openings

    def sending(self, parts: Sequence[torch.Tensor]) -> m.Opening:
        """Begins an opening, of which this party's parts go to all others; returns what goes with them."""
        number, self.opened = self.opened, self.opened + 1
        self._nbytes = sum(map(_NBYTES, parts))
        self._sent += self._nbytes * len(self.others)
        self._here, self._ahead = self._ahead, {}
        self._to_come = len(self.others) - len(self._here)
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
        if expected < self.opened:
            self._here[number] = parts
            self._to_come -= 1
        else:
            self._ahead[number] = parts

    @property
    def held_bytes(self) -> int:
        """The bytes of what others have opened and this party has not taken yet, and of its client's programs."""
        held = [*self._here.values(), *self._ahead.values()]
        return sum(one.nbytes for parts in held for one in parts) + self.programs.size * PLAN_BYTES

    def missing(self) -> list[int]:
        """Returns the parties whose parts of the opening under way have not arrived."""
        opened, came = self.opened, self._came
        me = self.about.number
        return [
            number for number in range(len(self.parties)) if came.get(number, 0) < opened and number != me
        ]

    @property
    def awaited(self) -> list[int]:
        """Whom its program waits for now; the dealer has the number after those of the parties."""
        return (self.missing() or [len(self.about.parties)]) if self.waits else []

    def is_over(self) -> bool:
        """Returns whether the opening under way is over, and all corrections that are `needed` are here.

        Raises:
            GroupFailedError: the group has failed.
        """
        if self.failure:
            raise GroupFailedError(self.failure)
        if self._to_come:
            return False
        if self._outstanding:
            return self._outstanding[0][0] >= self.needed
        if self._asked:
            piece, base = self._asked[0]
            return base.number(piece.requests[0][0]) >= self.needed
        return True

    def wait(self) -> Exchange:
        """Begins to wait, where it is not over, until it is; returns what ends in who is `Late`, for `went_on`."""
        self.waits = True
        question = m.AskGroup(self.about.group) if self.about.tells_waits else None
        me, seconds = self.about.number, self.about.timeout
        return wait(self, me, seconds, question, is_over=self.is_over, awaited=self.missing)

    def went_on(self, late: Late | None) -> None:
        """Takes note that nobody waits any more.

        Raises:
            SharingError: somebody took too long.
        """
        self.waits = False
        if late is not None:
            dealer = {len(self.about.parties): list[int]()}
            raise SharingError(Late(late.seconds, late.parties or dealer).told(self.name_of))

    def combined(self, mine: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns what the parts of all parties add up to; `mine` are this party's.

        Raises:
            SharingError: somebody's have other shapes or dtypes.
        """
        everybody = [list(mine)]
        looks = [*map(_LOOK, mine)]
        for number, parts in sorted(self._here.items()):
            if [*map(_LOOK, parts)] != looks:
                raise SharingError(
                    f"{self.name_of(number)} opened {shown_parts(parts)} where this one opens {shown_parts(mine)}: "
                    "parties run the same protocol"
                )
            everybody.append(parts)
        self._received += self._nbytes * len(self._here)
        self._here.clear()
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
            self._outstanding.extend([(base.number(number), one, base) for number, one in piece.requests])
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
        taken = 0
        try:
            for number in body.numbers:
                wanted, request, base = self._outstanding.popleft() if self._outstanding else (-1, None, ALL)
                if number != wanted or request is None:
                    raise RandomnessError(f"correlated randomness {number}, which was not asked for")
                begin, taken = taken, taken + len(request.fixed)
                try:
                    self._stock.put(number, request, tensors[begin:taken], base)
                except RandomnessError as error:
                    raise RandomnessError(f"what does not fit: {error}") from error
            if taken < len(tensors):
                raise RandomnessError("more than was asked for")
        except RandomnessError as error:
            raise RandomnessError(f"{self.name_of(len(self.about.parties))} sent {error}") from error
        self._dealt += sum(map(_NBYTES, tensors))
