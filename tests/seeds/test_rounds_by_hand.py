"""Documents 2 and 3: rounds of a TrainConfig on workers that hold some digits each, as users wrote them."""

from __future__ import annotations

import asyncio
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torchvision import datasets, transforms

import planrt as sy
from planrt.fl import utils
from planrt.fl.data import digits as digits

FEW = 1_000
"""Test images that are looked at."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, 1)
        self.conv2 = nn.Conv2d(20, 50, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 50, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 2)
        x = x.view(-1, 4 * 4 * 50)
        x = F.relu(self.fc1(x))
        return F.log_softmax(self.fc2(x), dim=1)


@pytest.fixture(scope="module")
def mnist(mnist_folder):
    return digits.load("mnist", mnist_folder)


@torch.jit.script
def loss_fn(pred, target):
    return F.nll_loss(input=pred, target=target)


async def fit_model_on_worker(worker, traced_model, batch_size, curr_round, max_nr_batches, lr):
    config = sy.TrainConfig(
        model=traced_model,
        loss_fn=loss_fn,
        batch_size=batch_size,
        shuffle=True,
        max_nr_batches=max_nr_batches,
        epochs=1,
        optimizer="SGD",
        optimizer_args={"lr": lr},
    )
    config.send(worker)
    loss = await worker.async_fit(dataset_key="mnist", return_ids=[0])
    model = config.model_ptr.get().obj
    return worker.id, model, loss


def evaluate(worker, model):
    config = sy.TrainConfig(batch_size=128, model=model, loss_fn=loss_fn, optimizer_args=None, epochs=1)
    config.send(worker)
    return worker.evaluate(
        dataset_key="mnist_testing",
        return_histograms=True,
        nr_bins=10,
        return_loss=True,
        return_raw_accuracy=True,
        device="cpu",
    )


def test_every_worker_knows_its_own_digits_and_the_average_more(make_worker, mnist, caplog):
    held = {"alice": (0, 4), "bob": (4, 7), "charlie": (7, 10)}
    workers = []
    for id in held:
        part = digits.partition_for(id, mnist)
        assert len(part) == {"alice": 24_754, "bob": 17_181, "charlie": 18_065}[id]
        workers.append(make_worker(id, {"mnist": part}))
    whole = digits.partition_for("testing", mnist)
    few = sy.BaseDataset(whole.data[:FEW], whole.targets[:FEW], batch_transform=whole.batch_transform)
    testing = make_worker("testing", {"mnist_testing": few})

    torch.manual_seed(1)
    traced = torch.jit.trace(Net(), torch.zeros([1, 1, 28, 28]))
    lr = 0.1

    async def one_round(number):
        return await asyncio.gather(
            *(fit_model_on_worker(worker, traced, 32, number, 10, lr) for worker in workers)
        )

    rights = []
    for number in range(1, 4):
        results = asyncio.run(one_round(number))
        assert all(isinstance(loss, torch.Tensor) and loss.item() > 0 for _, _, loss in results)
        if number == 1:  # "Percentage numbers 0-3: 100%, 4-6: 0%, 7-9: 0%" for alice, and so on
            for id, model, _ in results:
                result = evaluate(testing, model)
                low, high = held[id]
                assert sum(result["histogram_predictions"]) == result["nr_predictions"] == FEW
                assert sum(result["histogram_predictions"][low:high]) > 0.97 * FEW
                assert result["nr_correct_predictions"] < 0.45 * FEW
                assert sum(result["histogram_target"]) == FEW
        traced = utils.federated_avg({id: model for id, model, _ in results})
        assert traced is results[0][1]
        lr = max(0.98 * lr, 0.001)
        rights.append(evaluate(testing, traced)["nr_correct_predictions"])
    assert rights[-1] > 0.2 * FEW
    with caplog.at_level(logging.INFO, logger="planrt.fl"):
        utils.evaluate_model_on_worker(
            model_identifier="Federated model", worker=testing, dataset_key="mnist_testing", model=traced,
            nr_bins=10, batch_size=128, device="cpu", print_target_hist=False,
        )  # fmt: skip
    assert "Federated model: Percentage numbers 0-3:" in caplog.text
    assert f"/{FEW} (" in caplog.text


def test_a_server_selects_its_digits_as_its_script_does(make_worker, mnist_folder):
    """The script's own `run_websocket_server.py`, with torch's own function for the one that 0.2 had renamed."""
    images = datasets.MNIST(str(mnist_folder), train=False)
    indices = np.isin(images.targets, [4, 5, 6])
    selected = images.data[torch.tensor(indices)]
    with pytest.raises(AttributeError, match=r"write torch\.masked_select"):
        torch.native_masked_select(images.data.transpose(0, 2), torch.tensor(indices))
    dataset = sy.BaseDataset(
        data=selected,
        targets=images.targets[torch.tensor(indices)],
        transform=transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]),
    )
    assert len(dataset) == 982 + 892 + 958
    assert dataset[0][0].shape == (1, 28, 28)
    worker = make_worker("bob", {"mnist": replace_len(dataset, 64)})
    assert worker.datasets["mnist"].length == 64


def replace_len(dataset, count):
    return sy.BaseDataset(dataset.data[:count], dataset.targets[:count], transform=dataset.transform_)


def test_a_cnn_on_federated_mnist(make_worker, mnist_folder):
    """Documents 0 and 3: the data is spread over two workers, and the model goes to each batch."""
    one, two = make_worker("qin"), make_worker("zheng")
    whole = datasets.MNIST(
        str(mnist_folder),
        train=True,
        transform=transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]),
    )
    train = torch.utils.data.Subset(whole, range(3_200))
    torch.manual_seed(1)
    loader = sy.FederatedDataLoader(train.federate((one, two)), batch_size=64, shuffle=True)
    assert len(loader) == 50
    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    losses, where = [], set()
    for data, target in loader:
        where.add(data.location.id)
        model.send(data.location)
        data, target = data.to("cpu"), target.to("cpu")
        optimizer.zero_grad()
        loss = F.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
        model.get()
        losses.append(loss.get().item())
    assert where == {"qin", "zheng"}
    test = datasets.MNIST(str(mnist_folder), train=False, transform=whole.transform)
    x = torch.stack([test[index][0] for index in range(FEW)])
    with torch.no_grad():
        right = model(x).argmax(1).eq(test.targets[:FEW]).sum().item()
    assert right > 0.7 * FEW
    assert sum(losses[-5:]) < sum(losses[:5])
