"""PyTorch's arithmetic and functions on fixed-point shares, each a protocol over one party's view: by ATen name.

`shapes`, `ordering`, `pooling` and `layers` have the rest; `table` is the whole. Scales: what is finer than the
session's scale is brought back only where something needs that (`parts`). Fractions that all know multiply at a scale
of 2**24 relative to their size, so that 1e-6 keeps seven digits; whole numbers multiply exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import torch

from planrt.errors import SharingError
from planrt.sharing import curves, roots
from planrt.sharing.additive import add_public
from planrt.sharing.bilinear import bilinear_value, plain_value
from planrt.sharing.kernels.parts import (
    Context,
    Public,
    Share,
    Value,
    aligned,
    at,
    fractional,
    masked,
    reduced,
    scale_of_squares,
)
from planrt.sharing.kernels.sizes import (
    COARSEST,
    FINER,
    Varying,
    needs_fractions,
    number_at,
    power_for,
    size_of,
    size_of_number,
)
from planrt.sharing.masked import mask
from planrt.sharing.products import bit_times, product, square
from planrt.sharing.quotients import divide
from planrt.sharing.rounds import Protocol

_WHOLE = 2**8
"""Whole numbers from this on multiply what is at the session's scale only, to leave room."""

Kernel: TypeAlias = Callable[..., Protocol[Any]]
One: TypeAlias = Callable[..., Protocol[Share]]
"""A kernel with one result."""


def local(function: Callable[..., Any]) -> Kernel:
    """Returns the kernel of a function that opens nothing."""

    def kernel(context: Context, *args: Any, **kwargs: Any) -> Protocol[Any]:
        yield from ()
        return function(context, *args, **kwargs)

    return kernel


def linear(function: Callable[..., torch.Tensor]) -> One:
    """Returns the kernel of a function that moves, drops or adds up elements: each party does it to its part."""

    def kernel(context: Context, value: Share, *args: Public, **kwargs: Public) -> Protocol[Share]:
        yield from ()
        return Share(function(value.part, *args, **kwargs), value.scale)

    return kernel


def add(context: Context, left: Value, right: Value, *, alpha: float = 1) -> Protocol[Share]:
    """Adds alpha times the second; of one scale, or of the finer one."""
    if alpha != 1:
        right = (yield from multiply(context, right, alpha)) if isinstance(right, Share) else right * alpha
    if not isinstance(left, Share):
        left, right = right, left
    if isinstance(right, Share):
        scale = yield from aligned(context, left, right)
        return as_fine_as(Share(at(left, scale) + at(right, scale), scale), left, right)
    if left.scale > context.scale**2 and not left.fine:
        yield from reduced(context, left)
    scale = max(left.scale, context.scale) if needs_fractions(right) else left.scale
    found = Share(add_public(context.party, at(left, scale), context.public(right, scale)), scale)
    if left.known is not None and isinstance(right, float):
        found.precise = left.known + float(right)
    return as_fine_as(found, left)


def as_fine_as(found: Share, *shares: Share) -> Share:
    """Returns `found`, which is kept fine on purpose where one of `shares` is, at its scale."""
    found.fine = any(one.fine and one.scale == found.scale for one in shares)
    return found


def subtract(context: Context, left: Value, right: Value, *, alpha: float = 1) -> Protocol[Share]:
    """Subtracts alpha times the second."""
    return (yield from add(context, left, right, alpha=-alpha))


def subtract_from(context: Context, left: Value, right: Value, alpha: float = 1) -> Protocol[Share]:
    """Subtracts alpha times the first from the second."""
    return (yield from add(context, right, left, alpha=-alpha))


def negated(context: Context, value: Share) -> Protocol[Share]:
    """Returns -x."""
    yield from ()
    return Share(-value.part, value.scale)


def multiply(context: Context, left: Value, right: Value) -> Protocol[Share]:
    """Multiplies element by element. A secret bit opens only the other factor."""
    if isinstance(left, Share) and left.fine and isinstance(right, int | float):
        return (yield from _finely_multiplied(context, left, right, left.scale))
    known = _known_product(context, left, right)
    if known is not None:
        return known
    for one, other in ((left, right), (right, left)):
        if (
            isinstance(one, Share)
            and one.bit is not None
            and isinstance(other, Share)
            and one.shape == other.shape
        ):
            (opened,) = yield from masked(context, other)
            return Share(bit_times(context.party, one.bit, opened), other.scale)
    return (yield from any_product(context, "mul", left, right))


