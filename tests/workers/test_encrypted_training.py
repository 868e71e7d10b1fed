"""How people train and handle models, on shares as on plain tensors: optimizers, rates, clipping, losses, copies."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import planrt as sy
from planrt.errors import SharingError
from tests.workers.conftest import PRECISION

sy.TorchHook(torch)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y, CLASSES = random(8, 3), random(8, 2, seed=1), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.5])


def made(module, *layers):
    torch.manual_seed(0)
    return module(nn.Sequential(*[one() for one in layers]))


def network(module):
    return made(module, lambda: nn.Linear(3, 4), nn.ReLU, lambda: nn.Linear(4, 2))


def trained(model, optimizer, x, y, steps=2, between=lambda: None, after=lambda: None):
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        found.append(between())
        optimizer.step()
        after()
        found.append(loss.detach())
    return [one for one in found if one is not None], [one.detach() for one in model.parameters()]


TRAINING = {
    **{name: {} for name in ("RAdam", "Adadelta", "ASGD", "Rprop")},
    **{f"{name}, foreach": {"foreach": True} for name in ("Adamax", "NAdam", "RMSprop")},
    "SGD, nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam, amsgrad": {"amsgrad": True, "maximize": True},
}


@pytest.mark.parametrize("name", TRAINING)
def test_optimizers(name, alike):
    def program(x, module):
        model = network(module)
        kind = getattr(optim, name.partition(",")[0])
        return trained(model, kind(model.parameters(), lr=0.01, **TRAINING[name]), x(X), x(Y))

    alike(program, within=2e-3)


OPTIMIZERS = {
    **{
        name: {"lr": 0.1}
        for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "ASGD", "Rprop")
    },
    "Adadelta": {"lr": 30.0},
    "Adadelta, other eps": {"lr": 3.0, "eps": 1e-4, "foreach": True},
    **{f"{name}, foreach": {"lr": 0.1, "foreach": True} for name in ("Adamax", "NAdam", "RMSprop")},
    "SGD, nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam, amsgrad": {"lr": 0.1, "amsgrad": True, "maximize": True},
    "RMSprop, centred": {"lr": 0.1, "centered": True, "momentum": 0.5},
    "Adagrad, from 0.1": {"lr": 0.1, "initial_accumulator_value": 0.1, "lr_decay": 0.1},
}
UNITS = torch.tensor([1000.0, 300, 100, 30, 10, 3, 1, 0, -1, -5, -40, -2000])


@pytest.mark.parametrize("precision", [PRECISION, {}], ids=["2**16", "thousandths"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_move_weights_as_in_the_clear_for_gradients_from_one_unit_on(name, precision, parties):
    """By how far plain PyTorch moves them, but for some units: adaptive optimizers move all of them about as far. Of
    gradients below ten units a third or more may be missing. Adamax, whose largest gradients are whole units, moves
    weights with these by chance, and so does Adadelta at thousandths, where its own steps are a few units.
    """
    bob, alice, james = parties
    unit, options = 2.0**-16 if precision else 1e-3, OPTIMIZERS[name]
    if name == "Adadelta" and not precision:  # else its steps are a few units, and off by one
        options = {"lr": 1.0, "eps": 1e-2}
    layer = nn.Linear(len(UNITS), 1, bias=False)
    nn.init.constant_(layer.weight, 0.25)
    shared = copy.deepcopy(layer).fix_precision(**precision)
    shared.share(bob, alice, crypto_provider=james, requires_grad=True)
    for model in (layer, shared):
        optimizer = getattr(optim, name.partition(",")[0])(model.parameters(), **options)
        for step in range(4):
            gradient = (UNITS * unit * (1 + step % 2))[None]
            if model is shared:
                gradient = gradient.fix_precision(**precision).share(bob, alice, crypto_provider=james)
            model.weight.grad = gradient
            optimizer.step()
    moved = layer.weight.detach()[0] - 0.25
    off = (shared.weight.detach().get()[0] - 0.25 - moved).abs()
    few = torch.where(UNITS.abs() < 10, 0.65, 0.08)
    least = 30 if "Adamax" in name else 100 if "Adadelta" in name and not precision else 0
    few[UNITS.abs() < least] = torch.inf
    several = 3 + (8 * options["lr"] if "Adadelta" in name else 0)  # the rate times what its steps are off
    assert moved.abs().max() > 30 * unit, "or the test could not fail"
    assert (off <= (few * moved.abs()).nan_to_num() + several * unit).all(), (off / unit, moved / unit)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: optim.LBFGS(p), "LBFGS does not step on shares.*such as SGD or Adam"),
        (lambda p: optim.Adafactor(p), "Adafactor does not step on shares.*such as SGD or Adam"),
        (lambda p: optim.SparseAdam(p), "SparseAdam does not step on shares.*such as SGD or Adam"),
        (lambda p: optim.Adam(p, fused=True), r"Adam\(fused=True\).*make it with fused=False"),
        (lambda p: optim.SGD(p, lr=0.1, fused=True), r"SGD\(fused=True\).*make it with fused=False"),
        (lambda p: optim.RAdam(p, foreach=True), r"RAdam\(foreach=True\).*make it with foreach=False"),
    ],
)
def test_optimizers_that_do_not_step_say_what_to_take(make, says, parties):
    bob, alice, james = parties
    model = (
        nn.Linear(3, 2)
        .fix_precision(**PRECISION)
        .share(bob, alice, crypto_provider=james, requires_grad=True)
    )
    optimizer, before = make(model.parameters()), model.weight.detach().clone().get()
    x = X.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james)

    def closure():
        loss = model(x).mean()
        loss.backward()
        return loss

    closure()
    with pytest.raises(SharingError, match=says):
        optimizer.step(closure)
    assert torch.equal(model.weight.get(), before)
    optim.SGD(model.parameters(), lr=0.1).step()


CLIPPED = {
    "by norm": lambda p: nn.utils.clip_grad_norm_(p, 0.5),
    "not by norm": lambda p: nn.utils.clip_grad_norm_(p, 50.0),
    "by norm 1": lambda p: nn.utils.clip_grad_norm_(p, 0.5, norm_type=1),
    "by the largest": lambda p: nn.utils.clip_grad_norm_(p, 0.1, norm_type=float("inf")),
    "as lists": lambda p: nn.utils.clip_grad_norm_(p, 0.5, foreach=True),
    "by value": lambda p: nn.utils.clip_grad_value_(p, 0.1),
}


@pytest.mark.parametrize("how", CLIPPED)
def test_clipped_gradients(how, alike):
    def program(x, module):
        model = network(module)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        return trained(model, optimizer, x(X), x(Y), between=lambda: CLIPPED[how](list(model.parameters())))

    alike(program)


SCHEDULES = {
    "cosine": lambda one: optim.lr_scheduler.CosineAnnealingLR(one, 3),
    "one cycle": lambda one: optim.lr_scheduler.OneCycleLR(one, 0.1, total_steps=4),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_rates(name, alike):
    def program(x, module):
        model = network(module)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = SCHEDULES[name](optimizer)
        done = trained(model, optimizer, x(X), x(Y), steps=3, after=schedule.step)
        return done, schedule.get_last_lr()

    alike(program)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_with_weights_and_smoothing_of_secret_classes(reduction, alike):
    def program(x, module):
        found = []
        for shape, smoothing, weight in itertools.product([(8, 4), (2, 4, 4)], [0.0, 0.2], [None, WEIGHT]):
            scores = x(random(*shape), True)
            for classes in (CLASSES, x(CLASSES)):
                classes = classes if len(shape) == 2 else classes.reshape(2, 4)
                loss = F.cross_entropy(
                    scores, classes, weight, reduction=reduction, label_smoothing=smoothing
                )
                found += [loss, *torch.autograd.grad(loss.sum(), scores)]
        return found

    alike(program)


def test_powers_of_quarters_and_normalisation_across_channels(alike):
    def program(x, module):
        found = []
        for exponent in (0.25, 0.75, -0.25, -0.75, 1.25, -1.5):
            base = x(torch.tensor([0.5, 1.0, 3.0, 12.0]), True)
            power = base**exponent
            found += [power, *torch.autograd.grad(power.sum(), base)]
        images = x(random(2, 5, 4), True)
        normed = F.local_response_norm(images, 3, alpha=0.5, k=2.0)
        return found, normed, torch.autograd.grad((normed * normed).sum(), images)

    alike(program, within=3e-3)


def test_copies_of_models_are_models(alike, parties):
    def program(x, module):
        model = network(module)
        x, y = x(X), x(Y)
        trained(model, optim.SGD(model.parameters(), lr=0.1), x, y)
        other, mean = copy.deepcopy(model), optim.swa_utils.AveragedModel(model)
        assert all(isinstance(one, nn.Parameter) for one in other.parameters())
        assert [one.requires_grad for one in other.parameters()] == [True] * 4
        assert all(one.grad is None for one in other.parameters())
        done = trained(other, optim.SGD(other.parameters(), lr=0.1), x, y)
        mean.update_parameters(other)
        model.load_state_dict(other.state_dict())
        shallow = copy.copy(model[0].weight)
        with torch.no_grad():
            shallow.add_(1.0)
        fresh = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        fresh.load_state_dict(mean.module.state_dict(), assign=True)
        return done, model(x), shallow, fresh(x)

    alike(program)
    bob, alice, james = parties
    model = network(lambda one: one).fix_precision(**PRECISION)
    other = copy.deepcopy(model.share(bob, alice, crypto_provider=james, requires_grad=True))
    other.get().float_precision()
    assert all(type(one) is nn.Parameter and one.requires_grad for one in other.parameters())
    assert torch.equal(other[0].weight, model.get().float_precision()[0].weight)
    trained(other, optim.SGD(other.parameters(), lr=0.1), X, Y)
    shared = X.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james, requires_grad=True)
    (shared * 2).sum().backward()
    assert torch.equal(copy.deepcopy(shared).grad.get(), torch.full((8, 3), 2.0))
    with pytest.raises(RuntimeError, match="no results of others have deep copies"):
        copy.deepcopy(shared * 2)
    with pytest.raises(RuntimeError, match="assign=True"):
        nn.Linear(3, 3).load_state_dict({"weight": shared.detach()[:3], "bias": torch.zeros(3)})
