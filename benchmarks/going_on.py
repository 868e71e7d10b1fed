"""Going on: what it costs that sessions outlive their connections, and that large states are in checkpoints."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import planrt
from benchmarks.isolation import awaited
from benchmarks.measure import Goal, Row, in_turns
from benchmarks.rounds import Rounds, websocket_workers
from benchmarks.tls import compared
from benchmarks.workloads import Size, mnist_config
from planrt.fl.data import digits as data
from planrt.fl.runs.children import ChildOptions, mnist_children
from planrt.fl.runs.run_folder import KEPT
from planrt.fl.runs.run_record import RunRecord
from planrt.workers import BaseWorker

PARAMETERS = 25_000_000
TENSORS = 20

KEPT_SESSIONS, LOST_SESSIONS = "with kept sessions", "without"


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    planrt.TorchHook(torch)
    with ExitStack() as stack:
        plain = [child for child in mnist_children(data.find()) if child.id in data.PARTITIONS]
        without = [ChildOptions(one.id, one.port, (*one.options, "--keep-sessions", "0")) for one in plain]
        kinds: dict[str, list[BaseWorker]] = {
            "ours": stack.enter_context(websocket_workers(plain)),
            "plain": stack.enter_context(websocket_workers(without)),
        }
        rows = compared(size, kinds, KEPT_SESSIONS, LOST_SESSIONS, round_goal=1.03, rate_goal=1 / 1.03)
        rows.append(_overhead(size, kinds))
        rows.append(awaited(size, kinds, KEPT_SESSIONS, LOST_SESSIONS, Goal(at_most=1.03)))
    return [*rows, _checkpoint(size)]


def _overhead(size: Size, kinds: dict[str, list[BaseWorker]]) -> Row:
    rounds = {name: Rounds(workers, mnist_config(0)) for name, workers in kinds.items()}
    times = in_turns({name: one.run for name, one in rounds.items()}, repeats=3 * size.repeats)
    took = {name: sample.map(lambda seconds: 1000 * seconds) for name, sample in times.items()}
    note = "zero batches, 431,080 parameters there and back, three workers"
    return Row(
        f"overhead of a round {KEPT_SESSIONS}", "ms", took["ours"], took["plain"], LOST_SESSIONS,
        Goal(at_most=1.03), note,
    )  # fmt: skip


def _checkpoint(size: Size) -> Row:
    each = (25_000 if size.quick else PARAMETERS) // TENSORS
    tensors = {f"state/{number}": torch.randn(each) for number in range(TENSORS)}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with TemporaryDirectory() as folder, asyncio.Runner() as runner:
        record = RunRecord(Path(folder, "run"))
        record.begin({}, {})

        def save() -> None:
            number = record.next_round
            runner.run(record.save(number, {"round": number}, {}, tensors, checkpoint=True))
            runner.run(record.settled())

        times = in_turns(
            {"ours": save, "disk": _written(Path(folder), torch.cat(list(tensors.values())))},
            repeats=size.repeats,
        )
        runner.run(record.close())
    speed = {name: sample.map(lambda seconds: nbytes / 1e6 / seconds) for name, sample in times.items()}
    return Row(
        "checkpoint of a large state", "MB/s", speed["ours"], speed["disk"], "as many bytes and fsync, no hash",
        Goal(at_least=0.5), f"{nbytes / 1e6:.0f} MB, {times['ours'].median:.3f} s",
    )  # fmt: skip


def _written(folder: Path, values: torch.Tensor) -> Callable[[], None]:
    """Writes a new file of these bytes each time, and keeps as many as a run does of its checkpoints."""
    content, numbers = memoryview(values.numpy()).cast("B"), iter(range(1_000_000))

    def write() -> None:
        number = next(numbers)
        file = os.open(folder / f"{number}.bin", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        rest = content
        while rest:
            rest = rest[os.write(file, rest[: 1 << 22]) :]
        os.fsync(file)
        os.close(file)
        (folder / f"{number - KEPT}.bin").unlink(missing_ok=True)

    return write
