"""What users of the field compute on encrypted tensors: models, their training, and statistics. Each program runs on
plain tensors and on shares, on both transports, and gives the same values and gradients.
"""

import asyncio
import math

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


ROWS = random(12, 3)
LABELS = (ROWS @ torch.tensor([1.0, -2.0, 0.5]) > 0.3).long()


def trained(model, optimizer, loss_of, steps=3):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, list(model.parameters())


def _logistic_regression(x, module):
    """With class weights, on classes that are secret, too; momentum and weight decay."""
    torch.manual_seed(0)
    model = module(nn.Linear(3, 2))
    rows, labels = x(ROWS), x(LABELS)
    optimizer = optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    weight = torch.tensor([0.5, 2.0])
    done = trained(model, optimizer, lambda one: F.cross_entropy(one(rows), labels, weight=weight))
    right = (model(rows).argmax(1) == labels).float().mean()
    return done, right


def _k_means(x, _):
    rows, centres = x(torch.cat([ROWS[:6] + 4, ROWS[6:] - 4])), x(random(3, 3, seed=1) * 3)
    for _ in range(2):
        nearest = torch.cdist(rows, centres).argmin(1)
        chosen = F.one_hot(nearest, 3).float()
        counts = chosen.sum(0).unsqueeze(1)
        centres = torch.where(counts > 0, (chosen.t() @ rows) / counts.clamp(min=1), centres)
    return centres, nearest


def _power_iteration(x, _):
    """The first two principal components."""
    rows = x(ROWS * torch.tensor([3.0, 1.0, 0.3]))
    covariance = (rows - rows.mean(0)).t().cov()
    found = []
    for _ in range(2):
        vector = torch.ones(3) / math.sqrt(3)
        for _ in range(6):
            vector = F.normalize(covariance @ vector, dim=0)
        value = vector @ covariance @ vector
        covariance = covariance - value * torch.outer(vector, vector)
        found += [value, vector]
    return found


