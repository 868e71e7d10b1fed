"""Norms, distances, products along a dimension, pooling in volumes: values and gradients on shapes drawn by chance."""

import math
import random as chance

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planrt.errors import SharingError
from planrt.sharing.kernels.parts import Share
from planrt.sharing.kernels.table import KERNELS
from planrt.sharing.tensors.in_process import InProcessSession
from planrt.sharing.tensors.shared import SharedTensor, share, share_module
from tests.sharing.test_kernels import UNIT

DRAWS = 6
"""Shapes that each function is tried on."""


def sizes(drawn, dims, most=5):
    return [drawn.randint(1, most) for _ in range(dims)]


def values_of(drawn, shape):
    """Values with zeros, equal ones and single units among them."""
    torch.manual_seed(drawn.randrange(1 << 30))
    values = torch.randn(shape)
    some = torch.rand(shape)
    values[some < 0.1] = 0
    values[(some > 0.1) & (some < 0.2)] = UNIT
    values[(some > 0.2) & (some < 0.3)] = -1.5
    return (values / UNIT).round() * UNIT  # as they are held


def compared(parties, function, values, units):
    """Compares value and gradient; `units` is how far the value may be off, the gradient eight times that."""
    plain = values.clone().requires_grad_()
    shared = share(InProcessSession(parties), values.clone().requires_grad_())
    expected, found = function(plain), function(shared)
    assert isinstance(found, SharedTensor)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if expected.numel():
        assert ((found.get() - expected).abs() <= units * UNIT * expected.abs().clamp(min=1)).all()
    weights = torch.linspace(-1, 1, expected.numel()).reshape(expected.shape)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    wanted = torch.zeros_like(values) if plain.grad is None else plain.grad
    given = torch.zeros_like(values) if shared.grad is None else shared.grad.get()
    assert ((given - wanted).abs() <= 8 * (units + 1) * UNIT * wanted.abs().clamp(min=1)).all()


def dims_of(drawn, shape):
    return drawn.sample(range(len(shape)), drawn.randint(1, len(shape)))


@pytest.mark.parametrize("order", [0, 1, 2, math.inf, -math.inf])
def test_norms(order, parties):
    drawn = chance.Random(order)
    for _ in range(DRAWS):
        shape = sizes(drawn, drawn.randint(1, 4))
        dim, keep = dims_of(drawn, shape), drawn.random() < 0.5
        values = values_of(drawn, shape)
        if order == 2:  # near nothing the slope is steep
            values = values.abs() + 0.5
        compared(parties, lambda x: torch.linalg.vector_norm(x, order, dim, keep), values, 20)  # noqa: B023
    compared(parties, lambda x: x.norm(order), values, 20)
    matrix = values_of(drawn, (3, 4)) if order != 2 else values_of(drawn, (3, 4)).abs() + 0.5
    if order not in (0, 2):
        compared(parties, lambda x: torch.linalg.matrix_norm(x, order), matrix, 20)
    compared(parties, lambda x: torch.dist(x, x.detach() * 2 + 1, order), matrix, 20)
    if order == 1:
        compared(parties, lambda x: F.normalize(x, p=order), matrix + 2, 20)


def test_norms_of_other_orders_are_refused_and_torch_says_what_it_says():
    session = InProcessSession(2)
    x = share(session, torch.ones(2, 3))
    for call in (lambda: x.norm(9), lambda: F.normalize(x, p=1.3), lambda: torch.cdist(x, x, p=0.5)):
        with pytest.raises(
            SharingError, match=r"order 0, 1, 2, infinity, and of whole orders.*, not .*write"
        ):
            call()
    trained = share(session, torch.ones(2, 3).requires_grad_())
    with pytest.raises(SharingError, match="gradient of a norm of order 4 is computed for torch.linalg"):
        F.triplet_margin_loss(trained, x, x, p=4)
    with pytest.raises(RuntimeError, match="floating point"):
        torch.linalg.vector_norm(share(session, torch.arange(3)), 1)
    with pytest.raises(IndexError, match="Dimension out of range"):
        torch.linalg.vector_norm(x, 1, 5)
    with pytest.raises(RuntimeError, match="identity"):
        x[:, :0].norm(math.inf)
    instead = (x.abs().pow(9).sum(1).log() / 9).exp()
    assert (instead.get() - torch.ones(2, 3).norm(9, 1)).abs().max() < 20 * UNIT


