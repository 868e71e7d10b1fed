"""Random numbers that nobody else can know: AES-128 in counter mode under a seed of the operating system.

Source: NIST SP 800-38A (2001), section 6.5; SP 800-90A takes the same construction as a generator. A stream is one key
and one number (the upper half of the counter block); it runs on and never starts again, so no bit comes out twice.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

SEED_BYTES = 16

_zeros = np.zeros(1 << 16, np.uint8)


def new_seed() -> bytes:
    """Returns a fresh key from the operating system's entropy."""
    return secrets.token_bytes(SEED_BYTES)


_BLOCK = 16
"""Bytes of a block of AES."""
_TAKEN = 1 << 15
"""Elements that are drawn and subtracted at a time."""


class Streams:
    """All streams of one key. They share a cipher, which is set to the place of whoever draws: to make one takes as
    long as to draw 100 kB, and a party needs a stream for each request.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != SEED_BYTES:
            raise ValueError(f"a key has {SEED_BYTES} bytes, not {len(key)}")
        self._key = key
        self._cipher: CipherContext | None = None
        """None until something is drawn: of many keys nothing is."""
        self._last: Stream | None = None
        """Whose place the cipher is at."""

    def stream(self, number: int = 0) -> Stream:
        """Returns the stream with that number (below 2**64), from its beginning."""
        return Stream(self, number)

    def draw(self, stream: Stream, place: int, out: npt.NDArray[np.uint8]) -> None:
        """Fills `out` with the bytes of `stream` from `place` on."""
        cipher = self._cipher
        if cipher is None:
            cipher = self._cipher = Cipher(algorithms.AES(self._key), modes.CTR(bytes(_BLOCK))).encryptor()
        if self._last is not stream:
            self._last = stream
            block, begun = divmod(place, _BLOCK)
            cipher.reset_nonce((stream.number << 64 | block).to_bytes(_BLOCK, "big"))
            if begun:
                cipher.update(bytes(begun))
        cipher.update_into(_nothing(len(out)), out.data)


class Stream:
    """The stream of random bytes of one key and number (below 2**64). Who has both can repeat it."""

    __slots__ = ("_drawn", "_of", "number")

    def __init__(self, key: bytes | Streams, number: int = 0) -> None:
        if not 0 <= number < 1 << 64:
            raise ValueError(f"streams have numbers from 0 to 2**64 - 1, not {number}")
        self._of = key if isinstance(key, Streams) else Streams(key)
        self.number = number
        self._drawn = 0

    def octets(self, count: int) -> npt.NDArray[np.uint8]:
        """Returns `count` random bytes, as uint8 of shape (count,)."""
        out = np.empty(count, np.uint8)
        self._of.draw(self, self._drawn, out)
        self._drawn += count
        return out

    def ring(self, shape: Sequence[int]) -> torch.Tensor:
        """Returns uniform elements of the ring of integers modulo 2**64, as int64 of `shape`."""
        words = self.octets(8 * math.prod(shape)).view(np.int64)
        return torch.from_numpy(words).reshape(tuple(shape))

    def taken_from(self, values: torch.Tensor) -> torch.Tensor:
        """Returns `values`, int64 and contiguous, minus what `ring` draws in their shape: written where they are, block
        by block, which stay in the cache.
        """
        flat = values.view(-1).numpy()
        for start in range(0, len(flat), _TAKEN):
            block = flat[start : start + _TAKEN]
            np.subtract(block, self.octets(8 * len(block)).view(np.int64), out=block)
        return values

    def short(self, shape: Sequence[int]) -> torch.Tensor:
        """Returns uniform integers modulo 2**16, as int16 of `shape`."""
        return torch.from_numpy(self.octets(2 * math.prod(shape)).view(np.int16)).reshape(tuple(shape))

    def words(self, shape: Sequence[int]) -> npt.NDArray[np.uint16]:
        """Returns uniform uint16 of `shape`."""
        return self.octets(2 * math.prod(shape)).view(np.uint16).reshape(tuple(shape))

    def bits(self, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Returns uniform uint8 of `shape`: eight bits each."""
        return self.octets(math.prod(shape)).reshape(tuple(shape))


def _nothing(count: int) -> memoryview:
    global _zeros
    if len(_zeros) < count:
        _zeros = np.zeros(count, np.uint8)
    return _zeros[:count].data
