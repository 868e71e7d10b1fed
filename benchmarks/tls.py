"""TLS: a round, posted operations and a large tensor, over TLS and without, to workers of the same kind."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

import planrt
from benchmarks.measure import Goal, Row, Sample, in_turns
from benchmarks.rounds import Rounds, websocket_workers
from benchmarks.workloads import BATCHES, Size, mnist_config
from planrt import cli
from planrt.fl.data import digits as data
from planrt.fl.runs.children import ChildOptions, mnist_children
from planrt.workers import BaseWorker

LARGE = 5_000_000
"""float32 elements of the large tensor: 20 MB."""


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    planrt.TorchHook(torch)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tls, ca = _certificates(folder)
        children = [child for child in mnist_children(data.find()) if child.id in data.PARTITIONS]
        kinds = {
            "ours": stack.enter_context(websocket_workers(_with(children, tls), ca=ca)),
            "plain": stack.enter_context(websocket_workers(children)),
        }
        return compared(size, kinds, "over TLS", "without TLS", round_goal=1.1, rate_goal=0.9)


def compared(
    size: Size,
    kinds: dict[str, list[BaseWorker]],
    how: str,
    without: str,
    *,
    round_goal: float,
    rate_goal: float,
) -> list[Row]:
    """The rows of workers that are reached, or work, in some way (`kinds["ours"]`), beside those that are not."""
    return [
        _round(size, kinds, how, without, Goal(at_most=round_goal)),
        _operations(size, kinds, how, without, Goal(at_least=rate_goal)),
        _large(size, kinds, how, without),
    ]


def _certificates(folder: Path) -> tuple[tuple[str, ...], Path]:
    """The options of workers with a certificate, and the file of its authority."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["certs", "make", "--worker", "worker", "--dir", str(folder)]) == 0
    pair = f"--tls-cert={folder / 'worker.pem'}", f"--tls-key={folder / 'worker-key.pem'}"
    return pair, folder / "ca.pem"


def _with(children: Sequence[ChildOptions], more: tuple[str, ...]) -> list[ChildOptions]:
    return [ChildOptions(child.id, child.port, (*child.options, *more)) for child in children]


def _round(size: Size, kinds: dict[str, list[BaseWorker]], how: str, without: str, goal: Goal) -> Row:
    batches = 1 if size.quick else BATCHES
    rounds = {name: Rounds(workers, mnist_config(batches)) for name, workers in kinds.items()}
    times = in_turns({name: one.run for name, one in rounds.items()}, repeats=size.repeats)
    took = {name: sample.map(lambda seconds: 1000 * seconds) for name, sample in times.items()}
    note = f"three workers, {batches} batches of 32"
    return Row(f"round {how}", "ms", took["ours"], took["plain"], without, goal, note)


def _operations(size: Size, kinds: dict[str, list[BaseWorker]], how: str, without: str, goal: Goal) -> Row:
    count = 200 if size.quick else 10_000
    starts = {name: torch.ones(4).send(workers[0]) for name, workers in kinds.items()}

    def chain(start: torch.Tensor) -> None:
        x = start
        for _ in range(count):
            x = x + start
        x.get()  # type: ignore[attr-defined]

    times = in_turns({name: lambda x=x: chain(x) for name, x in starts.items()}, repeats=size.repeats)
    rates = {name: sample.map(lambda seconds: count / seconds) for name, sample in times.items()}
    note = f"{count:,} additions of 4 elements, to the final get"
    return Row(f"posted operations {how}", "1/s", rates["ours"], rates["plain"], without, goal, note)


def _large(size: Size, kinds: dict[str, list[BaseWorker]], how: str, without: str) -> Row:
    big = torch.randn(25_000 if size.quick else LARGE)
    times = in_turns(
        {name: lambda to=workers[0]: big.send(to).get() for name, workers in kinds.items()},
        repeats=size.repeats,
    )
    speeds: dict[str, Sample] = {
        name: sample.map(lambda seconds: 2 * big.nbytes / 1e6 / seconds) for name, sample in times.items()
    }
    note = f"{big.nbytes / 1e6:.0f} MB there and back"
    return Row(f"send and get {how}", "MB/s", speeds["ours"], speeds["plain"], without, note=note)
