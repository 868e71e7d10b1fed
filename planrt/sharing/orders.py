"""The order of secrets: which are the largest, the smallest, or in the middle, and where.

All pairs are compared, with one opening of the values; an entry's rank is how many come before it, a sum of bits that
opens nothing. Ranks are small numbers: which entry has a rank is found by comparing few bits, and a one-hot row of bits
moves a value to its place for nothing, since the values are masked already. Equal entries stay in their order. The
cost grows with the square of the entries, the rounds do not.

Source: enumeration sort by ranks, Muller and Preparata, "Bounds to complexities of networks for sorting and for
switching" (JACM 1975), section 2, with all comparisons at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from planrt.errors import SharingError
from planrt.sharing.comparisons import equal_to, signs, to_bit
from planrt.sharing.masked import Bit, mask
from planrt.sharing.products import bit_times
from planrt.sharing.requests import pair_differences, pairs
from planrt.sharing.rounds import Party, Protocol

MOST = 256
"""Entries that are put in order at most."""

MOST_PAIRS = 1 << 23
"""So many squares of entries, over all rows, at most: of each pair a party holds some 100 bytes meanwhile."""

_RANK_BITS = 8
"""What ranks below `MOST` have."""


class Ordered(NamedTuple):
    """The entries that have the ranks that were asked for: values and places, each (ranks, *rest), and which they are,
    as bits (entries, ranks, *rest); None where there is one entry.
    """

    value: torch.Tensor
    place: torch.Tensor
    winners: Bit | None


def check_entries(what: str, count: int, rows: int) -> None:
    """Raises SharingError where there are more entries than are put in order, by what the caller asked for."""
    if count > MOST:
        raise SharingError(
            f"{what} puts {MOST} entries of shares in order at most, not {count}: take max, min, argmax or topk(1), or "
            "sort parts"
        )
    if count * count * rows > MOST_PAIRS:
        raise SharingError(
            f"{what} of {rows:,} rows of {count} entries compares more than {MOST_PAIRS // 2:,} pairs: take fewer rows "
            "at a time"
        )


def ordered(party: Party, values: torch.Tensor, ranks: Sequence[int]) -> Protocol[Ordered]:
    """Returns the entries of those ranks along the first dimension, 0 for the largest, in seven rounds. Exact where
    differences do not leave -2**63 .. 2**63 - 1.

    1. Open the values under masks.
    2. Compare all pairs: [x_i < x_j] for i < j (3 rounds). The rank of i is how many j > i are larger, and how many
       j < i are not smaller, so that equal entries stay in their order.
    3. Open the ranks under masks, and find [rank_i == r] for each r (3 rounds).
    4. Sum bit * value and bit * place over the entries.
    """
    count, rest = len(values), tuple(values.shape[1:])
    size = math.prod(rest)
    if count <= 1 or not size or not ranks:
        kept = values[: len(ranks)].clone()
        return Ordered(kept, torch.zeros_like(kept), None)
    (masked,) = yield from mask(party, values.reshape(count, size))
    first, second = pairs(count)
    known = masked.mask.changed("pairs", shape=(len(first), size))
    smaller = yield from signs(party, pair_differences(masked.opened), known)
    bits = yield from to_bit(party, smaller, (len(first), size))
    share = bits.share(party)
    before = party.public(torch.arange(count)[:, None].expand(count, size)).clone()
    before = before.index_add_(0, first, share).index_add_(0, second, share, alpha=-1)
    (rank,) = yield from mask(party, before)
    hot = yield from equal_to(party, rank, list(ranks), _RANK_BITS)  # (ranks, count, size)
    wide = masked.reshape((1, count, size)).expand(hot.shape)
    value = bit_times(party, hot, wide).sum(1)
    place = (hot.share(party) * torch.arange(count)[:, None]).sum(1)
    winners = hot.transpose(0, 1).reshape((count, len(ranks), *rest))
    shape = (len(ranks), *rest)
    return Ordered(value.reshape(shape), place.reshape(shape), winners)
