"""The few types that every room shares: references, tensor specifications, nested values."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from planrt.errors import OptionError

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
        """Returns the spec of `tensor`, with the dimensions in `free_dims` left free."""
        shape = tuple(FREE if d in free_dims else int(size) for d, size in enumerate(tensor.shape))
        return cls(shape, tensor.dtype)

    def accepts(self, tensor: torch.Tensor) -> bool:
        """Returns whether `tensor` has this dtype and a shape that fits."""
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


SINGLE: Final = frozenset({Ref, torch.Tensor, int, float, bool, str, type(None), torch.dtype})
"""Classes of most leaves: these are told apart by a look at the class alone, which takes a quarter of the time."""


def leaves(value: Nested) -> Iterator[Any]:
    """Yields everything in a nested value that is no container, left to right. Slices are containers of
    three."""
    if isinstance(value, tuple | list):
        for item in value:
            if type(item) in SINGLE:
                yield item
            else:
                yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    elif isinstance(value, slice):
        yield from leaves((value.start, value.stop, value.step))
    else:
        yield value


def map_leaves(value: Nested, change: Callable[[Any], Any]) -> Nested:
    """Copies a nested value with `change` applied to each of its `leaves`, in their order."""
    if type(value) in SINGLE:
        return change(value)
    if isinstance(value, tuple):
        return tuple([map_leaves(item, change) for item in value])
    if isinstance(value, list):
        return [map_leaves(item, change) for item in value]
    if isinstance(value, dict):
        return {key: map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(map_leaves(part, change) for part in (value.start, value.stop, value.step)))
    return change(value)


def plain(value: Any) -> Any:
    """Returns the Python number or string that `value` stands for, where it is a NumPy scalar, a tensor
    without dimensions, a member of an enumeration or a path; anything else as it is.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic | np.ndarray | torch.Tensor) and value.ndim == 0:
        item = value.item()
        return item if isinstance(item, bool | int | float | str) else value
    return value


def as_text(value: Any, argument: str) -> str:
    """`value` as a string, for the argument of that name.

    Raises:
        OptionError: it is none.
    """
    text = plain(value)
    if not isinstance(text, str):
        raise OptionError(f"{argument} is a string, not {reprlib.repr(value)} ({type(value).__name__})")
    return str.__str__(text)


def as_whole(value: Any, argument: str) -> int:
    """`value` as a whole number, for the argument of that name.

    Raises:
        OptionError: it is none.
    """
    number = plain(value)
    if not isinstance(number, int) or isinstance(number, bool):
        raise OptionError(f"{argument} is a whole number, not {reprlib.repr(value)} ({type(value).__name__})")
    return int(number)