OF_ANY_ORDER = {
    "norm": lambda x, y, p: x.norm(p, dim=1),
    "norm of all": lambda x, y, p: torch.norm(x * 100, p),
    "norm of what is small": lambda x, y, p: torch.linalg.vector_norm(x * 0.01, p, dim=(0, 1), keepdim=True),
    "dist": lambda x, y, p: torch.dist(x, y[:5], p),
    "normalize": lambda x, y, p: F.normalize(x, p, dim=0),
    "pairwise_distance": lambda x, y, p: nn.PairwiseDistance(p, keepdim=True)(x, y[:5]),
    "cdist": lambda x, y, p: torch.cdist(x, y, p),
    "pdist": lambda x, y, p: F.pdist(x, p),
}


@pytest.mark.parametrize("order", [1.25, 2.5, 3, 4, 8])
@pytest.mark.parametrize("name", OF_ANY_ORDER)
def test_norms_of_other_orders(name, order):
    torch.manual_seed(int(4 * order))
    x, others = torch.randn(5, 6), torch.randn(7, 6) + 1

    def function(x):
        return OF_ANY_ORDER[name](x, others, order)

    compared(2, function, x, 40)
    zeros = share(InProcessSession(2), torch.zeros(3, 4)).norm(order, dim=1)
    assert torch.equal(zeros.get(), torch.zeros(3))


POWERS = {
    "x**y": lambda x, y: x**y,
    "y of a row": lambda x, y: x ** y[0],
    "a number to y": lambda x, y: 2.5**y + x,
    "numbers to y": lambda x, y: torch.tensor([2.0, 3, 0.5, 1, 4]) ** y + x,
    "several exponents": lambda x, y: x ** torch.tensor([1.0, 2, 3, 0.5, -1]) + y,
    "features": lambda x, y: (x - 2).unsqueeze(-1) ** torch.arange(4) + y[0, 0],
    "torch.pow": lambda x, y: torch.pow(x.sum(1) + 1, y.mean(1)),
}


@pytest.mark.parametrize("name", POWERS)
def test_powers(name, parties):
    torch.manual_seed(3)
    x, y = torch.rand(4, 5) * 5 + 0.05, torch.randn(4, 5)
    plain = [one.clone().requires_grad_() for one in (x, y)]
    session = InProcessSession(parties)
    there = [share(session, one.clone().requires_grad_()) for one in (x, y)]
    expected, found = POWERS[name](*plain), POWERS[name](*there)
    assert ((found.get() - expected).abs() <= 20 * UNIT * expected.abs().clamp(min=1)).all()
    expected.sum().backward()
    found.sum().backward()
    for one, other in zip(plain, there, strict=True):
        assert ((other.grad.get() - one.grad).abs() <= 100 * UNIT * one.grad.abs().clamp(min=1)).all()


def test_powers_at_the_edges_and_what_is_refused():
    session = InProcessSession(2)
    y = share(session, torch.tensor(1.5))
    x = share(session, torch.tensor([0.0, 1, 4, -2]))
    assert ((x**y).get() - torch.tensor([0.0, 1, 8, 0])).abs().max() < 40 * UNIT
    for call, message in {
        lambda: (-2.0) ** x: "a base above 0",
        lambda: x ** torch.linspace(0, 8, 33).unsqueeze(1): "16 different exponents at most, not 33",
        lambda: x ** torch.tensor([1.0, 2.3, 1, 1]): "halves and quarters",
        lambda: (
            share(session, torch.tensor([2, 3])) ** share(session, torch.tensor([1, 2]))
        ): r"x.float\(\) \*\* y",
        lambda: 2 ** share(session, torch.tensor([1, 2])): r"x.float\(\) \*\* y",
    }.items():
        with pytest.raises(SharingError, match=message):
            call()


