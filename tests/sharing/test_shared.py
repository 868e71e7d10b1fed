"""PyTorch's autograd, modules and optimizers on shares, against the same on plain tensors."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from planrt.errors import SharingError, ValueRangeError
from planrt.sharing.tensors.in_process import InProcessSession
from planrt.sharing.tensors.shared import SharedTensor, share, share_module


@pytest.fixture(params=[2, 3], ids=lambda count: f"{count}parties")
def session(request):
    return InProcessSession(request.param)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FUNCTIONS = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - 2 * y,
    "from a number": lambda x, y: 1 - x,
    "multiply": lambda x, y: x * y,
    "square": lambda x, y: (x * x) * y,
    "power": lambda x, y: x**3,
    "numbers": lambda x, y: x * 0.02 + y / 7 - 3,
    "a public tensor": lambda x, y: x * random(4, 5, seed=9) + random(5, seed=8),
    "divide": lambda x, y: x / (y * y + 1),
    "matrices": lambda x, y: x @ y.t(),
    "a public matrix": lambda x, y: x @ random(5, 2, seed=7),
    "sum": lambda x, y: (x * y).sum(0),
    "mean": lambda x, y: x.mean(1, keepdim=True) * y,
    "relu": lambda x, y: (x * y).relu(),
    "sigmoid": lambda x, y: torch.sigmoid(x * y),
    "tanh": lambda x, y: torch.tanh(x - y),
    "softmax": lambda x, y: x.softmax(1) * y,
    "log_softmax": lambda x, y: x.log_softmax(1) * y,
    "views": lambda x, y: (x.reshape(5, 4) @ y).transpose(0, 1),
    "root": lambda x, y: (x * x + 1).sqrt() * y,
    "cat and slice": lambda x, y: torch.cat([x[1:3], x * y])[:, 1:4],
    "absolute": lambda x, y: (x * y).abs(),
    "exp": lambda x, y: x.exp(),
    "log": lambda x, y: (x * x + 0.5).log(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(name):
    session = InProcessSession(2)
    values = random(4, 5, seed=1), random(4, 5, seed=2)
    plain = [value.clone().requires_grad_() for value in values]
    shared = [share(session, value).requires_grad_() for value in values]
    expected, found = FUNCTIONS[name](*plain), FUNCTIONS[name](*shared)
    assert isinstance(found, SharedTensor)
    assert found.shape == expected.shape
    assert (found.get() - expected).abs().max() < 1e-3
    (expected * expected).mean().backward()
    (found * found).mean().backward()
    for one, other in zip(plain, shared, strict=True):
        if one.grad is not None:
            off = (other.grad.get() - one.grad).abs()
            assert (off <= 1e-3 * one.grad.abs().clamp(min=1)).all()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def steps(model, x, y, loss, count=10):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(count):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
    return value


@pytest.mark.parametrize("loss", ["mse", "cross entropy"])
def test_a_network_trains_as_it_does_in_the_clear(session, loss):
    x = random(32, 8, seed=3)
    y = functional.one_hot(torch.arange(32) % 3, 3).float()
    measured = {
        "mse": functional.mse_loss,
        "cross entropy": lambda logits, target: -(logits.log_softmax(1) * target).sum() / 32,
    }[loss]
    plain, shared = network(), share_module(session, network())
    expected = steps(plain, x, y, measured)
    found = steps(shared, share(session, x), share(session, y), measured)
    assert found.get().item() == pytest.approx(expected.item(), abs=1e-3)
    for one, other in zip(plain.parameters(), shared.parameters(), strict=True):
        assert isinstance(other, nn.Parameter)
        assert (other.get() - one).abs().max() < 1e-3


def test_a_convolutional_network_trains(session):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x, y = random(4, 1, 8, 8), random(4, 3, seed=5)
    plain, shared = model, share_module(session, copy.deepcopy(model))
    expected = steps(plain, x, y, functional.mse_loss, count=4)
    found = steps(shared, share(session, x), share(session, y), functional.mse_loss, count=4)
    assert found.get().item() == pytest.approx(expected.item(), abs=1e-3)
    for one, other in zip(plain.parameters(), shared.parameters(), strict=True):
        assert (other.get() - one).abs().max() < 1e-3


def test_what_was_opened_under_a_mask_is_not_opened_again(session):
    x, w = share(session, random(16, 30)), share(session, random(30, 20, seed=1)).requires_grad_()
    others = len(session.contexts) - 1
    gradient = random(16, 20, seed=2)
    (x @ w).backward(share(session, gradient))
    # x and w in the forward pass, the gradient of 16 * 20 in the backward pass, and nothing else of that size
    sent = session.transcript.sent[0] / others / 8
    assert sent == 16 * 30 + 30 * 20 + 16 * 20
    assert (w.grad.get() - random(16, 30).t() @ gradient).abs().max() < 1e-3
    (x @ w).sum().backward()  # of ones, which all know
    assert session.transcript.sent[0] / others / 8 == sent


def test_relu_of_a_product_costs_no_opening_more(session):
    product = share(session, random(4, 5)) @ share(session, random(5, 6, seed=1))
    rounds = session.transcript.rounds
    assert product.relu().get().shape == (4, 6)
    assert session.transcript.rounds == rounds + 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: torch.mode(x), "mode has no protocol on shares: take sort"),
        (lambda x: torch.ones(4, 5).add_(x), "what all know"),
        (lambda x: x + share(InProcessSession(2), torch.ones(4, 5)), "different sessions"),
        (lambda x: x**1.3, "whole numbers, halves and quarters"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "without rounding"),
        (lambda x: x.norm(10), "order 0, 1, 2, infinity"),
        (lambda x: pickle.dumps(x), "save what get"),
        (lambda x: x.sum().item(), "has no protocol"),
        (lambda x: bool((x > 0).any()), "has no protocol"),
    ],
)
def test_what_shares_cannot_do_is_said(call, message):
    shared = share(InProcessSession(2), random(4, 5))
    with pytest.raises(SharingError, match=message):
        call(shared)
    assert (shared.get() - random(4, 5)).abs().max() < 1e-4


def test_values_that_do_not_fit_are_refused():
    session = InProcessSession(2)
    for bad in (float("nan"), float("inf"), 1e15):
        with pytest.raises(ValueRangeError, match="values lie between"):
            share(session, torch.tensor([1.0, bad]))
    with pytest.raises(ValueRangeError, match="values lie between"):
        share(session, torch.ones(2)) + 1e15


def test_without_gradients(session):
    values = random(4, 5)
    x = share(session, values)
    assert (x.clamp(-0.5, 0.25).get() - values.clamp(-0.5, 0.25)).abs().max() < 1e-4
    assert (x.amax(1).get() - values.amax(1)).abs().max() < 1e-4
    twin = copy.deepcopy(x)
    x.mul_(2).sub_(1)
    assert (x.get() - (values * 2 - 1)).abs().max() < 1e-4
    assert (twin.get() - values).abs().max() < 1e-4
    assert x.fill_(3).get().tolist() == [[3.0] * 5] * 4


def test_decimal_places(session):
    coarse = InProcessSession(2, scale=1000)
    x = share(coarse, torch.tensor([0.1234, -2.5]))
    assert x.get().tolist() == pytest.approx([0.123, -2.5])
    assert (x * x).get().tolist() == pytest.approx([0.015, 6.25], abs=1.1e-3)
    lines = repr(x).split("\n")
    assert lines[0] == "(Wrapper)>FixedPrecisionTensor>[AdditiveSharingTensor]"
    assert [line.partition(" | ")[0] for line in lines[1:3]] == ["\t-> [PointerTensor"] * 2
    assert lines[3:] == ["\t*crypto provider: dealer*"]
