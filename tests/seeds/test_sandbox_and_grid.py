"""Document 3, sections 5 and 7: the sandbox, search, the grid, and a federated data set made of what it found."""

from __future__ import annotations

import gc

import pytest
import torch

import planrt as sy
from planrt.fl.data import boston
from planrt.sandbox import WORKERS

DATA_SETS = {"#boston": (404, 13), "#diabetes": (442, 10), "#iris": (150, 4), "#wine": (178, 13)}


@pytest.fixture
def sandbox(make_worker):
    if boston.find() is None:
        pytest.skip("needs boston_housing.npz in PLANRT_DATA")
    names: dict = {}
    sy.create_sandbox(names, verbose=False, make_worker=make_worker)
    return names


def test_what_is_in_it(sandbox):
    assert [worker.id for worker in sandbox["workers"]] == list(WORKERS)
    assert sandbox["bob"] is sandbox["workers"][0]
    for tag, (rows, columns) in DATA_SETS.items():
        found = sandbox["grid"].search(tag, "#data")
        assert sum(one[0].shape[0] for one in found.values()) == rows
        assert {one[0].shape[1] for one in found.values()} == {columns}


def test_search_on_one_worker(sandbox):
    bob = sandbox["bob"]
    text = "The input datapoints to the boston housing dataset."
    for tags in (("#fun", "#boston", "#housing"), ("#fun", "#boston", "#housing"), ("#fun", "#mnist")):
        torch.tensor([1, 2, 3, 4, 5]).tag(*tags).describe(text).send(bob)
    gc.collect()
    results = bob.search(["#boston", "#housing"])
    shapes = sorted(tuple(one.shape) for one in results)
    assert shapes == [(5,), (5,), (68,), (68, 13)]  # a sixth of Boston's training part, and the two sent here
    assert all("Tags: " in str(one) and "#boston" in str(one) for one in results)
    assert [one.description for one in results].count(text) == 2
    described = next(one.description for one in results if one.dim() == 2)
    assert described == boston.DESCRIPTION
    assert len(bob.search(["#fun"])) == 3


def test_search_on_the_grid(sandbox):
    grid = sy.PrivateGridNetwork(*sandbox["workers"])
    results = grid.search("#boston")
    data, target = grid.search("#boston", "#data"), grid.search("#boston", "#target")
    assert list(results) == list(data) == list(target) == list(WORKERS)
    for id in WORKERS:
        assert len(results[id]) == 2
        assert (data[id][0].shape[0], data[id][0].shape[1]) == (target[id][0].shape[0], 13)


def test_a_federated_data_set_of_what_was_found(sandbox):
    grid = sy.PrivateGridNetwork(*sandbox["workers"])
    boston_data, boston_target = grid.search("#boston", "#data"), grid.search("#boston", "#target")
    n_features = boston_data["alice"][0].shape[1]
    torch.manual_seed(0)
    model = torch.nn.Linear(n_features, 1)
    datasets = [sy.BaseDataset(boston_data[id][0], boston_target[id][0]) for id in boston_data]
    dataset = sy.FederatedDataset(datasets)
    assert dataset.workers == list(WORKERS)
    optimizers = {id: torch.optim.Adam(params=model.parameters(), lr=1e-2) for id in dataset.workers}
    train_loader = sy.FederatedDataLoader(dataset, batch_size=32, shuffle=False, drop_last=False)
    totals = []
    for _ in range(2):
        accumulated = 0.0
        for data, target in train_loader:
            model.send(data.location)
            optimizer = optimizers[data.location.id]
            optimizer.zero_grad()
            loss = ((model(data).view(-1) - target) ** 2).mean()
            loss.backward()
            optimizer.step()
            model.get()
            accumulated += loss.get().item()
        totals.append(accumulated)
    assert len(train_loader) == 18
    assert totals[1] < totals[0]
