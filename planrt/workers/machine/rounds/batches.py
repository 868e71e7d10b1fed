"""Data sets read in batches: anything map-style goes in, (data, target) batches come out.

A worker calls `as_batches` once when its owner adds a data set, `sample_specs` once to tell clients what a
batch looks like, and `iterate` for each training or evaluation request. Order depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

from planrt.errors import DataError, OptionError
from planrt.plans.running import progress
from planrt.serde.dtypes import DTYPE_NAMES
from planrt.types import TensorSpec

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Data and targets of the same items: dimension 0 of both is the batch."""


@runtime_checkable
class BatchSource(Protocol):
    """A source of samples, as a worker reads from it: a length, and batches by index."""

    def __len__(self) -> int:
        """Number of items."""

    def fetch(self, indices: torch.Tensor) -> Batch:
        """Returns the items at `indices` (int64, one dimension) as one batch, in that order.

        A source with ``reads_no_items = True`` can be asked for none, and says with that what they are like.
        """


class _Tensors:
    """Two tensors with items along dimension 0."""

    reads_no_items = True

    def __init__(self, data: torch.Tensor, targets: torch.Tensor) -> None:
        self._data, self._targets = data, targets

    def __len__(self) -> int:
        return len(self._data)

    def fetch(self, indices: torch.Tensor) -> Batch:
        return self._data.index_select(0, indices), self._targets.index_select(0, indices)


class _MapStyle:
    """Any data set with `__len__` and `__getitem__`, collated item by item."""

    def __init__(self, dataset: Any, key: str) -> None:
        self._dataset = dataset
        self._key = key

    def __len__(self) -> int:
        return len(self._dataset)

    def fetch(self, indices: torch.Tensor) -> Batch:
        positions = indices.tolist()
        items = self._items(positions)
        for item in items:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise DataError(
                    f"{_name(self._key)} must give (data, target) pairs, but gave {describe(item)}{_pair_of(item)}"
                )
        try:
            data, target = default_collate([tuple(item) for item in items])
        except (TypeError, RuntimeError, ValueError) as error:  # unknown types, or items of different shapes
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{_name(self._key)}: its items cannot be put into one batch: {reason}"
            ) from error
        return data, target

    def _items(self, positions: list[int]) -> list[Any]:
        progress.began(f"a batch of {_name(self._key)}")
        position: int | None = None
        try:
            if hasattr(self._dataset, "__getitems__"):
                return list(self._dataset.__getitems__(positions))
            items = []
            for position in positions:
                items.append(self._dataset[position])
            return items
        except Exception as error:  # whatever the owner's code raises
            which = f"item {position}" if position is not None else f"items {listed(positions)}"
            raise DataError(
                f"{_name(self._key)}: {which} cannot be read: {type(error).__name__}: {first_line(error)}"
            ) from error


def listed(positions: list[int]) -> str:
    """Positions in a data set, for messages: the first few."""
    shown = ", ".join(map(str, positions[:8]))
    return shown + (f" and {len(positions) - 8} more" if len(positions) > 8 else "")


def _pair_of(item: Any) -> str:
    """What to write instead of items that are no pairs."""
    wrap = "a data set whose __getitem__ returns"
    if isinstance(item, Mapping):
        return f': write {wrap} (item["x"], item["y"]) with the names of your columns'
    if isinstance(item, tuple | list) and len(item) > 2:
        return f": write {wrap} two of them; several inputs of a model can be one tensor that its forward takes apart"
    return ""


def as_batches(dataset: Any, *, key: str = "") -> BatchSource:
    """Makes `dataset` readable in batches.

    `BaseDataset` and a `TensorDataset` of two tensors are fetched by tensor indexing, anything else that has
    ``fetch(indices)`` is taken as it is, and other map-style data sets go item by item (or through their
    `__getitems__`) and `torch.utils.data.default_collate`. `key` names the data set in errors.

    Raises:
        DataError: `dataset` is not map-style, a `TensorDataset` of other than two tensors, or on a worker.
    """
    if isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__:
        if len(dataset.tensors) != 2:
            raise DataError(
                f"{_name(key)} must give (data, target) pairs, but is a TensorDataset of "
                f"{len(dataset.tensors)} tensors: keep two"
            )
        return _Tensors(*dataset.tensors)
    if isinstance(dataset, DataLoader):
        raise DataError(
            f"{_name(key)} is a DataLoader: give its .dataset; batch sizes are said when it is trained on"
        )
    if isinstance(dataset, Mapping):
        raise DataError(
            f"{_name(key)} is a {type(dataset).__name__}, which is read by names: give one whose items are (data, "
            "target) pairs, by number"
        )
    if type(dataset).__module__.partition(".")[0] == "pandas":
        raise DataError(
            f"{_name(key)} is a pandas {type(dataset).__name__}: write BaseDataset(torch.tensor(df[columns].values), "
            "torch.tensor(df[target].values))"
        )
    if (place := getattr(dataset, "location", None)) is not None:
        raise DataError(f"{_name(key)} is on worker {place.id!r}: get() it first")
    if isinstance(dataset, BatchSource):
        return dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            f"{_name(key)} must be map-style (with __len__ and __getitem__), but is {describe(dataset)}"
        )
    return _MapStyle(dataset, key)


