"""Programs on encrypted tensors as users bring them: each runs on plain tensors and on shares, on both transports, and
gives the same values and gradients.
"""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import planrt as sy
from planrt.errors import SharingError
from planrt.sharing.tensors.shared import SharedTensor
from tests.workers.conftest import PRECISION

sy.TorchHook(torch)
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2])


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


# ---------------------------------------------------------------------------------------- tensors that change


def _data(x, _):
    one = x(X)
    kept = one.data
    one.data = one * 2
    one.data[0] = 7.0
    one.data.add_(1)
    return one, kept, one + 1


def _data_of_parameters(x, module):
    model = module(network())
    with torch.no_grad():
        for one in model.parameters():
            one.data = one.data * 0.5
            one.sub_(0.05)
    F.cross_entropy(model(x(X)), CLASSES).backward()
    return list(model.parameters()), [one.grad for one in model.parameters()]


def _moving_average(x, module):
    model = module(network())
    slow, fast = copy.deepcopy(model), optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        fast.zero_grad()
        F.cross_entropy(model(x(X)), CLASSES).backward()
        fast.step()
        with torch.no_grad():
            for one, other in zip(slow.parameters(), model.parameters(), strict=True):
                one.mul_(0.9).add_(other, alpha=0.1)
    return list(slow.parameters())


def _masks(x, _):
    one = x(X)
    mask = one > 0
    mask &= one < 1
    mask |= one < -1
    more = (~(mask ^ (one > 0.5))).all(1)
    close = torch.isclose(one, one + 1e-4, atol=1e-2).sum()
    return (
        (~mask).sum(1),
        mask.bool().float().mean(),
        mask.to(torch.uint8).sum(),
        one.bool().sum(),
        more,
        close,
    )


def _written_by_mask(x, _):
    one = x(X, True)
    inner = one * 1
    inner[inner > 0] = 0.5
    inner[(one < -0.5) | (one > 1)] = -1.0
    inner[one[:, 0] > 1] = 3.0  # whole rows
    (inner * inner).sum().backward()
    return inner, one.grad


def _written_out(x, _):
    one = x(X)
    out = one * 0
    torch.maximum(one, one * 2, out=out)
    torch.mul(out, 2, out=out)
    torch.div(out, 3, out=out)
    torch.add(out, one, alpha=2, out=out)
    return out


@pytest.mark.parametrize(
    "program", [_data, _data_of_parameters, _moving_average, _masks, _written_by_mask, _written_out]
)
def test_tensors_that_change(alike, program):
    alike(program)


def test_what_is_refused_of_these(parties):
    bob, alice, james = parties
    one = X.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james)
    for call, message in (
        (lambda: setattr(one, "data", X), r"x\.data\.copy_"),
        (lambda: torch.add(one, 1, out=X.clone()), "what all know"),
        (lambda: torch.add(one, 1, out=one[:2]), "out= has shape"),
        (lambda: one.__setitem__(one.argmax(0), 0.0), "public places only"),
        (lambda: one.__setitem__(one > 0, X[0]), "public places only"),
        (lambda: torch.jit.trace(torch.relu, one), "func2plan"),
    ):
        with pytest.raises(SharingError, match=message):
            call()
    assert (one.get() - X).abs().max() < 1e-4
    handle = copy.deepcopy(
        {"of": one.handle}
    )  # two handles of one secret would take it from the parties twice
    del handle
    gc.collect()
    assert (one.get() - X).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------- autograd


def _second_derivatives(x, _):
    one = x(X, True)
    (first,) = torch.autograd.grad((one.abs() * one + one.sigmoid()).sum(), one, create_graph=True)
    (first**2).sum().backward()
    return first, one.grad


def _hessian(x, _):
    return torch.autograd.functional.hessian(lambda one: (one**3).sum(), x(X[0]))


def _forward_derivatives(x, _):
    return torch.func.jvp(lambda one: one * one + 1, (x(X),), (x(X),))


@pytest.mark.parametrize("program", [_second_derivatives, _hessian, _forward_derivatives])
def test_derivatives(alike, program):
    alike(program, within=1e-2)


def test_autograd_says_what_it_says_of_plain_tensors(parties):
    bob, alice, james = parties
    one = X.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james, requires_grad=True)
    loss = (one * one).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    inner = one * 1
    squares = inner * inner
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        one.add_(1)


def _frozen(x, module):
    model = network()
    for one in model[0].parameters():
        one.requires_grad_(False)
    module(model)
    told = [one.requires_grad for one in model.parameters()]
    optimizer = optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    F.cross_entropy(model(x(X)), CLASSES).backward()
    optimizer.step()
    return told, list(model.parameters())


def test_frozen_layers_stay_so(alike, parties):
    alike(_frozen)
    bob, alice, james = parties
    model = network()
    model[0].weight.requires_grad_(False)
    before = [one.requires_grad for one in model.parameters()]
    for requires_grad in (False, True):
        model.fix_precision().share(bob, alice, crypto_provider=james, requires_grad=requires_grad)
        assert [one.requires_grad for one in model.parameters()] == [requires_grad and one for one in before]
        model.get().float_precision()
        assert [one.requires_grad for one in model.parameters()] == before


