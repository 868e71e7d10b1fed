"""The integers modulo 2**64 as int64, products in them, and bits packed across elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Bits: TypeAlias = npt.NDArray[np.uint8]
"""uint8: bit k of byte j of the last dimension belongs to element 8 * j + k. Padding bits mean nothing."""

Words: TypeAlias = npt.NDArray[Any]
"""Unsigned integers of 16 or 64 bits."""

Product: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""A function that is linear in its first two arguments, of float64; what it gives is added to the third one, in place,
where there is one.
"""

_LIMB = 22
MOST_TERMS = 2**9
"""Sums of so many products of two sums of two 22-bit limbs are exact in float64: 2 * 22 + 9 bits."""
_FEW = 2**11
"""Sums of so many products of two such limbs are: 2 * 21 + 11 bits."""


_MANY = 2**12
"""From so many elements on, what calls of NumPy take beside torch's is less than they save."""


def plus(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns left + right, int64. Of large tensors NumPy takes half the time: torch multiplies one of them by 1."""
    if not _alike(left, right):
        return left + right
    found = torch.empty_like(left)
    np.add(left.numpy(), right.numpy(), out=found.numpy())
    return found


def minus(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns left - right, int64; see `plus`."""
    if not _alike(left, right):
        return left - right
    found = torch.empty_like(left)
    np.subtract(left.numpy(), right.numpy(), out=found.numpy())
    return found


def _alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are large, and lie in memory in one and the same way."""
    return left.numel() >= _MANY and left.shape == right.shape and left.stride() == right.stride()


def chosen(flags: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Returns `first` where flags are -1 and `second` where they are 0, all int64 and of one shape.

    As `torch.where`, which branches at each element: with flags as random as those of masks it takes three times as
    long.
    """
    return (first ^ second).bitwise_and_(flags).bitwise_xor_(second)


def unsigned(values: torch.Tensor) -> Words:
    """Returns the same numbers, read as 0 .. 2**64 - 1; shares the memory where it is contiguous."""
    words: Words = values.contiguous().numpy().view(np.uint64)
    return words


def from_unsigned(values: Words) -> torch.Tensor:
    """Returns the inverse of `unsigned`."""
    return torch.from_numpy(np.ascontiguousarray(values).view(np.int64)).reshape(values.shape)


def floor_divided(values: torch.Tensor, divisor: int, *, signed: bool) -> torch.Tensor:
    """Returns floor(values / divisor), where values are read as signed or as unsigned; for powers of two by a shift,
    which is several times faster.
    """
    shift = divisor.bit_length() - 1
    if divisor == 1 << shift:
        return values >> shift if signed else from_unsigned(unsigned(values) >> np.uint64(shift))
    if signed:
        return torch.div(values, divisor, rounding_mode="floor")
    return from_unsigned(unsigned(values) // np.uint64(divisor))


def packed(flags: npt.NDArray[Any]) -> Bits:
    """Returns flags (bool, or uint8 of 0 and 1) of shape (..., n) as bits of shape (..., ceil(n / 8))."""
    return np.packbits(flags, axis=-1, bitorder="little")


def unpacked(bits: Bits, count: int) -> Bits:
    """Returns the inverse of `packed`: uint8 of 0 and 1, shape (..., count)."""
    return np.unpackbits(bits, axis=-1, count=count, bitorder="little")


def bilinear(
    product: Product, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], terms: int
) -> torch.Tensor:
    """Returns the sum of `product(left, right)` over all pairs, modulo 2**64, computed in float64, where torch is ten
    times faster than in int64.

    All together add up at most `terms` products for an element. The factors are cut into balanced limbs
    (|limb| <= 2**21); the products of limbs that reach below bit 64 are exact, and so are sums of few. Up to
    `MOST_TERMS` it takes five products of limbs for each pair, with Karatsuba's sum for the second place (Karatsuba and
    Ofman, "Multiplication of many-digital numbers by automatic computers", 1962): a0 b1 + a1 b0 is
    (a0 + a1) (b0 + b1) - a0 b0 - a1 b1. With more it takes six, or ten of narrower limbs.
    """
    if terms <= MOST_TERMS:
        return _by_five(product, [(_limbs(left, _LIMB), _limbs(right, _LIMB)) for left, right in pairs])
    width, most = (_LIMB, _FEW // terms) if terms <= _FEW else (_LIMB - 6, 1)
    found = [
        _by_places(product, _limbs(left, width), _limbs(right, width), width, most) for left, right in pairs
    ]
    return reduce(torch.Tensor.add_, found)


_Limbs: TypeAlias = list[torch.Tensor]


def _by_five(product: Product, pairs: Sequence[tuple[_Limbs, _Limbs]]) -> torch.Tensor:
    low: torch.Tensor | None = None
    middle: torch.Tensor | None = None
    high: torch.Tensor | None = None
    for a, b in pairs:
        low = product(a[0], b[0], low)
        high = product(a[1], b[1], high)
        middle = product(a[0] + a[1], b[0] + b[1], middle)
    assert low is not None and middle is not None and high is not None  # noqa: S101, PT018 - there is a pair
    middle.sub_(low).sub_(high)
    for a, b in pairs:
        high = product(a[0], b[2], high)
        high = product(a[2], b[0], high)
    total = high.to(torch.int64)
    for place in (middle, low):
        total = total.bitwise_left_shift_(_LIMB).add_(place.to(torch.int64))
    return total


def _by_places(product: Product, lefts: _Limbs, rights: _Limbs, width: int, most: int) -> torch.Tensor:
    """One product for each pair of limbs; so many as `most` add up exactly."""
    total: torch.Tensor | None = None
    for place in range(len(lefts)):
        for start in range(0, place + 1, most):
            exact: torch.Tensor | None = None
            for i in range(start, min(start + most, place + 1)):
                exact = product(lefts[i], rights[place - i], exact)
            assert exact is not None  # noqa: S101 - `most` is at least 1
            part = exact.to(torch.int64)
            total = part if total is None else total.add_(part.bitwise_left_shift_(width * place))
    assert total is not None  # noqa: S101 - there are at least three limbs
    return total


_BITS = int(np.float64(2.0**52).view(np.int64))
"""The bits of 2**52: a whole number from 0 to 2**52 - 1, put in their place, makes 2**52 and that number."""


def _limbs(values: torch.Tensor, width: int) -> _Limbs:
    """Returns limbs of `width` bits, the lowest first, from -2**(width - 1) to 2**(width - 1) - 1, as float64. The last
    one has the bits that are left.

    Half of a limb's range is added at each place but the last, so that no limb borrows of the next one. The conversion
    is by the bits of 2**52, as processors without AVX-512 have none of int64.
    """
    half, last = 1 << (width - 1), -(-64 // width) - 1
    raised = values + sum(half << (width * place) for place in range(last))
    found = []
    for place in range(last):
        bits = raised if place == 0 else raised >> (width * place)
        low = (bits & ((1 << width) - 1)).bitwise_or_(_BITS)
        found.append(low.view(torch.float64).sub_(2.0**52 + half))
    top = raised.bitwise_right_shift_(width * last).add_(_BITS + (1 << 51))
    return [*found, top.view(torch.float64).sub_(2.0**52 + 2.0**51)]
