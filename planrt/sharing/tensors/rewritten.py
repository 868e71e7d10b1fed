"""Operations that have no protocol of their own, in terms of those that have one.

A rewriting is a function of tensors with the arguments of an ATen operation; it is called below autograd, so an
operation and its gradient are two of them. Most are those that PyTorch itself has (`torch._decomp`, the table behind
`torch.export`'s decompositions); only names on the list are taken from there, each tested on shares against plain
tensors: a rewriting may be right for floating-point numbers and leave the range of shares, as exp(x) - 1 does for the
large x that `elu` does not use it for. These are written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from planrt.errors import SharingError
from planrt.sharing.kernels.table import VIEWS
from planrt.sharing.tensors import bins, distances, placed
from planrt.types import map_leaves

Rewriting = Callable[..., Any]


def _elu(x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    """Below zero a (e**x - 1): of what is clamped, so that no power is large."""
    below = (x * input_scale).clamp(max=0).exp() - 1
    return x.relu() * scale + below * (alpha * scale)


def _elu_backward(
    gradient: Any, alpha: float, scale: float, input_scale: float, is_result: bool, value: Any
) -> Any:
    if is_result:
        slope = torch.where(value > 0, scale, (value + alpha * scale) * input_scale)
    else:
        bent = (value * input_scale).clamp(max=0).exp() * (alpha * scale * input_scale)
        slope = torch.where(value > 0, scale, bent)
    return gradient * slope


def _mish(x: Any) -> Any:
    return x * torch.nn.functional.softplus(x).tanh()


def _mish_backward(gradient: Any, x: Any) -> Any:
    """tanh(s) + x sigmoid(x) (1 - tanh(s)**2) with s = softplus(x)"""
    bent = torch.nn.functional.softplus(x).tanh()
    return gradient * (bent + x * x.sigmoid() * (1 - bent * bent))


def _prelu_backward(gradient: Any, x: Any, weight: Any) -> Any:
    positive = x > 0
    below = x - x.relu()
    return torch.where(positive, gradient, gradient * weight), gradient * below


def _norm(x: Any, p: float | None = 2, dim: Sequence[int] = (), keepdim: bool = False, **_: Any) -> Any:
    return torch.linalg.vector_norm(x, 2 if p is None else p, list(dim) or None, keepdim)


def _var_mean(
    x: Any, dim: Sequence[int] | None = None, unbiased: bool = True, keepdim: bool = False, *,
    correction: float | None = None,
) -> Any:  # fmt: skip
    """Both overloads: `unbiased` of one is `correction` 1 of the other."""
    correction = float(unbiased) if correction is None else correction
    return torch.var(x, dim if dim is None else list(dim), correction=correction, keepdim=keepdim), _mean(
        x, dim, keepdim
    )


def _mean(x: Any, dim: Sequence[int] | None, keepdim: bool) -> Any:
    return x.mean(list(range(x.dim())) if dim is None else dim, keepdim)


def _attention(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Any = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """softmax(q k' / sqrt(d)) v, and the logarithms of the sums, which its gradient does not need here."""
    weights, _ = _attention_weights(query, key, is_causal, attn_mask, scale)
    if dropout_p:
        raise SharingError("attention on shares drops nothing: give dropout_p=0")
    return weights @ value, query.new_zeros(query.shape[:-1])


def _attention_weights(query: Any, key: Any, is_causal: bool, mask: Any, scale: float | None) -> Any:
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query @ key.transpose(-2, -1)) * factor
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, _HIDDEN)
    if mask is not None:
        if isinstance(mask, torch.Tensor) and mask.dtype.is_floating_point and type(mask) is torch.Tensor:
            mask = mask.clamp(min=_HIDDEN)  # shares know no infinity
        scores = scores.masked_fill(~mask, _HIDDEN) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1), factor


_HIDDEN = -1000.0
"""What scores are where a mask hides them: e**-1000 is zero on shares."""


