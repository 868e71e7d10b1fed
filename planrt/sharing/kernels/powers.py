"""Powers of shares: by products and roots for exponents that all know, by exp and log for those in shares."""

from __future__ import annotations

import math

import numpy as np
import torch

from planrt.errors import SharingError
from planrt.sharing import roots
from planrt.sharing.comparisons import below
from planrt.sharing.kernels.arithmetic import Kernel, add, curve_kernel, multiply, root_kernel
from planrt.sharing.kernels.parts import Context, Share, Value, fractional
from planrt.sharing.masked import mask
from planrt.sharing.products import bit_times
from planrt.sharing.rounds import Protocol

MOST = 64
"""The largest exponent that all know."""

MOST_DIFFERENT = 16
"""Different exponents of one tensor, which are powers of their own."""


def power(context: Context, value: Value, exponent: Value) -> Protocol[Share]:
    """Computes x**n, element by element.

    Of exponents that all know, see `_known_power`. With one in shares it is exp(n log(x)) where x is positive, and 0
    elsewhere: for x from 1 / scale to 2**40 / scale and n log(x) up to 12, off by 8 units, and by |n| times 4 units and
    3e-6 of the result. Of a number x that all know, above 0, it is exp(n log(x)).
    """
    if not isinstance(value, Share):
        return (yield from _of_known(context, value, exponent))
    if isinstance(exponent, Share):
        return (yield from _shared_power(context, value, exponent))
    known = torch.as_tensor(exponent).double()
    if known.numel() == 1 and known.dim() <= value.part.dim():
        return (yield from _known_power(context, value, float(known)))
    different = sorted({float(one) for one in known.flatten()})
    if len(different) > MOST_DIFFERENT:
        raise SharingError(
            f"powers of shares have {MOST_DIFFERENT} different exponents at most, not {len(different)}: take fewer at "
            "a time"
        )
    shape = np.broadcast_shapes(tuple(value.shape), tuple(known.shape))
    result = context.share_of(torch.zeros(shape, dtype=torch.int64))
    for one in different:
        raised = yield from _known_power(context, value, one)
        result = yield from add(
            context, result, (yield from multiply(context, raised, (known == one).long()))
        )
    return result


def _of_known(context: Context, known: Value, exponent: Share) -> Protocol[Share]:
    base = torch.as_tensor(known).double()
    if bool((base <= 0).any()):
        raise SharingError(
            "a power with a shared exponent has a base above 0: write x.abs() ** y, or torch.where"
        )
    scaled = yield from multiply(context, exponent, base.log() if base.dim() else math.log(float(base)))
    found: Share = yield from curve_kernel("exp")(context, scaled)
    return found


def _shared_power(context: Context, value: Share, exponent: Share) -> Protocol[Share]:
    value, exponent = yield from fractional(context, value, exponent)
    (masked,) = yield from mask(context.party, value.part)
    positive = (yield from below(context.party, masked, (1,))).reshape(value.shape).negated()
    logarithm = yield from root_kernel(roots.log)(context, value)
    scaled = yield from multiply(context, logarithm, exponent)
    raised: Share = yield from curve_kernel("exp")(context, scaled)
    (opened,) = yield from mask(context.party, raised.part)
    shape = raised.shape
    return Share(bit_times(context.party, positive.expand(shape), opened), raised.scale)


def _known_power(context: Context, value: Share, exponent: float) -> Protocol[Share]:
    """Computes x**n for n from -64 to 64 by squaring, of the square root (or its inverse) for halves, and of its root
    for quarters.
    """
    if not (4 * exponent).is_integer() or abs(exponent) > MOST:
        raise SharingError(
            f"shares have powers of whole numbers, halves and quarters up to 64, not {exponent}: "
            "write (x.log() * exponent).exp()"
        )
    if not exponent.is_integer():
        value = yield from root_kernel(roots.sqrt if exponent > 0 else roots.rsqrt)(context, value)
        exponent = abs(2 * exponent)
    if not exponent.is_integer():
        value = yield from root_kernel(roots.sqrt)(context, value)
        exponent = 2 * exponent
    if exponent == 0:
        return context.share_of(torch.ones(value.shape, dtype=torch.int64))
    result: Share | None = None
    square: Share = value
    left = abs(int(exponent))
    while left:
        if left & 1:
            result = square if result is None else (yield from multiply(context, result, square))
        left >>= 1
        if left:
            square = yield from multiply(context, square, square)
    if result is None:
        raise AssertionError("an exponent above 0 has a bit")
    return result if exponent > 0 else (yield from root_kernel(roots.reciprocal)(context, result))


POWERS: dict[str, Kernel] = {"pow": power}
"""ATen name -> protocol; see `kernels.ARITHMETIC`."""