@pytest.mark.parametrize("order", [0, 1, 2, math.inf])
def test_distances(order, parties):
    drawn = chance.Random(order)
    for _ in range(DRAWS):
        first, second, width = sizes(drawn, 3)
        values = values_of(drawn, (first + 1, width))
        others = values_of(drawn, (second, width)) + (4 if order == 2 else 0)
        compared(parties, lambda x: torch.cdist(x, others, p=order), values, 20)  # noqa: B023
        compared(parties, lambda x: torch.cdist(others, x, p=order), values, 20)  # noqa: B023
        if order:  # torch's own has no gradient of these
            apart = torch.arange(len(values))[:, None] * 3
            compared(parties, lambda x: F.pdist(x, order), values / 4 + apart, 20)
    compared(parties, lambda x: F.pairwise_distance(x, x.detach() + 2, p=order or 1), values, 20)
    compared(parties, lambda x: F.pdist(x[:1]), values, 1)  # of one row: nothing


def test_the_same_row_twice_has_a_distance_without_slope(parties):
    values = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, -1.0]])
    compared(parties, lambda x: torch.cdist(x, values), values, 20)
    compared(parties, F.pdist, values, 20)


@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_products(zeros, parties):
    drawn = chance.Random(zeros)
    for _ in range(DRAWS):
        shape = sizes(drawn, drawn.randint(1, 3), most=7)
        dim, keep = drawn.randrange(len(shape)), drawn.random() < 0.5
        values = values_of(drawn, shape).clamp(-1.5, 1.5)
        values.view(-1)[:zeros] = 0
        values = torch.where((values != 0) & (values.abs() < 0.1), 0.5, values)  # which gradients divide by
        compared(parties, lambda x: x.prod(dim, keep), values, 40)  # noqa: B023
        compared(parties, lambda x: x.cumprod(dim), values, 60)  # noqa: B023
    compared(parties, lambda x: x.prod(), values.flatten()[:9], 40)
    compared(parties, lambda x: x[:0].prod(0), values, 1)


def test_products_of_whole_numbers_are_exact(parties):
    session = InProcessSession(parties)
    values = torch.tensor([[3, -7, 2**20], [2, 5, -(2**21)]])
    x = share(session, values)
    for function in (lambda x: x.prod(), lambda x: x.prod(0), lambda x: x.cumprod(1)):
        assert torch.equal(function(x).get(), function(values))
    assert torch.equal((x > 0).prod(1).get(), (values > 0).prod(1))
    assert torch.equal((x * 1).count_nonzero(0).get(), values.count_nonzero(0))