def hiding(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of `multi_head_attention_forward`, with masks that all know as finite numbers to add."""

    def finite(mask: Any) -> Any:
        if type(mask) is not torch.Tensor:
            return mask
        return mask * _HIDDEN if mask.dtype == torch.bool else mask.clamp(min=_HIDDEN)

    masks = {name: finite(options[name]) for name in ("attn_mask", "key_padding_mask") if name in options}
    return {**options, **masks}


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, dropout_p: float,
    is_causal: bool, *, attn_mask: Any = None, scale: float | None = None,
) -> Any:  # fmt: skip
    weights, factor = _attention_weights(query, key, is_causal, attn_mask, scale)
    to_weights = gradient @ value.transpose(-2, -1)
    to_scores = (to_weights - (to_weights * weights).sum(-1, keepdim=True)) * weights * factor
    return to_scores @ key, to_scores.transpose(-2, -1) @ query, weights.transpose(-2, -1) @ gradient


def batch_norm(
    scale: int, x: Any, weight: Any, bias: Any, mean: Any, spread: Any, training: bool, momentum: float, eps: float
) -> Any:  # fmt: skip
    """Batch norm by the statistics of the batch, which move those that the module keeps, by `momentum`.

    Returns:
        The result, the batch's mean and 1 / sqrt(variance + eps), as `native_batch_norm`.

    Raises:
        SharingError: all know the statistics that the module keeps: they would tell the batch's.
    """
    if not (getattr(mean, "in_shares", False) and getattr(spread, "in_shares", False)):
        raise SharingError(
            "batch norm moves its running statistics, which all parties know: share the module as well, "
            "model.fix_precision().share(...), or call model.eval()"
        )
    dims, line = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    count = x.numel() // x.shape[1]
    own = x.mean(dims, True)
    apart = x - own
    squares = (apart * apart).mean(dims, True)
    inverse = (squares + max(eps, 1 / scale)).rsqrt()
    result = apart * inverse
    if weight is not None:
        result = result * weight.reshape(line)
    if bias is not None:
        result = result + bias.reshape(line)
    unbiased = momentum * count / max(count - 1, 1)
    mean.mul_(1 - momentum).add_(own.reshape(-1) * momentum)
    spread.mul_(1 - momentum).add_(squares.reshape(-1) * unbiased)
    return result, own.reshape(-1), inverse.reshape(-1)


def _soft_margin(x: Any, target: Any, reduction: int = 1) -> Any:
    """log(1 + e**(-x y)), as softplus: which no large power leaves the range of."""
    return _reduced(torch.nn.functional.softplus(-(x * target)), reduction)


def _reduced(value: Any, reduction: int) -> Any:
    return value.mean() if reduction == 1 else value.sum() if reduction else value


def _soft_margin_backward(gradient: Any, x: Any, target: Any, reduction: int) -> Any:
    slope = -target * (-(x * target)).sigmoid() * gradient
    return slope * (1 / x.numel()) if reduction == 1 else slope


def _shrink_backward(gradient: Any, x: Any, lambd: float) -> Any:
    return gradient * (x.abs() > lambd)


@cache
def _map(operation: Any, size: int, *args: Any) -> torch.Tensor:
    """The matrix, (size after, size before), of an operation that is linear along a height and lets a width of 1 be."""
    rows = torch.eye(size, dtype=torch.float64).reshape(1, size, size, 1)
    found: torch.Tensor = operation(rows, *args)
    return found[0, :, :, 0].t().contiguous()


def _resized(name: str, backward: bool) -> Rewriting:
    """Scaling an image up is a product with public matrices from both sides, and its gradient with their transposes."""
    operation = getattr(torch.ops.aten, name.replace("linear1d", "bilinear2d").replace("1d", "2d")).default
    aligns = int("linear" in name or "cubic" in name)

    def run(x: Any, output_size: Sequence[int], *rest: Any) -> Any:
        sizes = list(rest[0])[2:] if backward else list(x.shape[2:])
        rest = rest[1:] if backward else rest
        align, scales = rest[:aligns], [*rest[aligns:], *[None] * len(sizes)]
        maps = [
            _map(operation, size, (after, 1), *align, scale, None)
            for size, after, scale in zip(sizes, output_size, scales, strict=False)
        ]
        return _between(x, maps, backward)

    return run


def _padded(name: str, backward: bool) -> Rewriting:
    """So is padding by what is there."""
    operation = getattr(torch.ops.aten, name.replace("1d", "2d")).default

    def run(x: Any, *rest: Any) -> Any:
        like, padding = (rest[0], rest[1]) if backward else (x, rest[0])
        pairs = [tuple(padding[at : at + 2]) for at in range(0, len(padding), 2)][::-1]
        sizes = like.shape[-len(pairs) :]
        maps = [_map(operation, size, (0, 0, *pair)) for size, pair in zip(sizes, pairs, strict=True)]
        return _between(x, maps, backward)

    return run


def _between(x: Any, maps: Sequence[torch.Tensor], transposed: bool) -> Any:
    """`x` with each of its last dimensions mapped by the matrix of it."""
    used = [(one.t().contiguous() if transposed else one).to(x.dtype) for one in maps]
    if len(used) == 1:
        return x @ used[0].t()
    return used[0] @ x @ used[1].t()


def _trilinear(
    one: Any, two: Any, three: Any, expand1: Sequence[int], expand2: Sequence[int], expand3: Sequence[int],
    sumdim: Sequence[int], unroll_dim: int = 1,
) -> Any:  # fmt: skip
    def grown(tensor: Any, places: Sequence[int]) -> Any:
        for place in sorted(places):
            tensor = tensor.unsqueeze(place)
        return tensor

    found = grown(one, expand1) * grown(two, expand2) * grown(three, expand3)
    return found.sum(list(sumdim)) if sumdim else found


def _addr(x: Any, column: Any, row: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return _plus(x, beta, column.unsqueeze(1) * row, alpha)


def _addbmm(x: Any, one: Any, other: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return _plus(x, beta, (one @ other).sum(0), alpha)


def _plus(x: Any, beta: float, product: Any, alpha: float) -> Any:
    product = product if alpha == 1 else product * alpha
    return product + (x if beta == 1 else x * beta)


def _nansum(
    x: Any, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """Shares know no NaN."""
    return x.sum(list(range(x.dim())) if dim is None else list(dim), keepdim, dtype=dtype)


def _logit(x: Any, eps: float | None = None) -> Any:
    x = x if eps is None else x.clamp(eps, 1 - eps)
    return x.log() - (1 - x).log()


def _fast_self_attention(
    query: Any, key: Any, value: Any, width: int, heads: int, in_weight: Any, in_bias: Any, out_weight: Any,
    out_bias: Any, mask: Any = None, need_weights: bool = True, average: bool = True, mask_type: int | None = None,
) -> Any:  # fmt: skip
    """What `nn.MultiheadAttention` calls in evaluation, (batch, length, width) first."""
    if mask is not None:
        raise SharingError("this attention takes no mask on shares: call the module with batch_first=False")
    linear = torch.nn.functional.linear
    biases = in_bias.chunk(3)
    q, k, v = (
        linear(one, part, bias).reshape(*one.shape[:-1], heads, -1).transpose(1, 2)
        for one, part, bias in zip((query, key, value), in_weight.chunk(3), biases, strict=True)
    )
    weights, _ = _attention_weights(q, k, False, None, None)
    found = linear((weights @ v).transpose(1, 2).flatten(-2), out_weight, out_bias)
    if not need_weights:
        return found, query.new_zeros(0)
    return found, weights.mean(1) if average else weights


def _fast_encoder_layer(
    x: Any, width: int, heads: int, in_weight: Any, in_bias: Any, out_weight: Any, out_bias: Any, use_gelu: bool,
    norm_first: bool, eps: float, norm1: Any, shift1: Any, norm2: Any, shift2: Any, weight1: Any, bias1: Any,
    weight2: Any, bias2: Any, mask: Any = None, mask_type: int | None = None,
) -> Any:  # fmt: skip
    """What `nn.TransformerEncoderLayer` calls in evaluation."""
    functional = torch.nn.functional
    bent = functional.gelu if use_gelu else torch.relu

    def attended(y: Any) -> Any:
        given = (y, y, y, width, heads, in_weight, in_bias, out_weight, out_bias, mask, False)
        return _fast_self_attention(*given)[0]

    def fed(y: Any) -> Any:
        return functional.linear(bent(functional.linear(y, weight1, bias1)), weight2, bias2)

    def normed(y: Any, weight: Any, bias: Any) -> Any:
        return functional.layer_norm(y, (width,), weight, bias, eps)

    if norm_first:
        x = x + attended(normed(x, norm1, shift1))
        return x + fed(normed(x, norm2, shift2))
    x = normed(x + attended(x), norm1, shift1)
    return normed(x + fed(x), norm2, shift2)


_LSTM = 2
"""How `mkldnn_rnn_layer` numbers its modes; PyTorch computes the others by operations on their own."""


def _lstm_layer(
    x: Any, weight_x: Any, weight_h: Any, bias_x: Any, bias_h: Any, hidden: Any, cell: Any, reverse: bool,
    batch_sizes: Sequence[int], mode: int, *_: Any,
) -> Any:  # fmt: skip
    """One layer in one direction, (length, batch, width); the workspace is empty, as the gradient computes anew."""
    if mode != _LSTM or batch_sizes:
        raise SharingError("recurrent layers on shares take no packed sequences: pad them")
    steps = _lstm_steps(x, weight_x, weight_h, bias_x + bias_h, hidden, cell, reverse)
    results = [step.hidden for step in (reversed(steps) if reverse else steps)]
    last = steps[-1]
    return (
        torch.stack(results),
        last.hidden.reshape(hidden.shape),
        last.cell.reshape(cell.shape),
        x.new_zeros(0),
    )


class _Step(NamedTuple):
    place: int
    before: tuple[Any, Any]
    """The hidden state and the cell that it began with."""
    gates: tuple[Any, Any, Any, Any]
    bent: Any
    """tanh of the cell."""
    hidden: Any
    cell: Any


def _lstm_steps(
    x: Any, weight_x: Any, weight_h: Any, bias: Any, hidden: Any, cell: Any, reverse: bool
) -> list[_Step]:
    """The steps in the order in which they are taken; what depends on `x` alone is one product for all of them."""
    hidden, cell = hidden.reshape(x.shape[1], -1), cell.reshape(x.shape[1], -1)
    given = x @ weight_x.t() + bias
    steps = []
    for place in reversed(range(len(x))) if reverse else range(len(x)):
        raw_in, raw_forget, raw_new, raw_out = (given[place] + hidden @ weight_h.t()).chunk(4, 1)
        into, forget, out = torch.cat([raw_in, raw_forget, raw_out], 1).sigmoid().chunk(3, 1)
        new = raw_new.tanh()
        before, cell = (hidden, cell), forget * cell + into * new
        bent = cell.tanh()
        hidden = out * bent
        steps.append(_Step(place, before, (into, forget, new, out), bent, hidden, cell))
    return steps


def _lstm_layer_backward(
    x: Any, weight_x: Any, weight_h: Any, bias_x: Any, bias_h: Any, hidden: Any, cell: Any, output: Any, last: Any,
    last_cell: Any, to_output: Any, to_last: Any, to_cell: Any, reverse: bool, *_: Any,
) -> Any:  # fmt: skip
    """Through the steps backwards; the gradients of the weights are two products for all of them."""
    steps = _lstm_steps(x, weight_x, weight_h, bias_x + bias_h, hidden, cell, reverse)
    shape = steps[0].hidden.shape
    to_hidden = torch.zeros(shape) if to_last is None else to_last.reshape(shape)
    to_cell = torch.zeros(shape) if to_cell is None else to_cell.reshape(shape)
    slopes: list[Any] = [None] * len(x)
    befores: list[Any] = [None] * len(x)
    for step in reversed(steps):
        into, forget, new, out = step.gates
        if to_output is not None:
            to_hidden = to_hidden + to_output[step.place]
        to_cell = to_cell + to_hidden * out * (1 - step.bent * step.bent)
        parts = torch.stack([to_cell * new, to_cell * step.before[1], to_cell * into, to_hidden * step.bent])
        rest = torch.stack([into * (1 - into), forget * (1 - forget), 1 - new * new, out * (1 - out)])
        slope = (parts * rest).movedim(0, 1).flatten(1)
        slopes[step.place], befores[step.place] = slope, step.before[0]
        to_hidden, to_cell = slope @ weight_h, to_cell * forget
    slope, before = torch.stack(slopes), torch.stack(befores)
    flat = slope.flatten(0, 1).t()
    to_bias = slope.sum((0, 1))
    found = (slope @ weight_x, flat @ x.flatten(0, 1), flat @ before.flatten(0, 1), to_bias, to_bias.clone())
    return *found, to_hidden.reshape(hidden.shape), to_cell.reshape(cell.shape)


def prims(name: str, args: Sequence[Any]) -> Any:
    """Runs one of the operations that PyTorch's references come down to.

    Raises:
        SharingError: another one than those of arithmetic.
    """
    if name in ("add", "sub", "mul", "div"):
        return getattr(torch.ops.aten, name).Tensor(*args)
    if name == "neg":
        return torch.ops.aten.neg.default(*args)
    if name == "convert_element_type":
        return args[0].to(args[1])
    if name == "broadcast_in_dim":
        shape, dims = args[1:]
        line = [args[0].shape[dims.index(at)] if at in dims else 1 for at in range(len(shape))]
        return args[0].reshape(line).expand(list(shape))
    raise SharingError(f"{name} has no protocol on shares: open the operands with get(), or write it without")


_SCALED = ("upsample_nearest1d", "upsample_nearest2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
           "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d")  # fmt: skip
_PADDED = ("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")

_OWN: dict[str, Rewriting] = {
    "soft_margin_loss": _soft_margin,
    "soft_margin_loss_backward": _soft_margin_backward,
    "ldexp": lambda x, y: x * 2.0**y,
    "threshold": lambda x, threshold, value: torch.where(x > threshold, x, value),
    "elu": _elu,
    "elu_backward": _elu_backward,
    "celu": lambda x, alpha=1.0: _elu(x, alpha, 1.0, 1.0 / alpha),
    "mish": _mish,
    "mish_backward": _mish_backward,
    "_prelu_kernel": lambda x, weight: x.relu() + (x - x.relu()) * weight,
    "_prelu_kernel_backward": _prelu_backward,
    "norm": _norm,
    "vdot": lambda x, y: x.dot(y),
    "dist": distances.distance,
    "var_mean": _var_mean,
    "aminmax": lambda x, *, dim=None, keepdim=False: (
        x.amin(() if dim is None else dim, keepdim), x.amax(() if dim is None else dim, keepdim),
    ),
    "expm1": lambda x: x.exp() - 1,
    "exp2": lambda x: (x * math.log(2)).exp(),
    "log1p": lambda x: (x + 1).log(),
    "log2": lambda x: x.log() * (1 / math.log(2)),
    "log10": lambda x: x.log() * (1 / math.log(10)),
    "hypot": lambda x, y: (x * x + y * y).sqrt(),
    "logit": _logit,
    "logit_backward": lambda gradient, x, eps=None: gradient / (x * (1 - x)),
    "mkldnn_rnn_layer": _lstm_layer,
    "mkldnn_rnn_layer_backward": _lstm_layer_backward,
    "unsafe_split": torch.split,
    "unsafe_split_with_sizes": torch.split,
    "_trilinear": _trilinear,
    "softshrink": lambda x, lambd=0.5: (x - lambd).relu() - (-x - lambd).relu(),
    "softshrink_backward": _shrink_backward,
    "hardshrink": lambda x, lambd=0.5: x * (x.abs() > lambd),
    "hardshrink_backward": _shrink_backward,
    "std_mean": lambda x, dim=None, *, correction=1, keepdim=False: (
        torch.std(x, dim, correction=correction, keepdim=keepdim), _mean(x, dim, keepdim),
    ),
    "_unsafe_index": torch.ops.aten.index.Tensor,
    "_unsafe_index_put": torch.ops.aten.index_put.default,
    "hardsigmoid": lambda x: (x + 3).clamp(0, 6) * (1 / 6),
    "hardsigmoid_backward": lambda gradient, x: gradient * (x.abs() < 3) * (1 / 6),
    **{f"{name}{suffix}": _resized(name, bool(suffix)) for name in _SCALED for suffix in ("", "_backward")},
    **{f"{name}{suffix}": _padded(name, bool(suffix)) for name in _PADDED for suffix in ("", "_backward")},
    "xlogy": lambda x, y: x * y.log(),
    "addr": _addr,
    "addbmm": _addbmm,
    "heaviside": lambda x, values: torch.where(x == 0, values, (x > 0).to(x.dtype)),
    "nansum": _nansum,
    "nan_to_num": lambda x, *_, **__: x.clone(),
    "isposinf": lambda x: x != x,
    "isneginf": lambda x: x != x,
    "bucketize": bins.bucketize,
    "searchsorted": bins.searchsorted,
    "histc": bins.histc,
    "take": placed.take,
    "put": placed.put,
    "masked_select": placed.masked_select,
    "masked_scatter": placed.masked_scatter,
    "masked_scatter_backward": placed.masked_scatter_backward,
    "diagonal_scatter": placed.diagonal_scatter,
    "block_diag": placed.block_diag,
    "linalg_vector_norm": distances.vector_norm,
    "_cdist_forward": distances.distances,
    "_cdist_backward": distances.distances_backward,
    "_euclidean_dist": lambda one, two: distances.distances(one, two, 2.0),
    "_pdist_forward": distances.distances_within,
    "_pdist_backward": distances.distances_within_backward,
    "_weight_norm_interface": distances.weight_norm,
    "_weight_norm_interface_backward": distances.weight_norm_backward,
    "prod": distances.prod,
    "cumprod": distances.cumprod,
    "count_nonzero": lambda x, dim=None: (x != 0).sum(dim),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_native_multi_head_attention": _fast_self_attention,
    "_transformer_encoder_layer_fwd": _fast_encoder_layer,
}  # fmt: skip

_TORCHS = (
    "hardswish", "hardswish_backward", "glu", "glu_backward",
    "native_group_norm", "native_group_norm_backward", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "im2col", "col2im", "huber_loss", "huber_loss_backward", "smooth_l1_loss",
    "smooth_l1_loss_backward",
    "linalg_cross",
)  # fmt: skip
"""Of PyTorch's own."""


_SHOWN = VIEWS | {"alias", "detach"}


def _copied(view: Any) -> Rewriting:
    """The operation that has the same results as a view, in memory of their own."""
    return lambda *args, **kwargs: map_leaves(view(*args, **kwargs), torch.clone)


@cache
def rewriting(func: Any) -> Rewriting | None:
    """Returns `func`, an ATen operation, as a function that calls operations which have protocols; None for others."""
    name = func._schema.name.removeprefix("aten::")
    if name in _OWN:
        return _OWN[name]
    if name.endswith("_copy") and name.removesuffix("_copy") in _SHOWN:
        return _copied(getattr(getattr(torch.ops.aten, name.removesuffix("_copy")), func._overloadname))
    if (
        func._can_decompose()
    ):  # calls others by itself: what rewritings call has not met autograd, which would see to it
        decomposed: Rewriting = func.decompose
        return decomposed
    if name not in _TORCHS:
        return None
    from torch._decomp import decomposition_table

    return decomposition_table.get(func)
