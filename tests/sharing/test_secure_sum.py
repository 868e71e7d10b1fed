"""Sums of which the coordinator sees nothing else: who drops out when, what is seen, and what is refused."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planrt.errors import AggregationError, OptionError, PolicyError, SharingError, ValueRangeError
from planrt.sharing.randomness import Stream, new_seed
from planrt.sharing.secure_sum import encoding, shamir
from planrt.sharing.secure_sum.coordinator import Coordinator
from planrt.sharing.secure_sum.group import Group, check_threshold, default_threshold
from planrt.sharing.secure_sum.keys import KeyPair, PublicKeys, agree, seal, unseal
from planrt.sharing.secure_sum.masks import context_of, pair_seed
from planrt.sharing.secure_sum.member import Member, Revealed
from planrt.types import TensorSpec

STEPS = ("join", "share", "mask", "reveal")


def aggregate(values, *, threshold, drops=None, context=b"ctx", seen=None, least=None):
    """The sum of `values` (name -> int64 vector), where `drops` says at which step a worker is gone."""
    drops, names = drops or {}, list(values)

    def there(step, among=names):
        gone = STEPS[: STEPS.index(step) + 1]
        return [name for name in among if drops.get(name) not in gone]

    members = {name: Member(name, least=(least or {}).get(name, 2)) for name in names}
    coordinator = Coordinator("one", names, threshold=threshold)
    for name in there("join"):
        coordinator.joined(name, members[name].join())
    group = coordinator.group()
    for name in there("share", group.names):
        coordinator.shared(name, members[name].share(group))
    for name in coordinator.sharers():
        sealed = coordinator.sealed_for(name)
        if name in there("mask"):
            masked = members[name].mask(values[name].clone(), sealed, context)
            if seen is not None:
                seen[name] = masked.clone()
            coordinator.masked(name, masked)
    survivors = coordinator.survivors()
    for name in there("reveal", survivors):
        coordinator.revealed(name, members[name].reveal(survivors))
    return survivors, coordinator.total(context)


# ------------------------------------------------------------------------------------ who drops out when


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_sum_is_that_of_the_survivors_bit_for_bit_or_there_is_none(data):
    count = data.draw(st.integers(2, 6))
    threshold = data.draw(st.integers(count // 2 + 1, count))
    names = [f"worker {place}" for place in range(count)]
    drops = data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from(STEPS)))
    length = data.draw(st.integers(1, 40))
    stream = Stream(new_seed())
    values = {name: stream.ring((length,)) for name in names}
    survivors = [name for name in names if drops.get(name) in (None, "reveal")]
    if len(names) - len(drops) < threshold:
        with pytest.raises(AggregationError, match="nothing was revealed"):
            aggregate(values, threshold=threshold, drops=drops)
        return
    found, total = aggregate(values, threshold=threshold, drops=drops)
    assert found == survivors
    assert torch.equal(total, sum(values[name] for name in survivors))


def test_vectors_longer_than_a_chunk_add_up():
    values = {name: Stream(new_seed()).ring(((1 << 16) + 3,)) for name in "abcd"}
    _, total = aggregate(values, threshold=3, drops={"b": "mask"})
    assert torch.equal(total, values["a"] + values["c"] + values["d"])


# ------------------------------------------------------------------------------------ what is seen


def chi_square(vector):
    counts = np.bincount(vector.numpy().view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("secret", [0, 2**40])
def test_what_the_coordinator_sees_of_a_worker_is_uniform(secret):
    seen = {}
    aggregate({name: torch.full((50_000,), secret) for name in "abc"}, threshold=2, seen=seen)
    for vector in seen.values():
        assert chi_square(vector) < 400  # of 255 degrees of freedom: beyond six deviations
    assert not torch.equal(seen["a"], seen["b"])


def test_the_others_masks_do_not_uncover_a_worker():
    members = {name: Member(name) for name in "abc"}
    keys = {name: member.join() for name, member in members.items()}
    group = Group("one", 2, keys)
    pairs = {name: members[name]._mask for name in "bc"}
    sealed = {name: member.share(group) for name, member in members.items()}
    masked = members["a"].mask(torch.zeros(50_000, dtype=torch.int64), {o: sealed[o]["a"] for o in "bc"}, b"")
    for other in "bc":  # colluders know what they share with it
        agreed = agree(pairs[other], keys["a"].mask, "a")
        masked -= Stream(pair_seed(agreed, group.digest(), b"", "a", other)).ring((50_000,))
    assert chi_square(masked) < 400


def test_every_aggregation_has_other_masks():
    first, second = {}, {}
    for seen in (first, second):
        aggregate({name: torch.zeros(1000, dtype=torch.int64) for name in "ab"}, threshold=2, seen=seen)
    assert not (first["a"] == second["a"]).any()
    assert (first["a"] != -first["b"]).any()  # each has a mask of its own, too


def test_masked_values_differ_by_what_the_values_differ():
    """The view for two secrets under the same randomness: one pad, added."""
    vectors = []
    for secret in (5, -(2**62)):
        member, other = Member("a"), Member("b")
        member._seed, member._mask = bytes(16), KeyPair.of(bytes(range(32)))
        other._mask = KeyPair.of(bytes(range(1, 33)))
        member._seal, other._seal = KeyPair.of(bytes(range(2, 34))), KeyPair.of(bytes(range(3, 35)))
        group = Group("one", 2, {"a": member.join(), "b": other.join()})
        member.share(group)
        sealed = other.share(group)["a"]
        vectors.append(member.mask(torch.full((100,), secret), {"b": sealed}, b""))
    assert torch.equal(vectors[0] - vectors[1], torch.full((100,), 5 + 2**62))


# ------------------------------------------------------------------------------------ a coordinator that lies


def at_mask(names="abcd", threshold=3):
    """Members that have masked values, with the coordinator that asked for them."""
    members = {name: Member(name) for name in names}
    coordinator = Coordinator("one", list(names), threshold=threshold)
    for name, member in members.items():
        coordinator.joined(name, member.join())
    group = coordinator.group()
    for name, member in members.items():
        coordinator.shared(name, member.share(group))
    for name, member in members.items():
        zeros = torch.zeros(4, dtype=torch.int64)
        coordinator.masked(name, member.mask(zeros, coordinator.sealed_for(name), b""))
    return members, coordinator


def test_each_member_reveals_one_secret_of_each_other_and_once():
    members, _ = at_mask()
    revealed = members["a"].reveal(["a", "b", "c"])
    assert revealed.seeds.keys() == {"a", "b", "c"}
    assert revealed.keys.keys() == {"d"}
    for survivors in (["a", "b", "c"], ["a", "b", "d"], ["a", "b", "c", "d"]):
        with pytest.raises(SharingError, match="each is done once"):
            members["a"].reveal(survivors)


def test_two_stories_about_who_dropped_out_are_not_heard_by_enough():
    """Told that d dropped out or that it survived, no two groups of `threshold` members are different ones."""
    members, _ = at_mask()
    shares = {"seeds": 0, "keys": 0}
    for name, survivors in (("a", "abc"), ("b", "abcd"), ("c", "abc")):
        revealed = members[name].reveal(list(survivors))
        shares["seeds"] += "d" in revealed.seeds
        shares["keys"] += "d" in revealed.keys
    with pytest.raises(SharingError):  # who is said to have dropped out helps nobody
        members["d"].reveal(["a", "b", "c"])
    assert shares == {"seeds": 1, "keys": 2}  # of three that are needed for either


@pytest.mark.parametrize(
    "survivors", [["b", "c", "d"], ["a", "b", "x"], ["a", "b", "b", "c"], ["a", "b"], []]
)
def test_survivors_that_cannot_be_are_refused(survivors):
    members, _ = at_mask()
    with pytest.raises(SharingError):
        members["a"].reveal(survivors)


@pytest.mark.parametrize("out_of_turn", ["join", "share", "mask", "reveal"])
def test_steps_are_taken_once_and_in_order(out_of_turn):
    member = Member("a")
    group = Group("one", 2, {"a": member.join(), "b": Member("b").join()})
    if out_of_turn in ("share", "reveal"):
        member.share(group)
    ask = {
        "join": member.join,
        "share": lambda: member.share(group),
        "mask": lambda: member.mask(torch.zeros(1, dtype=torch.int64), {}, b""),
        "reveal": lambda: member.reveal(["a", "b"]),
    }
    with pytest.raises(SharingError, match="in order"):
        ask[out_of_turn]()


def test_values_are_masked_once_under_a_key():
    members, coordinator = at_mask("ab", 2)
    with pytest.raises(SharingError, match="each is done once"):
        members["a"].mask(torch.ones(4, dtype=torch.int64), coordinator.sealed_for("a"), b"")


def test_a_group_that_has_other_keys_for_a_member_is_refused():
    member = Member("a")
    member.join()
    with pytest.raises(SharingError, match="does not have the keys"):
        member.share(Group("one", 2, {"a": Member("a").join(), "b": Member("b").join()}))


def test_members_of_different_groups_do_not_open_each_others_shares():
    members = {name: Member(name) for name in "abc"}
    keys = {name: member.join() for name, member in members.items()}
    group = Group("one", 2, keys)
    sealed = {name: members[name].share(group) for name in "ab"}
    sealed["c"] = members["c"].share(Group("another", 2, keys))
    members["a"].mask(torch.zeros(1, dtype=torch.int64), {o: sealed[o]["a"] for o in "bc"}, b"")
    with pytest.raises(SharingError, match="'c' sealed for 'a'"):
        members["a"].reveal(["a", "b"])


def test_a_member_that_was_asked_something_else_spoils_the_sum_and_is_noticed():
    names = ["a", "b", "c"]
    members = {name: Member(name) for name in names}
    coordinator = Coordinator("one", names, threshold=2)
    for name in names:
        coordinator.joined(name, members[name].join())
    group = coordinator.group()
    for name in names:
        coordinator.shared(name, members[name].share(group))
    for name in names:
        vector = encoding.encode(
            [torch.ones(3)], ["w"], weight=1, samples=2, loss=1.0, members=3, scale_bits=32
        )
        context = b"other" if name == "c" else b"ctx"
        coordinator.masked(name, members[name].mask(vector, coordinator.sealed_for(name), context))
    survivors = coordinator.survivors()
    for name in names:
        coordinator.revealed(name, members[name].reveal(survivors))
    with pytest.raises(AggregationError, match="did not cancel"):
        encoding.decode(
            coordinator.total(b"ctx"), [TensorSpec((3,), torch.float32)], members=3, scale_bits=32
        )


def test_an_owner_can_ask_for_more_workers():
    members = {name: Member(name, least=4) for name in "abc"}
    keys = {name: member.join() for name, member in members.items()}
    with pytest.raises(PolicyError, match="the owners of 'a', 'b', 'c' want at least 4") as refused:
        members["a"].share(Group("one", 2, keys))
    assert refused.value.rule == "require_secure_aggregation"


def test_an_owner_can_ask_for_more_survivors_than_the_threshold():
    members = {name: Member(name, least=4 if name == "b" else 2) for name in "abcd"}
    group = Group("one", 3, {name: member.join() for name, member in members.items()})
    sealed = {name: member.share(group) for name, member in members.items()}
    members["a"].mask(torch.zeros(1, dtype=torch.int64), {o: sealed[o]["a"] for o in "bcd"}, b"")
    with pytest.raises(PolicyError, match="owner of 'b' wants at least 4 workers in a sum, and there are 3"):
        members["a"].reveal(["a", "b", "c"])


def test_the_coordinator_does_not_ask_where_an_owner_wants_more():
    with pytest.raises(AggregationError, match="wants at least 4 workers"):
        aggregate(
            dict.fromkeys("abcd", torch.zeros(1, dtype=torch.int64)),
            threshold=3,
            drops={"a": "mask"},
            least={"b": 4},
        )


# ------------------------------------------------------------------------------------ answers that do not fit


def test_a_wrong_share_of_a_seed_is_noticed():
    members, coordinator = at_mask("abc", 2)
    coordinator.survivors()
    for name in "abc":
        revealed = members[name].reveal(["a", "b", "c"])
        if name == "a":
            seeds = {**revealed.seeds, "b": (12345).to_bytes(shamir.SHARE_BYTES, "big")}
            revealed = Revealed(seeds, revealed.keys)
        coordinator.revealed(name, revealed)
    with pytest.raises(AggregationError, match="secret of worker 'b'"):
        coordinator.total(b"")


def _answers_of(kind):
    members = {name: Member(name) for name in "abc"}
    coordinator = Coordinator("one", list("abc"), threshold=2)
    keys = {name: member.join() for name, member in members.items()}
    coordinator.joined("a", keys["a"])
    coordinator.joined("b", keys["b"])
    if kind == "twice":
        coordinator.joined("a", keys["a"])
    if kind == "unknown":
        coordinator.joined("d", keys["a"])
    if kind == "early":
        coordinator.masked("a", torch.zeros(3, dtype=torch.int64))
    group = coordinator.group()
    if kind == "late":
        coordinator.joined("c", keys["c"])
    sealed = {name: members[name].share(group) for name in "ab"}
    if kind == "short":
        coordinator.shared("a", {"b": b"short"})
    if kind == "no shares":
        coordinator.shared("a", {})
    for name in "ab":
        coordinator.shared(name, sealed[name])
    coordinator.sealed_for("a")
    coordinator.masked("a", torch.zeros(3, dtype=torch.float64 if kind == "dtype" else torch.int64))
    coordinator.masked("b", torch.zeros(4 if kind == "length" else 3, dtype=torch.int64))
    survivors = coordinator.survivors()
    coordinator.revealed("a", Revealed({}, {}))
    return survivors


@pytest.mark.parametrize(
    "kind", ["twice", "unknown", "early", "late", "short", "no shares", "dtype", "length", "reveals"]
)
def test_answers_that_do_not_fit_name_the_worker(kind):
    with pytest.raises(SharingError, match="'[abcd]'"):
        _answers_of(kind)


def test_keys_that_everybody_could_agree_on_are_refused():
    with pytest.raises(SharingError, match="worker 'eve'"):
        agree(KeyPair.fresh(), bytes(32), "eve")


def test_groups_have_different_keys_of_full_length():
    keys = PublicKeys(bytes(32), bytes(range(32)))
    with pytest.raises(SharingError, match="no two are the same"):
        Group("one", 2, {"a": keys, "b": PublicKeys(bytes([1]) * 32, bytes(range(32)))})
    with pytest.raises(SharingError, match="32 bytes"):
        Group("one", 2, {"a": keys, "b": PublicKeys(b"short", b"shorter")})


@pytest.mark.parametrize(("members", "threshold"), [(1, 1), (2, 1), (4, 2), (5, 2), (3, 4), (1001, 700)])
def test_thresholds_are_more_than_half(members, threshold):
    with pytest.raises(OptionError):
        check_threshold(members, threshold)


def test_the_default_threshold_holds_against_a_third():
    for members in range(2, 200):
        threshold = default_threshold(members)
        check_threshold(members, threshold)
        assert 2 * threshold > members + (members - 1) // 3


# ------------------------------------------------------------------------------------ primitives


def test_agreement_is_x25519():
    # RFC 7748, section 6.1
    alice, bob = KeyPair.fresh(), KeyPair.fresh()
    assert agree(alice, bob.public, "bob") == agree(bob, alice.public, "alice")
    known = KeyPair.of(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert known.public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    other = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert (
        agree(known, other, "alice").hex()
        == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    )


def test_what_is_sealed_opens_for_its_receiver_only():
    secret = bytes(32)
    sealed = seal(secret, b"share", b"group", "a", "b")
    assert unseal(secret, sealed, b"group", "a", "b") == b"share"
    for agreed, text, group, sender, receiver in (
        (bytes([1]) * 32, sealed, b"group", "a", "b"),
        (secret, bytes([sealed[0] ^ 1]) + sealed[1:], b"group", "a", "b"),
        (secret, sealed, b"other", "a", "b"),
        (secret, sealed, b"group", "b", "a"),
        (secret, sealed, b"group", "a", "c"),
    ):
        with pytest.raises(SharingError, match="cannot be opened"):
            unseal(agreed, text, group, sender, receiver)


def test_the_field_is_one():
    value = 4  # Lucas and Lehmer's test of 2**521 - 1
    for _ in range(521 - 2):
        value = (value * value - 2) % shamir.PRIME
    assert value == 0


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_threshold_shares_give_the_secret(data):
    secret = data.draw(st.binary(min_size=1, max_size=shamir.SECRET_BYTES))
    places = data.draw(st.lists(st.integers(1, 10_000), min_size=1, max_size=8, unique=True))
    threshold = data.draw(st.integers(1, len(places)))
    shares = dict(zip(places, shamir.split(secret, threshold, places), strict=True))
    chosen = data.draw(st.permutations(places))[: data.draw(st.integers(threshold, len(places)))]
    assert shamir.Restorer(chosen).restore({one: shares[one] for one in chosen}, len(secret)) == secret


def test_fewer_shares_fit_every_secret():
    """For two shares of three that are needed, and any secret, there is a third that gives it."""
    shares = dict(zip((1, 2, 3), shamir.split(b"secret", 3, (1, 2, 3)), strict=True))
    restorer = shamir.Restorer([1, 2, 3])
    weight = restorer._weights[3]
    for other in (b"\x00" * 6, b"SECRET", b"\xff" * 6):
        known = sum(restorer._weights[place] * int.from_bytes(shares[place], "big") for place in (1, 2))
        third = (int.from_bytes(other, "big") - known) * pow(weight, -1, shamir.PRIME) % shamir.PRIME
        fitting = {**shares, 3: third.to_bytes(shamir.SHARE_BYTES, "big")}
        assert restorer.restore(fitting, 6) == other


def test_a_share_says_nothing_about_its_secret():
    for secret in (bytes(16), bytes([255]) * 16):
        low = [shamir.split(secret, 2, [1, 2])[0][-1] for _ in range(20_000)]
        counts = np.bincount(low, minlength=256)
        assert ((counts - 20_000 / 256) ** 2 / (20_000 / 256)).sum() < 400


@pytest.mark.parametrize(
    ("secret", "threshold", "places"),
    [
        (bytes(65), 1, [1]),
        (b"s", 3, [1, 2]),
        (b"s", 0, [1]),
        (b"s", 1, [0]),
        (b"s", 1, [2, 2]),
        (b"s", 1, []),
    ],
)
def test_secrets_that_cannot_be_split(secret, threshold, places):
    with pytest.raises(SharingError):
        shamir.split(secret, threshold, places)


def test_shares_of_different_secrets_are_noticed():
    one, other = shamir.split(bytes(16), 2, [1, 2]), shamir.split(bytes(16), 2, [1, 2])
    with pytest.raises(SharingError, match="not of one secret"):
        shamir.Restorer([1, 2]).restore({1: one[0], 2: other[1]}, 16)
    with pytest.raises(SharingError, match="malformed"):
        shamir.Restorer([1, 2]).restore({1: one[0], 2: b"short"}, 16)
    with pytest.raises(SharingError, match="2 places"):
        shamir.Restorer([1, 2]).restore({1: one[0]}, 16)


def test_contexts_tell_requests_and_tensors_apart():
    ones = torch.ones(2, 3)
    every = {
        context_of(b"a", [ones]), context_of(b"b", [ones]), context_of(b"a", [ones.T]), context_of(b"a", []),
        context_of(b"a", [ones.reshape(6)]), context_of(b"a", [ones.double()]), context_of(b"a", [ones, ones]),
    }  # fmt: skip
    assert len(every) == 7
    assert context_of(b"a", [ones]) == context_of(b"a", [torch.ones(3, 2).T])


# ------------------------------------------------------------------------------------ vectors


def mean_of(states, weights, *, scale_bits=32, samples=None, losses=None):
    members = len(states)
    names = [f"entry {place}" for place in range(len(states[0]))]
    vectors = [
        encoding.encode(
            state, names, weight=weight, samples=weight if samples is None else samples[place],
            loss=1.0 if losses is None else losses[place], members=members, scale_bits=scale_bits,
        )
        for place, (state, weight) in enumerate(zip(states, weights, strict=True))
    ]  # fmt: skip
    specs = [TensorSpec.of(one) for one in states[0]]
    return encoding.decode(sum(vectors), specs, members=members, scale_bits=scale_bits)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.floats(-1000, 1000), st.integers(1, 10_000)), min_size=2, max_size=6),
    st.integers(8, 32),
)
def test_the_mean_is_within_the_stated_bound(values, bits):
    sums = mean_of([[torch.tensor([x], dtype=torch.float64)] for x, _ in values], [w for _, w in values],
                   scale_bits=bits)  # fmt: skip
    exact = sum(Fraction(x) * w for x, w in values) / sum(w for _, w in values)
    rounding = Fraction(2) ** -53 * (abs(exact) + 1) * 4  # of products and of the division, in float64
    assert abs(Fraction(sums.entries[0].item()) - exact) <= Fraction(2) ** -(bits + 1) + rounding


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(-(2**40), 2**40), st.integers(1, 1000)), min_size=2, max_size=6))
def test_integers_are_rounded_to_the_nearest(values):
    sums = mean_of([[torch.tensor(x)] for x, _ in values], [w for _, w in values])
    weight = sum(w for _, w in values)
    exact = Fraction(sum(x * w for x, w in values), weight)
    assert sums.entries[0].dtype == torch.int64
    assert abs(sums.entries[0].item() - exact) <= Fraction(1, 2)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
          torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)], ids=str)
def test_equal_states_of_every_dtype_come_back(dtype, shape):
    state = (torch.randn(shape, dtype=torch.float64) * 8).to(torch.float16).abs().to(dtype)
    before = state.clone()
    sums = mean_of([[state, state]] * 3, [3, 4, 5])
    assert torch.equal(sums.entries[0], state)
    assert sums.entries[1].dtype == dtype
    assert torch.equal(state, before)


def test_a_view_and_a_conjugate_are_read_as_they_are():
    matrix = torch.randn(4, 3, dtype=torch.complex64)
    sums = mean_of([[matrix.T, matrix.conj()]] * 2, [1, 1], scale_bits=48)
    assert torch.allclose(sums.entries[0], matrix.T)
    assert torch.allclose(sums.entries[1], matrix.conj())


def test_the_largest_values_that_are_taken_do_not_wrap():
    edge = (2**63 - 1) // 3 / 2**32
    state = [torch.tensor([edge * (1 - 1e-12), -edge * (1 - 1e-12)], dtype=torch.float64)]
    sums = mean_of([state] * 3, [1, 1, 1])
    assert torch.allclose(sums.entries[0], state[0], rtol=1e-14)
    whole = [torch.tensor([(2**63 - 1) // 3, -((2**63 - 1) // 3)])]
    assert torch.equal(mean_of([whole] * 3, [1, 1, 1]).entries[0], whole[0])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.tensor([1.0, float("nan")]), "values that are infinite or not numbers"),
        (torch.tensor([float("-inf"), float("nan")]), "values that are infinite"),
        (torch.tensor([1e12]), "values that are too large"),
        (torch.tensor([complex(1, float("nan"))]), "values that are infinite"),
        (torch.tensor([2**62]), "integers that are too large"),
        (torch.tensor([-(2**63)]), "integers that are too large"),
    ],
)
def test_values_that_a_sum_cannot_hold_are_named(bad, said):
    with pytest.raises(ValueRangeError, match=f"fc.weight .*{said}") as caught:
        encoding.encode([bad], ["fc.weight"], weight=1, samples=1, loss=0.0, members=3, scale_bits=32)
    told = (
        str(caught.value).replace(f"{(2**63 - 1) // 3:,}", "").replace(f"{(2**63 - 1) // 3 / 2**32:.3g}", "")
    )
    assert not any(letter.isdigit() for letter in told)  # only the edge, which is the same for all


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1e18])
def test_a_loss_that_is_no_number_is_refused(loss):
    with pytest.raises(ValueRangeError, match="^the loss is (infinite or not a number|too large for a sum)$"):
        encoding.encode([torch.ones(1)], ["w"], weight=1, samples=1, loss=loss, members=3, scale_bits=32)


def test_a_worker_without_samples_does_not_count():
    nothing = [torch.full((2,), float("nan"))]
    sums = mean_of([[torch.tensor([1.0, 2.0])], nothing, [torch.tensor([3.0, 6.0])]], [1, 0, 1],
                   samples=[10, 0, 30], losses=[2.0, float("nan"), 4.0])  # fmt: skip
    assert torch.equal(sums.entries[0], torch.tensor([2.0, 4.0]))
    assert (sums.members, sums.weight, sums.samples, sums.loss) == (3, 2, 40, 3.5)


def test_no_worker_with_samples_leaves_nothing():
    sums = mean_of([[torch.ones(2)]] * 2, [0, 0], losses=[float("nan")] * 2)
    assert sums.entries == []
    assert np.isnan(sums.loss)


@pytest.mark.parametrize("bits", [-1, 49, 3.5, "many", True])
def test_scales_are_checked(bits):
    with pytest.raises(OptionError):
        encoding.check_scale_bits(bits)
