"""How long a party of a joint run or a sharing group waits for others, and whom it names in the end. No I/O.

Who waits for a party that itself waits must not name that one: the silent party is further on. So a party asks those it
waits for, after half of its time, for whom they wait (`AskJoint`, `AskGroup`; the answer is `Waits`). Who has not
answered when the time is over is named; nobody is who was not asked or had no time to answer, as where the asking party
itself was stopped meanwhile. Where all have said that they wait for somebody else, the party waits for the same time
once more: theirs is over within that, so they end the run, and name that one.

It takes nothing for granted of the others: a question or an answer that is lost counts as silence, and a party that
lies, or parties that wait for each other in a circle, delay the end to twice the time.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

from planrt.workers.machine.events import Alarm, PeerAnswered, TimePassed, ToPeer, Wait, Wake
from planrt.workers.machine.kinds.protocol import PeerError
from planrt.workers.wire import messages as m

ASKS_AFTER: Final = 0.5
"""The part of its time after which a party asks. Who is alive has the rest of it to answer."""
_EARLY: Final = 0.01
"""Seconds that a timer may be early."""

Exchange: TypeAlias = Generator[ToPeer | Wait | Alarm | Wake, PeerAnswered | TimePassed | None, Any]


@dataclass(frozen=True, slots=True)
class Late:
    """The parties that are to be named: number -> for whom that one says that it waits."""

    seconds: float
    """How long they were waited for."""
    parties: dict[int, list[int]]

    def told(self, name_of: Callable[[int], str]) -> str:
        """Returns what is to be said of them, as a sentence without its full stop; `name_of` names a party."""
        whom = " and ".join(name_of(number) for number in self.parties)
        awaited = {name_of(other): None for others in self.parties.values() for other in others}
        but = f", and waits for {' and '.join(awaited).rstrip(',')}" if awaited else ""
        return f"{whom} did not answer within {self.seconds:g} s{but}"


class Party(Protocol):
    """A party in one computation, as far as it waits. Only one of its steps waits at a time."""

    parties: list[m.PeerAddress]
    alarm: float
    """When an `Alarm` under its key wakes it that was set already, on `time.monotonic`'s clock."""

    @property
    def key(self) -> str:
        """The key that its steps wait under."""


def wait(
    party: Party,
    number: int,
    timeout: float,
    question: m.AskJoint | m.AskGroup | None,
    *,
    is_over: Callable[[], bool],
    awaited: Callable[[], Sequence[int]],
) -> Exchange:
    """Waits until `is_over`, which it is not yet; returns None then, and who is `Late` where that takes too long.

    Args:
        number: that of the party itself. timeout: seconds.
        question: what the parties that are waited for are asked; None where one of them does not know it.
        is_over: raises whatever ends the computation. awaited: the parties that are waited for now; empty where it is
            none of them, but somebody who is not asked.
    """
    now = time.monotonic()
    ends, asks = now + timeout, math.inf if question is None else now + timeout * ASKS_AFTER
    asked: dict[str, int] = {}
    said: dict[int, list[int]] = {}
    again = False
    while True:
        if now >= asks and question is not None:
            asks, ends = math.inf, max(ends, now + timeout * (1 - ASKS_AFTER))  # it may itself be late
            for one in awaited():
                key = f"waits:{secrets.token_hex(8)}"
                asked[key] = one
                yield ToPeer(party.parties[one], question, key=key)
        elif now >= ends:
            whom = awaited()
            silent = [one for one in whom if not set(said.get(one, ())) - {number}]
            if again or silent or not whom:
                return Late((1 + again) * timeout, {one: said.get(one, []) for one in silent or whom})
            again = True
            ends, asks = now + timeout, now + timeout * ASKS_AFTER
            asked.clear()
            said.clear()
        wakes = min(ends, asks)
        if party.alarm <= now + _EARLY:
            party.alarm = wakes
            yield Alarm(wakes - now, party.key)
        try:
            answered = yield Wait(party.key, tuple(asked))
        except PeerError as error:  # it cannot be reached: what comes of that is told in another way
            asked.pop(error.key, None)
        else:
            if isinstance(answered, PeerAnswered):
                one = asked.pop(answered.key)
                if isinstance(answered.body, m.Waits):
                    known = range(len(party.parties) + 1)
                    said[one] = [other for other in dict.fromkeys(answered.body.whom) if other in known]
        if is_over():
            return None
        now = time.monotonic()
