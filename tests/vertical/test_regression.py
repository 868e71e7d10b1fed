"""Regressions of several owners: what a user calls, on both transports, against plain PyTorch on the joined table."""

import numpy as np
import pytest
import torch

from planrt.errors import (
    AlignmentError,
    CiphertextError,
    OptionError,
    PolicyRefusedError,
    ValueRangeError,
)
from planrt.vertical import Party, Table, linear_regression, logistic_regression
from tests.vertical.tables import (
    SHORT,
    ends_of_too_large_a_rate,
    halves,
    joined,
    parties,
    some,
    trained,
    whole,
)

pytestmark = pytest.mark.filterwarnings("ignore:a key of 1024 bits")
PRECISION = 2e-6
"""Of weights after a few epochs, with 17 fractional bits."""


def flat(weights):
    return np.array([weight for owned in weights.values() for weight in owned.values()])


@pytest.mark.parametrize("model", ["linear", "logistic"])
def test_weights_are_those_of_the_joined_table(make_worker, model):
    table = whole(model=model)
    alice, bob = parties(make_worker, table)
    values, labels = joined(table, seed=5)
    labels = labels / 4 if model == "linear" else labels
    if model == "linear":  # what is served has to have it too
        bob = Party(make_worker("ben", {"t": _quartered(table)}), "t", "who", ["c", "d", "e"], label="y")
    open_run = linear_regression if model == "linear" else logistic_regression
    about = {"epochs": 3, "batch_size": 20, "lr": 0.1, "l2": 0.05, "seed": 5}
    with open_run(
        alice, bob, key_holder=make_worker("carol"), normalise="casefold", standardise=False, **about, **SHORT
    ) as run:
        assert (run.size, run.people) == (40, 40)
        losses = run.fit()
        found = run.weights()
        ids = [table["id"][row] for row in (12, 30)]
        predictions = run.predict(ids)
        with pytest.raises(OptionError, match="0 are left"):
            run.fit(1)
    expected, expected_losses = trained(values, labels, model, **about)
    assert list(found) == ["alice", bob.worker.id]
    assert [*found["alice"], *found[bob.worker.id]] == ["a", "b", "c", "d", "e", "intercept"]
    np.testing.assert_allclose(flat(found), expected, atol=PRECISION)
    np.testing.assert_allclose(losses, expected_losses, atol=PRECISION)
    rows = np.array([[table[name][row] for name in "abcde"] for row in (12, 30)])
    scores = torch.from_numpy(rows @ expected[:-1] + expected[-1])
    wanted = scores if model == "linear" else torch.sigmoid(scores)
    torch.testing.assert_close(predictions, wanted, atol=1e-5, rtol=0)


def _quartered(table):
    _, right = halves(table)
    right.columns["y"] = right.columns["y"] / 4
    return right


def test_three_owners_have_the_people_of_all_three(make_worker):
    table = whole(90)
    one = Table(some(table, ["id", "a", "b"], range(70)), "id")
    two = Table(some(table, ["id", "c"], range(5, 85)), "id")
    three = Table(some(table, ["id", "d", "e", "y"], range(10, 90)), "id")
    owners = [
        Party(make_worker("alice", {"t": one}), "t", "id", ["a", "b"]),
        Party(make_worker("bob", {"t": two}), "t", "id", ["c"]),
        Party(make_worker("dan", {"t": three}), "t", "id", ["d", "e"], label="y"),
    ]
    about = {"epochs": 2, "batch_size": 30, "lr": 0.3}
    with logistic_regression(
        *owners, key_holder=make_worker("carol"), standardise=False, **about, **SHORT
    ) as run:
        assert run.size == 60
        run.fit()
        found = flat(run.weights())
    bigger = {name: values[10:70] for name, values in table.items()}
    padded = {name: [*values[:10], *values, *values[-10:]] for name, values in bigger.items()}
    padded["id"] = [f"pad {n}" for n in range(10)] + list(bigger["id"]) + [f"end {n}" for n in range(10)]
    expected, _ = trained(*joined(padded, normalise="strip"), "logistic", **about)
    np.testing.assert_allclose(found, expected, atol=PRECISION)