class Block(nn.Module):
    """A language model of one block, as GPT-2's: causal attention, layer norm first, GELU by tanh, tied weights."""

    def __init__(self, tokens=7, width=8, heads=2, length=4):
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.first, self.second, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.heads = heads

    def forward(self, rows):
        x = self.tokens(rows) + self.places(torch.arange(rows.shape[1]))
        q, k, v = (
            one.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for one in self.mix(self.first(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        x = x + self.feed(self.second(x))
        return self.last(x) @ self.tokens.weight.t()


def _transformer(x, module):
    torch.manual_seed(0)
    model = module(Block())
    rows = x(torch.tensor([[1, 5, 2, 0], [3, 3, 6, 4]]))
    optimizer = optim.SGD(model.parameters(), lr=0.05)

    def loss_of(one):
        return F.cross_entropy(one(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())

    return trained(model, optimizer, loss_of, steps=2)


class Reader(nn.Module):
    """A classifier of texts: embeddings that pad with zeros, an LSTM cell, dropout that does nothing here."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4, padding_idx=0)
        self.cell = nn.LSTMCell(4, 5)
        self.decide = nn.Sequential(nn.Dropout(0.0), nn.Linear(5, 2))

    def forward(self, rows):
        state = None
        for word in self.words(rows).unbind(1):
            state = self.cell(word, state)
        return self.decide(state[0])


def _text_classifier(x, module):
    torch.manual_seed(0)
    model = module(Reader())
    rows, classes = torch.tensor([[1, 5, 4], [3, 8, 6], [2, 2, 0]]), torch.tensor([0, 1, 1])
    optimizer = optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    done = trained(model, optimizer, lambda one: F.cross_entropy(one(rows), classes), steps=2)
    hidden = x(rows), x(classes)
    more = trained(model, optimizer, lambda one: F.cross_entropy(one(hidden[0]), hidden[1]), steps=2)
    return done, more


def _bag_of_words(x, module):
    torch.manual_seed(0)
    words, decide = module(nn.Embedding(9, 4)), module(nn.Linear(4, 2))
    counts = x(F.one_hot(torch.tensor([[1, 5, 0], [3, 8, 6]]), 9).sum(1))
    logits = decide(counts.float() @ words.weight / 3)
    loss = F.binary_cross_entropy_with_logits(logits, torch.eye(2))
    loss.backward()
    return loss, words.weight.grad, decide.weight.grad


def _lenet(x, module):
    torch.manual_seed(0)
    model = module(
        nn.Sequential(
            nn.Conv2d(1, 3, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3),
        )
    )  # fmt: skip
    images = x(random(4, 1, 12, 12, seed=2))
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return trained(
        model, optimizer, lambda one: F.cross_entropy(one(images), torch.tensor([0, 2, 1, 0])), steps=2
    )


def _volumes(x, module):
    """What scans go through, but for convolutions in three dimensions."""
    torch.manual_seed(0)
    layer = module(nn.utils.parametrizations.weight_norm(nn.Linear(8, 2)))
    scans = x(random(2, 2, 4, 4, 4, seed=3), True)
    pooled = F.max_pool3d(scans, 2) + F.avg_pool3d(scans, 2)
    loss = F.l1_loss(layer(pooled.flatten(2)).prod(-1), torch.ones(2, 2))
    loss.backward()
    return loss, scans.grad, list(layer.parameters())


def _statistics(x, _):
    """Of two groups: means, variances, Welch's t, correlations, counts in classes, quantiles by bisection."""
    one, two = x(ROWS[:, 0]), x(ROWS[:, 1] + 0.5)
    apart = one.mean() - two.mean()
    t = apart / (one.var() / len(one) + two.var() / len(two)).sqrt()
    correlation = torch.corrcoef(torch.stack([one, two]))
    edges = torch.linspace(-2, 2, 5)
    counts = ((one[:, None] >= edges[:-1]) & (one[:, None] < edges[1:])).sum(0)
    low, high = one.min(), one.max()
    for _ in range(12):  # what half of the values are not above
        middle = (low + high) / 2
        enough = (one <= middle).sum() >= len(one) / 2
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return (
        one.mean(),
        one.var(),
        one.std(unbiased=False),
        t,
        correlation,
        counts,
        high,
        one.norm(1),
        one.prod(),
    )


PROGRAMS = {
    _logistic_regression: 2e-3, _k_means: 2e-3, _power_iteration: 5e-3, _transformer: 5e-3, _text_classifier: 1e-2,
    _bag_of_words: 1e-3, _lenet: 2e-3, _volumes: 2e-3, _statistics: 2e-3,
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_of_the_field(program, alike):
    alike(program, within=PROGRAMS[program])


def test_the_median_of_the_statistics_is_one():
    found = _statistics(lambda one: one, None)[6]
    assert abs(found - ROWS[:, 0].median()) < 2e-3


# ---------------------------------------------------------------------------- what optimizers keep of parameters


def _below_a_unit(x, _):
    """Gradients from a tenth of a unit to three: those that are nothing move a weight by nothing, and none further
    than it moves in the clear.
    """
    sizes = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 1.4, 3.0]) / 2**16
    weight, rows = x(torch.zeros(7), True), x(sizes * 2**12 * torch.ones(16, 1))
    optimizer = optim.Adam([weight], lr=0.01)
    moved = []
    for _ in range(3):
        optimizer.zero_grad()
        ((rows * weight).sum(1).mean() / 2**12).backward()
        optimizer.step()
        moved.append(weight.detach().clone())
    return moved


def test_gradients_below_a_unit_move_nothing_or_as_in_the_clear(parties):
    bob, alice, james = parties

    def shared(values, grad=False):
        made = values.fix_precision(**PRECISION)
        return made.share(bob, alice, crypto_provider=james, requires_grad=grad)

    plain = _below_a_unit(lambda one, grad=False: one.clone().requires_grad_(grad), None)
    for expected, found in zip(plain, _below_a_unit(shared, None), strict=True):
        opened = found.get()
        assert (opened <= 1e-3).all()
        assert (opened >= 1.2 * expected.min()).all()
    assert (opened[-1] - expected[-1]).abs() < 0.1 * expected[-1].abs()


OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "Adam, foreach": lambda p: optim.Adam(p, lr=0.01, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_keeps_is_as_open_as_its_parameters(parties, name):
    bob, alice, james = parties
    x, y = ROWS, ROWS[:, :1] - 1

    def network():
        torch.manual_seed(1)
        return nn.Linear(3, 1)

    def run(model, optimizer, x, y):
        return trained(model, optimizer, lambda one: F.mse_loss(one(x), y))

    plain, model = network(), network()
    expected, optimizer = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](model.parameters())
    run(plain, expected, x, y)
    model.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james, requires_grad=True)
    hidden = [one.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james) for one in (x, y)]
    run(model, optimizer, *hidden)
    model.get().float_precision()
    kept = {key: one for key, one in optimizer.state[model.weight].items() if key != "step"}
    assert all(hasattr(one, "session") for one in kept.values())
    before = [one.detach().clone() for one in model.parameters()]
    with pytest.raises(
        SharingError, match=rf"{type(optimizer).__name__} keeps .* in shares.*optimizer.get\(\)"
    ):
        run(model, optimizer, x, y)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert optimizer.get() is optimizer
    run(plain, expected, x, y)
    run(model, optimizer, x, y)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert (one - other).abs().max() < 2e-3
    model.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james, requires_grad=True)
    for words in ("before it was shared, which all know", "other shares than"):
        with pytest.raises(SharingError, match=rf"{words}.*optimizer.state.clear\(\)"):
            run(model, optimizer, *hidden)
        optimizer.state.clear()
        run(model, optimizer, *hidden)
        model.get().fix_precision(precision_fractional=4)
        model.share(bob, alice, crypto_provider=james, requires_grad=True)
        hidden = [one.fix_precision(precision_fractional=4) for one in (x, y)]
        hidden = [one.share(bob, alice, crypto_provider=james) for one in hidden]


