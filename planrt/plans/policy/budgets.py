"""How much one user, and all users of a worker, may compute: so many floating-point operations an hour. No I/O.

A rate and no total: a client that stays for months would come to the end of any total, and a total that it does not
come to the end of would let it compute all of that at once. Each budget is a bucket (a token bucket, as in RFC 2697).
It is full at the beginning, what is computed is taken out of it, and as much comes in within an hour as it holds. So a
user computes a full bucket at once, and from then on the hourly rate.

Operations are those that the policy counts for an op, a plan, a round or a backward pass before it runs
(`single_ops.py`, `passes.py`, `planrt.plans.analysis`), and figures for the rest: computations on shares, joint runs,
secure aggregations, and what is stored, fetched, copied and moved (`planrt.workers.machine.counting`). Without a
policy there are none. What is refused takes nothing, what fails later has been paid for. Budgets outlive sessions, so
nobody gets a new one by coming back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final, Protocol

from planrt.errors import PolicyError
from planrt.plans.analysis.report import count_flops

HOUR: Final = 3600.0
"""Seconds in which an empty bucket of operations is full again."""
DAY: Final = 24 * HOUR
"""Those in which one of failures is."""
NOBODIES: Final = 10
"""Times what one user may fail that all clients without a user may together, however many addresses they have."""
MOST_USERS: Final = 10_000
"""Users whose budgets are kept track of; of more, the one who has used least of it begins anew."""
_AHEAD: Final = 1000
"""The part of an hour's operations that a user's sessions draw at most beyond what they need."""

now: Callable[[], float] = time.monotonic
"""The clock (seconds)."""

Draw = Callable[[str, int, int], tuple[str, float]]
"""Takes operations of a user: called with whose they are, how many are needed, and how many may be taken at most.
Returns the name of the limit that is in the way, and for how many seconds; or ``""``, and how many were taken."""


class _Bucket:
    __slots__ = ("_at", "_left", "_most", "_seconds")

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._left, self._at, self._seconds = most, float(most), now(), seconds

    @property
    def left(self) -> float:
        at = now()
        self._left = min(self._most, self._left + self._most * (at - self._at) / self._seconds)
        self._at = at
        return self._left

    def take(self, flops: float) -> None:
        self._left -= flops

    def seconds_until(self, flops: int) -> float:
        """Seconds until so many are there; inf where it never holds so many."""
        return math.inf if flops > self._most else (flops - self._left) * self._seconds / self._most


class _Buckets(dict[str, _Bucket]):
    """One for each user: of so many, full again in so many seconds."""

    def __init__(self, most: int, seconds: float) -> None:
        super().__init__()
        self._most, self._seconds = most, seconds

    def of(self, whose: str) -> _Bucket:
        """Returns the bucket of a user."""
        found = self.get(whose)
        if found is None:
            if len(self) >= MOST_USERS:
                for name in [name for name, one in self.items() if one.left >= self._most]:
                    del self[name]
            if len(self) >= MOST_USERS:
                del self[max(self, key=lambda name: self[name].left)]
            found = self[whose] = _Bucket(self._most, self._seconds)
        return found


class Budgets:
    """The budgets of a worker.

    Args:
        session: operations an hour of one user, in all its sessions. worker: of all users together. None for no limit.
    """

    def __init__(self, session: int | None, worker: int | None) -> None:
        self._users = None if session is None else _Buckets(session, HOUR)
        self._worker = None if worker is None else _Bucket(worker, HOUR)

    def draw(self, whose: str, flops: int, most: int) -> tuple[str, float]:
        """See `Draw`."""
        own = None if self._users is None else self._users.of(whose)
        taken = float(max(flops, most))
        for rule, bucket in (("max_session_flops", own), ("max_worker_flops", self._worker)):
            if bucket is None:
                continue
            if bucket.left < flops:
                return rule, bucket.seconds_until(flops)
            taken = min(taken, max(float(flops), math.floor(bucket.left)))
        for bucket in (own, self._worker):
            if bucket is not None:
                bucket.take(taken)
        return "", taken


class CountsFailures(Protocol):
    """A count of runs that failed: `Failures`, or who asks it."""

    def seconds(self, whose: str, *, nobody: bool) -> float:
        """See `Failures.seconds`."""

    def add(self, whose: str, *, nobody: bool) -> float:
        """See `Failures.add`."""


class Failures:
    """The runs of a worker that failed on data which their clients may not see, counted over all sessions of a user.

    Each tells something of the data, so a user has so many a day, and those without a user have `NOBODIES` times as
    many together besides. Like a budget, it outlives sessions.

    Args:
        most: of one user, a day. None for any number.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        if most is not None:
            self._users = _Buckets(most, DAY)
            self._nobodies = _Bucket(NOBODIES * most, DAY)

    def _of(self, whose: str, *, nobody: bool) -> list[_Bucket]:
        return [self._users.of(whose), self._nobodies] if nobody else [self._users.of(whose)]

    def seconds(self, whose: str, *, nobody: bool) -> float:
        """Returns for how many seconds nothing of that user may run that could fail so; 0 where it may now."""
        if self._most is None:
            return 0.0
        return max(0.0 if one.left >= 1 else one.seconds_until(1) for one in self._of(whose, nobody=nobody))

    def add(self, whose: str, *, nobody: bool) -> float:
        """Counts one; returns `seconds` from now on."""
        if self._most is None:
            return 0.0
        own, *all = self._of(whose, nobody=nobody)
        if own.left >= 1:  # or who has none left would use up the others'
            for bucket in all:
                bucket.take(1)
        if own.left > -self._most:  # what runs at the same time in several processes may be too much by that
            own.take(1)
        return self.seconds(whose, nobody=nobody)


