"""PyTorch's activations, convolutions, normalisations and their gradients on shares; see `kernels` and `losses`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from planrt.errors import SharingError
from planrt.sharing import networks, roots
from planrt.sharing.comparisons import below
from planrt.sharing.kernels.arithmetic import (
    Kernel,
    add,
    any_product,
    average,
    curve_kernel,
    matrix_product,
    multiply,
    root_kernel,
    subtract,
    subtract_from,
    total,
)
from planrt.sharing.kernels.ordering import both, clamp, greater, largest, less, one_hot, where
from planrt.sharing.kernels.parts import Context, Share, Value, fractional, masked
from planrt.sharing.masked import mask
from planrt.sharing.products import bit_times
from planrt.sharing.rounds import Protocol
from planrt.sharing.selection import bit_times_quotient, rectified

_COARSE = 15
"""Bits that the sign of a product does not depend on, where it is scaled down by more: half a unit of what it becomes.
Of the other 48 the tables take three quarters.
"""


def _relu(context: Context, value: Share) -> Protocol[Share]:
    """A product that comes here is scaled down in the same opening. What is below half a unit may become 0."""
    if value.scale <= context.scale:
        (opened,) = yield from masked(context, value)
    else:
        (opened,) = yield from mask(context.party, value.part)
    scale = min(value.scale, context.scale)
    divisor = value.scale // scale
    coarse = _COARSE if divisor > 1 << _COARSE else 0
    part, positive = yield from rectified(context.party, opened, divisor, least=1, coarse=coarse)
    return Share(part, scale, positive=positive)


def _threshold_backward(
    context: Context, gradient: Share, result: Share, threshold: float
) -> Protocol[Share]:
    if threshold != 0:
        above = yield from greater(context, result, threshold)
        return (yield from where(context, above, gradient, 0))
    positive = result.positive
    if positive is None:
        (opened,) = yield from masked(context, result)
        bits = yield from below(context.party, opened, (1,))
        positive = bits.reshape(result.part.shape).negated()
    (slope,) = yield from mask(context.party, gradient.part)
    if gradient.scale <= context.scale:
        return Share(bit_times(context.party, positive, slope), gradient.scale)
    part = bit_times_quotient(context.party, positive, slope, gradient.scale // context.scale)
    return Share(part, context.scale)


def _sigmoid_backward(context: Context, gradient: Share, result: Share) -> Protocol[Share]:
    slope = yield from multiply(context, result, (yield from subtract_from(context, result, 1)))
    return (yield from multiply(context, gradient, slope))


def _tanh_backward(context: Context, gradient: Share, result: Share) -> Protocol[Share]:
    slope = yield from subtract_from(context, (yield from multiply(context, result, result)), 1)
    return (yield from multiply(context, gradient, slope))


def _softmax(context: Context, value: Share, dim: int, half: bool) -> Protocol[Share]:
    if not value.part.dim():
        return Share(context.party.public(context.public(1.0, context.scale)), context.scale)
    (value,) = yield from fractional(context, value)
    return Share((yield from networks.softmax(context.party, value.part, dim, context.scale)), context.scale)


def _safe_softmax(
    context: Context, value: Share, dim: int, dtype: torch.dtype | None = None
) -> Protocol[Share]:
    """What attention calls where it drops some: of rows that are not all hidden, which shares cannot tell."""
    return (yield from _softmax(context, value, dim, False))


def _softmax_backward(
    context: Context, gradient: Share, result: Share, dim: int, dtype: torch.dtype
) -> Protocol[Share]:
    weighted = yield from multiply(context, gradient, result)
    summed = yield from total(context, weighted, [dim], True)
    return (yield from subtract(context, weighted, (yield from multiply(context, result, summed))))


def _log_softmax(context: Context, value: Share, dim: int, half: bool) -> Protocol[Share]:
    if not value.part.dim():
        return Share(torch.zeros((), dtype=torch.int64), context.scale)
    (value,) = yield from fractional(context, value)
    found = yield from networks.log_softmax(context.party, value.part, dim, context.scale)
    return Share(found, context.scale)


def _log_softmax_backward(
    context: Context, gradient: Share, result: Share, dim: int, dtype: torch.dtype
) -> Protocol[Share]:
    (result,) = yield from fractional(context, result)
    powers = yield from curve_kernel("exp_negative")(context, result)
    summed = yield from total(context, gradient, [dim], True)
    return (yield from subtract(context, gradient, (yield from multiply(context, powers, summed))))


def _logsumexp(context: Context, value: Share, dim: Sequence[int], keepdim: bool = False) -> Protocol[Share]:
    """The largest, and the logarithm of the sum of e**x of what is below it."""
    top = yield from largest(context, value, dim, True)
    rest = yield from subtract(context, value, top)
    powers = yield from curve_kernel("exp_negative")(context, rest)
    summed = yield from total(context, powers, dim, True)
    found = yield from add(context, (yield from root_kernel(roots.log)(context, summed)), top)
    if keepdim:
        return found
    kept = [
        size for at_, size in enumerate(value.shape) if at_ not in {one % value.part.dim() for one in dim}
    ]
    return Share(found.part.reshape(kept), found.scale)


def _convolution(
    context: Context, value: Value, weight: Value, bias: Value | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Protocol[Share]:  # fmt: skip
    options: dict[str, Any] = {
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "groups": groups,
    }
    if len(stride) not in (1, 2):
        raise SharingError(f"convolutions of shares have one or two dimensions, not {len(stride)}")
    function = f"conv{len(stride)}d"
    if transposed:  # the gradient, by its value, of a convolution that makes values of this size
        function = "conv_input"
        if any(more >= step for more, step in zip(output_padding, stride, strict=True)):
            raise SharingError("transposed convolutions of shares have an output_padding below the stride")
        options["size"] = _transposed_size(value, weight, stride, padding, dilation, output_padding, groups)
    shape = (-1, *[1] * len(stride))
    raised = Share(bias.part.reshape(shape), bias.scale) if isinstance(bias, Share) else None
    result = yield from any_product(context, function, value, weight, beside=raised, **options)
    if bias is None:
        return result
    return (yield from add(context, result, bias.reshape(shape) if raised is None else raised))


def _transposed_size(
    value: Value, weight: Value, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    output_padding: Sequence[int], groups: int,
) -> tuple[int, ...]:  # fmt: skip
    given = (value.part if isinstance(value, Share) else value).shape
    kernel = (weight.part if isinstance(weight, Share) else weight).shape
    sizes = (
        (size - 1) * step - 2 * pad + gap * (reach - 1) + more + 1
        for size, step, pad, gap, reach, more in zip(
            given[2:], stride, padding, dilation, kernel[2:], output_padding, strict=True
        )
    )
    return (given[0], kernel[1] * groups, *sizes)


def _convolution_backward(
    context: Context, gradient: Share, value: Value, weight: Value, bias_sizes: Sequence[int] | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int, wanted: Sequence[bool],
) -> Protocol[tuple[Share | None, ...]]:  # fmt: skip
    options: dict[str, Any] = {
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "groups": groups,
    }
    found: list[Share | None] = [None, None, None]
    if wanted[0] and transposed:
        found[0] = yield from any_product(context, f"conv{len(stride)}d", gradient, weight, **options)
    elif wanted[0]:
        size = tuple((value.part if isinstance(value, Share) else value).shape)
        found[0] = yield from any_product(context, "conv_input", gradient, weight, size=size, **options)
    if wanted[1]:
        size = tuple((weight.part if isinstance(weight, Share) else weight).shape)
        pair = (gradient, value) if transposed else (value, gradient)
        found[1] = yield from any_product(context, "conv_weight", *pair, size=size, **options)
    if wanted[2]:
        found[2] = yield from total(context, gradient, [0, *range(2, gradient.part.dim())])
    return tuple(found)


def _leaky_relu(context: Context, value: Share, slope: float = 0.01) -> Protocol[Share]:
    positive = yield from _relu(context, value)
    rest = yield from subtract(context, value, positive)
    return (yield from add(context, positive, (yield from multiply(context, rest, slope))))


def _leaky_relu_backward(
    context: Context, gradient: Share, value: Share, slope: float, is_result: bool
) -> Protocol[Share]:
    positive = yield from greater(context, value, 0)
    return (yield from where(context, positive, gradient, (yield from multiply(context, gradient, slope))))


def _hardtanh(context: Context, value: Share, low: float = -1, high: float = 1) -> Protocol[Share]:
    return (yield from clamp(context, value, low, high))


def _hardtanh_backward(
    context: Context, gradient: Share, value: Share, low: float, high: float
) -> Protocol[Share]:
    above = yield from greater(context, value, low)
    under = yield from less(context, value, high)
    inside = yield from both(context, above, under)
    return (yield from multiply(context, gradient, inside))


def _softplus(context: Context, value: Share, beta: float = 1, threshold: float = 20) -> Protocol[Share]:
    if threshold < 12:  # above it torch returns x, which elsewhere is the same within a unit
        bent = yield from _softplus(context, value, beta)
        above = yield from greater(context, value, threshold / beta)
        return (yield from where(context, above, value, bent))
    if beta == 1:
        return (yield from curve_kernel("softplus")(context, value))
    found = yield from curve_kernel("softplus")(context, (yield from multiply(context, value, beta)))
    return (yield from multiply(context, found, 1 / beta))


def _softplus_backward(
    context: Context, gradient: Share, value: Share, beta: float, threshold: float
) -> Protocol[Share]:
    slope = yield from curve_kernel("sigmoid")(context, (yield from multiply(context, value, beta)))
    if threshold < 12:
        above = yield from greater(context, value, threshold / beta)
        slope = yield from where(context, above, 1, slope)
    return (yield from multiply(context, gradient, slope))


def _log_sigmoid(context: Context, value: Share) -> Protocol[tuple[Share, Share]]:
    found = yield from curve_kernel("softplus")(context, Share(-value.part, value.scale))
    return Share(-found.part, found.scale), context.share_of(torch.zeros(value.shape))


def _log_sigmoid_backward(context: Context, gradient: Share, value: Share, buffer: Value) -> Protocol[Share]:
    slope = yield from curve_kernel("sigmoid")(context, Share(-value.part, value.scale))
    return (yield from multiply(context, gradient, slope))


def _silu_backward(context: Context, gradient: Share, value: Share) -> Protocol[Share]:
    """sigmoid(x) (1 + x (1 - sigmoid(x)))"""
    bent = yield from curve_kernel("sigmoid")(context, value)
    rest = yield from multiply(context, value, (yield from subtract_from(context, bent, 1)))
    slope = yield from multiply(context, bent, (yield from add(context, rest, 1)))
    return (yield from multiply(context, gradient, slope))


_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def _gelu(context: Context, value: Share, *, approximate: str = "none") -> Protocol[Share]:
    return (yield from curve_kernel(_GELUS[approximate])(context, value))


def _gelu_backward(
    context: Context, gradient: Share, value: Share, *, approximate: str = "none"
) -> Protocol[Share]:
    slope = yield from curve_kernel(f"{_GELUS[approximate]}_slope")(context, value)
    return (yield from multiply(context, gradient, slope))


# --------------------------------------------------------------------------------------------------------- norms


def normalised(
    context: Context, value: Share, dims: Sequence[int], eps: float
) -> Protocol[tuple[Share, Share, Share]]:
    """Returns (x - mean) / sqrt(var + eps), the mean and 1 / sqrt(var + eps) along `dims`, kept with size 1.

    1. The mean; the differences, squared; their mean (3 rounds).
    2. Its inverse root (14 rounds), and the product with the differences (2 rounds).

    Off by 4 units of the scale and 1e-5 of the value, for variances below 2**40 / scale; `eps` counts as one unit where
    it is less.
    """
    mean = yield from average(context, value, dims, True)
    (mean,) = yield from fractional(context, mean)
    centred = yield from subtract(context, value, mean)
    squares = yield from multiply(context, centred, centred)
    spread = yield from average(context, squares, dims, True)
    inverse = yield from _inverse_root(context, spread, eps)
    return (yield from multiply(context, centred, inverse)), mean, inverse


def _inverse_root(context: Context, spread: Share, eps: float) -> Protocol[Share]:
    (spread,) = yield from fractional(context, spread)
    raised = yield from add(context, spread, max(eps, 1 / context.scale))
    return (yield from root_kernel(roots.rsqrt)(context, raised))


def _layer_norm(
    context: Context, value: Share, shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> Protocol[tuple[Share, Share, Share]]:
    if eps < 0:
        raise SharingError(f"layer norm of shares adds eps to the variance, which is not below 0: not {eps}")
    dims = list(range(value.part.dim() - len(shape), value.part.dim()))
    found, mean, inverse = yield from normalised(context, value, dims, eps)
    return (yield from _stretched(context, found, weight, bias)), mean, inverse


def _stretched(context: Context, value: Share, weight: Value | None, bias: Value | None) -> Protocol[Share]:
    if weight is not None:
        value = yield from multiply(context, value, weight)
    return value if bias is None else (yield from add(context, value, bias))


def _layer_norm_backward(
    context: Context, gradient: Share, value: Share, shape: Sequence[int], mean: Share, inverse: Share,
    weight: Value | None, bias: Value | None, wanted: Sequence[bool],
) -> Protocol[tuple[Share | None, ...]]:  # fmt: skip
    """With n = (x - mean) * inverse and h = g * weight: inverse * (h - mean(h) - n * mean(h * n))."""
    dims = list(range(value.part.dim() - len(shape), value.part.dim()))
    outer = list(range(dims[0]))
    centred = yield from subtract(context, value, mean)
    found = yield from multiply(context, centred, inverse)
    to_value = to_weight = to_bias = None
    if wanted[0]:
        to_value = yield from _norm_slope(context, gradient, found, inverse, weight, dims)
    if wanted[1]:
        weighted = yield from multiply(context, gradient, found)
        to_weight = (yield from total(context, weighted, outer)) if outer else weighted
    if wanted[2]:
        to_bias = (yield from total(context, gradient, outer)) if outer else gradient.copied()
    return to_value, to_weight, to_bias


def _norm_slope(
    context: Context, gradient: Share, found: Share, inverse: Share, weight: Value | None, dims: Sequence[int]
) -> Protocol[Share]:
    if weight is not None:
        gradient = yield from multiply(context, gradient, weight)
    (gradient,) = yield from fractional(context, gradient)
    first = yield from average(context, gradient, dims, True)
    second = yield from average(context, (yield from multiply(context, gradient, found)), dims, True)
    rest = yield from subtract(context, gradient, first)
    rest = yield from subtract(context, rest, (yield from multiply(context, found, second)))
    return (yield from multiply(context, rest, inverse))


def _batch_norm(
    context: Context, value: Share, weight: Value | None, bias: Value | None, mean: Value | None,
    spread: Value | None, training: bool, momentum: float, eps: float,
) -> Protocol[tuple[Share, Share, Share]]:  # fmt: skip
    """With the statistics that the module has: one row of inverse roots, whatever the batch. With those of the batch
    where no others are kept, as instance norm does.
    """
    line = (1, -1, *[1] * (value.part.dim() - 2))
    if mean is None or spread is None:
        outer = [0, *range(2, value.part.dim())]
        found, own_mean, own_inverse = yield from normalised(context, value, outer, eps)
        weight, bias = (one if one is None else _shaped(one, line) for one in (weight, bias))
        result = yield from _stretched(context, found, weight, bias)
        return (
            result,
            Share(own_mean.part.reshape(-1), own_mean.scale),
            Share(own_inverse.part.reshape(-1), own_inverse.scale),
        )
    centred = yield from subtract(context, value, _shaped(mean, line))
    inverse = yield from _statistic(context, spread, eps)
    found = yield from multiply(context, centred, _shaped(inverse, line))
    if weight is not None:
        found = yield from multiply(context, found, _shaped(weight, line))
    if bias is not None:
        found = yield from add(context, found, _shaped(bias, line))
    nothing = context.share_of(torch.zeros(0))
    return found, nothing, nothing


def _statistic(context: Context, spread: Value, eps: float) -> Protocol[Value]:
    if isinstance(spread, Share):
        return (yield from _inverse_root(context, spread, eps))
    return (spread.double() + eps).rsqrt()


def _shaped(value: Value, shape: Sequence[int]) -> Value:
    return Share(value.part.reshape(shape), value.scale) if isinstance(value, Share) else value.reshape(shape)


def _batch_norm_backward(
    context: Context, gradient: Share, value: Share, weight: Value | None, mean: Value | None,
    spread: Value | None, saved_mean: Value | None, saved_inverse: Value | None, training: bool, eps: float,
    wanted: Sequence[bool],
) -> Protocol[tuple[Share | None, ...]]:  # fmt: skip
    line = (1, -1, *[1] * (value.part.dim() - 2))
    outer = [0, *range(2, value.part.dim())]
    if training or mean is None or spread is None:
        return (
            yield from _own_norm_backward(
                context,
                gradient,
                value,
                weight,
                _shaped(saved_mean, line),
                _shaped(saved_inverse, line),
                wanted,
            )
        )
    inverse = _shaped((yield from _statistic(context, spread, eps)), line)
    to_value = to_weight = to_bias = None
    if wanted[0]:
        to_value = yield from multiply(context, gradient, inverse)
        if weight is not None:
            to_value = yield from multiply(context, to_value, _shaped(weight, line))
    if wanted[1]:
        centred = yield from subtract(context, value, _shaped(mean, line))
        found = yield from multiply(context, centred, inverse)
        to_weight = yield from total(context, (yield from multiply(context, gradient, found)), outer)
    if wanted[2]:
        to_bias = yield from total(context, gradient, outer)
    return to_value, to_weight, to_bias


def _own_norm_backward(
    context: Context, gradient: Share, value: Share, weight: Value | None, mean: Value, inverse: Share,
    wanted: Sequence[bool],
) -> Protocol[tuple[Share | None, ...]]:  # fmt: skip
    """Of batch norm with the statistics of the batch."""
    line = (1, -1, *[1] * (value.part.dim() - 2))
    outer = [0, *range(2, value.part.dim())]
    found = yield from multiply(context, (yield from subtract(context, value, mean)), inverse)
    to_value = to_weight = to_bias = None
    if wanted[0]:
        stretch = None if weight is None else _shaped(weight, line)
        to_value = yield from _norm_slope(context, gradient, found, inverse, stretch, outer)
    if wanted[1]:
        to_weight = yield from total(context, (yield from multiply(context, gradient, found)), outer)
    if wanted[2]:
        to_bias = yield from total(context, gradient, outer)
    return to_value, to_weight, to_bias


# ----------------------------------------------------------------------------------------------------- embedding


def _embedding(
    context: Context, weight: Value, indices: Value, padding_idx: int = -1, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Protocol[Share]:  # fmt: skip
    """Rows at public places; at secret ones by a product with one-hot rows."""
    if not isinstance(indices, Share):
        rows = weight.part.index_select(0, indices.reshape(-1))  # which does not count from the end
        return Share(rows.reshape(*indices.shape, *rows.shape[1:]), weight.scale)
    hot = yield from _rows(context, indices, (weight.part if isinstance(weight, Share) else weight).shape[0])
    return (yield from matrix_product(context, hot, weight))


def _rows(context: Context, indices: Share, count: int) -> Protocol[Share]:
    bits = yield from one_hot(context, indices, count)
    return Share(bits.share(context.party).movedim(0, -1), 1)


def _embedding_backward(
    context: Context, gradient: Share, indices: Value, count: int, padding_idx: int, by_frequency: bool
) -> Protocol[Share]:
    if by_frequency:
        raise SharingError("embedding of shares does not scale gradients by frequency: leave it out")
    part = gradient.part if gradient.part.dim() > 1 else gradient.part[None]  # of a single place
    flat = Share(part.flatten(0, -2), gradient.scale)
    if isinstance(indices, Share):
        rows = yield from _rows(context, indices, count)
        found = yield from matrix_product(context, Share(rows.part.reshape(-1, count).t(), 1), flat)
    else:
        part = torch.zeros(count, flat.shape[1], dtype=torch.int64)
        found = Share(part.index_add_(0, indices.reshape(-1), flat.part), flat.scale)
    if padding_idx >= 0:
        found.part[padding_idx] = 0
    return found


LAYERS: dict[str, Kernel] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "relu": _relu,
    "threshold_backward": _threshold_backward,
    "leaky_relu": _leaky_relu,
    "leaky_relu_backward": _leaky_relu_backward,
    "hardtanh": _hardtanh,
    "hardtanh_backward": _hardtanh_backward,
    "sigmoid_backward": _sigmoid_backward,
    "tanh_backward": _tanh_backward,
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
    "silu_backward": _silu_backward,
    "softplus": _softplus,
    "softplus_backward": _softplus_backward,
    "log_sigmoid_forward": _log_sigmoid,
    "log_sigmoid_backward": _log_sigmoid_backward,
    "_softmax": _softmax,
    "_safe_softmax": _safe_softmax,
    "_softmax_backward_data": _softmax_backward,
    "_log_softmax": _log_softmax,
    "_log_softmax_backward_data": _log_softmax_backward,
    "logsumexp": _logsumexp,
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    "embedding": _embedding,
    "embedding_dense_backward": _embedding_backward,
}
"""ATen name -> protocol; see `kernels.ARITHMETIC`."""
