"""`planrt.local_workers`: worker processes of this machine for a block."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import planrt as sy
from planrt.errors import BlockingCallError, ConnectError, DataError, OptionError
from planrt.fl import TrainConfig
from planrt.loop import background_loop
from tests import warm
from tests.processes import alive, eventually

pytestmark = pytest.mark.usefixtures("warm_workers")

hook = sy.TorchHook(torch)


def halves():
    images, labels = torch.randn(20, 4), torch.arange(20) % 3
    return TensorDataset(images[:10], labels[:10]), sy.BaseDataset(
        images[10:], labels[10:], transform=lambda item: item * 2
    )


def trained_on(worker, model):
    config = TrainConfig(model, F.cross_entropy, batch_size=5, optimizer_args={"lr": 0.1})
    config.send(worker)
    return worker.fit("half", seed=3)


def test_workers_serve_their_data_sets_and_end_with_the_block():
    torch.manual_seed(0)
    first, second = halves()
    model = torch.nn.Linear(4, 3)
    starting = sy.local_workers(
        "alice",
        "bob",
        datasets={"alice": {"half": first, "again": first}, "bob": {"half": second}},
        threads=1,
    )
    with starting as (alice, bob):
        assert [alice.id, bob.id] == ["alice", "bob"]
        assert isinstance(alice, sy.WebsocketClientWorker)
        assert {key: info.length for key, info in alice.datasets.items()} == {"half": 10, "again": 10}
        x = torch.arange(3.0).send(bob)
        assert (x + x).get().tolist() == [0.0, 2.0, 4.0]
        pids = starting.pids
        assert sorted(pids) == ["alice", "bob"]
        assert os.getpid() not in pids.values()
        assert all(os.getsid(pid) != os.getsid(0) for pid in pids.values())
        with pytest.raises(OptionError, match="run already"):
            starting.__enter__()
        losses = [trained_on(worker, model).loss for worker in (alice, bob)]
    assert not any(map(alive, pids.values()))
    assert starting.pids == {}
    here = []  # the same figures as on virtual workers that read the same items
    for id, dataset in (("alice", first), ("bob", second)):
        with sy.VirtualWorker(id, datasets={"half": dataset}) as worker:
            here.append(trained_on(worker, model).loss)
    assert losses == here


def test_the_form_for_coroutines():
    async def program():
        async with sy.local_workers("carol", threads=1) as (carol,):
            pointer = await torch.ones(2).async_send(carol)
            return await (pointer * 3).async_get()

    assert asyncio.run(program()).tolist() == [3.0, 3.0]


def test_cancelled_while_it_starts_it_leaves_no_process():
    starting = sy.local_workers("dora", threads=1)

    async def program():
        task = asyncio.ensure_future(starting.__aenter__())
        while starting._processes is None or not starting._processes.pids:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        pids = starting._processes.pids
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return pids

    assert not any(map(alive, asyncio.run(program()).values()))


def test_too_slow_workers_are_an_error_and_end(tmp_path, monkeypatch):
    program = tmp_path / "program"  # one that never serves
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    starting = sy.local_workers("erin", timeout=0.01)
    with pytest.raises(ConnectError, match="not ready after 0.01 s: erin"), starting:
        pass
    assert not any(map(alive, starting._processes.pids.values()))


PROGRAM = """
import os, signal, sys, time, torch, planrt

hook = planrt.TorchHook(torch)
starting = planrt.local_workers("bob", threads=1)
with starting as (bob,):
    try:
        print("ready", *starting.pids.values(), flush=True)
        time.sleep(600)
    except KeyboardInterrupt:  # what a notebook does with the cell
        print("interrupted", (torch.ones(2).send(bob) * 2).get().tolist(), flush=True)
    time.sleep(600)
"""


def test_an_interrupt_leaves_the_workers_and_the_end_of_the_program_takes_them_along():
    parent = subprocess.Popen(
        [warm.REAL, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with parent:
        child = int(parent.stdout.readline().split()[1])
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal and a notebook send it: to the whole group
        assert parent.stdout.readline() == "interrupted [2.0, 2.0]\n"
        assert alive(child)
        parent.kill()
    assert eventually(lambda: not alive(child))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, "needs names"),
        ((["alice", "bob"],), {}, r"one by one: write local_workers\(\*\['alice', 'bob'\]\)"),
        ((3,), {}, "short text, not 3"),
        (("",), {}, "short text"),
        (("a\nb",), {}, "short text"),
        (("bob", "bob"), {}, "two workers are called 'bob'"),
        (("bob",), {"datasets": [1]}, "datasets is a dict such as"),
        (("bob",), {"datasets": {"alice": {}}}, "names 'alice', and the workers are bob"),
        (("bob",), {"datasets": {"bob": halves()[0]}}, "of 'bob' it is TensorDataset"),
        (("bob",), {"threads": 0}, "threads must be a whole number of at least 1"),
        (("bob",), {"timeout": 0}, "timeout is a number of seconds above 0"),
        (("bob",), {"timeout": "long"}, "timeout is a number of seconds above 0"),
        (("bob",), {"timeout": float("nan")}, "timeout is a number of seconds above 0"),
        (("bob",), {"device": "gpu"}, "'gpu' is no device"),
    ],
)
def test_wrong_use_is_an_error_before_anything_starts(arguments, options, message):
    with pytest.raises(OptionError, match=message):
        sy.local_workers(*arguments, **options)


def test_a_data_set_that_cannot_be_read_is_an_error_before_anything_starts():
    starting = sy.local_workers("bob", datasets={"bob": {"x": [torch.ones(2)]}})
    with pytest.raises(DataError, match=r"data set 'x' must give \(data, target\) pairs"):
        starting.__enter__()
    assert starting._processes is None


def test_without_a_block_it_says_how():
    with pytest.raises(OptionError, match="write `with planrt.local_workers"):
        (_bob,) = sy.local_workers("bob")


def test_on_the_loop_thread_it_does_not_block():
    async def inside():
        with sy.local_workers("bob"):
            pass

    with pytest.raises(BlockingCallError, match="async with"):
        asyncio.run_coroutine_threadsafe(inside(), background_loop()).result(timeout=30)
