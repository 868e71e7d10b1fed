"""Ids as points of Curve25519, blinded by a secret: what private set intersection compares.

An id is hashed to a point (SHA-256 with a counter, until the number is the u coordinate of a point of the curve and not
of its twist), and a party's secret multiplies it (X25519, RFC 7748, by the `cryptography` package; the secret is a
multiple of the cofactor). Multiplying by two secrets gives the same in either order: Meadows, "A more efficient
cryptographic matchmaking protocol" (1986); Huberman, Franklin and Hogg, "Enhancing privacy and trust in electronic
communities" (1999). Points of the curve alone: what is blinded would else tell one bit of each id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from planrt.errors import JointError

WIDTH: Final = 32
"""Bytes of a point."""
_P: Final = 2**255 - 19
_A: Final = 486662


def _legendre() -> Any:
    try:
        gmpy2 = import_module("gmpy2")
    except ImportError:  # the extra `vertical` brings it; the same points without it, more slowly
        return lambda value: 1 if pow(value, (_P - 1) // 2, _P) in (0, 1) else -1
    prime = gmpy2.mpz(_P)
    return lambda value: gmpy2.legendre(value, prime)


_legendre_symbol = _legendre()


def to_point(key: bytes) -> bytes:
    """Returns the point that `key` is hashed to, as the 32 bytes of its u coordinate."""
    for counter in range(256):
        digest = hashlib.sha256(b"planrt id" + bytes([counter]) + key).digest()
        u = (int.from_bytes(digest, "little") & (2**255 - 1)) % _P
        if u > 1 and _legendre_symbol(u * (u * u + _A * u + 1) % _P) == 1:
            return u.to_bytes(WIDTH, "little")
    raise AssertionError  # one in 2**256


class Blinder:
    """A fresh secret of one party in one intersection."""

    def __init__(self) -> None:
        self._secret = X25519PrivateKey.generate()

    def blind(self, keys: Sequence[bytes]) -> torch.Tensor:
        """Returns own ids, blinded: uint8 [ids, 32]."""
        return _points(
            [self._secret.exchange(X25519PublicKey.from_public_bytes(to_point(key))) for key in keys]
        )

    def blind_again(self, points: torch.Tensor, *, whose: str) -> torch.Tensor:
        """Returns points that another party has blinded, blinded by this one's secret too, in the same order.

        Raises:
            JointError: one of them is no point that blinding gives; names the party.
        """
        raw = points.numpy().tobytes()
        exchange, load = self._secret.exchange, X25519PublicKey.from_public_bytes
        try:
            return _points([exchange(load(raw[at : at + WIDTH])) for at in range(0, len(raw), WIDTH)])
        except ValueError:
            raise JointError(
                f"party {whose!r} sent a point of small order, which no id is hashed to"
            ) from None


class PointSet:
    """Points that others are looked up in: sorted, 32 bytes each, and nothing besides."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self._sorted = np.concatenate([np.zeros(0, f"S{WIDTH}"), *map(_rows, parts)])
        self._sorted.sort()

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def has_duplicates(self) -> bool:
        """True if one of them is there twice."""
        return bool((self._sorted[1:] == self._sorted[:-1]).any())

    @property
    def sorted(self) -> torch.Tensor:
        """These points, smallest first: uint8 [points, 32]."""
        return torch.from_numpy(self._sorted.view(np.uint8).reshape(-1, WIDTH))

    def has(self, points: torch.Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Returns for each point of [points, 32] whether it is one of these."""
        wanted = _rows(points)
        if not len(self):
            return np.zeros(len(wanted), np.bool_)
        places = np.searchsorted(self._sorted, wanted).clip(max=len(self) - 1)
        return np.asarray(self._sorted[places] == wanted)


def _rows(points: torch.Tensor) -> np.ndarray[Any, Any]:
    """Points as NumPy's byte strings, without a copy. All are equally long, so that their trailing zeros count."""
    return points.contiguous().numpy().view(f"S{WIDTH}").reshape(-1)


def _points(rows: Sequence[bytes]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(rows), np.uint8).reshape(-1, WIDTH).copy())
