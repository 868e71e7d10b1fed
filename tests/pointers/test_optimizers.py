"""Optimizers of models on workers: their state is where the model is, and what they cannot do says so."""

import copy
import gc
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import planrt
from planrt.errors import RemoteOpError, RemoteValueError, WorkerLostError

MAKE = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
}


@pytest.fixture
def bob(make_worker):
    planrt.TorchHook(torch)
    return make_worker("bob")


@pytest.fixture
def alice(make_worker):
    return make_worker("alice")


def turn(model, optimizer, worker=None):
    x = torch.ones(3, 2)
    if worker is not None:
        model.send(worker)
        x = x.send(worker)
    optimizer.zero_grad()
    (model(x) ** 2).sum().backward()
    optimizer.step()
    if worker is not None:
        model.get()


def made(make):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return model, make(model.parameters())


def same(one, other):
    """Whether two optimizers have the same state."""
    a, b = one.state_dict()["state"], other.state_dict()["state"]
    return all(torch.equal(a[key][name], b[key][name]) for key in a for name in a[key])


@pytest.mark.parametrize("name", MAKE)
def test_an_optimizer_is_here_when_its_model_is(bob, alice, name):
    (model, optimizer), (local, plain) = made(MAKE[name]), made(MAKE[name])
    for worker in (bob, alice, bob):
        turn(model, optimizer, worker)
        turn(local, plain)
        assert same(optimizer, plain)
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        saved.seek(0)
        optimizer.load_state_dict(torch.load(saved, weights_only=True))
        copy.deepcopy(optimizer.state_dict())
    assert torch.equal(model.weight, local.weight)
    del optimizer
    gc.collect()
    assert (bob.objects_count(), alice.objects_count()) == (0, 0)


@pytest.mark.parametrize("name", MAKE)
def test_a_worker_that_left_after_its_turn_is_not_missed(bob, alice, name):
    (model, optimizer), (local, plain) = made(MAKE[name]), made(MAKE[name])
    turn(model, optimizer, bob)
    bob.close()
    turn(model, optimizer, alice)
    turn(local, plain), turn(local, plain)
    assert torch.equal(model.weight, local.weight)


def test_a_model_moves_with_its_optimizer(bob, alice):
    (model, optimizer), (local, plain) = made(MAKE["Adam"]), made(MAKE["Adam"])
    model.send(bob)
    x = torch.ones(3, 2).send(bob)
    (model(x) ** 2).sum().backward()
    optimizer.step()
    model.move(alice)
    bob.close()
    optimizer.zero_grad()
    (model(torch.ones(3, 2).send(alice)) ** 2).sum().backward()
    optimizer.step()
    turn(local, plain), turn(local, plain)
    assert torch.equal(model.get().weight, local.weight)
    assert same(optimizer, plain)


def test_state_on_a_worker_that_is_gone_says_how_to_go_on(bob, alice):
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.send_(bob)
    weight.sum().backward()
    optimizer.step()
    weight.get_()  # a single tensor: the momentum stays behind
    bob.close()
    weight.send_(alice)
    weight.sum().backward()
    with pytest.raises(WorkerLostError, match=r"SGD keeps.*optimizer\.state\.clear\(\)"):
        optimizer.step()
    optimizer.state.clear()
    optimizer.step()
    assert weight.get_().tolist() == pytest.approx([0.7, 0.7])


FOREACH = [
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]


@pytest.mark.parametrize("name", FOREACH)
def test_foreach(bob, name):
    def make(parameters):
        return getattr(torch.optim, name)(parameters, lr=0.01, foreach=True)

    (model, optimizer), (local, plain) = made(make), made(make)
    try:
        for _ in range(2):
            turn(model, optimizer, bob)
    except RemoteOpError as error:
        assert "foreach=False" in str(error)
        return
    turn(local, plain), turn(local, plain)
    assert torch.allclose(model.weight, local.weight)


def test_fused_says_what_to_write(bob):
    model, optimizer = made(lambda p: torch.optim.Adam(p, fused=True))
    model.send(bob)
    model(torch.ones(3, 2).send(bob)).sum().backward()
    with pytest.raises(RemoteOpError, match=r"Adam\(fused=True\).*without fused=True"):
        optimizer.step()


@pytest.mark.parametrize(
    "convert", [lambda m: m.double(), lambda m: m.to(torch.float64), lambda m: m.to("cpu").double()]
)
def test_a_model_on_a_worker_changes_its_dtype(bob, convert):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    local = copy.deepcopy(model)
    x = torch.randn(4, 2)
    model.send(bob)
    (model(x.send(bob)) ** 3).sum().backward()
    (local(x) ** 3).sum().backward()
    convert(model), convert(local)
    assert model[0].weight.dtype == torch.float64
    assert model[0].weight.grad.dtype == torch.float64
    y, want = model(x.double().send(bob)), local(x.double())
    (y**3).sum().backward(), (want**3).sum().backward()
    assert torch.allclose(y.get(), want)
    model.get()
    for (key, mine), other in zip(model.state_dict().items(), local.state_dict().values(), strict=True):
        assert mine.dtype == other.dtype, key
        assert torch.allclose(mine, other), key
    assert torch.allclose(model[0].weight.grad, local[0].weight.grad)
    assert model.location is None


@pytest.mark.parametrize("save", [pickle.dumps, copy.deepcopy, lambda one: torch.save(one, io.BytesIO())])
def test_what_holds_pointers_is_not_saved(bob, save):
    model, optimizer = made(MAKE["Adam"])
    model.send(bob)
    for one in (model.weight, model.state_dict(), optimizer):
        with pytest.raises(RemoteOpError, match=r"get\(\) it before you save it"):
            save(one)


def test_numpy_on_a_pointer(bob):
    x = torch.arange(4.0).send(bob)
    for call in (
        lambda: np.mean(x), lambda: np.sum(x), lambda: np.concatenate([x, x]), lambda: np.asarray(x),
        lambda: np.add(x, 1), lambda: np.linalg.norm(x),
    ):  # fmt: skip
        with pytest.raises(RemoteValueError, match=r"\.get\(\) first"):
            call()
    with pytest.raises(RemoteOpError, match=r"NumPy array.*torch\.from_numpy\(array\)\.send\(worker\)"):
        x[np.array([0, 1])]
    assert (np.float64(2) * x).get().tolist() == [0, 2, 4, 6]
    assert x.view(np.int64(2), np.int32(2)).get().shape == (2, 2)
