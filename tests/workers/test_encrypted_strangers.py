"""Programs that people of the field bring, and clumsy ones, on shares beside plain PyTorch, on both transports."""

import gc
import math

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F

import planrt
from planrt.errors import PlanrtError, SharingError, ValueRangeError
from planrt.sharing.tensors.shared import SharedTensor
from tests.workers.conftest import PRECISION

planrt.TorchHook(torch)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROWS = random(10, 4, seed=1)
LABELS = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1, 2, 1])


def stepped(optimizer, loss_of, steps=2):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def _nearest_neighbours(x, _):
    """The three nearest of ten, by their places; their classes by vote, and by a vote that counts by distance."""
    known, classes, asked = x(ROWS), x(LABELS), x(random(5, 4, seed=2))
    apart, places = torch.cdist(asked, known).topk(3, dim=1, largest=False)
    votes = F.one_hot(classes, 3).float()
    chosen = F.one_hot(places, 10).float() @ votes
    weighted = (chosen / (apart + 0.1).unsqueeze(-1)).sum(1)
    return places, chosen.sum(1).argmax(1), weighted.argmax(1), apart


def _accuracy_among_the_first(x, module):
    torch.manual_seed(0)
    model = module(nn.Linear(4, 7))
    logits, labels = model(x(ROWS)), x(LABELS)
    first = logits.topk(5, 1)[1]
    return (first == labels.unsqueeze(1)).any(1).float().mean(), logits.median(1)[0], logits.kthvalue(6, 1)[0]


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.mean, self.spread = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.out = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, rows, noise):
        hidden = self.into(rows).relu()
        mean, spread = self.mean(hidden), self.spread(hidden)
        return self.out(mean + noise * (0.5 * spread).exp()), mean, spread


def _variational_autoencoder(x, module):
    """Reparametrised with noise that all know: Kingma and Welling, 2014."""
    torch.manual_seed(0)
    model, rows, noise = module(Autoencoder()), x(ROWS), random(10, 2, seed=4)
    optimizer = optim.SGD(model.parameters(), lr=0.05)

    def loss_of():
        out, mean, spread = model(rows, noise)
        apart = -0.5 * (1 + spread - mean.pow(2) - spread.exp()).sum(1).mean()
        return F.mse_loss(out, rows, reduction="sum") / len(rows) + apart

    return stepped(optimizer, loss_of), list(model.parameters())


