"""Shamir's secret sharing: any `threshold` shares give the secret, and fewer say nothing about it.

Source: Shamir, "How to Share a Secret" (CACM 22(11), 1979). The field is that of the integers modulo 2**521 - 1, a
Mersenne prime: a secret of up to 64 bytes is one element. The share of place x (1, 2, ...) is f(x) for a random
polynomial f of degree threshold - 1 with f(0) the secret.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence

from planrt.errors import SharingError

PRIME = 2**521 - 1
SHARE_BYTES = 66
"""A share takes this many bytes, big end first."""
SECRET_BYTES = 64
"""A secret has at most this many."""


def split(
    secret: bytes, threshold: int, places: Sequence[int], below: Callable[[int], int] = secrets.randbelow
) -> list[bytes]:
    """Returns a share of `secret` for each of `places`. `below(n)` draws a uniform integer of 0 .. n - 1.

    Raises:
        SharingError: a secret that is too long, a place below 1 or twice, or fewer places than `threshold`.
    """
    if len(secret) > SECRET_BYTES:
        raise SharingError(f"a secret has at most {SECRET_BYTES} bytes, not {len(secret)}")
    if not 1 <= threshold <= len(places):
        raise SharingError(f"{threshold} of {len(places)} shares cannot be made to give a secret")
    if len(set(places)) < len(places) or min(places) < 1 or max(places) >= PRIME:
        raise SharingError("the places of shares are different whole numbers from 1 on")
    coefficients = [int.from_bytes(secret, "big"), *(below(PRIME) for _ in range(threshold - 1))]
    shares = []
    for place in places:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * place + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


class Restorer:
    """Gives secrets back from shares at the same `places`, `threshold` of them or more."""

    def __init__(self, places: Collection[int]) -> None:
        self._weights: dict[int, int] = {}
        for place in places:  # Lagrange's polynomial through all places, at 0
            above, below = 1, 1
            for other in places:
                if other != place:
                    above = above * other % PRIME
                    below = below * (other - place) % PRIME
            self._weights[place] = above * pow(below, -1, PRIME) % PRIME

    def restore(self, shares: Mapping[int, bytes], length: int) -> bytes:
        """Returns the secret of `length` bytes that `shares`, by place, are of.

        Raises:
            SharingError: a share is missing, malformed, or of another secret than the others.
        """
        if shares.keys() != self._weights.keys():
            raise SharingError(f"the shares of {len(self._weights)} places give the secret, not these")
        secret = 0
        for place, weight in self._weights.items():
            share = shares[place]
            if len(share) != SHARE_BYTES or (value := int.from_bytes(share, "big")) >= PRIME:
                raise SharingError("malformed share")
            secret = (secret + weight * value) % PRIME
        if secret >= 1 << (8 * length):
            raise SharingError("these shares are not of one secret")
        return secret.to_bytes(length, "big")
