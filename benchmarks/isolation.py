"""Isolation: the same work in processes of its own, and in the worker's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

import planrt
from benchmarks.measure import Goal, Row, in_turns
from benchmarks.rounds import websocket_workers
from benchmarks.tls import compared
from benchmarks.workloads import Size
from planrt.fl.data import digits as data
from planrt.fl.runs.children import ChildOptions, mnist_children
from planrt.workers import BaseWorker


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    planrt.TorchHook(torch)
    with ExitStack() as stack:
        plain = [child for child in mnist_children(data.find()) if child.id in data.PARTITIONS]
        isolated = [ChildOptions(one.id, one.port, (*one.options, "--isolation", "on")) for one in plain]
        kinds = {
            "ours": stack.enter_context(websocket_workers(isolated)),
            "plain": stack.enter_context(websocket_workers(plain)),
        }
        how = "with isolation", "without isolation"
        rows = compared(size, kinds, *how, round_goal=1.03, rate_goal=1 / 1.2)
        return [*rows, awaited(size, kinds, *how, Goal(at_most=1.2)), _calls(size, kinds, *how)]


def awaited(size: Size, kinds: dict[str, list[BaseWorker]], how: str, without: str, goal: Goal) -> Row:
    """The row of an operation whose result is fetched before the next one."""
    count = 20 if size.quick else 300

    def make(worker: BaseWorker) -> Callable[[], None]:
        x: Any = torch.ones(4).send(worker)  # type: ignore[attr-defined]

        def run() -> None:
            for _ in range(count):
                (x + x).get()

        return run

    return _row(size, kinds, make, count, f"an operation and its get {how}", without, goal)


def _calls(size: Size, kinds: dict[str, list[BaseWorker]], how: str, without: str) -> Row:
    count = 20 if size.quick else 300
    plan: planrt.Plan = planrt.func2plan(lambda x: (x * 2 + 1).relu().sum(), args_shape=[(4,)])

    def called(worker: BaseWorker) -> Callable[[], None]:
        there, x = plan.send(worker), torch.ones(4).send(worker)  # type: ignore[attr-defined]

        def run() -> None:
            for _ in range(count):
                there(x).get()

        return run

    return _row(size, kinds, called, count, f"a call of a plan and its get {how}", without, Goal(at_most=1.2))


def _row(
    size: Size,
    kinds: dict[str, list[BaseWorker]],
    make: Callable[[BaseWorker], Callable[[], None]],
    count: int,
    what: str,
    without: str,
    goal: Goal,
) -> Row:
    times = in_turns({name: make(workers[0]) for name, workers in kinds.items()}, repeats=size.repeats)
    took = {name: sample.map(lambda seconds: 1000 * seconds / count) for name, sample in times.items()}
    return Row(what, "ms", took["ours"], took["plain"], without, goal)
