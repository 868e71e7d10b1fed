"""The few types that every room shares: references, tensor specifications, nested values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

FREE = -1
"""A dimension of a `TensorSpec` that may have any size."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A value of a plan by number: inputs first, then state, then op results, in the order they arise."""

    index: int

    def __repr__(self) -> str:
        return f"_{self.index}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape (sizes, `FREE` for any size) and dtype of a tensor that is not there yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor, *, free_dims: Sequence[int] = ()) -> TensorSpec:
        """The spec of `tensor`, with the dimensions in `free_dims` left free."""
        shape = tuple(FREE if d in free_dims else int(size) for d, size in enumerate(tensor.shape))
        return cls(shape, tensor.dtype)

    def accepts(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` has this dtype and a shape that fits."""
        return (
            tensor.dtype == self.dtype
            and tensor.dim() == len(self.shape)
            and all(want in (FREE, have) for want, have in zip(self.shape, tensor.shape, strict=True))
        )

    def __str__(self) -> str:
        sizes = ", ".join("*" if size == FREE else str(size) for size in self.shape)
        return f"{str(self.dtype).removeprefix('torch.')}[{sizes}]"


Nested: TypeAlias = Any
"""A value built from tuples, lists and dicts (string keys) whose leaves are `Ref`s, tensors or constants."""


def leaves(value: Nested) -> Iterator[Any]:
    """The leaves of a nested value, in order (dicts in the order of their keys)."""
    match value:
        case list() | tuple():
            for item in value:
                yield from leaves(item)
        case dict():
            for item in value.values():
                yield from leaves(item)
        case _:
            yield value


def map_leaves(function: Callable[[Any], Any], value: Nested) -> Nested:
    """`value` with every leaf replaced by ``function(leaf)``, in the order of `leaves`."""
    match value:
        case list():
            return [map_leaves(function, item) for item in value]
        case tuple():
            return tuple(map_leaves(function, item) for item in value)
        case dict():
            return {key: map_leaves(function, item) for key, item in value.items()}
        case _:
            return function(value)
