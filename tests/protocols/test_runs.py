"""Runs from here and from a worker alike: awaited, cancelled, failing, watched; nothing is left behind."""

import asyncio

import pytest
import torch

import planrt
from planrt import Protocol, Step
from planrt.errors import BlockingCallError, RemoteError, WorkerLostError
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from tests.protocols.conftest import plan


@pytest.fixture(params=["from here", "from james"])
def deploy(request, james):
    """``deploy(protocol, alice, bob)`` -> the protocol, to be run from here or from james."""

    def deploy(protocol, *workers):
        protocol.deploy(*workers)
        if request.param == "from james":
            protocol.send(james)
        return protocol

    return deploy


def value(pointer):
    """The tensor at the end of a pointer, of whatever length."""
    while type(pointer) is not torch.Tensor:
        pointer = pointer.get()
    return pointer


LARGE = torch.ones(600)


@pytest.fixture
def slow():
    """Takes a while for `LARGE`, and no time for what it is built with."""

    def slow(x):
        y = x.outer(x)
        for _ in range(40):
            y = (y @ y) * 0
        return x + y.sum()

    return plan(slow)


def test_a_run_is_awaited_on_any_loop(inc, double, deploy, alice, bob):
    protocol = deploy(Protocol([("a", inc), ("b", double)]), alice, bob)

    async def main():
        several = await asyncio.gather(*(protocol.async_run(torch.tensor([float(i)])) for i in range(8)))
        return [await (await one.async_get() if one._handle.via else one).async_get() for one in several]

    assert [one.item() for one in asyncio.run(main())] == [2 * (i + 1) for i in range(8)]


def test_runs_leave_their_results_only(inc, double, add, deploy, alice, bob, charlie, james, settles, count):
    protocol = deploy(
        Protocol(
            [
                Step("a", inc, ["x"], name="start"),
                Step("b", double, ["start"], name="left"),
                Step("a", double, ["start"], name="right"),
                Step("c", add, ["left", "right"], name="sum"),
            ],
            inputs=["x"],
            outputs=["sum", "start"],
        ),
        alice, bob, charlie,
    )  # fmt: skip
    value(protocol.run(torch.tensor([1.0]))[0])
    workers = (alice, bob, charlie, james)
    held = count(*workers)
    total, start = protocol.run(torch.tensor([1.0, 2.0]))
    assert value(total).tolist() == [8, 12]
    assert value(start).tolist() == [2, 3]
    for _ in range(5):
        protocol.run(torch.tensor([1.0]))  # pointers that nobody keeps
    assert settles(held, *workers)


def test_a_failing_step_is_named_and_leaves_nothing(
    inc, pick, double, deploy, alice, bob, charlie, james, settles, count
):
    protocol = deploy(
        Protocol([("a", inc), Step("b", pick, name="choose"), ("c", double)]), alice, bob, charlie
    )
    workers = (alice, bob, charlie, james)
    assert value(protocol.run(torch.tensor([0.0, -1.0]))).tolist() == [0, 2]
    held = count(*workers)
    with pytest.raises(RemoteError) as caught:
        protocol.run(torch.tensor([0.0, 7.0]))
    error = caught.value
    assert (error.step, error.index, error.line) == ("choose", 2, "_3 = _1.__getitem__(_2)")
    assert "IndexError" in error.cause
    for part in ("'choose'", "'bob'", "op 2 of plan 'pick' failed", "index 8 is out of bounds"):
        assert part in str(error)
    assert protocol.progress["choose"].state == "failed"
    assert settles(held, *workers)
    assert value(protocol.run(torch.tensor([0.0, -1.0]))).tolist() == [0, 2]


def test_failing_while_another_branch_runs(pick, slow, add, inc, deploy, alice, bob, james, settles, count):
    protocol = deploy(
        Protocol(
            [
                Step("a", pick, ["x"], name="bad"),
                Step("b", slow, ["x"], name="good"),
                Step("b", inc, ["good"], name="after"),
                Step("a", add, ["bad", "after"]),
            ],
            inputs=["x"],
        ),
        alice, bob,
    )  # fmt: skip
    held = count(alice, bob)
    with pytest.raises(RemoteError, match="'bad'"):
        protocol.run(5 * LARGE * 1000)
    if protocol.location is None:
        assert settles(held, alice, bob)
    assert value(protocol.run(torch.tensor([0.0]))).tolist() == [1]


