"""The operations of encrypted tensors one by one, by the calls that a user types, on both transports: values and
gradients beside plain PyTorch, of two, three and four parties in turn.
"""

import pytest
import torch
from torch.nn import functional as F

import planrt
from planrt.sharing.tensors.shared import SharedTensor
from planrt.types import leaves
from tests.workers.conftest import PRECISION

planrt.TorchHook(torch)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y, W = random(4, 6), random(4, 6, seed=1), random(6, 3, seed=2)
UP = X.abs() + 0.5  # above zero
SEQUENCES, IMAGES = random(2, 2, 7, seed=3), random(2, 2, 6, 6, seed=4)
MEAN, SPREAD = torch.tensor([0.1, -0.2]), torch.tensor([0.5, 2.0])
PLACES = torch.tensor([[0, 2, 1, 0, 1, 2]])
AT = torch.tensor([0, 13, 7, -1, 5, 22])


def put(x, y):
    x = x * 1
    x[1:3, ::2] = y[1:3, ::2] * 2
    x[0] = 0.5
    return x


OPERATIONS = {
    "add": (lambda x, y: x + y + 1, X, Y),
    "sub and neg": (lambda x, y: 2 - (-x) - y, X, Y),
    "mul": (lambda x, y: x * y * 1.5, X, Y),
    "mul by flags": (lambda x: (x * True, x * (X > 0), (X > 0) * x + False), X),
    "mm": (lambda x, w: x.mm(w), X, W),
    "matmul": (lambda x, w: x @ w[:, 0], X, W),
    "bmm": (lambda x, y: x.bmm(y), random(2, 3, 4), random(2, 4, 2, seed=5)),
    "conv1d": (lambda x, w: F.conv1d(x, w, stride=2, padding=1), SEQUENCES, random(3, 2, 3, seed=6)),
    "conv2d": (lambda x, w: F.conv2d(x, w, groups=2), IMAGES, random(4, 1, 3, 3, seed=7)),
    "linear": (lambda x, w, b: F.linear(x, w.t(), b), X, W, random(3, seed=8)),
    "sum and mean": (lambda x: (x.sum(0), x.mean(1, keepdim=True), x.mean()), X),
    "power": (lambda x: (x**3, UP.numel() * x**2, x.pow(1)), X),
    "roots as powers": (lambda x: (x**0.5, x**-1), UP),
    "division by a public value": (lambda x: x / 7, X),
    "division by a share": (lambda x, y: x / y, X, UP),
    "reciprocal": (lambda x: x.reciprocal(), UP),
    "sqrt and rsqrt": (lambda x: (x.sqrt(), x.rsqrt()), UP),
    "exp and log": (lambda x: (x.exp(), x.log()), UP),
    "sigmoid and tanh": (lambda x: (x.sigmoid(), x.tanh()), X),
    "gelu": (lambda x: F.gelu(x), X),
    "softmax": (lambda x: (x.softmax(1), x.log_softmax(0)), X),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.tensor([0, 5, 2, 2])), X),
    "cross_entropy of secret classes": (lambda x, y: F.cross_entropy(x, y.argmax(1)), X, Y),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), X, UP[0], Y[0]),
    "relu and abs": (lambda x: (x.relu(), x.abs()), X),
    "clamp": (lambda x: x.clamp(-0.5, 0.75), X),
    "where": (lambda x, y: torch.where(x > y, x, y * 2), X, Y),
    "masked_fill": (lambda x, y: x.masked_fill(y > 0, 0.25), X, Y),
    "max and min": (lambda x: (x.max(), x.min(), x.max(1)[0], x.min(0)[0]), X),
    "topk": (lambda x: (x.topk(1)[0], x.topk(3, 0)[0]), X),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), IMAGES),
    "avg_pool2d": (lambda x: (F.avg_pool2d(x, 3, 1, 1), F.adaptive_avg_pool2d(x, 1)), IMAGES),
    "indexing": (lambda x: (x[1], x[:, 2], x[[0, 3]], x[..., 1:5:2], x[X > 0]), X),
    "assignment": (put, X, Y),
    "views": (
        lambda x: (x.view(2, 12), x.t(), x.reshape(-1), x.unsqueeze(1).expand(4, 2, 6), x.flatten()),
        X,
    ),
    "cat and stack": (lambda x, y: (torch.cat([x, y], 1), torch.stack([x, y])), X, Y),
    "scatter": (lambda x, y: (x.scatter(0, PLACES, y[:1]), x.scatter_add(0, PLACES, y[:1])), X, Y),
    "embedding by a one-hot": (
        lambda w, y: F.one_hot(y.argmax(1), 6).float() @ w + F.embedding(y.argmax(1), w),
        W,
        Y,
    ),
    "batch norm in evaluation": (
        lambda x, w, b: F.batch_norm(x, MEAN, SPREAD, w, b),
        SEQUENCES,
        SPREAD,
        MEAN,
    ),
    "dropout of nothing, and in evaluation": (
        lambda x: F.dropout(x, 0.0) + F.dropout(x, 0.5, training=False),
        X,
    ),
    "places in a row": (
        lambda x, y: (torch.take(x, PLACES), x.put(AT, y[0]), x.put(AT, y[1], accumulate=True)),
        X,
        Y,
    ),
    "masks": (lambda x, y: (x.masked_select(X > 0), x.masked_scatter(Y > 0, y)), X, Y),
    "diagonals and blocks": (
        lambda x, y: (
            x.diag(),
            y[0].diag(),
            torch.diagonal_scatter(x, y[0, :4]),
            torch.block_diag(x, y[0], y),
        ),
        X,
        Y,
    ),
    "views as copies": (
        lambda x: (
            torch.view_copy(x, (2, 12)),
            torch.t_copy(x),
            torch.diagonal_copy(x),
            *torch.unbind_copy(x),
        ),
        X,
    ),
    "sums of products": (
        lambda x, y: (
            torch.addr(x, y[:, 0], y[0], beta=0.5, alpha=2),
            torch.addbmm(y[:, :4], x[None], y.t()[None], alpha=3),
        ),
        X,
        Y,
    ),
    "what is no number": (lambda x: (x.nansum(1), x.nansum(), x.nanmean(), x.nan_to_num(nan=3.0)), X),
    "logaddexp": (lambda x, y: (torch.logaddexp(x, y * 20), x.logaddexp(X)), X, Y),
    "quantiles": (
        lambda x: (
            x.quantile(0.3),
            torch.quantile(x, torch.tensor([0.0, 0.45, 1.0]), 1, True),
            *[x.quantile(0.45, 0, interpolation=one) for one in ("lower", "higher", "nearest", "midpoint")],
        ),
        X,
    ),
    "bags of embeddings": (
        lambda w, y: (
            F.embedding_bag(PLACES, w),
            F.embedding_bag(PLACES[0], w, torch.tensor([0, 2, 2]), mode="sum", padding_idx=2),
            F.embedding_bag(PLACES[0], w, AT[[0, 4, 0]].sort()[0], mode="sum", per_sample_weights=y[0]),
        ),
        W,
        Y,
    ),
}

