"""What a function on shares will cost, and whether its values stay in the range, told before anything is sent.

A dry run without secrets tells both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planrt.errors import SharingError, ValueRangeError
from planrt.sharing.kernels.parts import Share
from planrt.sharing.programs.lowering import Looks, Lowered, lower
from planrt.sharing.programs.needs import dry_run, widest_scales
from planrt.sharing.programs.ranges import Interval, Overflow, Ranges, interval_of, shape_of
from planrt.sharing.programs.running import Failed
from planrt.sharing.requests import size_of
from planrt.sharing.tensors.shared import SharedTensor
from planrt.types import leaves


@dataclass(frozen=True, slots=True)
class Preflight:
    """The costs of one run of a function on shares, and where values may leave the range. `str` of it is a page for
    people.
    """

    calls: int
    """Operations on shares."""
    rounds: int
    """Openings: each waits for one message from every other party."""
    bytes_sent: int
    """By each party, to all others together."""
    randomness: int
    """Pieces of correlated randomness."""
    bytes_dealt: int
    """From the dealer to the last party; all others receive a seed."""
    parties: int
    overflows: tuple[Overflow, ...] = ()
    """Calls whose results may leave the range, if the arguments keep to the bounds that were given."""
    unknown: tuple[str, ...] = ()
    """Operations whose results could be anything, as far as the analysis knows: nothing is said about what follows."""
    bounded: bool = False
    """Whether there were bounds; without any nothing is said about ranges."""

    def seconds_at(self, latency: float) -> float:
        """Returns how many seconds the rounds wait for messages that take `latency` seconds one way."""
        return self.rounds * latency

    def raise_for_overflows(self) -> Preflight:
        """Returns itself, if no value can leave the range.

        Raises:
            ValueRangeError: one may; names the call, its bounds, and the range.
        """
        if self.overflows:
            raise ValueRangeError(_said(self.overflows))
        return self

    def __str__(self) -> str:
        waits = ", ".join(
            f"{1000 * self.seconds_at(one):,.0f} ms at {1000 * one:g} ms" for one in (0.001, 0.01, 0.05)
        )
        lines = [
            f"{self.calls:,} operations on shares of {self.parties} parties",
            f"  rounds              {self.rounds:,} (waiting {waits} of latency)",
            f"  sent by each party  {self.bytes_sent:,} B",
            f"  from the dealer     {self.bytes_dealt:,} B to the last party, {self.randomness:,} pieces",
        ]
        if self.bounded:
            kept = "all values stay in it" if not self.unknown else "the values that are known stay in it"
            lines.append(f"  range               {_said(self.overflows) if self.overflows else kept}")
        if self.bounded and self.unknown:
            lines.append(f"  not known           after {', '.join(self.unknown)}")
        return "\n".join(lines)


def _said(overflows: Sequence[Overflow]) -> str:
    more = f"; and {len(overflows) - 1} more" if len(overflows) > 1 else ""
    return f"{overflows[0]}{more}: take fewer digits, or smaller values"


def preflight(
    function: Callable[..., Any],
    args: Sequence[Any],
    *,
    parties: int,
    scale: int,
    bounds: Sequence[Interval | None] = (),
) -> Preflight:
    """Returns what ``function(*args)`` will cost on shares of `parties` parties at `scale`.

    Nothing is computed with values. Assumed are fresh shares, of which nothing was opened before. `bounds` are the
    least and the greatest value of each argument in shares, or None.

    Raises:
        SharingError: the function does what shares cannot.
        ValueRangeError: with arguments in these bounds a value is beyond the range, whatever they are.
    """
    shared = [one for one in leaves(list(args)) if isinstance(one, SharedTensor | Looks)]
    return cost(lower(function, args, scale=scale), shared, parties=parties, scale=scale, bounds=bounds)


def cost(
    lowered: Lowered,
    shared: Sequence[SharedTensor | Looks],
    *,
    parties: int,
    scale: int,
    bounds: Sequence[Interval | None] = (),
) -> Preflight:
    """`preflight`, of what is lowered, for these arguments in shares."""
    known: list[Interval | None] = []
    given = [*bounds, *[None] * (len(shared) - len(bounds))]
    for one in lowered.operands:
        known.append(interval_of(one) if isinstance(one, torch.Tensor) else given[one])
    needs, values = dry_run(
        lowered.program, _zeros(lowered, shared, scale), party=parties - 1, count=parties, scale=scale
    )
    failed = next((one for one in values if isinstance(one, Failed)), None)
    if failed is not None:
        raise failed.error if isinstance(failed.error, SharingError) else SharingError(str(failed.error))
    bounded = any(one is not None for one in given)
    scales = widest_scales(lowered.program, _zeros(lowered, shared, scale), scale=scale) if bounded else {}
    ranges = Ranges(lowered.program, known, [shape_of(one) for one in values], scales)
    certain = [one for one in ranges.overflows if one.certain]
    if certain:
        raise ValueRangeError(_said(certain))
    return Preflight(
        calls=len(lowered.program.calls),
        rounds=len(needs.sent),
        bytes_sent=sum(needs.sent) * (parties - 1),
        randomness=len(needs.requests),
        bytes_dealt=sum(size_of(one.fixed) for one in needs.requests),
        parties=parties,
        overflows=tuple(ranges.overflows),
        unknown=tuple(ranges.unknown),
        bounded=bounded,
    )


def _zeros(lowered: Lowered, shared: Sequence[SharedTensor | Looks], scale: int) -> list[Any]:
    """The operands of a dry run."""
    made: list[Any] = []
    for one in lowered.operands:
        if isinstance(one, torch.Tensor):
            made.append(one)
            continue
        part = torch.zeros(tuple(shared[one].shape), dtype=torch.int64)
        made.append(Share(part, scale if shared[one].dtype.is_floating_point else 1))
    return made
