"""``timeout=`` of calls that wait: every public one takes it, and ends in time where a worker does not answer."""

import asyncio
import contextlib
import inspect
import re

import pytest
import torch
from torch import nn

import planrt
from planrt import Protocol, func2plan, torch_hook
from planrt.errors import (
    GonePointerError,
    OptionError,
    RemoteError,
    WorkerLostError,
    WorkerTimeoutError,
)
from planrt.fl import TrainConfig
from planrt.fl.utils import evaluate_model_on_worker
from planrt.grid import PrivateGridNetwork
from planrt.protocols.pointer import PointerProtocol
from planrt.sharing.tensors.shared import SharedTensor
from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.pointers.multi import MultiPointerTensor
from planrt.workers.pointers.plan import MultiPointerPlan, PointerPlan
from planrt.workers.pointers.tensor import PointerTensor
from tests.proxy import CuttingProxy

CLASSES = (
    VirtualWorker, WebsocketClientWorker, PointerTensor, PointerPlan, MultiPointerPlan, MultiPointerTensor, Protocol,
    PointerProtocol, TrainConfig, PrivateGridNetwork, BaseDataset, SharedTensor,
)  # fmt: skip
FUNCTIONS = (
    planrt.send,
    planrt.get,
    planrt.move,
    evaluate_model_on_worker,
    torch_hook.send,
    torch_hook.async_send,
)

WAITS = re.compile(
    r"\brun\(|\bawait |\.fetch\(|\.moves\.|\.objects\.put\(|\.objects\.remove\(|fetch_all\(|\.plans\.take\("
)
"""What the bodies of functions have that wait for a worker."""

TAKES_ITS_OWN = {
    "close": "waits for 2 seconds at most",
    "async_close": "waits for 2 seconds at most",
    "connect": "the `timeout` of its client bounds it",
    "async_reconnect": "the `timeout` of its client bounds it",
    "connect_as": "is within this process",
}


def public_calls(cls):
    for name, value in inspect.getmembers(cls):
        found = (
            inspect.unwrap(value.__func__ if inspect.ismethod(value) else value) if callable(value) else None
        )
        if not name.startswith("_") and inspect.isfunction(found) and found.__module__.startswith("planrt."):
            yield name, found


@pytest.fixture(scope="module", autouse=True)
def hook():
    """Tensors have `send` from here on."""
    return planrt.TorchHook(torch)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_public_call_that_waits_takes_a_timeout(cls):
    calls = dict(public_calls(cls))
    waiting = [name for name, call in calls.items() if WAITS.search(inspect.getsource(call))]
    assert waiting or cls is MultiPointerPlan  # whose parts wait
    missing = [name for name in waiting if "timeout" not in inspect.signature(calls[name]).parameters]
    assert [name for name in missing if name not in TAKES_ITS_OWN] == []


@pytest.mark.parametrize("call", FUNCTIONS, ids=lambda call: call.__name__)
def test_functions_that_wait_take_a_timeout(call):
    assert "timeout" in inspect.signature(call).parameters


@func2plan(args_shape=[(3,)])
def double(x):
    return x * 2


class World:
    """A worker that answers for as long as it is not cut off, and one beside it."""

    def __init__(self, bob, alice, between):
        self.bob, self.alice, self.between = bob, alice, between
        self.x, self.y = torch.ones(3).send(bob), torch.ones(3).send(alice)
        self.plan = double.send(bob)
        self.protocol = Protocol([("one", double), ("two", double)]).deploy(alice, bob)
        self.protocol.run(torch.ones(3))
        self.there = Protocol([("one", double)]).deploy(bob).send(bob)
        self.there.run(torch.ones(3))
        self.both = torch.ones(1).send(bob).combine(torch.ones(1).send(alice))
        self.config = TrainConfig(nn.Linear(3, 2), nn.functional.cross_entropy, batch_size=4)
        self.config.send(bob)
        bob.fit("d")


WRONG = ["zero", "negative", "nan", "infinite", "huge", "text", "bool"]

