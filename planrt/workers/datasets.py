"""The data sets a worker holds, read in batches: anything map-style goes in, (data, target) batches come out.

A worker calls `as_batches` once when its owner adds a data set, `sample_specs` once to tell clients what a
batch looks like, and `iterate` for each training or evaluation request. Order depends on the seed alone.

A client's `BaseDataset` may itself lie on a worker: its tensors are pointers then, and so are its batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from planrt.errors import DataError, LocalError, MixedLocationsError, OptionError
from planrt.loop import on_loop
from planrt.serde.dtypes import DTYPE_NAMES
from planrt.types import TensorSpec
from planrt.workers.pointers.tensor import Handle, PointerTensor, make_pointer, new_id

if TYPE_CHECKING:
    from planrt.workers.base import BaseWorker

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
    """Tensors with an optional transform, here or on a worker.

    `send` returns a data set of pointers; pointers that a search found make one just as well. Its batches are
    pointers too: they are put together on the worker, and the batch transform's torch calls run there.

    Args:
        data: a tensor or NumPy array of any dtype, items along dimension 0. Kept as it is: uint8 images stay uint8
            until they are read.
        targets: as many items as `data`, in the same place.
        transform: maps one item of `data`, as a NumPy array, to what the model gets, as torchvision's transforms do. It
            runs whenever an item is read; `send` runs it once over all items, before they leave.
        batch_transform: maps a whole batch of `data`, as a tensor, to what the model gets, dimension 0 unchanged:
            faster where it can be written, and goes along to a worker.
        id, owner, tags, description: as scripts of the 0.2 era give them; tags and description are what `search` finds.

    Raises:
        DataError: `data` and `targets` are not tensors with the same number of items.
        OptionError: both a transform and a batch transform.
        MixedLocationsError: they are in different places.
    """

    def __init__(
        self,
        data: torch.Tensor | np.ndarray[Any, Any],
        targets: torch.Tensor | np.ndarray[Any, Any],
        transform: ItemTransform | None = None,
        *,
        batch_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        id: int | str | None = None,
        owner: object = None,
        tags: Sequence[str] = (),
        description: str = "",
    ) -> None:
        self.data = _tensor("data", data)
        self.targets = _tensor("targets", targets)
        if len(self.data) != len(self.targets):
            raise DataError(f"BaseDataset: {len(data)} items of data but {len(targets)} targets")
        if _location(self.data) is not _location(self.targets):
            raise MixedLocationsError(
                f"BaseDataset: its data is {_place(self.data)} and its targets are {_place(self.targets)}: bring them "
                "together with move() or get()"
            )
        for name, function in (("transform", transform), ("batch_transform", batch_transform)):
            if function is not None and not callable(function):
                raise OptionError(f"BaseDataset: {name} must be a function, not {type(function).__name__}")
        if transform is not None and batch_transform is not None:
            raise OptionError("BaseDataset: give a transform of items or a batch_transform, not both")
        if transform is not None and _location(self.data) is not None:
            raise OptionError(
                "BaseDataset: a transform gets items as NumPy arrays, and these are on a worker: write a "
                "batch_transform with torch's functions, which run there"
            )
        self.transform_ = transform
        self.batch_transform = batch_transform
        self.id = new_id() if id is None else id
        self.federated = False
        """Whether it is part of a `FederatedDataset`, whose `get_dataset` takes it back."""
        self._owner = owner
        if tags:
            self.tag(*tags)
        if description:
            self.describe(description)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Batch:
        """One transformed item and its target. Raises IndexError past the end, as sequences do."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} items")
        data, target = self.fetch(torch.tensor([index % len(self)]))
        return data[0], target[0]

    def fetch(self, indices: torch.Tensor) -> Batch:
        """The items at `indices` (int64, one dimension): selected first, then transformed.

        Of a data set on a worker only the indices travel, and the call does not wait.
        """
        worker = self.location
        if worker is not None:
            (indices,) = _pointers([indices], worker.put([indices]))
        data, targets = self.data.index_select(0, indices), self.targets.index_select(0, indices)
        if self.batch_transform is not None:
            data = self.batch_transform(data)
        elif self.transform_ is not None and len(data):
            positions = indices.tolist()
            items = [_item(self.transform_, *one) for one in zip(data, positions, strict=True)]
            if len({(one.shape, one.dtype) for one in items}) > 1:
                raise DataError(
                    f"the transform gives different shapes or dtypes for items {_listed(positions)}"
                )
            data = torch.stack(items)
        return data, targets

    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> BaseDataset:
        """Replaces the data by ``function(data)``, now and once, for all items together; returns this data set.

        Raises:
            DataError: the data is on a worker, or the function changes the number of items.
        """
        if self.location is not None:
            raise DataError(
                f"the data set is {_place(self.data)}: transform it before it is sent, or get() it"
            )
        changed = _tensor("data", function(self.data))
        if len(changed) != len(self.targets):
            raise DataError(f"transform: {len(self.targets)} items became {len(changed)}")
        self.data = changed
        return self

    def get_data(self) -> torch.Tensor:
        """The data, untransformed."""
        return self.data

    def get_targets(self) -> torch.Tensor:
        """The targets."""
        return self.targets

    @property
    def tags(self) -> set[str]:
        """The tags of its data."""
        return set(getattr(self.data, "tags", ()))

    @property
    def owner(self) -> Any:
        """As given, or the worker that stands for this process, once there is a `TorchHook`."""
        return self._owner if self._owner is not None else getattr(self.data, "owner", None)

    @property
    def description(self) -> str | None:
        """What `describe` said; None before."""
        return self.data.__dict__.get("_description") or getattr(self.data, "description", None) or None

    @property
    def id_at_location(self) -> int:
        """The id of the data on its worker.

        Raises:
            LocalError: the data set is here.
        """
        if not isinstance(self.data, PointerTensor):
            raise LocalError("the data set is here: send() it to a worker, then its pointer has an id there")
        return int(self.data.id_at_location)

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
        tensors = self._tensors()
        return self._with(_pointers(tensors, worker.put(tensors, allowed=allowed)))

    async def async_send(
        self, worker: BaseWorker, *, private: bool = False, allowed_users: Sequence[str] | None = None
    ) -> BaseDataset:
        """`send`, to be awaited on any loop."""
        allowed = self._allowed(worker, private, allowed_users)
        tensors = self._tensors()
        return self._with(_pointers(tensors, await _put(worker, tensors, allowed)))

    def get(self) -> BaseDataset:
        """Brings data and targets back; the pointers are used up.

        Raises:
            LocalError: they are here. GetNotPermittedError: they are private.
        """
        from planrt.workers.client.objects import fetch_all

        return self._with(fetch_all(self._remote()))

    async def async_get(self) -> BaseDataset:
        """`get`, to be awaited on any loop."""
        from planrt.workers.client.objects import fetch_all_async

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
        """What is sent: items go transformed where the transform needs them one by one."""
        if self.transform_ is None:
            return [self.data, self.targets]
        data = self.fetch(torch.arange(len(self)))[0]
        data.__dict__.update({name: self.data.__dict__[name] for name in _KEPT if name in self.data.__dict__})
        return [data, self.targets]

    def _allowed(self, worker: Any, private: bool, users: Sequence[str] | None) -> list[str] | None:
        if self.location is not None:
            raise LocalError(
                f"the data set is {_place(self.data)} already: get() it before you send it elsewhere"
            )
        from planrt.workers.client import objects  # imports this module, by way of the worker's state

        if not isinstance(worker, objects.RemoteObjects):
            raise LocalError(f"send takes a worker, not {_describe(worker)}")
        return objects.allowed_users(private, users)

    def _remote(self) -> list[PointerTensor]:
        if not isinstance(self.data, PointerTensor) or not isinstance(self.targets, PointerTensor):
            raise LocalError("the data set is here: get() is for what send() returned")
        if self.federated:
            raise OptionError(
                f"the data set on worker {self.data.location.id!r} is part of a FederatedDataset: take it back with "
                f"federated_dataset.get_dataset({self.data.location.id!r})"
            )
        return [self.data, self.targets]

    def _with(self, tensors: Sequence[torch.Tensor]) -> BaseDataset:
        return BaseDataset(tensors[0], tensors[1], batch_transform=self.batch_transform, id=self.id)

    def __repr__(self) -> str:
        data, targets = TensorSpec.of(self.data), TensorSpec.of(self.targets)
        where = f", {_place(self.data)}" if self.location is not None else ""
        return f"BaseDataset(data={data}, targets={targets}{where})"


