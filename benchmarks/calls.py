"""Calls of plans on a worker process: what one message saves, and what it costs over an empty one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

import planrt
from benchmarks.measure import Goal, Row, Sample, in_turns
from benchmarks.rounds import websocket_workers
from benchmarks.workloads import Size
from planrt.fl.runs.children import ChildOptions
from planrt.types import Ref
from planrt.workers import BaseWorker
from planrt.workers.wire.posted import PostedOp

OPS = (1, 10, 100)
_CALLS = 20
"""Calls in one measurement: a single one is too short for the clock of a shared machine."""


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    planrt.TorchHook(torch)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the worker has
    try:
        with ExitStack() as stack:
            child = ChildOptions("bob", options=("--empty", "--threads", "1"))
            (remote,) = stack.enter_context(websocket_workers([child]))
            return _rows(size, remote)
    finally:
        torch.set_num_threads(before)


def _additions(count: int) -> planrt.Plan:
    def add(x: torch.Tensor) -> torch.Tensor:
        for _ in range(count):
            x = x + 1
        return x

    plan: planrt.Plan = planrt.func2plan(add, args_shape=[(4,)])
    return plan


def _rows(size: Size, remote: BaseWorker) -> list[Row]:
    calls = 2 if size.quick else _CALLS
    here = torch.ones(4)
    x: Any = here.send(remote)  # type: ignore[operator]
    plans = {count: _additions(count) for count in OPS}
    empty: planrt.Plan = planrt.func2plan(lambda x: x, args_shape=[(4,)])

    def there(plan: planrt.Plan) -> Callable[[], None]:
        pointer = plan.send(remote)

        def call() -> None:
            for _ in range(calls):
                remote.workplace.objects.fetch(pointer(x), delete=False)

        return call

    def local(plan: planrt.Plan) -> Callable[[], None]:
        def call() -> None:
            for _ in range(calls):
                plan(here)

        return call

    def awaited() -> None:
        """100 additions, each a request whose answer is awaited before the next one leaves."""
        value = x
        for _ in range(OPS[-1]):
            op = PostedOp(
                "Tensor.add",
                (Ref(value.id_at_location), 1),
                {},
                None,
                True,
                None,
                remote.workplace.take_drops(),
            )
            value = remote.workplace.call(op.pack())
        remote.workplace.objects.fetch(value, delete=False)

    times = in_turns(
        {
            "empty": there(empty),
            **{f"there {count}": there(plan) for count, plan in plans.items()},
            **{f"here {count}": local(plan) for count, plan in plans.items()},
            "awaited": awaited,
        },
        repeats=2 * size.repeats,
    )
    one = {name: sample.map(lambda seconds: 1000 * seconds / calls) for name, sample in times.items()}
    one["awaited"] = times["awaited"].map(lambda seconds: 1000 * seconds)
    rows = []
    for count in OPS:
        floor = _sum(one["empty"], one[f"here {count}"])
        goal = Goal(at_most=1.3) if count == OPS[-1] else None
        rows.append(
            Row(
                f"call of a plan of {count} ops", "ms", one[f"there {count}"], floor, "empty plan there + plan here",
                goal, "to the value of its result; additions of 4 elements",
            )
        )  # fmt: skip
    rate = {
        name: one[name].map(lambda milliseconds: 1000 / milliseconds) for name in ("awaited", "there 100")
    }
    rows.append(
        Row(
            "100 ops in a plan", "1/s", rate["there 100"], rate["awaited"], "the same ops, awaited one by one",
            Goal(at_least=20), "runs of all 100 a second",
        )
    )  # fmt: skip
    return rows


def _sum(one: Sample, other: Sample) -> Sample:
    return Sample(tuple(a + b for a, b in zip(one.values, other.values, strict=True)))
