"""What is where, among the processes for clients' work of one worker: objects that others may have, and computations.

Kept in the worker's own process. Each process says what of its own others may have; what it says of itself is bounded,
and it is told where other things are. The things themselves never come here.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from planrt.errors import LocalError

MOST_OBJECTS: Final = 10_000
"""Objects of one process that others may have."""
MOST_TEXT: Final = 32 << 20
"""Characters of their tags and descriptions."""
MOST_COMPUTATIONS: Final = 2_000
"""Computations with other workers in one process."""


@dataclass(slots=True)
class _Shown:
    process: int
    tags: tuple[str, ...]
    words: frozenset[str]
    token: str
    size: int


@dataclass(slots=True)
class _Kept:
    objects: set[int] = field(default_factory=set)
    computations: set[str] = field(default_factory=set)
    size: int = 0


class Board:
    """Knows what is where; processes are numbers here."""

    def __init__(self) -> None:
        self._objects: dict[int, _Shown] = {}
        self._computations: dict[str, int] = {}
        self._kept: dict[int, _Kept] = {}

    def keeps(self, process: int, id: int, tags: Sequence[str], description: str, token: str) -> None:
        """Takes note of what others may have of an object of that process; of nothing any more, where nothing is said.

        Raises:
            LocalError: another process has one of that id, or it is too much.
        """
        before = self._objects.get(id)
        if before is not None and before.process != process:
            if not tags and not token:
                return
            raise LocalError(f"an object with the id {id} is already there: choose another id")
        kept = self._kept.setdefault(process, _Kept())
        size = len(description) + sum(map(len, tags)) + len(token)
        more = size - (0 if before is None else before.size)
        if not tags and not token:
            if before is not None:
                kept.size -= before.size
                kept.objects.discard(id)
                del self._objects[id]
            return
        if kept.size + more > MOST_TEXT or (before is None and len(kept.objects) >= MOST_OBJECTS):
            raise LocalError(
                f"a user publishes at most {MOST_OBJECTS:,} objects here, with {MOST_TEXT:,} characters about them"
            )
        kept.size += more
        kept.objects.add(id)
        words = frozenset(description.split()) if tags else frozenset()
        self._objects[id] = _Shown(process, tuple(tags), words, token, size)

    def computes(self, process: int, names: Sequence[str]) -> None:
        """Takes note of the computations of that process; those of others stay theirs.

        Raises:
            LocalError: it has too many.
        """
        if len(names) > MOST_COMPUTATIONS:
            raise LocalError(
                f"{len(names):,} computations of one user, over the limit of {MOST_COMPUTATIONS:,}"
            )
        kept = self._kept.setdefault(process, _Kept())
        for name in kept.computations - set(names):
            self._computations.pop(name, None)
        kept.computations = {
            name for name in names if self._computations.setdefault(name, process) == process
        }

    def find(
        self, process: int, terms: Sequence[str], may_find: Callable[[Sequence[str]], bool]
    ) -> dict[int, list[int]]:
        """Returns process -> published objects there that match all terms; those of `process` are left out."""
        found: dict[int, list[int]] = {}
        for id, shown in self._objects.items():
            if shown.process == process or not shown.tags or not may_find(shown.tags):
                continue
            if all(term in shown.tags or term == str(id) or term in shown.words for term in terms):
                found.setdefault(shown.process, []).append(id)
        return found

    def holder(self, ids: Sequence[int], token: str) -> int | None:
        """Returns the process that has all these objects to be handed over under that token."""
        holders = set()
        for id in ids:
            shown = self._objects.get(id)
            if (
                shown is None
                or not shown.token
                or not hmac.compare_digest(shown.token.encode(), token.encode())
            ):
                return None
            holders.add(shown.process)
        return holders.pop() if len(holders) == 1 else None

    def computing(self, name: str) -> int | None:
        """Returns the process that has a computation."""
        return self._computations.get(name)

    def publishes(self, process: int) -> bool:
        """Returns whether others may have anything of that process."""
        kept = self._kept.get(process)
        return kept is not None and bool(kept.objects)

    def over(self, process: int) -> None:
        """Forgets a process that has ended."""
        kept = self._kept.pop(process, None)
        if kept is None:
            return
        for id in kept.objects:
            self._objects.pop(id, None)
        for name in kept.computations:
            self._computations.pop(name, None)
