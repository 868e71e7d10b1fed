"""torch's calls on lists of tensors (`torch._foreach_add_`, ...), as the calls on each tensor that they stand
for.

Optimizers and gradient clipping make them. A plan holds the plain ops: they compute the same, the table stays
as small as it is, and whoever reads the plan sees what happens to which tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

_METHODS: Final = """
    abs acos add addcdiv addcmul asin atan ceil clamp_max clamp_min copy cos cosh div erf erfc exp expm1 floor frac
    lerp lgamma log log10 log1p log2 maximum minimum mul neg pow reciprocal round rsqrt sigmoid sign sin sinh sqrt
    sub tan tanh trunc zero
"""
_VALUE_LAST: Final = ("addcdiv", "addcmul")  # the factor that is the keyword `value` of the single op

TensorCall = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def _on_each() -> dict[Any, tuple[str, Callable[..., Any]]]:
    """Function on lists -> (its word, the function on one tensor)."""
    found: dict[Any, tuple[str, Callable[..., Any]]] = {}
    for word in _METHODS.split():
        for suffix in ("", "_"):
            many = getattr(torch, f"_foreach_{word}{suffix}", None)
            one = getattr(torch.Tensor, f"{word}{suffix}", None)
            if many is not None and one is not None:
                found[many] = (word, one)
    found[torch._foreach_norm] = ("norm", torch.linalg.vector_norm)
    return found


ON_EACH: Final = _on_each()


def calls(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[TensorCall]:
    """Yields the call on each tensor that ``function(*args, **kwargs)`` stands for, `function` being one of
    `ON_EACH`.

    Arguments that are lists belong to the tensors one by one; the others to all of them.
    """
    word, one = ON_EACH[function]
    tensors, *rest = args
    if word in _VALUE_LAST and len(rest) == 3:
        kwargs = {**kwargs, "value": rest.pop()}
    for index, tensor in enumerate(tensors):
        yield (
            one,
            (tensor, *(_item(argument, index) for argument in rest)),
            {key: _item(value, index) for key, value in kwargs.items()},
        )


def _item(argument: Any, index: int) -> Any:
    return argument[index] if isinstance(argument, list | tuple) else argument
