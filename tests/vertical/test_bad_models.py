"""Bad input to models of several owners, on both transports: typed errors that name the party and the column."""

import json

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from planrt.errors import (
    AlignmentError,
    CiphertextError,
    DataError,
    JointError,
    OptionError,
    TraceError,
    ValueRangeError,
)
from planrt.sharing.columns.paillier import PublicKey
from planrt.vertical import Party, linear_regression, logistic_regression, split_network
from planrt.vertical.linear import Regression
from planrt.vertical.runs import begun
from planrt.workers.machine.joint.run import Run
from tests.vertical.tables import SHORT, halves, joined, parties, trained, whole, with_changed
from tests.vertical.training import once_it_trains
from tests.watching import whole_lines

pytestmark = pytest.mark.filterwarnings("ignore:a key of 1024 bits")
ABOUT = {"normalise": "casefold", "epochs": 3, "batch_size": 20}


def network(alice, bob, classes=0, bottoms=None, top=None, **options):
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss() if classes else nn.MSELoss()
    return split_network(
        alice, bob, bottoms=bottoms or [nn.Linear(2, 2), nn.Linear(3, 2)], top=top or nn.Linear(4, classes or 1),
        loss_fn=loss, classes=bool(classes), **{**ABOUT, **options},
    )  # fmt: skip


def opened(kind, alice, bob, make_worker, **options):
    """A run of a kind: "linear", "logistic", either of them "on shares", or "network"."""
    if kind == "network":
        return network(alice, bob, **options)
    model = linear_regression if kind.startswith("linear") else logistic_regression
    if kind.endswith("on shares"):
        options |= {"method": "shares", "crypto_provider": make_worker("carol")}
    else:
        options |= {"key_holder": make_worker("carol"), **SHORT}
    return model(alice, bob, **{**ABOUT, **options})


# ------------------------------------------------------------------------------------- what tables hold


def column(name, change):
    def changed(table):
        table[name] = change(np.asarray(table[name], dtype=float).copy())

    return changed


def one(value):
    def change(values):
        values[25] = value
        return values

    return change


