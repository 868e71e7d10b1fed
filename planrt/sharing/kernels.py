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
from planrt.sharing import curves, roots, selection
from planrt.sharing.additive import add_public
from planrt.sharing.bilinear import bilinear_value
from planrt.sharing.fixed_point import encode
from planrt.sharing.masked import Bit, Masked, mask
from planrt.sharing.products import product
from planrt.sharing.quotients import divide
from planrt.sharing.rounds import Party, Protocol

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


def add(context: Context, left: Value, right: Value, *, alpha: float = 1) -> Protocol[Share]:
    """Adds alpha times the second; of one scale, or of the finer one."""
    if alpha != 1:
        right = (yield from multiply(context, right, alpha)) if isinstance(right, Share) else right * alpha
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


def subtract(context: Context, left: Value, right: Value, *, alpha: float = 1) -> Protocol[Share]:
    """Subtracts alpha times the second."""
    return (yield from add(context, left, right, alpha=-alpha))


def subtract_from(context: Context, left: Value, right: Value, alpha: float = 1) -> Protocol[Share]:
    """Subtracts alpha times the first from the second."""
    return (yield from add(context, right, left, alpha=-alpha))


def multiply(context: Context, left: Value, right: Value) -> Protocol[Share]:
    """Multiplies element by element."""
    return (yield from any_product(context, "mul", left, right))


def any_product(
    context: Context, function: str, left: Value, right: Value, **options: Any
) -> Protocol[Share]:
    """Computes a product of `bilinear`, of two secrets or of one with what all know; the scales multiply."""
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
        return (yield from multiply(context, left, 1 / right))
    if not isinstance(left, Share):
        yield from reduced(context, right)
        inverse = Share(
            (yield from roots.reciprocal(context.party, right.part, context.scale)), context.scale
        )
        return (yield from multiply(context, inverse, left))
    yield from reduced(context, left, right)
    x, y = torch.broadcast_tensors(left.part, right.part)  # type: ignore[no-untyped-call]
    return Share((yield from roots.quotient(context.party, x, y, context.scale)), context.scale)


def _mm(context: Context, left: Value, right: Value) -> Protocol[Share]:
    return (yield from any_product(context, "matmul", left, right))


def _addmm(
    context: Context, bias: Value, left: Value, right: Value, *, beta: float = 1, alpha: float = 1
) -> Protocol[Share]:
    result = yield from _mm(context, left, right)
    if alpha != 1:
        result = yield from multiply(context, result, alpha)
    return (yield from add(context, result, bias, alpha=beta))


def total(
    context: Context, value: Share, dim: Sequence[int] | None = None, keepdim: bool = False
) -> Protocol[Share]:
    """Adds up along `dim`, or all."""
    yield from ()
    dims = tuple(dim) if dim else tuple(range(value.part.dim()))
    return Share(value.part.sum(dims, keepdim=keepdim) if dims else value.part, value.scale)


def average(
    context: Context, value: Share, dim: Sequence[int] | None = None, keepdim: bool = False
) -> Protocol[Share]:
    """Averages along `dim`, or of all."""
    summed = yield from total(context, value, dim, keepdim)
    return (yield from multiply(context, summed, summed.part.numel() / max(1, value.part.numel())))


def curve_kernel(name: str) -> Kernel:
    """Returns the kernel of a function of `splines.CURVES`."""

    def kernel(context: Context, value: Share) -> Protocol[Share]:
        yield from reduced(context, value)
        return Share((yield from curves.curve(context.party, value.part, name, context.scale)), context.scale)

    return kernel


def root_kernel(function: Callable[..., Protocol[torch.Tensor]]) -> Kernel:
    """Returns the kernel of a function of `roots`."""

    def kernel(context: Context, value: Share) -> Protocol[Share]:
        yield from reduced(context, value)
        return Share((yield from function(context.party, value.part, context.scale)), context.scale)

    return kernel


def _pow(context: Context, value: Share, exponent: float) -> Protocol[Share]:
    if exponent == 0.5:
        root: Share = yield from root_kernel(roots.sqrt)(context, value)
        return root
    if not float(exponent).is_integer() or not 1 <= exponent <= 64:
        raise SharingError(f"shares have powers of 0.5 and 1 to 64, not {exponent}: write it as exp and log")
    result: Share | None = None
    square: Share = value
    left = int(exponent)
    while left:
        if left & 1:
            result = square if result is None else (yield from multiply(context, result, square))
        left >>= 1
        if left:
            square = yield from multiply(context, square, square)
    return square if result is None else result


