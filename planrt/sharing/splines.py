"""Cubic pieces for functions of one variable, computed the same to the last digit on every machine.

Parties multiply their parts by the coefficients, so one unit of difference between two machines would ruin a result:
`decimal` rounds correctly everywhere, which a machine's floating-point library does not promise. Source: piecewise
polynomials for secure evaluation as in SecureML (S&P 2017), section 4.2, and NFGen (Fan et al., CCS 2022), section 4,
which chooses the pieces; interpolation at Chebyshev's points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal, DivisionByZero, InvalidOperation, localcontext
from functools import cache

TOLERANCE = Decimal(2) ** -15
"""Pieces are off by at most this, times the size of the value where that is above one."""

EXACT = Context(
    prec=40,
    rounding=ROUND_HALF_EVEN,
    Emin=-999999,
    Emax=999999,
    capitals=1,
    clamp=0,
    flags=[],
    traps=[DivisionByZero, InvalidOperation],
)
"""How public constants are computed, whatever a program has set."""

_WIDTHS = tuple(Decimal(2) ** power for power in range(2, -6, -1))
_QUARTER_ANGLES = (
    Decimal("0.92387953251128675612818318939678828682241662586364"),
    Decimal("0.38268343236508977172845998403039886676134456248563"),
)
"""The cosines of pi / 8 and 3 pi / 8."""
_CHECKED = tuple(Decimal(step) / 16 for step in range(17))


def _erf(x: Decimal) -> Decimal:
    """Abramowitz and Stegun, 7.1.6."""
    term = total = x
    order = 0
    while abs(term) > Decimal(10) ** -30:
        order += 1
        term = term * 2 * x * x / (2 * order + 1)
        total += term
    return 2 / _PI.sqrt() * (-x * x).exp() * total


_PI = Decimal("3.14159265358979323846264338327950288419716939937511")


def _sigmoid(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


def _tanh(x: Decimal) -> Decimal:
    return 2 * _sigmoid(2 * x) - 1


def _gelu(x: Decimal) -> Decimal:
    return x * (1 + _erf(x / Decimal(2).sqrt())) / 2


def _gelu_slope(x: Decimal) -> Decimal:
    return (1 + _erf(x / Decimal(2).sqrt())) / 2 + x * (-x * x / 2).exp() / (2 * _PI).sqrt()


_BENT = Decimal("0.044715")


def _gelu_tanh(x: Decimal) -> Decimal:
    """x (1 + tanh(y)) / 2, as x sigmoid(2 y), with y = sqrt(2 / pi) (x + 0.044715 x**3): Hendrycks and Gimpel, 2016."""
    return x * _sigmoid(2 * (2 / _PI).sqrt() * (x + _BENT * x**3))


def _gelu_tanh_slope(x: Decimal) -> Decimal:
    root = 2 * (2 / _PI).sqrt()
    bent = _sigmoid(root * (x + _BENT * x**3))
    return bent + x * bent * (1 - bent) * root * (1 + 3 * _BENT * x**2)


@dataclass(frozen=True, slots=True)
class Curve:
    """A function, where it is cut into pieces, and its tails: slope and value beyond both ends."""

    function: Callable[[Decimal], Decimal]
    low: int
    high: int
    low_tail: tuple[int, int] = (0, 0)
    """Slope and value at 0 of the line below `low`."""
    high_tail: tuple[int, int] = (0, 1)


CURVES = {
    "sigmoid": Curve(_sigmoid, -11, 11),
    "tanh": Curve(_tanh, -6, 6, (0, -1), (0, 1)),
    "erf": Curve(_erf, -4, 4, (0, -1), (0, 1)),
    "gelu": Curve(_gelu, -5, 5, (0, 0), (1, 0)),
    "gelu_slope": Curve(_gelu_slope, -6, 6),
    "gelu_tanh": Curve(_gelu_tanh, -5, 5, (0, 0), (1, 0)),
    "gelu_tanh_slope": Curve(_gelu_tanh_slope, -6, 6),
    "silu": Curve(lambda x: x * _sigmoid(x), -14, 14, (0, 0), (1, 0)),
    "softplus": Curve(lambda x: (1 + x.exp()).ln(), -11, 11, (0, 0), (1, 0)),
    "exp": Curve(Decimal.exp, -11, 12, (0, 0), (0, 162755)),
    "exp_negative": Curve(Decimal.exp, -11, 0),
}
"""What there are pieces for. `exp` stays at e**12 above 12; `exp_negative` is 1 above 0."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The left ends of the pieces, with the right end of the last, and four coefficients each, in x - left end."""

    ends: tuple[Decimal, ...]
    coefficients: tuple[tuple[Decimal, ...], ...]
    error: Decimal
    """The largest that was seen between the points of interpolation."""


@cache
def pieces(name: str) -> Pieces:
    """Returns the pieces of `CURVES[name]`: the widest dyadic ones that keep the tolerance."""
    curve = CURVES[name]
    with localcontext(EXACT):
        left, ends, found, worst = Decimal(curve.low), [], [], Decimal(0)
        while left < curve.high:
            for width in _WIDTHS:
                if left + width > curve.high:
                    continue
                fitted = _cubic(curve.function, left, width)
                error = _error(curve.function, left, width, fitted)
                if error <= TOLERANCE:
                    break
            ends.append(left)
            found.append(fitted)
            worst = max(worst, error)
            left += width
        return Pieces((*ends, left), tuple(found), worst)


def _cubic(function: Callable[[Decimal], Decimal], left: Decimal, width: Decimal) -> tuple[Decimal, ...]:
    """The polynomial through four points, by Newton's divided differences, in t = x - left."""
    points = [(1 + side * angle) / 2 * width for angle in _QUARTER_ANGLES for side in (-1, 1)]
    column = [function(left + point) for point in points]
    newton = [column[0]]
    for order in range(1, 4):
        column = [
            (column[i + 1] - column[i]) / (points[i + order] - points[i]) for i in range(len(column) - 1)
        ]
        newton.append(column[0])
    result: list[Decimal] = [newton[3]]
    for order in (2, 1, 0):  # times (t - points[order]), plus newton[order]
        raised = [Decimal(0), *result]
        for place, value in enumerate(result):
            raised[place] -= value * points[order]
        raised[0] += newton[order]
        result = raised
    return tuple(result)


def _error(
    function: Callable[[Decimal], Decimal], left: Decimal, width: Decimal, cubic: Sequence[Decimal]
) -> Decimal:
    worst = Decimal(0)
    for part in _CHECKED:
        t = part * width
        exact = function(left + t)
        got = cubic[0] + t * (cubic[1] + t * (cubic[2] + t * cubic[3]))
        worst = max(worst, abs(got - exact) / max(Decimal(1), abs(exact)))
    return worst