BOUNDS = torch.tensor([-1.0, -0.25, 0.0, 0.5])
WITHOUT_GRADIENTS = {
    "comparisons": lambda x, y: (x > y, x < y, x >= y, x <= y, x == y, x != y, x == x),
    "argmax and argmin": lambda x, y: (x.argmax(), x.argmin(1), y.argmax(0)),
    "bins": lambda x, y: (
        torch.bucketize(x, BOUNDS),
        torch.bucketize(x, BOUNDS, right=True),
        torch.searchsorted(y.sort(1)[0], x),
        torch.searchsorted(y.sort(1)[0], x, side="right"),
        torch.histc(x, 5, -1.25, 1.25),
        torch.heaviside(x - y, torch.tensor(1.0)),
        torch.isneginf(x),
    ),
}


@pytest.fixture(scope="module")
def everybody(make_party):
    """Four parties, and james who deals."""
    return [make_party(name) for name in ("bob", "alice", "carol", "dan", "james")]


def among(everybody, name):
    """``share(values)`` among two, three or four, by the name of the operation."""
    *parties, james = everybody
    parties = parties[: 2 + len(name) % 3]

    def share(values, **options):
        return values.fix_precision(**PRECISION).share(*parties, crypto_provider=james, **options)

    return share


def compared(found, expected, within):
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        assert isinstance(one, SharedTensor)
        assert one.shape == other.shape
        off = (one.get().double() - other.double()).abs()
        assert (off <= within * other.double().abs().clamp(min=1)).all(), off


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients(name, everybody):
    function, *values = OPERATIONS[name]
    share = among(everybody, name)
    plain = [one.clone().requires_grad_() for one in values]
    there = [share(one, requires_grad=True) for one in values]
    expected, found = function(*plain), function(*there)
    compared(found, expected, 2e-3)
    sum((one * one).sum() for one in leaves(expected)).backward()
    sum((one * one).sum() for one in leaves(found)).backward()
    for one, other in zip(there, plain, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if other.grad is not None:
            compared(one.grad, other.grad, 1e-2)


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_exact_answers(name, everybody):
    share = among(everybody, name)
    unit = 2.0**-16
    x, y = (X / unit).round() * unit, (Y / unit).round() * unit
    y[0], y[1] = x[0] + unit, x[1] - unit  # one unit in the last place
    y[2] = x[2]
    found, expected = WITHOUT_GRADIENTS[name](share(x), share(y)), WITHOUT_GRADIENTS[name](x, y)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.get(), other.long() if other.dtype == torch.bool else other)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_relu_of_a_product_around_zero(count, everybody):
    """In quarters of a unit: nothing, and no gradient, where the product is not above 0; one where it is above half
    a unit, and off by less than a unit everywhere.
    """
    *parties, james = everybody
    quarters = torch.arange(-9.0, 10)
    x, weight = quarters[:, None] * 2**-16, torch.full((1, 3), 0.25)
    there = x.fix_precision(**PRECISION).share(*parties[:count], crypto_provider=james, requires_grad=True)
    factor = weight.fix_precision(**PRECISION).share(*parties[:count], crypto_provider=james)
    for _ in range(6):  # the first runs find out what the others know
        there.grad = None
        found = (there @ factor).relu()
        (found * 2**16).sum().backward()
        units = found.get() * 2**16
        slope = there.grad.get()[:, 0] / (0.75 * 2**16)
        assert ((units - (x @ weight).relu() * 2**16).abs() < 1).all()
        assert (units[quarters <= 0] == 0).all()
        assert (slope[quarters <= 0] == 0).all()
        assert ((slope[quarters > 2] - 1).abs() < 1e-3).all()