ItemTransform: TypeAlias = Callable[[Any], Any]
"""One item, as a NumPy array -> a tensor or an array."""

_KEPT = ("_tags", "_description")


def _item(transform: ItemTransform, item: torch.Tensor, position: int) -> torch.Tensor:
    try:
        return torch.as_tensor(transform(item.numpy()))
    except Exception as error:
        hint = (
            ": it gets one item as a NumPy array; a function of a whole batch as a tensor is a batch_transform"
            if isinstance(error, AttributeError)
            else ""
        )
        raise DataError(
            f"the transform of item {position} failed: {type(error).__name__}: {_first_line(error)}{hint}"
        ) from error


def _tensor(name: str, value: Any) -> torch.Tensor:
    """`value` as a tensor with items along dimension 0."""
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject or value.dtype.kind in "USMm":
            raise DataError(f"BaseDataset: {name} is an array of {value.dtype}: make it an array of numbers")
        value = np.ascontiguousarray(value, value.dtype.newbyteorder("="))  # torch knows no other byte order
        value = torch.from_numpy(value if value.flags.writeable else value.copy())
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        raise DataError(
            f"BaseDataset: {name} must be a tensor or array with items along dimension 0, not {_describe(value)}"
            f"{_instead(value)}"
        )
    return value


def _instead(value: Any) -> str:
    """What to write for a value of a kind that people have."""
    if type(value).__module__.partition(".")[0] == "pandas":
        return ": write torch.tensor(df.values)"
    return ": write torch.tensor(...)" if isinstance(value, list | tuple) else ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _location(tensor: torch.Tensor) -> BaseWorker | None:
    return tensor.location if isinstance(tensor, PointerTensor) else None


