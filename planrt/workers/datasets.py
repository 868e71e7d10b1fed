"""`BaseDataset`: tensors with an optional transform, which a worker holds or a client sends to one.

A client's data set may itself lie on a worker: its tensors are pointers then, and so are its batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset

from planrt.deadlines import bounded
from planrt.errors import DataError, LocalError, MixedLocationsError, OptionError
from planrt.loop import on_loop
from planrt.types import TensorSpec
from planrt.workers.client import objects
from planrt.workers.client.registry import KnowsWorkers
from planrt.workers.machine.rounds.batches import Batch, describe, first_line, listed
from planrt.workers.pointers.fetching import fetch_all, fetch_all_async
from planrt.workers.pointers.handle import Handle
from planrt.workers.pointers.tensor import PointerTensor, make_pointer
from planrt.workers.wire.objects import contiguous, new_id

if TYPE_CHECKING:
    from planrt.workers.base import BaseWorker


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

    @bounded
    def fetch(self, indices: torch.Tensor, *, timeout: float | None = None) -> Batch:
        """Returns the items at `indices` (int64, one dimension): selected first, then transformed.

        Of a data set on a worker only the indices travel, and the call does not wait.
        """
        worker = self.location
        if worker is not None:
            (indices,) = _pointers([indices], worker.workplace.objects.put([indices]))
        data, targets = self.data.index_select(0, indices), self.targets.index_select(0, indices)
        if self.batch_transform is not None:
            data = self.batch_transform(data)
        elif self.transform_ is not None and len(data):
            positions = indices.tolist()
            items = [_item(self.transform_, *one) for one in zip(data, positions, strict=True)]
            if len({(one.shape, one.dtype) for one in items}) > 1:
                raise DataError(
                    f"the transform gives different shapes or dtypes for items {listed(positions)}"
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
        """Returns the data, untransformed."""
        return self.data

    def get_targets(self) -> torch.Tensor:
        """Returns the targets."""
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
        """The text that `describe` was given; None before."""
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
    def reads_no_items(self) -> bool:
        """True if a batch of no items shows their dtype and shape, which a transform of items cannot."""
        return self.transform_ is None

    @property
    def location(self) -> BaseWorker | None:
        """The worker that holds data and targets; None while they are here."""
        return _location(self.data)

    @bounded
    def send(
        self,
        worker: BaseWorker,
        *,
        private: bool = False,
        allowed_users: Sequence[str] | None = None,
        timeout: float | None = None,
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
        return self._with(_pointers(tensors, worker.workplace.objects.put(tensors, allowed=allowed)))

    @bounded
    async def async_send(
        self,
        worker: BaseWorker,
        *,
        private: bool = False,
        allowed_users: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> BaseDataset:
        """`send`, to be awaited on any loop."""
        allowed = self._allowed(worker, private, allowed_users)
        tensors = self._tensors()
        return self._with(_pointers(tensors, await _put(worker, tensors, allowed)))

    @bounded
    def get(self, *, timeout: float | None = None) -> BaseDataset:
        """Brings data and targets back; the pointers are used up.

        Raises:
            LocalError: they are here. GetNotPermittedError: they are private.
        """
        return self._with(fetch_all(self._remote()))

    @bounded
    async def async_get(self, *, timeout: float | None = None) -> BaseDataset:
        """`get`, to be awaited on any loop."""
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
        if not isinstance(worker, KnowsWorkers):
            raise LocalError(f"send takes a worker, not {describe(worker)}")
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
            f"the transform of item {position} failed: {type(error).__name__}: {first_line(error)}{hint}"
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
            f"BaseDataset: {name} must be a tensor or array with items along dimension 0, not {describe(value)}"
            f"{_instead(value)}"
        )
    return value


def _instead(value: Any) -> str:
    """What to write for a value of a kind that people have."""
    if type(value).__module__.partition(".")[0] == "pandas":
        return ": write torch.tensor(df.values)"
    return ": write torch.tensor(...)" if isinstance(value, list | tuple) else ""


def _location(tensor: torch.Tensor) -> BaseWorker | None:
    return tensor.location if isinstance(tensor, PointerTensor) else None


def _place(tensor: torch.Tensor) -> str:
    worker = _location(tensor)
    return "here" if worker is None else f"on worker {worker.id!r}"


def _pointers(tensors: Sequence[torch.Tensor], handles: Sequence[Handle]) -> list[PointerTensor]:
    """Pointers to what `tensors` became when they were put on a worker; they know its tags and description."""
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
    return await worker.workplace.objects.put_async(tensors, allowed=allowed)