def test_frozen_parameters_stay_so_when_a_model_is_awaited(parties):
    bob, alice, james = parties
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)
    model.fix_precision().share(bob, alice, crypto_provider=james)

    async def opened():
        return await model.async_get()

    asyncio.run(opened())
    assert [one.requires_grad for one in model.parameters()] == [True, False]


# -------------------------------------------------------------------------------- what torch asks nobody about


def test_a_plain_tensor_does_not_become_one_in_shares_by_its_data(parties):
    """torch would take the shared one's memory, of which there is none, and the process would end at the next read."""
    bob, alice, james = parties
    shared = torch.ones(3, 2).fix_precision().share(bob, alice, crypto_provider=james)
    layer = nn.Linear(2, 3)
    for plain in (torch.zeros(3, 2), layer.weight):
        before = plain.detach().clone()
        with pytest.raises(RuntimeError, match="incompatible tensor type"):
            plain.data = shared
        assert torch.equal(plain, before)
    assert (shared.device, shared.is_cpu, shared.is_meta) == (torch.device("cpu"), True, False)
    assert torch.zeros(1, device=shared.device).tolist() == [0]
    made = shared.new_tensor([1.5, 2])
    assert (made.tolist(), made.dtype) == ([1.5, 2], torch.float32)
    assert torch.equal(shared.new_tensor(shared).get(), torch.ones(3, 2))


def test_whole_numbers_as_fractions_meet_those_of_any_precision(parties):
    bob, alice, james = parties
    counts = torch.tensor([[1, 0], [2, 3]]).share(bob, alice, crypto_provider=james)
    x = torch.tensor([0.25, -1.5]).fix_precision(**PRECISION).share(bob, alice, crypto_provider=james)
    as_fractions = counts.float()
    assert torch.equal((as_fractions @ x).get(), torch.tensor([0.25, -4.0]))
    assert torch.equal(((counts > 1).float() * x).get(), torch.tensor([[0, 0], [0.25, -1.5]]))
    as_fractions[0, 0] = 0.5  # a fraction of its own precision now
    with pytest.raises(SharingError, match="different"):
        (as_fractions @ x).get()
