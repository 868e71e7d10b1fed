"""Additive sharing: parts that add up to the secret modulo 2**64, and what can be done to them alone.

Source: Damgard, Pastro, Smart and Zakarias (CRYPTO 2012), section 1, without authentication; Bogdanov, Laur and
Willemson, "Sharemind" (ESORICS 2008), section 3, for the ring. Addition, subtraction and multiplication by public
integers are torch's own on each party's parts; `add_public` is what a party does to add a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch

from planrt.errors import SharingError
from planrt.sharing.randomness import Stream
from planrt.sharing.requests import Zero
from planrt.sharing.rounds import Party


def share(secret: torch.Tensor, count: int, stream: Stream) -> list[torch.Tensor]:
    """Returns `count` parts of `secret` (int64); any `count` - 1 of them are uniformly random.

    1. Draw all parts but the last from `stream`.
    2. The last is what is missing.

    Raises:
        SharingError: fewer than two parts, or a secret that is not int64.
    """
    if count < 2:
        raise SharingError(f"sharing takes two parties or more, not {count}")
    if secret.dtype != torch.int64:
        raise SharingError(f"shares are int64, not {secret.dtype}: encode fractions with fixed_point.encode")
    parts = [stream.ring(secret.shape) for _ in range(count - 1)]
    return [*parts, secret - reduce(torch.add, parts)]


def reconstruct(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the secret.

    Raises:
        SharingError: no parts, or of different shapes: one is of another secret.
    """
    if (
        not parts
        or len({part.shape for part in parts}) != 1
        or {part.dtype for part in parts} != {torch.int64}
    ):
        raise SharingError(f"these are no parts of one secret: {[(list(p.shape), p.dtype) for p in parts]}")
    return reduce(torch.add, parts)


def add_public(party: Party, part: torch.Tensor, value: torch.Tensor | int) -> torch.Tensor:
    """Returns this party's part of the secret plus a value that all know: the first party adds it."""
    if party.first:
        return part + value
    if not isinstance(value, torch.Tensor):
        return part
    return part.expand(np.broadcast_shapes(part.shape, value.shape))


def subtract_from_public(party: Party, value: torch.Tensor | int, part: torch.Tensor) -> torch.Tensor:
    """Returns this party's part of a value that all know minus the secret."""
    return add_public(party, -part, value)


def refresh(party: Party, part: torch.Tensor) -> torch.Tensor:
    """Returns this party's part of the same secret, in new parts that say nothing about the old ones."""
    nothing: torch.Tensor = party.supply.take(Zero(tuple(part.shape))).fixed[0]
    return part + nothing
