"""How protocols run: openings, several protocols in shared rounds, all parties in one process.

A protocol is a generator over one party's view. It yields an opening: a list of tensors, this party's parts of what all
parties are to learn. It is sent what they add up to, in the same order. What is yielded at once is one round. Parts of
int64 are added modulo 2**64, parts of uint8 (packed bits) are combined by XOR.

Between real parties the same generators run; there, an opening is answered after the parts of the others have arrived.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeAlias, TypeVar

import torch

from planrt.errors import SharingError
from planrt.sharing import ring
from planrt.sharing.correlated import Dealer, Supply
from planrt.sharing.randomness import new_seed

T = TypeVar("T")

Opening: TypeAlias = list[torch.Tensor]
Protocol: TypeAlias = Generator[Opening, Opening, T]
"""Yields parts, is sent what all parts add up to, returns this party's part of a result."""


@dataclass(slots=True)
class Party:
    """One party of a computation: who it is, and its correlated randomness."""

    number: int
    """0 .. count - 1. Party 0 adds public constants."""
    count: int
    supply: Supply
    """Correlated randomness from the dealer."""

    @property
    def first(self) -> bool:
        """True for the one party that adds public constants."""
        return self.number == 0

    def public(self, value: torch.Tensor) -> torch.Tensor:
        """Returns this party's part of a value that all know."""
        return value if self.first else torch.zeros_like(value)


def new_parties(count: int, *, seeds: Sequence[bytes] | None = None) -> list[Party]:
    """Returns `count` parties, whose dealer is in this process too. `seeds`, of the dealer's streams, are for tests.

    Raises:
        SharingError: fewer than two.
    """
    if count < 2:
        raise SharingError(f"sharing takes two parties or more, not {count}")
    seeds = [new_seed() for _ in range(count)] if seeds is None else list(seeds)
    dealer = Dealer(seeds)
    supplies = [Supply(seed) for seed in seeds[:-1]] + [Supply(seeds[-1], dealer.correction)]
    return [Party(number, count, supply) for number, supply in enumerate(supplies)]


def together(*protocols: Protocol[Any]) -> Protocol[list[Any]]:
    """Several independent protocols of one party in shared rounds; returns their results in order.

    1. Run each protocol to its next opening.
    2. Open all these at once, and give each protocol its own; go on until all have returned.
    """
    results: list[Any] = [None] * len(protocols)
    waiting: dict[int, Opening] = {}

    def advance(index: int, answer: Opening | None) -> None:
        try:
            protocol = protocols[index]
            waiting[index] = next(protocol) if answer is None else protocol.send(answer)
        except StopIteration as done:
            results[index] = done.value
            waiting.pop(index, None)

    for index in range(len(protocols)):
        advance(index, None)
    while waiting:
        asked = list(waiting.items())
        opened = yield [part for _, parts in asked for part in parts]
        start = 0
        for index, parts in asked:
            advance(index, opened[start : start + len(parts)])
            start += len(parts)
    return results


@dataclass(slots=True)
class Transcript:
    """The traffic of a run: rounds, bytes and, if asked for, what each party saw."""

    parties: int
    keep_views: bool = False
    rounds: int = 0
    sent: list[int] = field(default_factory=list)
    """Bytes sent by each party, to all others together."""
    views: list[list[torch.Tensor]] = field(default_factory=list)
    """All that a party received, opening by opening: the parts of the other parties in their order."""

    def __post_init__(self) -> None:
        self.sent = [0] * self.parties
        self.views = [[] for _ in range(self.parties)]

    def add(self, asked: Sequence[Opening]) -> None:
        """Records one round."""
        self.rounds += 1
        for number, parts in enumerate(asked):
            size = sum(part.numel() * part.element_size() for part in parts)
            self.sent[number] += size * (self.parties - 1)
            if self.keep_views:
                others = [other for index, other in enumerate(asked) if index != number]
                self.views[number] += [part.clone() for parts in zip(*others, strict=True) for part in parts]


def run_together(protocols: Sequence[Protocol[T]], transcript: Transcript | None = None) -> list[T]:
    """Run one protocol at all parties, given in their order, in this process; returns each party's result.

    Raises:
        SharingError: the parties do not open the same things: they run different protocols.
    """
    results: list[T | None] = [None] * len(protocols)
    answers: Opening | None = None
    while True:
        asked: list[Opening] = []
        ended = 0
        for number, protocol in enumerate(protocols):
            try:
                asked.append(next(protocol) if answers is None else protocol.send(answers))
            except StopIteration as done:
                results[number] = done.value
                ended += 1
        if ended == len(protocols):
            return results  # type: ignore[return-value]
        if ended or len({_kind_of(parts) for parts in asked}) != 1:
            raise SharingError("the parties do not open the same: each must run the same protocol")
        if transcript is not None:
            transcript.add(asked)
        answers = [combined(parts) for parts in zip(*asked, strict=True)]


def _kind_of(parts: Opening) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple((part.shape, part.dtype) for part in parts)


def combined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns what the parts of all parties add up to: int64 modulo 2**64, packed bits by XOR."""
    if parts[0].dtype == torch.uint8:
        return reduce(torch.bitwise_xor, parts)
    return reduce(ring.plus, parts)
