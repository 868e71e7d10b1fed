"""Connections that are cut while workers compute on shares: the result is right, or a `SharingError`; and then the next
computation is right, on the same workers.
"""

import contextlib

import pytest
import torch

import planrt as sy
from planrt.errors import SharingError
from planrt.workers import WebsocketClientWorker, WebsocketServerWorker
from tests.proxy import CuttingProxy
from tests.workers.conftest import PRECISION

sy.TorchHook(torch)
NAMES = ["bob", "alice", "james"]
X, W = (torch.randn(20, 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


@pytest.fixture(scope="module")
def servers():
    with contextlib.ExitStack() as stack:
        made = [WebsocketServerWorker(name, threads=1) for name in NAMES]
        yield [stack.enter_context(one.running()) for one in made]


def shared(workers, values):
    bob, alice, james = workers
    return values.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james, timeout=20)


def computed(workers):
    x, w = shared(workers, X), shared(workers, W)
    for _ in range(3):
        found = (x @ w).relu()
        assert (found.get() - (X @ W).relu()).abs().max() < 1e-2
    return x


def through(uri):
    """A client that other workers reach its worker at another address than it does."""
    return type("Through", (WebsocketClientWorker,), {"link_address": uri})


@pytest.mark.parametrize("nbytes", [0, 1_000, 6_000, 12_000])
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("number", [0, 1], ids=["bob", "alice"])
@pytest.mark.parametrize("link", ["others", "all", "all, not kept"])
def test_cuts(servers, link, number, direction, nbytes):
    """What breaks after so many bytes are the connections that others have to that worker, or its client's as well."""
    proxy = CuttingProxy(servers[number])
    with proxy.running() as uri, contextlib.ExitStack() as stack:
        workers = []
        for place, (name, at) in enumerate(zip(NAMES, servers, strict=True)):
            kind = through(uri) if place == number and link == "others" else WebsocketClientWorker
            at = uri if place == number and link != "others" else at
            reconnect = 0 if link == "all, not kept" else 20
            workers.append(
                stack.enter_context(kind(name, uri=at, auto_add=False, timeout=30, reconnect=reconnect))
            )
        x = computed(workers)
        proxy.cut_at(direction, nbytes)
        for _ in range(3):
            try:
                computed(workers)
            except SharingError:
                with pytest.raises(
                    SharingError
                ):  # what was shared before is over, and no part of it is opened
                    (x @ x).get()
            if workers[number].workplace.connection.closed:
                workers[number].connect()
            proxy.cut() if proxy.cuts_later else None
        computed(workers)
