"""Ops that return as many results as a size or an argument says, and how many that may be.

A tensor of one element, expanded to 10^9, costs nothing; `unbind` of it makes 10^9 tensors, within one call
that no time limit interrupts, and on meta tensors just the same, so that looking at such a plan would cost
what running it costs. So these ops count first. Counting needs shapes only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

MAX_RESULTS = 1 << 16
"""The most results that one op may return."""


def _by_size(tensor: torch.Tensor, dim: int = 0) -> int:
    return tensor.size(dim)


def _by_length(tensor: torch.Tensor, length: int | Sequence[int], dim: int = 0) -> int:
    if not isinstance(length, int):
        return len(length)
    return -(-tensor.size(dim) // length) if length else 1


def _by_number(tensor: torch.Tensor, chunks: int, dim: int = 0) -> int:
    size = tensor.size(dim)
    if size == 0 or chunks <= 0:
        return chunks  # that many empty ones
    length = -(-size // chunks)
    return -(-size // length)


def _by_places(tensor: torch.Tensor, places: int | Sequence[int] | torch.Tensor, dim: int = 0) -> int:
    if isinstance(places, int):
        return places
    if isinstance(places, torch.Tensor):
        return places.numel() + 1 if places.dim() else int(places)
    return len(places) + 1


_COUNTS: Final[dict[str, Callable[..., int]]] = {
    "unbind": _by_size,
    "unbind_copy": _by_size,
    "split": _by_length,
    "split_copy": _by_length,
    "chunk": _by_number,
    "tensor_split": _by_places,
    "hsplit": _by_places,
    "vsplit": _by_places,
    "dsplit": _by_places,
}
MANY: Final = tuple(_COUNTS)
"""The words of the ops that return any number of results."""


def bounded(word: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, torch's op `word` of `MANY`, refusing to return more than `MAX_RESULTS` results."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        if _may_be_many((*args, *kwargs.values())) and (results := _count(word, args, kwargs)) > MAX_RESULTS:
            raise ValueError(f"{word} would give {results:,} results, and an op may give {MAX_RESULTS:,}")
        return function(*args, **kwargs)

    counted.__name__ = word
    return counted


def _may_be_many(values: tuple[Any, ...]) -> bool:
    """Whether it takes a closer look: where sizes, numbers and lengths are all small, results are few."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    numbers = [size for tensor in tensors for size in tensor.shape]
    numbers += [value for value in values if isinstance(value, int)]
    numbers += [len(value) for value in values if isinstance(value, list | tuple)]
    return len(tensors) > 1 or max(numbers, default=0) >= MAX_RESULTS


def _count(word: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    named = dict(kwargs)
    dim = {"dim": named.pop("dim")} if "dim" in named else {}
    given = [*args, *(named.pop(name) for name in ("input", "tensor") if name in named), *named.values()]
    try:
        return _COUNTS[word](*given, **dim)
    except TypeError:
        raise TypeError(f"{word} takes no such arguments") from None
