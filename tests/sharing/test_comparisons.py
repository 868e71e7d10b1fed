"""Signs, equality and what follows from them against plain torch, for two, three and four parties."""

import numpy as np
import pytest
import torch

from planrt.errors import SharingError, ValueRangeError
from planrt.sharing import ring, selection
from planrt.sharing.comparisons import below, borrow, equal, equal_to, less_than, less_than_zero
from planrt.sharing.masked import mask
from planrt.sharing.rounds import Transcript, new_parties


def near_and_far(anything, bits=64):
    x = anything(300, bits=bits)
    x[100:] = torch.randint(-4, 5, (200,))
    return x


def test_signs_of_the_whole_range(run, anything, parties):
    x = near_and_far(anything)
    transcript = Transcript(parties)
    assert torch.equal(run(less_than_zero, x, transcript=transcript), (x < 0).long())
    assert transcript.rounds == 4
    assert transcript.sent[0] / len(x) / (parties - 1) < 12.6


@pytest.mark.parametrize("shape", [(), (1,), (7,), (9, 3), (0, 3)])
def test_shapes(run, shape):
    x = torch.randint(-2, 3, shape)
    assert torch.equal(run(less_than_zero, x), (x < 0).long())
    assert torch.equal(run(selection.relu, x), x.relu())


def test_equality(run, anything):
    x = near_and_far(anything)
    y = x.clone()
    y[::2] += anything(150)
    y[1] = x[1] ^ (-(2**63))
    assert torch.equal(run(equal, x, y), (x == y).long())


def test_order(run, anything):
    x, y = near_and_far(anything, 63), near_and_far(anything, 63).flip(0)
    assert torch.equal(run(less_than, x, y), (x < y).long())


def test_thresholds_share_an_opening(run, anything, parties):
    x = near_and_far(anything, 63)
    thresholds = (-(2**61), -3, 0, 1, 2**40)

    def bits(party, x):
        (x,) = yield from mask(party, x)
        return (yield from below(party, x, thresholds)).share(party)

    transcript = Transcript(parties)
    found = run(bits, x, transcript=transcript)
    assert torch.equal(found, torch.stack([x < one for one in thresholds]).long())
    assert transcript.rounds == 4


@pytest.mark.parametrize("bits", [1, 5, 16, 17, 33, 47, 48, 49, 64])
def test_borrows(run, anything, bits):
    x = near_and_far(anything)

    def borrowed(party, x):
        (x,) = yield from mask(party, x)
        bit = yield from borrow(party, x, bits)
        return party.public(x.opened), x.part, bit.share(party)

    c, r, bit = run(borrowed, x)
    low = np.uint64(2**bits - 1)
    expected = (ring.unsigned(c) & low) < (ring.unsigned(r) & low)
    assert torch.equal(c - r, x)
    assert bit.tolist() == expected.tolist()


def test_relu_and_its_derivative(run, anything):
    x = near_and_far(anything)

    def both(party, x):
        (x,) = yield from mask(party, x)
        result, bit = yield from selection.rectified(party, x)
        return result, bit.share(party)

    result, derivative = run(both, x)
    assert torch.equal(result, x.relu())
    assert torch.equal(derivative, (x >= 0).long())


@pytest.mark.parametrize("divisor", [16, 1000, 65536, 2**17])
def test_relu_with_a_quotient(run, anything, divisor, parties):
    x = near_and_far(anything, 62)
    x[:100] = torch.randint(-10 * divisor, 10 * divisor, (100,))
    transcript = Transcript(parties)
    found = run(lambda party, x: selection.relu(party, x, divisor), x, transcript=transcript)
    assert ((found * divisor - x.relu()).abs() < divisor).all()
    assert (found[x < 0] == 0).all()
    assert transcript.rounds == 4


