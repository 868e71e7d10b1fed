"""The integers modulo 2**64 as int64, products in them, and bits packed across elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Bits: TypeAlias = npt.NDArray[np.uint8]
"""uint8: bit k of byte j of the last dimension belongs to element 8 * j + k. Padding bits mean nothing."""

Words: TypeAlias = npt.NDArray[Any]
"""Unsigned integers of 16 or 64 bits."""

_LIMB = 22
_FEW = 2**11
"""Sums of so many products of two 22-bit limbs are exact in float64: 2 * 21 + 11 bits."""


def unsigned(values: torch.Tensor) -> Words:
    """Returns the same numbers, read as 0 .. 2**64 - 1; shares the memory where it is contiguous."""
    words: Words = values.contiguous().numpy().view(np.uint64)
    return words


def from_unsigned(values: Words) -> torch.Tensor:
    """Returns the inverse of `unsigned`."""
    return torch.from_numpy(np.ascontiguousarray(values).view(np.int64)).reshape(values.shape)


def packed(flags: npt.NDArray[Any]) -> Bits:
    """Returns flags (bool, or uint8 of 0 and 1) of shape (..., n) as bits of shape (..., ceil(n / 8))."""
    return np.packbits(flags, axis=-1, bitorder="little")


def unpacked(bits: Bits, count: int) -> Bits:
    """Returns the inverse of `packed`: uint8 of 0 and 1, shape (..., count)."""
    return np.unpackbits(bits, axis=-1, count=count, bitorder="little")


def bilinear(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    left: torch.Tensor,
    right: torch.Tensor,
    terms: int,
) -> torch.Tensor:
    """Returns `product(left, right)` modulo 2**64, computed in float64, where torch is ten times faster than in int64.

    `product` is linear in both arguments and adds up at most `terms` products for an element. Both are cut into
    balanced limbs (|limb| <= 2**21); the products of limbs that reach below bit 64 are exact, and so are sums of few.
    """
    width, most = (_LIMB, _FEW // terms) if 0 < terms <= _FEW else (_LIMB - 6, 1)
    lefts, rights = _limbs(left, width), _limbs(right, width)
    total: torch.Tensor | None = None
    for place in range(len(lefts)):
        for start in range(0, place + 1, most):  # so many products add up exactly
            exact = product(lefts[start], rights[place - start])
            for i in range(start + 1, min(start + most, place + 1)):
                exact += product(lefts[i], rights[place - i])
            part = exact.to(torch.int64)
            total = part if total is None else total.add_(part.bitwise_left_shift_(width * place))
    assert total is not None  # noqa: S101 - there are at least three limbs
    return total


def _limbs(values: torch.Tensor, width: int) -> list[torch.Tensor]:
    found = []
    rest = values
    for place in range(-(-64 // width)):
        if width * (place + 1) >= 64:
            found.append(rest.double())  # what is left has fewer bits than a limb, with its sign
            break
        low = (rest << (64 - width)).bitwise_right_shift_(64 - width)
        found.append(low.double())
        rest = low.neg_().add_(rest).bitwise_right_shift_(width)
    return found
