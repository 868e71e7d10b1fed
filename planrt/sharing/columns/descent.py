"""A step of linear or logistic regression on secret shares, as a protocol: gradient descent on parts.

For a batch, with ``X`` its columns and ``t`` its labels (`MODELS` has how these are shared):

1. ``u = X w`` and the residuals ``r = u - t`` (two rounds);
2. ``X^T r`` (one round), and with it a step of the weights and the batch's part of the loss (one round).

After an epoch, `finish` tells how many numbers have left the range.

**Models.** As in `linear`: means of squares, or the logistic loss to the second order. "exact" takes the logistic loss
itself, by the shares' sigmoid (off by 2**-15 and 4 units): eight rounds more for each batch.

**Precision.** Columns and residuals are rounded to multiples of 2**-precision, weights to multiples of 2**-26, each
quotient to one of the two nearest numbers, at random. On columns that are such multiples, a step differs from that of
exact arithmetic by less than ``2**-26 + c m 2**-precision + 2**-23 (|s| + |w|)`` in each weight ``w``, with ``c`` the
learning rate times `Scale.slope`, ``m`` the mean size of its column and ``s`` the step. That of the columns' rounding
is of the size of `linear`'s.

**Range.** Values of columns are at most 64 in size. `Numbers` has the limits of weights and residuals, such that
nothing within them can leave 64 bits in one step; so the first number beyond one is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch

from planrt.errors import OptionError
from planrt.sharing.columns import regression
from planrt.sharing.comparisons import below
from planrt.sharing.curves import curve
from planrt.sharing.masked import mask
from planrt.sharing.products import product
from planrt.sharing.programs.needs import Needs, needs_of_protocol
from planrt.sharing.quotients import divide
from planrt.sharing.rounds import Party, Protocol, together

LARGEST: Final = 64
"""No value of a column is larger."""
WEIGHT_BITS: Final = 26
"""Fractional bits of weights."""
MOST_PRECISE: Final = 20
"""Fractional bits of columns, at most."""
_ROOM: Final = 61
"""Bits that numbers in shares take at most."""
_DIVISOR: Final = 2**22
"""A step's divisor is rounded to a whole number that is at least this."""

Loss = Literal["squares", "second order", "exact"]


class Scale(NamedTuple):
    """The numbers that set the models apart."""

    slope: Fraction
    """A step is learning rate * slope * the mean of residual times value."""
    label: tuple[int, int]
    """Labels are shared times the first plus the second."""


MODELS: Final[dict[Loss, Scale]] = {
    "squares": Scale(Fraction(2), (1, 0)),
    "second order": Scale(Fraction(1, 4), (4, -2)),
    "exact": Scale(Fraction(1), (1, 0)),
}


@dataclass(frozen=True, slots=True)
class Terms(regression.Terms):
    """The facts of a run that all parties know; the last of them is the crypto provider."""

    loss_kind: Loss = "squares"
    columns: tuple[int, ...] = ()
    """Of each owner, the intercept of the label's owner included."""

    @property
    def sizes(self) -> list[int]:
        """The rows of each batch of an epoch."""
        return [min(self.batch_size, self.rows - at) for at in range(0, self.rows, self.batch_size)]

    @property
    def places(self) -> list[slice]:
        """The place of each owner's columns among those of all."""
        ends = np.cumsum(self.columns).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self.columns, strict=True)]

    @property
    def intercept(self) -> int:
        """The place of the intercept."""
        return int(self.places[self.label_owner].stop) - 1

    def mean_loss(self, total: float) -> float:
        """Returns the loss of an epoch, from what its batches add up to."""
        mean = total / self.rows
        return math.log(2) - 0.5 + mean / 8 if self.loss_kind == "second order" else mean


@dataclass(frozen=True, slots=True)
class Numbers:
    """The whole numbers that a step on `rows` rows computes with, which all know: see `numbers_for`."""

    factor: int
    divisor: int
    """Weights change by -(factor * gradient + decay * weight) / divisor."""
    decay: int
    weights: int
    """The largest weight, in units of weights."""
    residuals: int
    """The largest residual (`exact`: prediction), in units of columns."""


