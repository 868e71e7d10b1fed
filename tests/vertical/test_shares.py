"""Regressions on secret shares: what a user calls, on both transports, against plain PyTorch on the joined table."""

import asyncio
import os
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from planrt.cli import main
from planrt.errors import (
    DataError,
    JointError,
    NotApprovedError,
    OptionError,
    PolicyRefusedError,
    RemoteError,
    ValueRangeError,
)
from planrt.plans.policy.rules import Policy
from planrt.sharing.columns import descent, shared
from planrt.sharing.columns.steps import run_here, take
from planrt.vertical import Party, Table, async_logistic_regression, linear_regression, logistic_regression
from planrt.workers import VirtualWorker
from planrt.workers.machine.joint.terms import check
from planrt.workers.wire import messages as m
from tests.vertical.tables import (
    SHORT,
    ends_of_too_large_a_rate,
    halves,
    joined,
    parties,
    some,
    trained,
    whole,
    with_changed,
)
from tests.vertical.training import once_it_trains

PRECISION = 2e-6
"""Of weights after a few epochs, with 17 fractional bits; of the exact logistic loss 5e-6."""


def on_shares(make_worker, **more):
    return {"method": "shares", "crypto_provider": make_worker("james"), "normalise": "casefold", **more}


def flat(weights):
    return np.array([weight for owned in weights.values() for weight in owned.values()])


# ------------------------------------------------------------------------------------ as on the joined table


@pytest.mark.parametrize("model", ["linear", "logistic", "exact"])
def test_weights_are_those_of_the_joined_table(make_worker, model):
    table = whole(model="linear" if model == "linear" else "logistic")
    alice, bob = parties(make_worker, table)
    values, labels = joined(table, seed=5)
    about = {
        "epochs": 3,
        "batch_size": 15,
        "lr": 0.1,
        "l2": 0.05,
        "seed": 5,
    }  # of 40 people: the last batch has 10
    options = on_shares(make_worker, standardise=False, **about)
    run = (
        linear_regression(alice, bob, **options)
        if model == "linear"
        else logistic_regression(alice, bob, exact=model == "exact", **options)
    )
    with run:
        assert (run.size, run.people) == (40, 40)
        losses = run.fit(1)
        run.weights()  # to look at them changes nothing
        losses = run.fit()
        found = run.weights()
        ids = [table["id"][row] for row in (12, 30)]
        predictions = run.predict(ids)
        with pytest.raises(OptionError, match="0 are left"):
            run.fit(1)
    kind = "linear" if model == "linear" else "logistic"
    expected, expected_losses = trained(values, labels, kind, exact=model == "exact", **about)
    assert [*found["alice"], *found["bob"]] == ["a", "b", "c", "d", "e", "intercept"]
    close = 5e-6 if model == "exact" else PRECISION
    np.testing.assert_allclose(flat(found), expected, atol=close)
    np.testing.assert_allclose(losses, expected_losses, atol=5 * close)
    rows = np.array([[table[name][row] for name in "abcde"] for row in (12, 30)])
    scores = torch.from_numpy(rows @ expected[:-1] + expected[-1])
    torch.testing.assert_close(
        predictions, scores if model == "linear" else scores.sigmoid(), atol=5e-5, rtol=0
    )


@pytest.mark.filterwarnings("ignore:a key of 1024 bits")
def test_both_methods_give_the_same(make_worker):
    alice, bob = parties(make_worker, whole())
    about = {
        "epochs": 2,
        "batch_size": 20,
        "normalise": "casefold",
        "holdout": 0.2,
        "allow_small_batches": True,
    }
    with logistic_regression(alice, bob, key_holder=make_worker("carol"), **about, **SHORT) as run:
        losses, weights, figures = run.fit(), flat(run.weights()), run.evaluate()
    with logistic_regression(
        alice, bob, method="shares", crypto_provider=make_worker("james"), **about
    ) as run:
        np.testing.assert_allclose(run.fit(), losses, atol=1e-5)
        again = run.evaluate()
        np.testing.assert_allclose(flat(run.weights()), weights, atol=2 * PRECISION)
    assert (again.people, again.accuracy) == (figures.people, figures.accuracy)
    assert again.loss == pytest.approx(figures.loss, abs=1e-5)


