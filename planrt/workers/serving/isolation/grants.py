"""What the processes for clients' work may keep together: the worker's own process grants it, before they take it.

A process says how much it wants to keep in all (`planrt.plans.policy.room`). One that was taken over can keep more than
it was granted, as far as its own limit of memory goes (`--process-memory`); and it can have room granted that it does
not use: twice what one user may keep, at the most.
"""

from __future__ import annotations

from typing import Final

from planrt.errors import LocalError
from planrt.plans.policy.quotas import Quota
from planrt.plans.policy.room import OF_ADDRESS, OF_WORKER

OF_ONE_PROCESS: Final = 2
"""Times what a user may keep that one process is granted: it has its own user's, and what others fetch from it is there
for a moment."""


class Grants:
    """Knows what each process was granted.

    Args:
        quota: the limits of one user, and of all together.
        at_address: these processes are for clients without a user at one address, who may keep together what one user
            may; else they are all of the worker's.
    """

    def __init__(self, quota: Quota, *, at_address: bool = False) -> None:
        if at_address:
            self._rules, self._limits = OF_ADDRESS, (quota.objects, quota.memory)
            self._of_one: tuple[int | None, int | None] = (None, None)
        else:
            self._rules, self._limits = OF_WORKER, (quota.worker_objects, quota.worker_memory)
            self._of_one = quota.objects, quota.memory
        self._granted: dict[int, tuple[int, int]] = {}
        self._sums = (0, 0)

    def __len__(self) -> int:
        return len(self._granted)

    def ask(self, process: int, objects: int, memory: int) -> str:
        """Grants that process so many objects and bytes, in the place of what it had; returns the name of the limit
        that is in the way, or ``""``.

        Raises:
            LocalError: it is nothing that one can have.
        """
        if objects < 0 or memory < 0:
            raise LocalError("there is no room of less than nothing")
        rule: str
        wants, had = (objects, memory), self._granted.get(process, (0, 0))
        for rule, wanted, before, sum, most, own in zip(
            self._rules, wants, had, self._sums, self._limits, self._of_one, strict=True
        ):
            if wanted > before and most is not None and sum - before + wanted > most:
                return rule
            if wanted > before and own is not None and wanted > OF_ONE_PROCESS * own:
                return rule
        self._sums = self._sums[0] + objects - had[0], self._sums[1] + memory - had[1]
        self._granted[process] = wants
        return ""

    def over(self, process: int) -> None:
        """Takes back what a process had that has ended."""
        objects, memory = self._granted.pop(process, (0, 0))
        self._sums = self._sums[0] - objects, self._sums[1] - memory
