"""What is drawn at random beside shares, by the calls that a user types, on both transports: the values that plain
PyTorch gives, each as often as it gives them, up to the ends of the range of probabilities.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import planrt
from planrt.errors import SharingError
from tests.workers.conftest import PRECISION

planrt.TorchHook(torch)

COUNT = 4000
SMALL = 2.0**-60
"""Less than a half of what a float64 can be below 1: who keeps with the probability 1 - SMALL keeps everything."""

DRAWS = {
    "bernoulli": lambda x, p: x.bernoulli(p),
    "bernoulli_": lambda x, p: torch.empty_like(x).bernoulli_(p),
    "dropout": lambda x, p: F.dropout(x, p),
    "dropout in place": lambda x, p: F.dropout(x.clone(), p, inplace=True),
    "dropout as a module": lambda x, p: nn.Dropout(p).train()(x),
    "alpha_dropout": lambda x, p: F.alpha_dropout(x, p, training=True),
    "dropout1d": lambda x, p: F.dropout1d(x.view(-1, 1000, 1), p).flatten(),
    "dropout3d": lambda x, p: F.dropout3d(x.view(4, 1000, 1, 1, 1), p).flatten(),
    "feature_alpha_dropout": lambda x, p: F.feature_alpha_dropout(
        x.view(4, 1000, 1), p, training=True
    ).flatten(),
    "stochastic depth": lambda x, p: x * torch.empty_like(x).bernoulli_(1 - p),
}


@pytest.fixture(scope="module")
def share(make_party):
    bob, alice, james = (make_party(name) for name in ("bob", "alice", "james"))
    return lambda x: x.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james)


def frequencies(values):
    """Which values there are, to a thousandth, and how often: in parts of all."""
    found, counts = (values * 1000).round().div(1000).unique(return_counts=True)
    return dict(zip(found.tolist(), (counts / values.numel()).tolist(), strict=True))


@pytest.mark.parametrize("probability", [0.0, SMALL, 0.3, 0.5, 1 - 2.0**-40, 1.0])
@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_is_what_torch_draws(name, probability, share):
    x = torch.ones(COUNT)
    expected = frequencies(DRAWS[name](x.clone(), probability))
    torch.manual_seed(7)
    drawn = DRAWS[name](share(x), probability).get()
    found = frequencies(drawn)
    for one in {*expected, *found}:
        near = [other for other in expected if math.isclose(one, other, abs_tol=2e-3, rel_tol=2e-3)]
        assert near, f"{one} is none of {sorted(expected)}"
    spread = 6 * math.sqrt(0.25 / COUNT)
    for one, often in expected.items():
        ours = sum(
            part for other, part in found.items() if math.isclose(one, other, abs_tol=2e-3, rel_tol=2e-3)
        )
        assert abs(ours - often) < (2 * spread if 0 < often < 1 else 1e-9), (found, expected)
    torch.manual_seed(7)
    assert torch.allclose(DRAWS[name](share(x), probability).get(), drawn, atol=1e-3), "the same again"


def test_a_generator_is_drawn_from(share):
    x, generator = share(torch.ones(100)), torch.Generator()
    drawn = []
    for seed in (3, 3, 4):
        generator.manual_seed(seed)
        state = torch.get_rng_state()
        drawn.append(x.bernoulli(0.5, generator=generator).get())
        assert torch.equal(torch.get_rng_state(), state), "torch's own is left alone"
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.bernoulli(x),
        lambda x: x.bernoulli(),
        lambda x: x.clone().bernoulli_(x),
        lambda x: x.clone().bernoulli_(torch.full((3,), 0.5)),
    ],
)
def test_probabilities_of_a_tensor_are_refused(draw, share):
    """PyTorch takes the tensor's entries for probabilities: nothing else may be drawn in their place."""
    with pytest.raises(SharingError, match="probabilities of a tensor.*torch.rand"):
        draw(share(torch.tensor([0.0, 1.0, 0.5])))


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (torch.rand_like, "rand_like"),
        (torch.randn_like, "randn_like"),
        (lambda x: torch.randint_like(x, 3), "randint_like"),
        (torch.poisson, "poisson"),
        (lambda x: torch.multinomial(x, 1), "multinomial"),
        (lambda x: x.uniform_(), "uniform"),
        (lambda x: x.exponential_(), "exponential"),
        (nn.init.normal_, "normal"),
        (lambda x: F.gumbel_softmax(x), "exponential"),
    ],
)
def test_what_nobody_could_draw_unseen_is_refused_by_name(draw, name, share):
    with pytest.raises(SharingError, match=f"{name}_? has no protocol on shares: numbers that nobody knows"):
        draw(share(torch.tensor([0.2, 0.3, 0.5])))
