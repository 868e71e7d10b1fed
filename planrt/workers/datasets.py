"""The data sets a worker holds, read in batches: anything map-style goes in, (data, target) batches come out.

A worker calls `as_batches` once when its owner adds a data set, `sample_specs` once to tell clients what a
batch looks like, and `iterate` for each training or evaluation request. Order depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch.utils.data import TensorDataset, default_collate

from planrt.errors import DataError, OptionError
from planrt.types import TensorSpec

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Data and targets of the same items: dimension 0 of both is the batch."""


@runtime_checkable
class BatchSource(Protocol):
    """What a worker reads from: a length, and batches by index."""

    def __len__(self) -> int:
        """Number of items."""

    def fetch(self, indices: torch.Tensor) -> Batch:
        """The items at `indices` (int64, one dimension) as one batch, in that order."""


class BaseDataset:
    """Tensors with an optional batch transform.

    Args:
        data: any dtype, items along dimension 0. Kept as it is: uint8 images stay uint8 until fetched.
        targets: as many items as `data`.
        transform: maps a whole batch of `data` (not one item) to what the model gets, dimension 0 unchanged.

    Raises:
        DataError: `data` and `targets` are not tensors with the same number of items.
    """

    def __init__(
        self,
        data: torch.Tensor,
        targets: torch.Tensor,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        for name, value in (("data", data), ("targets", targets)):
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                raise DataError(f"BaseDataset: {name} must be a tensor with items along dimension 0")
        if len(data) != len(targets):
            raise DataError(f"BaseDataset: {len(data)} items of data but {len(targets)} targets")
        self.data = data
        self.targets = targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Batch:
        """One transformed item and its target. Raises IndexError past the end, as sequences do."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} items")
        data, target = self.fetch(torch.tensor([index % len(self)]))
        return data[0], target[0]

    def fetch(self, indices: torch.Tensor) -> Batch:
        """The items at `indices` (int64, one dimension): selected first, transformed as one batch."""
        data = self.data.index_select(0, indices)
        return (self.transform(data) if self.transform else data), self.targets.index_select(0, indices)

    def __repr__(self) -> str:
        data, targets = TensorSpec.of(self.data), TensorSpec.of(self.targets)
        return f"BaseDataset(data={data}, targets={targets})"


class _MapStyle:
    """Any data set with `__len__` and `__getitem__`, collated item by item."""

    def __init__(self, dataset: Any, key: str) -> None:
        self._dataset = dataset
        self._key = key

    def __len__(self) -> int:
        return len(self._dataset)

    def fetch(self, indices: torch.Tensor) -> Batch:
        positions = indices.tolist()
        if hasattr(self._dataset, "__getitems__"):
            items = self._dataset.__getitems__(positions)
        else:
            items = [self._dataset[position] for position in positions]
        for item in items:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise DataError(
                    f"{_name(self._key)} must give (data, target) pairs, but gave {_describe(item)}"
                )
        try:
            data, target = default_collate([tuple(item) for item in items])
        except (TypeError, RuntimeError, ValueError) as error:  # unknown types, or items of different shapes
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{_name(self._key)}: its items cannot be put into one batch: {reason}"
            ) from error
        return data, target


def as_batches(dataset: Any, *, key: str = "") -> BatchSource:
    """Makes `dataset` readable in batches.

    `BaseDataset` and a `TensorDataset` of two tensors are fetched by tensor indexing, anything else that has
    ``fetch(indices)`` is taken as it is, and other map-style data sets go item by item (or through their
    `__getitems__`) and `torch.utils.data.default_collate`. `key` names the data set in errors.

    Raises:
        DataError: `dataset` is not map-style, or a `TensorDataset` of other than two tensors.
    """
    if isinstance(dataset, TensorDataset):
        if len(dataset.tensors) != 2:
            raise DataError(
                f"{_name(key)} must give (data, target) pairs, but is a TensorDataset of "
                f"{len(dataset.tensors)} tensors: keep two"
            )
        return BaseDataset(*dataset.tensors)
    if isinstance(dataset, BatchSource):
        return dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            f"{_name(key)} must be map-style (with __len__ and __getitem__), but is {_describe(dataset)}"
        )
    return _MapStyle(dataset, key)


def sample_specs(source: BatchSource, *, key: str = "") -> tuple[TensorSpec, TensorSpec]:
    """Specs of a batch (data, target), dimension 0 free. Fetches the first item, once.

    Raises:
        DataError: the data set is empty, or does not give tensors with one row per item.
    """
    if len(source) == 0:
        raise DataError(f"{_name(key)} is empty")
    batch = source.fetch(torch.zeros(1, dtype=torch.int64))
    for role, value in zip(("data", "target"), batch, strict=True):
        if not isinstance(value, torch.Tensor):
            raise DataError(f"{_name(key)}: {role} must be a tensor or a number, but is {_describe(value)}")
        if value.dim() == 0 or len(value) != 1:
            raise DataError(
                f"{_name(key)}: {role} of a batch of 1 item has shape {list(value.shape)}, wanted [1, ...]"
            )
    data, target = batch
    return TensorSpec.of(data, free_dims=(0,)), TensorSpec.of(target, free_dims=(0,))


def iterate(
    source: BatchSource,
    *,
    batch_size: int,
    max_nr_batches: int = -1,
    epochs: int = 1,
    shuffle: bool,
    seed: int,
) -> Iterator[Batch]:
    """Batches of `source` over `epochs` passes, at most `max_nr_batches` in all (-1: no bound, 0: none).

    With `shuffle`, one generator seeded with `seed` draws a new permutation for each pass; without it items
    come in order. The last batch of a pass may be short. Nothing is fetched before it is asked for.

    Raises:
        OptionError: an option out of range (at the call, not at the first batch).
    """
    _require("batch_size", batch_size, at_least=1)
    _require("epochs", epochs, at_least=1)
    _require("max_nr_batches", max_nr_batches, at_least=-1)
    _require("seed", seed, at_least=0, below=2**63)
    return _batches(source, batch_size, max_nr_batches, epochs, shuffle, seed)


def _batches(
    source: BatchSource, batch_size: int, bound: int, epochs: int, shuffle: bool, seed: int
) -> Iterator[Batch]:
    left = bound
    if left == 0 or len(source) == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(source), generator=generator) if shuffle else torch.arange(len(source))
        for start in range(0, len(order), batch_size):
            yield source.fetch(order[start : start + batch_size])
            left -= 1
            if left == 0:
                return


def _require(name: str, value: int, *, at_least: int, below: int | None = None) -> None:
    if type(value) is not int or value < at_least or (below is not None and value >= below):
        bound = f"an integer of at least {at_least}" + (f" and below {below}" if below is not None else "")
        raise OptionError(f"{name} must be {bound}, got {value!r}")


def _name(key: str) -> str:
    return f"data set {key!r}" if key else "the data set"


def _describe(value: Any) -> str:
    """The type of `value`, never its content: it may be private."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a value of type {type(value).__name__}"
