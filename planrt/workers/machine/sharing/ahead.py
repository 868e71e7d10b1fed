"""What a dealer makes before it is asked: steps of a training loop need the same, with numbers that move on. No I/O.

What is made ahead is kept here, and leaves only as the answer to exactly the question that it was made for: the same
requests, under the same numbers, about the same masks. If another question comes it is dropped, and what that one asks
for is made anew. So nobody ever gets two answers about one number, and none that was not asked for; each number is
handed out once (`Dealer.hand_out`), whenever it was made.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

import torch

from planrt.sharing.programs.asking import Asked
from planrt.sharing.programs.needs import Piece
from planrt.sharing.requests import Base

_MOST: Final = 64
"""Questions after which it is remembered what came next."""


class Ahead:
    """Of one group: what was asked for, what is expected next, and what was made for that."""

    def __init__(self) -> None:
        self._last: list[Asked] = []
        self._next: OrderedDict[tuple[Piece, ...], list[tuple[int, list[Asked]]]] = OrderedDict()
        """Pieces of a question -> the last two questions that came after it, with where it had begun itself."""
        self._expected: list[Asked] = []
        self._made: dict[int, list[torch.Tensor]] = {}
        self._free: Callable[[], None] | None = None

    def expected(self) -> list[Asked] | None:
        """Returns what is asked for next, if it goes on as it did twice before."""
        seen = self._next.get(_pieces(self._last), [])
        if len(seen) < 2 or _pieces(seen[0][1]) != _pieces(seen[1][1]):
            return None
        begins = self._last[0][1].start
        found: list[Asked] = []
        for (piece, one), (_, other) in zip(seen[0][1], seen[1][1], strict=True):
            start = begins + other.start - seen[1][0]
            if one.start - seen[0][0] != other.start - seen[1][0] or len(one.masks) != len(other.masks):
                return None
            masks: list[int] = []
            for before, now in zip(one.masks, other.masks, strict=True):
                if now == before:  # of what all steps use, as a batch of examples
                    masks.append(now)
                elif now - other.start == before - one.start:  # of what the step before has made
                    masks.append(start + now - other.start)
                else:
                    return None
            found.append((piece, Base(start, tuple(masks))))
        return found

    def keep(self, asked: list[Asked], made: dict[int, list[torch.Tensor]], free: Callable[[], None]) -> None:
        """Keeps what was made for `asked`, by numbers, until something is asked for; `free` is called then."""
        self.drop()
        self._expected, self._made, self._free = asked, made, free

    def fits(self, asked: Sequence[Asked]) -> bool:
        """Returns whether it was made ahead."""
        return bool(self._expected) and self._expected == [*asked]

    def take(self, asked: list[Asked]) -> dict[int, list[torch.Tensor]]:
        """Takes note of what is asked for; returns what was made ahead of it, all of it or nothing."""
        made = self._made if self.fits(asked) else {}
        self.drop()
        if self._last:
            pieces = _pieces(self._last)
            seen = self._next.setdefault(pieces, [])
            seen.append((self._last[0][1].start, asked))
            del seen[:-2]
            self._next.move_to_end(pieces)
            if len(self._next) > _MOST:
                self._next.popitem(last=False)
        self._last = asked
        return made

    def drop(self) -> None:
        """Drops what was made."""
        self._expected, self._made = [], {}
        if self._free is not None:
            self._free()
        self._free = None


def _pieces(asked: Sequence[Asked]) -> tuple[Piece, ...]:
    return tuple([piece for piece, _ in asked])