def test_three_owners_one_with_the_label_alone(make_worker):
    table = whole(90)
    owners = [
        Party(make_worker(name, {"t": Table(some(table, ["id", *names], rows), "id")}), "t", "id", columns, label=label)
        for name, names, rows, columns, label in (
            ("alice", ["a", "b"], range(70), ["a", "b"], None),
            ("bob", ["y"], range(5, 85), [], "y"),
            ("dan", ["c", "d", "e"], range(10, 90), ["c", "d", "e"], None),
        )
    ]  # fmt: skip
    about = {"epochs": 2, "batch_size": 25, "lr": 0.3, "l2": 0.1}
    with logistic_regression(
        *owners, **on_shares(make_worker, standardise=False, **about) | {"normalise": "strip"}
    ) as run:
        assert run.size == 60
        run.fit()
        found = run.weights()
    bigger = {name: list(values[10:70]) for name, values in table.items()}
    padded = {name: [*values[:10], *values, *values[-10:]] for name, values in bigger.items()}
    padded["id"] = [f"pad {n}" for n in range(10)] + bigger["id"] + [f"end {n}" for n in range(10)]
    expected, _ = trained(*joined(padded, normalise="strip"), "logistic", **about)
    order = [*found["alice"].values(), *found["dan"].values(), *found["bob"].values()]
    np.testing.assert_allclose(order, expected, atol=PRECISION)


def test_held_out_people_early_stop_and_raw_columns(make_worker):
    table = whole()
    table["a"] = table["a"] * 1000 + 50_000  # far out of range, unless it is standardised
    alice, bob = parties(make_worker, table)
    about = on_shares(make_worker, holdout=0.25, batch_size=30)
    with logistic_regression(alice, bob, epochs=40, lr=1.0, **about) as run:
        assert (run.size, run.people) == (40, 30)
        losses = run.fit(tolerance=1e-3, patience=2)
        assert 3 <= len(losses) < 40
        assert losses[-1] < losses[0] == pytest.approx(np.log(2), abs=1e-5)
        found = run.evaluate()
        assert found.people == 10
        assert found.accuracy >= 0.8
    with pytest.raises(ValueRangeError, match=r"alice: column 'a' is out of the range.*standardise"):
        logistic_regression(alice, bob, standardise=False, **about)


# ------------------------------------------------------------------------------------------------ who gets what


def test_predictions_and_weights_stay_where_they_may_be(make_worker):
    table = whole()
    alice, bob = parties(make_worker, table)
    with logistic_regression(
        alice, bob, predictions_to="alice", weights_to_client=False, **on_shares(make_worker, batch_size=20, epochs=1)
    ) as run:  # fmt: skip
        run.fit()
        assert run.predict([table["id"][20]]) is None
        (kept,) = alice.worker.search("#predictions")
        with pytest.raises(Exception, match="nobody"):
            kept.get()
        assert bob.worker.search("#predictions") == []
        with pytest.raises(PolicyRefusedError, match="weights_to_client"):
            run.weights()


def test_the_client_sees_the_loss_and_what_it_asks_for(make_worker):
    alice, bob = parties(make_worker, whole())
    from planrt.loop import run as wait

    with logistic_regression(alice, bob, **on_shares(make_worker, batch_size=20)) as run:
        answers = wait(run._step("epoch", epoch=0), instead="-")
        assert [(sorted(done.figures), tensors) for done, tensors in answers] == [
            (["loss"], []), (["loss"], []), ([], []),
        ]  # fmt: skip
        run.losses.append(answers[0][0].figures["loss"])
        body = m.WorkJoint(run.id, "weights")
        with pytest.raises(RemoteError, match="weights of alice are in shares"):
            wait(alice.worker.ask(m.JointDone, body), instead="-")
        with pytest.raises(JointError):
            run.fit(1)


