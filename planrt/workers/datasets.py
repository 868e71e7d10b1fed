"""The data sets a worker holds, read in batches: anything map-style goes in, (data, target) batches come out.

A worker calls `as_batches` once when its owner adds a data set, `sample_specs` once to tell clients what a
batch looks like, and `iterate` for each training or evaluation request. Order depends on the seed alone.

A client's `BaseDataset` may itself lie on a worker: its tensors are pointers then, and so are its batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias, runtime_checkable

import torch
from torch.utils.data import Dataset, TensorDataset, default_collate

from planrt.errors import DataError, LocalError, MixedLocationsError, OptionError
from planrt.types import TensorSpec
from planrt.workers.loop import on_loop
from planrt.workers.pointers import Handle, PointerTensor, make_pointer

if TYPE_CHECKING:
    from planrt.workers.clients import BaseWorker

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Data and targets of the same items: dimension 0 of both is the batch."""


@runtime_checkable
class BatchSource(Protocol):
    """What a worker reads from: a length, and batches by index."""

    def __len__(self) -> int:
        """Number of items."""

    def fetch(self, indices: torch.Tensor) -> Batch:
        """The items at `indices` (int64, one dimension) as one batch, in that order."""


class BaseDataset(Dataset[Batch]):
    """Tensors with an optional batch transform, here or on a worker.

    `send` gives a data set of pointers; pointers that a search found make one just as well. Its batches are
    pointers too: they are put together on the worker, and the transform's torch calls run there.

    Args:
        data: any dtype, items along dimension 0. Kept as it is: uint8 images stay uint8 until fetched.
        targets: as many items as `data`, in the same place.
        transform: maps a whole batch of `data` (not one item) to what the model gets, dimension 0 unchanged.

    Raises:
        DataError: `data` and `targets` are not tensors with the same number of items.
        MixedLocationsError: they are in different places.
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
        if _location(data) is not _location(targets):
            raise MixedLocationsError(
                f"BaseDataset: its data is {_place(data)} and its targets are {_place(targets)}: bring them together "
                "with move() or get()"
            )
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
        """The items at `indices` (int64, one dimension): selected first, transformed as one batch.

        Of a data set on a worker only the indices travel, and the call does not wait.
        """
        worker = self.location
        if worker is not None:
            (indices,) = _pointers([indices], worker.put([indices]))
        data = self.data.index_select(0, indices)
        return (self.transform(data) if self.transform else data), self.targets.index_select(0, indices)

    @property
    def location(self) -> BaseWorker | None:
        """The worker that holds data and targets; None while they are here."""
        return _location(self.data)

    def send(
        self, worker: BaseWorker, *, private: bool = False, allowed_users: Sequence[str] | None = None
    ) -> BaseDataset:
        """Sends data and targets in one message; this data set stays as it is.

        Args:
            worker: where to.
            private: nobody may read what arrives, or what is computed from it.
            allowed_users: only these users may.

        Returns:
            A data set of pointers, with the same transform.

        Raises:
            LocalError: it is on a worker already. WorkerLostError: the worker's connection has ended.
        """
        allowed = self._allowed(worker, private, allowed_users)
        return self._with(_pointers(self._tensors(), worker.put(self._tensors(), allowed=allowed)))

    async def async_send(
        self, worker: BaseWorker, *, private: bool = False, allowed_users: Sequence[str] | None = None
    ) -> BaseDataset:
        """`send`, to be awaited on any loop."""
        allowed = self._allowed(worker, private, allowed_users)
        return self._with(_pointers(self._tensors(), await _put(worker, self._tensors(), allowed)))

    def get(self) -> BaseDataset:
        """Brings data and targets back; the pointers are used up.

        Raises:
            LocalError: they are here. GetNotPermittedError: they are private.
        """
        from planrt.workers.objects import fetch_all

        return self._with(fetch_all(self._remote()))

    async def async_get(self) -> BaseDataset:
        """`get`, to be awaited on any loop."""
        from planrt.workers.objects import fetch_all_async

        return self._with(await fetch_all_async(self._remote()))

    def tag(self, *tags: str) -> Self:
        """Tags data and targets alike: on a worker that publishes them, else the tags travel with `send`."""
        if not all(isinstance(one, str) and 0 < len(one) <= 200 for one in tags):
            raise LocalError("tags are strings of 1 to 200 characters")
        for value in (self.data, self.targets):
            if isinstance(value, PointerTensor):
                value.tag(*tags)
            else:
                value.__dict__["_tags"] = (*value.__dict__.get("_tags", ()), *tags)
        return self

    def describe(self, description: str) -> Self:
        """Gives data and targets a description, whose words `search` finds."""
        for value in (self.data, self.targets):
            if isinstance(value, PointerTensor):
                value.describe(description)
            else:
                value.__dict__["_description"] = str(description)
        return self

    def _tensors(self) -> list[torch.Tensor]:
        return [self.data, self.targets]

    def _allowed(self, worker: Any, private: bool, users: Sequence[str] | None) -> list[str] | None:
        if self.location is not None:
            raise LocalError(
                f"the data set is {_place(self.data)} already: get() it before you send it elsewhere"
            )
        from planrt.workers import objects  # imports this module, by way of the worker's state

        if not isinstance(worker, objects.RemoteObjects):
            raise LocalError(f"send takes a worker, not {_describe(worker)}")
        return objects.allowed_users(private, users)

    def _remote(self) -> list[PointerTensor]:
        if not isinstance(self.data, PointerTensor) or not isinstance(self.targets, PointerTensor):
            raise LocalError("the data set is here: get() is for what send() returned")
        return [self.data, self.targets]

    def _with(self, tensors: Sequence[torch.Tensor]) -> BaseDataset:
        return BaseDataset(tensors[0], tensors[1], self.transform)

    def __repr__(self) -> str:
        data, targets = TensorSpec.of(self.data), TensorSpec.of(self.targets)
        where = f", {_place(self.data)}" if self.location is not None else ""
        return f"BaseDataset(data={data}, targets={targets}{where})"


def _location(tensor: torch.Tensor) -> BaseWorker | None:
    return tensor.location if isinstance(tensor, PointerTensor) else None


def _place(tensor: torch.Tensor) -> str:
    worker = _location(tensor)
    return "here" if worker is None else f"on worker {worker.id!r}"


def _pointers(tensors: Sequence[torch.Tensor], handles: Sequence[Handle]) -> list[PointerTensor]:
    """Pointers to what `tensors` became when they were put on a worker; they know its tags and description."""
    from planrt.workers.objects import contiguous

    made = []
    for tensor, handle in zip(tensors, handles, strict=True):
        pointer = make_pointer(handle, contiguous(tensor))
        for name in ("_tags", "_description"):
            if name in tensor.__dict__:
                pointer.__dict__[name] = tensor.__dict__[name]
        made.append(pointer)
    return made


@on_loop
async def _put(worker: BaseWorker, tensors: list[torch.Tensor], allowed: list[str] | None) -> list[Handle]:
    return await worker.put_async(tensors, allowed=allowed)


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
        DataError: `dataset` is not map-style, a `TensorDataset` of other than two tensors, or on a worker.
    """
    if isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__:
        if len(dataset.tensors) != 2:
            raise DataError(
                f"{_name(key)} must give (data, target) pairs, but is a TensorDataset of "
                f"{len(dataset.tensors)} tensors: keep two"
            )
        dataset = BaseDataset(*dataset.tensors)
    if isinstance(dataset, BaseDataset) and dataset.location is not None:
        raise DataError(f"{_name(key)} is {_place(dataset.data)}: get() it first")
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


def smallest_batch(items: int, batch_size: int, max_nr_batches: int = -1, epochs: int = 1) -> int:
    """Items in the smallest batch of `iterate`; 0 without batches."""
    whole, rest = divmod(items, batch_size)
    if max_nr_batches == 0 or items == 0:
        return 0
    short_one_comes = rest and (max_nr_batches < 0 or max_nr_batches > whole)
    return rest if short_one_comes else batch_size


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
