"""PyTorch's operations on fixed-point shares, each a protocol over one party's view: a table by ATen name.

A `Share` knows its scale, so that a product is brought back to the session's scale only where something needs that,
which relu does for nothing. It keeps its `Masked` once it was opened: a weight that a forward pass multiplies by is not
opened again in the backward pass. This is the table that a plan on shares runs by at every party.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from planrt.errors import SharingError
from planrt.sharing import curves, networks, roots
from planrt.sharing.additive import add_public
from planrt.sharing.bilinear import bilinear_value
from planrt.sharing.comparisons import below
from planrt.sharing.fixed_point import encode
from planrt.sharing.masked import Bit, Masked, mask
from planrt.sharing.products import bit_times, product
from planrt.sharing.quotients import divide
from planrt.sharing.rounds import Party, Protocol
from planrt.sharing.selection import bit_times_quotient, rectified

FINER = 2**24
"""The scale of public factors below 1: at a scale of 2**16, 0.02 would be wrong by 2e-4 of itself."""


@dataclass(slots=True)
class Share:
    """One party's part of a fixed-point secret."""

    part: torch.Tensor
    scale: int
    masked: Masked | None = None
    """The same value as it was opened under a mask, if it was."""
    positive: Bit | None = None
    """The result of relu keeps where it is positive."""
    is_view: bool = False

    def become(self, other: Share) -> None:
        """Takes the value of `other`: what an operation in place does."""
        self.part, self.scale = other.part, other.scale
        self.masked, self.positive = other.masked, None


@dataclass(frozen=True, slots=True)
class Context:
    """A party, and the scale that values are brought back to."""

    party: Party
    scale: int


Kernel: TypeAlias = Callable[..., Protocol[Any]]
Value: TypeAlias = Any
"""A `Share`, or what all parties know: a torch.Tensor or a number."""


