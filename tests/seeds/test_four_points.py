"""Documents 0, 1 and 3: four points and a linear model, here, in turn on two workers, and averaged by a third."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

import planrt as sy


def trained_in_turn(datasets, model, optimizer_of, passes):
    losses = []
    for _ in range(passes):
        for data, target in datasets:
            model.send(data.location)
            optimizer = optimizer_of(data.location)
            optimizer.zero_grad()
            loss = ((model(data) - target) ** 2).sum()
            loss.backward()
            optimizer.step()
            model.get()
            losses.append(loss.get().item())
    return losses


def split(points, bob, alice):
    data, target = points
    return [(data[0:2].send(bob), target[0:2].send(bob)), (data[2:].send(alice), target[2:].send(alice))]


def model_seeded():
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def test_in_turn_it_is_the_local_loop(bob, alice, four_points):
    model, twin = model_seeded(), model_seeded()
    optimizer = optim.SGD(params=model.parameters(), lr=0.1)
    losses = trained_in_turn(split(four_points, bob, alice), model, lambda worker: optimizer, 10)
    data, target = (one.detach() for one in four_points)
    local, own = [], optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(10):
        for rows in (slice(0, 2), slice(2, 4)):
            own.zero_grad()
            loss = ((twin(data[rows]) - target[rows]) ** 2).sum()
            loss.backward()
            own.step()
            local.append(loss.item())
    assert losses == pytest.approx(local, abs=1e-6)
    assert torch.allclose(model.weight, twin.weight)
    assert losses[-1] < 0.03


def test_an_adam_for_each_worker(bob, alice, four_points):
    model = model_seeded()
    optims = sy.Optims(["bob", "alice"], optim=optim.Adam(params=model.parameters(), lr=0.1))
    losses = trained_in_turn(
        split(four_points, bob, alice), model, lambda worker: optims.get_optim(worker.id), 20
    )
    assert len(losses) == 40
    assert max(losses[-2:]) < 0.1 < losses[0]
    assert set(model.state_dict()) == {"weight", "bias"}


def averaged(model, parts, third, epochs, worker_iters):
    """The averaging loop of documents 0, 1 and 3; gives each epoch's last losses."""
    history = []
    for _ in range(epochs):
        models = [model.copy().send(data.location) for data, _ in parts]
        optimizers = [optim.SGD(params=one.parameters(), lr=0.1) for one in models]
        for _ in range(worker_iters):
            losses = []
            for one, optimizer, (data, target) in zip(models, optimizers, parts, strict=True):
                optimizer.zero_grad()
                loss = ((one(data) - target) ** 2).sum()
                loss.backward()
                optimizer.step()
                losses.append(loss.get().data)
        for one in models:
            one.move(third)
        first, second = models
        with torch.no_grad():
            model.weight.set_(((second.weight.data + first.weight.data) / 2).get())
            model.bias.set_(((second.bias.data + first.bias.data) / 2).get())
        history.append([loss.item() for loss in losses])
    return history


def test_averaging_gives_the_printed_numbers(bob, alice, make_worker, four_points):
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.8489, -0.0207]]))
        model.bias.copy_(torch.tensor([0.0791]))
    parts, third = split(four_points, bob, alice), make_worker("secure_worker")
    (losses,) = averaged(model, parts, third, 1, 5)
    assert model.weight[0].tolist() == pytest.approx([0.8669, -0.0167], abs=2e-4)
    assert model.bias.item() == pytest.approx(0.0686, abs=2e-4)
    assert losses[0] == pytest.approx(0.000730528, rel=5e-3)
    (losses,) = averaged(model, parts, third, 1, 5)
    assert model.weight[0].tolist() == pytest.approx([0.8829, -0.0137], abs=2e-4)
    assert model.bias.item() == pytest.approx(0.0597, abs=2e-4)
    assert losses[0] == pytest.approx(0.000528315, rel=5e-3)
    assert losses[1] < 1e-5


def test_averaging_from_anywhere_learns_the_points(bob, alice, make_worker, four_points):
    model = model_seeded()
    history = averaged(model, split(four_points, bob, alice), make_worker("secure_worker"), 10, 5)
    assert max(history[-1]) < 0.05
    assert bob.objects_count() == alice.objects_count() == 0
    data, target = four_points
    assert ((model(data) - target) ** 2).sum().item() < 0.1
