"""`plan.check` says what is sent: rounds, bytes and correlated randomness of many programs, counted at the parties."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import planrt as sy
from planrt.sharing.tensors.shared import SharedTensor
from planrt.types import leaves

sy.TorchHook(torch)
PRECISION = {"base": 2, "precision_fractional": 16}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y, W, IMAGES = random(4, 6), random(4, 6, seed=1), random(6, 3, seed=2), random(2, 1, 6, 6, seed=3)
POSITIVE = X.abs() + 0.5
LSTM, HEADS = nn.LSTM(3, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)


def step(x, y, w):
    w = w.detach().requires_grad_()
    loss = F.cross_entropy(x @ w, y)
    loss.backward()
    return loss.detach(), w.detach() - 0.1 * w.grad


def adam(w, gradient, m, v):
    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient * gradient
    return w - 0.01 * m / (v.sqrt() + 1e-3), m, v


def inverse(x):
    return (x.reciprocal(), x.sqrt(), x.rsqrt(), x.log(), x / (x + 1))


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def heads(x, *parameters):
    names = [name for name, _ in HEADS.named_parameters()]
    given = dict(zip(names, parameters, strict=True))
    return torch.func.functional_call(HEADS, given, (x, x, x), {"need_weights": False})[0]


def recurrent(x, wi, wh, bi, bh):
    names = [name for name, _ in LSTM.named_parameters()]
    return torch.func.functional_call(LSTM, dict(zip(names, (wi, wh, bi, bh), strict=True)), (x,))[0]


PROGRAMS = {
    "sums alone": (lambda x, y: (x + y).sum(0), X, Y),
    "a product": (lambda x, y: x * y, X, Y),
    "a layer": (lambda x, w: (x @ w).relu(), X, W),
    "comparisons": (lambda x, y: torch.where(x > y, x, -y) + (x == y), X, Y),
    "the largest": (lambda x: (x.max(1)[0], x.argmax(0), x.amin(1)), X),
    "an order": (lambda x: (x.sort(1)[0], x.topk(3)[1], x.median()), X),
    "curves": (lambda x: x.sigmoid() + x.tanh() + (-x.abs()).exp() + F.gelu(x), X),
    "roots and quotients": (inverse, POSITIVE),
    "powers": (lambda x, y: (x**3, x**y), POSITIVE, Y),
    "softmax and entropy": (lambda x: (x.softmax(1), x.log_softmax(1)), X),
    "a norm": (lambda x: (F.layer_norm(x, (6,)), x.norm(3, dim=1), F.normalize(x)), X),
    "a convolution": (
        lambda x, w: F.max_pool2d(F.conv2d(x, w).relu(), 2),
        IMAGES,
        random(2, 1, 3, 3, seed=4),
    ),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        *(random(2, 3, 4, seed=one) for one in (5, 6, 7)),
    ),
    "an lstm": (recurrent, random(4, 3, 3, seed=8), *(one.detach() for one in LSTM.parameters())),
    "dropout in evaluation": (lambda x, w: F.dropout(x, 0.5, training=False) @ w, X, W),
    "several heads": (heads, random(2, 3, 4, seed=9), *(one.detach() for one in HEADS.parameters())),
    "a training step": (step, X, torch.tensor([0, 2, 1, 1]), W),
    "a step of adam": (adam, W, W * 0.1, W * 0.05, W.abs()),
    "distances": (lambda x, y: torch.cdist(x, y).argmin(1), X, Y),
    "secret places": (lambda x, y: x.gather(1, y.argmax(1, keepdim=True)), X, Y),
}


@pytest.fixture(scope="module")
def everybody(make_party):
    """bob, alice, carol, and james who deals."""
    return [make_party(name) for name in ("bob", "alice", "carol", "james")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_check_says_is_what_is_sent(name, everybody):
    function, *values = PROGRAMS[name]
    *parties, james = everybody
    parties = parties[: 2 + len(name) % 2]
    plan = sy.func2plan()(function).build(*values)
    given = [
        (one.fix_precision(**PRECISION) if one.is_floating_point() else one).share(
            *parties, crypto_provider=james
        )
        for one in values
    ]
    session = next(one.session for one in given if one.is_floating_point())
    for one in given:
        one.get()
    told = plan.check(inputs=given)
    assert session.parties == [one.id for one in parties]
    before = session.traffic()
    found = list(leaves(plan(*given)))
    expected = list(leaves(plan(*values)))
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, SharedTensor)
        off = (one.get().double() - other.double()).abs()
        assert (off <= 5e-3 * other.double().abs().clamp(min=1)).all(), off
    after = session.traffic()
    last = parties[-1].id
    for party, one in after.items():
        counted = (one.rounds - before[party].rounds, one.sent - before[party].sent)
        assert counted == (told.rounds, told.bytes_sent), party
        dealt = one.dealt - before[party].dealt
        assert dealt == (told.bytes_dealt if party == last else 0), party


def test_whole_numbers_of_another_precision_in_a_plan_stay_what_they_are(everybody):
    """They are brought along for the call; what a plan changes in place is the argument itself."""
    bob, alice, _, james = everybody

    def shared(values, **precision):
        values = values.fix_precision(**precision) if values.is_floating_point() else values
        return values.share(bob, alice, crypto_provider=james)

    plain = torch.tensor([1, 2, 3])
    plan = sy.func2plan()(lambda x, n: x * n + n).build(torch.ones(3), plain)
    x, n = shared(torch.tensor([0.5, -1.0, 2.0]), **PRECISION), shared(plain)
    assert n.session is not x.session
    assert torch.equal(plan(x, n).get(), torch.tensor([1.5, 0.0, 9.0]))
    assert torch.equal(n.get(), plain)
    changing = sy.func2plan()(lambda x, n: x * n.add_(1)).build(torch.ones(3), plain.clone())
    assert torch.equal(changing(x, n).get(), torch.tensor([1.0, -3.0, 8.0]))
    assert torch.equal(n.get(), plain + 1)