def _place(tensor: torch.Tensor) -> str:
    worker = _location(tensor)
    return "here" if worker is None else f"on worker {worker.id!r}"


def _pointers(tensors: Sequence[torch.Tensor], handles: Sequence[Handle]) -> list[PointerTensor]:
    """Pointers to what `tensors` became when they were put on a worker; they know its tags and description."""
    from planrt.workers.wire.objects import contiguous

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
        items = self._items(positions)
        for item in items:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise DataError(
                    f"{_name(self._key)} must give (data, target) pairs, but gave {_describe(item)}{_pair_of(item)}"
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
        position: int | None = None
        try:
            if hasattr(self._dataset, "__getitems__"):
                return list(self._dataset.__getitems__(positions))
            items = []
            for position in positions:
                items.append(self._dataset[position])
            return items
        except Exception as error:  # whatever the owner's code raises
            which = f"item {position}" if position is not None else f"items {_listed(positions)}"
            raise DataError(
                f"{_name(self._key)}: {which} cannot be read: {type(error).__name__}: {_first_line(error)}"
            ) from error


def _listed(positions: list[int]) -> str:
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
        dataset = BaseDataset(*dataset.tensors)
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

    Of an empty data set they are known where it is made of tensors without a transform of items.

    Raises:
        DataError: the data set is empty and does not say what an item would look like, or it does not give tensors with
            one row per item.
    """
    rows = min(1, len(source))
    if not rows and (not isinstance(source, BaseDataset) or source.transform_ is not None):
        raise DataError(
            f"{_name(key)} is empty, and what its items would look like is not known: give tensors of no rows, such as "
            "BaseDataset(torch.zeros(0, 30), torch.zeros(0)), or add it when it has items"
        )
    batch = source.fetch(torch.zeros(rows, dtype=torch.int64))
    for role, value in zip(("data", "target"), batch, strict=True):
        if not isinstance(value, torch.Tensor):
            raise DataError(f"{_name(key)}: {role} must be a tensor or a number, but is {_describe(value)}")
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


def _describe(value: Any) -> str:
    """The type of `value`, never its content: it may be private."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a value of type {type(value).__name__}"
