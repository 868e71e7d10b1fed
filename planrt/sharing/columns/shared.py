"""Linear and logistic regression over the columns of several owners, on secret shares: nobody has a key.

Each owner shares its columns, and one of them its labels, with all owners (`planrt.sharing`); a crypto provider hands
out correlated randomness and sees nothing of what they send each other. The owners run one step after another
(`descent`): residuals, gradients and weights stay in shares, so batches may have any size. After an epoch they look
whether a number has left the range (a count is opened, which is 0), and open the loss. Weights are opened to the owner
of the columns alone, and only when they are asked for (`Owner.release`).

**What a party learns.** An owner: the loss of each epoch, and its own weights when they are asked for. The provider:
how many people and columns there are. An owner that works together with the provider learns all; all owners but one
together learn nothing more than each alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from planrt.errors import JointError, OptionError, RandomnessError, ValueRangeError
from planrt.sharing.columns.descent import (
    LARGEST,
    MODELS,
    WEIGHT_BITS,
    Needed,
    Terms,
    finish,
    numbers_for,
    step,
)
from planrt.sharing.columns.regression import Columns
from planrt.sharing.columns.steps import Role, Send, Turn, take, take_one
from planrt.sharing.correlated import Dealer, Stock, Supply
from planrt.sharing.masked import open_together
from planrt.sharing.programs.needs import Needs
from planrt.sharing.randomness import SEED_BYTES, Stream, new_seed
from planrt.sharing.rounds import Party, Protocol, combined

_AHEAD: Final = 4
"""Batches that the provider is ahead of the owners."""
_AT_ONCE: Final = 1 << 21
"""Bytes of corrections that leave in one message, about."""


@dataclass(slots=True)
class Owner(Columns):
    """One owner's side of a run, which lasts over its epochs; `Columns` has its arguments.

    Raises:
        DataError: labels of a logistic model that are not 0 or 1. ValueRangeError: a column or label beyond the range;
            names it. OptionError: too few people for the columns, or no room (`numbers_for`).
    """

    terms: Terms
    _released: int = 0
    _epochs: int = 0
    _party: Party = field(init=False)
    _stock: Stock = field(default_factory=Stock)
    _needed: Needed = field(init=False)
    _x: torch.Tensor = field(init=False)
    _t: torch.Tensor = field(init=False)
    _w: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        terms = self.terms
        limits = [numbers_for(terms, rows) for rows in set(terms.sizes)]
        self.with_intercept()
        if self.labels is not None:
            largest = min(one.residuals for one in limits) / 2**terms.precision
            if not float(np.abs(self.labels[: terms.rows]).max()) < largest:
                raise ValueRangeError(
                    f"{self.name}: label column {self.label!r} is out of the range of shares, whose values are below "
                    f"{largest:g} here: standardise it, or take a smaller precision, learning rate or batch_size"
                )
        for name, size in zip(self.columns, np.abs(self.values[: terms.rows]).max(0), strict=True):
            if not size <= LARGEST:
                raise ValueRangeError(
                    f"{self.name}: column {name!r} is out of the range of shares, whose values are at most {LARGEST} "
                    "in size: standardise it, or clip what is far out"
                )
        if not self.small_batches and terms.rows < 2 * len(self.columns):
            raise OptionError(
                f"{self.name}: {terms.rows} people are fewer than twice as many as its {len(self.columns)} columns, so "
                "that its weights tell about single people: take fewer columns, or allow_small_batches=True"
            )
        self._needed = Needed(terms)

    @property
    def _others(self) -> list[int]:
        return [number for number in range(self.terms.owners) if number != self.number]

    @property
    def _is_last(self) -> bool:
        """Whether it is the one whom the provider sends corrections."""
        return self.number == self.terms.owners - 1

    def begin(self) -> Role:
        """Takes a seed from the provider, and shares its columns and labels with the other owners."""
        terms, owners = self.terms, self.terms.owners
        seed = yield from self._take_seed(owners)
        supply = Supply(seed, self._stock if self._is_last else None)
        self._party = Party(self.number, owners, supply)
        mine = torch.from_numpy(
            np.rint(np.ldexp(self.values[: terms.rows], terms.precision)).astype(np.int64)
        )
        if self.labels is not None:
            times, plus = MODELS[terms.loss_kind].label
            labels = np.ldexp(times * self.labels[: terms.rows] + plus, terms.precision)
            mine = torch.cat([mine, torch.from_numpy(np.rint(labels).astype(np.int64))[:, None]], 1)
        for other in self._others:
            seed = new_seed()
            yield Send(other, "seed of shares", [torch.frombuffer(bytearray(seed), dtype=torch.uint8)])
            mine = mine - Stream(seed).ring(mine.shape)
        parts = {self.number: mine}
        for other in self._others:
            seed = yield from self._take_seed(other)
            wide = terms.columns[other] + (other == terms.label_owner)
            parts[other] = Stream(seed).ring([terms.rows, wide])
        self._x = torch.cat([parts[one][:, : terms.columns[one]] for one in range(owners)], 1)
        self._t = parts[terms.label_owner][:, -1:].contiguous()
        self._w = torch.zeros(self._x.shape[1], 1, dtype=torch.int64)
        return {}

    def _take_seed(self, source: int) -> Any:
        raw = yield from take_one(source, "seed of shares", torch.uint8, [SEED_BYTES], self.terms.names)
        return raw.numpy().tobytes()

    def epoch(self, epoch: int) -> Role:
        """Trains for one epoch; all owners and the provider run it at the same time.

        Raises:
            ValueRangeError: weights or predictions have left the range.
        """
        terms = self.terms
        weights, watched, loss = [], [], torch.zeros(1, dtype=torch.int64)
        for rows in terms.batches(epoch):
            here = torch.from_numpy(rows)
            made = yield from self._run(
                partial(step, self._party, terms, self._x[here], self._t[here], self._w),
                partial(self._needed.step, len(rows)),
            )
            self._w, loss = made.weights, loss + made.loss
            weights.append(self._w)
            watched.append(made.watched)
            yield Turn()
        count = yield from self._run(
            partial(finish, self._party, terms, torch.cat(weights).reshape(-1), torch.cat(watched)),
            self._needed.finish,
        )
        (out,) = yield from self._opened(open_together(count))
        if int(out):
            raise ValueRangeError(
                "weights or predictions have left the range of shares: standardise the columns and the label, or take "
                "a smaller learning rate or precision"
            )
        (total,) = yield from self._opened(open_together(loss))
        self._epochs += 1
        return {"loss": terms.mean_loss(math.ldexp(float(total), -terms.precision))}

    def _run(self, protocol: Callable[[], Protocol[Any]], needs: Callable[[], Needs]) -> Any:
        """Runs a protocol; at the last owner, once the provider's corrections for it are there."""
        if self._is_last:
            yield from self._take_corrections(needs())
        return (yield from self._opened(protocol()))

    def _take_corrections(self, needs: Needs) -> Any:
        provider, names = self.terms.owners, self.terms.names
        wanted = needs.numbered(self._party.supply.next_number, ())
        count = sum(len(request.fixed) for _, request in wanted)
        came: list[torch.Tensor] = []
        while len(came) < count:
            tensors = yield from take(provider, "corrections")
            came += tensors
            if not tensors or len(came) > count:
                raise JointError(f"party {names[provider]!r} sent another number of corrections than {count}")
        try:
            for number, request in wanted:
                self._stock.put(number, request, came[: len(request.fixed)])
                came = came[len(request.fixed) :]
        except RandomnessError as error:
            raise JointError(
                f"party {names[provider]!r} sent other corrections than are due: {error}"
            ) from None
        yield Send(provider, "taken", [])

    def _opened(self, protocol: Protocol[Any]) -> Any:
        """Runs a protocol of shares: what it opens goes to the other owners, and theirs come."""
        answer: Any = None
        while True:
            try:
                mine = protocol.send(answer)
            except StopIteration as done:
                return done.value
            for other in self._others:
                yield Send(other, "opening", mine)
            parts = [mine]
            for other in self._others:
                theirs = yield from take(other, "opening")
                if [(one.dtype, one.shape) for one in theirs] != [(one.dtype, one.shape) for one in mine]:
                    raise JointError(
                        f"party {self.terms.names[other]!r} opened something else than the others: parties run the "
                        "same protocol"
                    )
                parts.append(theirs)
            answer = [combined(each) for each in zip(*parts, strict=True)]

    @property
    def is_released(self) -> bool:
        """True while `weights` are those of now."""
        return self._released == self._epochs

    def release(self) -> Role:
        """Opens each owner's weights to that owner alone, unless they have not changed since."""
        if self.is_released:
            return {}
        terms = self.terms
        for other in self._others:
            yield Send(other, "part of the weights", [self._w[terms.places[other], 0].contiguous()])
        mine = self._w[terms.places[self.number], 0]
        for other in self._others:
            shape = [len(self.columns)]
            mine = mine + (yield from take_one(other, "part of the weights", torch.int64, shape, terms.names))
        self.weights = np.ldexp(mine.numpy().astype(np.float64), -WEIGHT_BITS)
        self._released = self._epochs
        return {}


