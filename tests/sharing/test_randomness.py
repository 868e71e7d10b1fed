"""The random stream, correlated randomness ahead of time, and what is refused."""

import math

import numpy as np
import pytest
import torch

from planrt.errors import RandomnessError, SharingError
from planrt.sharing.additive import reconstruct, refresh, share
from planrt.sharing.comparisons import less_than_zero
from planrt.sharing.correlated import Dealer, Stock, Supply
from planrt.sharing.products import multiply
from planrt.sharing.randomness import Stream, Streams, new_seed
from planrt.sharing.requests import Coin, Given, Known, Low, Mask, Product, Zero
from planrt.sharing.rounds import Party, new_parties, run_together

KEY = bytes(range(16))


def test_a_stream_is_aes_in_counter_mode():
    # The first block under this key of the counter 0, from FIPS-197's AES-128 of sixteen zero bytes.
    assert Stream(KEY).octets(16).tobytes().hex() == "c6a13b37878f5b826f4f8162a1c8d879"


def test_a_stream_goes_on_and_never_repeats():
    one, other = Stream(KEY, 7), Stream(KEY, 7)
    whole = one.octets(100_000)
    pieces = np.concatenate([other.octets(count) for count in (1, 15, 17, 99_967)])
    assert np.array_equal(whole, pieces)
    assert not np.array_equal(whole, Stream(KEY, 8).octets(100_000))
    assert not np.array_equal(whole, one.octets(100_000))


def test_streams_of_one_key_are_each_as_if_alone():
    """They share a cipher; whoever draws goes on where it was, in the middle of a block too."""
    of_key = Streams(KEY)
    numbers = [0, 7, 2**64 - 1, 7]
    together = [of_key.stream(number) for number in numbers]
    drawn = [[one.octets(count) for one in together] for count in (5, 16, 1, 0, 100, 11)]
    for place, number in enumerate(numbers):
        assert np.array_equal(np.concatenate([row[place] for row in drawn]), Stream(KEY, number).octets(133))


def test_numbers_and_keys_of_streams():
    for number in (-1, 2**64):
        with pytest.raises(ValueError, match="numbers from 0"):
            Stream(KEY, number)
    with pytest.raises(ValueError, match="16 bytes"):
        Streams(bytes(15))


def test_seeds_differ():
    assert len({new_seed() for _ in range(100)}) == 100


def chi_square(octets):
    counts = np.bincount(octets, minlength=256)
    expected = len(octets) / 256
    return float(((counts - expected) ** 2 / expected).sum())


CHI_SQUARE_255 = 390.0
"""Of 255 degrees of freedom: exceeded with probability 1e-7."""


def test_parts_of_shares_are_uniform(parties):
    streams = Stream(KEY, parties)
    for secret in (torch.zeros(40_000, dtype=torch.int64), torch.arange(40_000)):
        for part in share(secret, parties, streams):
            octets = part.numpy().view(np.uint8).reshape(-1, 8)
            assert all(chi_square(octets[:, place]) < CHI_SQUARE_255 for place in range(8))


def test_corrections_are_uniform():
    seeds = [bytes([number]) * 16 for number in range(3)]
    mask = Known(0, Mask((30_000,)), (30_000,))
    dealer = Dealer(seeds)
    top = mask.changed("top")
    for number, request in enumerate(
        [Given(mask), Product("mul", mask, mask), Coin((30_000,)), Low(top, top), Low(top, mask)], 1
    ):
        (correction,) = dealer.correction(number, request)
        size = correction.element_size()
        octets = correction.numpy().view(np.uint8).reshape(-1, size)
        assert size == (2 if isinstance(request, Low) else 8)
        assert all(chi_square(octets[:, place]) < CHI_SQUARE_255 for place in range(size))


def test_refreshed_parts_are_of_the_same_secret_and_new(parties):
    everyone = new_parties(parties)
    secret = torch.arange(-5, 5)
    parts = share(secret, parties, Stream(new_seed()))
    fresh = [refresh(party, part) for party, part in zip(everyone, parts, strict=True)]
    again = [refresh(party, part) for party, part in zip(everyone, parts, strict=True)]
    assert torch.equal(reconstruct(fresh), secret)
    for old, new, newer in zip(parts, fresh, again, strict=True):
        assert not (old == new).any()
        assert not (newer == new).any()


@pytest.mark.parametrize("count", [0, 1])
def test_sharing_takes_two(count):
    with pytest.raises(SharingError, match="two parties or more"):
        share(torch.arange(3), count, Stream(KEY))
    with pytest.raises(SharingError, match="two parties or more"):
        new_parties(count)


