"""Products of secrets, exact modulo 2**64: Beaver's triples, with masks that are opened once.

Source: Beaver, "Efficient multiparty protocols using circuit randomization" (CRYPTO 1991), section 2; for matrices
SecureML (S&P 2017), section 4.1; for bits in the ring Rotaru and Wood (INDOCRYPT 2019), section 3.
"""

from __future__ import annotations

from typing import Any

import torch

from planrt.sharing import ring
from planrt.sharing.bilinear import bilinear_sum
from planrt.sharing.masked import Bit, Masked, mask
from planrt.sharing.requests import Known, Product
from planrt.sharing.rounds import Party, Protocol


def product(party: Party, function: str, left: Masked, right: Masked, **options: Any) -> torch.Tensor:
    """Returns this party's part of f(x, y), for a function of `bilinear.BILINEAR`; no opening.

    With x = c - r and y = e - s, f(x, y) = f(c, e) - f(c, s) - f(r, e) + f(r, s).

    1. Take a part t of f(r, s) from the dealer.
    2. Return f(c, e - s) - f(r, e) + t at the first party, f(c, -s) - f(r, e) + t at the others; or, where x is the
       smaller one, f(c - r, e) - f(c, s) + t and f(-r, e) - f(c, s) + t: a weight is read, and not copied.
    """
    chosen = tuple(sorted(options.items()))
    third: torch.Tensor = party.supply.take(Product(function, left.mask, right.mask, chosen)).fixed[0]
    if left.opened.numel() <= right.opened.numel():
        pairs = [(left.share(party), right.opened), (-left.opened, right.part)]
    else:
        pairs = [(left.opened, right.share(party)), (-left.part, right.opened)]
    return bilinear_sum(function, pairs, chosen).add_(third)


def known_times_coin(party: Party, coin: Known, other: Known) -> torch.Tensor:
    """Returns this party's part of beta * v, for two values that the dealer knows."""
    part: torch.Tensor = party.supply.take(Product("mul", coin, other)).fixed[0]
    return part


def bit_times(party: Party, bit: Bit, value: Masked) -> torch.Tensor:
    """Returns this party's part of b * x, element by element; no opening.

    With b = d + (1 - 2d) beta and x = c - r, b * x = d x + (1 - 2d) (c beta - r beta).

    1. Take a part t of r * beta from the dealer.
    2. Return d [x] + (1 - 2d) (c [beta] - t).
    """
    third = known_times_coin(party, bit.coin, value.mask)
    return bit.turned(value.share(party), ring.minus(value.opened * bit.part, third))


def bit_times_bit(party: Party, left: Bit, right: Bit) -> torch.Tensor:
    """Returns this party's part of the product of two bits, as the integer 0 or 1; no opening.

    1. Take a part t of beta * gamma from the dealer.
    2. Return d e + d (1 - 2e) [gamma] + (1 - 2d) e [beta] + (1 - 2d) (1 - 2e) t.
    """
    third = known_times_coin(party, left.coin, right.coin)
    d, e = left.opened, right.opened
    mixed = d * right.turn * right.part + left.turn * (e * left.part + right.turn * third)
    return party.public(d * e) + mixed


def multiply(
    party: Party, function: str, left: torch.Tensor, right: torch.Tensor, **options: Any
) -> Protocol[torch.Tensor]:
    """Returns f(x, y) of two secrets in one round.

    1. Open both under masks.
    2. Combine (`product`).
    """
    x, y = yield from mask(party, left, right)
    return product(party, function, x, y, **options)


def square(party: Party, value: torch.Tensor) -> Protocol[torch.Tensor]:
    """Returns x * x in one round, with one mask."""
    (x,) = yield from mask(party, value)
    return product(party, "mul", x, x)
