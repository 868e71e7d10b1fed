"""The operations of layers and losses on fixed-point shares, and the whole table of kernels; see `kernels`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from planrt.errors import SharingError
from planrt.sharing import networks
from planrt.sharing.comparisons import below
from planrt.sharing.kernels import (
    ARITHMETIC,
    Context,
    Kernel,
    Share,
    Value,
    add,
    any_product,
    average,
    curve_kernel,
    masked,
    multiply,
    reduced,
    subtract,
    subtract_from,
    total,
)
from planrt.sharing.masked import mask
from planrt.sharing.products import bit_times
from planrt.sharing.rounds import Protocol
from planrt.sharing.selection import bit_times_quotient, rectified


def _relu(context: Context, value: Share) -> Protocol[Share]:
    """A product that comes here is scaled down in the same opening."""
    if value.scale == context.scale:
        (opened,) = yield from masked(context, value)
    else:
        (opened,) = yield from mask(context.party, value.part)
    part, positive = yield from rectified(context.party, opened, value.scale // context.scale)
    return Share(part, context.scale, positive=positive)


def _threshold_backward(
    context: Context, gradient: Share, result: Share, threshold: float
) -> Protocol[Share]:
    if threshold != 0:
        raise SharingError("of thresholds, only relu's is differentiated on shares")
    positive = result.positive
    if positive is None:
        (opened,) = yield from masked(context, result)
        bits = yield from below(context.party, opened, (1,))
        positive = bits.reshape(result.part.shape).negated()
    (slope,) = yield from mask(context.party, gradient.part)
    if gradient.scale == context.scale:
        return Share(bit_times(context.party, positive, slope), context.scale)
    part = bit_times_quotient(context.party, positive, slope, gradient.scale // context.scale)
    return Share(part, context.scale)


def _sigmoid_backward(context: Context, gradient: Share, result: Share) -> Protocol[Share]:
    slope = yield from multiply(context, result, (yield from subtract_from(context, result, 1)))
    return (yield from multiply(context, gradient, slope))


def _tanh_backward(context: Context, gradient: Share, result: Share) -> Protocol[Share]:
    slope = yield from subtract_from(context, (yield from multiply(context, result, result)), 1)
    return (yield from multiply(context, gradient, slope))


def _softmax(context: Context, value: Share, dim: int, half: bool) -> Protocol[Share]:
    yield from reduced(context, value)
    return Share((yield from networks.softmax(context.party, value.part, dim, context.scale)), context.scale)


def _softmax_backward(
    context: Context, gradient: Share, result: Share, dim: int, dtype: torch.dtype
) -> Protocol[Share]:
    weighted = yield from multiply(context, gradient, result)
    summed = yield from total(context, weighted, [dim], True)
    return (yield from subtract(context, weighted, (yield from multiply(context, result, summed))))


def _log_softmax(context: Context, value: Share, dim: int, half: bool) -> Protocol[Share]:
    yield from reduced(context, value)
    found = yield from networks.log_softmax(context.party, value.part, dim, context.scale)
    return Share(found, context.scale)


def _log_softmax_backward(
    context: Context, gradient: Share, result: Share, dim: int, dtype: torch.dtype
) -> Protocol[Share]:
    yield from reduced(context, result)
    powers = yield from curve_kernel("exp_negative")(context, result)
    summed = yield from total(context, gradient, [dim], True)
    return (yield from subtract(context, gradient, (yield from multiply(context, powers, summed))))


_MEAN, _SUM = 1, 2


def _mse_loss(context: Context, value: Value, target: Value, reduction: int = _MEAN) -> Protocol[Share]:
    difference = yield from subtract(context, value, target)
    squares = yield from multiply(context, difference, difference)
    if reduction == _MEAN:
        return (yield from average(context, squares))
    return (yield from total(context, squares)) if reduction == _SUM else squares


def _mse_loss_backward(
    context: Context, gradient: Share, value: Value, target: Value, reduction: int
) -> Protocol[Share]:
    difference = yield from subtract(context, value, target)
    factor = 2 / difference.part.numel() if reduction == _MEAN else 2
    slope = yield from multiply(context, difference, factor)
    return (yield from multiply(context, slope, gradient))


def _convolution(
    context: Context, value: Value, weight: Value, bias: Value | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Protocol[Share]:  # fmt: skip
    if transposed:
        raise SharingError("transposed convolutions of shares are not there yet")
    function = f"conv{len(stride)}d"
    options = {
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "groups": groups,
    }
    result = yield from any_product(context, function, value, weight, **options)
    if bias is None:
        return result
    shape = (-1, *[1] * len(stride))
    raised = Share(bias.part.reshape(shape), bias.scale) if isinstance(bias, Share) else bias.reshape(shape)
    return (yield from add(context, result, raised))


def _convolution_backward(
    context: Context, gradient: Share, value: Value, weight: Value, bias_sizes: Sequence[int] | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int, wanted: Sequence[bool],
) -> Protocol[tuple[Share | None, ...]]:  # fmt: skip
    if transposed:
        raise SharingError("transposed convolutions of shares are not there yet")
    options = {
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "groups": groups,
    }
    found: list[Share | None] = [None, None, None]
    if wanted[0]:
        size = tuple((value.part if isinstance(value, Share) else value).shape)
        found[0] = yield from any_product(context, "conv_input", gradient, weight, size=size, **options)
    if wanted[1]:
        size = tuple((weight.part if isinstance(weight, Share) else weight).shape)
        found[1] = yield from any_product(context, "conv_weight", value, gradient, size=size, **options)
    if wanted[2]:
        found[2] = yield from total(context, gradient, [0, *range(2, gradient.part.dim())])
    return tuple(found)


KERNELS: dict[str, Kernel] = {
    **ARITHMETIC,
    "convolution": _convolution,
    "relu": _relu,
    "threshold_backward": _threshold_backward,
    "sigmoid_backward": _sigmoid_backward,
    "tanh_backward": _tanh_backward,
    "_softmax": _softmax,
    "_softmax_backward_data": _softmax_backward,
    "_log_softmax": _log_softmax,
    "_log_softmax_backward_data": _log_softmax_backward,
    "mse_loss": _mse_loss,
    "mse_loss_backward": _mse_loss_backward,
    "convolution_backward": _convolution_backward,
}
"""ATen name -> protocol."""
