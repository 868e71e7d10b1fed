"""Fractions as integers: exact at the edges, refused beyond them."""

import math

import pytest
import torch

from planrt.errors import OptionError, PlanrtError, ValueRangeError
from planrt.sharing.fixed_point import LIMIT, decode, encode, scale_of


def test_scales():
    assert scale_of() == 65536
    assert scale_of(base=10, precision_fractional=3) == 1000
    assert scale_of(precision_fractional=0) == 1


@pytest.mark.parametrize(
    "options",
    [{"base": 1}, {"base": 2.5}, {"precision_fractional": -1}, {"precision_fractional": 31},
     {"base": 10, "precision_fractional": 10}, {"precision_fractional": 10**9}, {"precision_fractional": "3"}],
)  # fmt: skip
def test_scales_that_make_no_sense(options):
    with pytest.raises(OptionError):
        scale_of(**options)


def test_thousandths():
    assert encode(torch.tensor([0.1234, -0.1234, 2.0, 0.0]), 1000).tolist() == [123, -123, 2000, 0]
    assert decode(torch.tensor([123, -123]), 1000).tolist() == pytest.approx([0.123, -0.123])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_within_half_a_unit(dtype):
    values = (torch.rand(1000, dtype=torch.float64) * 8 - 4).to(dtype)
    back = decode(encode(values), dtype=torch.float64)
    assert (back - values.double()).abs().max() <= 0.5 / 65536


@pytest.mark.parametrize("shape", [(0,), (), (65_535,), (65_537,), (3, 50_000), (2, 65_536)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_many_values_as_few(shape, dtype):
    """They are taken block by block; also those that lie apart in memory."""
    values = (torch.randn(shape, dtype=torch.float64) * 100).to(dtype)
    expected = (values.double() * 1000).round().long()
    found = encode(values, 1000)
    assert found.shape == shape
    assert torch.equal(found, expected)
    assert torch.equal(
        encode(values.mT if len(shape) == 2 else values, 1000), expected.mT if len(shape) == 2 else expected
    )
    assert torch.equal(decode(expected, 1000, torch.float64), expected.double() / 1000)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("place", [0, 65_536, 149_999])
def test_one_bad_value_among_many_is_found_wherever_it_is(bad, place):
    values = torch.zeros(3, 50_000)
    values.view(-1)[place] = bad
    with pytest.raises(ValueRangeError, match="1 that are infinite" if abs(bad) != 1e30 else r"e\+30"):
        encode(values)


@pytest.mark.parametrize("scale", [1, 1000, 65536, 2**30])
def test_edges(scale):
    edge = LIMIT / scale
    inside = math.nextafter(edge, 0)
    encoded = encode(torch.tensor([inside, -inside, 1 / scale, -1 / scale], dtype=torch.float64), scale)
    assert encoded[2:].tolist() == [1, -1]
    assert encoded.abs().max() < LIMIT
    for bad in (edge, -edge, math.inf, -math.inf, math.nan, 1e300):
        with pytest.raises(ValueRangeError, match=r"values lie between") as caught:
            encode(torch.tensor([1.5, bad], dtype=torch.float64), scale)
        assert isinstance(caught.value, OverflowError | PlanrtError)
        assert "1.5" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_whole_numbers(dtype):
    values = torch.tensor([0, 1]).to(dtype)
    assert encode(values, 1000).tolist() == [0, 1000]


def test_whole_numbers_out_of_range():
    for bad in (2**62, -(2**63), 2**47):
        with pytest.raises(ValueRangeError, match="with scale 65536"):
            encode(torch.tensor([1, bad]))
    assert encode(torch.tensor([2**46 - 1, 1 - 2**46])).abs().max() < LIMIT


def test_nothing_and_complex():
    assert encode(torch.zeros(0, 3)).shape == (0, 3)
    with pytest.raises(ValueRangeError, match="complex"):
        encode(torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(ValueRangeError, match="none that is finite, and 2"):
        encode(torch.tensor([math.nan, math.inf]))