def _known_product(context: Context, left: Value, right: Value) -> Share | None:
    """The product of a public value with a share of one that all know, such as the ones that gradients begin with."""
    if isinstance(right, Share):
        left, right = right, left
    if not isinstance(left, Share) or left.known is None or context.scale == 1 or isinstance(right, Share):
        return None
    if isinstance(right, Varying):
        return None  # its scale would depend on the number itself
    values = left.known * torch.as_tensor(right).double()
    if not bool((values.abs() < 2**31).all()):
        return None
    scale = left.scale
    if needs_fractions(values * scale):
        scale = context.scale << max(0, power_for(values) + 1 - context.scale.bit_length())
    return Share(context.party.public(context.public(values, scale)), scale, known=values)


def any_product(
    context: Context, function: str, left: Value, right: Value, *, beside: Share | None = None, **options: Any
) -> Protocol[Share]:
    """Computes a product of `bilinear`, of two secrets or of one with what all know; the scales multiply.

    `beside`, which is to be added to the product, is brought to its scale where it is finer and that takes no round of
    its own.
    """
    if isinstance(left, Share) and isinstance(right, Share):
        if left.known is None and right.known is None:
            finer: tuple[Share, int] | None = None
            if beside is not None:
                scale = min(left.scale, context.scale) * min(right.scale, context.scale)
                if beside.scale > scale and beside.scale % scale == 0:
                    finer = beside, scale
            x, y = yield from masked(context, left, right, beside=finer)
            return Share(product(context.party, function, x, y, **options), left.scale * right.scale)
        if right.known is not None:
            right = right.known
        else:
            left = left.known
    if not isinstance(left, Share) and not isinstance(right, Share):
        left, right = torch.as_tensor(left), torch.as_tensor(right)
        return context.share_of(plain_value(function, left, right, **options))
    share, known = (left, right) if isinstance(left, Share) else (right, left)
    number = type(known) in (int, float)
    size = (size_of_number if number else size_of)(known)
    if size.power is not None:
        scale = 2**size.power
        wide = share.scale > context.scale > 1 and not share.fine
        room = (context.scale << FINER) // share.scale if wide else 0
        if max(scale, size.bound * scale) > room:  # a product with 1 / 64 needs none
            (share,) = yield from fractional(context, share)
    else:
        scale = 1
        if size.bound > _WHOLE:
            yield from reduced(context, share)
    factor = number_at(known, scale) if number and context.scale > 1 else context.public(known, scale)
    pair = (share.part, factor) if isinstance(left, Share) else (factor, share.part)
    chosen = tuple(sorted(options.items()))
    return Share(bilinear_value(function, pair[0], pair[1], chosen), share.scale * scale)


