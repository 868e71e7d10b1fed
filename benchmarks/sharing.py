"""Shares between two worker processes and a dealer's: a training step, single operations, share and get.

The figures are those of a loop: each call comes right after another one, so that the dealer's work falls into the time
that is measured, as in training, and no process has slept. What one call after a pause takes is told beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.measure import PAUSE, Goal, Row, in_turns
from benchmarks.rounds import websocket_workers
from benchmarks.workloads import SEED, Size
from planrt.fl.runs.children import ChildOptions
from planrt.plans import Plan, func2plan
from planrt.sharing.tensors.shared import share, share_module
from planrt.workers.shares.session import WorkersSession, sharing_session

_RATE = 0.05
_LEAD = 2
"""Calls right before each one that is measured."""
LATENCIES = (1, 10, 50)
"""Milliseconds between parties that figures are told for."""


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    options = ("--empty", "--threads", "1")
    try:
        children = [ChildOptions(name, options=options) for name in ("bob", "alice", "james")]
        with websocket_workers(children) as (bob, alice, james):
            session = sharing_session([bob, alice], james)
            torch.manual_seed(SEED)
            few = 100 if size.quick else 1
            return [
                *_training(size, session),
                _forward(size, session),
                _single(size, session, "relu", torch.relu, 25.0, torch.randn(100_000 // few)),
                _single(
                    size, session, "mul", torch.mul, 60.0,
                    torch.randn(1_000_000 // few), torch.randn(1_000_000 // few),
                ),
                _single(size, session, "mm 256", torch.mm, 15.0, torch.randn(256, 256), torch.randn(256, 256)),
                _single(size, session, "max of (64, 10)", lambda x: x.amax(1), 10.0, torch.randn(64, 10)),
                _share_and_get(size, session, 1_000_000 // few),
                _changing(size, session),
            ]  # fmt: skip
    finally:
        torch.set_num_threads(before)


def _row(
    size: Size,
    session: WorkersSession,
    name: str,
    ours: Callable[[], Any],
    plain: Callable[[], Any],
    goal: float | None,
) -> Row:
    calls = 0

    def counted() -> None:
        nonlocal calls
        calls += 1
        ours()

    counted()
    start, first = session.traffic(), calls
    times = in_turns({"ours": counted, "plain": plain}, repeats=3 * size.repeats, lead=_LEAD)
    end = session.traffic()
    last = session.parties[-1]
    rounds = (end[last].rounds - start[last].rounds) / (calls - first)
    sent = (end[last].sent - start[last].sent) / (calls - first)
    dealt = (end[last].dealt - start[last].dealt) / (calls - first)
    milliseconds = {key: sample.map(lambda seconds: 1000 * seconds) for key, sample in times.items()}
    median = milliseconds["ours"].median
    rested = 1000 * in_turns({"ours": ours}, repeats=size.repeats)["ours"].median
    slower = ", ".join(f"{median + rounds * latency:.0f} at {latency} ms" for latency in LATENCIES)
    return Row(
        name, "ms", milliseconds["ours"], milliseconds["plain"], "plain PyTorch here",
        None if goal is None else Goal(at_most=goal, absolute=True),
        f"{rounds:.0f} rounds, {sent / 1e6:.2f} MB sent by each party, {dealt / 1e6:.2f} MB from the dealer to one "
        f"party; with latency between parties {slower}; {rested:.1f} ms after a pause of {1000 * PAUSE:.0f} ms",
        {"rounds": rounds, "sent": sent, "dealt": dealt, "rested": rested},
    )  # fmt: skip


def _training(size: Size, session: WorkersSession) -> list[Row]:
    """A step as a plan, one message to each party, and line by line as PyTorch's own; the loss of each is opened."""
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = torch.rand(64, 784), functional.one_hot(torch.arange(64) % 10, 10).float()

    def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=_RATE)

        def once() -> torch.Tensor:
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).sum() / 64
            loss.backward()
            optimizer.step()
            return loss

        return once

    plain = step(copy.deepcopy(model), x, y)
    weights = [share(session, one.detach()) for one in model.parameters()]
    there = share(session, x), share(session, y)
    planned = _training_step()
    planned.build(x, y, *[one.detach() for one in model.parameters()])

    def as_a_plan() -> None:
        loss, *weights[:] = planned(*there, *weights)
        loss.get()

    line_by_line = step(share_module(session, copy.deepcopy(model)), *there)
    name = "training step 784-128-64-10, batch 64"
    return [
        _row(size, session, name, as_a_plan, plain, 40.0),
        _row(size, session, "the same, line by line", lambda: line_by_line().get(), plain, None),  # type: ignore[attr-defined]
    ]


def _changing(size: Size, session: WorkersSession) -> Row:
    """Steps with other labels that all know, and another rate, beside steps of the same model with the same ones."""

    def steps(*, change: bool) -> Callable[[], None]:
        model = share_module(session, nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2)))
        optimizer = torch.optim.Adam(model.parameters())  # whose corrections are others in each step, too
        rows, done = share(session, torch.randn(64, 30)), 0

        def once() -> None:
            nonlocal done
            labels = (torch.arange(64) * (1 + done % 7)) // 3 % 2 if change else torch.arange(64) % 2
            optimizer.param_groups[0]["lr"] = 0.01 * 0.999**done if change else 0.01
            done += 1
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(rows), labels)
            loss.backward()
            optimizer.step()
            loss.get()

        return once

    ours, same = steps(change=True), steps(change=False)
    for _ in range(12):
        ours()
        same()
    times = in_turns({"ours": ours, "same": same}, repeats=2 * size.repeats, lead=_LEAD)
    milliseconds = {key: sample.map(lambda seconds: 1000 * seconds) for key, sample in times.items()}
    return Row(
        "Adam, other labels and rates in each step", "ms", milliseconds["ours"], milliseconds["same"],
        "the same labels and rate", Goal(at_most=1.15), "what is known of one step serves the next one",
    )  # fmt: skip


def _training_step() -> Plan:
    @func2plan()
    def training_step(x: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = tuple([one.detach().requires_grad_() for one in weights])
        hidden = functional.linear(x, weights[0], weights[1]).relu()
        hidden = functional.linear(hidden, weights[2], weights[3]).relu()
        loss = ((functional.linear(hidden, weights[4], weights[5]) - y) ** 2).sum() / 64
        loss.backward()
        return loss.detach(), *[one.detach() - _RATE * one.grad for one in weights if one.grad is not None]

    return training_step


def _forward(size: Size, session: WorkersSession) -> Row:
    model = nn.Sequential(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 10))
    there, x = share_module(session, copy.deepcopy(model)), torch.rand(50, 784)

    def ours() -> None:
        with torch.no_grad():
            there(share(session, x)).get()

    return _row(size, session, "forward 784-500-10, batch 50", ours, lambda: model(x), 20.0)


def _single(
    size: Size,
    session: WorkersSession,
    name: str,
    function: Callable[..., torch.Tensor],
    goal: float,
    *values: torch.Tensor,
) -> Row:
    """One operation on fresh shares: nothing of them has been opened under a mask before."""
    shared = [share(session, value) for value in values]

    def ours() -> None:
        result = function(*[one + 1 for one in shared])
        session.traffic()  # which is answered once the program has run; nothing of the result is opened
        del result

    return _row(size, session, name, ours, lambda: function(*values), goal)


def _share_and_get(size: Size, session: WorkersSession, count: int) -> Row:
    values = torch.randn(count)
    return _row(
        size, session, "share and get", lambda: share(session, values).get(), lambda: values.clone(), 40.0
    )
