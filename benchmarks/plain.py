"""The floor of a round: the same batches and arithmetic in plain PyTorch, in one process and without messages.

As a child process (``python -m benchmarks.plain``) it trains on the digits of the workers it is told, one after
the other or in threads, each time it gets a line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import child
from benchmarks.workloads import BATCH_SIZE, BATCHES, LR, SEED
from planrt.fl.data import digits as data
from planrt.fl.runs.networks import seeded_net
from planrt.seeding import derive_seed
from planrt.workers.datasets import BaseDataset

State = dict[str, torch.Tensor]


def batches_of(dataset: BaseDataset, seed: int, batches: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches that a worker draws from `seed`."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
    order = torch.randperm(len(dataset), generator=generator)
    for number in range(batches):
        chosen = order[number * BATCH_SIZE : (number + 1) * BATCH_SIZE]
        yield data.normalize(dataset.data.index_select(0, chosen)), dataset.targets.index_select(0, chosen)


def train(model: nn.Module, state: State, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Trains `model` from `state` on `batches` with a fresh SGD."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(state[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for images, targets in batches:
        optimizer.zero_grad()
        F.nll_loss(model(images), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


class PlainWorkers:
    """One model per data set, trained from the same state each round."""

    def __init__(self, datasets: Mapping[str, BaseDataset], *, batches: int = BATCHES) -> None:
        self._datasets = dict(datasets)
        self._models = {name: seeded_net(SEED) for name in self._datasets}
        self._batches = batches

    def train(self, name: str, state: State, round_number: int = 1) -> None:
        """One worker's part of a round."""
        seed = derive_seed(SEED, round_number, name)
        train(self._models[name], state, batches_of(self._datasets[name], seed, self._batches))

    def average(self) -> State:
        """The mean of the models as they are."""
        return average([model.state_dict() for model in self._models.values()])


class PlainLoop:
    """Any number of workers one after the other, with one model and a running sum."""

    def __init__(self, datasets: Mapping[str, BaseDataset], *, batches: int) -> None:
        self._datasets = dict(datasets)
        self._model = seeded_net(SEED)
        self._batches = batches

    def round(self, state: State, round_number: int = 1) -> State:
        """One round: each worker trained from `state`, the average."""
        total: State = {}
        for name, dataset in self._datasets.items():
            seed = derive_seed(SEED, round_number, name)
            train(self._model, state, batches_of(dataset, seed, self._batches))
            for key, value in self._model.state_dict().items():
                total[key] = value.clone() if key not in total else total[key].add_(value)
        return {key: value.div_(len(self._datasets)) for key, value in total.items()}


def average(states: list[State]) -> State:
    """The mean of `states`, summed in their order."""
    total = {name: value.clone() for name, value in states[0].items()}
    for state in states[1:]:
        for name, value in total.items():
            value.add_(state[name])
    return {name: value.div_(len(states)) for name, value in total.items()}


def mnist_parts(dataset: str, folder: str | None) -> dict[str, BaseDataset]:
    """The three training partitions by worker id."""
    loaded = data.load(dataset, folder)
    return {name: data.partition_for(name, loaded) for name in data.PARTITIONS}


def main() -> None:
    """``dataset folder threads batches NAME...``; "threaded" as threads: a thread each, with one torch thread.

    Of several processes with one worker each, the one that started them averages.
    """
    dataset, folder, threads, batches, *names = sys.argv[1:]
    parts = mnist_parts(dataset, folder or None)
    workers = PlainWorkers({name: parts[name] for name in names}, batches=int(batches))
    state = {key: value.clone() for key, value in seeded_net(SEED).state_dict().items()}
    map_over: Callable[..., Iterable[None]] = map
    if threads == "threaded":
        map_over = ThreadPoolExecutor(len(names), initializer=torch.set_num_threads, initargs=(1,)).map
    else:
        torch.set_num_threads(int(threads))

    def run(_: object) -> None:
        for _done in map_over(lambda name: workers.train(name, state), names):
            pass
        if len(names) > 1:
            workers.average()

    child.answer_with(run)


if __name__ == "__main__":
    main()
