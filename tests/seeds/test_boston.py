"""Documents 3 and 4: house prices on two workers, in turn and averaged."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from planrt.fl import utils


@pytest.fixture(scope="module")
def housing():
    """The two data sets, their columns standardised by the training part, but for the one that is 0 or 1."""
    file = Path(os.environ.get("PLANRT_DATA", "nowhere")) / "boston_housing.npz"
    if not file.is_file():
        if os.environ.get("PLANRT_REQUIRE_DATA") == "1":
            pytest.fail("needs boston_housing.npz in PLANRT_DATA")
        pytest.skip("needs boston_housing.npz in PLANRT_DATA")
    arrays = np.load(file)
    x, y, x_test, y_test = (
        torch.from_numpy(arrays[name]).float() for name in ("x_train", "y_train", "x_test", "y_test")
    )
    mean, dev = x.mean(0, keepdim=True), x.std(0, keepdim=True)
    mean[:, 3], dev[:, 3] = 0.0, 1.0
    return TensorDataset((x - mean) / dev, y), TensorDataset((x_test - mean) / dev, y_test)


class Net(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        sizes = (13, *widths, 1)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))

    def forward(self, x):
        x = x.view(-1, 13)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def loss_on(model, loader):
    model.eval()
    with torch.no_grad():
        total = sum(F.mse_loss(model(x).view(-1), y, reduction="sum").item() for x, y in loader)
    return total / len(loader.dataset)


def test_averaged_every_batch_it_ends_where_the_document_ends(bob, alice, housing):
    """616 at the start, about 40 after 100 passes: every pass trains one batch on each worker and averages in place."""
    torch.manual_seed(1)
    train, test = (DataLoader(part, batch_size=8, shuffle=True) for part in housing)
    nodes = [bob, alice]
    remote = ([], [])
    for index, (x, y) in enumerate(train):
        remote[index % 2].append((x.send(nodes[index % 2]), y.send(nodes[index % 2])))
    models = [Net(32, 24, 16), Net(32, 24, 16)]
    optimizers = [optim.SGD(model.parameters(), lr=0.001) for model in models]
    losses = []
    for _ in range(100):
        for number in range(2):
            x, y = remote[number][0]
            models[number].send(x.location)
            optimizers[number].zero_grad()
            F.mse_loss(models[number](x).view(-1), y).backward()
            optimizers[number].step()
        for model in models:
            model.get()
        averaged = utils.federated_avg({"bob": models[0], "alice": models[1]})
        assert averaged is models[0]
        losses.append(loss_on(averaged, test))
    assert losses[0] == pytest.approx(616, abs=10)
    assert losses[-1] == pytest.approx(40.1, abs=8)


def test_in_turn_one_model_learns(bob, alice, housing):
    """The document's other program: one model goes from batch to batch; 18.67 after its ten passes."""
    torch.manual_seed(1)
    train, test = (DataLoader(part, batch_size=8, shuffle=True) for part in housing)
    model = Net(32, 24)
    optimizer = optim.SGD(model.parameters(), lr=0.001)
    nodes = [bob, alice]
    batches = [(x.send(nodes[index % 2]), y.send(nodes[index % 2])) for index, (x, y) in enumerate(train)]
    twin = Net(32, 24)
    twin.load_state_dict(model.state_dict())
    own = optim.SGD(twin.parameters(), lr=0.001)
    for _ in range(3):
        for x, y in batches:
            model.send(x.location)
            optimizer.zero_grad()
            F.mse_loss(model(x).view(-1), y).backward()
            optimizer.step()
            model.get()
    local = [(x.get(), y.get()) for x, y in batches]
    for _ in range(3):
        for x, y in local:
            own.zero_grad()
            F.mse_loss(twin(x).view(-1), y).backward()
            own.step()
    assert loss_on(model, test) == pytest.approx(loss_on(twin, test), rel=1e-3)
    assert loss_on(model, test) < 40