def test_a_cancelled_run_leaves_nothing_and_the_next_one_works(
    inc, slow, deploy, alice, bob, charlie, james, settles, count
):
    several = [("a", slow), ("b", slow), ("c", slow), ("a", inc)]
    protocol = deploy(Protocol([("a", inc), Step("b", slow, name="slow"), *several]), alice, bob, charlie)
    workers = (alice, bob, charlie, james)
    x = LARGE
    value(protocol.run(torch.ones(1)))
    held = count(*workers)

    async def main():
        loop, running = asyncio.get_running_loop(), asyncio.Event()

        def on_progress(step, worker, state):
            if (step, state) == ("slow", "running"):
                loop.call_soon_threadsafe(running.set)

        task = asyncio.create_task(protocol.async_run(x, on_progress=on_progress))
        await asyncio.wait_for(running.wait(), 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert settles(held, *workers)
    assert value(protocol.run(torch.ones(1))).tolist() == [3]
    assert settles(held, *workers)


def test_progress_names_steps_workers_and_states(inc, slow, deploy, alice, bob):
    protocol = deploy(Protocol([("a", inc), Step("b", slow, name="slow")]), alice, bob)
    assert protocol.progress == {}
    seen = []
    protocol.run(LARGE, on_progress=lambda *what: seen.append(what))
    assert seen[:2] == [("inc", "alice", "waiting"), ("slow", "bob", "waiting")]
    assert (
        seen.index(("inc", "alice", "done"))
        <= seen.index(("slow", "bob", "running"))
        < seen.index(("slow", "bob", "done"))
    )
    assert {step: (one.worker, one.state) for step, one in protocol.progress.items()} == {
        "inc": ("alice", "done"),
        "slow": ("bob", "done"),
    }


def test_an_error_in_the_callback_ends_the_run(inc, slow, deploy, alice, bob, james, settles, count):
    protocol = deploy(Protocol([("a", inc), Step("b", slow, name="slow")]), alice, bob)
    value(protocol.run(torch.tensor([1.0])))
    held = count(alice, bob, james)

    def on_progress(step, worker, state):
        if state == "running":
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        protocol.run(LARGE, on_progress=on_progress)
    assert settles(held, alice, bob, james)

    def blocks(step, worker, state):
        protocol.run(torch.tensor([1.0]))

    with pytest.raises(BlockingCallError, match="await protocol.async_run"):
        protocol.run(LARGE, on_progress=blocks)


def test_others_are_unharmed_by_a_run_that_fails(inc, pick, deploy, alice, bob):
    theirs = torch.tensor([3.0]).send(bob)
    protocol = deploy(Protocol([("a", inc), ("b", pick)]), alice, bob)
    with pytest.raises(RemoteError):
        protocol.run(torch.tensor([7.0]))
    assert (theirs + 1).get().tolist() == [4]


def test_gradients_flow_within_steps_only(alice, bob, deploy):
    class Net(planrt.Plan):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x).sum()

    net = Net().build(torch.ones(1, 2))
    protocol = deploy(Protocol([("a", net)]), alice)
    result = protocol.run(torch.ones(3, 2))
    assert value(result).requires_grad
    with torch.no_grad():
        result = protocol.run(torch.ones(3, 2))
    assert not value(result).requires_grad


# ------------------------------------------------------------------------------------- workers that are gone


def test_a_closed_connection_is_named_with_its_step(inc, alice, bob, count):
    protocol = Protocol([("a", inc), Step("b", inc, name="second")]).deploy(alice, bob)
    bob.close()
    with pytest.raises(WorkerLostError, match="'bob' .* is gone") as caught:
        protocol.run(torch.tensor([1.0]))
    assert "step 'second'" in str(caught.value)
    assert count(alice) == [1]


@pytest.mark.parametrize("gone", [0, 1])
def test_a_step_whose_worker_is_gone(gone, inc):
    """Websocket servers that end, here and as peers of james."""
    servers = [WebsocketServerWorker(id, threads=1) for id in ("alice", "bob", "james")]
    contexts = [server.running() for server in servers]
    workers = [
        WebsocketClientWorker(server.id, uri=context.__enter__())
        for server, context in zip(servers, contexts, strict=True)
    ]
    alice, bob, james = workers
    name = ("first", "second")[gone]
    here = Protocol([Step("a", inc, name="first"), Step("b", inc, name="second")]).deploy(alice, bob)
    there = Protocol([Step("a", inc, name="first"), Step("b", inc, name="second")]).deploy(alice, bob)
    there.send(james)
    assert value(there.run(torch.tensor([1.0]))).tolist() == [3]
    contexts[gone].__exit__(None, None, None)
    other = (alice, bob)[1 - gone]
    with pytest.raises((WorkerLostError, RemoteError), match=f"'{workers[gone].id}'") as caught:
        here.run(torch.tensor([1.0]))
    assert f"step {name!r}" in str(caught.value)
    with pytest.raises(RemoteError, match=f"step {name!r}.*{workers[gone].id!r}") as caught:
        there.run(torch.tensor([1.0]))
    assert caught.value.step == name
    x = torch.tensor([1.0]).send(james)
    assert (x + 1).get().tolist() == [2]
    del x
    assert other.objects_count() == 1  # its plan
    for worker, context in zip(workers, contexts, strict=True):
        worker.close()
        if context is not contexts[gone]:
            context.__exit__(None, None, None)


def test_a_virtual_worker_is_not_reached_from_another_address(inc):
    """A peer that james cannot dial."""
    with VirtualWorker("james") as james, VirtualWorker("alice") as alice:
        protocol = Protocol([Step("a", inc, name="first")]).deploy(alice)
        protocol.send(james)
        alice._link_address = "memory://alice/none"
        protocol.deploy(alice)
        with pytest.raises(
            RemoteError, match="step 'first' on worker 'alice': .*virtual workers are reached from"
        ) as error:
            protocol.run(torch.tensor([1.0]))
        assert error.value.kind == "PeerError"
