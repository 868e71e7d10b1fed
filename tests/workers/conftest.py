"""Programs on encrypted tensors beside the same on plain ones, on both transports."""

import contextlib

import pytest
import torch

from planrt.sharing.tensors.shared import SharedTensor
from planrt.types import leaves
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker

PRECISION = {"base": 2, "precision_fractional": 16}


@pytest.fixture(scope="module", params=["memory", "websocket"])
def make_party(request):
    """``make_party("bob")`` -> a worker that is there for all tests of a module, on one transport."""
    with contextlib.ExitStack() as stack:

        def make(name, *, auto_add=False):
            if request.param == "memory":
                return stack.enter_context(VirtualWorker(name, auto_add=auto_add))
            uri = stack.enter_context(WebsocketServerWorker(name, threads=1).running())
            return stack.enter_context(WebsocketClientWorker(name, uri=uri, auto_add=auto_add))

        yield make


@pytest.fixture(scope="module")
def parties(make_party):
    """bob, alice, and james who deals: the workers of all programs here."""
    return [make_party(name, auto_add=True) for name in ("bob", "alice", "james")]


@pytest.fixture
def alike(parties):
    """``alike(program)`` compares what ``program(x, module)`` returns on plain tensors and on shares.

    `x` makes of a tensor what the program computes on, `module` puts a module's parameters into shares.
    """
    bob, alice, james = parties
    options = {"crypto_provider": james}

    def shared(values, requires_grad=False):
        if not values.is_floating_point():
            return values.share(bob, alice, **options)
        return values.fix_precision(**PRECISION).share(bob, alice, requires_grad=requires_grad, **options)

    def module(made):
        return made.fix_precision(**PRECISION).share(bob, alice, requires_grad=True, **options)

    def compare(program, within=2e-3):
        expected = program(lambda one, grad=False: one.clone().requires_grad_(grad), lambda one: one)
        found = program(shared, module)
        pairs = list(zip(leaves(expected), leaves(found), strict=True))
        assert any(isinstance(one, SharedTensor) for _, one in pairs)
        for number, (one, other) in enumerate(pairs):
            if not isinstance(one, torch.Tensor):
                assert one == other, number
                continue
            opened = other.get() if isinstance(other, SharedTensor) else other
            assert opened.shape == one.shape, number
            off = (opened.double() - one.double()).abs()
            assert (off <= within).all(), (number, off)

    return compare
