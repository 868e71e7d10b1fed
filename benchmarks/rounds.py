"""Rounds on three websocket worker processes: time, overhead alone, bytes and messages."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from benchmarks.child import Child
from benchmarks.measure import Goal, Row, Sample, in_turns
from benchmarks.plain import average
from benchmarks.sockets import Echoes
from benchmarks.workloads import BATCHES, MODEL_BYTES, SEED, Size, mnist_config
from planrt import loop
from planrt.command_line import available_cores
from planrt.fl.config import TrainConfig
from planrt.fl.data import digits as data
from planrt.fl.rounds import RoundResult, RoundScheduler
from planrt.fl.runs.children import ChildOptions, WorkerProcesses, mnist_children
from planrt.workers.base import BaseWorker, close_all
from planrt.workers.websocket_client import WebsocketClientWorker

T = TypeVar("T")


class Rounds:
    """Rounds of one configuration, called as a script does: from outside planrt's loop."""

    def __init__(self, workers: Sequence[BaseWorker], config: TrainConfig, **options: Any) -> None:
        options = {"dataset_key": data.TRAIN_KEY, "seed": SEED, **options}
        self._scheduler = RoundScheduler(workers, config, **options)
        self._run(self._scheduler.prepare())
        self.state = config.state

    def run(self, number: int = 1, *, in_place: bool = False) -> RoundResult:
        """One round, from the state as it is here."""
        return self._run(self._scheduler.run_round(number, self.state, in_place=in_place))

    @staticmethod
    def _run(coroutine: Coroutine[Any, Any, T]) -> T:
        return loop.run(coroutine, instead="a thread of its own")


class WrittenRounds(Rounds):
    """Rounds that are written down in a run folder, with a checkpoint after each."""

    def __init__(self, workers: Sequence[BaseWorker], config: TrainConfig, folder: str) -> None:
        super().__init__(workers, config, run_dir=folder)

    def next(self) -> RoundResult:
        """The next round, from the state as it is here; the checkpoint of the one before is on the disk then."""
        return self.run(self._scheduler.next_round)

    def close(self) -> None:
        """Waits for the last checkpoint."""
        self._run(self._scheduler.close())


@contextmanager
def websocket_workers(
    children: list[ChildOptions],
    **options: Any,
) -> Iterator[list[WebsocketClientWorker]]:
    """Worker processes, connections to them, which are made with `options`."""
    with ExitStack() as stack:
        processes = stack.enter_context(WorkerProcesses(children))
        workers = [
            WebsocketClientWorker(worker.id, uri=worker.uri, **options)
            for worker in processes.wait_ready().values()
        ]
        stack.callback(close_all, workers)
        yield workers


