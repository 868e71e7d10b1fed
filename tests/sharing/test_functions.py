"""Approximations against torch over the ranges that their docstrings state."""

import decimal
import math

import pytest
import torch
from torch.nn import functional

from planrt.errors import OptionError, SharingError
from planrt.sharing import curves, networks, roots
from planrt.sharing.fixed_point import decode, encode
from planrt.sharing.rounds import Transcript, new_parties
from planrt.sharing.splines import CURVES, TOLERANCE, pieces
from tests.sharing.conftest import run_parties

EVERYWHERE = torch.cat(
    [
        torch.linspace(-20, 20, 801, dtype=torch.float64),
        torch.tensor([0, -1e6, 1e6, 2**-16, -(2**-16), 1e-3, -1e-3], dtype=torch.float64),
    ]
)
SCALES = [2**16, 1000]


def fixed(protocol, *values, scale, count=2, transcript=None):
    encoded = [encode(value, scale) for value in values]
    found = run_parties(
        count, lambda party, *parts: protocol(party, *parts, scale), *encoded, transcript=transcript
    )
    return decode(found, scale, torch.float64)


def held(values, scale):
    """The values as they are held: what a function of them is compared with."""
    return decode(encode(values, scale), scale, torch.float64)


REFERENCES = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "softplus": functional.softplus,
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", REFERENCES)
def test_curves(name, scale, parties):
    transcript = Transcript(parties)
    found = fixed(getattr(curves, name), EVERYWHERE, scale=scale, count=parties, transcript=transcript)
    expected = REFERENCES[name](held(EVERYWHERE, scale))
    bound = (2**-15 + 4 / scale) * expected.abs().clamp(min=1)
    assert ((found - expected).abs() <= bound).all()
    assert transcript.rounds == 8


@pytest.mark.parametrize("scale", SCALES)
def test_exponential(scale):
    x = EVERYWHERE[EVERYWHERE < 12]
    expected = held(x, scale).exp()
    found = fixed(curves.exp, x, scale=scale)
    assert ((found - expected).abs() <= (2**-15 + 4 / scale) * expected.clamp(min=1)).all()
    above = fixed(curves.exp, torch.tensor([12.0, 13.0, 1e5]), scale=scale)
    assert above.tolist() == pytest.approx([math.exp(12)] * 3, rel=1e-4)


@pytest.mark.parametrize("name", CURVES)
def test_pieces_cover_their_range_and_do_not_depend_on_the_context(name):
    cut = pieces(name)
    curve = CURVES[name]
    assert cut.error <= TOLERANCE
    assert (cut.ends[0], cut.ends[-1]) == (curve.low, curve.high)
    assert list(cut.ends) == sorted(set(cut.ends))
    assert len(cut.coefficients) == len(cut.ends) - 1 <= 40
    with decimal.localcontext() as context:
        context.prec = 5
        context.rounding = decimal.ROUND_UP
        again = pieces.__wrapped__(name)
    assert again == cut


POSITIVE = {"reciprocal": torch.reciprocal, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "log": torch.log}


def bound_of(expected, scale, units=3):
    return units / scale + 3e-6 * expected.abs()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", POSITIVE)
def test_roots_over_their_whole_range(name, scale):
    x = torch.logspace(math.log10(1.01 / scale), math.log10(2**39.9 / scale), 300, dtype=torch.float64)
    x[0] = 1 / scale
    expected = POSITIVE[name](held(x, scale))
    found = fixed(getattr(roots, name), x, scale=scale)
    assert ((found - expected).abs() <= bound_of(expected, scale)).all()


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("name", POSITIVE)
def test_roots_by_more_parties(name, count):
    x = torch.tensor([[0.01, 0.5, 1.0], [2.0, 3.7, 1000.0]], dtype=torch.float64)
    found = fixed(getattr(roots, name), x, scale=2**16, count=count)
    expected = POSITIVE[name](held(x, 2**16))
    assert ((found - expected).abs() <= bound_of(expected, 2**16)).all()


