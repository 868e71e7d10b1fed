"""What programs of PySyft 0.2 expect of TrainConfig and Optims."""

from __future__ import annotations

import asyncio

import pytest
import syft as sy
import torch
from syft.federated.floptimizer import Optims
from syft.federated.train_config import TrainConfig
from syft.frameworks.torch.fl import utils
from torch import nn, optim

from planrt.errors import OptionError


@torch.jit.script
def loss_fn(pred, target):
    return ((target.view(pred.shape).float() - pred.float()) ** 2).mean()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(2, 3)
        self.fc2 = nn.Linear(3, 1)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.fixture
def prepared(make_worker):
    """(worker that holds the data, traced model, data, targets, loss before)."""
    torch.manual_seed(0)
    data, target = utils.create_gaussian_mixture_toy_data(nr_samples=100)
    alice = make_worker("alice", {"gaussian_mixture": sy.BaseDataset(data, target)})
    model = torch.jit.trace(Net(), data)
    return alice, model, data, target, loss_fn(target=target, pred=model(data)).item()


def config_of(model, **options):
    given = {
        "batch_size": 20,
        "optimizer": "SGD",
        "optimizer_args": {"lr": 0.05},
        "epochs": 1,
        "shuffle": True,
    }
    return TrainConfig(model=model, loss_fn=loss_fn, **{**given, **options})


def test_it_prints_its_settings():
    config = TrainConfig(batch_size=2, id=99887766, model=None, loss_fn=None)
    assert (
        str(config)
        == "<TrainConfig id:99887766 owner:me epochs: 1 batch_size: 2 optimizer_args: {'lr': 0.1}>"
    )


def test_its_defaults():
    config = TrainConfig(model=None, loss_fn=None)
    assert (config.batch_size, config.epochs, config.optimizer, config.max_nr_batches) == (32, 1, "SGD", -1)
    assert config.shuffle is True


def test_the_worker_knows_what_was_sent(bob):
    config = TrainConfig(batch_size=2, id="id", model=None, loss_fn=None, max_nr_batches=3, shuffle=False)
    assert bob.train_config is None
    config.send(bob)
    for name in ("id", "batch_size", "epochs", "optimizer", "optimizer_args", "max_nr_batches", "shuffle"):
        assert getattr(bob.train_config, name) == getattr(config, name)
    config.batch_size = 9
    assert bob.train_config.batch_size == 2


def test_model_and_loss_are_on_the_worker(prepared):
    alice, model, *_ = prepared
    config = config_of(model)
    config.send(alice)
    assert config.model_ptr.location is config.loss_fn_ptr.location is alice
    assert alice.objects_count() >= 4
    assert config.loss_fn_ptr.get().obj is loss_fn


def test_fitted_and_fetched_the_loss_is_smaller(prepared):
    alice, model, data, target, before = prepared
    config = config_of(model)
    config.send(alice)
    losses = [alice.fit(dataset_key="gaussian_mixture", return_ids=[0]) for _ in range(5)]
    assert all(isinstance(loss, torch.Tensor) for loss in losses)
    assert losses[-1] < losses[0]
    trained = config.model_ptr.get().obj
    assert loss_fn(pred=trained(data), target=target).item() < before


def test_sent_twice_it_goes_on_with_what_was_trained(prepared):
    alice, model, data, target, before = prepared
    first = config_of(model)
    first.send(alice)
    for _ in range(3):
        alice.fit(dataset_key="gaussian_mixture")
    trained = first.model_ptr.get().obj
    middle = loss_fn(pred=trained(data), target=target).item()
    second = config_of(trained)
    second.send(alice)
    for _ in range(3):
        alice.fit(dataset_key="gaussian_mixture")
    after = loss_fn(pred=second.model_ptr.get().obj(data), target=target).item()
    assert after < middle < before


def test_async_fit_on_several_workers(make_worker):
    torch.manual_seed(0)
    data, target = utils.create_gaussian_mixture_toy_data(nr_samples=60)
    workers = [make_worker(id, {"toy": sy.BaseDataset(data, target)}) for id in ("alice", "bob")]
    model = torch.jit.trace(Net(), data)
    configs = [config_of(model) for _ in workers]
    for config, worker in zip(configs, workers, strict=True):
        config.send(worker)

    async def fit():
        return await asyncio.gather(*(one.async_fit(dataset_key="toy", return_ids=[0]) for one in workers))

    before = loss_fn(pred=model(data), target=target).item()
    assert all(loss.item() > 0 for loss in asyncio.run(fit()))
    models = {worker.id: config.model_ptr.get().obj for config, worker in zip(configs, workers, strict=True)}
    averaged = utils.federated_avg(models)
    assert averaged is models["alice"]
    assert loss_fn(pred=averaged(data), target=target).item() < before


@pytest.mark.parametrize(("most", "batches"), [(-1, 5), (2, 2), (9, 5)])
def test_so_many_batches(prepared, most, batches):
    alice, model, *_ = prepared
    config_of(model, max_nr_batches=most).send(alice)
    assert alice.fit(dataset_key="gaussian_mixture").batches == batches


def test_other_optimizers(prepared):
    alice, model, data, target, before = prepared
    config = config_of(model, optimizer="Adam", optimizer_args={"lr": 0.01, "weight_decay": 0.01}, epochs=5)
    config.send(alice)
    alice.fit(dataset_key="gaussian_mixture", device="cpu")
    assert loss_fn(pred=config.model_ptr.get().obj(data), target=target).item() < before


def test_models_by_id_are_given_themselves(bob):
    for option in ("model_id", "loss_fn_id"):
        with pytest.raises(OptionError, match=r"TrainConfig\(model=\.\.\., loss_fn=\.\.\.\)"):
            TrainConfig(batch_size=2, **{option: 5})


# --------------------------------------------------------------------------------------------------- Optims


def test_an_optimizer_for_each_worker(bob, alice):
    model = nn.Linear(2, 1)
    optims = Optims(["bob", "alice"], optim=optim.Adam(params=model.parameters(), lr=0.1))
    assert optims.count() == 2
    assert optims.workers == ["bob", "alice"]
    assert optims.get_optim("bob") is not optims.get_optim("alice")
    data = [(torch.ones(2, 2).send(one), torch.zeros(2, 1).send(one)) for one in (bob, alice)]
    losses = []
    for _ in range(5):
        for x, y in data:
            model.send(x.location)
            optimizer = optims.get_optim(x.location.id)
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).sum()
            loss.backward()
            optimizer.step()
            model.get()
            losses.append(loss.get().item())
    assert losses[-1] < losses[0]
