"""A model that is changed between rounds is trained and evaluated as it is; one that is not is recorded once."""

import asyncio
import copy
import functools
import random
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planrt.fl import (
    RoundScheduler,
    TrainConfig,
    evaluate_model_on_worker,
    federated_avg,
    fit_model_on_worker,
)
from planrt.plans.fingerprint import fingerprint
from planrt.workers import BaseDataset
from tests.models import seeded_classifier

SCALE = 1.0


def data():
    generator = torch.Generator().manual_seed(3)
    return BaseDataset(
        torch.randn(20, 4, generator=generator), torch.randint(0, 3, (20,), generator=generator)
    )


@pytest.fixture
def bob(make_worker):
    return make_worker("bob", {"d": data()})


@pytest.fixture
def recordings(monkeypatch):
    """How often a function was recorded so far."""
    from planrt.plans import model_plans

    counted, real = [], model_plans.record

    def record(*args, **kwargs):
        counted.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(model_plans, "record", record)
    return counted


class Net(nn.Module):
    """Reads a plain attribute, a class attribute, a global and a helper."""

    power = 1

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.0)
        self.last = nn.Linear(4, 3)
        self.options = {"factor": 1.0}

    def forward(self, x):
        x = self.drop(self.first(x)) * self.options["factor"] * SCALE
        return self.last(self.bent(x))

    def bent(self, x):
        return x**self.power


class Config:
    def __init__(self):
        self.layers = [1, 2]


class Odd(nn.Module):
    """With a config object, a closure over itself, a circle and generators."""

    def __init__(self):
        super().__init__()
        self.config = Config()
        self.scaled = lambda x: x * self.factor
        self.factor = 2.0
        self.circle = [self]
        self.drawn = random.Random(1)
        self.generator = torch.Generator().manual_seed(1)
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


