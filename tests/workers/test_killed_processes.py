"""Worker processes that are killed, stopped, or behind a slow link, under pointers, plans, protocols and data sets."""

import asyncio
import contextlib
import random
import signal
import socket

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import planrt
from planrt import Protocol, func2plan
from planrt.errors import GonePointerError, PlanrtError, SessionLostError, WorkerLostError, WorkerTimeoutError
from planrt.fl import RoundScheduler, TrainConfig, federated_avg
from planrt.fl.runs.children import WorkerProcesses
from planrt.workers import VirtualWorker, WebsocketClientWorker
from tests import warm
from tests.fl.served import child
from tests.models import classification_data
from tests.proxy import CuttingProxy

pytestmark = pytest.mark.usefixtures("warm_workers")


MEGABIT = 125_000
"""Bytes a second."""


@pytest.fixture(autouse=True, scope="module")
def hook():
    """Tensors have `send` from here on."""
    return planrt.TorchHook(torch)


@func2plan(args_shape=[(3,)])
def double(x):
    return x * 2


def lasting_port():
    """A free port that no connection is given while nobody listens there: below those that the system chooses."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a hundred ports are taken")


class Process:
    """Alice's process, which may be killed and started again on its port."""

    def __init__(self):
        self.port = lasting_port()
        self.start()

    def start(self):
        self.processes = WorkerProcesses([child("alice", self.port)])
        self.processes.start()
        self.port = self.processes.wait_ready()["alice"].port

    def signal(self, number):
        warm.send_signal(self.processes.pids["alice"], number)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.processes.stop()

    def client(self, **options):
        options = {"reconnect": 30, "auto_add": False, **options}
        return WebsocketClientWorker("alice", uri=f"ws://127.0.0.1:{self.port}", **options)


@pytest.fixture(scope="module")
def process():
    process = Process()
    yield process
    process.processes.stop()


@pytest.fixture
def frozen(process):
    """A worker that is stopped meanwhile, and goes on afterwards."""

    @contextlib.contextmanager
    def freeze():
        process.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.signal(signal.SIGCONT)

    return freeze


def test_a_stopped_worker_ends_calls_in_time_and_loses_nothing(process, frozen):
    with process.client() as alice:
        x, plan = torch.ones(3).send(alice), double.send(alice)
        _config().send(alice)
        alice.fit("d")
        calls = {
            "get": lambda: (x + 1).get(timeout=1),
            "send": lambda: torch.ones(200_000).send(alice, timeout=1).get(timeout=1),
            "search": lambda: alice.search("#nothing", timeout=1),
            "a plan": lambda: plan(x).get(timeout=1),
            "a data set": lambda: alice.fit("d", timeout=1),
        }
        with frozen():
            for what, call in calls.items():
                with pytest.raises(WorkerTimeoutError, match="alice"):
                    pytest.fail(f"{what}: {call()}")
        x.add_(1)
        assert plan(x).get().tolist() == [4.0, 4.0, 4.0]


def test_what_a_killed_worker_held_is_named_at_the_first_call_and_new_work_goes_on(process):
    with process.client() as alice, VirtualWorker("bob", auto_add=False) as bob:
        x, plan = torch.ones(3).tag("#ones").send(alice), double.send(alice)
        protocol = Protocol([("alice", double), ("bob", double)])
        protocol.deploy(alice, bob)
        assert protocol.run(torch.ones(3)).get().tolist() == [4.0, 4.0, 4.0]
        process.kill()
        process.start()
        lost = (GonePointerError, SessionLostError, WorkerLostError)
        with pytest.raises(lost, match="alice"):
            x.get()
        with pytest.raises(lost):
            plan(x).get()
        assert alice.search("#ones") == []
        y = torch.ones(3).send(alice)
        assert double.send(alice)(y).get().tolist() == [2.0, 2.0, 2.0]
        with contextlib.suppress(PlanrtError):  # what it knew of the protocol is gone with it
            protocol.run(torch.ones(3)).get()
        protocol.deploy(alice, bob)
        assert protocol.run(torch.ones(3)).get().tolist() == [4.0, 4.0, 4.0]
        _config().send(alice)
        assert alice.fit("d").loss > 0


def test_who_does_not_reconnect_is_told_that_the_worker_is_gone(process):
    with process.client(reconnect=0, call_timeout=20) as alice:
        x = torch.ones(3).send(alice)
        process.kill()
        try:
            with pytest.raises(WorkerLostError, match="alice"):
                (x + 1).get()
            with pytest.raises(PlanrtError, match="alice"):
                torch.ones(3).send(alice).get()
        finally:
            process.start()


# ---------------------------------------------------------------------------------------------------- slow links


def _config():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3), nn.LogSoftmax(1))
    return TrainConfig(model, F.nll_loss, batch_size=8, max_nr_batches=3, optimizer_args={"lr": 0.1})


def test_rounds_of_batch_norm_and_pointers_over_a_slow_link_that_is_cut(process):
    proxy = CuttingProxy(f"ws://127.0.0.1:{process.port}", rate=MEGABIT)
    job = _config()
    with (
        proxy.running() as uri,
        VirtualWorker("alice", datasets={"d": classification_data(0)}, auto_add=False) as near,
        WebsocketClientWorker("alice", uri=uri, reconnect=30, auto_add=False) as alice,
    ):
        far, plain = (RoundScheduler([one], job, dataset_key="d", seed=3) for one in (alice, near))
        asyncio.run(far.prepare())
        asyncio.run(plain.prepare())
        state = job.state
        for number, direction in enumerate(("up", "down"), 1):
            proxy.cut_at(direction, 1500)
            result, expected = (asyncio.run(one.run_round(number, state)) for one in (far, plain))
            assert result.missing == {}
            for name, values in federated_avg({"alice": expected.state}).items():
                assert torch.equal(result.state[name], values), name
            state = result.state
        values = torch.randn(60_000)
        proxy.cut_at("up", 100_000)
        there = values.send(alice)
        proxy.cut_at("down", 150_000)
        assert torch.equal(there.get(), values)
        assert proxy.connections >= 3
