"""Who is in both tables: what a user calls, on both transports, and what the parties send."""

import contextlib
import hashlib
import secrets
import tracemalloc

import numpy as np
import pytest
import torch

from planrt.errors import AlignmentError, DataError, JointError, OptionError, UnknownDatasetError
from planrt.plans.training import warm_up
from planrt.sharing.columns import curve, ids, intersection
from planrt.sharing.columns.ids import NORMALISATIONS, Keys, Places, key_of, keys_of, order_of
from planrt.sharing.columns.intersection import align, intersect
from planrt.sharing.columns.steps import Send, run_here
from planrt.vertical import Party, Table, intersection_size, logistic_regression, table_columns
from tests.vertical.tables import SHORT, parties, whole


def test_sizes_by_normalisation(make_worker):
    alice, bob = parties(make_worker, whole())
    assert intersection_size(alice, bob, normalise="casefold") == 40
    assert intersection_size(alice, bob, normalise="alphanumeric") == 40
    assert intersection_size(alice, bob) == 0
    assert intersection_size(bob, alice, normalise="casefold") == 40
    facts = table_columns(bob.worker, "t")
    assert (facts.rows, facts.ids, facts.columns, facts.label) == (50, ["who"], ["c", "d", "e", "y"], "y")


def test_several_id_columns(make_worker):
    one = Table(
        {"first": ["ann", "ann", "ben"], "last": ["lee", "roy", "lee"], "x": [1, 2, 3]}, ["first", "last"]
    )
    two = Table({"family": ["lee", "ROY", "poe"], "given": ["Ann", "ann", "ben"]}, ["given", "family"])
    alice, bob = make_worker("alice", {"t": one}), make_worker("bob", {"t": two})
    both = [Party(alice, "t", ["first", "last"]), Party(bob, "t", ["given", "family"])]
    assert intersection_size(*both, normalise="casefold") == 2
    assert intersection_size(Party(alice, "t", ["last", "first"]), both[1], normalise="casefold") == 0
    with pytest.raises(DataError, match=r"alice: id column 'first' has 1 duplicates"):
        intersection_size(Party(alice, "t", "first"), Party(bob, "t", "family"))


def test_refusals_name_party_and_column(make_worker):
    alice, bob = parties(make_worker, whole())
    carol = make_worker("carol")
    run = {"key_holder": carol, "normalise": "casefold", "batch_size": 20, **SHORT}
    table = {"who": [f"person {n}" for n in range(50)], "y": [0.0, 2.0] * 25, "text": ["a", "b"] * 25}
    table["gap"] = [1.0, None, float("nan"), float("inf"), *[0.0] * 46]
    ben = make_worker("ben", {"t": Table(table, "who", label="y"), "plain": [(torch.ones(2), 1)] * 3})

    def refused(kind, match, *owners, **options):
        with pytest.warns(UserWarning, match="1024 bits"), pytest.raises(kind, match=match):
            logistic_regression(*owners, **{**run, **options})

    def with_ben(*columns, label="y", ids="who", dataset="t"):
        return alice, Party(ben, dataset, ids, columns, label=label)

    refused(DataError, "ben: column 'gap' has 3 values that are missing or infinite", *with_ben("gap"))
    refused(DataError, "ben: column 'text' holds text", *with_ben("text"))
    refused(DataError, "ben: there is no column 'zed'", *with_ben("zed"))
    refused(DataError, "ben: label column 'y' has values that are neither 0 nor 1", *with_ben())
    refused(DataError, "ben: 'y' is no id column", *with_ben(ids="y"))
    refused(DataError, "ben: 'who' is an id column", *with_ben("who"))
    refused(DataError, "'plain' is no table", *with_ben("c", dataset="plain"))
    refused(UnknownDatasetError, "no data set under the key 'gone'", *with_ben("c", dataset="gone"))
    refused(AlignmentError, "nobody is in both tables", alice, bob, normalise="exact")
    with pytest.raises(OptionError, match="normalise must be one of"):
        intersection_size(alice, bob, normalise="soundex")


@pytest.mark.parametrize("sizes", [(0, 0), (0, 5), (5, 0), (1, 1), (40, 700)])
def test_two_parties_of_any_size(sizes):
    one, two = [
        [f"{n}".encode() for n in range(start, start + size)]
        for start, size in zip((0, 3), sizes, strict=True)
    ]
    common = set(one) & set(two)
    found = run_here([intersect(one, 1, "ab", size_only=True), intersect(two, 0, "ab", size_only=True)])
    assert [each["size"] for each in found] == [len(common)] * 2
    if not common:
        with pytest.raises(AlignmentError, match="nobody is in both"):
            run_here([intersect(one, 1, "ab"), intersect(two, 0, "ab")])
        return
    found = run_here([intersect(one, 1, "ab"), intersect(two, 0, "ab")])
    for keys, each in zip((one, two), found, strict=True):
        assert {keys[row] for row in each["rows"].tolist()} == common


