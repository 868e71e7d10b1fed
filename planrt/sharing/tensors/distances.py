"""Norms, distances between rows, and products along a dimension, in terms of operations that have protocols.

Each function has the arguments of an ATen operation, and is called below autograd; see `rewritten`. Norms are those of
order 0, 1, 2, infinity and minus infinity, and of whole orders, halves and quarters from 1 to `HIGHEST`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from planrt.errors import SharingError
from planrt.sharing.tensors.twins import twin_of

HIGHEST = 8
"""The highest order of a norm, but for infinity."""


def vector_norm(
    x: Any, ord: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:  # fmt: skip
    """Computes sums or extremes of absolute values, exact but for their rounding; of order 2, the root of the sum of
    squares, which lies below 2**62 / s**2 for a scale s. Other orders are off by two units and 1e-4 of the norm, for
    up to 4,096 entries.

    Raises:
        SharingError: of another order; or torch is to compute the gradient of one, whose powers leave the range.
    """
    twin_of(
        torch.ops.aten.linalg_vector_norm.default, (x, ord, dim, keepdim), {"dtype": dtype}
    )  # torch's errors
    x = x if dtype is None else x.to(dtype)
    if ord == 2:
        return (x * x).sum(dim, keepdim).sqrt()
    if ord == 1:
        return x.abs().sum(dim, keepdim)
    if ord == 0:
        return (x != 0).sum(dim, keepdim).to(x.dtype)
    if math.isinf(ord):
        return _extreme(x.abs(), ord > 0, list(dim or ()), keepdim)
    if not 1 < ord <= HIGHEST or not float(4 * ord).is_integer():
        raise SharingError(
            f"norms of shares are of order 0, 1, 2, infinity, and of whole orders, halves and quarters from 1 to "
            f"{HIGHEST}, not {ord:g}: write x.abs().pow(p).sum(dim) of another p, and of that (y.log() / p).exp()"
        )
    _check_gradient(ord, x)
    return _of_order(x.abs(), ord, list(dim or ()), keepdim)


class OfOrder(torch.autograd.Function):
    """A norm of any order, whose gradient is scaled as it is: sign(x) (|x| / norm)**(p - 1)."""

    @staticmethod
    def forward(context: Any, x: Any, order: float, dim: list[int], keepdim: bool) -> Any:
        """Computes the norm."""
        found = vector_norm(x, order, dim or None, True)
        context.save_for_backward(x, found)
        context.order = order
        return found.clone() if keepdim else found.squeeze(dim or list(range(x.dim())))

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        """Computes what `x` is given."""
        x, found = context.saved_tensors
        gradient = gradients[0].reshape(found.shape)
        return _slope(x, gradient, found, context.order), None, None, None


def distance(x: Any, y: Any, p: float = 2) -> Any:
    """Computes `torch.dist`."""
    if p not in (0, 1, 2) and not math.isinf(p):
        _check_gradient(p, x, y)
    return vector_norm(x - y, p)


def _check_gradient(order: float, *tensors: Any) -> None:
    if any(one.requires_grad for one in tensors) and torch.is_grad_enabled():
        raise SharingError(
            f"the gradient of a norm of order {order:g} is computed for torch.linalg.vector_norm, torch.norm, "
            "torch.dist, cdist, pdist, F.normalize and F.pairwise_distance: write it with these"
        )


def _of_order(sizes: Any, order: float, dim: list[int], keepdim: bool) -> Any:
    """Computes m (sum (|x| / m)**p)**(1/p) for the largest m: nothing leaves the range, or gets lost in small units.
    The root is exp(log(y) / p), of a sum from 1 on.
    """
    largest = sizes.amax(dim, True)
    total = (sizes / largest).pow(order).sum(dim or None, keepdim)
    root = (total.log() * (1 / order)).exp()
    return root * (largest if keepdim else largest.reshape(root.shape))


def _extreme(x: Any, largest: bool, dim: list[int], keepdim: bool) -> Any:
    return x.amax(dim, keepdim) if largest else x.amin(dim, keepdim)


def distances(one: Any, two: Any, p: float, mode: int | None = None) -> Any:
    """Computes `torch.cdist`: of all pairs of rows."""
    return vector_norm(one.unsqueeze(-2) - two.unsqueeze(-3), p, [-1])


def distances_backward(gradient: Any, one: Any, two: Any, p: float, found: Any) -> Any:
    """Computes what `one` is given."""
    apart = one.unsqueeze(-2) - two.unsqueeze(-3)
    return _slopes(apart, gradient, found, p).sum(-2)


def _slopes(apart: Any, gradient: Any, found: Any, p: float) -> Any:
    """Of distances, by what they are distances of: as torch, 0 where a distance of order 2 is 0, and all of it for each
    of several that are largest.
    """
    gradient, found = gradient.unsqueeze(-1), found.unsqueeze(-1)
    if p == 0:
        return apart * 0
    if p == 1:
        return apart.sign() * gradient
    if p == 2:
        return apart * (gradient / (found + (found == 0)))
    if not math.isinf(p):
        return _slope(apart, gradient, found, p)
    return apart.sign() * (apart.abs() == found) * gradient


def _slope(x: Any, gradient: Any, found: Any, p: float) -> Any:
    return x.sign() * gradient * (x.abs() / (found + (found == 0))).pow(p - 1)


def distances_within(x: Any, p: float = 2) -> Any:
    """Computes `torch.pdist`: of each row and all after it."""
    first, second = _pairs(len(x))
    return vector_norm(x[first] - x[second], p, [-1])


def distances_within_backward(gradient: Any, x: Any, p: float, found: Any) -> Any:
    """Computes what the rows are given: each pair gives both of its rows the same, with opposite signs."""
    first, second = _pairs(len(x))
    slopes = _slopes(x[first] - x[second], gradient, found, p)
    summed = torch.zeros_like(x)
    return summed.index_add(0, first, slopes).index_add(0, second, -slopes)


def _pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = torch.triu_indices(count, count, 1)
    return first, second


def prod(x: Any, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """Multiplies halves until one is left: a round of products for each, and half a unit times what is multiplied of
    error in each. All products of halves lie below 2**62 / s**2 for a scale s.
    """
    x = x if dtype is None else x.to(dtype)
    if dim is None:
        x, dim, keepdim = x.reshape(-1), 0, False
    if not x.dim() or x.shape[dim] == 1:  # another tensor: results of operations are none of their arguments
        return x.sum(dim, keepdim)
    if not x.shape[dim]:
        return x.sum(dim, keepdim) + 1
    while (count := x.shape[dim]) > 1:
        half = count // 2
        made = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        x = made if count % 2 == 0 else torch.cat([made, x.narrow(dim, count - 1, 1)], dim)
    return x if keepdim else x.squeeze(dim)


def cumprod(x: Any, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """Multiplies by what is 1, 2, 4 ... before: Hillis and Steele, CACM 29 (1986)."""
    x = x if dtype is None else x.to(dtype)
    if not x.dim():
        return x.clone()
    reach, count = 1, x.shape[dim]
    while reach < count:
        made = x.narrow(dim, reach, count - reach) * x.narrow(dim, 0, count - reach)
        x, reach = torch.cat([x.narrow(dim, 0, reach), made], dim), 2 * reach
    return x.clone()


def weight_norm(v: Any, g: Any, dim: int = 0) -> Any:
    """Computes a weight by direction and length, v * g / |v| for each place along `dim`, and |v|: Salimans and Kingma,
    "Weight Normalization" (NeurIPS 2016), equation 2.
    """
    lengths = vector_norm(v, 2, _besides(v, dim), True)
    return v * (g / lengths), lengths


def weight_norm_backward(gradient: Any, v: Any, g: Any, lengths: Any, dim: int) -> Any:
    """Computes equation 3, of the direction u = v / |v|: the length is given u . gradient, and v what is orthogonal to
    u, times g / |v|.
    """
    u = v / lengths
    along = (gradient * u).sum(_besides(v, dim), True)
    return (gradient - u * along) * (g / lengths), along


def _besides(v: Any, dim: int) -> list[int]:
    return [one for one in range(v.dim()) if one != dim % v.dim()]
