"""`Optims`: one optimizer state per worker over the same parameters."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn, optim

import planrt
from planrt.errors import OptionError
from planrt.fl import Optims
from planrt.workers.pointers.tensor import PointerTensor

DATA = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
TARGET = torch.tensor([[0.0], [0.0], [1.0], [1.0]])


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


def model_of(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(2, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: optim.Adam(parameters, lr=0.1, betas=(0.8, 0.9)),
        lambda parameters: optim.AdamW(parameters, lr=0.1, amsgrad=True),
        lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
        lambda parameters: optim.RMSprop(parameters, lr=0.01, centered=True),
        lambda parameters: optim.Adagrad(parameters, lr=0.1),
    ],
    ids=["Adam", "AdamW", "SGD", "RMSprop", "Adagrad"],
)
def test_each_worker_has_its_own_state_and_the_steps_are_those_of_separate_optimizers(make, make_worker):
    bob, alice = make_worker("bob"), make_worker("alice")
    remote, local = model_of(), model_of()
    optims = Optims(["bob", "alice"], optim=make(remote.parameters()))
    plain = {"bob": make(local.parameters()), "alice": make(local.parameters())}
    parts = [
        (worker, DATA[rows], TARGET[rows], DATA[rows].send(worker), TARGET[rows].send(worker))
        for worker, rows in ((bob, slice(2)), (alice, slice(2, 4)))
    ]
    for _ in range(4):
        for worker, here, wanted, data, target in parts:
            remote.send(data.location)
            optimizer = optims.get_optim(data.location.id)
            optimizer.zero_grad()
            ((remote(data) - target) ** 2).sum().backward()
            optimizer.step()
            remote.get()
            plain[worker.id].zero_grad()
            ((local(here) - wanted) ** 2).sum().backward()
            plain[worker.id].step()
    torch.testing.assert_close(remote.state_dict(), local.state_dict(), rtol=1e-6, atol=1e-7)
    for worker, *_ in parts:
        state = optims.get_optim(worker).state
        assert len(state) == 2
        pointers = [
            value for one in state.values() for value in one.values() if isinstance(value, PointerTensor)
        ]
        assert pointers or isinstance(optims.get_optim(worker), optim.Adagrad)
        assert {pointer.location for pointer in pointers} <= {worker}


def test_the_loss_of_the_tutorial_falls(make_worker):
    model = model_of(1)
    workers = [make_worker("bob"), make_worker("alice")]
    optims = Optims(["bob", "alice"], optim=optim.Adam(params=model.parameters(), lr=0.1))
    parts = [(DATA[:2].send(workers[0]), TARGET[:2].send(workers[0]))]
    parts.append((DATA[2:].send(workers[1]), TARGET[2:].send(workers[1])))
    for _ in range(20):
        for data, target in parts:
            model.send(data.location)
            optimizer = optims.get_optim(data.location.id)
            optimizer.zero_grad()
            ((model(data) - target) ** 2).sum().backward()
            optimizer.step()
            model.get()
    with torch.no_grad():
        assert ((model(DATA) - TARGET) ** 2).sum() < 0.1


def test_the_copies_have_the_class_the_parameters_and_the_options():
    model = model_of()
    given = optim.AdamW(
        [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias]}],
        lr=0.25,
        weight_decay=0.1,
        betas=(0.5, 0.6),
    )
    optims = Optims(["bob", "alice"], given)
    bobs, alices = optims.get_optim("bob"), optims.get_optim("alice")
    assert type(bobs) is type(alices) is optim.AdamW
    assert len({id(one) for one in (given, bobs, alices)}) == 3
    for mine in (bobs, alices):
        for group, like in zip(mine.param_groups, given.param_groups, strict=True):
            assert {**group, "params": None} == {**like, "params": None}
            assert all(one is other for one, other in zip(group["params"], like["params"], strict=True))
    bobs.param_groups[0]["lr"] = 9.0
    assert alices.param_groups[0]["lr"] == given.param_groups[0]["lr"] == 0.5
    assert optims.count() == len(optims) == 2
    assert repr(optims) == "<Optims: AdamW for bob, alice>"


def test_an_option_that_is_a_tensor_is_the_copys_own():
    given = optim.SGD(model_of().parameters(), lr=torch.tensor(0.5))
    optims = Optims(["bob", "alice"], given)
    optims.get_optim("bob").param_groups[0]["lr"].fill_(9.0)
    assert optims.get_optim("alice").param_groups[0]["lr"] == given.param_groups[0]["lr"] == 0.5


def test_a_used_optimizer_gives_copies_without_state_that_step_by_themselves():
    model = model_of()
    given = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(DATA).sum().backward()
    given.step()
    scheduler = optim.lr_scheduler.StepLR(given, 1)  # replaces given.step by one of its own
    mine = Optims(["bob"], given).get_optim("bob")
    assert not mine.state
    before = model.weight.detach().clone()
    mine.step()
    assert len(mine.state) == 2
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * model.weight.grad)
    assert scheduler.get_last_lr() == [0.1]


def test_an_optimizer_of_ones_own_keeps_what_it_needs():
    class Halving(optim.Optimizer):
        def __init__(self, params, factor):
            super().__init__(params, {})
            self.factor = factor

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(self.factor)

    model = model_of()
    before = model.weight.detach().clone()
    Optims(["bob"], Halving(model.parameters(), 0.5)).get_optim("bob").step()
    torch.testing.assert_close(model.weight.detach(), before / 2)


def test_workers_do_as_well_as_their_ids(make_worker):
    bob = make_worker("bob")
    optims = Optims([bob, "alice"], optim.SGD(model_of().parameters(), lr=0.1))
    assert optims.get_optim(bob) is optims.get_optim("bob")
    assert optims.workers == ["bob", "alice"]


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ([], "no workers"),
        (["bob", "alice", "bob"], "bob given twice"),
        ("bob", r"write Optims\(\['bob'\]"),
        ([1], "workers or their ids, not int"),
    ],
)
def test_wrong_workers_are_refused(workers, message):
    with pytest.raises(OptionError, match=message):
        Optims(workers, optim.SGD(model_of().parameters(), lr=0.1))


@pytest.mark.parametrize("optimizer", [optim.Adam, None, "Adam"])
def test_what_is_no_optimizer_is_refused(optimizer):
    with pytest.raises(OptionError, match="must be an optimizer"):
        Optims(["bob"], optimizer)


@pytest.mark.parametrize("unknown", ["carol", 3, None])
def test_an_unknown_worker_is_named(unknown):
    optims = Optims(["bob", "alice"], optim.SGD(model_of().parameters(), lr=0.1))
    with pytest.raises(
        OptionError, match="made for bob, alice" if unknown == "carol" else "workers or their ids"
    ):
        optims.get_optim(unknown)


def test_public_names():
    assert planrt.Optims is planrt.fl.Optims is Optims


def test_the_state_of_each_is_saved_once_the_model_is_here(make_worker):
    bob = make_worker("bob")
    model = model_of()
    optims = Optims(["bob", "alice"], optim=optim.Adam(model.parameters()))
    model.send(bob)
    model(DATA.send(bob)).sum().backward()
    optims.get_optim("bob").step()
    model.get()
    saved = io.BytesIO()
    torch.save(optims.get_optim("bob").state_dict(), saved)
    saved.seek(0)
    assert len(torch.load(saved, weights_only=True)["state"]) == 2