def _contrastive(x, module):
    """A Siamese network: Hadsell, Chopra and LeCun, 2006; then triplets, cosine pairs and InfoNCE."""
    torch.manual_seed(0)
    model = module(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    one, other, same = x(ROWS[:5]), x(ROWS[5:]), x(torch.tensor([1.0, 0, 0, 1, 0]))
    optimizer = optim.SGD(model.parameters(), lr=0.05)

    def loss_of():
        apart = F.pairwise_distance(model(one), model(other))
        return (same * apart.pow(2) + (1 - same) * (1.0 - apart).clamp(min=0).pow(2)).mean()

    losses = stepped(optimizer, loss_of)
    left, right = model(one), model(other)
    triplets = F.triplet_margin_loss(left, right, right.flip(0), margin=0.5)
    pairs = F.cosine_embedding_loss(left, right, torch.tensor([1, -1, 1, -1, 1]))
    scores = F.normalize(left, dim=1) @ F.normalize(right, dim=1).t() / 0.5
    return losses, triplets, pairs, F.cross_entropy(scores, torch.arange(5))


def _focal(x, module):
    """Of rare classes: Lin et al., 2017; with what is smoothed and weighted beside it."""
    torch.manual_seed(0)
    model, rows = module(nn.Linear(4, 1)), x(ROWS)
    rare = x((LABELS == 2).float())
    optimizer = optim.Adam(model.parameters(), lr=0.05)

    def loss_of():
        logits = model(rows).squeeze(1)
        plain = F.binary_cross_entropy_with_logits(logits, rare, reduction="none")
        sure = logits.sigmoid()
        right = sure * rare + (1 - sure) * (1 - rare)
        weight = 0.25 * rare + 0.75 * (1 - rare)
        return (weight * (1 - right) ** 2 * plain).mean()

    return stepped(optimizer, loss_of), list(model.parameters())


def _survival(x, module):
    """Cox's partial likelihood, by secret times: who is at risk is a comparison of all pairs."""
    torch.manual_seed(0)
    model, rows = module(nn.Linear(4, 1, bias=False)), x(ROWS)
    times, died = x(torch.arange(10).float()[[3, 1, 4, 9, 5, 2, 6, 0, 7, 8]]), x(LABELS.clamp(max=1).float())
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    def loss_of():
        risk = model(rows).squeeze(1)
        later = (times.unsqueeze(0) >= times.unsqueeze(1)).float()
        return -(died * (risk - (later * risk.exp()).sum(1).log())).sum() / died.sum()

    losses = stepped(optimizer, loss_of)
    order = times.argsort()
    return (
        losses,
        list(model.parameters()),
        times.gather(0, order),
        rows.gather(0, order[:, None].expand(10, 4)),
    )


def _masked_attention(x, module):
    """Of sentences of different lengths: the rest of each is hidden by what all know, and by what nobody does."""
    torch.manual_seed(0)
    layer = module(nn.MultiheadAttention(4, 2, batch_first=True))
    rows = x(random(3, 4, 4, seed=5), True)
    hidden = torch.arange(4) >= torch.tensor([4, 2, 3])[:, None]
    found, weights = layer(rows, rows, rows, key_padding_mask=hidden)
    lengths = x(torch.tensor([4, 2, 3]))
    secret = (torch.arange(4) < lengths[:, None]).float()
    pooled = (found * secret.unsqueeze(2)).sum(1) / secret.sum(1, keepdim=True)
    loss = pooled.pow(2).mean()
    loss.backward()
    return pooled, weights, loss, rows.grad


def _gradient_boosting(x, _):
    """A stump: the threshold among public ones with the least squared error, on secret residuals, and its leaves."""
    column, residual = x(ROWS[:, 0]), x(ROWS[:, 1])
    edges = torch.tensor([-1.0, -0.3, 0.2, 0.8])
    left = (column.unsqueeze(0) < edges.unsqueeze(1)).float()
    counts = torch.stack([left.sum(1), (1 - left).sum(1)])
    sums = torch.stack([left @ residual, (1 - left) @ residual])
    gain = (sums * sums / counts.clamp(min=1)).sum(0)
    best = gain.argmax(0, keepdim=True)
    leaves = (sums / counts.clamp(min=1)).gather(1, best.expand(2, 1)).squeeze(1)
    chosen = F.one_hot(best.squeeze(0), 4).float() @ left
    return gain, best, leaves, chosen * leaves[0] + (1 - chosen) * leaves[1]


def _rank_statistics(x, _):
    """Spearman's correlation, the area under a curve, medians, trimmed means and a winsorised sample."""
    one, two = x(ROWS[:, 0]), x(ROWS[:, 2] + ROWS[:, 0])
    ranks = [a.argsort().argsort().float() for a in (one, two)]
    spearman = 1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (10 * 99)
    positive = x((LABELS > 0).float())
    above = (one.unsqueeze(1) > one.unsqueeze(0)).float()
    area = (above * positive.unsqueeze(1) * (1 - positive).unsqueeze(0)).sum() / (
        positive.sum() * (1 - positive).sum()
    )
    ordered = one.sort()[0]
    apart = (one - one.median()).abs().median()
    return spearman, area, ordered[1:-1].mean(), one.clamp(ordered[1], ordered[-2]), apart, one.norm(3)


PROGRAMS = {
    _nearest_neighbours: 2e-3, _accuracy_among_the_first: 2e-3, _variational_autoencoder: 5e-3, _contrastive: 5e-3,
    _focal: 5e-3, _survival: 5e-3, _masked_attention: 2e-3, _gradient_boosting: 5e-3, _rank_statistics: 2e-3,
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_of_the_field(program, alike):
    alike(program, within=PROGRAMS[program])


# ------------------------------------------------------------------------------------------- clumsy and hostile


@pytest.fixture
def shared(parties):
    bob, alice, james = parties

    def make(values, **options):
        values = values.fix_precision(**PRECISION) if values.is_floating_point() else values
        return values.share(bob, alice, crypto_provider=james, **options)

    return make


def test_loops_of_python_over_shares_say_what_they_do(shared):
    """Rows come apart, and lists go together; what would read a value is refused, also within torch."""
    x = shared(ROWS)
    rows = list(x)
    assert len(rows) == 10
    assert (torch.stack([row.sum() for row in rows]).get() - ROWS.sum(1)).abs().max() < 1e-3
    assert (sum(rows).get() - ROWS.sum(0)).abs().max() < 1e-3
    for call in (
        lambda: max(x[0]), lambda: sorted(x[0]), lambda: x[0].sum().item(),
        lambda: x[0, 0] in [1.0], lambda: int(x[0, 0]),
        lambda: [1, 2, 3][x[0].argmax()], lambda: torch.tensor([x[0, 0], 1.0]),
        lambda: x.numpy(), lambda: range(x[0].argmax()), lambda: x.tolist(),
        lambda: math.sqrt(x[0, 0]), lambda: f"{x[0, 0]:.2f}",
    ):  # fmt: skip
        with pytest.raises(SharingError, match=r"get\(\)"):
            pytest.fail(f"it gave {call()!r}")


@pytest.mark.filterwarnings(
    "ignore:(?s).*Dynamo does not know how to trace", "ignore:`torch.jit.script` is deprecated"
)
def test_what_torch_transforms_computes_on_shares(shared):
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    compiled = torch.compile(lambda x: x * 2, backend="eager")
    assert torch.equal(compiled(shared(x)).get(), x * 2)
    gc.collect()  # what the compiler made and dropped says nothing
    assert torch.equal(torch.vmap(lambda v: (v * 2).sum())(shared(x)).get(), (x * 2).sum(1))
    cubes = torch.autograd.functional.hessian(lambda v: (v * v * v).sum(), shared(x[0]))
    assert (cubes.get() - torch.diag(6 * x[0])).abs().max() < 0.1
    assert (torch.func.jacrev(lambda v: v * v)(shared(x[0])).get() - torch.diag(2 * x[0])).abs().max() < 0.1


def test_what_is_opened_is_a_copy(shared):
    x = shared(ROWS.clone())
    opened = x.get()
    opened.zero_()
    assert (x.get() - ROWS).abs().max() < 1e-4
    given = ROWS.clone()
    there = shared(given)
    given.zero_()
    assert (there.get() - ROWS).abs().max() < 1e-4


def test_a_chain_that_leaves_the_range_is_wrong_and_no_hang_and_nothing_else_is(shared):
    """The docs say so; what comes after it, on other values, is right."""
    x = shared(torch.full((3,), 1000.0))
    far = x
    for _ in range(6):
        far = far * far
    assert far.get().shape == (3,)
    assert torch.equal((x + 1).get(), torch.full((3,), 1001.0))
    with pytest.raises(ValueRangeError):
        shared(torch.tensor([float("inf")]))
    with pytest.raises(ValueRangeError):
        shared(torch.tensor([3e14]))
    assert torch.equal((x * 2).get(), torch.full((3,), 2000.0))


def test_shapes_and_types_that_do_not_fit_are_told_as_torch_tells_them_and_before_anything_is_sent(shared):
    x, y = shared(ROWS), shared(ROWS[:, :3])
    for call in (
        lambda: x + y, lambda: x @ x, lambda: x.reshape(3, 3), lambda: x[11], lambda: x.sum(5),
        lambda: torch.cat([x, y]),
        lambda: nn.Linear(3, 2)(x), lambda: F.cross_entropy(x, LABELS[:3]), lambda: x.topk(5, 1), lambda: x.sort(3),
        lambda: x.kthvalue(0), lambda: x.index_select(0, torch.tensor([12])).get(),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, IndexError, ValueError, PlanrtError)):
            pytest.fail(f"it gave {call()!r}")
    assert (x.get() - ROWS).abs().max() < 1e-4


def test_empty_and_very_thin_tensors(shared):
    for values in (
        torch.zeros(0),
        torch.zeros(0, 4),
        torch.zeros(3, 0),
        torch.ones(()),
        torch.ones(1, 1, 1, 1),
    ):
        x = shared(values)
        assert torch.equal(x.get(), values)
        assert torch.equal((x * x + x).get(), values * values + values)
        assert torch.equal(x.relu().get(), values)
        assert torch.equal((x > 0).get(), (values > 0).long())
        assert torch.equal(x.sum().get(), values.sum())
    assert torch.equal((shared(torch.zeros(0, 4)) @ shared(torch.zeros(4, 2))).get(), torch.zeros(0, 2))
    assert torch.equal((shared(torch.zeros(2, 0)) @ shared(torch.zeros(0, 2))).get(), torch.zeros(2, 2))


def test_an_exception_in_the_middle_of_a_step_leaves_the_model_usable(shared, parties):
    bob, alice, james = parties
    torch.manual_seed(0)
    plain = nn.Linear(4, 2)
    model = nn.Linear(4, 2)
    model.load_state_dict(plain.state_dict())
    model.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james, requires_grad=True)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    loss = model(shared(ROWS)).pow(2).mean()
    with pytest.raises(SharingError):
        (loss * float(loss)).backward()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    optimizer.step()
    expected = plain(ROWS).pow(2).mean()
    expected.backward()
    optim.SGD(plain.parameters(), lr=0.1).step()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert isinstance(other, SharedTensor)
        assert (one - other.get()).abs().max() < 1e-3