EVERY = ["logistic", "logistic on shares", "network"]
RAW = {"standardise": False}
TABLES = [
    (EVERY, column("a", one(np.nan)), {}, DataError, "alice: column 'a' has 1 values that are missing or infinite"),
    (EVERY, column("d", one(np.inf)), {}, DataError, "bob: column 'd' has 1 values that are missing or infinite"),
    (EVERY, column("y", one(np.nan)), {}, DataError, "bob: column 'y' has 1 values that are missing or infinite"),
    (EVERY, column("b", one(1e200)), {}, DataError, "alice: column 'b' has values above 1e.100, too large to be stand"),
    (["linear"], column("y", one(1e200)), {}, DataError, "bob: column 'y' has values above 1e.100"),
    (["logistic"], column("c", one(1e30)), RAW, ValueRangeError, "bob: column 'c' is out of the range of encrypted"),
    (["logistic"], column("c", one(19.0)), RAW, ValueRangeError, "bob: column 'c' is out of the range of encrypted"),
    (["logistic on shares"], column("a", one(65)), RAW, ValueRangeError, "alice: column 'a' is out of the range of sh"),
    (["network"], column("a", one(1e39)), RAW, DataError, "alice: column 'a' has values that float32 does not hold"),
    (["network"], column("y", one(1e39)), {}, DataError, "bob: column 'y' has values that float32 does not hold"),
    (["linear"], column("y", lambda y: y * 50), RAW, ValueRangeError, "bob: predictions or labels are out of the ran"),
    (EVERY[:2], column("y", one(2.0)), {}, DataError, "bob: label column 'y' has values that are neither 0 nor 1"),
    (["network"], column("y", one(0.5)), {"classes": 2}, DataError, "bob: label column 'y' has values that are no cl"),
    (["network"], column("y", one(-1)), {"classes": 2}, DataError, "bob: label column 'y' has values that are no cla"),
    (["network"], column("y", one(2)), {"classes": 2}, DataError, "bob: label column 'y' has classes beyond the 2"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change", "options", "error", "match"),
    [
        pytest.param(kind, *rest, id=f"{kind}-{rest[3][:40]}{number}")
        for number, (kinds, *rest) in enumerate(TABLES)
        for kind in kinds
    ],
)
def test_values_that_cannot_be_computed_with(make_worker, kind, change, options, error, match):
    table = whole(model="linear" if kind.startswith("linear") else "logistic")
    change(table)
    alice, bob = parties(make_worker, table)
    with pytest.raises(error, match=match) as raised:
        opened(kind, alice, bob, make_worker, **options).fit(1)
    for value in ("1e+30", "1e+39", "0.5", "person", "e+200"):
        assert value not in str(raised.value)


@pytest.mark.parametrize("kind", ["logistic", "logistic on shares"])
@pytest.mark.parametrize("value", [0.1, 1e6 + 1 / 3, 0.0])
def test_a_column_that_is_the_same_for_all_changes_nothing(make_worker, kind, value):
    """What rounding leaves of it is not blown up to the size of the others."""
    table = whole()
    column("b", lambda b: np.full(len(b), value))(table)
    alice, bob = parties(make_worker, table)
    with opened(kind, alice, bob, make_worker) as run:
        run.fit()
        found = run.weights()
    values, labels = joined(table)
    values[:, 1] = 0
    others = [0, 2, 3, 4]
    values[:, others] = (values[:, others] - values[:, others].mean(0)) / values[:, others].std(0)
    expected, _ = trained(values, labels, "logistic", epochs=3, batch_size=20, lr=0.1)
    assert found["alice"]["b"] == 0
    flat = [weight for owned in found.values() for weight in owned.values()]
    np.testing.assert_allclose(flat, expected, atol=2e-6)


DIVERGING = [
    (
        "linear",
        1e9,
        ValueRangeError,
        "(alice|bob): predictions or labels are out of the range.*smaller learning rate",
    ),
    (
        "logistic",
        1e9,
        ValueRangeError,
        "(alice|bob): predictions or labels are out of the ran.*smaller learning rate",
    ),
    ("linear on shares", 8.0, ValueRangeError, "left the range of shares.*smaller learning rate"),
    ("network", 1e25, JointError, "party '(alice|bob)'.*smaller learning rate"),
]


@pytest.mark.parametrize(("kind", "lr", "error", "match"), DIVERGING)
def test_a_learning_rate_that_diverges(make_worker, kind, lr, error, match):
    alice, bob = parties(make_worker, whole(model="logistic" if kind == "logistic" else "linear"))
    options = {"optimizer_args": {"lr": lr}} if kind == "network" else {"lr": lr}
    run = opened(kind, alice, bob, make_worker, epochs=40, **options)
    with pytest.raises(error, match=match):
        run.fit()
    assert not run.is_open
    with pytest.raises(JointError, match="has ended"):
        run.predict(["person 20"])
    with opened(kind, alice, bob, make_worker) as run:  # and the workers go on with others
        run.fit(1)


# ------------------------------------------------------------------------ parties that do something else


@pytest.fixture
def cheat(monkeypatch):
    """``cheat("alice", "outputs", change)``: what that party sends as that is `change`d, in the runs of this process;
    `change` takes the tensors and the party's run."""
    drive = Run.drive

    def cheating(who, kind, change):
        def driven(self, role, *rest):
            if self.names[self.me] == who:
                role = with_changed(role, kind, lambda tensors: change(tensors, self))
            return drive(self, role, *rest)

        monkeypatch.setattr(Run, "drive", driven)

    return cheating


def of_another_key(fingerprint):
    """Ciphertexts as many as are due, of a key that is smaller than any, so that none is too large."""

    def change(tensors, run):
        other = PublicKey(2**1023 + 1, 1024)
        rows = other.to_rows([other.encrypt(number) for number in range(len(tensors[0]))])
        return [rows, other.fingerprint if fingerprint else tensors[1]]

    return change


def unmasked(tensors, run):
    key = run.model.owner.key
    return key.packed([key.encrypt(-7)] * len(tensors[0]))


def more_people(tensors, run):
    return [tensors[0] + 1]


def short_key(tensors, run):
    raw = tensors[0].clone()
    raw[0], raw[1] = 0, raw[1] | 128  # or it had fewer bits, now and then
    return [raw]


def even_key(tensors, run):
    raw = tensors[0].clone()
    raw[-1] = 2
    return [raw]


CHEATS = [
    ("logistic", "alice", "encrypted predictions", of_another_key(True),
     CiphertextError, "'alice' sent its encrypted predictions under another key than the one that 'bob' has"),
    ("logistic", "bob", "encrypted residuals", of_another_key(True),
     CiphertextError, "'bob' sent its encrypted residuals under another key than the one that 'alice' has"),
    ("logistic", "bob", "masked gradient", of_another_key(True),
     CiphertextError, "'bob' sent its masked gradient under another key than the one that 'carol' has"),
    ("linear", "alice", "encrypted predictions", of_another_key(False),
     CiphertextError, "decrypted for '(alice|bob)' is no gradient: party '(alice|bob)' sent ciphertexts of another"),
    ("logistic", "alice", "encrypted predictions", of_another_key(False),
     CiphertextError, "decrypted for '(alice|bob)' is no gradient: party '(alice|bob)' sent ciphertexts of another"),
    ("logistic", "bob", "encrypted residuals", of_another_key(False),
     CiphertextError, "decrypted for 'alice' is no gradient: party 'bob' sent ciphertexts of another key"),
    ("logistic", "carol", "decrypted", lambda tensors, run: [tensors[0].flip(1)],
     CiphertextError, "what party 'carol' decrypted for '(alice|bob)' is no gradient.*decrypted something else"),
    ("logistic", "alice", "masked gradient", unmasked,
     CiphertextError, "party 'alice' asks for a value to be decrypted that has no mask: refused, and told to nobody"),
    ("logistic", "alice", "masked gradient", lambda tensors, run: [tensors[0].repeat(2, 1), tensors[1]],
     CiphertextError, "'alice' sent 'carol' something else than the 1 ciphertexts of its masked gradient: refused"),
    ("logistic", "bob", "encrypted residuals", lambda tensors, run: [tensors[0][1:], tensors[1]],
     CiphertextError, "'bob' sent 'alice' something else than the .* ciphertexts of its encrypted residuals"),
    ("logistic", "bob", "encrypted residuals", lambda tensors, run: [torch.zeros_like(tensors[0]), tensors[1]],
     CiphertextError, "party 'bob' sent a ciphertext of another key, or none"),
    ("logistic", "alice", "encrypted predictions", lambda tensors, run: tensors[:1],
     CiphertextError, "'alice' sent 'bob' something else"),
    ("logistic", "carol", "public key", short_key,
     CiphertextError, "party 'carol' gives a public key that has 1016 bits, where 1024 were agreed on"),
    ("logistic", "carol", "public key", lambda tensors, run: [tensors[0][:64]],
     JointError, "party 'carol' sent uint8.64. as its public key, where uint8.128. is due"),
    ("logistic", "carol", "public key", even_key,
     CiphertextError, "party 'carol' gives a public key that is none"),
    ("logistic", "alice", "people", more_people,
     JointError, "party 'bob' says that there are 40 people, where others have 41"),
    ("logistic on shares", "bob", "people", more_people,
     JointError, "party 'bob' says that there are 41 people, where others have 40"),
    ("network", "bob", "agrees", more_people,
     JointError, "party 'bob' says that there are 41 people, where others have 40"),
    ("logistic", "bob", "part of the loss", lambda tensors, run: [tensors[0].double()],
     JointError, "party 'bob' sent float64.1. as its part of the loss"),
    ("network", "alice", "outputs", lambda tensors, run: [tensors[0] * float("nan")],
     JointError, "party 'alice' gives outputs that are no finite numbers"),
    ("network", "alice", "outputs", lambda tensors, run: [tensors[0][:1]],
     JointError, "party 'alice' sent float32.1, 2. as its outputs, where float32.20, 2. is due"),
    ("network", "bob", "gradient", lambda tensors, run: [tensors[0].double()],
     JointError, "party 'bob' sent float64.20, 2. as its gradient"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "who", "sends", "change", "error", "match"), CHEATS)
def test_who_does_something_else_is_named(make_worker, cheat, kind, who, sends, change, error, match):
    alice, bob = parties(make_worker, whole(model="linear" if kind == "linear" else "logistic"))
    cheat(who, sends, change)
    with pytest.raises(error, match=match):
        opened(kind, alice, bob, make_worker, standardise=kind != "linear").fit()


def test_honest_ciphertexts_at_the_edge_of_the_range_are_taken():
    """Nothing that honest parties send is taken for a ciphertext of another key."""
    from planrt.sharing.columns import packing

    random = np.random.default_rng(0)
    for trial in range(50):
        rows, owners = int(random.integers(2, 40)), int(random.integers(2, 5))
        layout = packing.layout_for(1024, 40)
        values = random.normal(size=(rows, 3))
        values *= packing.COLUMN_RMS * np.sqrt(40) / np.sqrt((values**2).sum(0))
        columns = packing.fixed(values, layout.value_bits)
        edge = values[:, 0] / np.sqrt((values[:, 0] ** 2).sum()) * packing.RESIDUAL_RMS * np.sqrt(40)
        residuals = sum(packing.fixed(edge / owners, layout.residual_bits) for _ in range(owners))
        value, count = 0, min(3, layout.columns)
        groups = packing.packed_columns(columns, layout)
        plain = packing.packed_residuals(residuals, layout)
        value = sum(a * b for a, b in zip(plain, groups[0], strict=True))
        found = packing.unpacked(value, count, layout)
        assert packing.is_product(value, found, columns[:, :count], owners, layout), trial
        assert not packing.is_product(value, [2 * found[0], *found[1:]], columns[:, :count], owners, layout)
        far = value + (2 << (layout.slot * layout.places))
        assert not packing.is_product(far, found, columns[:, :count], owners, layout)


def test_what_is_not_decrypted_is_in_the_key_holders_log(make_owned, cheat, tmp_path):
    left, right = halves(whole())
    alice, _ = make_owned("alice", {"t": left})
    bob, _ = make_owned("bob", {"t": right})
    log = tmp_path / "audit.jsonl"
    carol, _ = make_owned("carol", audit=str(log))
    cheat("alice", "masked gradient", unmasked)
    one, two = Party(alice, "t", "id", ["a", "b"]), Party(bob, "t", "who", ["c"], label="y")
    with pytest.raises(CiphertextError, match="no mask"):
        logistic_regression(one, two, key_holder=carol, **ABOUT, **SHORT).fit()
    lines = [json.loads(line) for line in whole_lines(log)]
    asked = [(one["to"], one["rows"], one["outcome"]) for one in lines if one.get("request") == "decrypt"]
    assert asked == [("alice", 1, "refused")]


@pytest.mark.parametrize("kind", ["logistic", "logistic on shares", "network"])
@pytest.mark.parametrize(
    "change", [{"lr": 0.2}, {"batch_size": 30}, {"seed": 9}, {"holdout": 0.5}, {"normalise": "strip"}, {"epochs": 9}]
)  # fmt: skip
def test_parties_that_were_told_different_things(make_worker, kind, change):
    alice, bob = parties(make_worker, whole())
    run = opened(kind, alice, bob, make_worker)
    run.close()
    opens = [msgspec.structs.replace(one, joint="other") for one in run._opens]
    model = opens[1].model
    if "lr" in change and kind == "network":
        change = {"optimizer_args": {"lr": 0.2}}
    about = {name: value for name, value in change.items() if hasattr(model, name)}
    rest = {name: value for name, value in change.items() if name not in about}
    opens[1] = msgspec.structs.replace(opens[1], model=msgspec.structs.replace(model, **about), **rest)
    other = Regression(run._workers, opens, label_owner=1, epochs=3)
    with pytest.raises(AlignmentError, match="'(alice|bob|carol)'.*were told different things"):
        begun(other, "-")


# ------------------------------------------------------------------- parties that go, and clients that stop


@pytest.mark.parametrize(
    ("kind", "gone"),
    [
        ("logistic", "alice"),
        ("logistic", "bob"),
        ("logistic", "carol"),
        ("network", "alice"),
        ("network", "bob"),
    ],
)
def test_a_party_that_goes_mid_epoch_is_named(make_owned, kind, gone):
    left, right = halves(whole())
    made = {"alice": make_owned("alice", {"t": left}), "bob": make_owned("bob", {"t": right})}
    made["carol"] = make_owned("carol")
    one = Party(made["alice"][0], "t", "id", ["a", "b"])
    two = Party(made["bob"][0], "t", "who", ["c", "d", "e"], label="y")
    about = {"normalise": "casefold", "epochs": 100_000, "batch_size": 2, "timeout": 120}
    if kind == "network":
        run = network(one, two, **about)
    else:
        run = logistic_regression(
            one, two, key_holder=made["carol"][0], allow_small_batches=True, lr=1e-3, **about, **SHORT
        )
    with once_it_trains(run, made[gone][1]), pytest.raises(JointError, match=f"'{gone}'|closed"):
        run.fit()
    assert not run.is_open


def test_refused_before_anything_is_sent(make_worker):
    alice, bob = parties(make_worker, whole())
    shared = nn.Linear(2, 2)
    refused = [
        ({"optimizer": "LBFGS"}, "LBFGS computes the loss several times in a step"),
        ({"optimizer": "SparseAdam"}, "SparseAdam takes sparse gradients alone"),
        ({"optimizer": "SGD", "optimizer_args": {"lr": -1}}, "SGD does not train the part at 'alice'.*learning rate"),
        ({"bottoms": [shared, nn.Sequential(nn.Linear(3, 2), shared)]}, "is also in one at 'alice'.*deepcopy"),
        ({"bottoms": [nn.Linear(2, 2), nn.Sequential(nn.Linear(3, 4), shared)], "top": nn.Sequential(shared)},
         "is also in one at"),
        ({"bottoms": [Doubled(), nn.Linear(3, 2)]}, "'alice' gives float64.*end it with .float"),
        ({"bottoms": [nn.Sequential(Classes()), nn.Linear(3, 2)]}, "'alice' has an nn.Embedding.*as_is="),
        ({"bottoms": iter([nn.Linear(2, 2), nn.Linear(3, 2)])}, "bottoms is a list with a module or None"),
        ({"bottoms": [nn.Linear(2, 2), torch.relu]}, "a part of a network is an nn.Module, not"),
        ({"bottoms": [nn.Linear(2, 2), nn.Linear(3, 2)], "top": torch.relu}, "a part of a network is an nn.Module"),
    ]  # fmt: skip
    for options, match in refused:
        with pytest.raises(OptionError, match=match):
            network(alice, bob, **options)
    with pytest.raises(TraceError, match=r"the part of party 'bob', on \[rows, 3\]: .*cannot be multiplied"):
        network(alice, bob, bottoms=[nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(OptionError, match="as_is names columns of columns=, and 'z' is none"):
        Party(alice.worker, "t", "id", ["a"], as_is=["z"])
    with pytest.raises(OptionError, match=r"as_is=\['a'\]"):
        Party(alice.worker, "t", "id", ["a"], as_is="a")


class Classes(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 2)

    def forward(self, x):
        return self.table(x[:, 0].long())


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x).double()


def test_a_key_that_is_too_short(make_worker):
    alice, bob = parties(make_worker, whole())
    carol = make_worker("carol")
    about = {"key_holder": carol, **ABOUT}
    with pytest.raises(OptionError, match="key of 1024 bits is too short"):
        logistic_regression(alice, bob, key_bits=1024, **about)
    run = logistic_regression(alice, bob, **about, **SHORT)
    run.close()
    model = msgspec.structs.replace(run._opens[0].model, allow_short_key=False)  # a client that does not look
    opens = [msgspec.structs.replace(one, joint="other", model=model) for one in run._opens]
    with pytest.raises(OptionError, match="party '(alice|bob|carol)'.*too short"):
        begun(Regression(run._workers, opens, label_owner=1, epochs=3), "-")