def locally(model, batch_size=5, lr=0.1):
    """One pass of a plain loop, in order."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    held = data()
    for start in range(0, 20, batch_size):
        optimizer.zero_grad()
        rows = slice(start, start + batch_size)
        F.cross_entropy(model(held.data[rows]), held.targets[rows]).backward()
        optimizer.step()
    return model


def hook_that_halves(module, args, output):
    return output / 2


def with_relu(self, x):
    return self.last(torch.relu(self.first(x)))


def change_global(model, monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 0.5)


def change_class(model, monkeypatch):
    monkeypatch.setattr(Net, "power", 2)


def change_method(model, monkeypatch):
    monkeypatch.setattr(Net, "bent", lambda self, x: torch.tanh(x))


CHANGES = {
    "frozen": lambda model, _: model.first.requires_grad_(False),
    "unfrozen": lambda model, _: model.last.requires_grad_(True),
    "dropout": lambda model, _: setattr(model.drop, "p", 1.0),
    "another layer": lambda model, _: setattr(model, "drop", nn.Tanh()),
    "an added layer": lambda model, _: setattr(model, "last", nn.Sequential(model.last, nn.Linear(3, 3))),
    "a plain attribute": lambda model, _: model.options.update(factor=3.0),
    "a forward of its own": lambda model, _: setattr(model, "forward", types.MethodType(with_relu, model)),
    "a hook": lambda model, _: model.first.register_forward_hook(hook_that_halves),
    "another parameter": lambda model, _: setattr(model.first, "bias", nn.Parameter(torch.ones(4))),
    "a global": change_global,
    "a class attribute": change_class,
    "a method": change_method,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_way_in_follows_a_change(name, bob, monkeypatch):
    """fit_model_on_worker, the rounds of one TrainConfig and evaluate_model_on_worker, before and after."""
    model = Net()
    if name == "unfrozen":
        model.last.requires_grad_(False)
    config = TrainConfig(model, F.cross_entropy, batch_size=5, shuffle=False)
    scheduler = RoundScheduler([bob], config, dataset_key="d", seed=1)

    def evaluated():
        return evaluate_model_on_worker("m", bob, "d", model, 3, 20, loss_fn=F.cross_entropy).loss

    async def rounds():
        await scheduler.prepare()
        return await scheduler.run_round(1, config.state)

    def check():
        expected = locally(model).state_dict()
        result = asyncio.run(rounds())
        for key, value in result.state.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
        everything = asyncio.run(
            fit_model_on_worker(bob, model, 20, 1, -1, 0.1, dataset_key="d", loss_fn=F.cross_entropy)
        )[1]
        whole = locally(model, batch_size=20).state_dict()
        for key, value in everything.state_dict().items():
            torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-6)
        held = data()
        copied = copy.deepcopy(model).eval()
        assert evaluated() == pytest.approx(F.cross_entropy(copied(held.data), held.targets).item(), rel=1e-5)

    check()
    CHANGES[name](model, monkeypatch)
    check()


def test_a_model_of_another_dtype_is_recorded_again(make_worker):
    wide = make_worker("wide", {"d": BaseDataset(data().data.double(), data().targets)})
    model = nn.Linear(4, 3)
    with pytest.raises(Exception, match="dtype"):
        asyncio.run(fit_model_on_worker(wide, model, 5, 1, -1, 0.1, dataset_key="d", loss_fn=F.cross_entropy))
    trained = asyncio.run(
        fit_model_on_worker(wide, model.double(), 5, 1, -1, 0.1, dataset_key="d", loss_fn=F.cross_entropy)
    )[1]
    assert trained.weight.dtype == torch.float64


def test_a_loss_that_closes_over_a_number_is_followed(bob):
    factor = [1.0]
    model = nn.Linear(4, 3)

    def loss(prediction, target):
        return factor[0] * F.cross_entropy(prediction, target)

    def evaluated():
        return evaluate_model_on_worker("m", bob, "d", model, 3, 5, loss_fn=loss).loss

    one = evaluated()
    factor[0] = 2.0
    assert evaluated() == pytest.approx(2 * one)


@pytest.mark.parametrize("scripted", [False, True])
def test_the_tutorials_loop_records_once(scripted, make_worker, recordings):
    workers = [make_worker(id, {"d": data()}) for id in ("alice", "bob")]
    model = Net()
    if scripted:
        model = torch.jit.trace(model, torch.zeros(2, 4))
    for number in range(4):
        models = {
            worker.id: asyncio.run(
                fit_model_on_worker(
                    worker, model, 5, number, -1, 0.1, dataset_key="d", loss_fn=F.cross_entropy
                )
            )[1]
            for worker in workers
        }
        model = federated_avg(models)
    assert len(recordings) <= 2  # in training and in evaluation mode


def test_what_cannot_be_looked_into_is_recorded_every_time(bob, recordings):
    import threading

    model = nn.Linear(4, 3)
    model.lock = threading.Lock()
    assert fingerprint(model) is None
    config = TrainConfig(model, F.cross_entropy, batch_size=5)
    for number in (1, 2):
        asyncio.run(config.fit(bob, prepared(config, bob), dataset_key="d", seed=number))
    assert len(recordings) >= 4


def prepared(config, worker):
    config.trace_for(worker, "d")
    return config.state


def test_equal_models_have_equal_fingerprints_and_others_do_not():
    def other(change):
        model = Net()
        change(model)
        return fingerprint(model, F.cross_entropy)

    one = fingerprint(Net(), F.cross_entropy)
    assert one is not None
    assert one == other(lambda model: None) == other(lambda model: model.eval())
    assert one == fingerprint(copy.deepcopy(Net()), F.cross_entropy)
    values = other(lambda model: model.first.weight.data.fill_(7))
    assert one == values
    assert one != fingerprint(Net(), F.nll_loss)
    for name, change in CHANGES.items():
        if name not in ("a global", "a class attribute", "a method", "unfrozen", "another parameter"):
            assert one != other(lambda model, change=change: change(model, None)), name
    for model in (seeded_classifier(), nn.LSTM(3, 4), nn.TransformerEncoderLayer(8, 2, batch_first=True)):
        assert fingerprint(model) == fingerprint(copy.deepcopy(model)) is not None
    odd = Odd()
    assert fingerprint(odd) == fingerprint(odd) is not None  # looking leaves nothing behind
    odd.config.layers.append(3)
    assert fingerprint(odd) != fingerprint(Odd())
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = fingerprint(tied)
    tied[1].weight = tied[0].weight
    assert fingerprint(tied) != before
    smooth = functools.partial(F.cross_entropy, label_smoothing=0.1)
    assert fingerprint(tied, smooth) == fingerprint(tied, smooth) is not None
    assert fingerprint(tied, smooth) != fingerprint(
        tied, functools.partial(F.cross_entropy, label_smoothing=0.2)
    )
    weights = [torch.ones(3), torch.ones(3), torch.full((3,), 2.0)]
    one, same, other = (fingerprint(tied, nn.CrossEntropyLoss(weight=weight)) for weight in weights)
    assert one == same != other
