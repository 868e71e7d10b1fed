"""Public places out of range, told at the call as torch tells them of plain tensors: the parties look later.

The places are looked at cheaply. Where one may be wrong, torch itself says so, on zeros of the same looks: with its own
exception, and in its own words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from planrt.sharing.tensors.twins import COMPUTED, like
from planrt.types import leaves, map_leaves

_CPU = torch.device("cpu")

Checked = tuple[torch.Tensor, int]
"""Places, and how many there are to choose from."""


def check_places(func: Any, kernel: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises what torch raises of plain tensors, IndexError or RuntimeError, where an operation reads or writes at
    public places that are not there.
    """
    found = _PLACES.get(kernel)
    if found is None:
        return
    wrong = next((one for one in found(args) if not _all_there(*one)), None)
    if wrong is None:
        return
    places, size = wrong
    told = f"{kernel}: " + (
        f"a mask of shape {list(places.shape)}"
        if places.dtype in _MASKS
        else f"places from {int(places.min())} to {int(places.max())}, and there are {size}"
    )
    if sum(one.numel() for one in leaves((args, dict(kwargs))) if isinstance(one, torch.Tensor)) > COMPUTED:
        raise IndexError(told)
    try:
        func(*map_leaves(tuple(args), _zeros), **map_leaves(dict(kwargs), _zeros))
    except (IndexError, RuntimeError) as error:
        raise type(error)(f"{told}: {error}") from None


def _zeros(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return like(leaf, leaf.dtype, _CPU) if getattr(leaf, "in_shares", False) else leaf.detach().clone()


_MASKS: Final = (torch.bool, torch.uint8)


def _all_there(places: torch.Tensor, size: int) -> bool:
    if places.dtype in _MASKS:
        return size == 0
    if not places.numel() or places.is_floating_point():
        return True
    least, most = torch.stack(torch.aminmax(places)).tolist()
    return bool(least >= 0 and most < size)


def _public(one: Any) -> bool:
    return isinstance(one, torch.Tensor) and not getattr(one, "in_shares", False)


def _along(args: Sequence[Any]) -> list[Checked]:
    whole, dim, places = args[:3]
    if not _public(places) or not -max(1, whole.dim()) <= dim < max(1, whole.dim()):
        return []
    return [(places, whole.shape[dim] if whole.dim() else 1)]


def _rows(args: Sequence[Any]) -> list[Checked]:
    whole, places = args[:2]
    return [(places, whole.shape[0])] if _public(places) and whole.dim() else []


def _between_brackets(args: Sequence[Any]) -> list[Checked]:
    """Places count from the end where they are negative; a mask (told by size 0 where it fits, else 1) has the shape of
    the dimensions that it chooses from."""
    whole, keys = args[:2]
    found: list[Checked] = []
    dim = 0
    for one in keys:
        if one is not None and _public(one) and one.dtype in _MASKS:
            found.append((one, int(one.shape != whole.shape[dim : dim + one.dim()])))
            dim += one.dim()
            continue
        if one is not None and _public(one) and dim < whole.dim() and not one.is_floating_point():
            size = whole.shape[dim]
            found.append((torch.where(one < 0, one + size, one), size))
        dim += 1
    return found


def _classes(args: Sequence[Any]) -> list[Checked]:
    scores, target, _, _, ignored = args[:5]
    if not _public(target) or target.is_floating_point() or not scores.dim():
        return []
    return [(target[target != ignored], scores.shape[1 if scores.dim() > 1 else 0])]


_PLACES: Final[dict[str, Callable[[Sequence[Any]], list[Checked]]]] = {
    **dict.fromkeys(
        ["gather", "index_select", "index_add", "index_copy", "index_fill", "scatter", "scatter_add"], _along
    ),
    **dict.fromkeys(["index", "index_put", "_index_put_impl"], _between_brackets),
    "embedding": _rows,
    **dict.fromkeys(["nll_loss_forward", "nll_loss2d_forward"], _classes),
}
"""Kernel -> the places that its arguments name."""
AT_PLACES: Final = frozenset(
    [*_PLACES, "embedding_dense_backward", "nll_loss_backward", "nll_loss2d_backward"]
)
"""Kernels to which places are tensors, also where they are a single number without dimensions."""
