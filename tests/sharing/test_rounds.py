"""How many rounds calls on shares take and what they open, and that this costs no precision."""

import copy

import pytest
import torch
from torch import nn

from planrt.sharing.tensors.in_process import InProcessSession
from planrt.sharing.tensors.shared import share, share_module

UNIT = 2**-16


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[2, 3], ids=lambda count: f"{count}parties")
def session(request):
    return InProcessSession(request.param, at_once=100_000)


def rounds_of(session, function):
    session.flush()
    before, sent = session.transcript.rounds, session.transcript.sent[0]
    result = function()
    session.flush()
    return result, session.transcript.rounds - before, session.transcript.sent[0] - sent


def test_a_training_step_takes_few_rounds(session):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    x, y = random(16, 20), random(16, 4, seed=1)
    models = [model, share_module(session, copy.deepcopy(model))]
    data = [(x, y), (share(session, x), share(session, y))]
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.05) for one in models]

    def step(place):
        optimizers[place].zero_grad()
        loss = ((models[place](data[place][0]) - data[place][1]) ** 2).sum() / 16
        loss.backward()
        optimizers[place].step()
        return loss

    for _ in range(3):
        expected, (found, rounds, _) = step(0), rounds_of(session, lambda: step(1))
        assert abs(found.get() - expected) < 1e-2
    assert rounds == 19
    for one, other in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert (one.get() - other).abs().max() < 1e-3


def test_weights_of_all_layers_are_opened_at_once(session):
    """Each is brought to the session's scale, and opened, while the first layer is: later layers open their values."""
    weights = [share(session, random(6, 6, seed=seed)) * share(session, random(6, 6)) for seed in range(4)]
    x = share(session, random(5, 6))
    session.flush()

    def layers():
        value = x
        for weight in weights:
            value = (value @ weight).relu()
        return value

    found, rounds, _ = rounds_of(session, layers)
    assert rounds == (2 + 4) + 3 * (1 + 4)
    expected = random(5, 6).double()
    for seed in range(4):
        expected = (expected @ (random(6, 6, seed=seed) * random(6, 6)).double()).relu()
    assert (found.get() - expected).abs().max() < 2e-2


def test_what_is_opened_first_is_what_a_product_takes(session):
    """An operand that was changed before is opened afterwards; one that nobody multiplies by a secret is not."""
    x, w = share(session, random(5, 6)), share(session, random(6, 4, seed=1))
    session.flush()

    def changed():
        w.add_(share(session, random(6, 4, seed=2)))
        return x @ w

    found, rounds, _ = rounds_of(session, changed)
    assert rounds == 1
    assert (
        found.get() - random(5, 6) @ (random(6, 4, seed=1) + random(6, 4, seed=2))
    ).abs().max() < 30 * UNIT
    y = share(session, random(5, 6))
    session.flush()
    found, rounds, _ = rounds_of(session, lambda: y @ random(6, 4, seed=3).round())
    assert rounds == 0
    assert (found.get() - random(5, 6) @ random(6, 4, seed=3).round()).abs().max() < 30 * UNIT


@pytest.mark.parametrize("alpha", [-0.05, 0.9, -1e-4, 3.7, 300.5, -1e-9, 2.0**-20, 0.5, -1, 0, 1 / 3])
def test_a_product_is_added_with_a_factor_to_within_two_units(session, alpha):
    x, y, z = random(50) * 8, random(50, seed=1) * 8, random(50, seed=2)
    p, q, r = (share(session, one).get() for one in (x, y, z))  # as they are represented
    found = share(session, r).add_(share(session, p) * share(session, q), alpha=alpha).get()
    error = (found.double() - (r.double() + alpha * p.double() * q.double())).abs()
    assert error.max() <= UNIT * (2 + abs(alpha)) + 2**-24 * abs(alpha) * 600


@pytest.mark.parametrize("scale", [1000, 2**10, 2**20])
def test_steps_at_other_scales(scale):
    session = InProcessSession(2, scale=scale)
    x, y = random(30), random(30, seed=1)
    found = share(session, x).sub_(share(session, x) * share(session, y), alpha=0.3).get()
    assert (found - (x - 0.3 * x * y)).abs().max() < 4 / scale