class Purse:
    """Pays for what one user computes, from a budget.

    Args:
        whose: the user. session, worker: the limits, as `Budgets` takes them, for what is said.
        draw: takes operations: more than are needed now, since that takes time, with isolation that of another process.
            What is not used is lost with the user's last session, at most as much as has been used.
    """

    def __init__(self, whose: str, session: int | None, worker: int | None, draw: Draw) -> None:
        self._whose, self._draw = whose, draw
        self._limits = {"max_session_flops": session, "max_worker_flops": worker}
        self._ahead = min([one for one in (session, worker) if one is not None]) // _AHEAD
        self._left = self._used = 0

    def spend(self, what: str, flops: float, *, seen: bool = False) -> None:
        """Pays for what is to run.

        Raises:
            PolicyError: the user, or all users, have computed as much as they may for now. Nothing was taken, but where
                `seen` all that was left: looking at it took as long as it takes itself.
        """
        if flops <= self._left:  # most ops: a small part of what was drawn for the one before
            self._left -= int(flops)
            self._used += int(flops)
            return
        limits = [one for one in self._limits.values() if one is not None]
        needed = int(flops) if flops <= max(limits) else max(limits) + 1
        if needed > self._left:
            more = needed - self._left
            rule, number = self._draw(self._whose, more, more + min(self._ahead, self._used))
            if rule:
                if seen:
                    self._left, _ = 0, self._draw(self._whose, 0, more)
                raise self._refused(what, flops, rule, number)
            self._left += int(number)
        self._left -= needed
        self._used += needed

    @property
    def used(self) -> int:
        """The number of operations that it has paid for."""
        return self._used

    def _refused(self, what: str, flops: float, rule: str, seconds: float) -> PolicyError:
        count = count_flops(int(flops)) if math.isfinite(flops) else "endless"
        if math.isinf(seconds):
            wait = "it is more than an hour's: ask for less at a time"
        elif rule == "max_session_flops":
            wait = f"wait {math.ceil(seconds):,} s, or ask for less at a time"
        else:  # how much others compute is not told
            wait = "wait, or ask for less at a time"
        who = "a user compute" if rule == "max_session_flops" else "all users compute together"
        return PolicyError(
            f"{what} breaks the policy: [{rule}] its computation is {count}, more than is left now of the "
            f"{count_flops(self._limits[rule] or 0)} an hour that the owner lets {who}: {wait}",
            rule=rule,
        )
