"""What a function on shares will cost, told before anything is sent: a dry run without secrets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planrt.sharing.kernels.parts import Share
from planrt.sharing.programs.asking import size_of
from planrt.sharing.programs.lowering import lower
from planrt.sharing.programs.needs import needs_of
from planrt.sharing.tensors.shared import SharedTensor
from planrt.types import leaves


@dataclass(frozen=True, slots=True)
class Preflight:
    """The costs of one run of a function on shares. `str` of it is a page for people."""

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

    def seconds_at(self, latency: float) -> float:
        """Returns how many seconds the rounds wait for messages that take `latency` seconds one way."""
        return self.rounds * latency

    def __str__(self) -> str:
        waits = ", ".join(
            f"{1000 * self.seconds_at(one):,.0f} ms at {1000 * one:g} ms" for one in (0.001, 0.01, 0.05)
        )
        return "\n".join(
            [
                f"{self.calls:,} operations on shares of {self.parties} parties",
                f"  rounds              {self.rounds:,} (waiting {waits} of latency)",
                f"  sent by each party  {self.bytes_sent:,} B",
                f"  from the dealer     {self.bytes_dealt:,} B to the last party, {self.randomness:,} pieces",
            ]
        )


def preflight(function: Callable[..., Any], args: Sequence[Any], *, parties: int, scale: int) -> Preflight:
    """Returns what ``function(*args)`` will cost on shares of `parties` parties at `scale`.

    Nothing is computed with values. Assumed are fresh shares, of which nothing was opened before.

    Raises:
        SharingError: the function does what shares cannot.
    """
    lowered = lower(function, args, scale=scale)
    shared = [one for one in leaves(list(args)) if isinstance(one, SharedTensor)]
    operands: list[Any] = []
    for one in lowered.operands:
        if isinstance(one, torch.Tensor):
            operands.append(one)
            continue
        like = shared[one]
        part = torch.zeros(like.shape, dtype=torch.int64)
        operands.append(Share(part, scale if like.dtype.is_floating_point else 1))
    needs = needs_of(lowered.program, operands, party=parties - 1, count=parties, scale=scale)
    dealt = sum(size_of(one.fixed) for one in needs.requests)
    return Preflight(
        calls=len(lowered.program.calls),
        rounds=len(needs.sent),
        bytes_sent=sum(needs.sent) * (parties - 1),
        randomness=len(needs.requests),
        bytes_dealt=dealt,
        parties=parties,
    )