def test_fractions_are_not_shared_as_they_are():
    with pytest.raises(SharingError, match="encode fractions"):
        share(torch.rand(3), 2, Stream(KEY))


def test_parts_of_different_secrets_do_not_fit():
    with pytest.raises(SharingError, match="no parts of one secret"):
        reconstruct([torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)])
    with pytest.raises(SharingError, match="no parts of one secret"):
        reconstruct([])


def ahead(protocol, *secrets, count=2):
    """The requests of a protocol, found by running it."""
    everyone = new_parties(count)
    everyone[0].supply.record = []
    parts = [share(secret, count, Stream(new_seed())) for secret in secrets]
    run_together([protocol(party, *(one[party.number] for one in parts)) for party in everyone])
    return everyone[0].supply.record


def as_plain(value, protocol, requests, seeds, stock, prepare):
    supplies = [Supply(seed) for seed in seeds[:-1]] + [Supply(seeds[-1], stock)]
    if prepare:
        for supply in supplies:
            supply.prepare(requests)
    parts = share(value, len(seeds), Stream(new_seed()))
    everyone = [Party(number, len(seeds), supply) for number, supply in enumerate(supplies)]
    return reconstruct(run_together([protocol(party, parts[party.number]) for party in everyone]))


@pytest.mark.parametrize("prepare", [False, True])
def test_randomness_is_made_ahead_of_time(parties, prepare):
    value = torch.tensor([-3, -1, 0, 5])
    requests = ahead(less_than_zero, value, count=parties)
    seeds = [new_seed() for _ in range(parties)]
    made = Stock()
    Dealer(seeds).make(requests, made)
    stock = Stock()  # as it arrives elsewhere: plain tensors
    for number, request in enumerate(requests):
        if request.fixed:
            stock.put(number, request, [tensor.clone() for tensor in made(number, request)])
    assert torch.equal(as_plain(value, less_than_zero, requests, seeds, stock, prepare), (value < 0).long())
    assert len(stock) == 0


def test_randomness_is_used_once():
    requests = ahead(less_than_zero, torch.arange(4))
    seeds = [new_seed(), new_seed()]
    dealer, stock = Dealer(seeds), Stock()
    dealer.make(requests, stock)
    number = next(number for number, request in enumerate(requests) if request.fixed)
    with pytest.raises(RandomnessError, match="handed out before"):
        dealer.correction(number, requests[number])
    tensors = stock(number, requests[number])
    with pytest.raises(RandomnessError, match="used before"):
        stock(number, requests[number])
    with pytest.raises(RandomnessError, match="handed out before"):
        stock.put(number, requests[number], tensors)
    with pytest.raises(RandomnessError, match="used up"):
        stock(10_000, requests[number])


def test_randomness_for_something_else_is_refused():
    seeds = [new_seed(), new_seed()]
    request, other = Zero((3,)), Zero((4,))
    dealer, stock = Dealer(seeds), Stock()
    tensors = dealer.correction(0, request)
    for wrong in ([], [torch.zeros(3)], [torch.zeros(4, dtype=torch.int64)], [*tensors, *tensors]):
        with pytest.raises(RandomnessError, match="wrong shape"):
            stock.put(0, request, wrong)
        with pytest.raises(RandomnessError, match="wrong shape"):
            Supply(seeds[1], lambda number, request, wrong=wrong: wrong).take(request)
    stock.put(0, request, tensors)
    with pytest.raises(RandomnessError, match="another operation"):
        Supply(seeds[1], stock).take(other)
    prepared = Supply(seeds[0])
    prepared.prepare([request])
    with pytest.raises(RandomnessError, match="another operation"):
        prepared.take(other)


def test_all_but_the_last_party_need_only_a_seed(parties):
    for party in new_parties(parties)[:-1]:
        assert party.supply.take(Zero((math.prod((2, 3)),))).fixed[0].shape == (6,)


def test_parties_who_run_different_protocols_are_found_out():
    def one(party, value):
        return (yield [value])

    def other(party, value):
        return (yield [value, value])

    first, second = new_parties(2)
    with pytest.raises(SharingError, match="do not open the same"):
        run_together([one(first, torch.arange(2)), other(second, torch.arange(2))])
    with pytest.raises(SharingError, match="do not open the same"):
        run_together([one(first, torch.arange(2)), one(second, torch.arange(3))])
    with pytest.raises(SharingError, match="do not open the same"):
        run_together([multiply(first, "mul", torch.arange(2), torch.arange(2)), iter(())])