def pools(drawn):
    kernel = sizes(drawn, 3, most=3)
    options = {
        "stride": drawn.choice([None, 1, 2, tuple(kernel)]),
        "padding": tuple(drawn.randint(0, one // 2) for one in kernel),
        "ceil_mode": drawn.random() < 0.5,
    }
    counted = {"count_include_pad": drawn.random() < 0.5, "divisor_override": drawn.choice([None, 3])}
    counts = tuple(sizes(drawn, 3, most=3))
    dilation = drawn.choice([1, (1, 2, 1)])
    return [
        (4, lambda x: F.avg_pool3d(x, kernel, **options, **counted)),
        (1, lambda x: F.max_pool3d(x, kernel, dilation=dilation, **options)),
        (4, lambda x: F.adaptive_avg_pool3d(x, counts)),
        (1, lambda x: F.adaptive_max_pool3d(x, counts)),
    ]


def test_pooling_in_volumes(parties):
    drawn = chance.Random(1)
    for _ in range(DRAWS):
        shape = [*sizes(drawn, 2, most=2), *(3 + one for one in sizes(drawn, 3, most=3))]
        values = (
            torch.randperm(math.prod(shape)).reshape(shape) / 8
        )  # without equals: one place has the gradient
        for units, pool in pools(drawn):
            compared(parties, pool, values, units)
    compared(parties, lambda x: F.max_pool3d(x, 3), values, 1)  # of 27: by two rounds of comparisons
    found = F.max_pool3d(share(InProcessSession(parties), values), 2, return_indices=True)[1]
    assert torch.equal(found.get(), F.max_pool3d(values, 2, return_indices=True)[1])
    images = values[0, :, :1]  # what pools of planes in other numbers of windows are written with
    compared(parties, lambda x: F.lp_pool2d(x.abs() + 1, 2.0, 2), images, 20)


POOLS = {
    "max_pool1d": lambda x: F.max_pool1d(x[..., 0], 2),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d, large": lambda x: F.max_pool2d(x, 5, padding=2),
    "max_pool3d": lambda x: F.max_pool3d(x.unsqueeze(2), (1, 2, 2)),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool3d": lambda x: F.avg_pool3d(x.unsqueeze(2), (1, 2, 2)),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 1),
    "amax": lambda x: x.amax(-1),
    "max": lambda x: x.max(2)[0],
    "mean": lambda x: x.mean(2),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(2),
    "prod": lambda x: x.prod(2),
    "norm": lambda x: x.norm(1, -1),
    "conv2d": lambda x: F.conv2d(x, torch.ones(2, x.shape[1], 2, 2)),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_batch_of_nothing_gives_nothing(name, parties):
    compared(parties, POOLS[name], torch.zeros(0, 3, 6, 6), 1)


def test_no_channels_and_their_gradients():
    plain, weight = torch.zeros(2, 0, 4, 4, requires_grad=True), torch.ones(2, 0, 2, 2, requires_grad=True)
    session = InProcessSession(2)
    shared = [share(session, one.detach()).requires_grad_() for one in (plain, weight)]
    expected, found = F.conv2d(plain, weight), F.conv2d(*shared)
    assert torch.equal(found.get(), expected)
    expected.sum().backward()
    found.sum().backward()
    assert [one.grad.shape for one in shared] == [one.grad.shape for one in (plain, weight)]


def test_what_torch_says_in_a_kernel_is_told_with_the_operation_that_it_is_of(monkeypatch):
    def refuses(context, value: Share):
        yield from ()
        return value.part.view(3)

    monkeypatch.setitem(KERNELS, "relu", refuses)
    with pytest.raises(SharingError, match=r"relu: .*shape '\[3\]' is invalid"):
        share(InProcessSession(2), torch.zeros(2)).relu().get()


@pytest.mark.parametrize("form", ["function", "in a module"])
def test_gelu_by_tanh(form, parties):
    run = nn.GELU(approximate="tanh") if form == "in a module" else lambda x: F.gelu(x, approximate="tanh")
    values = torch.cat([torch.linspace(-8, 8, 200), torch.tensor([0.0, 1e4, -1e4])])
    compared(parties, run, values, 6)
    with pytest.raises(RuntimeError, match="approximate"):
        F.gelu(share(InProcessSession(parties), values), approximate="no")


@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(5, 4), lambda: nn.Conv2d(2, 3, 2)], ids=["linear", "conv"]
)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm(layer, dim, parties):
    torch.manual_seed(2)
    plain = nn.utils.parametrizations.weight_norm(layer(), dim=dim)
    shape = (3, 5) if isinstance(plain, nn.Linear) else (2, 2, 4, 4)
    torch.manual_seed(2)
    shared = share_module(InProcessSession(parties), nn.utils.parametrizations.weight_norm(layer(), dim=dim))
    values = torch.randn(shape)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (plain, shared)]
    for _ in range(2):
        expected = plain(values)
        found = shared(share(next(shared.parameters()).session, values))
        assert (found.get() - expected).abs().max() <= 60 * UNIT
        for optimizer, loss in zip(optimizers, ((expected**2).mean(), (found**2).mean()), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for one, other in zip(plain.parameters(), shared.parameters(), strict=True):
        assert (other.get() - one).abs().max() <= 60 * UNIT
