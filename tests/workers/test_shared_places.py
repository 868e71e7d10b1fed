"""A model of one party with the data of another: each is shared by the worker that has it, and never comes here."""

import asyncio
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import planrt as sy
from planrt.errors import GetNotPermittedError, MixedLocationsError, SharingError, UnknownNameError
from planrt.sharing.tensors.shared import SharedTensor
from planrt.workers import VirtualWorker
from planrt.workers.client.workplace import RemoteWorkplace
from planrt.workers.wire import messages as m
from tests.workers.conftest import PRECISION

sy.TorchHook(torch)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Counting(nn.Module):
    """Binds a buffer anew in its forward, and has masks and counters."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mask", torch.tensor([True, False, True, False]))

    def forward(self, x):
        self.seen = self.seen + 1
        return self.norm(self.layer(x)).masked_fill(self.mask, 0.0) * self.seen


def network():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.layer(x.unsqueeze(1).expand(-1, 2, -1))[0][:, -1])


def tied():
    made = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 4))
    made[2].weight = made[0].weight
    return made


def frozen():
    made = network()
    made[0].requires_grad_(False)
    return made


MODELS = {"network": network, "sequences": Sequences, "tied": tied, "frozen": frozen, "counting": Counting}
X, Y = random(6, 3), random(6, 4, seed=1)


def trained(model, x, y, steps=2):
    optimizer = optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("place", ["bob", "alice", "james"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_one_worker_trains_on_the_data_of_another(name, place, parties, monkeypatch):
    bob, alice, james = parties
    torch.manual_seed(0)
    model = MODELS[name]()
    plain = copy.deepcopy(model)
    model.send({"bob": bob, "alice": alice, "james": james}[place])
    if name == "counting":
        model(random(6, 3).send(model.location))  # `seen` is a result there now
        plain(random(6, 3))
    x, y = X.send(bob), Y.send(alice)
    fetched, ask = [], RemoteWorkplace.ask

    def asked(self, kind, body, *args, **kwargs):
        fetched.append(body) if isinstance(body, m.Fetch) else None
        return ask(self, kind, body, *args, **kwargs)

    monkeypatch.setattr(RemoteWorkplace, "ask", asked)
    options = {"crypto_provider": james}
    kept = list(model.parameters())
    assert model.fix_precision(**PRECISION).share(bob, alice, requires_grad=True, **options) is model
    x, y = (one.fix_precision(**PRECISION).share(bob, alice, **options).get() for one in (x, y))
    if name != "counting":  # whose counters and masks all know
        assert not fetched
    assert model.location is None
    assert all(one is other for one, other in zip(kept, model.parameters(), strict=True))
    assert [one.requires_grad for one in kept] == [one.requires_grad for one in plain.parameters()]
    for one, other in zip(trained(model, x, y), trained(plain, X, Y), strict=True):
        assert (one.get() - other).abs() < 1e-3 * (1 + other)
    assert model.get().float_precision() is model
    for one, other in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert type(one) is torch.Tensor
        assert (one.double() - other.double()).abs().max() < 2e-3
    trained(model, X, Y)  # here, as before


def test_a_model_whose_layers_are_at_different_workers(parties):
    bob, alice, james = parties
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    plain = copy.deepcopy(model)
    model[0].send(alice)
    model[2].send(james)
    model.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james)
    x = X.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james)
    assert (model(x).get() - plain(X)).abs().max() < 1e-3

    async def opened():
        return await model.async_get()

    asyncio.run(opened())
    assert (model.float_precision()(X) - plain(X)).abs().max() < 1e-3


def test_what_a_user_may_not_read_is_not_shared_and_stays():
    users = {"ann": "pTq7-Lm2x_VzR9sK", "ben": "hW4k+Jd8y/NcB3fG"}
    with (
        VirtualWorker("zoe", users=users, token=users["ann"]) as zoe,
        zoe.connect_as(users["ben"]) as other,
        VirtualWorker("bob") as bob,
        VirtualWorker("james") as james,
    ):
        kept = random(2, 3).tag("#weight").send(zoe, allowed_users=["ann"])
        (found,) = other.search("#weight")
        model = nn.Module()
        model.register_buffer("first", torch.ones(2))
        model.register_buffer("second", found)
        with pytest.raises(GetNotPermittedError, match="ann may share it"):
            model.fix_precision().share(bob, other, crypto_provider=james)
        assert model.second is found
        assert not isinstance(model.first, SharedTensor)
        assert torch.equal(kept.get(), random(2, 3))


STANDS = {
    "a function": lambda one, x: torch.relu(one),
    "a layer": lambda one, x: nn.Linear(3, 2)(one),
    "a layer in shares": lambda one, x: F.linear(one, x),
    "a list": lambda one, x: torch.cat([x, one]),
    "a method": lambda one, x: one.relu(),
    "a number": lambda one, x: 2 * one,
    "a product": lambda one, x: one @ x.t(),
    "from the right": lambda one, x: x + one,
    "a place": lambda one, x: one[0],
    "a length": lambda one, x: len(one),
    "sending": lambda one, x: one.send(),
}


@pytest.mark.parametrize("use", STANDS)
def test_what_only_stands_for_a_tensor_says_what_to_write(use, parties):
    bob, alice, james = parties
    x = X.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james)
    fixed = X.send(bob).fix_precision(**PRECISION)
    shared = fixed.share(bob, alice, crypto_provider=james)
    with pytest.raises(UnknownNameError, match=r"x\.share\(bob, alice\)\.get\(\)"):
        STANDS[use](fixed, x)
    with pytest.raises(UnknownNameError, match=r"x = x\.get\(\)"):
        STANDS[use](shared, x)
    assert (
        (shared.get() + fixed.copy().share(bob, alice, crypto_provider=james).get()).get() - 2 * X
    ).abs().max() < 1e-3


def test_a_model_that_is_not_shared_with_data_that_is_and_without_a_precision(parties):
    bob, alice, james = parties
    model = network().send(alice)
    x = X.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james)
    with pytest.raises(MixedLocationsError, match=r"of a model model\.fix_precision\(\)\.share"):
        model(x)
    for _ in range(2):
        with pytest.raises(SharingError, match=r"write x\.fix_precision\(\)\.share"):
            model.share(bob, alice, crypto_provider=james)
        model.fix_precision().float_precision()
    assert model(X.send(alice)).get().shape == (6, 4)
