"""Pointers: small posted operations, a large tensor there and back, an eager training step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F

import planrt
from benchmarks.measure import Goal, PeakMemory, Row, Sample, in_turns, resident_bytes
from benchmarks.rounds import websocket_workers
from benchmarks.sockets import BareSockets, Echoes
from benchmarks.workloads import BATCH_SIZE, LR, SEED, Size
from planrt.fl.runs.children import ChildOptions
from planrt.fl.runs.networks import seeded_net
from planrt.workers import BaseWorker, VirtualWorker

LARGE = 25_000_000
"""float32 elements of the large tensor: 100 MB."""

_ECHOES = 300
"""Round trips that stand for awaiting each operation; their time is scaled up."""


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    planrt.TorchHook(torch)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the worker has: the local step must not fight with it for cores
    try:
        with ExitStack() as stack:
            child = ChildOptions("bob", options=("--empty", "--threads", "1"))
            (remote,) = stack.enter_context(websocket_workers([child]))
            virtual = stack.enter_context(VirtualWorker("bob"))
            echoes = stack.enter_context(Echoes(1))
            sockets = stack.enter_context(BareSockets(1))
            return [
                *_operations(size, remote, virtual, echoes),
                *_large(size, remote, sockets),
                _training(size, remote),
            ]
    finally:
        torch.set_num_threads(before)


def _operations(size: Size, remote: BaseWorker, virtual: BaseWorker, echoes: Echoes) -> list[Row]:
    count = 200 if size.quick else 10_000

    def chain(start: torch.Tensor) -> torch.Tensor:
        x = start
        for _ in range(count):
            x = x + start
        return x

    x_remote, x_virtual, x_local = (
        torch.ones(4).send(remote), torch.ones(4).send(virtual), torch.ones(4),
    )  # fmt: skip
    payload = bytes(64)
    few = min(count, _ECHOES)
    times = in_turns(
        {
            "websocket": lambda: chain(x_remote).get(),  # type: ignore[attr-defined]
            "virtual": lambda: chain(x_virtual).get(),  # type: ignore[attr-defined]
            "local": lambda: chain(x_local),
            "echoes": lambda: [echoes.round_trip(payload) for _ in range(few)],
        },
        repeats=size.repeats,
    )

    def rate(name: str, operations: int) -> Sample:
        return times[name].map(lambda seconds: operations / seconds)

    note = f"{count:,} additions of 4 elements, to the final get"
    return [
        Row(
            "posted operations, websocket", "1/s", rate("websocket", count), rate("echoes", few),
            "websockets echoes, one awaited after the other", Goal(at_least=10_000, absolute=True), note,
        ),
        Row(
            "posted operations, virtual worker", "1/s", rate("virtual", count), rate("local", count), "eager PyTorch",
            Goal(at_least=15_000, absolute=True), note,
        ),
    ]  # fmt: skip


def _large(size: Size, remote: BaseWorker, sockets: BareSockets) -> list[Row]:
    big = torch.randn(25_000 if size.quick else LARGE)

    def there_and_back() -> None:
        big.send(remote).get()  # type: ignore[attr-defined]

    peaks: dict[str, list[float]] = {"client": [], "worker": []}
    for _ in range(3):
        gc.collect()
        start, start_there = resident_bytes(), resident_bytes(_pid_of(remote))
        with PeakMemory() as here, PeakMemory(pid=_pid_of(remote)) as there:
            there_and_back()
        peaks["client"].append((here.bytes - start) / big.nbytes)
        peaks["worker"].append((there.bytes - start_there) / big.nbytes)
    times = in_turns(
        {"ours": there_and_back, "socket": lambda: sockets.round_trip(big.nbytes, 1)}, repeats=size.repeats
    )
    megabytes = {
        name: sample.map(lambda seconds: 2 * big.nbytes / 1e6 / seconds) for name, sample in times.items()
    }
    return [
        Row(
            "send and get", "MB/s", megabytes["ours"], megabytes["socket"], "one TCP socket", Goal(at_least=1 / 3),
            f"{big.nbytes / 1e6:.0f} MB there and back in {times['ours'].median:.3f} s",
        ),
        *(
            Row(
                f"send and get, extra memory of the {side}", "payloads", Sample((max(ratios),)),
                goal=Goal(at_most=2.2, absolute=True), note="highest of three",
            )
            for side, ratios in peaks.items()
        ),
    ]  # fmt: skip


def _pid_of(remote: BaseWorker) -> int:
    import psutil

    port = int(remote.address.rsplit(":", 1)[1])
    for process in psutil.Process().children(recursive=True):
        if any(one.laddr.port == port for one in process.net_connections() if one.status == "LISTEN"):
            return int(process.pid)
    raise RuntimeError(f"no child listens on port {port}")


def _training(size: Size, remote: BaseWorker) -> Row:
    steps = 2 if size.quick else 20
    images, target = torch.randn(BATCH_SIZE, 1, 28, 28), torch.randint(0, 10, (BATCH_SIZE,))

    def trainer(
        model: torch.nn.Module, x: Any, y: Any, end: Callable[[torch.Tensor], Any]
    ) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR / 100)

        def train() -> None:
            loss = torch.zeros(())
            for _ in range(steps):
                optimizer.zero_grad()
                loss = F.nll_loss(model(x), y)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            end(loss)

        return train

    there = seeded_net(SEED)
    there.send(remote)  # type: ignore[operator]
    times = in_turns(
        {
            "ours": trainer(
                there, images.send(remote), target.send(remote), lambda loss: loss.detach().get()
            ),  # type: ignore[attr-defined]
            "local": trainer(seeded_net(SEED), images, target, lambda loss: loss.item()),
        },
        repeats=2 * size.repeats,
    )
    milliseconds = {name: sample.map(lambda s: 1000 * s / steps) for name, sample in times.items()}
    return Row(
        "eager training step, websocket", "ms", milliseconds["ours"], milliseconds["local"], "eager PyTorch here",
        Goal(at_most=1.3), f"MNIST network, batch of 32, SGD, one thread, {steps} steps",
    )  # fmt: skip
