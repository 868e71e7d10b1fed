"""Data that lies on several workers: `FederatedDataset`, and `FederatedDataLoader` that reads it in
batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from planrt.errors import DataError, LocalError, OptionError
from planrt.workers.base import BaseWorker
from planrt.workers.datasets import BaseDataset
from planrt.workers.machine.rounds.batches import Batch

WorkerReads: TypeAlias = list[tuple[str, torch.Tensor]]
"""What is read at one time: worker id and indices, each worker once."""


class FederatedDataset:
    """The data sets of several workers, each in its place.

    Args:
        datasets: `BaseDataset`s of pointers, each on a worker of its own. `dataset.federate(workers)` makes
            such.

    Raises:
        DataError: none given, one that is not on a worker, or two on the same worker.
    """

    def __init__(self, datasets: Sequence[BaseDataset]) -> None:
        self.datasets: dict[str, BaseDataset] = {}
        for dataset in datasets:
            if not isinstance(dataset, BaseDataset):
                raise DataError(
                    f"FederatedDataset takes BaseDatasets, not {type(dataset).__name__}: wrap the pointers in "
                    "BaseDataset(data, targets)"
                )
            worker = dataset.location
            if worker is None:
                raise DataError("FederatedDataset: a data set is still here: send() it to a worker first")
            if worker.id in self.datasets:
                raise DataError(
                    f"FederatedDataset: two data sets on worker {worker.id!r}: join them there with torch.cat, or "
                    "leave one out"
                )
            self.datasets[worker.id] = dataset
        for dataset in self.datasets.values():
            dataset.federated = True
        if not self.datasets:
            raise DataError("FederatedDataset: no data sets: give one BaseDataset per worker")

    @property
    def workers(self) -> list[str]:
        """The ids of the workers, in the order their data was given."""
        return list(self.datasets)

    def __len__(self) -> int:
        """Items on all workers together."""
        return sum(len(dataset) for dataset in self.datasets.values())

    def __getitem__(self, worker_id: str) -> BaseDataset:
        """The data set on one worker.

        Raises:
            LocalError: none is there.
        """
        found = self.datasets.get(worker_id) if isinstance(worker_id, str) else None
        if found is None:
            raise LocalError(
                f"no data on {worker_id!r}: ask by the id of a worker, one of {', '.join(map(repr, self.datasets))}"
            )
        return found

    def get_dataset(self, worker_id: str) -> BaseDataset:
        """Takes the data of one worker back: it is here then, and no longer part of this.

        Raises:
            LocalError: none is there. GetNotPermittedError: it is private.
        """
        found = self[worker_id]
        found.federated = False
        try:
            back = found.get()
        except BaseException:
            found.federated = True
            raise
        del self.datasets[worker_id]
        return back

    def __repr__(self) -> str:
        parts = ", ".join(f"{id}: {len(dataset):,}" for id, dataset in self.datasets.items())
        return f"<FederatedDataset of {len(self):,} items ({parts})>"


class FederatedDataLoader:
    """Reads a `FederatedDataset` in batches of pointers: ``for data, target in loader:
    model.send(data.location)``.

    One worker's data comes after the other's, batch by batch. The batches are put together where the data is;
    only indices travel. They are copies: changing one in place leaves the data as it is. Each pass goes over
    all items once, and passes may overlap.

    Args:
        federated_dataset: what to read.
        batch_size: items of a batch. The last one of each worker may be short.
        shuffle: a new order within each worker's data at each pass.
        drop_last: leave out each worker's short last batch.
        num_iterators: how many workers are read at a time. With more than one, a pass yields
            ``{worker: (data, target)}`` instead of pairs: one batch of each worker that is being read.
        iter_per_worker: a step yields ``{worker: (data, target)}`` with a batch of *every* worker. A pass is
            as long as the longest of them needs; whoever has given all starts again meanwhile, in a new order
            if shuffled.
        seed: for `shuffle`. None: torch's own generator here, which `torch.manual_seed` sets.
        num_workers, pin_memory: what scripts pass to a `DataLoader`; without effect here, where no data is.

    Raises:
        DataError: `federated_dataset` is none. OptionError: an option out of range.
    """

    def __init__(
        self,
        federated_dataset: FederatedDataset,
        batch_size: int = 8,
        shuffle: bool = False,
        drop_last: bool = False,
        num_iterators: int = 1,
        *,
        iter_per_worker: bool = False,
        seed: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if not isinstance(federated_dataset, FederatedDataset):
            raise DataError(
                f"FederatedDataLoader reads a FederatedDataset, not a {type(federated_dataset).__name__}: make one "
                "with dataset.federate((bob, alice)), or use torch's DataLoader for data that is here"
            )
        _check_whole("batch_size", batch_size, at_least=1)
        _check_whole("num_iterators", num_iterators, at_least=1)
        workers = len(federated_dataset.workers)
        if num_iterators > workers:
            raise OptionError(f"num_iterators is {num_iterators}, but the data is on {workers} workers only")
        if seed is not None:
            _check_whole("seed", seed, at_least=0)
        self.federated_dataset = federated_dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.num_iterators = workers if iter_per_worker else num_iterators
        self.iter_per_worker = iter_per_worker
        self._one_at_a_time = num_iterators == 1 and not iter_per_worker
        self._pass: Iterator[Any] | None = None
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    @property
    def workers(self) -> list[str]:
        """The ids of the workers, in the order they are read."""
        return self.federated_dataset.workers

    def __len__(self) -> int:
        """What one pass yields: batches, or mappings of them."""
        counts = {
            id: self._batches_of(len(dataset)) for id, dataset in self.federated_dataset.datasets.items()
        }
        if self.iter_per_worker:
            return max(counts.values())
        return sum(1 for _ in _turns(counts, self.num_iterators))

    def __iter__(self) -> Iterator[Any]:
        """One pass over the data."""
        self._pass = self._batches()
        return self._pass

    def __next__(self) -> Any:
        """What comes next in the pass that `iter` of this loader began last; a new one begins if there was
        none."""
        return next(self._pass if self._pass is not None else iter(self))

    def _batches(self) -> Iterator[Any]:
        for step in self._steps():
            fetched = {id: self.federated_dataset[id].fetch(indices) for id, indices in step}
            if self._one_at_a_time:
                yield from fetched.values()
            else:
                yield self._by_worker(fetched)

    def _by_worker(self, fetched: Mapping[str, Batch]) -> dict[BaseWorker | None, Batch]:
        return {self.federated_dataset[id].location: batch for id, batch in fetched.items()}

    def _steps(self) -> Iterator[WorkerReads]:
        """Whose which items come when: all orders are drawn at the start of the pass, but of what is read
        again."""
        if self.iter_per_worker:
            yield from self._all_at_every_step()
            return
        chunks = {id: self._chunks(len(dataset)) for id, dataset in self.federated_dataset.datasets.items()}
        for turn in _turns({id: len(parts) for id, parts in chunks.items()}, self.num_iterators):
            yield [(id, chunks[id][number]) for id, number in turn]

    def _all_at_every_step(self) -> Iterator[WorkerReads]:
        datasets = self.federated_dataset.datasets
        chunks = {id: found for id, dataset in datasets.items() if (found := self._chunks(len(dataset)))}
        for number in range(max(map(len, chunks.values()), default=0)):
            for id, parts in chunks.items():
                if number and number % len(parts) == 0:
                    chunks[id] = self._chunks(len(datasets[id]))
            yield [(id, parts[number % len(parts)]) for id, parts in chunks.items()]

    def _chunks(self, items: int) -> list[torch.Tensor]:
        order = torch.randperm(items, generator=self._generator) if self.shuffle else torch.arange(items)
        starts = range(0, self._batches_of(items) * self.batch_size, self.batch_size)
        return [order[start : start + self.batch_size] for start in starts]

    def _batches_of(self, items: int) -> int:
        return items // self.batch_size if self.drop_last else -(-items // self.batch_size)

    def __repr__(self) -> str:
        return f"<FederatedDataLoader of {self.federated_dataset!r}, batch_size={self.batch_size}>"


def _turns(counts: Mapping[str, int], at_a_time: int) -> Iterator[list[tuple[str, int]]]:
    """Who gives which of its batches at each step, when `at_a_time` workers are read side by side.

    `counts` is worker id -> batches. A worker that has given all of them makes room for the next one in line.
    """
    waiting = [id for id, count in counts.items() if count]
    reading: dict[str, int] = {}
    while waiting or reading:
        while waiting and len(reading) < at_a_time:
            reading[waiting.pop(0)] = 0
        yield list(reading.items())
        reading = {id: number + 1 for id, number in reading.items() if number + 1 < counts[id]}


def _check_whole(name: str, value: Any, *, at_least: int) -> None:
    if type(value) is not int or value < at_least:
        raise OptionError(
            f"FederatedDataLoader: {name} must be a whole number of at least {at_least}, got {value!r}"
        )
