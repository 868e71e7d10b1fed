"""Updates are looked at before they count: names, shapes, dtypes, finite values, counts, and how far they go."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from planrt.errors import UpdateRefusedError
from planrt.types import TensorSpec
from planrt.workers.results import FitResult


def most_samples(
    length: int, *, batch_size: int, epochs: int, max_nr_batches: int, drop_last: bool
) -> tuple[int, int]:
    """Returns how many (samples, batches) training gives on a data set of `length` items.

    The other arguments are those of a `TrainConfig`.
    """
    batches = length // batch_size if drop_last else math.ceil(length / batch_size)
    samples = batches * batch_size if drop_last else length
    wanted = epochs * batches if max_nr_batches < 0 else min(epochs * batches, max_nr_batches)
    if not batches:
        return 0, 0
    passes, rest = divmod(wanted, batches)
    return passes * samples + min(rest * batch_size, samples), wanted


def check_update(
    result: FitResult,
    *,
    before: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    most: tuple[int, int],
    max_norm: float | None = None,
) -> None:
    """Raises unless `result` can count.

    Args:
        result: what a worker returned from a round.
        before: what it was sent, every entry of the plan's state by name.
        wanted: those entries that training can change: it must return these, all of them, and no others.
        most: the (samples, batches) that its data set gives, of which it cannot have seen more.
        max_norm: the longest update that counts: the Euclidean norm over all floating-point entries of what it
            returned, less what it was sent. None for any.

    Raises:
        UpdateRefusedError: it has other entries, shapes or dtypes, values that are infinite or no numbers where
            they were finite, more samples or batches than there are, or a longer update.
    """

    def refuse(why: str) -> UpdateRefusedError:
        return UpdateRefusedError(why, worker_id=result.worker_id)

    entries = result.entries
    if entries.keys() != wanted.keys():
        odd = ", ".join(sorted(entries.keys() ^ wanted.keys())[:5])
        raise refuse(f"its update must have the entries that training changes; these differ: {odd}")
    for name, like in wanted.items():
        value = entries[name]
        if value.shape != like.shape or value.dtype != like.dtype:
            raise refuse(f"{name!r} of its update is {TensorSpec.of(value)}, not {TensorSpec.of(like)}")
    if result.samples > most[0] or result.batches > most[1]:
        raise refuse(
            f"it says that it trained on {result.samples:,} samples in {result.batches:,} batches, and its data set "
            f"as it was announced gives {most[0]:,} in {most[1]:,}"
        )
    for name, value in entries.items():
        if broken := _not_finite(value, before[name]):
            raise refuse(f"{name!r} of its update has {broken:,} values that are infinite or no numbers")
    if max_norm is not None and (norm := update_norm(entries, before)) > max_norm:
        raise refuse(f"its update has the norm {norm:.4g}, over max_update_norm={max_norm:g}")


def update_norm(entries: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> float:
    """Returns the Euclidean norm of `entries` less `before`, over all floating-point and complex entries."""
    squares = 0.0
    for name, value in entries.items():
        if value.is_floating_point() or value.is_complex():
            wide = torch.promote_types(value.dtype, torch.float32)
            squares += (
                float(torch.linalg.vector_norm(value.to(wide) - before[name].to(wide), dtype=_double(wide)))
                ** 2
            )
    return math.sqrt(squares)


def _double(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _not_finite(value: torch.Tensor, before: torch.Tensor) -> int:
    """How many elements of `value` are not finite that were: a mask of -inf may stay one."""
    if not (value.is_floating_point() or value.is_complex()):
        return 0
    total = value.sum()  # finite only if all elements are; the reverse does not hold, as sums overflow
    if bool(torch.isfinite(total)):
        return 0
    return int((~torch.isfinite(value) & torch.isfinite(before)).sum())