def numbers_for(terms: Terms, rows: int) -> Numbers:
    """Returns the numbers of a step, such that no sum leaves 62 bits while weights and residuals are within the limits.

    With ``n`` rows, ``k`` columns and ``p`` bits of precision, gradients are ``factor * n * 64 * |r|`` at most,
    predictions ``64 * k * |w|``, squares ``n * r**2``.

    Raises:
        OptionError: there is no room; says what is to be changed.
    """
    bits, total = terms.precision, sum(terms.columns)
    if not terms.lr > 0:
        raise OptionError(f"lr must be a number above 0, got {terms.lr!r}")
    rate = Fraction(terms.lr) * MODELS[terms.loss_kind].slope / rows
    whole, factor = Fraction(2) ** (2 * bits - WEIGHT_BITS) / rate, 1
    while whole * factor < _DIVISOR:
        factor *= 2
    divisor = round(whole * factor)
    decay = round(Fraction(terms.lr) * Fraction(terms.l2) * divisor)
    weights = min(2 ** (_ROOM - 7 - bits) // total, 2**_ROOM // max(decay, 1))
    residuals = min(
        2 ** (_ROOM - 6 - bits) // (rows * factor),
        math.isqrt(2**_ROOM // rows),
        2 ** (_ROOM - 1 - WEIGHT_BITS),
    )
    if divisor >= 2**_ROOM:
        raise OptionError(
            f"a learning rate of {terms.lr:g} changes nothing at this precision: take a larger one"
        )
    if residuals < 4 * 2**bits or weights < 2**WEIGHT_BITS:
        raise OptionError(
            f"{total} columns, batches of {rows} rows, a learning rate of {terms.lr:g} and L2 of {terms.l2:g} leave no "
            f"room for values with {bits} fractional bits: take a smaller precision, learning rate or batch_size"
        )
    return Numbers(factor, divisor, decay, weights, residuals)


def check_precision(precision: int) -> None:
    """Raises OptionError unless columns can have so many fractional bits."""
    if type(precision) is not int or not 8 <= precision <= MOST_PRECISE:
        raise OptionError(
            f"precision must be a whole number of bits from 8 to {MOST_PRECISE} on shares, got {precision!r}"
        )


class Stepped(NamedTuple):
    """A party's parts of what a step gives."""

    weights: torch.Tensor
    watched: torch.Tensor
    """What is to stay within the range of residuals, [rows]."""
    loss: torch.Tensor
    """What the batch adds to the loss of the epoch, at the scale of columns, [1]."""


def step(
    party: Party, terms: Terms, columns: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> Protocol[Stepped]:
    """Returns this party's parts after a step on a batch: columns [rows, k], labels [rows, 1], weights [k, 1].

    It takes four rounds, and twelve for the exact logistic loss.

    1. Open columns and weights under masks: their product is what is predicted.
    2. Bring the residuals to the scale of columns (exact: the predictions, of which sigmoid is taken).
    3. Open the residuals under a mask: their products with the columns and with themselves.
    4. Divide, and take that from the weights.
    """
    numbers, bits = numbers_for(terms, len(labels)), terms.precision
    x, w = yield from mask(party, columns, weights)
    predicted = product(party, "matmul", x, w)
    watched = residuals = wide_loss = predicted
    if terms.loss_kind == "exact":
        (wide,) = yield from mask(party, predicted)
        watched = divide(party, wide, 2**WEIGHT_BITS)
        slopes, bent, (u, y) = yield from together(
            curve(party, watched, "sigmoid", 2**bits),
            curve(party, watched, "softplus", 2**bits),
            mask(party, watched, labels),
        )
        residuals = slopes - labels
        wide_loss = (bent * 2**bits - product(party, "mul", u, y)).sum().reshape(1)
        (r,) = yield from mask(party, residuals)
    else:
        (wide,) = yield from mask(party, predicted - labels * 2**WEIGHT_BITS)
        watched = divide(party, wide, 2**WEIGHT_BITS)
        (r,) = yield from mask(party, watched)
        wide_loss = product(party, "matmul", r.transpose(0, 1), r).reshape(1)
    gradient = product(party, "matmul", x.transpose(0, 1), r)
    decay = torch.full_like(weights, numbers.decay)
    decay[terms.intercept] = 0
    change, loss = yield from mask(party, numbers.factor * gradient + decay * weights, wide_loss)
    return Stepped(
        weights - divide(party, change, numbers.divisor), watched.reshape(-1), divide(party, loss, 2**bits)
    )


def outside(party: Party, values: torch.Tensor, limit: int) -> Protocol[torch.Tensor]:
    """Returns this party's part of how many values are below -limit or above it, [1], in four rounds."""
    (masked,) = yield from mask(party, values)
    found = yield from below(party, masked, (-limit, limit + 1))
    under, inside_or_under = found.share(party)
    within = (inside_or_under - under).sum().reshape(1)
    total: torch.Tensor = party.public(torch.tensor([len(values)])) - within
    return total


def finish(
    party: Party, terms: Terms, weights: torch.Tensor, watched: torch.Tensor
) -> Protocol[torch.Tensor]:
    """Returns this party's part of how many numbers of an epoch have left the range, [1]: all weights that there were,
    and all that was watched.
    """
    limits = [numbers_for(terms, rows) for rows in set(terms.sizes)]
    of_weights, of_others = yield from together(
        outside(party, weights, min(one.weights for one in limits)),
        outside(party, watched, min(one.residuals for one in limits)),
    )
    total: torch.Tensor = of_weights + of_others
    return total


class Needed:
    """The needs of an epoch's parts: told without secrets, and kept for each size of a batch."""

    def __init__(self, terms: Terms) -> None:
        self._terms, self._kept = terms, dict[int, Needs]()

    def step(self, rows: int) -> Needs:
        """Returns the needs of a step on so many rows."""
        count = sum(self._terms.columns)
        return self._of(
            rows, lambda one: step(one, self._terms, _zeros(rows, count), _zeros(rows, 1), _zeros(count, 1))
        )

    def finish(self) -> Needs:
        """Returns the needs of an epoch's end."""
        weights = sum(self._terms.columns) * len(self._terms.sizes)
        return self._of(0, lambda one: finish(one, self._terms, _zeros(weights), _zeros(self._terms.rows)))

    def _of(self, key: int, make: Callable[[Party], Protocol[Any]]) -> Needs:
        if key not in self._kept:
            owners = self._terms.owners
            self._kept[key], _ = needs_of_protocol(make, party=owners - 1, count=owners)
        return self._kept[key]


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)
