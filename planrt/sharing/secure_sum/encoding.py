"""A model's state as one vector of the ring, times a weight, so that vectors can be added up; and the mean back.

Fractions are integers times a public scale, 2**scale_bits, rounded to the nearest (see `planrt.sharing.fixed_point`).
Of n vectors each element stays within (2**63 - 1) // n, so that their sum never leaves the ring and is exact. With
weights of 1 and more, the mean that comes back differs from the exact mean of the given values by

    at most 2**-(scale_bits + 1)    and one rounding to the entry's dtype

(of float64, roundings of its arithmetic), which is 1.2e-10 for the default of 32 bits: less than float32 can tell
apart in values over 0.002.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from planrt.errors import AggregationError, OptionError, ValueRangeError
from planrt.types import TensorSpec, as_whole

DEFAULT_SCALE_BITS: Final = 32
MOST_SCALE_BITS: Final = 48
_LOSS_SCALE: Final = 2**20
_FIGURES: Final = 4
"""At the end of a vector: 1, the weight, the samples, and the sum of their losses."""
_RING: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Sums:
    """The sum of the vectors of `members` workers: the mean of their states, and what belongs to it.

    Attributes:
        members: workers in the sum.
        weight: the sum of their weights; 0 where none has trained on anything, and then `entries` are empty.
        samples: on which they trained.
        loss: the mean over all samples; nan where there are none.
        entries: the weighted mean of each entry.
    """

    members: int
    weight: int
    samples: int
    loss: float
    entries: list[torch.Tensor]


def check_scale_bits(scale_bits: int) -> int:
    """Returns `scale_bits`, if it is a whole number from 0 to 48.

    Raises:
        OptionError: it is not.
    """
    bits = as_whole(scale_bits, "scale_bits")
    if not 0 <= bits <= MOST_SCALE_BITS:
        raise OptionError(f"scale_bits is from 0 to {MOST_SCALE_BITS}, not {bits}")
    return bits


def length(entries: Sequence[TensorSpec]) -> int:
    """Returns how many elements the vector of such entries has."""
    return sum(_elements(spec) for spec in entries) + _FIGURES


@dataclass(frozen=True, slots=True)
class Constant:
    """The elements of an entry that were not finite before training, as in a mask of -inf: `places` and `values`."""

    places: torch.Tensor
    values: torch.Tensor


def constant(entry: torch.Tensor) -> Constant | None:
    """Returns the elements of `entry` that no sum can hold, and that must stay as they are; None if there are none."""
    if not _is_fraction(entry.dtype) or bool(torch.isfinite(entry.sum())):
        return None
    places = ~torch.isfinite(entry)
    return Constant(places, entry[places]) if bool(places.any()) else None


def without(name: str, entry: torch.Tensor, constant: Constant | None) -> torch.Tensor:
    """Returns `entry` with zeros where it is `constant`.

    Raises:
        ValueRangeError: training has changed what was not finite before.
    """
    if constant is None:
        return entry
    entry, places = entry.detach().cpu(), constant.places.cpu()
    if not torch.allclose(entry[places], constant.values.cpu(), rtol=0, atol=0, equal_nan=True):
        raise ValueRangeError(f"{name} had values that are not finite, and training changed them")
    return entry.masked_fill(places, 0)


def encode(
    entries: Sequence[torch.Tensor],
    names: Sequence[str],
    *,
    weight: int,
    samples: int,
    loss: float,
    members: int,
    scale_bits: int,
) -> torch.Tensor:
    """Returns the vector of one of `members` workers: int64, 1-D. With `weight` 0 its entries count as zeros.

    Raises:
        ValueRangeError: an entry or the loss is not finite, or too large for a sum of that many; names it, and tells
            none of the values, since a coordinator reads it.
    """
    limit = _RING // members
    vector = torch.zeros(length([TensorSpec.of(one) for one in entries]), dtype=torch.int64)
    start = 0
    for name, entry in zip(names, entries, strict=True):
        flat = _flat(entry.detach().cpu())
        place = vector[start : start + len(flat)]
        start += len(flat)
        if weight:
            _encode(flat, name, place, weight, limit, 2**scale_bits if _is_fraction(entry.dtype) else 1)
    total = loss * samples * _LOSS_SCALE if samples else 0.0
    if not abs(total) <= limit:  # nan as well
        why = "too large for a sum" if math.isfinite(loss) else "infinite or not a number"
        raise ValueRangeError(f"the loss is {why}")
    if max(weight, samples) > limit:
        raise ValueRangeError(f"the number of samples is too large for a sum of {members} workers")
    vector[start:] = torch.tensor([1, weight, samples, round(total)])
    return vector


def decode(vector: torch.Tensor, entries: Sequence[TensorSpec], *, members: int, scale_bits: int) -> Sums:
    """Returns what the sum of the vectors of `members` workers says of `entries` that look like these.

    Integers and bools are rounded to the nearest, a half up.

    Raises:
        AggregationError: it is not the sum of so many vectors: their masks did not cancel.
    """
    if len(vector) != length(entries):
        raise AggregationError(f"a sum of {len(vector)} values, where the state has {length(entries)}")
    present, weight, samples, total = vector[-_FIGURES:].tolist()
    if present != members or weight < 0 or samples < 0:
        raise AggregationError(
            f"the masks of the {members} workers did not cancel, so this is no sum: one of them was given another "
            "state or other options to train with, or answered with a wrong share"
        )
    means: list[torch.Tensor] = []
    start = 0
    for spec in entries if weight else ():
        place = vector[start : start + _elements(spec)]
        start += len(place)
        means.append(_mean(place, weight, 2**scale_bits, spec.dtype).reshape(spec.shape))
    return Sums(members, weight, samples, total / _LOSS_SCALE / samples if samples else math.nan, means)


def _encode(flat: torch.Tensor, name: str, place: torch.Tensor, weight: int, limit: int, scale: int) -> None:
    if scale == 1 and not flat.is_floating_point():
        whole = flat.to(torch.int64)
        most = limit // weight
        wraps = not flat.dtype.is_signed and bool((whole < 0).any())
        if wraps or bool(((whole > most) | (whole < -most)).any()):
            raise ValueRangeError(
                f"{name} has integers that are too large: times the worker's weight a sum holds up to {limit:,} in size"
            )
        torch.mul(whole, weight, out=place)
        return
    exact = flat.double() * (float(weight) * scale)
    below = math.nextafter(float(limit), 0.0)  # what is below it is an integer below the limit
    if not bool((exact.abs() < below).all()):
        raise ValueRangeError(f"{name} {_what_is_wrong(flat, limit / scale)}")
    place.copy_(exact.round_())


def _what_is_wrong(flat: torch.Tensor, edge: float) -> str:
    if not bool(flat.isfinite().all()):
        return "has values that are infinite or not numbers"
    return (
        f"has values that are too large: times the worker's weight a sum holds up to {edge:.3g} in size, and more with "
        "a smaller scale_bits"
    )


def _mean(total: torch.Tensor, weight: int, scale: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_complex:
        real = torch.float64 if dtype == torch.complex128 else torch.float32
        return torch.view_as_complex((total.double() / (float(weight) * scale)).to(real).reshape(-1, 2)).to(
            dtype
        )
    if dtype.is_floating_point:
        return (total.double() / (float(weight) * scale)).to(dtype)
    low = total.div(weight, rounding_mode="floor")
    return (low + (2 * (total - low * weight) >= weight)).to(dtype)


def _is_fraction(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _flat(entry: torch.Tensor) -> torch.Tensor:
    plain = torch.view_as_real(entry.resolve_conj()) if entry.is_complex() else entry
    return plain.reshape(-1)


def _elements(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * (2 if spec.dtype.is_complex else 1)