def sample_specs(source: BatchSource, *, key: str = "") -> tuple[TensorSpec, TensorSpec]:
    """Specs of a batch (data, target), dimension 0 free. Fetches the first item, once.

    Of an empty data set they are known where it is made of tensors without a transform of items.

    Raises:
        DataError: the data set is empty and does not say what an item would look like, or it does not give tensors with
            one row per item.
    """
    rows = min(1, len(source))
    if not rows and not getattr(source, "reads_no_items", False):
        raise DataError(
            f"{_name(key)} is empty, and what its items would look like is not known: give tensors of no rows, such as "
            "BaseDataset(torch.zeros(0, 30), torch.zeros(0)), or add it when it has items"
        )
    batch = source.fetch(torch.zeros(rows, dtype=torch.int64))
    for role, value in zip(("data", "target"), batch, strict=True):
        if not isinstance(value, torch.Tensor):
            raise DataError(f"{_name(key)}: {role} must be a tensor or a number, but is {describe(value)}")
        if value.dtype not in DTYPE_NAMES:
            raise DataError(
                f"{_name(key)}: {role} is of {value.dtype}, which does not travel: convert it, to int64 say"
            )
        if value.dim() == 0 or len(value) != rows:
            raise DataError(
                f"{_name(key)}: {role} of a batch of {rows} item has shape {list(value.shape)}, wanted [{rows}, ...]"
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
    drop_last: bool = False,
) -> Iterator[Batch]:
    """Batches of `source` over `epochs` passes, at most `max_nr_batches` in all (-1: no bound, 0: none).

    With `shuffle`, one generator seeded with `seed` draws a new permutation for each pass; without it items
    come in order. The last batch of a pass may be short; `drop_last` leaves it out, so that fewer items than a batch
    give no batches at all. Nothing is fetched before it is asked for.

    Raises:
        OptionError: an option out of range (at the call, not at the first batch).
    """
    _require("batch_size", batch_size, at_least=1)
    _require("epochs", epochs, at_least=1)
    _require("max_nr_batches", max_nr_batches, at_least=-1)
    _require("seed", seed, at_least=0, below=2**63)
    return _batches(source, batch_size, max_nr_batches, epochs, shuffle, seed, drop_last)


def smallest_batch(
    items: int, batch_size: int, max_nr_batches: int = -1, epochs: int = 1, *, drop_last: bool = False
) -> int:
    """Items in the smallest batch of `iterate`; 0 without batches."""
    whole, rest = divmod(items, batch_size)
    if drop_last:
        return batch_size if whole and max_nr_batches else 0
    if max_nr_batches == 0 or items == 0:
        return 0
    short_one_comes = rest and (max_nr_batches < 0 or max_nr_batches > whole)
    return rest if short_one_comes else batch_size


def number_of_batches(
    items: int, batch_size: int, max_nr_batches: int = -1, epochs: int = 1, *, drop_last: bool = False
) -> int:
    """Returns how many batches `iterate` gives."""
    whole, rest = divmod(items, batch_size)
    found = epochs * (whole + (rest > 0 and not drop_last))
    return found if max_nr_batches < 0 else min(found, max_nr_batches)


def _batches(
    source: BatchSource, batch_size: int, bound: int, epochs: int, shuffle: bool, seed: int, drop_last: bool
) -> Iterator[Batch]:
    left = bound
    items = len(source) - (len(source) % batch_size if drop_last else 0)
    if left == 0 or items == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(source), generator=generator) if shuffle else torch.arange(len(source))
        for start in range(0, items, batch_size):
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


def describe(value: Any) -> str:
    """Returns the type of `value`, never its content: it may be private."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a value of type {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """Returns what an error says, without the rest of it."""
    return str(error).strip().partition("\n")[0]
