"""Which programs on shares a party has already: told by the same rule at its client, so that nobody has to ask. No I/O.

A program is sent as text once; from then on its hash stands for it. A party keeps the first ones that it is sent, up to
bounds that the client knows: a training loop has one or two.
"""

from __future__ import annotations

import hashlib
from typing import Final

from planrt.errors import SharingError
from planrt.sharing.programs.calls import Program, program_of

MOST: Final = 1_000
MOST_BYTES: Final = 1 << 24
"""Programs of one group that are kept, and characters of these."""


def program_hash(text: str) -> str:
    """Returns what stands for a program: the SHA-256 of its text, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


class _Room:
    """How much room is left for programs of one group."""

    def __init__(self) -> None:
        self._count = self._size = 0

    @property
    def size(self) -> int:
        """The characters of what is kept."""
        return self._size

    def take(self, text: str) -> bool:
        """Returns whether `text` is kept."""
        if self._count >= MOST or self._size + len(text) > MOST_BYTES:
            return False
        self._count += 1
        self._size += len(text)
        return True


class SentPrograms:
    """The programs that the parties of one group have, as their client knows."""

    def __init__(self) -> None:
        self._room = _Room()
        self._sent: set[str] = set()

    def known(self, text: str) -> str:
        """Returns the hash of a program that the parties have; empty where the text is to be sent, which is noted."""
        told = program_hash(text)
        if told in self._sent:
            return told
        if self._room.take(text):
            self._sent.add(told)
        return ""


class KeptPrograms:
    """The programs of one group that a party keeps."""

    def __init__(self) -> None:
        self._room = _Room()
        self._kept: dict[str, Program] = {}

    @property
    def size(self) -> int:
        """The characters of the programs that it keeps."""
        return self._room.size

    def read(self, text: str, told: str) -> Program:
        """Returns the program with that text, or where this is empty, the one that the hash `told` stands for.

        Raises:
            PlanFormatError, SharingError: the text is no program's, or none has that hash.
        """
        if not text:
            if told not in self._kept:
                raise SharingError(f"no program on shares has the hash {told[:64]!r} here")
            return self._kept[told]
        program = program_of(text)
        told = program_hash(text)
        if told not in self._kept and self._room.take(text):
            self._kept[told] = program
        return program
