"""Masks: a stream of the whole ring, added to values or taken away, and where the streams of two workers come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from planrt.serde.tensors import raw_bytes
from planrt.sharing.randomness import SEED_BYTES, Stream
from planrt.sharing.secure_sum.keys import derive

_CHUNK = 1 << 15
"""Elements that are masked at a time: what is drawn stays in the processor's cache."""


def add_mask(values: torch.Tensor, seed: bytes, *, negative: bool = False) -> None:
    """Adds the mask of `seed` (16 bytes) to `values` (int64, 1-D), or subtracts it, modulo 2**64, in place."""
    stream = Stream(seed)
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK]
        drawn = stream.ring(part.shape)
        if negative:
            part -= drawn
        else:
            part += drawn


def pair_seed(agreed: bytes, group: bytes, context: bytes, one: str, other: str) -> bytes:
    """Returns the seed of the mask that two workers share, whichever of them asks."""
    first, second = sorted((one, other))
    return derive(agreed, "mask", group, context, first.encode(), second.encode(), length=SEED_BYTES)


def subtracts(name: str, other: str) -> bool:
    """Returns whether worker `name` is the one of the two that subtracts the mask which it shares with `other`."""
    return name > other


def context_of(request: bytes, tensors: Iterable[torch.Tensor]) -> bytes:
    """Returns the SHA-256 of what all workers are asked: the request as bytes, and the tensors with it."""
    digest = hashlib.sha256(len(request).to_bytes(8, "big") + request)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.digest()
