"""Sessions take turns: ops that one client posted do not keep the others waiting until all are done."""

import contextlib
import threading

import pytest
import torch

from planrt.types import Ref
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.events import Again, Received, Reply
from planrt.workers.machine.state import WorkerState
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions
from planrt.workers.wire.posted import PostedOp


@pytest.fixture
def clients(transport):
    """Two clients of one worker."""
    with contextlib.ExitStack() as stack:
        if transport == "memory":
            first = stack.enter_context(VirtualWorker("bob"))
            yield first, stack.enter_context(first.connect_as())
        else:
            uri = stack.enter_context(WebsocketServerWorker("bob", threads=1).running())
            yield tuple(
                stack.enter_context(WebsocketClientWorker("bob", uri=uri, auto_add=False)) for _ in range(2)
            )


def test_others_go_on_while_one_client_computes(clients):
    greedy, modest = clients
    small = torch.ones(3).send(modest)
    large = torch.rand(800, 800, dtype=torch.float64).send(greedy)
    product = large
    for _ in range(240):  # some seconds of work or more, in one message
        product = product @ large
    publishing = threading.Thread(
        target=product.tag, args=("#done",)
    )  # it returns once the products are there
    publishing.start()
    assert (small + 1).get().tolist() == [2.0, 2.0, 2.0]
    assert not modest.search("#done")  # so the products are still under way
    assert (small + 2).get().tolist() == [3.0, 3.0, 3.0]
    assert publishing.is_alive()
    publishing.join()
    assert len(modest.search("#done")) == 1


def test_order_and_results_are_those_of_one_turn(clients):
    greedy, modest = clients
    large = torch.eye(500, dtype=torch.float64).send(greedy)
    total = torch.zeros(500, 500, dtype=torch.float64).send(greedy)
    for number in range(60):
        total += (large @ large) * number
        if number == 30:
            total *= 0
    assert (torch.ones(2).send(modest) * 2).get().tolist() == [2.0, 2.0]
    assert torch.equal(total.get(), torch.eye(500, dtype=torch.float64) * sum(range(31, 60)))


def _posted(count):
    ops = [PostedOp("torch.add", (Ref(1 + i), 1), {}, Ref(2 + i), True).pack() for i in range(count)]
    return m.Post(ops, drop=[1])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_turn_that_is_over_leaves_the_rest_as_an_event(count):
    """The state machine by itself: whatever the turn, an op of each message is done, and what was dropped goes last."""
    state = WorkerState("bob")
    state.handle(Received(1, m.Envelope(1, m.Hello("s" * 32, own_versions())), []))
    put = m.Put([m.PutItem(1, requires_grad=False, has_grad=False, tags=[], description="", allowed=None)])
    state.handle(Received(1, m.Envelope(0, put), [torch.zeros(2)]))
    event, turns = Received(1, m.Envelope(0, _posted(count)), []), 0
    while event is not None:
        instructions = state.handle(event, lambda: True)
        turns += 1
        event = instructions[0].event if instructions else None
        assert all(isinstance(one, Again) for one in instructions)
    assert turns == count
    (reply,) = state.handle(Received(1, m.Envelope(9, m.Fetch(1 + count, False)), []))
    assert isinstance(reply, Reply)
    assert reply.tensors[0].tolist() == [count, count]
    (gone,) = state.handle(Received(1, m.Envelope(9, m.Fetch(1, False)), []))
    assert isinstance(gone.envelope.body, m.Failure)