def test_it_is_awaited_on_a_loop_of_its_own_and_a_worker_keeps_none_of_it(make_worker):
    alice, bob = parties(make_worker, whole())
    options = on_shares(make_worker, epochs=1, batch_size=20)
    with logistic_regression(alice, bob, **options) as run:
        losses, asked = run.fit(), run._opens[0]

    async def awaited():
        async with await async_logistic_regression(alice, bob, **options) as run:
            return await run.async_fit()

    assert len(asyncio.run(awaited())) == len(losses) == 1
    with pytest.raises(JointError, match="a regression on shares is not kept"):
        check(msgspec.structs.replace(asked, keep="mine"))


def facts(kind="second order", rows=24, batch=10, owners=2, columns=4, **more):
    """(terms, each owner's columns, labels)"""
    random = np.random.default_rng(1)
    values = random.normal(size=(rows, columns))
    labels = random.normal(size=rows) if kind == "squares" else (values.sum(1) > 0).astype(float)
    parts = np.array_split(values, owners, axis=1)
    counts = tuple(part.shape[1] + (owner == owners - 1) for owner, part in enumerate(parts))
    terms = descent.Terms(
        "linear" if kind == "squares" else "logistic", (*(f"owner{n}" for n in range(owners)), "james"), owners - 1,
        rows, batch, more.pop("lr", 0.1), more.pop("l2", 0.01), 3, loss_kind=kind, columns=counts, **more,
    )  # fmt: skip
    return terms, parts, labels


def roles(terms, parts, labels):
    last = len(parts) - 1
    owners = [
        shared.Owner(
            terms, number, part, [f"c{n}" for n in range(part.shape[1])], labels if number == last else None, "y"
        )
        for number, part in enumerate(parts)
    ]  # fmt: skip
    provider = shared.Provider(terms)
    run_here([one.begin() for one in (*owners, provider)])
    return owners, provider


@pytest.mark.parametrize(("kind", "rounds"), [("second order", 4), ("exact", 12)])
@pytest.mark.parametrize("owners", [2, 3])
def test_what_owners_send_each_other_is_uniform_and_the_provider_gets_nothing(kind, rounds, owners):
    terms, parts, labels = facts(kind, rows=60, batch=20, owners=owners)
    made, provider = roles(terms, [part * 0 for part in parts], labels * 0)
    sent = []
    run_here([one.epoch(0) for one in (*made, provider)], seen=lambda who, what: sent.append((who, what)))
    openings = [what for who, what in sent if who == 0 and what.to == 1]
    assert {what.kind for what in openings} == {"opening"}
    assert len(openings) == 3 * rounds + 4 + 2  # the look at the range, its outcome, and the loss
    words = torch.cat(
        [one.flatten() for what in openings[:-2] for one in what.tensors if one.dtype == torch.int64]
    )
    assert len(words) > 500
    assert len(words.unique()) == len(words)
    bits = torch.stack([(words >> place) & 1 for place in range(64)]).double().mean(1)
    assert bits.sub(0.5).abs().max() < 6 * 0.5 / len(words) ** 0.5
    to_provider = {(what.kind, len(what.tensors)) for _, what in sent if what.to == owners}
    assert to_provider == {("taken", 0)}


def test_what_is_shared_at_the_beginning_are_seeds():
    terms, parts, labels = facts()
    sent = []
    owners = [
        shared.Owner(terms, number, part, ["p", "q"], labels if number else None) for number, part in enumerate(parts)
    ]  # fmt: skip
    run_here(
        [one.begin() for one in (*owners, shared.Provider(terms))], seen=lambda who, what: sent.append(what)
    )
    assert {(what.kind, *[one.nbytes for one in what.tensors]) for what in sent} == {("seed of shares", 16)}
    whole_table = owners[0]._x + owners[1]._x
    np.testing.assert_allclose(
        np.ldexp(whole_table.numpy().astype(float), -17), np.column_stack([*parts, np.ones(24)]), atol=2**-18
    )