@contextmanager
def mnist_workers() -> Iterator[list[WebsocketClientWorker]]:
    """Three workers with their digits, as mnist_async starts them, less the one that evaluates."""
    children = [child for child in mnist_children(data.find()) if child.id in data.PARTITIONS]
    with websocket_workers(children) as started:
        yield started


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    source = data.find()
    batches = 1 if size.quick else BATCHES
    with ExitStack() as stack:
        workers = stack.enter_context(mnist_workers())
        trained = Rounds(workers, mnist_config(batches))
        secured = Rounds(workers, mnist_config(batches), secure_aggregation=True)
        empty = Rounds(workers, mnist_config(0))
        echoes = stack.enter_context(Echoes(len(workers)))
        payload = bytes(MODEL_BYTES)
        floors = {
            name: stack.enter_context(layout)
            for name, layout in _layouts(source, batches, trained.state).items()
        }
        times = in_turns(
            {"ours": trained.run, **{name: floor.run for name, floor in floors.items()}},
            repeats=size.repeats,
        )
        masked = in_turns({"ours": secured.run, "plain": trained.run}, repeats=size.repeats)
        overheads = in_turns(
            {"ours": empty.run, "echo": lambda: echoes.round_trip(payload)}, repeats=3 * size.repeats
        )
        written = WrittenRounds(workers, mnist_config(batches), stack.enter_context(TemporaryDirectory()))
        checkpoints = in_turns({"ours": written.next, "without": trained.run}, repeats=size.repeats)
        written.close()
        traffic = trained.run()
    milliseconds = {name: sample.map(lambda seconds: 1000 * seconds) for name, sample in times.items()}
    layouts = {name: milliseconds[name] for name in floors}
    best = min(layouts, key=lambda name: layouts[name].median)
    rows = [
        Row(
            "round time",
            "ms",
            milliseconds["ours"],
            layouts[name],
            name,
            Goal(at_most=1.15) if name == best else None,
            f"{source.name}, {len(workers)} workers, {batches} batches of 32" if name == best else "",
        )
        for name in sorted(layouts, key=lambda name: name != best)
    ]
    rows.append(
        Row(
            "overhead of a round",
            "ms",
            overheads["ours"].map(lambda seconds: 1000 * seconds),
            overheads["echo"].map(lambda seconds: 1000 * seconds),
            "websockets echo",
            Goal(at_most=15.0, absolute=True),
            "zero batches, 431,080 parameters there and back, three workers",
        )
    )
    rows.append(
        Row(
            "round with secure aggregation",
            "ms",
            masked["ours"].map(lambda seconds: 1000 * seconds),
            masked["plain"].map(lambda seconds: 1000 * seconds),
            "the same round without",
            Goal(at_most=1.5),
            f"431,080 parameters, {len(workers)} workers, {batches} batches of 32",
        )
    )
    rows.append(
        Row(
            "round with a checkpoint",
            "ms",
            checkpoints["ours"].map(lambda seconds: 1000 * seconds),
            checkpoints["without"].map(lambda seconds: 1000 * seconds),
            "the same without",
            Goal(at_most=1.03),
            "431,080 parameters, written while the next round runs",
        )
    )
    return rows + _traffic_rows(traffic)


def _traffic_rows(result: RoundResult) -> list[Row]:
    parts = result.workers.values()
    moved = Sample(tuple(float(part.bytes_sent + part.bytes_received) for part in parts))
    messages = Sample(tuple(float(part.requests + part.replies) for part in parts))
    return [
        Row(
            "bytes a round and worker",
            "bytes",
            moved,
            Sample((2.0 * MODEL_BYTES,)),
            "parameters down + up",
            Goal(at_most=1.01),
        ),
        Row(
            "messages a round and worker",
            "messages",
            messages,
            goal=Goal(at_most=2.0, at_least=2.0, absolute=True),
            note="one request, one reply",
        ),
    ]


# ------------------------------------------------------------------------------------------ the floor


class _Layout:
    """The plain round in one or several processes; where there are several, this one averages."""

    def __init__(self, *calls: tuple[object, ...], state: dict[str, torch.Tensor]) -> None:
        self._calls = calls
        self._states = [state] * len(calls)
        self._stack = ExitStack()

    def __enter__(self) -> _Layout:
        self._children = [self._stack.enter_context(Child("plain", *call)) for call in self._calls]
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def run(self) -> None:
        """One round."""
        for child in self._children:
            child.send()
        for child in self._children:
            child.receive()
        if len(self._states) > 1:
            average(self._states)


def _layouts(source: data.DataSource, batches: int, state: dict[str, torch.Tensor]) -> dict[str, _Layout]:
    def call(threads: object, *names: str) -> tuple[object, ...]:
        return (source.name, source.folder or "", threads, batches, *names)

    names = tuple(data.PARTITIONS)
    cores = available_cores()
    return {
        f"one process, {cores} threads": _Layout(call(cores, *names), state=state),
        "three processes": _Layout(*(call(1, name) for name in names), state=state),
        "three threads": _Layout(call("threaded", *names), state=state),
    }
