"""Many values at once: all are asked for before one is awaited; none leaves its worker before all are here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from planrt.workers.pointers.tensor import PointerTensor


def fetch_all(pointers: Sequence[PointerTensor]) -> list[Any]:
    """The values behind several pointers, asked for at once; none leaves its worker before all are here."""
    asked = [(pointer, pointer.location.begin_fetch(pointer)) for pointer in pointers]
    values = [pointer.location.end_fetch(pointer, one) for pointer, one in asked]
    _remove_all(pointers, values)
    return values


async def fetch_all_async(pointers: Sequence[PointerTensor]) -> list[Any]:
    """`fetch_all`, to be awaited on any loop."""
    fetches = [pointer.location.fetch_async(pointer, delete=False) for pointer in pointers]
    done = await asyncio.gather(*fetches, return_exceptions=True)
    for one in done:
        if isinstance(one, BaseException):
            raise one
    _remove_all(pointers, done)
    return done


def _remove_all(pointers: Sequence[PointerTensor], values: Sequence[Any]) -> None:
    for pointer, value in zip(pointers, values, strict=True):
        if pointer._handle.alive:
            published = bool(value.__dict__.get("_tags"))
            pointer.location.removed(pointer._handle, published=published, nbytes=value.nbytes)
    for worker in {pointer.location for pointer in pointers}:
        worker._connection.flush_drops()