# ------------------------------------------------------------------------------------------ precision and range


@pytest.mark.parametrize("kind", ["squares", "second order"])
@pytest.mark.parametrize("precision", [10, 17, 20])
def test_a_step_is_as_exact_as_is_said(kind, precision):
    for seed in range(3):
        terms, parts, labels = facts(kind, rows=40, batch=40, lr=0.3, precision=precision)
        terms = replace(terms, seed=seed)
        parts = [np.rint(part * 2**precision) / 2**precision for part in parts]
        labels = np.rint(labels * 2**precision) / 2**precision
        owners, provider = roles(terms, parts, labels)
        values = np.column_stack([*parts, np.ones(40)])
        rate = terms.lr * float(descent.MODELS[kind].slope)
        target = labels if kind == "squares" else 4 * labels - 2
        before = np.zeros(5)
        for epoch in range(3):
            run_here([one.epoch(epoch) for one in (*owners, provider)])
            run_here([*(one.release() for one in owners), iter_nothing()])
            weights = np.concatenate([one.weights for one in owners])
            step = rate * values.T @ (values @ before - target) / 40
            after = before - step - terms.lr * terms.l2 * before * [1, 1, 1, 1, 0]
            mean = np.abs(values).mean(0)
            bound = 2.0**-26 + rate * mean * 2.0**-precision + 2.0**-23 * (np.abs(step) + np.abs(before))
            assert (np.abs(weights - after) < bound).all()
            before = weights


def iter_nothing():
    yield from ()
    return {}


@pytest.mark.parametrize("seed", range(40))
def test_nothing_within_the_limits_leaves_62_bits(seed):
    random = np.random.default_rng(seed)
    kind = ("squares", "second order", "exact")[seed % 3]
    terms, _, _ = facts(
        kind, columns=int(random.integers(2, 60)), precision=int(random.integers(8, 21)),
        lr=float(10 ** random.uniform(-4, 1)), l2=float(10 ** random.uniform(-4, 0)),
    )  # fmt: skip
    rows = int(random.integers(1, 20_000))
    try:
        numbers = descent.numbers_for(terms, rows)
    except OptionError:
        return
    columns, bits, most = sum(terms.columns), terms.precision, 2**62
    largest = descent.LARGEST * 2**bits
    residual = 2 * 2**bits if kind == "exact" else numbers.residuals
    label = numbers.residuals * 2**26
    assert columns * largest * numbers.weights + label < most
    assert numbers.factor * rows * largest * residual + numbers.decay * numbers.weights < most
    assert rows * numbers.residuals**2 < most
    assert 2**22 <= numbers.divisor < most
    exact = 2.0 ** (2 * bits - 26) * numbers.factor * rows / (terms.lr * float(descent.MODELS[kind].slope))
    assert numbers.divisor == pytest.approx(exact, rel=2**-22)


def test_a_learning_rate_that_is_too_large_is_told(make_worker):
    alice, bob = parties(make_worker, whole(model="linear"))
    run = linear_regression(alice, bob, **on_shares(make_worker, lr=8.0, batch_size=20, epochs=50))
    ends_of_too_large_a_rate(run, "left the range of shares.*smaller learning rate")


# ----------------------------------------------------------------------------------------------------- bad input


