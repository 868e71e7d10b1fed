"""The products that masked values can be multiplied with: a closed table, exact modulo 2**64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn import functional, grad

from planrt.errors import SharingError
from planrt.sharing.ring import bilinear

Options: TypeAlias = tuple[tuple[str, Any], ...]

_SMALL = 4096
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
    """A function that adds up products, and the dimensions of both factors that it adds up along: concatenated there,
    two pairs of factors give the sum of both results.
    """

    function: Callable[..., torch.Tensor]
    left: int
    right: int
    terms: Callable[[torch.Size, torch.Size], int]
    """How many products an element of the result adds up at most."""


_SUMS = {
    "matmul": _Sum(torch.matmul, -1, -2, lambda left, right: left[-1]),
    "conv1d": _Sum(functional.conv1d, 1, 1, lambda value, weight: math.prod(weight[1:])),
    "conv2d": _Sum(functional.conv2d, 1, 1, lambda value, weight: math.prod(weight[1:])),
    "conv_input": _Sum(_conv_input, 1, 0, lambda gradient, weight: weight[0] * math.prod(weight[2:])),
    "conv_weight": _Sum(_conv_weight, 0, 0, lambda value, gradient: gradient[0] * math.prod(gradient[2:])),
}
"""`matmul` is torch's, batches included; `conv_input` and `conv_weight` are the gradients of a convolution, with
`size` the size of what is asked for.
"""

BILINEAR = ("mul", *_SUMS)
"""The names that `bilinear_value` knows. `mul` broadcasts."""


def bilinear_value(name: str, left: torch.Tensor, right: torch.Tensor, options: Options = ()) -> torch.Tensor:
    """Returns the product `name` of two int64 tensors, modulo 2**64."""
    if name == "mul":
        return left * right
    chosen, sums = dict(options), _SUMS[name]
    if name == "matmul" and (left.numel() * right.shape[-1] < _SMALL or left.dim() < 2 or right.dim() < 2):
        return torch.matmul(left, right)
    terms = sums.terms(left.shape, right.shape)
    return bilinear(lambda a, b: sums.function(a, b, **chosen), left, right, terms)


def plain_value(name: str, left: torch.Tensor, right: torch.Tensor, **options: Any) -> torch.Tensor:
    """Returns the product `name` of two tensors that all know: of fractions as float64."""
    if left.is_floating_point() or right.is_floating_point():
        left, right = left.double(), right.double()
    return left * right if name == "mul" else _SUMS[name].function(left, right, **options)


def bilinear_sum(
    name: str,
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    options: Options = (),
) -> torch.Tensor:
    """Returns the sum of two products of factors of the same shapes: as one product, where that is possible."""
    sums = _SUMS.get(name)
    chosen = dict(options)
    if (
        sums is None
        or chosen.get("groups", 1) != 1
        or min(first[0].dim(), first[1].dim()) < 2
        or "size" in chosen
    ):
        return bilinear_value(name, *first, options).add_(bilinear_value(name, *second, options))
    left = torch.cat([first[0], second[0]], sums.left)
    return bilinear_value(name, left, torch.cat([first[1], second[1]], sums.right), options)


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
