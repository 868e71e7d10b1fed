"""Tensors and plans that live on a worker, as their client holds them, and what happens to calls on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planrt.lazy import names_of

if TYPE_CHECKING:
    from planrt.workers.pointers.multi import MultiPointerTensor
    from planrt.workers.pointers.plan import PointerPlan
    from planrt.workers.pointers.tensor import ID_PROVIDER, PointerParameter, PointerTensor, combine_pointers

_HOMES = {
    "PointerTensor": "planrt.workers.pointers.tensor",
    "PointerParameter": "planrt.workers.pointers.tensor",
    "ID_PROVIDER": "planrt.workers.pointers.tensor",
    "combine_pointers": "planrt.workers.pointers.tensor",
    "PointerPlan": "planrt.workers.pointers.plan",
    "MultiPointerTensor": "planrt.workers.pointers.multi",
}
"""Public name -> module, imported at first use."""

__all__ = [
    "PointerTensor",
    "PointerParameter",
    "ID_PROVIDER",
    "combine_pointers",
    "PointerPlan",
    "MultiPointerTensor",
]

__getattr__ = names_of(__name__, _HOMES)
