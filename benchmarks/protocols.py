"""Protocols over three worker processes, against the same calls of plans made one by one through pointers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

import planrt
from benchmarks.measure import Row, in_turns
from benchmarks.rounds import websocket_workers
from benchmarks.workloads import Size
from planrt.fl.runs.children import ChildOptions
from planrt.workers import BaseWorker

PLACES = ("alice", "bob", "charlie")
_RUNS = 10
"""Runs in one measurement."""
_LARGE = 1 << 20
"""Elements of the tensor that goes from worker to worker: 4 MiB."""


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    planrt.TorchHook(torch)
    with ExitStack() as stack:
        children = [ChildOptions(name, options=("--empty", "--threads", "1")) for name in PLACES]
        workers = stack.enter_context(websocket_workers(children))
        return _rows(size, workers)


def _rows(size: Size, workers: list[BaseWorker] | Any) -> list[Row]:
    runs = 1 if size.quick else _RUNS
    plan: planrt.Plan = planrt.func2plan(lambda x: x * 2 + 1, args_shape=[(-1,)])
    mean: planrt.Plan = planrt.func2plan(lambda a, b, c: (a + b + c) / 3, args_shape=[(-1,)] * 3)
    there = [plan.send(worker) for worker in workers]
    mean_there = mean.send(workers[0])
    line = planrt.Protocol([planrt.Step(name, plan, name=name) for name in PLACES]).deploy(*workers)
    joined = planrt.Protocol(
        [
            *(planrt.Step(name, plan, ["x"], name=name) for name in PLACES),
            planrt.Step(PLACES[0], mean, list(PLACES), name="mean"),
        ],
        inputs=["x"],
    ).deploy(*workers)

    def line_by_hand(x: torch.Tensor) -> torch.Tensor:
        value: Any = x.send(workers[0])  # type: ignore[operator]
        for number, pointer in enumerate(there):
            value = pointer(value if number == 0 else value.move(workers[number]))
        return value.get()  # type: ignore[no-any-return]

    def joined_by_hand(x: torch.Tensor) -> torch.Tensor:
        made = [
            pointer(x.send(worker))  # type: ignore[operator]
            for pointer, worker in zip(there, workers, strict=True)
        ]
        gathered = [made[0], *(one.move(workers[0]) for one in made[1:])]
        return mean_there(*gathered).get()  # type: ignore[no-any-return]

    small, large = torch.ones(4), torch.ones(_LARGE)
    by_hand = "calls and moves by hand"
    cases: list[tuple[str, torch.Tensor, Any, Callable[[torch.Tensor], torch.Tensor], str]] = [
        ("line of three workers", small, line, line_by_hand, "4 elements, to the value of the result"),
        ("line, 4 MiB", large, line, line_by_hand, "from here to alice, bob, charlie and back"),
        (
            "three at once, then a mean",
            small,
            joined,
            joined_by_hand,
            "4 elements; two results move to alice",
        ),
        ("three at once, 4 MiB", large, joined, joined_by_hand, "the same"),
    ]
    rows = []
    for name, x, protocol, hand, note in cases:
        assert torch.equal(protocol.run(x).get(), hand(x))
        times = in_turns(
            {
                "ours": _repeated(runs, lambda protocol=protocol, x=x: protocol.run(x).get()),
                "by hand": _repeated(runs, lambda hand=hand, x=x: hand(x)),
            },
            repeats=2 * size.repeats,
        )
        milliseconds = {
            key: sample.map(lambda seconds: 1000 * seconds / runs) for key, sample in times.items()
        }
        rows.append(Row(name, "ms", milliseconds["ours"], milliseconds["by hand"], by_hand, note=note))
    return rows


def _repeated(runs: int, call: Callable[[], object]) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(runs):
            call()

    return repeated