def divided(
    context: Context, left: Value, right: Value, *, rounding_mode: str | None = None
) -> Protocol[Share]:
    """Divides: by what all know, by a product with its inverse; else by `roots.quotient`."""
    if rounding_mode is not None:
        raise SharingError("shares are divided without rounding to whole numbers: leave rounding_mode out")
    if not isinstance(right, Share) or right.known is not None:
        values = torch.as_tensor(right.known if isinstance(right, Share) else right).double()
        if bool((values == 0).any()):
            raise SharingError("shares know no infinity: the divisor has a zero")
        if isinstance(right, Varying):
            return (yield from multiply(context, left, Varying(1 / right)))
        if values.dim() == 0 and isinstance(left, Share) and left.fine:
            return (yield from multiply(context, left, 1 / float(values)))
        return (yield from multiply(context, left, 1 / values))
    if not isinstance(left, Share):
        inverse = yield from root_kernel(roots.reciprocal)(context, right)
        return (yield from multiply(context, inverse, left))
    if right.fine and right.scale == _scale_of_means(context):  # by a root of means of squares
        if left.scale != right.scale:
            (left,) = yield from fractional(context, left)
        # Where a mean of squares is nothing, one of gradients may be a few units: a sixteenth of the session's unit
        # more in the divisor keeps their quotient small, and is nothing beside a divisor that is right.
        above = add_public(context.party, right.part, torch.tensor(right.scale // (16 * context.scale)))
        x, y = torch.broadcast_tensors(at(left, right.scale), above)  # type: ignore[no-untyped-call]
        return Share((yield from roots.quotient(context.party, x, y, context.scale)), context.scale)
    left, right = yield from fractional(context, left, right)
    x, y = torch.broadcast_tensors(left.part, right.part)  # type: ignore[no-untyped-call]
    return Share((yield from roots.quotient(context.party, x, y, context.scale)), context.scale)


def matrix_product(context: Context, left: Value, right: Value) -> Protocol[Share]:
    """As `torch.matmul`."""
    return (yield from any_product(context, "matmul", left, right))


def _addmm(
    context: Context, bias: Value, left: Value, right: Value, *, beta: float = 1, alpha: float = 1
) -> Protocol[Share]:
    """A bias that was moved by small steps is finer than a product: it is scaled down while the factors are opened, or
    what comes after would need a round for that.
    """
    beside = None
    if isinstance(bias, Share) and alpha == beta == 1 and bias.part.dim() < 2 and not bias.fine:
        bias = beside = Share(bias.part, bias.scale, bit=bias.bit, known=bias.known)
    result = yield from any_product(context, "matmul", left, right, beside=beside)
    if alpha != 1:
        result = yield from multiply(context, result, alpha)
    if beta != 1:
        bias = (yield from multiply(context, bias, beta)) if isinstance(bias, Share) else bias * beta
    return (yield from add(context, result, bias))


def total(
    context: Context,
    value: Share,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Protocol[Share]:
    """Adds up along `dim`, or all."""
    yield from ()
    dims = tuple(dim) if dim else tuple(range(value.part.dim()))
    return Share(value.part.sum(dims, keepdim=keepdim) if dims else value.part, value.scale)


def average(
    context: Context,
    value: Share,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Protocol[Share]:
    """Averages along `dim`, or of all.

    Raises:
        SharingError: there is nothing to average.
    """
    summed = yield from total(context, value, dim, keepdim)
    if not summed.part.numel():
        return summed
    if not value.part.numel():
        raise SharingError("the mean of nothing has no value")
    return (yield from divided(context, summed, value.part.numel() // summed.part.numel()))


def curve_kernel(name: str) -> One:
    """Returns the kernel of a function of `splines.CURVES`."""

    def kernel(context: Context, value: Share) -> Protocol[Share]:
        (value,) = yield from fractional(context, value)
        return Share((yield from curves.curve(context.party, value.part, name, context.scale)), context.scale)

    return kernel


def root_kernel(function: Callable[..., Protocol[torch.Tensor]]) -> One:
    """Returns the kernel of a function of `roots`."""

    def kernel(context: Context, value: Share) -> Protocol[Share]:
        (value,) = yield from fractional(context, value)
        return Share((yield from function(context.party, value.part, context.scale)), context.scale)

    return kernel


def _addcmul(
    context: Context, base: Share, first: Value, second: Value, *, value: float = 1
) -> Protocol[Share]:
    if (
        first is second
        and isinstance(first, Share)
        and first.fine
        and first.scale == _scale_of_means(context)
    ):
        product = yield from _square_of_means(context, first)
    else:
        product = yield from multiply(context, first, second)
    if first is not second or not isinstance(value, int | float) or context.scale == 1:
        return (yield from add(context, base, product, alpha=value))
    if isinstance(base, Share) and not base.fine:
        (base,) = yield from fractional(context, base)
    scale = scale_of_squares(context)
    return _fine(
        at(base, scale) + (yield from _finely_multiplied(context, product, value, scale)).part, scale
    )


def _scale_of_means(context: Context) -> int:
    """What means of gradients, and the roots that they are divided by, are kept at: 2**26 at a scale of 2**16."""
    return context.scale << max(0, 27 - context.scale.bit_length())


def _square_of_means(context: Context, value: Share) -> Protocol[Share]:
    """The square of a mean of gradients, which centred RMSprop takes away from the mean of squares: at the session's
    scale it would be more than that, where gradients are small. It holds means up to 128 at a scale of 2**16.
    """
    (opened,) = yield from mask(context.party, value.part)
    root = divide(context.party, opened, 8)
    return Share((yield from square(context.party, root)), (value.scale // 8) ** 2)


def _fine(part: torch.Tensor, scale: int) -> Share:
    made = Share(part, scale)
    made.fine = True
    return made


_DENOMINATOR = 2**8


def _finely_multiplied(context: Context, value: Share, factor: float, scale: int) -> Protocol[Share]:
    """Multiplies by a public number, to another scale, in one round at most.

    The number is a fraction of small integers, so that little room is needed: 0.001 is 1 / 1000, others are off by 2e-5
    of their size at most. What is next to 1, as 0.999, takes its difference to 1 away.
    """
    if isinstance(factor, Varying):
        return (yield from _by_a_varying_one(context, value, factor, scale))
    if 0.5 < factor < 1 and scale == value.scale:
        less = yield from _finely_multiplied(context, value, 1 - factor, scale)
        return _fine(value.part - less.part, scale)
    size = abs(factor)
    near = Fraction(size).limit_denominator(_DENOMINATOR)
    if size < 1 and size:
        near = 1 / Fraction(1 / size).limit_denominator(_DENOMINATOR)
    whole = near * scale / value.scale * (-1 if factor < 0 else 1)
    part = value.part * whole.numerator
    if whole.denominator == 1:
        return _fine(part, scale)
    (opened,) = yield from mask(context.party, part)
    return _fine(divide(context.party, opened, whole.denominator), scale)


_VARYING = 20
"""Bits that such a number has."""


def _by_a_varying_one(context: Context, value: Share, factor: Varying, scale: int) -> Protocol[Share]:
    """The same by a number that other runs have another one for: what is divided by must not depend on it, so it is a
    power of two. That takes more room, which squares do not have: they are brought to the scale of means for it.
    """
    part, means = value.part, _scale_of_means(context)
    wide = value.scale // means if scale == value.scale and value.scale % means == 0 else 1
    if wide > 1:
        (opened,) = yield from mask(context.party, part)
        part = divide(context.party, opened, wide)
    bits = min(COARSEST, _VARYING - factor.exponent)
    down = Fraction(2) ** bits * value.scale / scale
    part = part * (round(factor * 2.0**bits) * down.denominator)
    if down.numerator > 1:
        (opened,) = yield from mask(context.party, part)
        part = divide(context.party, opened, down.numerator)
    return _fine(part * wide, scale)


def _sqrt(context: Context, value: Share) -> Protocol[Share]:
    if value.precise is not None and context.scale > 1:
        # An `eps` beside nothing, as in Adadelta's first step.
        means = _scale_of_means(context)
        return _fine(context.party.public(context.public(value.precise.clamp(min=0).sqrt(), means)), means)
    if not value.fine or value.scale != scale_of_squares(context):
        return (yield from root_kernel(roots.sqrt)(context, value))
    roots.check_scale(context.scale)
    scale = _scale_of_means(context)
    return _fine((yield from roots.fine_sqrt(context.party, value.part, value.scale, scale)), scale)


def _addcdiv(
    context: Context, base: Share, first: Value, second: Value, *, value: float = 1
) -> Protocol[Share]:
    return (yield from add(context, base, (yield from divided(context, first, second)), alpha=value))


def _lerp(context: Context, value: Share, end: Value, weight: Value) -> Protocol[Share]:
    if isinstance(end, Share) and not end.fine and context.scale > 1:
        # As squares take a gradient: one below a unit would be something in its mean and nothing in theirs, and the
        # quotient of these many times what it is in the clear.
        (end,) = yield from fractional(context, end)
    difference = yield from subtract(context, end, value)
    scale = _scale_of_means(context)
    if not isinstance(weight, int | float) or context.scale == 1 or scale % value.scale:
        step = yield from multiply(context, difference, weight)
        return (yield from add(context, value, step))
    step = yield from _finely_multiplied(context, difference, weight, scale)
    return _fine(at(value, scale) + step.part, scale)


def variance(
    context: Context,
    value: Share,
    dim: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Protocol[Share]:
    """Computes the mean square of what differs from the mean, with Bessel's correction where not told otherwise."""
    dims = list(dim) if dim else list(range(value.part.dim()))
    mean = yield from average(context, value, dims, True)
    if not mean.part.numel():
        return (yield from total(context, value, dims, keepdim))
    centred = yield from subtract(context, value, mean)
    squares = yield from multiply(context, centred, centred)
    summed = yield from total(context, squares, dims, keepdim)
    count = value.part.numel() // mean.part.numel() - (1 if correction is None else correction)
    return (yield from divided(context, summed, count))


def _deviation(context: Context, value: Share, dim: Any = None, **options: Any) -> Protocol[Share]:
    found = yield from variance(context, value, dim, **options)
    return (yield from root_kernel(roots.sqrt)(context, found))


def _running_sum(
    context: Context, value: Share, dim: int, *, dtype: torch.dtype | None = None
) -> Protocol[Share]:
    yield from ()
    return Share(value.part.cumsum(dim), value.scale)


ARITHMETIC: dict[str, Kernel] = {
    "add": add,
    "sub": subtract,
    "rsub": subtract_from,
    "mul": multiply,
    "div": divided,
    "neg": negated,
    "mm": matrix_product,
    "bmm": matrix_product,
    "mv": matrix_product,
    "dot": matrix_product,
    "addmm": _addmm,
    "addmv": _addmm,
    "baddbmm": _addmm,
    "sum": total,
    "mean": average,
    "cumsum": _running_sum,
    "var": variance,
    "std": _deviation,
    "sigmoid": curve_kernel("sigmoid"),
    "tanh": curve_kernel("tanh"),
    "erf": curve_kernel("erf"),
    "silu": curve_kernel("silu"),
    "exp": curve_kernel("exp"),
    "log": root_kernel(roots.log),
    "sqrt": _sqrt,
    "rsqrt": root_kernel(roots.rsqrt),
    "reciprocal": root_kernel(roots.reciprocal),
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "lerp": _lerp,
}
"""ATen name, without "aten::" and the underscore of operations in place -> protocol."""
