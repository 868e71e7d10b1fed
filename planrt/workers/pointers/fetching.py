"""Many values at once: all are asked for before one is awaited; none leaves its worker before all are here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planrt.loop import all_answers, refuse_to_block, run
from planrt.workers.pointers.handle import alive
from planrt.workers.pointers.tensor import PointerTensor

_INSTEAD = "await pointer.async_get()"


def fetch_all(pointers: Sequence[PointerTensor]) -> list[Any]:
    """Returns the values behind several pointers, which are asked for at once; none leaves its worker before all are
    here.
    """
    refuse_to_block(_INSTEAD)
    return run(fetch_all_async(pointers), instead=_INSTEAD)


async def fetch_all_async(pointers: Sequence[PointerTensor]) -> list[Any]:
    """`fetch_all`, to be awaited on any loop."""
    fetches = [alive(pointer).place.objects.fetch_async(pointer, delete=False) for pointer in pointers]
    done = await all_answers(fetches)
    _remove_all(pointers, done)
    return done


def _remove_all(pointers: Sequence[PointerTensor], values: Sequence[Any]) -> None:
    for pointer, value in zip(pointers, values, strict=True):
        handle = pointer._handle
        if handle.alive:
            handle.place.objects.removed(
                handle, published=bool(value.__dict__.get("_tags")), nbytes=value.nbytes
            )
    for place in {pointer._handle.place for pointer in pointers}:
        place.flush_drops()
