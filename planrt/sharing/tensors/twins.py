"""What results will look like, told from tensors of zeros: shapes, dtypes, strides. No values, no shares."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from planrt.sharing.tensors.sessions import Shapes
from planrt.types import leaves, map_leaves

_CPU, _META = torch.device("cpu"), torch.device("meta")

_KEPT: OrderedDict[Any, Any] = OrderedDict()
"""What operations on arguments of these looks give, as tensors without values."""
_MOST = 4096


def twin_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Returns the results as torch tells them from tensors without values: shapes, dtypes, strides."""
    try:
        key = (func, _frozen(args), _frozen(kwargs))
        found = _KEPT.get(key, _KEPT)
    except TypeError:  # an argument of another kind
        return _new_twin(func, args, kwargs)
    if found is _KEPT:
        found = _KEPT[key] = _new_twin(func, args, kwargs)
        if len(_KEPT) > _MOST:
            _KEPT.popitem(last=False)
    return found


def _frozen(value: Any) -> Any:
    """All that the looks of results depend on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, list | tuple):
        return type(value), *map(_frozen, value)
    if isinstance(value, dict):
        return tuple((key, _frozen(one)) for key, one in value.items())
    return type(value), value


def shapes_of(twin: Any) -> Shapes:
    """Returns the shapes of results, in their nesting."""
    if isinstance(twin, tuple | list):
        return tuple(shapes_of(one) for one in twin)
    return twin.shape if isinstance(twin, torch.Tensor) else None


COMPUTED = 1 << 22
"""Elements up to which the looks of results are found by computing with zeros."""


def _new_twin(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Results on tensors of zeros, without their values.

    torch's own tensors without values would do, but the first use of these imports some 900 modules, which takes
    seconds; they are for what is large, and for operations that integers do not have.
    """
    tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    device = _CPU if sum(one.numel() for one in tensors) <= COMPUTED else _META
    if device == _CPU:
        state = torch.get_rng_state()
        try:
            return map_leaves(_twin_on(_CPU, func, args, kwargs), _without_values)
        except (RuntimeError, NotImplementedError) as error:
            if "not implemented" not in str(error) and "ZeroDivision" not in str(error):  # by the zeros
                raise
        finally:
            torch.set_rng_state(state)
    return _twin_on(_META, func, args, kwargs)


def _twin_on(device: torch.device, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    wants_flags = func._schema.name in ("aten::where", "aten::masked_fill", "aten::masked_fill_")
    flags = args[0 if func._schema.name == "aten::where" else 1] if wants_flags else None

    def twin(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            dtype = torch.bool if wants_flags and leaf.dtype == torch.int64 and leaf is flags else leaf.dtype
            return like(leaf, dtype, device)
        return device if isinstance(leaf, torch.device) else leaf

    return func(*map_leaves(tuple(args), twin), **map_leaves(kwargs, twin))


def like(leaf: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns zeros (on meta: nothing) that lie in memory as `leaf` does."""
    offset = leaf.storage_offset()
    reach = 1 + sum((size - 1) * step for size, step in zip(leaf.shape, leaf.stride(), strict=True))
    whole = torch.zeros(int(offset + max(reach, 0)), dtype=dtype, device=device)
    return whole.as_strided(leaf.shape, leaf.stride(), offset)


def _without_values(leaf: Any) -> Any:
    return like(leaf, leaf.dtype, _META) if isinstance(leaf, torch.Tensor) else leaf
