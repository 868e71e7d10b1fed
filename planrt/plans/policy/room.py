"""What all users of a worker may keep together: so many bytes and objects, the sum over their accounts. No I/O.

What counts is what counts for a user (`quotas.py`), so the owner's own data do not. With isolation each process knows
its own user only: it asks the worker's own process for more room before it takes it, an eighth more than it needs, so
that it asks seldom; and gives back what it does not use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Final, Protocol

from planrt.errors import PolicyError
from planrt.plans.analysis.report import count_bytes

_GRAIN: Final = (64, 1 << 20)
"""Objects and bytes that a process asks for at least, where there is room for them."""

OF_WORKER: Final = ("max_worker_objects", "max_worker_memory")
OF_ADDRESS: Final = ("max_session_objects", "max_session_memory")
"""The names of limits: of all users of a worker, and of one user. What clients without a user have at one address is in
several processes, with isolation."""

More = Callable[[int, int], str]
"""Asks whether so many objects and bytes may be kept in this process, all in all; returns the name of the limit that is
in the way, ``""`` if they may. Fewer than before may always."""


class Counted(Protocol):
    """An account, as the room sees it."""

    def recount(self) -> None:
        """Looks what is still there."""


class Room:
    """The sum over several accounts of a worker, or of one process of it, and its limits.

    Args:
        objects, memory: the limits; None for none.
        rules: their names.
    """

    def __init__(self, objects: int | None, memory: int | None, rules: tuple[str, str] = OF_WORKER) -> None:
        self._limits, self._rules = (objects, memory), rules
        self._granted = objects, memory
        self._more: More | None = None
        self._accounts: weakref.WeakSet[Counted] = weakref.WeakSet()
        self.objects = self.memory = 0
        """What is kept now."""
        self._changed = False
        """Whether something has come or gone since the last `tidy`."""

    @property
    def counts_memory(self) -> bool:
        """Returns whether bytes have a limit."""
        return self._limits[1] is not None

    def ask(self, more: More) -> None:
        """Has nothing from now on but what it is granted by `more`."""
        self._more = more
        objects, memory = self._limits
        self._granted = (None if objects is None else 0), (None if memory is None else 0)

    def enter(self, account: Counted) -> Part:
        """Counts an account in, for as long as there is one; returns what it tells what it has."""
        part = Part(self)
        self._accounts.add(account)
        weakref.finalize(account, part.holds, 0, 0).atexit = False
        return part

    def check(self, objects: int, memory: int) -> None:
        """Raises unless there is room for so many objects and bytes more.

        Raises:
            PolicyError: they are more than the owner lets all of them keep. It does not say what others have.
        """
        if not self._lacks(objects, memory):
            return
        for one in list(self._accounts):
            one.recount()
        rule = self._lacks(objects, memory)
        if rule and self._more is not None:
            rule = self._grown(self._more, self.objects + objects, self.memory + memory)
        if rule:
            raise PolicyError(
                _REFUSED[rule].format(*self._limits, bytes=count_bytes(self._limits[1] or 0)), rule=rule
            )

    def _lacks(self, objects: int, memory: int) -> str:
        """The name of the limit that is in the way."""
        most_objects, most_memory = self._granted
        if most_objects is not None and self.objects + objects > most_objects:
            return self._rules[0]
        if most_memory is not None and self.memory + memory > most_memory:
            return self._rules[1]
        return ""

    def _grown(self, more: More, objects: int, memory: int) -> str:
        for wanted in (_rounded(objects, memory), (objects, memory)):
            rule = more(*wanted)
            if not rule:
                self._take(*wanted)
                break
        return rule

    def _take(self, objects: int, memory: int) -> None:
        self._granted = (
            None if self._limits[0] is None else objects,
            None if self._limits[1] is None else memory,
        )

    def changed(self, objects: int, memory: int) -> None:
        """Takes note that so much more is kept."""
        self.objects += objects
        self.memory += memory
        self._changed = True

    def tidy(self) -> None:
        """Gives back what was granted, and is not used."""
        if self._more is None or not self._changed:
            return
        for one in list(self._accounts):
            one.recount()
        self._changed = False
        needed = _rounded(self.objects, self.memory)
        if any(has is not None and has > wants for has, wants in zip(self._granted, needed, strict=True)):
            self._more(*needed)
            self._take(*needed)


class Part:
    """Holds what one account has of the sum."""

    __slots__ = ("_memory", "_objects", "_room")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._objects = self._memory = 0

    def holds(self, objects: int, memory: int) -> None:
        """Takes note of what is kept for it now."""
        if objects != self._objects or memory != self._memory:
            self._room.changed(objects - self._objects, memory - self._memory)
            self._objects, self._memory = objects, memory


def _rounded(objects: int, memory: int) -> tuple[int, int]:
    return objects + max(objects // 8, _GRAIN[0]), memory + max(memory // 8, _GRAIN[1])


_REFUSED: Final = {
    "max_worker_objects": "this would be more than the {0:,} objects that the owner lets all users keep together: "
    "[max_worker_objects] drop some pointers, end sessions, or wait until others have",
    "max_worker_memory": "this would be more than the {bytes} that the owner lets all users keep together: "
    "[max_worker_memory] drop some pointers, end sessions, or wait until others have",
    "max_session_objects": "this would be more than the {0:,} objects that the owner lets clients without a user keep "
    "together at one address: [max_session_objects] drop some pointers, or end sessions",
    "max_session_memory": "this would be more than the {bytes} that the owner lets clients without a user keep "
    "together at one address: [max_session_memory] drop some pointers, or end sessions",
}
