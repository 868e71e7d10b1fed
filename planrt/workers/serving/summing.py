"""Which events of the audit log get a line of their own, and which are counted in one line a minute. No I/O.

What left the worker, and each run that was done, is a line of its own: nothing of that is summed up. All other events
(sessions, refusals, failures) are as many as a client likes. Of the same kind and user, so many a minute have
their lines; of the rest the number is told, with what is known of them, in one line when the minute is over. Clients
without a user are one user, with a few more.

Lines that are never summed up are bounded by the hour: whose user has had so many is refused what comes then (`full`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MINUTE: Final = 60.0
HOUR: Final = 3600.0
MOST_A_MINUTE: Final = 100
"""Lines of one kind of event and outcome, of one user."""
MOST_OF_NOBODY: Final = 300
"""The same of all clients together who have no user."""
MOST_AN_HOUR: Final = 1_000_000
"""Lines of one user, or of nobody, that are never summed up: about 300 MB."""

NEVER: Final = frozenset({"fetch", "move", "started", "process_lost"})
"""Events that are never summed up, however they went."""
WHOLE: Final = frozenset({"done", "begun"})
"""Outcomes that are not: something ran, or left."""
EVENTS: Final = frozenset({
    "opened", "resumed", "ended", "wrong_proof", "refused", "failed", "asked", "fit", "evaluate", "run", "call",
    "joint", "fetch", "move", "no_more_failures",
})  # fmt: skip
"""All events that clients bring about."""
_NAMED: Final = 8
"""Sessions and addresses that a sum names."""


@dataclass(slots=True)
class _Sum:
    """Those of one kind of event, outcome and user beyond their number, in this minute."""

    since: str
    lines: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sessions: dict[Any, None] = field(default_factory=dict)
    addresses: dict[Any, None] = field(default_factory=dict)

    def add(self, event: Mapping[str, Any]) -> None:
        """Counts one."""
        self.lines += 1
        kind = str(event.get("kind", ""))
        if kind and (kind in self.kinds or len(self.kinds) < _NAMED):
            self.kinds[kind] += 1
        for named, key in ((self.sessions, "session"), (self.addresses, "address")):
            if key in event and len(named) < _NAMED:
                named[event[key]] = None


class Summing:
    """Decides so, for one log. One thread at a time, but for `full`."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._hour = 0.0
        self._counts: Counter[tuple[str, str, str]] = Counter()
        """(event, outcome, user) -> how many there were in this minute."""
        self._whole: Counter[str] = Counter()
        """User -> lines of this hour that are never summed up."""
        self._sums: dict[tuple[str, str, str], _Sum] = {}

    @property
    def waits(self) -> bool:
        """True where there are sums to be told."""
        return bool(self._sums)

    def take(self, event: Mapping[str, Any], clock: float, now: str) -> Iterator[Mapping[str, Any]]:
        """Yields what is written of an event at `clock` (seconds), which is `now`: itself, the sums before it, or
        nothing, where it is counted."""
        if self._since is None or clock - self._since >= MINUTE:
            yield from self.sums(now)
            self._since = clock
            self._counts.clear()
        if clock - self._hour >= HOUR:
            self._hour = clock
            self._whole.clear()
        user = str(event.get("user", ""))
        key = str(event.get("event", "")), str(event.get("outcome", "")), user
        if key[0] in NEVER or key[1] in WHOLE:
            self._whole[user] += 1
            yield event
            return
        self._counts[key] += 1
        if self._counts[key] <= (MOST_A_MINUTE if user else MOST_OF_NOBODY):
            yield event
            return
        if key not in self._sums:
            self._sums[key] = _Sum(now)
        self._sums[key].add(event)

    def sums(self, now: str) -> list[dict[str, Any]]:
        """Takes out the sums of what was not written, as lines."""
        found = []
        for (event, outcome, user), one in self._sums.items():
            about: dict[str, Any] = {"event": "summed", "of": event, "user": user, "lines": one.lines}
            about |= {"since": one.since, "until": now}
            about |= {"outcome": outcome} if outcome else {}
            about |= {"kinds": dict(one.kinds)} if one.kinds else {}
            about |= {"sessions": list(one.sessions)} if one.sessions else {}
            about |= {"addresses": list(one.addresses)} if one.addresses else {}
            found.append(about)
        self._sums.clear()
        return found

    def full(self, user: str) -> str:
        """Returns why nothing more is done for that user this hour; ``""`` where all is well."""
        if self._whole[user] < MOST_AN_HOUR:
            return ""
        who = f"user {user!r} has" if user else "clients without a user have"
        return f"{who} had {MOST_AN_HOUR:,} lines of the owner's audit log this hour, as many as may be: try later"
