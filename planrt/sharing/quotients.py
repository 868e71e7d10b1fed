"""Division of a secret by a public number, which brings a product of two fixed-point values back to one scale.

`divide` is off by less than one unit, always: the mask's wrap around 2**64 is told apart by the top bit of what was
opened. Sources: Catrina and Saxena (FC 2010), section 3.3, for division by masked opening; Escudero, Ghosh, Keller,
Rachuri and Scholl, "Improved primitives for MPC over mixed arithmetic-binary circuits" (CRYPTO 2020), section 5.1, for
probabilistic truncation in a ring with one bit of slack. `truncate_alone` is SecureML's local truncation (S&P 2017,
section 4.1), for two parties.
"""

from __future__ import annotations

import torch

from planrt.errors import OptionError, SharingError
from planrt.sharing import ring
from planrt.sharing.fixed_point import LIMIT
from planrt.sharing.masked import Masked, mask
from planrt.sharing.requests import Given, Known, Low, Product
from planrt.sharing.rounds import Party, Protocol
from planrt.types import as_whole


def check_divisor(divisor: int) -> None:
    """Raise OptionError unless `divisor` is from 1 to 2**62 - 1."""
    if not 1 <= as_whole(divisor, "a public divisor") < LIMIT:
        raise OptionError(f"a public divisor is a whole number from 1 to 2**62 - 1, not {divisor}")


def shifted(opened: torch.Tensor, divisor: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Returns what is public of a quotient.

    That is floor((c + offset) / divisor), -1 where c + offset has its top bit set and 0 elsewhere, and
    offset / divisor. The offset makes secrets from -2**62 + divisor to 2**62 - 1 positive.
    """
    steps = LIMIT // divisor
    raised = opened + steps * divisor
    return ring.floor_divided(raised, divisor, signed=False), raised >> 63, steps


def divide(party: Party, value: Masked, divisor: int) -> torch.Tensor:
    """Returns this party's part of x / divisor, for -2**62 + divisor <= x < 2**62; no opening.

    The result q is one of the two integers next to x / divisor (x / divisor itself where it is one and the divisor is a
    power of two), the nearer one with the greater probability: |q - x / divisor| < 1, and the mean error is below
    divisor / 2**62. Let c = x + offset + r, opened, x + offset in [0, 2**63). If c < 2**63 and r >= 2**63, c has lost
    2**64; otherwise r < 2**63 or nothing was lost. So x + offset = c - r, where r is read as signed if c < 2**63, and
    as unsigned otherwise.

    1. Take a part of what r takes away, floor(r / divisor), r unsigned where c >= 2**63 and signed elsewhere (`lost`).
    2. Return floor(c / divisor) - offset / divisor at the first party, less that.
    """
    check_divisor(divisor)
    quotient, high, steps = shifted(value.opened, divisor)
    lost = quotient_of_mask(party, value.mask, divisor, high)
    return ring.minus(quotient.sub_(steps), lost) if party.first else lost.neg_()


def quotient_of_mask(
    party: Party, mask: Known, divisor: int, high: torch.Tensor, coin: Known | None = None
) -> torch.Tensor:
    """Returns this party's part of floor(r / divisor), r read as unsigned where `high` is -1 and as signed where it is
    0; times beta, if the `coin` is given.

    Let u and s be the two quotients. For a power of two u - s is 2**64 / divisor where r has its top bit set, and 0
    elsewhere; so up to 2**16 it takes the low bits of that bit alone: 10 bytes of the dealer's in place of 16.

    1. Take parts of s, and of the top bit, or of u where the divisor is another one.
    2. Return u or s, by `high`.
    """
    place = divisor.bit_length() - 1
    s = _known_part(party, mask.changed("divide", divisor), coin)
    if divisor == 1 << place and 1 <= place <= 16:
        top = mask.changed("top")
        low = party.supply.take(Low(top, top if coin is None else coin)).fixed[0]
        apart: torch.Tensor = low.to(torch.int64).bitwise_left_shift_(64 - place).bitwise_and_(high)
        return apart.add_(s)
    return ring.chosen(high, _known_part(party, mask.changed("divide_unsigned", divisor), coin), s)


def _known_part(party: Party, known: Known, coin: Known | None) -> torch.Tensor:
    request = Given(known) if coin is None else Product("mul", coin, known)
    part: torch.Tensor = party.supply.take(request).fixed[0]
    return part


def truncate(party: Party, value: torch.Tensor, divisor: int) -> Protocol[torch.Tensor]:
    """Returns x / divisor in one round; see `divide`.

    1. Open x under a mask.
    2. Divide.
    """
    (masked,) = yield from mask(party, value)
    return divide(party, masked, divisor)


def truncate_alone(party: Party, part: torch.Tensor, divisor: int) -> torch.Tensor:
    """Returns x / divisor by two parties with no opening and no dealer, wrong by 2**64 / divisor now and then.

    The error is at most one unit with probability 1 - |x| / 2**63, for each element (SecureML, theorem 1): fit for
    |x| below about 2**30, and for nothing that is done a million times. `truncate` has no such case.

    Raises:
        SharingError: there are more than two parties, whose parts can wrap more than once.
    """
    check_divisor(divisor)
    if party.count != 2:
        raise SharingError(f"local truncation is for two parties, not {party.count}: use truncate")
    if party.first:
        return torch.div(part, divisor, rounding_mode="floor")
    return -torch.div(-part, divisor, rounding_mode="floor")
