"""Reciprocals, roots and logarithms of secrets over their whole range, from the power of two next to them.

Thresholds 2**j, compared with one opening of x, tell the e with 2**(e - 1) <= X < 2**e (X the integer that holds x).
Then m = X / 2**e is in [1/2, 1), where a polynomial of degree 7 is right to 2e-6, and what depends on e alone is a sum
of bits. Sources: Catrina and Saxena (FC 2010), section 3.4, and Aly and Smart, "Benchmarking Privacy Preserving
Scientific Operations" (ACNS 2019), section 3, for the normalisation; Paterson and Stockmeyer (SIAM J. Comput. 1973) for
the evaluation with four products.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import cache

import torch

from planrt.errors import OptionError
from planrt.sharing.additive import add_public
from planrt.sharing.comparisons import below, negative
from planrt.sharing.masked import Bit, mask
from planrt.sharing.products import bit_times, product
from planrt.sharing.quotients import divide, truncate
from planrt.sharing.rounds import Party, Protocol
from planrt.sharing.splines import EXACT

TOP = 40
"""Integers below 2**40 have a power of two here: values below 2**24 at a scale of 2**16."""

FINE = 2**24
"""The scale of m and of what is computed from it."""

TALL = 56
"""The same for means of squares, which are held finer: values below 2**14 at a scale of 2**42."""

MOST = 2**18
"""The finest scale for which these functions have room."""

EXTRA = 2**6
"""What is to be divided is held finer by this between the two products of a division."""


_FUNCTIONS: dict[str, Callable[[Decimal], Decimal]] = {
    "reciprocal": lambda m: 1 / m,
    "log": lambda m: m.ln(),
    "sqrt": lambda m: m.sqrt(),
    "rsqrt": lambda m: 1 / m.sqrt(),
}


@cache
def _coefficients(name: str) -> tuple[int, ...]:
    """A polynomial of degree 7 in u = 4m - 3 for a function of m in [1/2, 1), times `FINE`, lowest first."""
    function, count = _FUNCTIONS[name], 8
    with localcontext(EXACT):
        # Chebyshev's points to seven digits: where exactly they lie does not matter, that all parties agree does.
        points = [Decimal(text) for text in
                  ("0.9807853", "0.8314696", "0.5555702", "0.1950903", "-0.1950903", "-0.5555702", "-0.8314696",
                   "-0.9807853")]  # fmt: skip
        column = [function((u + 3) / 4) for u in points]
        newton = [column[0]]
        for order in range(1, count):
            column = [
                (column[i + 1] - column[i]) / (points[i + order] - points[i]) for i in range(count - order)
            ]
            newton.append(column[0])
        result = [newton[-1]]
        for order in range(count - 2, -1, -1):
            raised = [Decimal(0), *result]
            for place, value in enumerate(result):
                raised[place] -= value * points[order]
            raised[0] += newton[order]
            result = raised
        return tuple(int((value * FINE).to_integral_value()) for value in result)


@cache
def _powers(power: Decimal, factor: Decimal, top: int = TOP) -> tuple[int, ...]:
    """factor * 2**(e * power) as integers, for e from 1 to `top`, and 0 for e = 0: nothing for what is not positive."""
    with localcontext(EXACT):
        found = (factor * Decimal(2) ** (power * e) for e in range(1, top + 1))
        return (0, *(int(one.to_integral_value()) for one in found))


def normalised(party: Party, value: torch.Tensor, top: int = TOP) -> Protocol[tuple[torch.Tensor, Bit]]:
    """Returns m = X / 2**e at the scale `FINE`, and the bits [X < 2**j] for j below `top`, for 0 < X < 2**top.

    1. Open X under a mask; compare it with 2**0 .. 2**(top - 1) (4 rounds).
    2. X * 2**(top - e) is a sum of bits times X; scale it down to `FINE` (1 round).
    """
    (masked,) = yield from mask(party, value)
    bits = yield from below(party, masked, [2**j for j in range(top)])
    stretched = value
    for j in range(1, top):  # the factor is 1 for e = top, and doubles with every bit [X < 2**j] that is set
        bit = bits.narrow(0, j, 1).reshape(value.shape)
        stretched = stretched + 2 ** (top - 1 - j) * bit_times(party, bit, masked)
    return (yield from truncate(party, stretched, 2**top // FINE)), bits


def by_exponent(party: Party, bits: Bit, table: tuple[int, ...]) -> torch.Tensor:
    """Returns table[e], for the bits that `normalised` found."""
    flags, top = bits.share(party), len(table) - 1
    total = torch.zeros_like(flags[0])
    for j in range(top):  # e <= j where [X < 2**j]
        total = total.add_(flags[j], alpha=table[j] - table[j + 1])
    return add_public(party, total, table[top])


def polynomial(party: Party, m: torch.Tensor, name: str, scale: int = FINE) -> Protocol[torch.Tensor]:
    """Returns f(m) at `scale` for a function of `_FUNCTIONS`, m in [1/2, 1) at the scale `FINE`, in seven rounds.

    With u = 4m - 3:

    1. u2 = u * u (2 rounds).
    2. u3 = u * u2 and u4 = u2 * u2 (2 rounds).
    3. h = a4 + a5 u + a6 u2 + a7 u3, scaled down (1 round).
    4. (a0 + a1 u + a2 u2 + a3 u3) + u4 h (2 rounds).
    """
    a = _coefficients(name)
    (u,) = yield from mask(party, add_public(party, 4 * m, -3 * FINE))
    (u2,) = yield from mask(party, (yield from truncate(party, product(party, "mul", u, u), FINE)))
    cubes = yield from mask(party, product(party, "mul", u, u2), product(party, "mul", u2, u2))
    u3, u4 = [divide(party, one, FINE) for one in cubes]
    low, high = (
        add_public(party, a[k + 1] * u.share(party) + a[k + 2] * u2.share(party) + a[k + 3] * u3, a[k] * FINE)
        for k in (0, 4)
    )
    high = yield from truncate(party, high, FINE)
    factors = yield from mask(party, high, u4)
    return (yield from truncate(party, product(party, "mul", *factors) + low, FINE * FINE // scale))


def check_scale(scale: int) -> None:
    """Raise OptionError unless `scale` leaves room for these functions."""
    if not 1 <= scale <= MOST:
        raise OptionError(f"reciprocals and roots take a scale of at most 2**18, not {scale}")


def _scaled(
    party: Party, y: torch.Tensor, bits: Bit, power: str, factor: Decimal, top: int = TOP
) -> Protocol[torch.Tensor]:
    """y * factor * 2**(e * power), for y at the scale `FINE`, below 2, in two rounds."""
    table = _powers(Decimal(power), factor, top)
    guard = max(0, min(24, 35 - max(table[1], table[top]).bit_length()))
    table = _powers(Decimal(power), EXACT.multiply(factor, Decimal(2**guard)), top)
    factors = yield from mask(party, y, by_exponent(party, bits, table))
    return (yield from truncate(party, product(party, "mul", *factors), FINE * 2**guard))


def reciprocal(
    party: Party, value: torch.Tensor, scale: int, *, positive: bool = False
) -> Protocol[torch.Tensor]:
    """Returns 1 / x for 1 / scale <= |x| < 2**40 / scale, off by 2 units and 3e-6 of 1 / x; 0 for 0.

    1. Take x's sign away (4 rounds; not if it is known to be positive).
    2. Normalise (5 rounds), compute 1 / m (7 rounds).
    3. Multiply by scale**2 / 2**e (2 rounds).
    4. Give the sign back (1 round).
    """
    check_scale(scale)
    if not positive:
        (masked,) = yield from mask(party, value)
        bit = yield from negative(party, masked)
        size = value - 2 * bit_times(party, bit, masked)
        result = yield from reciprocal(party, size, scale, positive=True)
        (signed,) = yield from mask(party, result)
        return result - 2 * bit_times(party, bit, signed)
    m, bits = yield from normalised(party, value)
    y = yield from polynomial(party, m, "reciprocal")
    return (yield from _scaled(party, y, bits, "-1", Decimal(scale * scale)))


def quotient(
    party: Party, left: torch.Tensor, right: torch.Tensor, scale: int, *, positive: bool = False
) -> Protocol[torch.Tensor]:
    """Returns x / y, for |x| < 2**36 / scale, 1 / scale <= |y| < 2**40 / scale and |x / y| < 2**31 / scale. Both may be
    held at another scale, which these bounds of x and of y are then about.

    It is off by 3 units, 3e-6 of x / y, and 1 / (64 * |y|) units. `positive` says that y is known to be.

    1. Take y's sign away, normalise, compute 1 / m, as in `reciprocal`.
    2. Multiply x by 1 / m, and then by scale / 2**e (4 rounds), so that a large y loses nothing.
    """
    check_scale(scale)
    if not positive:
        (masked,) = yield from mask(party, right)
        bit = yield from negative(party, masked)
        size = right - 2 * bit_times(party, bit, masked)
        result = yield from quotient(party, left, size, scale, positive=True)
        (signed,) = yield from mask(party, result)
        return result - 2 * bit_times(party, bit, signed)
    m, bits = yield from normalised(party, right)
    y = yield from polynomial(party, m, "reciprocal")
    factors = yield from mask(party, left, y)
    raised = yield from truncate(party, product(party, "mul", *factors), FINE // EXTRA)
    table = _powers(Decimal(-1), Decimal(scale * FINE))
    factors = yield from mask(party, raised, by_exponent(party, bits, table))
    return (yield from truncate(party, product(party, "mul", *factors), FINE * EXTRA))


def sqrt(party: Party, value: torch.Tensor, scale: int) -> Protocol[torch.Tensor]:
    """Returns the square root of x for 1 / scale <= x < 2**40 / scale, off by 2 units and 3e-6 of it, and
    0 for x <= 0, in 14 rounds.
    """
    check_scale(scale)
    return (yield from _sqrt(party, value, scale, scale, TOP))


def fine_sqrt(party: Party, value: torch.Tensor, scale: int, to_scale: int) -> Protocol[torch.Tensor]:
    """`sqrt` of what is held at another `scale`, up to 2**42, for x < 2**56 / scale; the result is at `to_scale`, of
    which it has up to 2**27.
    """
    return (yield from _sqrt(party, value, scale, to_scale, TALL))


def _sqrt(party: Party, value: torch.Tensor, scale: int, to_scale: int, top: int) -> Protocol[torch.Tensor]:
    m, bits = yield from normalised(party, value, top)
    y = yield from polynomial(party, m, "sqrt")
    factor = EXACT.divide(Decimal(to_scale), EXACT.sqrt(Decimal(scale)))
    return (yield from _scaled(party, y, bits, "0.5", factor, top))


def rsqrt(party: Party, value: torch.Tensor, scale: int) -> Protocol[torch.Tensor]:
    """Returns 1 / sqrt(x) for 1 / scale <= x < 2**40 / scale, off by 2 units and 3e-6 of it, and
    0 for x <= 0, in 14 rounds.
    """
    check_scale(scale)
    m, bits = yield from normalised(party, value)
    y = yield from polynomial(party, m, "rsqrt")
    return (yield from _scaled(party, y, bits, "-0.5", EXACT.sqrt(Decimal(scale**3))))


def log(party: Party, value: torch.Tensor, scale: int) -> Protocol[torch.Tensor]:
    """Returns the natural logarithm of x for 1 / scale <= x < 2**40 / scale, off by 3 units and 3e-6, in 12 rounds.

    log(x) = log(m) + e log(2) - log(scale); what depends on e is a sum of bits.
    """
    check_scale(scale)
    m, bits = yield from normalised(party, value)
    fraction = yield from polynomial(party, m, "log", scale)
    return fraction + by_exponent(party, bits, _logarithms(scale))


@cache
def _logarithms(scale: int) -> tuple[int, ...]:
    with localcontext(EXACT):
        two, whole = Decimal(2).ln(), Decimal(scale).ln()
        return tuple(int(((two * e - whole) * scale).to_integral_value()) for e in range(TOP + 1))