# ------------------------------------------------------------------------------------------------- networks


def test_attention_that_drops_some(parties):
    """With dropout torch takes another function for the weights, in the layers as they are made."""
    bob, alice, james = parties
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.1)
    model.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james, requires_grad=True)
    hidden = X.reshape(2, 3, 4).fix_precision(**PRECISION).share(bob, alice, crypto_provider=james)
    found = model(hidden)
    (found * found).sum().backward()
    assert abs(found.get().mean()) < 1e-2  # of what a layer norm is last in
    assert all(one.grad is not None for one in model.parameters())


def _spectral(x, module):
    torch.manual_seed(0)
    model = module(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.ReLU()))
    return model(x(X))


def test_spectral_norm(alike):
    alike(_spectral)


# ------------------------------------------------------------------------------------------- whole numbers


def _tokens_and_classes(x, _):
    """Whole numbers are shared without a precision, and meet fractions of any."""
    weight, rows, classes = x(X, True), x(torch.tensor([[0, 5], [3, 3]])), x(CLASSES[:4])
    logits = F.embedding(rows, weight).flatten(0, 1)
    loss = F.cross_entropy(logits, classes)
    loss.backward()
    right = (logits.argmax(1) == classes).float().mean()
    chosen = torch.where(classes == 2, logits[:, 0], -logits[:, 0])
    more = classes * 2 + 1
    more[0] = 100
    return loss, weight.grad, right, chosen, more * logits[:, 1], (more[1:] * 1.5).sum()


def test_whole_numbers_meet_fractions_of_any_precision(alike, parties):
    alike(_tokens_and_classes, within=1e-2)
    bob, alice, james = parties
    fine, coarse = (
        X.fix_precision(precision_fractional=digits).share(bob, alice, crypto_provider=james)
        for digits in (4, 2)
    )
    whole = torch.arange(4).share(bob, alice, crypto_provider=james)
    with pytest.raises(SharingError, match="different precisions"):
        fine + coarse
    for one in (fine, coarse):
        assert ((one * whole).get() - X * torch.arange(4)).abs().max() < 0.05
        with pytest.raises(SharingError, match="different precisions"):
            whole.add_(one)  # fractions do not fit into whole numbers
    others = torch.arange(4).share(bob, james, crypto_provider=alice)
    with pytest.raises(SharingError, match="different parties"):
        fine * others


def test_whole_numbers_are_exact_beyond_what_floating_point_holds(parties):
    bob, alice, james = parties
    values = torch.tensor([2**61, -(2**61) + 1, 2**53 + 1, -3])
    one = values.share(bob, alice, crypto_provider=james)
    assert torch.equal(one.get(), values)
    assert torch.equal((one + one - one).get(), values)
    assert torch.equal(one.abs().get(), values.abs())
    assert torch.equal(
        torch.where(one > 0, values, values - 1).get(), torch.where(values > 0, values, values - 1)
    )
    assert [one.max().get().item(), one.min().get().item()] == [2**61, -(2**61) + 1]


# ---------------------------------------------------------------------------------------------- optimizers

OPTIMIZERS = {
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "Adam, the largest means": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01, betas=(0.8, 0.97), weight_decay=0.05),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.003, momentum=0.5),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
}
SLOPES = torch.tensor([20.0, -1.0, 0.05, -0.006, 0.001, -0.0005, 0.0])
"""Gradients of all sizes: adaptive optimizers take steps of one size for them."""


def _steps(make):
    def program(x, _):
        weight = x(torch.zeros(7), True)
        optimizer = make([weight])
        for number in range(3):
            optimizer.zero_grad()
            (weight * SLOPES * (1 + number % 2)).sum().backward()
            optimizer.step()
            for state in optimizer.state[weight].values():
                if isinstance(state, SharedTensor):
                    state * 2 + state.sum()  # whoever looks at the means changes nothing of them
        return weight

    return program


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_gradients_move_weights_as_they_do_in_the_clear(name, alike):
    # A gradient, and what an optimizer makes of it, is off by one unit of the last place at most: relative to its size,
    # so are the steps, which all have one size. Adamax, which divides by the largest gradient alone and not by a mean,
    # adds up what its means lose.
    one_unit = torch.where(SLOPES == 0, 0, 1 / (SLOPES.abs() * 2**16))
    alike(_steps(OPTIMIZERS[name]), within=(0.2 if name == "Adamax" else 0.1) * one_unit + 2e-4)


def _weighted_positives(x, _):
    weights = torch.tensor([1.0, 3.0, 0.5, 2.0])
    logits, wanted, secret = x(X, True), x((X.roll(1) > 0).float()), x(weights)
    loss = F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weights)
    loss = loss + F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=secret, reduction="sum")
    loss.backward()
    return loss, logits.grad


def test_weights_of_positive_classes(alike):
    alike(_weighted_positives, within=5e-3)