def test_wrong_arguments_are_told_before_anything_is_sent(make_worker):
    alice, bob = parties(make_worker, whole())
    james = make_worker("james")

    def wrong(match, *owners, **options):
        with pytest.raises(OptionError, match=match):
            logistic_regression(
                *(owners or (alice, bob)), **{"method": "shares", "crypto_provider": james, **options}
            )

    wrong("method is 'paillier' or 'shares', not 'spdz'", method="spdz")
    wrong("takes crypto_provider=", crypto_provider=None)
    wrong("takes crypto_provider=.*no key_holder", key_holder=make_worker("carol"))
    wrong("takes key_holder=", method="paillier")
    wrong("takes key_holder=", method="paillier", crypto_provider=None)
    wrong(
        "exact=True is for method='shares'",
        method="paillier",
        crypto_provider=None,
        key_holder=james,
        exact=True,
    )
    wrong("exact must be True or False", exact="yes")
    wrong("keep= and resume= are for method='paillier'", keep="mine")
    wrong("keep= and resume= are for method='paillier'", keep="mine", resume=True)
    wrong("nobody has a key", key_bits=2048)
    wrong("nobody has a key", allow_short_key=True)
    wrong("from 8 to 20", precision=24)
    wrong("from 8 to 20", precision=True)
    wrong("leave no room", lr=1e6)
    wrong("changes nothing", lr=1e-14, precision=20)
    wrong("leave no room", l2=1e8)
    wrong("given twice", crypto_provider=alice.worker)
    wrong("between workers", crypto_provider="james")
    wrong("batch_size", batch_size=0)
    wrong("gives no columns", Party(alice.worker, "t", "id"), bob)


def test_tables_that_do_not_fit_are_told_by_party_and_column(make_worker):
    table = whole()
    table["y"] = table["y"] * 2
    alice, bob = parties(make_worker, table)
    about = on_shares(make_worker)
    with pytest.raises(DataError, match="bob: label column 'y' has values that are neither 0 nor 1"):
        logistic_regression(alice, bob, **about)
    table = whole(model="linear")
    table["y"] = table["y"] * 1e9
    _, right = halves(table)
    far = Party(make_worker("ben", {"t": right}), "t", "who", ["c"], label="y")
    with pytest.raises(ValueRangeError, match="ben: label column 'y' is out of the range of shares"):
        linear_regression(alice, far, standardise=False, **about)
    few = Table(some(whole(), ["id", "c", "d", "e", "y"], range(44, 60)), "id")
    small = Party(make_worker("bea", {"t": few}), "t", "id", ["c", "d", "e"], label="y")
    with pytest.raises(OptionError, match="bea: 6 people are fewer than twice as many as its 4 columns"):
        logistic_regression(alice, small, **about)
    with logistic_regression(alice, small, allow_small_batches=True, **about) as run:
        assert run.people == 6
        run.fit(1)


def test_who_does_not_follow_the_protocol_is_named():
    terms, parts, labels = facts()

    cases = [
        (0, "opening", lambda tensors: tensors[:1], "owner0' opened something else"),
        (0, "opening", lambda tensors: [tensors[0].double(), *tensors[1:]], "owner0' opened something else"),
        (2, "corrections", lambda tensors: tensors + tensors, "james' sent another number of corrections"),
        (2, "corrections", lambda tensors: [], "james' sent another number of corrections"),
        (2, "corrections", lambda tensors: tensors[::-1], "james' sent other corrections than are due"),
    ]
    for who, kind, change, match in cases:
        owners, provider = roles(terms, parts, labels)
        running = [one.epoch(0) for one in (*owners, provider)]
        running[who] = with_changed(running[who], kind, change)
        with pytest.raises(JointError, match=match):
            run_here(running)

    def silent():
        yield from take(0, "never")

    owners, provider = roles(terms, parts, labels)
    with pytest.raises(JointError, match="wait for each other"):
        run_here([owners[0].epoch(0), owners[1].epoch(0), silent()])


