"""Functions of torch that are written with others before autograd sees them: they come down to operations that would
show values, and need not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F

from planrt.sharing.tensors.bins import quantile
from planrt.sharing.tensors.distances import OfOrder


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """With class weights and smoothing, of classes in shares: torch selects weights of those that it does not ignore.

    It is (1 - e) times the loss without smoothing, and e / C times that of all C classes, each with its weight; the
    mean is over the weights of the targets.
    """
    secret = getattr(target, "in_shares", False) and not target.is_floating_point()
    legacy = size_average is not None or reduce is not None
    if not secret or weight is None or not label_smoothing or legacy or ignore_index != -100:
        return NotImplemented
    at = 1 if input.dim() > 1 else 0
    line = [-1 if dim == at else 1 for dim in range(input.dim())]
    logarithms = F.log_softmax(input, at)
    # The weights at the scale of the logarithms: that of the classes may be another one.
    known = logarithms.detach() * 0 + weight.reshape(line)
    weights = F.one_hot(target, input.shape[at]).movedim(-1, at).to(input.dtype) * known
    chosen, smooth = (weights * logarithms).sum(at), (logarithms * weight.reshape(line)).sum(at)
    losses = chosen * -(1 - label_smoothing) - smooth * (label_smoothing / input.shape[at])
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / weights.sum()


def _other(order: Any) -> bool:
    """Whether a norm is of an order whose gradient torch's own formula is not for: its powers leave the range."""
    return isinstance(order, int | float) and order not in (0, 1, 2, math.inf, -math.inf)


def _norm(x: Any, order: float, dim: Any, keepdim: bool) -> Any:
    if not getattr(x, "in_shares", False) or not x.is_floating_point():
        return NotImplemented
    return OfOrder.apply(x, float(order), [dim] if isinstance(dim, int) else list(dim or ()), keepdim)


def _vector_norm(x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    return NotImplemented if options or not _other(ord) else _norm(x, ord, dim, keepdim)


def _any_norm(input: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    return _vector_norm(
        input, p, dim, keepdim, **{name: one for name, one in options.items() if one is not None}
    )


def _normalize(input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Any:
    if not _other(p) or out is not None:
        return NotImplemented
    lengths = _norm(input, p, dim, True)
    return lengths if lengths is NotImplemented else input / lengths.clamp_min(eps)


def _pairwise_distance(x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    return _norm(x1 - x2 + eps, p, -1, keepdim) if _other(p) else NotImplemented


def _distance(input: Any, other: Any, p: float = 2) -> Any:
    return _norm(input - other, p, None, False) if _other(p) else NotImplemented


def _log_add_exp(input: Any, other: Any, *, out: Any = None) -> Any:
    """The larger one, and log(1 + e**-d) of how far they are apart: torch's own gradient takes e**d."""
    if out is not None or not all(one.is_floating_point() for one in (input, other)):
        return NotImplemented
    return torch.maximum(input, other) + F.softplus(-(input - other).abs())


def _embedding_bag(
    input: Any,
    weight: Any,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """The rows at public places, and a public matrix, (bags, places), that adds those of each bag up."""
    secret = getattr(input, "in_shares", False) or getattr(offsets, "in_shares", False)
    if secret or max_norm is not None or scale_grad_by_freq or sparse or mode == "max":
        return NotImplemented
    rows, weights = torch.zeros(len(weight), 1), None
    if per_sample_weights is not None:
        weights = torch.ones(per_sample_weights.shape)
    bags = len(
        F.embedding_bag(  # torch checks the arguments
            input, rows, offsets, mode=mode, per_sample_weights=weights, include_last_offset=include_last_offset,
            padding_idx=padding_idx,
        )
    )  # fmt: skip
    places = input.reshape(-1)
    if offsets is None:
        bag = torch.arange(bags).repeat_interleave(len(places) // max(bags, 1))
    else:
        bag = torch.searchsorted(offsets[:bags].contiguous(), torch.arange(len(places)), right=True) - 1
    kept = torch.arange(len(places))
    if padding_idx is not None:
        kept = kept[places != padding_idx % len(weight)]
    adds = torch.zeros(bags, len(places), dtype=weight.dtype)
    adds[bag[kept], kept] = 1.0
    if mode == "mean":
        adds /= adds.sum(1, keepdim=True).clamp(min=1)
    found = F.embedding(places, weight)
    if per_sample_weights is not None:
        found = found * per_sample_weights.reshape(-1, 1)
    return adds @ found


_ABOVE: Final[Mapping[Any, Any]] = {
    F.cross_entropy: _cross_entropy,
    F.embedding_bag: _embedding_bag,
    torch.logaddexp: _log_add_exp,
    torch.Tensor.logaddexp: _log_add_exp,
    **dict.fromkeys(
        (torch.quantile, torch.Tensor.quantile, torch.nanquantile, torch.Tensor.nanquantile), quantile
    ),
    torch.linalg.vector_norm: _vector_norm,
    torch.norm: _any_norm,
    torch.functional.norm: _any_norm,
    torch.Tensor.norm: _any_norm,
    torch.dist: _distance,
    torch.Tensor.dist: _distance,
    F.normalize: _normalize,
    F.pairwise_distance: _pairwise_distance,
}


def written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Returns what `func` gives where it is written with others for these arguments, else NotImplemented."""
    found = _ABOVE.get(func)
    return NotImplemented if found is None else found(*args, **kwargs)