def test_small_steps_add_up():
    """A weight is kept finer than the session's scale between steps: a quarter of a unit each time is not rounded."""
    session = InProcessSession(2)
    weight, factor = share(session, torch.zeros(50)), share(session, torch.full((50,), 0.02))
    gradient = factor * factor
    for _ in range(100):
        weight.sub_(gradient, alpha=0.01)
    assert (weight.get() + 100 * 0.01 * 0.02**2).abs().max() < 2 * UNIT


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(6, 4), (5, 6)), (nn.Conv2d(2, 3, 3), (2, 2, 5, 5))],
    ids=["linear", "conv2d"],
)
def test_a_bias_that_was_moved_costs_no_round_and_stays_fine(session, layer, shape):
    """It is scaled down beside the factors for the product alone."""
    torch.manual_seed(0)
    shared = share_module(session, copy.deepcopy(layer))
    step, left = share(session, random(*layer.bias.shape)), share(session, random(*layer.bias.shape, seed=1))
    with torch.no_grad():
        shared.bias.sub_(step * left, alpha=0.01)
        layer.bias.sub_(step.get() * left.get(), alpha=0.01)
    before = shared.bias.get()
    x = share(session, random(*shape))
    out, rounds, _ = rounds_of(session, lambda: shared(x) * (1 / 64))
    assert rounds == 1  # the factors are opened; a quotient of what is as fine as products opens nothing
    assert (out.get() - layer(random(*shape)) / 64).abs().max() < 4 * UNIT
    assert torch.equal(shared.bias.get(), before)


def test_whole_numbers_are_added_exactly():
    session = InProcessSession(2, scale=1)
    x = torch.arange(-20, 20)
    shared = share(session, x)
    assert torch.equal(torch.add(shared, shared * shared, alpha=-3).get(), x - 3 * x * x)


@pytest.mark.parametrize("alpha", [1, -1, 2])
def test_a_sum_with_a_whole_factor_opens_nothing(session, alpha):
    x, product = share(session, random(6)), share(session, random(6)) * share(session, random(6, seed=1))
    session.flush()
    found, rounds, _ = rounds_of(session, lambda: x.add(product, alpha=alpha))
    assert rounds == 0
    assert (found.get() - (random(6) + alpha * random(6) * random(6, seed=1))).abs().max() < 4 * UNIT


def test_a_division_by_a_power_of_two_opens_nothing(session):
    product = share(session, random(6)) * share(session, random(6, seed=1))
    session.flush()
    found, rounds, _ = rounds_of(session, lambda: product / 64)
    assert rounds == 0
    assert (found.get() - random(6) * random(6, seed=1) / 64).abs().max() < UNIT


@pytest.mark.parametrize("divisor", [7, 64, 784, 2**30, 1e-3, -0.75])
def test_what_is_known_is_multiplied_without_opening(session, divisor):
    x = share(session, random(6)).requires_grad_()

    def gradient():
        (x.sum() / divisor).backward()
        return x.grad

    found, rounds, _ = rounds_of(session, gradient)
    assert rounds == 0
    assert (found.get() - 1 / divisor).abs().max() < 1e-6 * max(1, 1 / abs(divisor))


VIEWS = {
    "transpose": (lambda w: w.t(), lambda w: w),
    "reshape": (lambda w: w.reshape(8, 6).t(), lambda w: w.reshape(8, 6)),
    "permute": (lambda w: w.view(2, 3, 8).permute(2, 0, 1).reshape(8, 6), lambda w: w.view(6, 8).t()),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_weight_is_opened_once_for_its_views(session, name):
    first, second = VIEWS[name]
    w, x = random(6, 8), random(4, 100)
    weight = share(session, w)

    def product(view):
        value = share(session, x[:, : view(w).shape[0]])
        return value @ view(weight)

    for view, opens_weight in ((first, True), (first, False), (second, False)):
        found, _, sent = rounds_of(session, lambda view=view: product(view))
        value = 4 * view(w).shape[0]
        assert sent == 8 * (value + w.numel() * opens_weight) * (len(session.parties) - 1)
        assert (found.get() - x[:, : view(w).shape[0]] @ view(w)).abs().max() < 1e-3
    with torch.no_grad():
        weight[0] = 0
        w[0] = 0
    for view in (second, first):
        found, _, _ = rounds_of(session, lambda view=view: product(view))
        assert (found.get() - x[:, : view(w).shape[0]] @ view(w)).abs().max() < 1e-3


def test_an_expanded_value_is_opened_as_it_was_before(session):
    x, y = random(1, 5), random(4, 5, seed=1)
    value = share(session, x)
    found, _, sent = rounds_of(session, lambda: value.expand(4, 5) * share(session, y))
    assert sent == 8 * (5 + 20) * (len(session.parties) - 1)
    assert (found.get() - x * y).abs().max() < 1e-3


def test_views_of_what_is_scaled_down_apart(session):
    """A view and what it is a view of, each brought to the session's scale by itself, and opened in turn."""
    x, y = random(4, 4), random(4, 4, seed=1)
    product = share(session, x) * share(session, y)
    view, factor = product.t(), share(session, y)
    first = view @ factor
    session.flush()
    second = product @ factor
    third = view * factor
    expected = x * y
    for found, wanted in (
        (first, expected.t() @ y),
        (second, expected @ y),
        (third, expected.t() * y),
    ):
        assert (found.get() - wanted).abs().max() < 1e-3
