"""What follows from signs: relu, abs, clamp, a choice by a secret bit, the largest and smallest of several.

A `Bit` times a value that is masked already costs no opening (`products.bit_times`), so all of these cost the openings
of a comparison, and no more. Exact on integers; where differences are compared, for differences that do not leave
-2**63 .. 2**63 - 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from planrt.errors import SharingError, ValueRangeError
from planrt.sharing import ring
from planrt.sharing.additive import add_public
from planrt.sharing.comparisons import below, negative, signs, to_bit
from planrt.sharing.fixed_point import LIMIT
from planrt.sharing.gates import all_of
from planrt.sharing.masked import Bit, Masked, mask
from planrt.sharing.products import bit_times, product
from planrt.sharing.quotients import check_divisor, quotient_of_mask, shifted
from planrt.sharing.requests import pair_differences, pairs
from planrt.sharing.rounds import Party, Protocol
from planrt.types import as_whole

GROUP = 16
"""So many values are compared all with all, in 5 or 6 rounds; more of them go through a tree of groups."""


def rectified(
    party: Party, value: Masked, divisor: int = 1, least: int = 0, *, coarse: int = 0
) -> Protocol[tuple[torch.Tensor, Bit]]:
    """Returns max(x, 0) / divisor, and the bit [x >= least], which is the derivative; three rounds after the masking.

    `least` is 0 or 1, as the derivative at 0 is to be 1 or 0; with 1, -2**63 counts as positive. With `coarse`, which
    looks at fewer bits, what is below 2**coarse + `least` may count as 0 as well.

    1. Find the sign b.
    2. Multiply 1 - b by x, or by the quotient (`bit_times_quotient`).
    """
    least += (1 << coarse) if coarse else 0
    bits = yield from below(party, value, (least,), coarse=coarse)
    positive = bits.reshape(value.shape).negated()
    if divisor == 1:
        return bit_times(party, positive, value), positive
    return bit_times_quotient(party, positive, value, divisor), positive


def relu(party: Party, value: torch.Tensor, divisor: int = 1) -> Protocol[torch.Tensor]:
    """Returns max(x, 0) / divisor in four rounds: 12.4 bytes sent to each other party per element."""
    (masked,) = yield from mask(party, value)
    result, _ = yield from rectified(party, masked, divisor)
    return result


def bit_times_quotient(party: Party, bit: Bit, value: Masked, divisor: int) -> torch.Tensor:
    """Returns b * (x / divisor), with the quotient of `quotients.divide`; no opening.

    With the quotient Q - S, Q public and S = u or s by the public top bit of c:

    1. Take parts of S and of beta S (`quotients.quotient_of_mask`).
    2. Return d [Q - S] + (1 - 2d) (Q [beta] - [beta S]).
    """
    check_divisor(divisor)
    quotient, high, steps = shifted(value.opened, divisor)
    quotient = quotient.sub_(steps)
    lost = quotient_of_mask(party, value.mask, divisor, high)
    hidden = quotient_of_mask(party, value.mask, divisor, high, bit.coin)
    plain = ring.minus(quotient, lost) if party.first else lost.neg_()
    return bit.turned(plain, ring.minus(quotient * bit.part, hidden))


def absolute(party: Party, value: torch.Tensor) -> Protocol[torch.Tensor]:
    """Returns |x| in four rounds; -2**63 has none and stays."""
    (masked,) = yield from mask(party, value)
    bit = yield from negative(party, masked)
    return value - 2 * bit_times(party, bit, masked)


def sign(party: Party, value: torch.Tensor) -> Protocol[torch.Tensor]:
    """Returns -1, 0 or 1 in four rounds."""
    (masked,) = yield from mask(party, value)
    bits = (yield from below(party, masked, (0, 1))).share(party)
    return add_public(party, -bits[0] - bits[1], 1)


def clamp(
    party: Party, value: torch.Tensor, low: int | None = None, high: int | None = None
) -> Protocol[torch.Tensor]:
    """Returns x, but at least `low` and at most `high`, which are public, in four rounds. As in torch, `high` wins.

    1. Open x under a mask.
    2. Compare with both bounds at once.
    3. Add [x < low] (low - x) and [x > high] (high - x).
    """
    bounds = [as_whole(bound, "a bound") for bound in (low, high) if bound is not None]
    if any(abs(bound) >= LIMIT for bound in bounds):
        raise ValueRangeError(f"bounds lie between -2**62 and 2**62, not {bounds}")
    if low is not None and high is not None and low > high:
        low, bounds = high, [high, high]
    if not bounds:
        return value
    (masked,) = yield from mask(party, value)
    bits = yield from below(party, masked, bounds)
    for index, bound in enumerate(bounds):
        bit = bits.narrow(0, index, 1).reshape(value.shape)
        if index or low is None:
            bit = bit.negated()
        value = value - bit_times(party, bit, masked.plus(-bound))
    return value


def where(
    party: Party, condition: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> Protocol[torch.Tensor]:
    """Returns `first` where `condition` is 1, `second` where it is 0, for a condition of secret bits; one round."""
    bit, difference = yield from mask(party, condition, first - second)
    return second + product(party, "mul", bit, difference)


def maximum(party: Party, left: torch.Tensor, right: torch.Tensor) -> Protocol[torch.Tensor]:
    """Returns the larger of two, element by element, in four rounds."""
    return right + (yield from relu(party, left - right))


def minimum(party: Party, left: torch.Tensor, right: torch.Tensor) -> Protocol[torch.Tensor]:
    """Returns the smaller of two, element by element, in four rounds."""
    return left - (yield from relu(party, left - right))


def winners(party: Party, value: Masked) -> Protocol[Bit]:
    """Returns one-hot bits of the largest along the first dimension of (k, n), the first of equals.

    All pairs are compared.

    1. Compare c_i - c_j with r_i - r_j for all i < j: no further opening of values, two rounds.
    2. AND what speaks for each i: one round for every factor of 4 in k - 1.
    3. Hide the results with coins, one round.
    """
    count, size = value.shape
    if count == 1:
        found = np.full((1, -(-size // 8)), 255 if party.first else 0, np.uint8)
        return (yield from to_bit(party, found, (1, size)))
    number = count * (count - 1) // 2
    mask_of_pairs = value.mask.changed("pairs", shape=(number, size))
    lost = yield from signs(party, pair_differences(value.opened), mask_of_pairs)
    won = lost ^ np.uint8(255) if party.first else lost
    first, second = (one.numpy() for one in pairs(count))
    for_each = np.stack([np.concatenate([lost[second == i], won[first == i]]) for i in range(count)], 1)
    found = yield from all_of(party, for_each)
    return (yield from to_bit(party, found, (count, size)))


class Largest(NamedTuple):
    """The largest of several: values, places (zeros if not asked for) and, of up to 16, one-hot bits (k, n)."""

    value: torch.Tensor
    place: torch.Tensor
    winners: Bit | None


def leading(
    party: Party,
    values: torch.Tensor,
    dim: int,
    *,
    index: bool = False,
    labels: torch.Tensor | None = None,
) -> Protocol[Largest]:
    """Returns the largest along `dim`, which it was and, if asked for, the place of the first of them (else zeros).

    `labels`, public and shaped like `values`, stand for the places if given.

    1. Take groups of up to 16 along `dim`; open them under masks, with the places that they stand for.
    2. Find the winner of each group (`winners`), and sum bit * value and bit * place over the group.
    3. Again, with what the groups gave, until one is left.
    """
    rest = values.movedim(dim, 0)
    if not rest.shape[1:].numel():  # nothing is asked for
        nothing = torch.zeros(rest.shape[1:], dtype=torch.int64)
        return Largest(nothing, nothing.clone(), None)
    if not len(rest):
        raise SharingError(
            f"there is no largest of nothing: dimension {dim} of {list(values.shape)} is empty"
        )
    shape, values = rest.shape[1:], rest.reshape(len(rest), math.prod(rest.shape[1:]))
    places = None
    if index or labels is not None:
        known = torch.arange(len(values))[:, None].expand(values.shape)
        if labels is not None:
            known = labels.movedim(dim, 0).reshape(values.shape)
        places = party.public(known)
    one_group, bit = len(values) <= GROUP, None
    while len(values) > 1:
        group = _group(len(values))
        whole = len(values) // group * group
        parts = [_columns(one[:whole], group) for one in (values, places) if one is not None]
        left = [one[whole:] for one in (values, places) if one is not None]
        size = values.shape[1]
        masked = yield from mask(party, *parts)
        bit = yield from winners(party, masked[0])
        chosen = [bit_times(party, bit, one).sum(0).reshape(whole // group, size) for one in masked]
        joined = [torch.cat(pair) for pair in zip(chosen, left, strict=True)]
        values, places = joined[0], joined[1] if places is not None else None
    found = places[0].reshape(shape) if places is not None else torch.zeros(shape, dtype=torch.int64)
    return Largest(values[0].reshape(shape), found, bit if one_group else None)


def largest(
    party: Party, values: torch.Tensor, dim: int, *, index: bool = False
) -> Protocol[tuple[torch.Tensor, torch.Tensor]]:
    """Returns the largest along `dim` and, if asked for, the place of the first of them (else zeros): see `leading`."""
    found = yield from leading(party, values, dim, index=index)
    return found.value, found.place


def _group(count: int) -> int:
    return count if count <= GROUP else 4


def _columns(values: torch.Tensor, group: int) -> torch.Tensor:
    """(groups * group, n) -> (group, groups * n), neighbours in one group."""
    groups, count = len(values) // group, values.shape[1]
    return values.reshape(groups, group, count).transpose(0, 1).reshape(group, groups * count)
