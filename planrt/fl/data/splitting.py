"""``dataset.federate((bob, alice))``: splits a data set that is here and sends each worker its part."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from planrt.deadlines import bounded
from planrt.errors import DataError, OptionError
from planrt.fl.data.federated import FederatedDataset
from planrt.loop import all_answers, refuse_to_block, run
from planrt.workers.base import BaseWorker
from planrt.workers.datasets import BaseDataset
from planrt.workers.machine.rounds.batches import as_batches

ITEMS_AT_A_TIME = 1024
"""How many items are read and put into one batch at a time, where a data set has to be read item by item."""

Transform = Callable[[torch.Tensor], torch.Tensor]


def install() -> None:
    """Gives `torch.utils.data.Dataset`, and so every data set derived from it, the method `federate`."""
    for function in (federate, async_federate):
        setattr(Dataset, function.__name__, function)


@bounded
def federate(
    dataset: Any,
    workers: Sequence[BaseWorker],
    *,
    private: bool = False,
    allowed_users: Sequence[str] | None = None,
    timeout: float | None = None,
) -> FederatedDataset:
    """Splits `dataset` into one part per worker, in its order, and sends each part to its worker.

    Parts differ in size by one item at most, the first ones being the larger. A `BaseDataset`, a
    `TensorDataset`, torchvision's MNIST with the usual transforms, and subsets of these are split as whole
    tensors: images travel as uint8 and are transformed on the worker, batch by batch. Anything else that is
    map-style is read item by item, once: random transforms give one and the same picture ever after.

    Args:
        dataset: map-style, of (data, target) pairs.
        workers: whom to send to, each once.
        private: nobody may read what arrives, or what is computed from it.
        allowed_users: only these users may.

    Raises:
        OptionError: no workers, the same one twice, or something that is no worker.
        DataError: `dataset` is not map-style, its items do not fit together, or it has fewer items than there
            are workers.
    """
    refuse_to_block("await async_federate(dataset, workers)")
    parts = _split(dataset, workers)
    sending = _send(parts, workers, private, allowed_users)
    return run(sending, instead="await async_federate(dataset, workers)")


@bounded
async def async_federate(
    dataset: Any,
    workers: Sequence[BaseWorker],
    *,
    private: bool = False,
    allowed_users: Sequence[str] | None = None,
    timeout: float | None = None,
) -> FederatedDataset:
    """`federate`, to be awaited on any loop. The data set is read on a thread of its own."""
    parts = await asyncio.to_thread(_split, dataset, workers)
    return await _send(parts, workers, private, allowed_users)


async def _send(
    parts: Sequence[BaseDataset], workers: Sequence[BaseWorker], private: bool, users: Sequence[str] | None
) -> FederatedDataset:
    """Sends all parts at the same time."""
    pairs = zip(parts, workers, strict=True)
    sending = [part.async_send(worker, private=private, allowed_users=users) for part, worker in pairs]
    return FederatedDataset(await all_answers(sending))


def _split(dataset: Any, workers: Any) -> list[BaseDataset]:
    _check_workers(workers)
    if hasattr(dataset, "__len__") and len(dataset) < len(workers):
        raise DataError(
            f"federate: {len(dataset)} items for {len(workers)} workers: give every worker at least one item"
        )
    whole = _whole(dataset)
    data, targets = whole.data.tensor_split(len(workers)), whole.targets.tensor_split(len(workers))
    transform = whole.batch_transform
    return [BaseDataset(*part, batch_transform=transform) for part in zip(data, targets, strict=True)]


def _check_workers(workers: Any) -> None:
    if not isinstance(workers, list | tuple):
        raise OptionError(f"federate takes several workers: write federate((bob, alice)), not {workers!r}")
    if not workers:
        raise OptionError("federate: no workers: write federate((bob, alice))")
    for worker in workers:
        if not isinstance(worker, BaseWorker):
            raise OptionError(f"federate takes workers, not {type(worker).__name__}: {worker!r}")
    ids = [worker.id for worker in workers]
    twice = sorted({id for id in ids if ids.count(id) > 1})
    if twice:
        raise OptionError(f"federate: {', '.join(twice)} given twice: name each worker once")


def _whole(dataset: Any) -> BaseDataset:
    """`dataset` as tensors of all its items, with what is left of its transform."""
    known = _by_tensors(dataset)
    return _by_items(dataset) if known is None else known


def _by_tensors(dataset: Any) -> BaseDataset | None:
    """`dataset` as tensors that it holds already; None if it is not of a kind known here."""
    if isinstance(dataset, BaseDataset | TensorDataset):
        known = as_batches(dataset)
        if not isinstance(known, BaseDataset) or type(known).fetch is not BaseDataset.fetch:
            return None
        return known if known.transform_ is None else None
    if type(dataset) is Subset:
        whole = _by_tensors(dataset.dataset)
        chosen = torch.as_tensor(dataset.indices, dtype=torch.int64)
        if whole is None:
            return None
        return BaseDataset(whole.data[chosen], whole.targets[chosen], batch_transform=whole.batch_transform)
    return _by_mnist(dataset)


def _by_items(dataset: Any) -> BaseDataset:
    source = as_batches(dataset)
    order = torch.arange(len(source))
    parts = [
        source.fetch(order[start : start + ITEMS_AT_A_TIME])
        for start in range(0, len(order), ITEMS_AT_A_TIME)
    ]
    data, targets = zip(*parts, strict=True)
    for role, values in (("data", data), ("target", targets)):
        if not all(isinstance(value, torch.Tensor) for value in values):
            raise DataError(f"federate: {role} must be a tensor or a number in every item")
    try:
        return BaseDataset(torch.cat(data), torch.cat(targets))
    except RuntimeError as error:
        raise DataError(f"federate: items of different shapes: {str(error).splitlines()[0]}") from error


# ------------------------------------------------------------------------------------------- torchvision's MNIST


def _by_mnist(dataset: Any) -> BaseDataset | None:
    """Torchvision's MNIST, or one of its siblings that is read like it, as uint8 images [N, 28, 28]."""
    torchvision = sys.modules.get("torchvision")  # who has such a data set has imported it
    if torchvision is None or not isinstance(dataset, torchvision.datasets.MNIST):
        return None
    if type(dataset).__getitem__ is not torchvision.datasets.MNIST.__getitem__ or dataset.target_transform:
        return None
    tensors = isinstance(dataset.data, torch.Tensor) and isinstance(dataset.targets, torch.Tensor)
    if not tensors or dataset.data.dtype != torch.uint8:
        return None
    transform = _whole_batches(dataset.transform, torchvision.transforms)
    return (
        None if transform is None else BaseDataset(dataset.data, dataset.targets, batch_transform=transform)
    )


def _whole_batches(transform: Any, transforms: Any) -> Transform | None:
    """``ToTensor()``, alone or followed by ``Normalize``, for whole batches; None for other transforms.

    The numbers are the same, bit for bit.
    """
    steps = transform.transforms if type(transform) is transforms.Compose else [transform]
    if not steps or type(steps[0]) is not transforms.ToTensor:
        return None
    shifts: list[tuple[float, float]] = []
    for step in steps[1:]:
        if type(step) is not transforms.Normalize:
            return None
        mean, std = (
            [float(one) for one in torch.as_tensor(values).flatten()] for values in (step.mean, step.std)
        )
        if len(mean) != 1 or len(std) != 1:
            return None
        shifts.append((mean[0], std[0]))

    def whole(images: torch.Tensor) -> torch.Tensor:
        scaled = images.unsqueeze(1).to(torch.get_default_dtype()).div(255)
        for mean, std in shifts:
            scaled = scaled.sub(mean).div(std)
        return scaled

    return whole