def _addcmul(
    context: Context, base: Share, first: Value, second: Value, *, value: float = 1
) -> Protocol[Share]:
    return (yield from add(context, base, (yield from multiply(context, first, second)), alpha=value))


def _lerp(context: Context, value: Share, end: Value, weight: float) -> Protocol[Share]:
    return (yield from add(context, value, (yield from subtract(context, end, value)), alpha=weight))


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
        return Share(part, value.scale, seen)

    return kernel


def _cat(context: Context, values: Sequence[Value], dim: int = 0) -> Protocol[Share]:
    shares = [one for one in values if isinstance(one, Share)]
    if len(shares) < len(values):
        raise SharingError("cat of shares and of what all know: share all of them")
    if len({one.scale for one in shares}) > 1:
        yield from reduced(context, *shares)
    return Share(torch.cat([one.part for one in shares], dim), shares[0].scale)


def _fill(context: Context, value: Share, known: float) -> Protocol[Share]:
    filled: Share = yield from _filled(float(known))(context, value)
    return filled


def _slice(
    context: Context,
    value: Share,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Protocol[Share]:
    yield from ()
    places: list[slice] = [slice(None)] * value.part.dim()
    places[dim] = slice(start, end, step)
    return Share(value.part[tuple(places)], value.scale)


def _abs(context: Context, value: Share) -> Protocol[Share]:
    return Share((yield from selection.absolute(context.party, value.part)), value.scale)


def _sgn(context: Context, value: Share) -> Protocol[Share]:
    return Share((yield from selection.sign(context.party, value.part)) * context.scale, context.scale)


def _slice_backward(
    context: Context, gradient: Share, sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Protocol[Share]:
    yield from ()
    part = torch.zeros(tuple(sizes), dtype=torch.int64)
    places: list[slice] = [slice(None)] * len(sizes)
    places[dim] = slice(start, end, step)
    part[tuple(places)] = gradient.part
    return Share(part, gradient.scale)


def _clamp(
    context: Context, value: Share, min: float | None = None, max: float | None = None
) -> Protocol[Share]:
    low, high = (None if bound is None else round(bound * value.scale) for bound in (min, max))
    return Share((yield from selection.clamp(context.party, value.part, low, high)), value.scale)


def _amax(context: Context, value: Share, dim: Sequence[int] = (), keepdim: bool = False) -> Protocol[Share]:
    if len(dim) != 1:
        raise SharingError("the largest of shares is taken along one dimension: write amax(dim=...)")
    found, _ = yield from selection.largest(context.party, value.part, dim[0])
    return Share(found.unsqueeze(dim[0]) if keepdim else found, value.scale)


def _t(context: Context, value: Share) -> Protocol[Share]:
    return (yield from _view("transpose")(context, value, 0, 1)) if value.part.dim() == 2 else value


ARITHMETIC: dict[str, Kernel] = {
    "add": add,
    "sub": subtract,
    "rsub": subtract_from,
    "mul": multiply,
    "div": _div,
    "neg": _neg,
    "pow": _pow,
    "mm": _mm,
    "bmm": _mm,
    "addmm": _addmm,
    "sum": total,
    "mean": average,
    "sigmoid": curve_kernel("sigmoid"),
    "tanh": curve_kernel("tanh"),
    "erf": curve_kernel("erf"),
    "gelu": curve_kernel("gelu"),
    "silu": curve_kernel("silu"),
    "softplus": curve_kernel("softplus"),
    "exp": curve_kernel("exp"),
    "log": root_kernel(roots.log),
    "sqrt": root_kernel(roots.sqrt),
    "rsqrt": root_kernel(roots.rsqrt),
    "reciprocal": root_kernel(roots.reciprocal),
    "addcmul": _addcmul,
    "lerp": _lerp,
    "ones_like": _filled(1),
    "zeros_like": _filled(0),
    "zero": _filled(0),
    "empty_like": _filled(0),
    "new_zeros": _zeros,
    "new_empty": _zeros,
    "new_empty_strided": _zeros,
    "copy": _copy,
    "clone": _clone,
    "t": _t,
    "transpose": _view("transpose"),
    "permute": _view("permute"),
    "view": _view("reshape"),
    "_unsafe_view": _view("reshape"),
    "expand": _view("expand"),
    "unsqueeze": _view("unsqueeze"),
    "squeeze": _view("squeeze"),
    "select": _view("select"),
    "slice": _slice,
    "cat": _cat,
    "fill": _fill,
    "abs": _abs,
    "clamp": _clamp,
    "amax": _amax,
    "sgn": _sgn,
    "sign": _sgn,
    "slice_backward": _slice_backward,
}
"""ATen name, without "aten::" and the underscore of operations in place -> protocol; `layers` adds more."""