def test_what_is_sent_tells_nothing_of_who_is_in_one_table_only():
    one, two = [f"{n}".encode() for n in range(200)], [f"{n}".encode() for n in range(100, 300)]
    sent = []
    for _ in range(2):
        parcels = []
        run_here(
            [intersect(one, 1, "ab"), intersect(two, 0, "ab")],
            seen=lambda number, send, parcels=parcels: parcels.append((number, send)),
        )
        sent.append(parcels)
    kinds = {send.kind for _, send in sent[0]}
    assert kinds == {"count", "blinded ids", "ids blinded twice"}
    points = [
        {bytes(point) for _, send in parcels if send.kind != "count" for point in send.tensors[0].numpy()}
        for parcels in sent
    ]
    assert not points[0] & points[1], "secrets are fresh"
    hashed = {curve.to_point(key) for key in (*one, *two)}
    assert not points[0] & hashed
    first = next(send.tensors[0] for number, send in sent[0] if (number, send.kind) == (0, "blinded ids"))
    on_curve = [
        curve._legendre_symbol(u * (u * u + 486662 * u + 1) % (2**255 - 19)) for u in map(_number, first)
    ]
    assert set(on_curve) == {1}, "a point of the twist would tell a bit of its id"


def _number(point):
    return int.from_bytes(point.numpy().tobytes(), "little")


def test_points_are_those_of_rfc_7748():
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    blinder = curve.Blinder()
    secret = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    blinder._secret = X25519PrivateKey.from_private_bytes(secret)
    u = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    given = torch.frombuffer(bytearray(u), dtype=torch.uint8)[None]
    wanted = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    assert bytes(blinder.blind_again(given, whose="x")[0].numpy()).hex() == wanted


def test_dishonest_parcels_are_refused():
    keys = [f"{n}".encode() for n in range(4)]

    def lying(count, points):
        def role():
            yield Send(0, "count", [torch.tensor(count)])
            yield Send(0, "blinded ids", [points])
            return (yield from intersect(keys, 0, "ab"))

        return role()

    good = curve.Blinder().blind(keys)
    zero = torch.zeros(4, 32, dtype=torch.uint8)
    cases = [
        ([4], zero, "small order"),
        ([4], good[:3], r"uint8\[3, 32\]"),
        ([4], good.float(), "float32"),
        ([4], torch.cat([good[:3], good[:1]]), "one id twice"),
        ([-1], good, "-1 ids"),
        ([10**12], good, "there can be"),
        ([4, 4], good, r"int64\[2\]"),
    ]
    for count, points, match in cases:
        with pytest.raises(JointError, match=match):
            run_here([intersect(keys, 1, "ab"), lying(count, points)])


def test_three_parties_agree_on_the_order():
    tables = [[f"{n}".encode() for n in range(start, start + 30)] for start in (0, 10, 5)]
    found = run_here([align(keys, me, 3, "abc", 7) for me, keys in enumerate(tables)])
    people = [[keys[row] for row in each["rows"].tolist()] for keys, each in zip(tables, found, strict=True)]
    assert people[0] == people[1] == people[2]
    common = [f"{n}".encode() for n in range(10, 30)]
    assert people[0] == [common[place] for place in order_of(common, 7)]
    disjoint = [[b"1", b"2"], [b"1"], [b"2"]]
    with pytest.raises(AlignmentError, match="in all tables"):
        run_here([align(keys, me, 3, "abc", 7) for me, keys in enumerate(disjoint)])


@pytest.mark.parametrize(
    ("name", "same", "different"),
    [
        ("exact", ("a", "a"), ("a", "a ")),
        ("strip", (" a ", "a"), ("A", "a")),
        ("casefold", ("STRASSE  1", "straße 1"), ("a-b", "ab")),
        ("casefold", ("\ufb01", "FI"), ("e\u0301", "e")),
        ("alphanumeric", ("+49 (170) 1", "49-1701"), ("1", "2")),
    ],
)
def test_normalisations(name, same, different):
    change = NORMALISATIONS[name]
    assert change(same[0]) == change(same[1])
    assert change(different[0]) != change(different[1])


def test_keys_of_several_columns_do_not_run_together():
    one = keys_of([("p", ["ab"]), ("q", ["c"])], "exact", whose="x")
    assert list(one) != list(keys_of([("p", ["a"]), ("q", ["bc"])], "exact", whose="x"))
    assert list(one) == [key_of(["ab", "c"], "exact")]
    with pytest.raises(DataError, match="x: id column 'p' has 1 values of which 'strip' leaves nothing"):
        keys_of([("p", ["a", "  "])], "strip", whose="x")
    assert np.unique(
        [len(set(keys_of([("p", ["a", "b"])], name, whose="x"))) for name in NORMALISATIONS]
    ) == [2]


