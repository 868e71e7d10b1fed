"""How large what all parties know is: all that a product with it, or a sum, depends on but for its result.

Which rounds there are, and what is asked of the dealer, follows from these. So runs on other public values of the same
sizes need the same, and what was found out for one of them serves the others (`programs.looks`).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch

from planrt.sharing.fixed_point import encode

FINER: Final = 24
"""Public fractions keep so many bits."""

COARSEST: Final = 40
"""Public fractions have at most this scale, as a power of two: 1e-12 is nothing."""

_SHORT: Final = 2**12
"""Fractions with such a denominator, a power of two, or a smaller one, are taken exactly."""


class Varying(float):
    """A number that other runs of the same program have another one for, such as a learning rate that decays.

    What is done with it depends on its exponent alone. It is never taken exactly, for that depends on more.
    """

    @property
    def exponent(self) -> int:
        """The least e for which its size is below 2**e; 0 of zero."""
        return math.frexp(self)[1]

    def __neg__(self) -> Varying:
        return Varying(-float(self))

    def __mul__(self, other: float) -> Varying:
        return Varying(float(self) * other)


class Drawn(int):
    """A seed that other runs of the same program have another one for: of flags that are not all the same."""


def as_operand(number: float) -> Varying | Drawn:
    """Returns a number, or a seed where it is an int, as a kernel is given it of an operand."""
    return Drawn(number) if isinstance(number, int) else Varying(number)


class Size(NamedTuple):
    """Of a public number or tensor."""

    power: int | None
    """The scale that it needs, as a power of two; None of whole numbers."""
    bound: float
    """The least power of two that is more than all its values are in size; infinite where there is none."""


def needs_fractions(value: Any) -> bool:
    """True for numbers and tensors that all know and that have fractions, or might in another run."""
    if isinstance(value, Varying):
        return True
    values = torch.as_tensor(value)
    return values.is_floating_point() and bool((values != values.round()).any())


def size_of(known: Any) -> Size:
    """Returns the size of a number, or of a tensor of any shape."""
    if isinstance(known, Varying):
        return Size(_power(known.exponent), _bound(known))
    values = torch.as_tensor(known)
    if values.dtype == torch.bool:
        values = values.long()
    fractions = needs_fractions(values)
    largest = float(values.abs().max()) if values.numel() else 0.0
    return Size(power_for(values.double()) if fractions else None, _bound(largest))


def _bound(largest: float) -> float:
    exponent = math.frexp(largest)[1]
    return math.ldexp(1.0, exponent) if math.isfinite(largest) and exponent < 1024 else math.inf


size_of_number = lru_cache(maxsize=1024)(size_of)
"""Of one number: a learning rate is asked about in each step, for each weight."""


@lru_cache(maxsize=1024)
def number_at(number: float, scale: int) -> torch.Tensor:
    """Returns a number as an integer at `scale`: int64, without dimensions."""
    return encode(torch.tensor(number), scale)


def power_for(values: torch.Tensor) -> int:
    """Returns the scale, as a power of two, at which the largest of public fractions has 24 bits; less if one needs
    less.
    """
    least, largest = (float(one) for one in values.abs().aminmax())
    if not math.isfinite(largest):
        return 1  # encoding says what is wrong
    if least == largest and is_short(largest):
        return largest.as_integer_ratio()[1].bit_length() - 1
    return _power(math.frexp(largest)[1])


def is_short(number: float) -> bool:
    """Returns whether a finite number is taken exactly."""
    return number.as_integer_ratio()[1] <= _SHORT


def _power(exponent: int) -> int:
    return max(12, min(COARSEST, FINER - exponent))
