"""Two clients of one worker in one process: what one has freed is not in the way of what the other sends."""

from __future__ import annotations

import contextlib

import pytest
import torch

import planrt
from planrt import Protocol
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


@pytest.fixture
def clients(transport):
    """Two of one worker."""
    with contextlib.ExitStack() as stack:
        if transport == "memory":
            bob = stack.enter_context(VirtualWorker("bob", auto_add=False))
            yield bob, stack.enter_context(bob.connect_as())
        else:
            uri = stack.enter_context(WebsocketServerWorker("bob", threads=1).running())
            yield tuple(
                stack.enter_context(WebsocketClientWorker("bob", uri=uri, auto_add=False)) for _ in range(2)
            )


@planrt.func2plan()
def product(x, y):
    return x @ y


def test_a_plan_that_one_has_dropped(clients):
    first, second = clients
    product.build(torch.ones(2, 2), torch.ones(2, 2))
    for _ in range(10):
        for one in (first, second):
            x = torch.ones(2, 2).send(one)
            pointer = product.send(one)
            assert pointer(x, x).get().sum() == 8
            del pointer  # the worker is told with what this client says next


def test_a_protocol_that_one_has_dropped(clients, make_worker):
    product.build(torch.ones(2, 2), torch.ones(2, 2))
    protocol = Protocol([("first", product)])
    for _ in range(5):
        for one in clients:
            protocol.send(one)
            assert one.objects_count() >= 1
            protocol.get()


@pytest.mark.parametrize("way", ["dropped", "fetched"])
def test_a_tensor_that_one_has_let_go(clients, way):
    tensor = torch.ones(3)
    for number in range(10):
        pointer = tensor.send(clients[number % 2])
        if way == "fetched":
            tensor = pointer.get()
            assert tensor.sum() == 3
        else:
            assert (pointer + 1).sum().get() == 6
        del pointer


def test_one_client_keeps_the_id_of_a_tensor(clients):
    """As in PySyft 0.2: what comes back and goes there again has the id that it had."""
    first, second = clients
    x = torch.ones(3).send(first)
    id = x.id_at_location
    y = x.get().send(first)
    assert y.id_at_location == id
    z = y.get().send(second)
    assert z.id_at_location != id
    assert z.get().sum() == 3


def test_what_goes_back_and_forth_between_workers(clients, make_worker):
    first, second = clients
    carol = make_worker("carol")
    for one in (first, second):
        x = torch.ones(3).send(carol)
        there = x.move(one)
        assert (there + 1).sum().get() == 6
        back = there.move(carol)
        assert back.get().sum() == 3
