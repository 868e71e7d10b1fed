"""Every kernel that the table has, through torch's own functions, against the same on plain tensors.

Each case says its error in units of the scale (one unit is 2**-16): what the docstrings of the protocols state.
"""

import pytest
import torch
from torch.nn import functional as F

from planrt.errors import SharingError
from planrt.sharing.fixed_point import DEFAULT_SCALE
from planrt.sharing.tensors.in_process import InProcessSession
from planrt.sharing.tensors.shared import SharedTensor, share

UNIT = 1 / DEFAULT_SCALE


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def edges(*shape, seed=0):
    """Random values with zero, negative ones, equal ones and one unit in the last place among them."""
    values = random(*shape, seed=seed)
    flat = values.view(-1)
    some = torch.tensor([0.0, UNIT, -UNIT, 1.0, 1.0, -1.0, 0.0, 1000.0, -1000.0])
    flat[: len(some)] = some[: len(flat)]
    return values


INDEX = torch.tensor([[0, 2, 1], [3, 3, 0]])
X, Y = edges(4, 5, seed=1), edges(4, 5, seed=2).flip(0)
Y[0] = X[0]

EXACT = {
    "gt": lambda x, y: x > y,
    "lt": lambda x, y: x < y,
    "ge": lambda x, y: x >= y,
    "le": lambda x, y: x <= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "gt a number": lambda x, y: x > UNIT,
    "a number ge": lambda x, y: x <= 1.0,
    "eq a number": lambda x, y: x == -1,
    "gt a public tensor": lambda x, y: x > torch.ones(5),
    "logical_not": lambda x, y: torch.logical_not(x),
    "logical_and": lambda x, y: torch.logical_and(x > 0, y > 0),
    "logical_or": lambda x, y: torch.logical_or(x > 0, y > 0),
    "logical_xor": lambda x, y: torch.logical_xor(x > 0, y > 0),
    "logical_and of values": lambda x, y: torch.logical_and(x, y),
    "logical_or with all know": lambda x, y: torch.logical_or(x > 0, torch.eye(4, 5).bool()),
    "any": lambda x, y: (x > 1).any(),
    "any along": lambda x, y: (x > 0).any(1),
    "all": lambda x, y: (x > -5000).all(0),
    "isnan": lambda x, y: x.isnan(),
    "isfinite": lambda x, y: torch.isfinite(x),
    "count": lambda x, y: (x > y).sum(),
    "sign": lambda x, y: x.sign(),
    "argmax": lambda x, y: x.argmax(1),
    "argmax keepdim": lambda x, y: x.argmax(0, keepdim=True),
    "argmax of all": lambda x, y: x.argmax(),
    "argmin": lambda x, y: x.argmin(1),
    "max place": lambda x, y: x.max(1)[1],
    "min place": lambda x, y: x.min(0).indices,
    "one_hot": lambda x, y: F.one_hot(x.argmax(1), 5),
    "eq of places": lambda x, y: x.argmax(1).eq(torch.tensor([1, 2, 3, 4])).sum(),
    "pooled places": lambda x, y: F.max_pool2d(x[None, None], 2, return_indices=True)[1],
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_exact(name, parties):
    session = InProcessSession(parties)
    found = EXACT[name](share(session, X), share(session, Y))
    assert isinstance(found, SharedTensor)
    rounded = [(one / UNIT).round() * UNIT for one in (X, Y)]
    assert torch.equal(found.get().double(), EXACT[name](*rounded).double())
    assert found.dtype in (torch.int64, torch.float32)


CLOSE = {
    "where": (1, lambda x, y: torch.where(x > 0, x, y)),
    "where, a number": (1, lambda x, y: torch.where(x > y, 1.5, x)),
    "where, two numbers": (1, lambda x, y: torch.where(x > y, 1.5, -2.0)),
    "where, all know": (1, lambda x, y: torch.where(torch.eye(4, 5) > 0, x, y)),
    "masked_fill": (1, lambda x, y: x.masked_fill(y > 0, 0.25)),
    "masked_fill, all know": (1, lambda x, y: x.masked_fill(torch.eye(4, 5) > 0, 0.25)),
    "max": (1, lambda x, y: x.max()),
    "min": (1, lambda x, y: x.min()),
    "max along": (1, lambda x, y: x.max(0)[0]),
    "min keepdim": (1, lambda x, y: x.min(1, keepdim=True)[0]),
    "amax": (1, lambda x, y: x.amax((0, 1))),
    "amax keepdim": (1, lambda x, y: x.amax(1, keepdim=True)),
    "amin": (1, lambda x, y: x.amin()),
    "maximum": (1, lambda x, y: torch.maximum(x, y)),
    "minimum": (1, lambda x, y: torch.minimum(x, y)),
    "topk": (1, lambda x, y: x[1:].topk(1, dim=1)[0]),
    "abs": (1, lambda x, y: x.abs()),
    "clamp": (1, lambda x, y: x.clamp(-0.5, 0.25)),
    "clamp to tensors": (1, lambda x, y: torch.clamp(x, min=y)),
    "relu": (1, lambda x, y: F.relu(x)),
    "leaky_relu": (2, lambda x, y: F.leaky_relu(x, 0.1)),
    "relu6": (1, lambda x, y: F.relu6(x)),
    "hardtanh": (1, lambda x, y: F.hardtanh(x)),
    "index": (1, lambda x, y: x[torch.tensor([0, 2, 2])]),
    "index, two": (1, lambda x, y: x[torch.tensor([0, 2]), torch.tensor([1, 4])]),
    "index by a mask": (1, lambda x, y: x[torch.tensor([True, False, True, True])]),
    "slices": (1, lambda x, y: x[1:3, ::2]),
    "index_select": (1, lambda x, y: x.index_select(1, torch.tensor([4, 0]))),
    "gather": (1, lambda x, y: x.gather(1, torch.tensor([[0, 4], [1, 1], [2, 3], [0, 0]]))),
    "gather at secret places": (1, lambda x, y: x.gather(1, y.argmax(1, keepdim=True))),
    "scatter": (1, lambda x, y: x.scatter(0, torch.tensor([[0, 1, 2, 3, 0]]), y[:1])),
    "scatter a number": (1, lambda x, y: x.scatter(1, torch.tensor([[0], [1], [2], [3]]), 0.5)),
    "scatter at secret places": (1, lambda x, y: x.scatter(1, y.argmax(1, keepdim=True), 0.5)),
    "scatter_add": (1, lambda x, y: x.scatter_add(0, torch.tensor([[0, 1, 2, 3, 0]]), y[:1])),
    "index_add": (8, lambda x, y: x.index_add(0, torch.tensor([1, 1]), y[:2])),
    "index_copy": (1, lambda x, y: x.index_copy(0, torch.tensor([1, 0]), y[:2])),
    "index_fill": (1, lambda x, y: x.index_fill(0, torch.tensor([1, 0]), 0.5)),
    "index_put": (1, lambda x, y: x.index_put((torch.tensor([1, 0]),), y[:2])),
    "stack": (1, lambda x, y: torch.stack([x, y], 1)),
    "cat with what all know": (1, lambda x, y: torch.cat([x, torch.ones(1, 5), y])),
    "split": (1, lambda x, y: torch.cat(x.split([1, 3]), 0) + x.split(2)[1][0]),
    "chunk": (1, lambda x, y: x.chunk(3, 1)[1]),
    "unbind": (1, lambda x, y: x.unbind(1)[2]),
    "flatten": (1, lambda x, y: x.t().flatten()),
    "flip": (1, lambda x, y: x.flip(0)),
    "roll": (1, lambda x, y: x.roll(1, 1)),
    "tril": (1, lambda x, y: x.tril()),
    "repeat": (1, lambda x, y: x.repeat(2, 1)),
    "pad": (1, lambda x, y: F.pad(x, (1, 2))),
    "pad with a number": (1, lambda x, y: F.pad(x, (1, 2), value=0.5)),
    "diagonal": (1, lambda x, y: x.diagonal()),
    "unfold": (1, lambda x, y: x.unfold(1, 2, 2)),
    "cumsum": (5, lambda x, y: x.cumsum(1)),
    "squeeze": (1, lambda x, y: x[None].squeeze(0).unsqueeze(1)),
    "expand": (1, lambda x, y: x[:, None].expand(4, 2, 5)),
    "outer": (2100, lambda x, y: torch.outer(x[0], y[1])),
    "power": (3, lambda x, y: x.clamp(-2, 2) ** 2),
    "cube": (20, lambda x, y: x.clamp(-2, 2) ** 3),
    "power of -1": (10, lambda x, y: (x.clamp(1, 2)) ** -1),
    "power of -0.5": (10, lambda x, y: (x.clamp(1, 2)) ** -0.5),
    "power of 0": (1, lambda x, y: x**0),
    "divide": (20, lambda x, y: x.clamp(-2, 2) / y.clamp(1, 2)),
    "divide by a number": (2, lambda x, y: x / 7),
    "divide by a large number": (2, lambda x, y: x / 1e6),
    "times a small number": (2, lambda x, y: x * 1e-6),
    "divide a number": (10, lambda x, y: 1 / x.clamp(1, 2)),
    "divide by all know": (3, lambda x, y: x / torch.arange(1.0, 6.0)),
    "var": (60, lambda x, y: x.clamp(-2, 2).var(1)),
    "std": (60, lambda x, y: x.clamp(-2, 2).std(0, unbiased=False)),
    "norm": (60, lambda x, y: torch.linalg.vector_norm(x.clamp(-2, 2))),
    "norm along": (60, lambda x, y: x.clamp(-2, 2).norm(dim=1)),
    "logsumexp": (60, lambda x, y: x.clamp(-2, 2).logsumexp(1)),
    "gelu": (20, lambda x, y: F.gelu(x.clamp(-4, 4))),
    "silu": (20, lambda x, y: F.silu(x.clamp(-4, 4))),
    "softplus": (20, lambda x, y: F.softplus(x.clamp(-4, 4))),
    "softplus, beta": (20, lambda x, y: F.softplus(x.clamp(-2, 2), beta=2)),
    "logsigmoid": (20, lambda x, y: F.logsigmoid(x.clamp(-4, 4))),
    "float and back": (1, lambda x, y: (x > y).float() * 0.5),
    "to": (1, lambda x, y: x.double() + y),
    "addcdiv": (20, lambda x, y: torch.addcdiv(x.clamp(-2, 2), y.clamp(-2, 2), x.clamp(1, 2), value=0.5)),
    "einsum": (12000, lambda x, y: torch.einsum("ij,kj->ik", x, y.clamp(-2, 2))),
    "matrix and vector": (12000, lambda x, y: x @ y.clamp(-2, 2)[0]),
    "dot": (12000, lambda x, y: x[0] @ y.clamp(-2, 2)[0]),
    "bits times values": (1, lambda x, y: (x > 0) * y),
    "new tensors": (1, lambda x, y: torch.zeros_like(x) + x.new_ones(4, 5) + torch.full_like(x, 2.5) + y),
}


@pytest.mark.parametrize("name", CLOSE)
def test_what_is_close_and_its_gradients(name, parties):
    units, function = CLOSE[name]
    session = InProcessSession(parties)
    plain = [one.clone().requires_grad_() for one in (X, Y)]
    shared = [share(session, one) for one in plain]
    found, expected = function(*shared), function(*plain)
    assert isinstance(found, SharedTensor)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found.get() - expected).abs().max() <= units * UNIT
    if not expected.requires_grad:
        assert not found.requires_grad
        return
    weights = random(*expected.shape, seed=5)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for one, other in zip(plain, shared, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            off = (other.grad.get() - one.grad).abs()
            assert (off <= 4 * (units + 4) * UNIT * one.grad.abs().clamp(min=1)).all()


FEW, MORE = torch.tensor([[3, -7, 0], [12, 5, -1]]), torch.tensor([[2, -7, 1], [4, -5, 2**40]])

WHOLE = {
    "add": lambda i, j: i + j,
    "subtract": lambda i, j: 3 - i - j,
    "multiply": lambda i, j: i * j,
    "multiply three": lambda i, j: i * i * i,
    "matrices": lambda i, j: i @ j.t(),
    "a public matrix": lambda i, j: i @ torch.tensor([[1, 2], [3, 4], [-5, 6]]),
    "power": lambda i, j: i**3,
    "compare": lambda i, j: i > j,
    "equal": lambda i, j: i == j,
    "max": lambda i, j: i.max(1)[0],
    "sum": lambda i, j: (i + j).sum(0),
    "abs": lambda i, j: j.abs(),
    "relu": lambda i, j: j.relu(),
    "clamp": lambda i, j: j.clamp(-3, 3),
    "where": lambda i, j: torch.where(i > j, i, 0),
    "half": lambda i, j: i + 0.5,
    "a fraction": lambda i, j: i * 0.25,
    "divide": lambda i, j: i / 4,
    "float": lambda i, j: i.float().mean(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(name, parties):
    session = InProcessSession(parties)
    found, expected = WHOLE[name](share(session, FEW), share(session, MORE)), WHOLE[name](FEW, MORE)
    assert isinstance(found, SharedTensor)
    if expected.is_floating_point():
        assert (found.get() - expected).abs().max() <= UNIT
    else:
        assert found.dtype == torch.int64
        assert torch.equal(found.get(), expected.long())


def test_whole_numbers_and_fractions_meet(parties):
    session = InProcessSession(parties)
    i, x = share(session, FEW), share(session, X[:2, :3])
    functions = {
        "add": torch.add,
        "times": torch.mul,
        "more": torch.gt,
        "ratio": lambda a, b: b / (a * a + 1),
    }
    for name, function in functions.items():
        off = function(i, x).get() - function(FEW, X[:2, :3]).double()
        assert off.abs().max() <= 100 * UNIT, name


WINDOWS = {
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d, overlapping": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "max_pool2d, dilated": lambda x: F.max_pool2d(x, 2, stride=1, dilation=2),
    "max_pool2d, ceil": lambda x: F.max_pool2d(x, (3, 2), ceil_mode=True),
    "max_pool2d, large": lambda x: F.max_pool2d(x, 5, stride=2),
    "max_pool1d": lambda x: F.max_pool1d(x[0], 3),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool2d, padded": lambda x: F.avg_pool2d(x, 3, stride=2, padding=1),
    "avg_pool2d, not counted": lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False),
    "avg_pool2d, ceil": lambda x: F.avg_pool2d(x, (2, 3), ceil_mode=True),
    "avg_pool2d, divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "avg_pool1d": lambda x: F.avg_pool1d(x[0], 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive_avg_pool2d to one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, (2, 3)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_pooling(name, parties):
    values = edges(2, 2, 7, 6)
    plain, session = values.clone().requires_grad_(), InProcessSession(parties)
    shared = share(session, plain)
    expected, found = WINDOWS[name](plain), WINDOWS[name](shared)
    assert found.shape == expected.shape
    assert (found.get() - expected).abs().max() <= 10 * UNIT
    weights = random(*expected.shape, seed=5)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    assert (shared.grad.get() - plain.grad).abs().max() <= 8 * UNIT


A, B, C = random(4, 3, 8, 6), random(6, 3, 3, 3, seed=1), random(6, seed=2)
CLASSES, WEIGHTS = torch.tensor([0, 2, 1, 4]), torch.arange(1.0, 6.0)
IN, OTHER, THIRD = random(4, 5), random(4, 5, seed=3), random(2, 3, 4)
LAYERS = {
    "conv2d": (60, lambda x, w, b: F.conv2d(x, w, b), (A, B, C)),
    "conv2d, strides": (60, lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1, dilation=2), (A, B, C)),
    "conv2d, same": (60, lambda x, w, b: F.conv2d(x, w, b, padding="same"), (A, B, C)),
    "conv2d, groups": (60, lambda x, w: F.conv2d(x, w, groups=3), (A, random(6, 1, 3, 3))),
    "conv1d": (60, lambda x, w, b: F.conv1d(x, w, b, stride=2), (random(2, 3, 9), random(4, 3, 3), random(4))),
    "linear": (60, lambda x, w, b: F.linear(x, w, b), (random(2, 3, 4), random(5, 4), random(5))),
    "bmm": (60, lambda x, y: torch.bmm(x, y), (random(2, 3, 4), random(2, 4, 5))),
    "baddbmm": (60, lambda z, x, y: torch.baddbmm(z, x, y, alpha=0.5), (random(2, 3, 5), THIRD, random(2, 4, 5))),
    "addmm": (60, lambda z, x, y: torch.addmm(z, x, y, alpha=0.5), (random(3, 5), random(3, 4), random(4, 5))),
    "layer_norm": (80, lambda x, w, b: F.layer_norm(x, (6,), w, b), (random(4, 3, 6), random(6), random(6))),
    "layer_norm, two": (80, lambda x: F.layer_norm(x, (3, 6)), (random(4, 3, 6),)),
    "batch_norm": (80, lambda x, w, b, m, v: F.batch_norm(x, m.detach(), v.detach().abs() + 0.5, w, b),
                   (A, random(3), random(3), random(3), random(3))),
    "embedding": (1, lambda w: F.embedding(INDEX, w), (random(4, 3),)),
    "embedding, padding": (1, lambda w: F.embedding(INDEX, w, padding_idx=3), (random(4, 3),)),
    "mse": (60, lambda x, y: F.mse_loss(x, y), (IN, OTHER)),
    "l1": (60, lambda x, y: F.l1_loss(x, y), (IN, OTHER)),
    "cross_entropy": (60, lambda x: F.cross_entropy(x, CLASSES), (IN,)),
    "cross_entropy, smooth": (60, lambda x: F.cross_entropy(x, CLASSES, label_smoothing=0.1), (IN,)),
    "cross_entropy, weights": (60, lambda x: F.cross_entropy(x, torch.tensor([0, 2, -100, 4]), WEIGHTS), (IN,)),
    "cross_entropy, sum": (120, lambda x: F.cross_entropy(x, CLASSES, reduction="sum"), (IN,)),
    "cross_entropy, none": (60, lambda x: F.cross_entropy(x, CLASSES, reduction="none"), (IN,)),
    "cross_entropy, probabilities": (60, lambda x, y: F.cross_entropy(x, y.detach().softmax(1)), (IN, OTHER)),
    "nll_loss, plane": (60, lambda x: F.nll_loss(x, torch.tensor([[[0, 1], [2, 2]]])), (random(1, 3, 2, 2),)),
    "binary_cross_entropy": (400, lambda x: F.binary_cross_entropy(x.sigmoid(), torch.eye(4, 5)), (IN,)),
    "with logits": (60, lambda x: F.binary_cross_entropy_with_logits(x, torch.eye(4, 5)), (IN,)),
    "attention": (200, lambda q, k, v: (q @ k.transpose(1, 2) / 2).softmax(-1) @ v, (THIRD, THIRD, THIRD)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_and_losses(name, parties):
    units, function, values = LAYERS[name]
    session = InProcessSession(parties)
    plain = [one.clone().requires_grad_() for one in values]
    shared = [share(session, one) for one in plain]
    expected, found = function(*plain), function(*shared)
    assert found.shape == expected.shape
    assert (found.get() - expected).abs().max() <= units * UNIT
    weights = random(*expected.shape, seed=5)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for one, other in zip(plain, shared, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            off = (other.grad.get() - one.grad).abs()
            assert (off <= 4 * units * UNIT * one.grad.abs().clamp(min=1)).all()


def test_secret_classes(parties):
    session = InProcessSession(parties)
    logits, classes = random(4, 5), CLASSES
    plain = logits.clone().requires_grad_()
    shared, secret = share(session, plain), share(session, classes)
    for options in ({}, {"reduction": "sum"}, {"weight": torch.arange(1.0, 6.0)}):
        expected, found = (
            F.cross_entropy(plain, classes, **options),
            F.cross_entropy(shared, secret, **options),
        )
        assert (found.get() - expected).abs() <= 200 * UNIT
    expected.backward()
    found.backward()
    assert (shared.grad.get() - plain.grad).abs().max() <= 60 * UNIT
    table = random(5, 3)
    assert (F.embedding(secret, share(session, table)).get() - table[classes]).abs().max() <= 2 * UNIT
    assert (F.embedding(secret, table).get() - table[classes]).abs().max() <= 2 * UNIT


@pytest.mark.parametrize("at_once", [1, 10_000])
def test_assignments_at_public_places(parties, at_once):
    session = InProcessSession(parties, at_once=at_once)

    def changed(x, y):
        z = x * 2
        z[0] = y[0]
        z[1:3, 2] = 0.5
        z[:, 4] += y[:, 0]
        z[torch.tensor([3, 3]), torch.tensor([0, 1])] = -1.0
        seen = z[2]
        z[2, 0] = 7
        z.t()[1].mul_(3)
        return z + seen

    plain = [one.clamp(-5, 5).clone().requires_grad_() for one in (X, Y)]
    shared = [share(session, one) for one in plain]
    expected, found = changed(*plain), changed(*shared)
    assert (found.get() - expected).abs().max() <= 8 * UNIT
    weights = random(4, 5, seed=5)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for one, other in zip(plain, shared, strict=True):
        assert (one.grad - other.grad.get()).abs().max() <= 30 * UNIT


@pytest.mark.parametrize("at_once", [1, 10_000])
def test_a_view_and_what_it_shows_change_together(parties, at_once):
    x = share(InProcessSession(parties, at_once=at_once), X)
    first, column = x[0], x[:, 1]
    row = first[1:]
    x.mul_(2)
    first.add_(1)
    expected = X.clone()
    seen = expected[0], expected[:, 1], expected[0][1:]
    expected.mul_(2)
    seen[0].add_(1)
    for one, other in zip((x, first, column, row), (expected, *seen), strict=True):
        assert (one.get() - other).abs().max() <= 4 * UNIT


@pytest.fixture
def session(parties):
    return InProcessSession(parties)


def test_dropout_draws_what_all_know(session):
    x = share(session, torch.ones(50, 40)).requires_grad_()
    torch.manual_seed(3)
    first = F.dropout(x, 0.25)
    torch.manual_seed(3)
    again = F.dropout(x, 0.25)
    other = F.dropout(x, 0.25)
    kept = first.get() != 0
    assert 1400 < kept.sum() < 1600
    assert (first.get()[kept] - 4 / 3).abs().max() < 4 * UNIT
    assert torch.equal(kept, again.get() != 0)
    assert not torch.equal(first.get() != 0, other.get() != 0)
    first.sum().backward()
    assert torch.equal(x.grad.get() != 0, kept)


@pytest.mark.parametrize("name", ["adam", "momentum", "adamw", "rmsprop"])
def test_optimizers_and_clipping(name, session):
    made = {
        "adam": lambda p: torch.optim.Adam(p, lr=0.05),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
    }[name]
    x, y = random(8, 3), random(8, 2, seed=1)

    def trained(w, x, y):
        optimizer = made([w])
        for _ in range(8):
            optimizer.zero_grad()
            loss = F.mse_loss(x @ w, y)
            loss.backward()
            total = torch.nn.utils.clip_grad_norm_([w], 0.5)
            optimizer.step()
        return loss, total

    plain = random(3, 2, seed=2).requires_grad_()
    shared = share(session, plain)
    expected, found = trained(plain, x, y), trained(shared, share(session, x), share(session, y))
    for one, other in zip(expected, found, strict=True):
        assert other.get().item() == pytest.approx(one.item(), abs=2e-2)
    assert (shared.get() - plain).abs().max() < 2e-2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x**2.3, "powers of whole numbers, halves and quarters"),
        (lambda x: x / 0, "no infinity"),
        (lambda x: x.repeat(1, 60).sort(1), "256 entries of shares in order at most, not 300"),
        (lambda x: x.repeat(1000, 50).topk(2), "4,000 rows of 250 entries compares more than"),
        (lambda x: x.scatter(1, (x[:, :2] > 0).long(), x), "those that sort and topk give"),
        (lambda x: x.scatter(1, x[:, :4].sort(0)[1], x), "those that sort and topk give"),
        (lambda x: F.batch_norm(x, torch.zeros(5), torch.ones(5), training=True), "share the module"),
        (lambda x: F.layer_norm(x, (5,), eps=-0.5), "not below 0"),
        (lambda x: x.fill_(1).numpy(), "Tensor.numpy has no protocol.*get\\(\\)"),
        (lambda x: torch.quantile(x, x[0, 0].sigmoid()), "torch.quantile: "),
        (lambda x: torch.quantile(x, 1.5), "must be in the range"),
        (lambda x: torch.histc(x, 4), "histc.*give min and max"),
        (lambda x: torch.bincount(x[0] > 0), "one_hot"),
        (lambda x: x.masked_select(x > 0), "masked_select.*torch.where"),
        (lambda x: x.masked_scatter(x > 0, x), "masked_scatter.*torch.where"),
        (lambda x: x.masked_scatter(X > -9, x[0, :1]), "1 entries for 19 places"),
        (lambda x: x.put(torch.tensor([0, 1]), x[0, :1]), "1 entries for 2 places"),
        (lambda x: torch.take(x, torch.tensor([20])), "places from 20 to 20"),
        (lambda x: torch.diagonal_scatter(x, x[0]), "for a diagonal"),
        (lambda x: F.embedding_bag(torch.tensor([[0, 4]]), x), "not in the valid range"),
        (lambda x: F.embedding_bag(torch.tensor([[0, 1]]), x, mode="max"), "embedding_bag"),
        (lambda x: torch.randn_like(x), "randn_like.*torch.rand"),
        (lambda x: torch.nn.init.normal_(x), "normal_.*torch.rand"),
        (lambda x: torch.bernoulli(x.sigmoid()), "probabilities of a tensor"),
        (lambda x: x.clone().bernoulli_(torch.full((4, 5), 0.5)), "probabilities of a tensor"),
        (lambda x: x.bernoulli(1.5), "in \\[0, 1\\]"),
        (lambda x: torch.linalg.svd(x), "torch.linalg.svd: "),
        (lambda x: x.tensor_split(x[0, :2].argmax()), "Tensor.tensor_split"),
        (lambda x: x.share_memory_(), "no memory here"),
        (lambda x: (x > 0).copy_(x), "whole numbers"),
        (lambda x: (x > 0).fill_(0.5), "whole numbers"),
        (lambda x: x.index_select(0, x.argmax(0)), "index in shares"),
        (lambda x: x.long(), "get\\(\\) them"),
        (lambda x: x.norm(10), "order 0, 1, 2, infinity"),
        (lambda x: x[x > 0], "."),
        (lambda x: x.gather(1, x), "."),
        (lambda x: F.embedding(x, torch.ones(3, 2)), "."),
        (lambda x: x.masked_fill(x > 0, float("nan")), "values lie between"),
        (lambda x: x.amax(1)[x.argmax()], "."),
        (lambda x: torch.zeros(4, 5).add_(x), "what all know"),
    ],
)
def test_what_is_refused(call, message):
    x = share(InProcessSession(2), X)
    with pytest.raises((SharingError, IndexError, RuntimeError), match=message):
        call(x)