def test_relu_that_looks_at_fewer_bits(run, anything, parties):
    """What is not positive never counts as positive, what is above half a unit always does; the rest is off by less."""
    near = torch.arange(-(2**16), 2**17, 77)
    edges = torch.tensor([0, 1, -1, 2**15, 2**15 + 1, 2**16, 2**62 - 1, -(2**62) + 2**17])
    x = torch.cat([anything(500) >> 2, near, edges])

    def protocol(party, part):
        (masked,) = yield from mask(party, part)
        result, positive = yield from selection.rectified(party, masked, 2**16, 1, coarse=15)
        return torch.stack([result, positive.share(party)])

    found, positive = run(protocol, x)
    certain = (x <= 0) | (x > 2**15)
    assert torch.equal(positive[certain], (x > 0).long()[certain])
    assert 0 < positive[~certain].float().mean() < 1
    assert (found[x <= 0] == 0).all()
    assert ((found - x.clamp(min=0) // 2**16).abs() <= 1).all()


@pytest.mark.parametrize("bits", [17, 40, 48])
def test_low_bits_that_are_equal(run, bits):
    x = torch.tensor([0, 1, 5, 2**17 - 1, 2**40, 2**48 - 1, 5 + 2**bits, -1, -(2**50)])

    def protocol(party, part):
        (masked,) = yield from mask(party, part)
        return (yield from equal_to(party, masked, (0, 5, -1), bits)).share(party)

    expected = torch.stack([(x - one) % 2**bits == 0 for one in (0, 5, -1)]).long()
    assert torch.equal(run(protocol, x), expected)


def test_absolute_and_sign(run, anything):
    x = near_and_far(anything)
    assert torch.equal(run(selection.absolute, x), x.abs())
    x = near_and_far(anything, 63)
    assert torch.equal(run(selection.sign, x), x.sign())


@pytest.mark.parametrize(("low", "high"), [(-2, 3), (3, -2), (None, 1), (-1, None), (0, 0), (None, None)])
def test_clamp(run, anything, low, high):
    x = near_and_far(anything, 63)
    expected = x if low is high is None else x.clamp(low, high)
    assert torch.equal(run(lambda party, x: selection.clamp(party, x, low, high), x), expected)


def test_where(run, anything):
    condition, x, y = torch.randint(0, 2, (5, 1)), anything(5, 4), anything(4)
    assert torch.equal(run(selection.where, condition, x, y), torch.where(condition.bool(), x, y))


def test_larger_and_smaller_of_two(run, anything):
    x, y = near_and_far(anything, 63), near_and_far(anything, 63).flip(0)
    assert torch.equal(run(selection.maximum, x, y), torch.maximum(x, y))
    assert torch.equal(run(selection.minimum, x, y), torch.minimum(x, y))


ROUNDS = {1: 0, 2: 4, 5: 5, 6: 6, 16: 6, 17: 10, 70: 16}


@pytest.mark.parametrize("count", ROUNDS)
def test_largest_and_its_place(run, count, parties):
    x = torch.randint(-(2**61), 2**61, (20, count))
    x[10:] = torch.randint(-2, 2, (10, count))
    transcript = Transcript(parties)
    found, places = run(lambda party, x: selection.largest(party, x, 1, index=True), x, transcript=transcript)
    assert torch.equal(found, x.max(1).values)
    assert torch.equal(places, x.argmax(1))
    assert transcript.rounds == ROUNDS[count]
    found, _ = run(lambda party, x: selection.largest(party, x, 0), x)
    assert torch.equal(found, x.max(0).values)


def test_largest_of_nothing(run):
    with pytest.raises(SharingError, match="no largest of nothing"):
        run(lambda party, x: selection.largest(party, x, 1), torch.zeros(3, 0, dtype=torch.int64))
    found, _ = run(lambda party, x: selection.largest(party, x, 1), torch.zeros(0, 3, dtype=torch.int64))
    assert found.shape == (0,)


def test_bounds_out_of_range():
    with pytest.raises(ValueRangeError, match="bounds lie between"):
        next(selection.clamp(new_parties(2)[0], torch.zeros(2, dtype=torch.int64), -(2**70), 3))