@dataclass(slots=True)
class Provider:
    """The side of the party that hands out correlated randomness: from seeds of its own and what all know, never from
    anything that owners send."""

    terms: Terms
    _dealer: Dealer = field(init=False)
    _needed: Needed = field(init=False)
    _next: int = 0

    def __post_init__(self) -> None:
        self._needed = Needed(self.terms)

    def begin(self) -> Role:
        """Gives each owner a seed, which nobody else sees."""
        seeds = [new_seed() for _ in range(self.terms.owners)]
        self._dealer = Dealer(seeds)
        for owner, seed in enumerate(seeds):
            yield Send(owner, "seed of shares", [torch.frombuffer(bytearray(seed), dtype=torch.uint8)])
        return {}

    def epoch(self, epoch: int) -> Role:
        """Makes what the last owner needs for one epoch, a few batches ahead."""
        last = self.terms.owners - 1
        parts = [*map(self._needed.step, self.terms.sizes), self._needed.finish()]
        for place, needs in enumerate(parts):
            if place >= _AHEAD:
                yield from take(last, "taken")
            yield from self._corrections(last, needs)
        for _ in parts[-_AHEAD:]:
            yield from take(last, "taken")
        return {}

    def _corrections(self, last: int, needs: Needs) -> Any:
        made: list[torch.Tensor] = []
        for number, request in needs.numbered(self._next, ()):
            made += self._dealer.correction(number, request)
            if sum(one.nbytes for one in made) >= _AT_ONCE:
                yield Send(last, "corrections", made)
                yield Turn()
                made = []
        self._next += len(needs.requests)
        if made:
            yield Send(last, "corrections", made)
        yield Turn()
