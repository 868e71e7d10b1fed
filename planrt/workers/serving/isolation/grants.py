"""What the processes for clients' work may keep together: the worker's own process grants it, before they take it.

A process says how much it wants to keep in all (`planrt.plans.policy.room`). One that was taken over can keep more than
it was granted, as far as its own limit of memory goes (`--process-memory`); and it can have room granted that it does
not use: twice what one user may keep, at the most.
"""

from __future__ import annotations

from typing import Final

from planrt.errors import LocalError
from planrt.plans.policy.quotas import Quota

OF_ONE_PROCESS: Final = 2
"""Times what a user may keep that one process is granted: it has its own user's, and what others fetch from it is there
for a moment."""


class Grants:
    """Knows what each process was granted.

    Args:
        quota: the limits of one user, and of all together.
    """

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._granted: dict[int, tuple[int, int]] = {}
        self._objects = self._memory = 0

    def ask(self, process: int, objects: int, memory: int) -> str:
        """Grants that process so many objects and bytes, in the place of what it had; returns the name of the limit
        that is in the way, or ``""``.

        Raises:
            LocalError: it is nothing that one can have.
        """
        if objects < 0 or memory < 0:
            raise LocalError("there is no room of less than nothing")
        before = self._granted.get(process, (0, 0))
        for key, wanted, had, sum, most, own in (
            (
                "max_worker_objects",
                objects,
                before[0],
                self._objects,
                self._quota.worker_objects,
                self._quota.objects,
            ),
            (
                "max_worker_memory",
                memory,
                before[1],
                self._memory,
                self._quota.worker_memory,
                self._quota.memory,
            ),
        ):
            if wanted > had and most is not None and sum - had + wanted > most:
                return key
            if wanted > had and own is not None and wanted > OF_ONE_PROCESS * own:
                return key
        self._objects += objects - before[0]
        self._memory += memory - before[1]
        self._granted[process] = objects, memory
        return ""

    def over(self, process: int) -> None:
        """Takes back what a process had that has ended."""
        objects, memory = self._granted.pop(process, (0, 0))
        self._objects -= objects
        self._memory -= memory