def test_held_out_people_early_stop_and_raw_columns(make_worker):
    table = whole()
    table["a"] = table["a"] * 1000 + 50_000  # far out of range, unless it is standardised
    alice, bob = parties(make_worker, table)
    carol = make_worker("carol")
    about = {"key_holder": carol, "normalise": "casefold", "holdout": 0.25, "batch_size": 30, **SHORT}
    with logistic_regression(alice, bob, epochs=40, lr=1.0, **about) as run:
        assert (run.size, run.people) == (40, 30)
        losses = run.fit(tolerance=1e-3, patience=2)
        assert 3 <= len(losses) < 40
        assert losses[-1] < losses[0] == pytest.approx(np.log(2))
        found = run.evaluate()
        assert found.people == 10
        assert found.accuracy >= 0.8
    with pytest.raises(ValueRangeError, match=r"alice.*column 'a' is out of the range.*standardise"):
        _fit(logistic_regression(alice, bob, standardise=False, **about))


def _fit(run):
    with run:
        run.fit(1)


def test_a_learning_rate_that_is_too_large_is_told(make_worker):
    alice, bob = parties(make_worker, whole())
    run = logistic_regression(
        alice, bob, key_holder=make_worker("carol"), normalise="casefold", lr=1e4, batch_size=20, **SHORT
    )
    ends_of_too_large_a_rate(run, "smaller learning rate")


def test_predictions_and_weights_stay_where_they_may_be(make_worker):
    table = whole()
    alice, bob = parties(make_worker, table)
    with logistic_regression(
        alice, bob, key_holder=make_worker("carol"), normalise="casefold", batch_size=20, epochs=1,
        predictions_to="alice", weights_to_client=False, **SHORT,
    ) as run:  # fmt: skip
        run.fit()
        assert run.predict([table["id"][20]]) is None
        (kept,) = alice.worker.search("#predictions")
        assert kept.shape == (1,)
        with pytest.raises(Exception, match="nobody"):
            kept.get()
        assert bob.worker.search("#predictions") == []
        with pytest.raises(AlignmentError, match="person 1"):
            run.predict([table["id"][20], table["id"][3]])
    with (
        logistic_regression(
            alice, bob, key_holder=make_worker("dora"), normalise="casefold", batch_size=20, epochs=1,
            weights_to_client=False, **SHORT,
        ) as run,
        pytest.raises(PolicyRefusedError, match="weights_to_client"),
    ):  # fmt: skip
        run.weights()


def test_wrong_arguments_are_told_before_anything_is_sent(make_worker):
    alice, bob = parties(make_worker, whole())
    carol = make_worker("carol")

    def wrong(match, *owners, kind=OptionError, **options):
        with pytest.raises(kind, match=match):
            logistic_regression(*(owners or (alice, bob)), **{"key_holder": carol, **SHORT, **options})

    wrong("too short", allow_short_key=False)
    wrong("key_bits", key_bits=1000)
    wrong("batch_size", batch_size=1)
    wrong("lr", lr=float("nan"))
    wrong("l2", l2=-1)
    wrong("epochs", epochs=0)
    wrong("precision", precision=60)
    wrong("holdout", holdout=1.5)
    wrong("seed", seed=-1)
    wrong("normalise", normalise="lower")
    wrong("given twice", key_holder=alice.worker)
    wrong("two or more", bob)
    wrong("one party names the label", alice, Party(bob.worker, "t", "who", ["c"]))
    wrong("gives no columns", Party(alice.worker, "t", "id"), bob)
    wrong("equally many id columns", Party(alice.worker, "t", ["id", "id2"], ["a"]), bob)
    wrong("between workers", key_holder="carol")
    wrong("twice as many", batch_size=7, normalise="casefold")
    wrong("predictions go to", predictions_to="zed")
    with logistic_regression(
        alice, bob, key_holder=carol, normalise="casefold", batch_size=20, **SHORT
    ) as run:
        for people in ([], "person 20", [None], [("person 20", "x")], ["person 20"] * 100_001):
            with pytest.raises(OptionError, match="people|person|nobody"):
                run.predict(people)
        assert len(run.predict(np.array(["person 20", "person 21"]))) == 2
    with pytest.raises(OptionError, match=r"columns=\['a'\]"):
        Party(alice.worker, "t", "id", "a")
    with pytest.raises(OptionError, match="label, and no column"):
        Party(bob.worker, "t", "who", ["y"], label="y")