# ------------------------------------------------------------------------------------------------------- owners


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        (Policy(approval="open", intersection="size"), "the number of common people alone"),
        (Policy(approval="list"), "not on the owner's list"),
    ],
)
def test_an_owner_or_a_provider_that_does_not_want_it(policy, match):
    left, right = halves(whole())
    with (
        VirtualWorker("alice", datasets={"t": left}) as alice,
        VirtualWorker("bob", datasets={"t": right}, policy=policy) as bob,
        VirtualWorker("james") as james,
        VirtualWorker("jo", policy=Policy(approval="list")) as jo,
    ):
        one = Party(alice, "t", "id", ["a", "b"])
        two = Party(bob, "t", "who", ["c", "d", "e"], label="y")
        with pytest.raises((PolicyRefusedError, NotApprovedError), match=match):
            logistic_regression(one, two, method="shares", crypto_provider=james, normalise="casefold")
        open_to_all = VirtualWorker("ben", datasets={"t": right})
        two = Party(open_to_all, "t", "who", ["c", "d", "e"], label="y")
        with pytest.raises(NotApprovedError, match="not on the owner's list"):
            logistic_regression(one, two, method="shares", crypto_provider=jo, normalise="casefold")
        with logistic_regression(
            one, two, method="shares", crypto_provider=james, normalise="casefold"
        ) as run:
            run.fit(1)
        open_to_all.close()


def test_an_owner_reads_what_is_shared_and_may_deny_it(make_owned, tmp_path, capsys):
    def planrt(*command):
        capsys.readouterr()
        assert main(command) == 0
        return capsys.readouterr().out

    left, right = halves(whole())
    folder = ("--folder", str(tmp_path))
    alice, _ = make_owned("alice", {"left": left})
    bob, _ = make_owned("bob", {"right": right}, policy=Policy(approval="ask"), approvals=tmp_path)
    james, _ = make_owned("james")
    one, two = Party(alice, "left", "id", ["a", "b"]), Party(bob, "right", "who", ["c", "d", "e"], label="y")
    run = {
        "method": "shares",
        "crypto_provider": james,
        "normalise": "casefold",
        "batch_size": 20,
        "exact": True,
    }
    with pytest.raises(NotApprovedError, match="waits for the owner's approval"):
        logistic_regression(one, two, **run)
    path = planrt("pending", *folder).split("planrt inspect ")[1].split()[0]
    text = planrt("inspect", path)
    for said in (
        "joint run of alice at ", "columns computed with: c, d, e", "label column: y",
        "logistic (exact) regression on secret shares", "must not work together with an owner",
        "this worker's weights: True", "the client sees the loss of each epoch",
    ):  # fmt: skip
        assert said in text
    hash = os.path.basename(path).removesuffix(".joint")
    planrt("deny", hash, "--why", "no shares", "--by", "ann", *folder)
    with pytest.raises(NotApprovedError, match="no shares"):
        logistic_regression(one, two, **run)
    planrt("approve", hash, "--by", "ann", *folder)
    with pytest.raises(NotApprovedError, match="waits"):
        logistic_regression(one, two, **{**run, "exact": False})  # another run than that which was approved
    with logistic_regression(one, two, **run) as joint:
        assert joint.fit(1)[0] < 0.6931


@pytest.mark.parametrize("gone", ["bob", "james"])
def test_a_party_or_a_provider_that_goes_mid_epoch_ends_the_run(make_owned, gone):
    left, right = halves(whole())
    alice, _ = make_owned("alice", {"t": left})
    bob, end_bob = make_owned("bob", {"t": right})
    james, end_james = make_owned("james")
    run = logistic_regression(
        Party(alice, "t", "id", ["a", "b"]),
        Party(bob, "t", "who", ["c", "d", "e"], label="y"),
        method="shares", crypto_provider=james, normalise="casefold", epochs=100_000, batch_size=2, timeout=120,
    )  # fmt: skip
    end = end_bob if gone == "bob" else end_james
    with once_it_trains(run, end), pytest.raises((JointError, RemoteError), match=f"{gone}|closed"):
        run.fit()
    assert not run.is_open
    with pytest.raises(JointError, match="has ended"):
        run.predict(["person 20"])
