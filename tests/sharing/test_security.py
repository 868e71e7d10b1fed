"""What a party sees says nothing about the secret: uniform for any secret, and never the same twice.

Seeds are fixed where distributions are tested, so nothing here is a matter of luck.
"""

import numpy as np
import pytest
import torch

from planrt.sharing import selection
from planrt.sharing.additive import share
from planrt.sharing.comparisons import equal, less_than_zero
from planrt.sharing.curves import sigmoid
from planrt.sharing.products import multiply, square
from planrt.sharing.quotients import truncate
from planrt.sharing.randomness import Stream, new_seed
from planrt.sharing.rounds import Transcript, new_parties, run_together

SIZE = 4096
UNIFORM = 390.0
"""Of a chi-square of 255 degrees of freedom: exceeded with probability 1e-7."""


def chi_square(octets):
    counts = np.bincount(octets, minlength=256)
    expected = len(octets) / 256
    return float(((counts - expected) ** 2 / expected).sum())


PROTOCOLS = {
    "sign": less_than_zero,
    "equality": lambda party, x: equal(party, x, torch.zeros_like(x)),
    "relu": lambda party, x: selection.relu(party, x, 65536),
    "clamp": lambda party, x: selection.clamp(party, x, -5, 5),
    "product": lambda party, x: multiply(party, "mul", x, x.flip(0)),
    "square": square,
    "quotient": lambda party, x: truncate(party, x, 1000),
    "largest": lambda party, x: selection.largest(party, x.reshape(-1, 8), 1, index=True),
    "sigmoid": lambda party, x: sigmoid(party, x, 65536),
}

SECRETS = {
    "zeros": torch.zeros(SIZE, dtype=torch.int64),
    "minus ones": torch.full((SIZE,), -1),
    "large": torch.full((SIZE,), 2**50 + 12345),
    "rising": torch.arange(SIZE) * 2**30,
}


def views(protocol, secret, count, *, seeds=None, key=None):
    stream = Stream(new_seed() if key is None else key)
    shares = share(secret, count, stream)
    transcript = Transcript(count, keep_views=True)
    everyone = new_parties(count, seeds=seeds)
    run_together([protocol(party, part) for party, part in zip(everyone, shares, strict=True)], transcript)
    return transcript.views


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("count", [2, 3])
def test_all_that_is_received_is_uniform(name, secret, count):
    seeds = [bytes([number + 1]) * 16 for number in range(count)]
    for seen in views(PROTOCOLS[name], SECRETS[secret], count, seeds=seeds, key=bytes(16)):
        for tensor in seen:
            octets = tensor.numpy().reshape(-1).view(np.uint8)
            if len(octets) >= 2048:
                assert chi_square(octets) < UNIFORM


@pytest.mark.parametrize("name", PROTOCOLS)
def test_views_of_two_secrets_agree_in_distribution(name):
    """One party's own part and seed stay, the secret and the others' randomness change: its views look alike."""
    octets = {}
    for secret in ("zeros", "large"):
        gathered = []
        for turn in range(2):
            seeds = [bytes([7]) * 16, bytes([turn + 10 * len(secret)]) * 16]
            (seen, _) = views(PROTOCOLS[name], SECRETS[secret], 2, seeds=seeds, key=bytes(16))
            gathered += [tensor.numpy().reshape(-1).view(np.uint8) for tensor in seen]
        octets[secret] = np.bincount(np.concatenate(gathered), minlength=256).astype(float)
    first, second = octets["zeros"], octets["large"]
    statistic = float(((first - second) ** 2 / (first + second)).sum())
    assert statistic < UNIFORM


@pytest.mark.parametrize("name", PROTOCOLS)
def test_randomness_is_fresh_every_time(name):
    secret = SECRETS["zeros"]
    one, other = (views(PROTOCOLS[name], secret, 2) for _ in range(2))
    for first, second in zip(one[0], other[0], strict=True):
        assert not torch.equal(first, second)
        if first.dtype == torch.int64:
            assert not (first == second).any()


def test_no_mask_serves_two_openings():
    """Openings of zeros are sums of masks: a mask that came again would show as equal values."""
    seen = views(PROTOCOLS["sigmoid"], SECRETS["zeros"], 2)[0]
    values = torch.cat([tensor.reshape(-1) for tensor in seen if tensor.dtype == torch.int64])
    assert len(values.unique()) == len(values)