def test_keys_in_one_block_are_a_sequence():
    given = [b"a", b"", b"bc", b"def", b"a"]
    keys = Keys(given)
    assert list(keys) == given
    assert (keys[-1], keys[-3], keys[1:4], len(keys)) == (b"a", b"bc", given[1:4], 5)
    with pytest.raises(IndexError):
        keys[5]
    places = Places(keys, [3, 0, 2])
    assert [places.find(key) for key in (b"a", b"bc", b"def", b"", b"x")] == [1, 2, 0, None, None]
    assert [Places(keys, ()).find(b"a"), len(Places(keys, ()))] == [None, 0]


def test_keys_whose_hashes_are_the_same_are_told_apart():
    """A hash is a hint, never the answer: also where all hashes are one."""

    class Alike(bytes):
        def __hash__(self):
            return 7

    keys = [Alike(b"%d" % n) for n in range(50)]
    places = Places(keys, range(50))
    assert [places.find(key) for key in keys] == list(range(50))
    assert places.find(Alike(b"x")) is None
    assert ids._duplicates(keys) == 0
    assert ids._duplicates([*keys, *keys[:3], keys[0]]) == 4


@pytest.mark.parametrize("count", [0, 1, 300])
def test_points_are_looked_up_with_their_zeros(count):
    """Zeros at the end of a point are part of it, and whoever is not there is not found."""
    generator = torch.Generator().manual_seed(count)
    points = torch.randint(0, 256, (count, curve.WIDTH), dtype=torch.uint8, generator=generator)
    points[::3, 20:] = 0
    points[1::3, 0] = 0
    known = curve.PointSet(points.split(7))
    assert known.has(points.flip(0)).all()
    assert not known.has_duplicates
    assert not known.has(points ^ 1).any()
    listed = sorted(bytes(one) for one in points.numpy())
    assert [bytes(one) for one in known.sorted.numpy()] == listed
    assert curve.PointSet([points, points[:1]]).has_duplicates == (count > 0)


class _Masks:
    """In place of points on the curve: 32 bytes of a hash, and secrets that are added to them bit by bit. It keeps no
    secrets; everything else is as of the curve, in no time."""

    def __init__(self):
        self._secret = np.frombuffer(secrets.token_bytes(curve.WIDTH), np.uint8)

    def blind(self, keys):
        hashed = b"".join(hashlib.sha256(key).digest() for key in keys)
        return self.blind_again(torch.frombuffer(bytearray(hashed), dtype=torch.uint8).view(-1, curve.WIDTH))

    def blind_again(self, points, *, whose=""):
        return torch.from_numpy(points.numpy() ^ self._secret)


@contextlib.contextmanager
def _memory_for_each(rows):
    """A list that has how many bytes the block took at its peak, over `rows`."""
    found = []
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield found
        found.append((tracemalloc.get_traced_memory()[1] - before) / rows)
    finally:
        tracemalloc.stop()


def test_memory_for_each_id_is_bounded(make_worker, monkeypatch):
    """Both workers are here, and what they send each other is on its way here, too: a million ids a side are well
    within 2 GB. The curve is left out; it takes time and no memory."""
    monkeypatch.setattr(intersection, "Blinder", _Masks)
    rows = 20_000
    ids_ = [f"person {n:07}" for n in range(rows * 3 // 2)]
    one = Party(make_worker("alice", {"t": Table({"id": ids_[:rows]}, "id")}), "t", "id")
    two = Party(make_worker("bob", {"t": Table({"id": ids_[-rows:]}, "id")}), "t", "id")
    few = Party(make_worker("carl", {"t": Table({"id": ids_[:100]}, "id")}), "t", "id")
    warm_up()  # which servers do in a thread of their own
    assert intersection_size(one, few) == 100  # what is loaded at first use
    with _memory_for_each(2 * rows) as found:
        assert intersection_size(one, two) == rows // 2
    assert found[0] < 200


def test_memory_for_each_id_is_bounded_where_it_is_told_who_it_is(monkeypatch):
    monkeypatch.setattr(intersection, "Blinder", _Masks)
    rows = 20_000
    tables = [
        keys_of([("id", range_of(rows, start))], "strip", whose="x") for start in (0, rows // 4, rows // 2)
    ]
    run_here([align(keys, me, 3, "abc", 7) for me, keys in enumerate(tables)])
    with _memory_for_each(3 * rows) as found:
        people = run_here([align(keys, me, 3, "abc", 7) for me, keys in enumerate(tables)])
    assert {each["size"] for each in people} == {rows // 2}
    assert found[0] < 200


def range_of(rows, start):
    return [f"person {n:07}" for n in range(start, start + rows)]
