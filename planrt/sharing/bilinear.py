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

FAST_INTEGERS = "AVX512" in torch.backends.cpu.get_cpu_capability()
"""Whether torch's own products of int64 are faster than five of float64 limbs: processors with AVX-512 multiply eight
int64 at once, those without multiply them one by one.
"""
_SMALL = 1 << 16
"""Products with fewer multiplications are faster in int64 than cut into limbs, on any processor."""


def _conv_input(gradient: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    size = options.pop("size")
    if not gradient.numel():  # torch's transposed convolution refuses what has no channels
        return gradient.new_zeros(size)
    if gradient.dtype == torch.int64:
        return _int_conv_input(gradient, weight, size[2:], **options)
    chosen: Any = grad.conv1d_input if weight.dim() == 3 else grad.conv2d_input
    result: torch.Tensor = chosen(size, weight, gradient, **options)
    return result


def _conv_weight(value: torch.Tensor, gradient: torch.Tensor, **options: Any) -> torch.Tensor:
    size = options.pop("size")
    if not value.numel() or not gradient.numel():
        return value.new_zeros(size)
    if value.dtype == torch.int64:
        return _int_conv_weight(value, gradient, size[2:], **options)
    chosen: Any = grad.conv1d_weight if value.dim() == 3 else grad.conv2d_weight
    result: torch.Tensor = chosen(value, size, gradient, **options)
    return result


def _int_conv_input(
    gradient: torch.Tensor,
    weight: torch.Tensor,
    size: Sequence[int],
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """torch's own gradient takes no integers: it is a transposed convolution, whose rim is what the stride left out."""
    steps, pads, gaps = (_each(one, len(size)) for one in (stride, padding, dilation))
    rim = [
        wanted - ((have - 1) * step - 2 * pad + gap * (length - 1) + 1)
        for wanted, have, length, step, pad, gap in zip(
            size, gradient.shape[2:], weight.shape[2:], steps, pads, gaps, strict=True
        )
    ]
    chosen: Any = functional.conv_transpose1d if weight.dim() == 3 else functional.conv_transpose2d
    made: torch.Tensor = chosen(
        gradient, weight, stride=steps, padding=pads, output_padding=rim, groups=groups, dilation=gaps
    )
    return made


def _int_conv_weight(
    value: torch.Tensor,
    gradient: torch.Tensor,
    size: Sequence[int],
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """torch's own gradient takes no integers: it is the convolution of the value with the gradient as the weight, rows
    and channels changed places, stride and dilation too.
    """
    steps, pads, gaps = (_each(one, len(size)) for one in (stride, padding, dilation))
    rows, channels, places = len(value), value.shape[1] // groups, value.shape[2:]
    value = value.reshape(rows, groups, channels, *places).movedim(2, 0)
    value = value.transpose(1, 2).reshape(channels, groups * rows, *places)
    chosen: Any = functional.conv1d if gradient.dim() == 3 else functional.conv2d
    made: torch.Tensor = chosen(
        value, gradient.transpose(0, 1), stride=gaps, padding=pads, dilation=steps, groups=groups
    )
    for dim, length in enumerate(size, 2):
        made = made.narrow(dim, 0, length)
    return made.transpose(0, 1)


def _each(option: Any, dims: int) -> list[int]:
    return [option] * dims if isinstance(option, int) else [*option] * (dims // len(option))


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
    if name == "mul":
        return reduce(torch.Tensor.add_, [one * other for one, other in pairs])
    chosen, sums = dict(options), _SUMS[name]
    if FAST_INTEGERS:
        function = _integer_product if name == "matmul" else sums.function
        return reduce(torch.Tensor.add_, [function(one, other, **chosen) for one, other in pairs])
    if name == "matmul":
        if left.dim() >= 2 and right.dim() >= 2 and left.numel() * right.shape[-1] >= _SMALL:
            return _matrices(pairs)
        return reduce(torch.Tensor.add_, [torch.matmul(*pair) for pair in pairs])

    def product(one: torch.Tensor, other: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        made = sums.function(one, other, **chosen)
        return made if total is None else total.add_(made)

    return bilinear(product, pairs, sums.terms(left.shape, right.shape) * len(pairs))


_ROWS, _COLUMNS = 16, 64
"""What torch multiplies int64 in (FBGEMM's `cblas_gemm_i64_i64acc`): so many rows and columns of the result at once. It
takes about as long for fewer, and longer for columns that are no multiple.
"""
_COPIED = 16
"""To copy an element of a matrix that lies transposed takes as long as so many multiplications."""
_CALLS = 1 << 19
"""And the calls for that as long as so many."""


def _integer_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns `torch.matmul` of int64, by torch.

    It copies a right factor that lies transposed, as a layer's weight does, before it multiplies: that is a fifth of
    the time of 50 x 784 by 784 x 500. Where that is worth it the transposed product is computed: the smaller factor is
    the right one then, with columns of zeros up to a multiple.
    """
    if left.dim() != 2 or right.dim() != 2 or right.stride(0) != 1 or right.is_contiguous():
        return torch.matmul(left, right)
    rows, terms = left.shape
    saved = _tiles(rows, right.shape[1]) - _tiles(right.shape[1], rows)
    if saved * terms * _ROWS * _COLUMNS + _COPIED * (right.numel() - left.numel()) < _CALLS:
        return torch.matmul(left, right)
    columns = torch.zeros(terms, -(-rows // _COLUMNS) * _COLUMNS, dtype=torch.int64)
    columns[:, :rows] = left.t()
    return torch.matmul(right.t(), columns)[:, :rows].t().contiguous()


def _tiles(rows: int, columns: int) -> int:
    return -(-rows // _ROWS) * -(-columns // _COLUMNS)


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
