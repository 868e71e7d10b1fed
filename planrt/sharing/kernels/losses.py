"""PyTorch's losses on shares, with classes that all know or secret ones; see `kernels`."""

from __future__ import annotations

import torch

from planrt.errors import SharingError
from planrt.sharing import roots
from planrt.sharing.kernels.arithmetic import (
    Kernel,
    add,
    average,
    curve_kernel,
    divided,
    multiply,
    root_kernel,
    subtract,
    subtract_from,
    total,
)
from planrt.sharing.kernels.ordering import clamp, one_hot
from planrt.sharing.kernels.parts import Context, Share, Value, fractional
from planrt.sharing.rounds import Protocol

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


def _reduced_to(context: Context, value: Share, reduction: int) -> Protocol[Share]:
    if reduction == _MEAN:
        return (yield from average(context, value))
    return (yield from total(context, value)) if reduction == _SUM else value


def _classes(
    context: Context, value: Share, target: Value, weight: Value | None, ignore_index: int
) -> Protocol[tuple[Value, Value]]:
    """One-hot rows of the classes times their weights, along dimension 1 of `value` (0 if it has one), and their sum.

    Secret classes out of range count as none, so `ignore_index` must be out of range there.
    """
    dim = 1 if value.part.dim() > 1 else 0
    count = value.shape[dim]
    line = [count if at_ == dim else 1 for at_ in range(value.part.dim())]
    rows: Value
    if isinstance(target, Share):
        if 0 <= ignore_index < count:
            raise SharingError(
                "which class is ignored is one that secret classes cannot have: leave ignore_index out"
            )
        if target.scale != 1:
            raise SharingError(
                "classes are whole numbers: share integers, or give probabilities of (batch, classes)"
            )
        bits = yield from one_hot(context, target, count)
        rows = Share(bits.share(context.party).movedim(0, dim), 1)
    else:
        kept = (target != ignore_index).long()
        rows = torch.nn.functional.one_hot((target * kept).long(), count) * kept.unsqueeze(-1)
        rows = rows.movedim(-1, dim)
    if weight is not None:
        lined = (
            Share(weight.part.reshape(line), weight.scale)
            if isinstance(weight, Share)
            else weight.reshape(line)
        )
        if isinstance(rows, Share) or isinstance(lined, Share):
            rows = yield from multiply(context, rows, lined)
        else:
            rows = rows * lined
    elif isinstance(rows, Share):
        return rows, torch.tensor(float(target.part.numel()))
    summed = (yield from total(context, rows)) if isinstance(rows, Share) else rows.sum()
    return rows, summed


def _nll_loss(
    context: Context, value: Share, target: Value, weight: Value | None, reduction: int, ignore_index: int
) -> Protocol[tuple[Share, Share]]:
    """The picked log-probabilities, negated; their weighted mean, or sum."""
    rows, summed = yield from _classes(context, value, target, weight, ignore_index)
    picked = yield from multiply(context, value, rows)
    dim = 1 if value.part.dim() > 1 else 0
    if reduction not in (_MEAN, _SUM):
        found = yield from total(context, picked, [dim])
        return Share(-found.part, found.scale), context.share_of(torch.zeros(()))
    found = yield from total(context, picked)
    if reduction == _MEAN:
        found = yield from divided(context, found, summed)
    whole = summed if isinstance(summed, Share) else context.share_of(summed.double())
    return Share(-found.part, found.scale), whole


def _nll_loss_backward(
    context: Context, gradient: Share, value: Share, target: Value, weight: Value | None, reduction: int,
    ignore_index: int, summed: Value,
) -> Protocol[Share]:  # fmt: skip
    rows, _ = yield from _classes(context, value, target, weight, ignore_index)
    if reduction == _MEAN:
        gradient = yield from divided(context, gradient, summed)
    elif reduction != _SUM:
        dim = 1 if value.part.dim() > 1 else 0
        gradient = Share(gradient.part.unsqueeze(dim), gradient.scale)
    slope = yield from multiply(context, gradient, rows)
    return Share(-slope.part, slope.scale)


def _bce(
    context: Context, value: Value, target: Value, weight: Value | None = None, reduction: int = _MEAN
) -> Protocol[Share]:
    """Binary cross-entropy of probabilities, with logarithms kept above that of one unit of the scale."""
    value = context.share_of(value)
    (value,) = yield from fractional(context, value)
    value = yield from clamp(context, value, 1 / context.scale, 1 - 1 / context.scale)
    logged = yield from root_kernel(roots.log)(context, value)
    rest = yield from root_kernel(roots.log)(context, (yield from subtract_from(context, value, 1)))
    chosen = yield from multiply(context, target, (yield from subtract(context, logged, rest)))
    loss = yield from add(context, chosen, rest)
    if weight is not None:
        loss = yield from multiply(context, loss, weight)
    found = yield from _reduced_to(context, loss, reduction)
    return Share(-found.part, found.scale)


def _bce_backward(
    context: Context, gradient: Share, value: Share, target: Value, weight: Value | None = None,
    reduction: int = _MEAN,
) -> Protocol[Share]:  # fmt: skip
    (value,) = yield from fractional(context, value)
    inside = yield from clamp(context, value, 2 / context.scale, 1 - 2 / context.scale)
    slope = yield from multiply(context, inside, (yield from subtract_from(context, inside, 1)))
    (slope,) = yield from fractional(context, slope)
    slope = yield from clamp(context, slope, 1 / context.scale)
    difference = yield from subtract(context, value, target)
    found = yield from divided(context, difference, slope)
    if weight is not None:
        found = yield from multiply(context, found, weight)
    if reduction == _MEAN:
        found = yield from multiply(context, found, 1 / value.part.numel())
    return (yield from multiply(context, found, gradient))


def _bce_with_logits(
    context: Context, value: Share, target: Value, weight: Value | None = None, pos_weight: Value | None = None,
    reduction: int = _MEAN,
) -> Protocol[Share]:  # fmt: skip
    """(1 - y) x + (1 + (p - 1) y) log(1 + e**-x)"""
    bent = yield from curve_kernel("softplus")(context, Share(-value.part, value.scale))
    if pos_weight is not None:
        more = (
            (yield from subtract(context, pos_weight, 1)) if isinstance(pos_weight, Share) else pos_weight - 1
        )
        if isinstance(more, Share) or isinstance(target, Share):
            factor = yield from add(context, (yield from multiply(context, more, target)), 1)
        else:
            factor = 1 + more * target
        bent = yield from multiply(context, bent, factor)
    rest = yield from subtract(context, value, (yield from multiply(context, value, target)))
    loss = yield from add(context, rest, bent)
    if weight is not None:
        loss = yield from multiply(context, loss, weight)
    return (yield from _reduced_to(context, loss, reduction))


LOSSES: dict[str, Kernel] = {
    "mse_loss": _mse_loss,
    "mse_loss_backward": _mse_loss_backward,
    "nll_loss_forward": _nll_loss,
    "nll_loss_backward": _nll_loss_backward,
    "nll_loss2d_forward": _nll_loss,
    "nll_loss2d_backward": _nll_loss_backward,
    "binary_cross_entropy": _bce,
    "binary_cross_entropy_backward": _bce_backward,
    "binary_cross_entropy_with_logits": _bce_with_logits,
}
"""ATen name -> protocol; see `kernels.ARITHMETIC`."""
