"""The products that masked values can be multiplied with: a closed table, exact modulo 2**64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn import functional, grad

from planrt.errors import SharingError
from planrt.sharing.ring import MOST_TERMS, bilinear

Options: TypeAlias = tuple[tuple[str, Any], ...]

_SMALL = 1 << 16
"""Products with fewer multiplications are faster in int64 than cut into limbs."""


def _conv_input(gradient: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    size = options.pop("size")
    chosen: Any = grad.conv1d_input if weight.dim() == 3 else grad.conv2d_input
    result: torch.Tensor = chosen(size, weight, gradient, **options)
    return result


def _conv_weight(value: torch.Tensor, gradient: torch.Tensor, **options: Any) -> torch.Tensor:
    size = options.pop("size")
    chosen: Any = grad.conv1d_weight if value.dim() == 3 else grad.conv2d_weight
    result: torch.Tensor = chosen(value, size, gradient, **options)
    return result


@dataclass(frozen=True, slots=True)
class _Sum:
    """A function that adds up products."""

    function: Callable[..., torch.Tensor]
    terms: Callable[[torch.Size, torch.Size], int]
    """How many products an element of the result adds up at most."""


_SUMS = {
    "matmul": _Sum(torch.matmul, lambda left, right: left[-1]),
    "conv1d": _Sum(functional.conv1d, lambda value, weight: math.prod(weight[1:])),
    "conv2d": _Sum(functional.conv2d, lambda value, weight: math.prod(weight[1:])),
    "conv_input": _Sum(_conv_input, lambda gradient, weight: weight[0] * math.prod(weight[2:])),
    "conv_weight": _Sum(_conv_weight, lambda value, gradient: gradient[0] * math.prod(gradient[2:])),
}
"""`matmul` is torch's, batches included; `conv_input` and `conv_weight` are the gradients of a convolution, with
`size` the size of what is asked for.
"""

BILINEAR = ("mul", *_SUMS)
"""The names that `bilinear_value` knows. `mul` broadcasts."""

_Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def bilinear_value(name: str, left: torch.Tensor, right: torch.Tensor, options: Options = ()) -> torch.Tensor:
    """Returns the product `name` of two int64 tensors, modulo 2**64."""
    return bilinear_sum(name, [(left, right)], options)


def plain_value(name: str, left: torch.Tensor, right: torch.Tensor, **options: Any) -> torch.Tensor:
    """Returns the product `name` of two tensors that all know: of fractions as float64."""
    if left.is_floating_point() or right.is_floating_point():
        left, right = left.double(), right.double()
    return left * right if name == "mul" else _SUMS[name].function(left, right, **options)


def bilinear_sum(name: str, pairs: Sequence[_Pair], options: Options = ()) -> torch.Tensor:
    """Returns the sum of the products `name` of pairs of int64 tensors of the same shapes, modulo 2**64."""
    left, right = pairs[0]
    if name == "matmul":
        if left.dim() >= 2 and right.dim() >= 2 and left.numel() * right.shape[-1] >= _SMALL:
            return _matrices(pairs)
        return reduce(torch.Tensor.add_, [torch.matmul(*pair) for pair in pairs])
    if name == "mul":
        return reduce(torch.Tensor.add_, [one * other for one, other in pairs])
    chosen, sums = dict(options), _SUMS[name]

    def product(one: torch.Tensor, other: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        made = sums.function(one, other, **chosen)
        return made if total is None else total.add_(made)

    return bilinear(product, pairs, sums.terms(left.shape, right.shape) * len(pairs))


def _matrices(pairs: Sequence[_Pair]) -> torch.Tensor:
    """Products of matrices, summed up in pieces that are short enough for `ring.bilinear` to be fast."""
    length = pairs[0][0].shape[-1]
    pieces = -(-length * len(pairs) // MOST_TERMS)
    size = -(-length // pieces)
    found = []
    for start in range(0, length, size):
        terms = min(size, length - start)
        narrow = [(left.narrow(-1, start, terms), right.narrow(-2, start, terms)) for left, right in pairs]
        found.append(bilinear(_matrix_product, narrow, terms * len(pairs)))
    return reduce(torch.Tensor.add_, found)


def _matrix_product(left: torch.Tensor, right: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
    if total is None:
        return torch.matmul(left, right)
    return total.addmm_(left, right) if total.dim() == 2 else total.add_(torch.matmul(left, right))


def bilinear_shape(
    name: str, left: Sequence[int], right: Sequence[int], options: Options = ()
) -> tuple[int, ...]:
    """Returns the shape of `bilinear_value`'s result; torch's or NumPy's own error where the shapes do not fit.

    Raises:
        SharingError: no product of that name.
    """
    if name not in BILINEAR:
        raise SharingError(f"{name!r} is no product of shares; there are {', '.join(BILINEAR)}")
    return _shape(name, tuple(left), tuple(right), options)


@lru_cache(maxsize=4096)
def _shape(name: str, left: tuple[int, ...], right: tuple[int, ...], options: Options) -> tuple[int, ...]:
    """`bilinear_shape`: asked for a product again wherever its randomness goes."""
    if name == "mul":
        return tuple(np.broadcast_shapes(left, right))
    if name == "matmul" and len(left) == len(right) == 2 and left[1] == right[0]:
        return left[0], right[1]
    with torch.device("meta"):
        return tuple(_SUMS[name].function(torch.empty(left), torch.empty(right), **dict(options)).shape)