CALLS = {
    "get": lambda w, **t: w.x.get(**t),
    "planrt.get": lambda w, **t: planrt.get(w.x, **t),
    "move": lambda w, **t: w.x.move(w.alice, **t),
    "move to it": lambda w, **t: w.y.move(w.bob, **t),
    "send much": lambda w, **t: torch.ones(4_000_000).send(w.bob, **t),
    "send a pointer": lambda w, **t: w.y.send(w.bob, **t),
    "send_": lambda w, **t: torch.ones(2).send_(w.bob, **t),
    "search": lambda w, **t: w.bob.search("#x", **t),
    "grid": lambda w, **t: PrivateGridNetwork(w.bob, w.alice).search("#x", **t),
    "fit": lambda w, **t: w.bob.fit("d", **t),
    "evaluate": lambda w, **t: w.bob.evaluate("d", **t),
    "send a config": lambda w, **t: TrainConfig(nn.Linear(900, 900), nn.functional.mse_loss).send(w.bob, **t),
    "run": lambda w, **t: w.bob.run(double, torch.ones(3), **t),
    "a plan's get": lambda w, **t: w.plan.get(**t),
    "a plan's move": lambda w, **t: w.plan.move(w.alice, **t),
    "fetch_plan": lambda w, **t: w.bob.fetch_plan(w.plan.id_at_location, w.bob, **t),
    "protocol": lambda w, **t: w.protocol.run(torch.ones(3), **t),
    "protocol there": lambda w, **t: w.there.run(torch.ones(3), **t),
    "a protocol's get": lambda w, **t: w.there.get(**t),
    "count": lambda w, **t: w.bob.objects_count(**t),
    "clear": lambda w, **t: w.bob.clear_objects(**t),
    "list": lambda w, **t: w.bob.list_objects(**t),
    "rm_obj": lambda w, **t: w.bob.rm_obj(w.x.id_at_location, **t),
    "approval": lambda w, **t: w.bob.approval(double, **t),
    "several": lambda w, **t: w.both.get(**t),
    "send a module": lambda w, **t: nn.Linear(2, 1).send(w.bob, **t),
    "await get": lambda w, **t: asyncio.run(w.x.async_get(**t)),
    "await search": lambda w, **t: asyncio.run(w.bob.async_search("#x", **t)),
}
WITH_ALICE = ("move to it", "send a pointer", "protocol")
"""Calls that alice answers first, who is there, and may be slow: too late, it would be her who is named."""


@pytest.fixture(scope="module")
def world():
    with contextlib.ExitStack() as stack:
        data = BaseDataset(torch.randn(8, 3), torch.zeros(8, dtype=torch.int64))
        clients = []
        for name in ("bob", "alice"):
            server = WebsocketServerWorker(name, threads=1)
            server.add_dataset(data, "d")
            between = CuttingProxy(stack.enter_context(server.running()))
            uri = stack.enter_context(between.running())
            clients.append(
                (stack.enter_context(WebsocketClientWorker(name, uri=uri, reconnect=600)), between)
            )
        (bob, between), (alice, _) = clients
        yield World(bob, alice, between)
        between.refuses = False


@pytest.mark.parametrize(
    "wrong",
    [0, -1, float("nan"), float("inf"), 10**400, "5", True],
    ids=["0", "-1", "nan", "inf", "huge", "text", "True"],
)
def test_wrong_times_are_refused_before_anything_is_done(world, wrong):
    for name, call in CALLS.items():
        with pytest.raises(OptionError, match="timeout is a number of seconds above 0") as caught:
            call(world, timeout=wrong)
        assert "\n" not in str(caught.value), name


def test_calls_end_in_time_and_cost_nothing(world):
    world.between.refuses = True
    world.between.cut()
    for name, call in CALLS.items():
        with pytest.raises((WorkerTimeoutError, WorkerLostError, RemoteError)) as caught:
            call(world, timeout=20 if name in WITH_ALICE else 0.1)
        assert "bob" in str(caught.value) or world.bob.address in str(caught.value), name
    world.between.refuses = False
    assert world.bob.objects_count(timeout=60) >= 0  # it is there again, and did what was asked before


def test_a_timeout_of_a_call_is_the_stricter_of_two(world):
    with planrt.waiting(60):
        assert world.alice.objects_count(timeout=30) > 0
    with pytest.raises(WorkerTimeoutError, match=r"within 1e-06 s"), planrt.waiting(1e-6):
        world.alice.objects_count(timeout=30)
    with contextlib.suppress(GonePointerError):
        assert world.y.get(timeout=30).tolist() == [1, 1, 1]