def reduced(context: Context, *shares: Share) -> Protocol[None]:
    """Brings shares back to the session's scale, all in one round; none if they are at it."""
    wide = _each_once(share for share in shares if share.scale != context.scale)
    if not wide:
        return
    opened = yield from mask(context.party, *[share.part for share in wide])
    for share, one in zip(wide, opened, strict=True):
        share.part = divide(context.party, one, share.scale // context.scale)
        share.scale, share.masked = context.scale, None


def masked(context: Context, *shares: Share) -> Protocol[list[Masked]]:
    """Returns shares at the session's scale as they are, or now become, opened under masks, in one round or two."""
    yield from reduced(context, *shares)
    fresh = _each_once(share for share in shares if share.masked is None)
    if fresh:
        opened = yield from mask(context.party, *[share.part for share in fresh])
        for share, one in zip(fresh, opened, strict=True):
            share.masked = one
    return [share.masked for share in shares if share.masked is not None]


def _each_once(shares: Iterable[Share]) -> list[Share]:
    """Both factors of a square are one share."""
    return list({id(share): share for share in shares}.values())


def _public(context: Context, value: Value, scale: int) -> torch.Tensor:
    return encode(torch.as_tensor(value, dtype=torch.float64), scale)


def _add(context: Context, left: Value, right: Value, *, alpha: float = 1) -> Protocol[Share]:
    if alpha != 1:
        right = (yield from _mul(context, right, alpha)) if isinstance(right, Share) else right * alpha
    if not isinstance(left, Share):
        left, right = right, left
    if not isinstance(right, Share):
        return Share(add_public(context.party, left.part, _public(context, right, left.scale)), left.scale)
    if left.scale != right.scale and max(left.scale, right.scale) % min(left.scale, right.scale):
        yield from reduced(context, left, right)
    scale = max(left.scale, right.scale)
    return Share(left.part * (scale // left.scale) + right.part * (scale // right.scale), scale)


def _neg(context: Context, value: Share) -> Protocol[Share]:
    yield from ()
    return Share(-value.part, value.scale)


def _sub(context: Context, left: Value, right: Value, *, alpha: float = 1) -> Protocol[Share]:
    return (yield from _add(context, left, right, alpha=-alpha))


def _rsub(context: Context, left: Value, right: Value, alpha: float = 1) -> Protocol[Share]:
    return (yield from _add(context, right, left, alpha=-alpha))


def _mul(context: Context, left: Value, right: Value) -> Protocol[Share]:
    return (yield from _product(context, "mul", left, right))


def _product(context: Context, function: str, left: Value, right: Value, **options: Any) -> Protocol[Share]:
    """A product of the table of `bilinear`, of two secrets or of one with what all know; the scales multiply."""
    if isinstance(left, Share) and isinstance(right, Share):
        x, y = yield from masked(context, left, right)
        return Share(product(context.party, function, x, y, **options), context.scale**2)
    share, known = (left, right) if isinstance(left, Share) else (right, left)
    if function == "mul" and isinstance(known, int | float) and float(known).is_integer():
        return Share(share.part * int(known), share.scale)
    yield from reduced(context, share)
    small = bool((torch.as_tensor(known).abs() < 1).all())
    scale = FINER if small else context.scale
    factor = _public(context, known, scale)
    pair = (share.part, factor) if share is left else (factor, share.part)
    return Share(
        bilinear_value(function, pair[0], pair[1], tuple(sorted(options.items()))), share.scale * scale
    )


def _div(context: Context, left: Value, right: Value) -> Protocol[Share]:
    if not isinstance(right, Share):
        return (yield from _mul(context, left, 1 / right))
    if not isinstance(left, Share):
        yield from reduced(context, right)
        inverse = Share(
            (yield from roots.reciprocal(context.party, right.part, context.scale)), context.scale
        )
        return (yield from _mul(context, inverse, left))
    yield from reduced(context, left, right)
    x, y = torch.broadcast_tensors(left.part, right.part)  # type: ignore[no-untyped-call]
    return Share((yield from roots.quotient(context.party, x, y, context.scale)), context.scale)


def _mm(context: Context, left: Value, right: Value) -> Protocol[Share]:
    return (yield from _product(context, "matmul", left, right))


def _addmm(
    context: Context, bias: Value, left: Value, right: Value, *, beta: float = 1, alpha: float = 1
) -> Protocol[Share]:
    total = yield from _mm(context, left, right)
    if alpha != 1:
        total = yield from _mul(context, total, alpha)
    return (yield from _add(context, total, bias, alpha=beta))


def _sum(
    context: Context, value: Share, dim: Sequence[int] | None = None, keepdim: bool = False
) -> Protocol[Share]:
    yield from ()
    dims = tuple(dim) if dim else tuple(range(value.part.dim()))
    return Share(value.part.sum(dims, keepdim=keepdim) if dims else value.part, value.scale)


def _mean(
    context: Context, value: Share, dim: Sequence[int] | None = None, keepdim: bool = False
) -> Protocol[Share]:
    total = yield from _sum(context, value, dim, keepdim)
    return (yield from _mul(context, total, total.part.numel() / max(1, value.part.numel())))


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


def _curve(name: str) -> Kernel:
    def kernel(context: Context, value: Share) -> Protocol[Share]:
        yield from reduced(context, value)
        return Share((yield from curves.curve(context.party, value.part, name, context.scale)), context.scale)

    return kernel


def _root(function: Callable[..., Protocol[torch.Tensor]]) -> Kernel:
    def kernel(context: Context, value: Share) -> Protocol[Share]:
        yield from reduced(context, value)
        return Share((yield from function(context.party, value.part, context.scale)), context.scale)

    return kernel


def _sigmoid_backward(context: Context, gradient: Share, result: Share) -> Protocol[Share]:
    slope = yield from _mul(context, result, (yield from _rsub(context, result, 1)))
    return (yield from _mul(context, gradient, slope))


def _tanh_backward(context: Context, gradient: Share, result: Share) -> Protocol[Share]:
    slope = yield from _rsub(context, (yield from _mul(context, result, result)), 1)
    return (yield from _mul(context, gradient, slope))


def _softmax(context: Context, value: Share, dim: int, half: bool) -> Protocol[Share]:
    yield from reduced(context, value)
    return Share((yield from networks.softmax(context.party, value.part, dim, context.scale)), context.scale)


def _softmax_backward(
    context: Context, gradient: Share, result: Share, dim: int, dtype: torch.dtype
) -> Protocol[Share]:
    weighted = yield from _mul(context, gradient, result)
    total = yield from _mul(context, result, (yield from _sum(context, weighted, [dim], True)))
    return (yield from _sub(context, weighted, total))


def _log_softmax(context: Context, value: Share, dim: int, half: bool) -> Protocol[Share]:
    yield from reduced(context, value)
    found = yield from networks.log_softmax(context.party, value.part, dim, context.scale)
    return Share(found, context.scale)


def _log_softmax_backward(
    context: Context, gradient: Share, result: Share, dim: int, dtype: torch.dtype
) -> Protocol[Share]:
    yield from reduced(context, result)
    powers = yield from _curve("exp_negative")(context, result)
    total = yield from _mul(context, powers, (yield from _sum(context, gradient, [dim], True)))
    return (yield from _sub(context, gradient, total))


_MEAN, _SUM = 1, 2


def _mse_loss(context: Context, value: Value, target: Value, reduction: int = _MEAN) -> Protocol[Share]:
    difference = yield from _sub(context, value, target)
    squares = yield from _mul(context, difference, difference)
    if reduction == _MEAN:
        return (yield from _mean(context, squares))
    return (yield from _sum(context, squares)) if reduction == _SUM else squares


def _mse_loss_backward(
    context: Context, gradient: Share, value: Value, target: Value, reduction: int
) -> Protocol[Share]:
    difference = yield from _sub(context, value, target)
    factor = 2 / difference.part.numel() if reduction == _MEAN else 2
    slope = yield from _mul(context, difference, factor)
    return (yield from _mul(context, slope, gradient))


def _pow(context: Context, value: Share, exponent: float) -> Protocol[Share]:
    if exponent == 0.5:
        root: Share = yield from _root(roots.sqrt)(context, value)
        return root
    if not float(exponent).is_integer() or not 1 <= exponent <= 64:
        raise SharingError(f"shares have powers of 0.5 and 1 to 64, not {exponent}: write it as exp and log")
    result: Share | None = None
    square: Share = value
    left = int(exponent)
    while left:
        if left & 1:
            result = square if result is None else (yield from _mul(context, result, square))
        left >>= 1
        if left:
            square = yield from _mul(context, square, square)
    return square if result is None else result


def _addcmul(
    context: Context, base: Share, first: Value, second: Value, *, value: float = 1
) -> Protocol[Share]:
    return (yield from _add(context, base, (yield from _mul(context, first, second)), alpha=value))


def _lerp(context: Context, value: Share, end: Value, weight: float) -> Protocol[Share]:
    return (yield from _add(context, value, (yield from _sub(context, end, value)), alpha=weight))


def _filled(value: float) -> Kernel:
    def kernel(context: Context, like: Share, **_: Any) -> Protocol[Share]:
        yield from ()
        filled = torch.full(like.part.shape, round(value * context.scale), dtype=torch.int64)
        return Share(context.party.public(filled), context.scale)

    return kernel


def _zeros(context: Context, like: Share, size: Sequence[int], *_: Any, **__: Any) -> Protocol[Share]:
    """Memory that torch asks for to fill it: zeros, never what was there."""
    yield from ()
    return Share(torch.zeros(tuple(size), dtype=torch.int64), context.scale)


def _copy(context: Context, value: Share, source: Value, non_blocking: bool = False) -> Protocol[Share]:
    yield from ()
    if isinstance(source, Share):
        return Share(source.part.expand_as(value.part), source.scale, source.masked)
    known = _public(context, source, context.scale).expand_as(value.part)
    return Share(context.party.public(known), context.scale)


def _clone(context: Context, value: Share, **_: Any) -> Protocol[Share]:
    yield from ()
    return Share(value.part.clone(), value.scale, value.masked)


def _view(name: str) -> Kernel:
    """A change of shape, of what was opened under a mask as well where `Masked` has it."""

    def kernel(context: Context, value: Share, *arguments: Any, **_: Any) -> Protocol[Share]:
        yield from ()
        part = getattr(value.part, name)(*arguments)
        opened = value.masked
        seen = getattr(opened, name)(*arguments) if opened is not None and hasattr(opened, name) else None
        return Share(part, value.scale, seen, is_view=True)

    return kernel


def _t(context: Context, value: Share) -> Protocol[Share]:
    return (yield from _view("transpose")(context, value, 0, 1)) if value.part.dim() == 2 else value


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
    total = yield from _product(context, function, value, weight, **options)
    if bias is None:
        return total
    shape = (-1, *[1] * len(stride))
    raised = Share(bias.part.reshape(shape), bias.scale) if isinstance(bias, Share) else bias.reshape(shape)
    return (yield from _add(context, total, raised))


KERNELS: dict[str, Kernel] = {
    "add": _add, "sub": _sub, "rsub": _rsub, "mul": _mul, "div": _div, "neg": _neg, "pow": _pow,
    "mm": _mm, "bmm": _mm, "addmm": _addmm, "convolution": _convolution, "sum": _sum, "mean": _mean,
    "relu": _relu, "threshold_backward": _threshold_backward,
    "sigmoid": _curve("sigmoid"), "sigmoid_backward": _sigmoid_backward, "tanh": _curve("tanh"),
    "tanh_backward": _tanh_backward, "erf": _curve("erf"), "gelu": _curve("gelu"), "silu": _curve("silu"),
    "softplus": _curve("softplus"), "exp": _curve("exp"),
    "log": _root(roots.log), "sqrt": _root(roots.sqrt), "rsqrt": _root(roots.rsqrt),
    "reciprocal": _root(roots.reciprocal),
    "_softmax": _softmax, "_softmax_backward_data": _softmax_backward, "_log_softmax": _log_softmax,
    "_log_softmax_backward_data": _log_softmax_backward, "mse_loss": _mse_loss, "mse_loss_backward": _mse_loss_backward,
    "addcmul": _addcmul, "lerp": _lerp, "ones_like": _filled(1), "zeros_like": _filled(0), "zero": _filled(0),
    "empty_like": _filled(0), "new_zeros": _zeros, "new_empty": _zeros, "new_empty_strided": _zeros,
    "copy": _copy, "clone": _clone, "t": _t, "transpose": _view("transpose"), "permute": _view("permute"),
    "view": _view("reshape"), "_unsafe_view": _view("reshape"), "expand": _view("expand"),
    "unsqueeze": _view("unsqueeze"), "squeeze": _view("squeeze"), "select": _view("select"),
}  # fmt: skip
"""ATen name, without "aten::" and the underscore of operations in place -> protocol."""