def test_reciprocals_of_negative_values():
    x = torch.tensor([-0.25, -1.0, -300.0, 4.0], dtype=torch.float64)
    assert fixed(roots.reciprocal, x, scale=2**16).tolist() == pytest.approx((1 / x).tolist(), abs=5e-5)


@pytest.mark.parametrize("name", ["reciprocal", "sqrt", "rsqrt"])
def test_zero_gives_zero(name):
    assert fixed(getattr(roots, name), torch.zeros(5), scale=2**16).tolist() == [0.0] * 5


@pytest.mark.parametrize("scale", SCALES)
def test_quotients_of_two_secrets(scale):
    y = torch.cat([-(s := torch.logspace(-1, 4, 100, dtype=torch.float64)), s])
    x = torch.linspace(-30, 30, 200, dtype=torch.float64)
    expected = held(x, scale) / held(y, scale)
    found = fixed(roots.quotient, x, y, scale=scale)
    allowed = bound_of(expected, scale) + 1 / (64 * held(y, scale).abs() * scale)
    assert ((found - expected).abs() <= allowed).all()


@pytest.mark.parametrize("name", [*POSITIVE, "quotient"])
def test_scales_without_room_are_refused(name):
    party, x = new_parties(2)[0], torch.ones(2, dtype=torch.int64)
    given = (x, x) if name == "quotient" else (x,)
    with pytest.raises(OptionError, match="at most"):
        next(getattr(roots, name)(party, *given, 2**19))


def test_softmax(parties):
    x = torch.randn(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    x[0] = 0
    x[1] = torch.tensor([1000.0] + [-1000.0] * 9)
    for dim in (0, 1):
        found = fixed(
            lambda party, a, s, dim=dim: networks.softmax(party, a, dim, s), x, scale=2**16, count=parties
        )
        assert (found - x.softmax(dim)).abs().max() < 1.5e-4


def test_log_softmax_and_cross_entropy(parties):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(12, 10, dtype=torch.float64, generator=generator) * 3
    target = functional.one_hot(torch.randint(0, 10, (12,), generator=generator), 10).double()
    found = fixed(lambda party, a, s: networks.log_softmax(party, a, 1, s), x, scale=2**16, count=parties)
    assert (found - x.log_softmax(1)).abs().max() < 1e-4 + 10 * 3e-5
    loss = fixed(networks.cross_entropy, x, target, scale=2**16, count=parties)
    assert loss.item() == pytest.approx(functional.cross_entropy(x, target).item(), abs=5e-4)


@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm(parties, affine):
    x = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 4 + 2
    weight, bias = torch.linspace(-2, 2, 16).double(), torch.linspace(0, 1, 16).double()
    given = (weight, bias) if affine else ()

    def protocol(party, x, *rest):
        *affine, scale = rest
        return networks.layer_norm(party, x, *(affine or (None, None)), scale)

    found = fixed(protocol, x, *given, scale=2**16, count=parties)
    expected = functional.layer_norm(x, (16,), *(given or (None, None)))
    assert (found - expected).abs().max() < 5e-4


def test_means_and_variances(run):
    x = torch.randn(5, 7, dtype=torch.float64)
    found = run(lambda party, a: networks.mean(party, a, 1), encode(x))
    assert (decode(found, dtype=torch.float64) - x.mean(1, keepdim=True)).abs().max() < 2 / 65536
    found = run(lambda party, a: networks.variance(party, a, 0, 65536), encode(x))
    expected = x.var(0, correction=0, keepdim=True)
    assert (decode(found, dtype=torch.float64) - expected).abs().max() < 2e-4
    with pytest.raises(SharingError, match="mean of nothing"):
        run(lambda party, a: networks.mean(party, a, 1), torch.zeros(3, 0, dtype=torch.int64))


def test_fixed_products(run):
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    found = run(
        lambda party, a, b: networks.fixed_product(party, "matmul", a, b, 65536), encode(x), encode(y)
    )
    assert (decode(found, dtype=torch.float64) - x @ y).abs().max() < 1e-4
