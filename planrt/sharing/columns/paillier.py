"""Paillier's additively homomorphic encryption (EUROCRYPT 1999), by the `phe` package; ciphertexts travel as bytes.

`phe` is under the GPL and is imported here alone, when it is first needed; it comes with the extra ``vertical``, as
does `gmpy2`, without which everything is several times slower. A ciphertext of `n` bits is one row of 2 * n / 8 bytes.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np
import torch

from planrt.errors import CiphertextError, OptionError
from planrt.extras import needed

SAFE_BITS: Final = 2048
"""The shortest key that is taken without being asked for: about 112 bits of security (NIST SP 800-57)."""
LEAST_BITS: Final = 1024
MOST_BITS: Final = 8192
_FINGERPRINT: Final = 16
"""Bytes of a key's fingerprint."""
_WINDOW: Final = 5
"""Bits of an exponent that `PublicKey.product` takes at a time."""


def check_bits(bits: int, *, allow_short: bool = False, warn: bool = False) -> None:
    """Raises OptionError unless keys may have that many bits; `allow_short` is for tests. `warn` of short ones."""
    if type(bits) is not int or not LEAST_BITS <= bits <= MOST_BITS or bits % 64:
        raise OptionError(f"key_bits must be a multiple of 64 from {LEAST_BITS} to {MOST_BITS}, got {bits!r}")
    if bits < SAFE_BITS and not allow_short:
        raise OptionError(
            f"a key of {bits} bits is too short to keep anybody's data: take {SAFE_BITS} or more "
            "(allow_short_key=True is for tests)"
        )
    if warn and bits < SAFE_BITS:
        warnings.warn(f"a key of {bits} bits keeps no secrets: it is for tests", UserWarning, stacklevel=3)


def _phe() -> Any:
    return needed("phe", by="training on encrypted values", extra="vertical")


class PublicKey:
    """The modulus that everybody encrypts under; Paillier's with the generator n + 1."""

    def __init__(self, modulus: int, bits: int, *, whose: str = "") -> None:
        if modulus.bit_length() != bits or modulus % 2 == 0:
            sent = f"party {whose!r} gives a public key that" if whose else "the public key"
            raise CiphertextError(
                f"{sent} has {modulus.bit_length()} bits, where {bits} were agreed on"
                if modulus % 2
                else f"{sent} is none: it is an even number"
            )
        self._key = _phe().PaillierPublicKey(modulus)
        self._number = _big()
        self.n, self.square = self._number(modulus), self._number(modulus) ** 2
        self.bits, self.width = bits, bits // 4
        digest = hashlib.sha256(modulus.to_bytes(bits // 8, "big")).digest()[:_FINGERPRINT]
        self.fingerprint = torch.from_numpy(np.frombuffer(digest, np.uint8).copy())
        """The first bytes of a SHA-256 of the modulus, uint8 [16]: it tells keys apart."""

    def encrypt(self, value: int) -> Any:
        """Returns a fresh ciphertext of ``value % n``."""
        return self._number(self._key.raw_encrypt(int(value % self.n)))

    def add(self, cipher: Any, value: int) -> Any:
        """Returns the ciphertext of a sum with a plain value, with fresh randomness: nobody can tell what was added."""
        return cipher * self.encrypt(value) % self.square

    def product(self, ciphers: Sequence[Any], factors: Sequence[int]) -> Any:
        """Returns the ciphertext of the inner product of encrypted values and plain whole numbers, of any sign.

        All powers are taken together (Straus's method): the squarings are shared.
        """
        bases, exponents = [], []
        for cipher, factor in zip(ciphers, factors, strict=True):
            if factor:
                bases.append(cipher if factor > 0 else self._number(pow(cipher, -1, self.square)))
                exponents.append(abs(factor))
        result, square = self._number(1), self.square
        if not bases:
            return result
        tables = []
        for base in bases:
            table = [result, base]
            for _ in range(2, 1 << _WINDOW):
                table.append(table[-1] * base % square)
            tables.append(table)
        length = max(one.bit_length() for one in exponents)
        mask = (1 << _WINDOW) - 1
        for shift in range((length - 1) // _WINDOW * _WINDOW, -1, -_WINDOW):
            for _ in range(_WINDOW):
                result = result * result % square
            for table, exponent in zip(tables, exponents, strict=True):
                digit = (exponent >> shift) & mask
                if digit:
                    result = result * table[digit] % square
        return result

    def to_rows(self, ciphers: Sequence[Any]) -> torch.Tensor:
        """Returns ciphertexts as uint8 [ciphertexts, width]."""
        raw = b"".join(int(one).to_bytes(self.width, "big") for one in ciphers)
        return torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, self.width).copy())

    def from_rows(self, rows: torch.Tensor, *, whose: str) -> list[Any]:
        """Returns the ciphertexts in uint8 [ciphertexts, width].

        Raises:
            CiphertextError: one is none of this key: not below its square, or not invertible; names the party.
        """
        if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != self.width:
            raise CiphertextError(
                f"party {whose!r} sent {str(rows.dtype).removeprefix('torch.')}{list(rows.shape)} as ciphertexts of "
                f"{self.width} bytes: they are of another key"
            )
        raw = rows.contiguous().numpy().tobytes()
        found = [
            self._number(int.from_bytes(raw[at : at + self.width], "big"))
            for at in range(0, len(raw), self.width)
        ]
        if not all(0 < one < self.square for one in found) or _gcd(found, self.n) != 1:
            raise CiphertextError(f"party {whose!r} sent a ciphertext of another key, or none")
        return found

    def packed(self, ciphers: Sequence[Any]) -> list[torch.Tensor]:
        """Returns ciphertexts as a message has them: rows (`to_rows`), and the key's fingerprint."""
        return [self.to_rows(ciphers), self.fingerprint]

    def taken(
        self, tensors: Sequence[torch.Tensor], count: int, what: str, *, whose: str, by: str
    ) -> list[Any]:
        """Returns the ciphertexts of a message that `packed` has made, which party `by` got from party `whose`.

        Raises:
            CiphertextError: they are another number, something else, or of another key; names both parties.
        """
        if len(tensors) != 2 or tensors[0].dim() != 2 or len(tensors[0]) != count:
            raise CiphertextError(
                f"party {whose!r} sent {by!r} something else than the {count} ciphertexts of its {what}: refused"
            )
        rows, fingerprint = tensors
        if fingerprint.dtype != torch.uint8 or not torch.equal(fingerprint, self.fingerprint):
            raise CiphertextError(
                f"party {whose!r} sent its {what} under another key than the one that {by!r} has: all parties of a run "
                "have the key that its holder gave them when it began"
            )
        return self.from_rows(rows, whose=whose)


class PrivateKey:
    """A key pair; it stays where it was made."""

    def __init__(self, bits: int) -> None:
        public, self._key = _phe().generate_paillier_keypair(n_length=bits)
        self.public = PublicKey(int(public.n), bits)

    def decrypt(self, cipher: Any) -> int:
        """Returns the value, from 0 to n - 1."""
        return int(self._key.raw_decrypt(int(cipher)))


def _big() -> Any:
    """What counts with large numbers: gmpy2's, or Python's where that is not installed."""
    try:
        gmpy2 = import_module("gmpy2")
    except ImportError:
        return int
    return gmpy2.mpz


def _gcd(values: Sequence[Any], n: Any) -> int:
    product, number = n * 0 + 1, n
    for value in values:
        product = product * value % number
    return math.gcd(int(product), int(number))
