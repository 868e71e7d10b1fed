"""Fractions as integers: a value is held as the integer nearest to value * scale. The scale is public.

Source: Catrina and Saxena, "Secure Computation with Fixed-Point Numbers" (FC 2010), section 2. The usual scale is
2**16; PySyft 0.2's ``fix_precision(precision_fractional=3)`` means thousandths, a scale of 10**3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from planrt.errors import OptionError, SharingError, ValueRangeError
from planrt.types import as_whole

LIMIT = 2**62
"""Integers in shares are kept below this in size: then quotients (`quotients`) and differences of two are right."""

DEFAULT_SCALE = 2**16

_BLOCK = 1 << 16
"""Entries that are encoded, or decoded, at a time: what comes between stays in the cache. Of a million in one piece it
takes eight times as long, most of it the system's, which makes and clears memory for each step.
"""


def scale_of(*, base: int = 2, precision_fractional: int = 16) -> int:
    """Returns the scale of `precision_fractional` digits in `base`.

    Raises:
        OptionError: no whole numbers, a base below 2, or a scale from 2**31 on, at which no product fits.
    """
    base = as_whole(base, "base")
    digits = as_whole(precision_fractional, "precision_fractional")
    if base < 2 or digits < 0:
        raise OptionError(f"a scale has a base of at least 2 and no negative digits, not {base}**{digits}")
    if digits >= 31 or base**digits >= 2**31:
        raise OptionError(f"{base}**{digits} is too fine: products of values need a scale below 2**31")
    scale: int = base**digits
    return scale


def encode(values: torch.Tensor, scale: int = DEFAULT_SCALE) -> torch.Tensor:
    """Returns `values` (real numbers of any dtype) as int64, rounded to the nearest multiple of 1 / scale.

    Raises:
        ValueRangeError: a value is not finite, or its size times `scale` reaches 2**62.
        SharingError: a tensor that is sparse, quantised or nested, or has no values.
    """
    _check_dense(values)
    if values.is_complex():
        raise ValueRangeError(
            "complex numbers have no fixed-point form: share real and imaginary parts apart"
        )
    found = torch.empty(values.shape, dtype=torch.int64, device=values.device)
    for block, out in _blocks(values.detach(), found):
        if values.is_floating_point():
            exact = block.double() * scale
            least, most = torch.aminmax(exact)
            within = least.item() > -LIMIT and most.item() < LIMIT  # false of what is not a number
            _check(not within, values, scale)
            out.copy_(exact.round_())
        else:
            whole, edge = block.to(torch.int64), LIMIT // scale
            least, most = torch.aminmax(whole)
            wraps = values.dtype == torch.uint64 and least.item() < 0  # from 2**63 on
            _check(wraps or most.item() > edge or least.item() < -edge, values, scale)
            torch.mul(whole, scale, out=out)
    return found


def decode(
    values: torch.Tensor, scale: int = DEFAULT_SCALE, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Returns the inverse of `encode`, as `dtype`; whole numbers exactly, also beyond what float64 holds."""
    if scale == 1:
        return values.to(dtype)
    found = torch.empty(values.shape, dtype=dtype, device=values.device)
    for block, out in _blocks(values, found):
        out.copy_(block.double().div_(scale))
    return found


def _blocks(values: torch.Tensor, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields both, which have one shape, block by block; nothing of empty ones. `out` is contiguous."""
    flat, written = values.reshape(-1), out.view(-1)
    for start in range(0, len(flat), _BLOCK):
        yield flat[start : start + _BLOCK], written[start : start + _BLOCK]


def _check_dense(values: torch.Tensor) -> None:
    plain = values.layout is torch.strided and not values.is_quantized
    if plain and not values.is_nested and not values.is_meta:
        return
    kind, instead = (
        ("a quantised tensor has", "dequantize()")
        if values.is_quantized
        else ("a nested tensor has", "to_padded_tensor()")
        if values.is_nested
        else ("a meta tensor, without values, has", "to_empty()")
        if values.is_meta
        else (f"a tensor of layout {str(values.layout).removeprefix('torch.')} has", "to_dense()")
    )
    raise SharingError(f"{kind} no fixed-point form: convert it first, with {instead}")


def _check(bad: bool, values: torch.Tensor, scale: int) -> None:
    if not bad:
        return
    edge = LIMIT / scale
    if values.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch has no least value of these
        values = values.double()
    finite = values[values.isfinite()] if values.is_floating_point() else values
    seen = f"from {finite.min().item()} to {finite.max().item()}" if finite.numel() else "none that is finite"
    if finite.numel() < values.numel():
        seen += f", and {values.numel() - finite.numel()} that are infinite or not numbers"
    raise ValueRangeError(f"with scale {scale}, values lie between -{edge:g} and {edge:g}; these are {seen}")
