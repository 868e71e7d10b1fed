"""Functions of one secret variable: a cubic for each interval, chosen by comparisons with public thresholds.

Each party's part of a coefficient is a sum over the thresholds: the bits [x < end] that a comparison gives are parts of
integers, so choosing costs no opening. All values are fixed-point at a public scale, for |x| * scale < 2**61. Beyond
the pieces a curve goes on as its tails say. The error is at most 2**-15 (of max(1, |f|)) of the pieces, and 4 / scale
(of max(1, |f|)) of rounding.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache
from typing import NamedTuple

import torch

from planrt.sharing.additive import add_public
from planrt.sharing.comparisons import below
from planrt.sharing.masked import mask
from planrt.sharing.products import bit_times, product
from planrt.sharing.quotients import divide
from planrt.sharing.rounds import Party, Protocol
from planrt.sharing.splines import CURVES, EXACT, pieces

GUARD = 2**8
"""Coefficients are held finer than values by this."""


class _Integers(NamedTuple):
    """A curve at a scale, as the parties compute it."""

    ends: tuple[int, ...]
    starts: torch.Tensor
    """What each end adds, on its left, to the left end of the piece; shape (ends,)."""
    steps: torch.Tensor
    """What the coefficients lose at each end, by degree: shape (4, ends)."""
    last: tuple[int, ...]
    """The coefficients above the last end."""
    slopes: tuple[int, int]
    """Of the tails."""


@cache
def _integers(name: str, scale: int) -> _Integers:
    curve, cut = CURVES[name], pieces(name)
    with localcontext(EXACT):
        ends = [int((end * scale).to_integral_value()) for end in cut.ends]
        fine = scale * GUARD
        low = (Decimal(curve.low_tail[1]), *[Decimal(0)] * 3)
        high = (Decimal(curve.high_tail[1]), *[Decimal(0)] * 3)
        rows = [
            [int((value * fine).to_integral_value()) for value in one]
            for one in (low, *cut.coefficients, high)
        ]
    # [x < end] is 1 for every end right of x: what a piece has is what the last has, plus all steps to its right.
    steps = torch.tensor([[rows[i][d] - rows[i + 1][d] for i in range(len(ends))] for d in range(4)])
    lefts = [0, *ends[:-1], 0]
    starts = torch.tensor([lefts[i] - lefts[i + 1] for i in range(len(ends))])
    return _Integers(tuple(ends), starts, steps, tuple(rows[-1]), (curve.low_tail[0], curve.high_tail[0]))


def curve(party: Party, value: torch.Tensor, name: str, scale: int) -> Protocol[torch.Tensor]:
    """Returns f(x) for a function of `splines.CURVES`, in eight rounds.

    1. Open x under a mask; compare it with the ends of all pieces (4 rounds).
    2. Add up the coefficients and the left end of x's piece; t = x - left end, or 0 in the tails.
    3. Open t, a3 and a1 under masks: t * t, a3 * t and a1 * t.
    4. Scale down t * t and a3 * t + a2; multiply them (2 rounds).
    5. Add a1 * t + a0, scale down (1 round), add the tails' slopes.
    """
    known = _integers(name, scale)
    (x,) = yield from mask(party, value)
    bits = yield from below(party, x, known.ends)
    flags = bits.share(party).reshape(len(known.ends), -1)
    coefficients = [
        add_public(party, _weighted(known.steps[degree], flags), known.last[degree]).reshape(value.shape)
        for degree in range(4)
    ]
    under = bit_times(party, bits.narrow(0, 0, 1).reshape(value.shape), x)
    inner = bit_times(party, bits.narrow(0, len(known.ends) - 1, 1).reshape(value.shape), x)
    t = inner - under - _weighted(known.starts, flags).reshape(value.shape)
    a0, a1, a2, a3 = coefficients
    t_masked, a1_masked, a3_masked = yield from mask(party, t, a1, a3)
    squared = product(party, "mul", t_masked, t_masked)
    linear = product(party, "mul", a1_masked, t_masked) + a0 * scale
    upper = product(party, "mul", a3_masked, t_masked) + a2 * scale
    wide = yield from mask(party, squared, upper)
    narrow = yield from mask(party, *[divide(party, one, scale) for one in wide])
    (total,) = yield from mask(party, product(party, "mul", *narrow) + linear)
    low, high = known.slopes
    return divide(party, total, scale * GUARD) + low * under + high * (value - inner)


def _weighted(weights: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    """The sum of weights * flags over the first dimension."""
    total = flags[0] * weights[0]
    for flag, weight in zip(flags[1:], weights[1:].tolist(), strict=True):
        if weight:
            total = total.add_(flag, alpha=weight)
    return total


def sigmoid(party: Party, value: torch.Tensor, scale: int) -> Protocol[torch.Tensor]:
    """Returns 1 / (1 + e**-x) for all x; 0 and 1 beyond 11, where it is off by less than 2e-5."""
    return curve(party, value, "sigmoid", scale)


def tanh(party: Party, value: torch.Tensor, scale: int) -> Protocol[torch.Tensor]:
    """Returns tanh(x) for all x; -1 and 1 beyond 6, where it is off by less than 2e-5."""
    return curve(party, value, "tanh", scale)


def erf(party: Party, value: torch.Tensor, scale: int) -> Protocol[torch.Tensor]:
    """Returns the error function for all x; -1 and 1 beyond 4."""
    return curve(party, value, "erf", scale)


def gelu(party: Party, value: torch.Tensor, scale: int) -> Protocol[torch.Tensor]:
    """Returns x * (1 + erf(x / sqrt(2))) / 2 for all x; 0 and x beyond 5."""
    return curve(party, value, "gelu", scale)


def silu(party: Party, value: torch.Tensor, scale: int) -> Protocol[torch.Tensor]:
    """Returns x * sigmoid(x) for all x; 0 and x beyond 14."""
    return curve(party, value, "silu", scale)


def softplus(party: Party, value: torch.Tensor, scale: int) -> Protocol[torch.Tensor]:
    """Returns log(1 + e**x) for all x; 0 and x beyond 11."""
    return curve(party, value, "softplus", scale)


def exp(party: Party, value: torch.Tensor, scale: int) -> Protocol[torch.Tensor]:
    """Returns e**x; 0 below -11, and e**12 from 12 on, which is wrong above: keep x below 12."""
    return curve(party, value, "exp", scale)