def test_what_the_key_holder_decrypts():
    from planrt.sharing.columns import linear
    from planrt.sharing.columns.steps import Send, run_here

    terms = linear.Terms("logistic", ("alice", "bob", "carol"), 1, 20, 20, 0.1, 0.0, 0, 1024)
    told = []

    def holder():
        made = linear.KeyHolder(terms, [2, 2], lambda *facts: told.append(facts))
        yield from made.give_key()
        return (yield from made.epoch(0))

    def owner(number, send):
        values = np.random.default_rng(number).normal(size=(20, 2))
        mine = linear.Owner(
            terms, number, values, ["p", "q"], np.ones(20) if number else None, small_batches=True
        )
        yield from mine.take_key()
        if number:
            yield from linear.take(2, "loss")
        yield Send(2, "masked gradient", send(mine.key))
        yield from linear.take(2, "decrypted")

    cases = [
        (lambda key: key.packed([key.encrypt(5)]), "no mask"),
        (lambda key: key.packed([key.encrypt(-5)]), "no mask"),
        (lambda key: key.packed([key.encrypt(key.n // 3)] * 2), "something else"),
        (lambda key: [torch.zeros(1, key.width, dtype=torch.uint8), key.fingerprint], "another key"),
        (lambda key: [torch.zeros(1, 512, dtype=torch.uint8), key.fingerprint], "another key"),
        (lambda key: [torch.full((1, key.width), 255, dtype=torch.uint8), key.fingerprint], "another key"),
        (lambda key: [key.to_rows([key.encrypt(5)]), key.fingerprint.flip(0)], "another key than .*carol"),
        (lambda key: [torch.zeros(3)], "something else"),
    ]
    for send, match in cases:
        with pytest.raises(CiphertextError, match=f"alice.*{match}"):
            run_here([owner(0, send), owner(1, send), holder()])
    assert told == [("alice", 1, True)] * len(cases)


def test_packing_needs_a_fifth_of_the_operations():
    from planrt.sharing.columns.packing import layout_for

    layout = layout_for(2048, 64)
    assert layout.rows >= 6
    assert layout.columns >= 6
    assert layout.slot * layout.places <= 2048 - 38
    rows, columns = 64, 15
    assert rows / layout.chunks(rows) >= 5
    assert columns / layout.groups(columns) >= 5
    with pytest.raises(OptionError, match="no room"):
        layout_for(128, 64, 40)


@pytest.mark.parametrize("seed", range(5))
def test_packed_products_are_inner_products(seed):
    from planrt.sharing.columns import packing

    random = np.random.default_rng(seed)
    rows, columns = int(random.integers(2, 64)), int(random.integers(1, 14))
    layout = packing.layout_for(1024, 64)
    values = random.normal(size=(rows, columns))
    residuals = random.normal(size=rows)
    values *= packing.COLUMN_RMS * 8 / np.sqrt((values**2).sum(0))  # as large as a column may be
    residuals *= packing.RESIDUAL_RMS * 8 / np.sqrt((residuals**2).sum())
    packing.check_columns(values * 0.999, ["x"] * columns, layout, whose="alice")
    whole_values = packing.fixed(values, layout.value_bits)
    whole_residuals = packing.fixed(residuals, layout.residual_bits)
    plain = packing.packed_residuals(whole_residuals, layout)
    found = []
    for group in packing.packed_columns(whole_values, layout):
        product = sum(a * b for a, b in zip(plain, group, strict=True))
        assert packing.looks_unmasked(product, 2**1024 - 105, layout)
        found += packing.unpacked(product, min(layout.columns, columns - len(found)), layout)
    exact = [
        sum(int(d) * int(x) for d, x in zip(whole_residuals, column, strict=True))
        for column in whole_values.T
    ]
    assert found == exact
