"""Tables that do not fit: each is told by party and column, nothing of a row is, and the workers are as they were.

The same on both transports, for regressions on encrypted values and on shares, and for networks in parts.
"""

import traceback

import msgspec
import pytest
from torch import nn

from planrt.errors import AlignmentError, DataError, OptionError, UnknownDatasetError
from planrt.vertical import Party, Table, intersection_size, logistic_regression, split_network
from planrt.vertical.opening import Plan
from planrt.vertical.runs import JointRun, begun
from tests.vertical.tables import SHORT, parties, whole

pytestmark = pytest.mark.filterwarnings("ignore:a key of 1024 bits")
MARK = "7531"
"""In all that nobody may be told: ids, values, labels."""


def encrypted(*owners, third, **about):
    return logistic_regression(*owners, key_holder=third, batch_size=20, **SHORT, **about)


def on_shares(*owners, third, **about):
    return logistic_regression(
        *owners, method="shares", crypto_provider=third, allow_small_batches=True, **about
    )


def in_parts(*owners, third, **about):
    bottoms = [nn.Linear(len(one.columns), 2) if one.columns else None for one in owners]
    width = sum(2 for one in bottoms if one is not None)
    return split_network(*owners, bottoms=bottoms, top=nn.Linear(width, 1), loss_fn=nn.MSELoss(), **about)


def bens_table(**more):
    rows = 50
    table = {
        "who": [f"person {n}" for n in range(rows)],
        "part": [n % 7 for n in range(rows)],
        "shared": ["a", f"b{MARK}"] * 25,
        "c": [n / 10 for n in range(rows)],
        "y": [0.0, 1.0] * 25,
        "text": [f"t{MARK}"] * rows,
        "gap": [7531.0, None, float("nan"), *[7531.0] * (rows - 3)],
        "infinite": [float("inf"), *[7531.0] * (rows - 1)],
        "three": [0.0, 1.0, 7531.0, *[0.0] * (rows - 3)],
        "half": [0.5, *[1.0] * (rows - 1)],
        "blank": ["", " ", *[f"p{MARK}-{n}" for n in range(rows - 2)]],
        "others": [f"q{MARK}-{n}" for n in range(rows)],
    }
    return Table({**table, **more}, ["who", "part", "shared", "blank", "others"], label="y")


CASES = {
    "no such id column": ({"ids": "name"}, DataError, r"ben: 'name' is no id column; those are who, part"),
    "a column as id": ({"ids": "c"}, DataError, "ben: 'c' is no id column"),
    "nobody in common": ({"ids": "others"}, AlignmentError, "nobody is in both tables.*'(ben|alice)'"),
    "nobody in common, spelled differently": (
        {"normalise": "exact", "ids": "others"}, AlignmentError, "how they are normalised",
    ),
    "duplicate ids": ({"ids": "shared"}, DataError, "ben: id column 'shared' has 48 duplicates"),
    "empty ids": ({"ids": "blank"}, DataError, "ben: id column 'blank' has 2 values of which 'strip' leaves nothing"),
    "missing values": ({"columns": ["c", "gap"]}, DataError, "ben: column 'gap' has 2 values that are missing"),
    "infinite values": ({"columns": ["infinite"]}, DataError, "ben: column 'infinite' has 1 values that are"),
    "text": ({"columns": ["text", "c"]}, DataError, "ben: column 'text' holds text"),
    "no such column": ({"columns": ["c", "zed"]}, DataError, "ben: there is no column 'zed'"),
    "an id as column": ({"columns": ["part"]}, DataError, "ben: 'part' is an id column"),
    "no such label": ({"label": "zed"}, DataError, "ben: there is no column 'zed'"),
    "a label of text": ({"label": "text"}, DataError, "ben: column 'text' holds text"),
    "a label with gaps": ({"label": "gap"}, DataError, "ben: column 'gap' has 2 values that are missing"),
    "no such table": ({"dataset": "gone"}, UnknownDatasetError, "no data set under the key 'gone'"),
    "no table": ({"dataset": "plain"}, DataError, "ben: data set 'plain' is no table"),
}  # fmt: skip
LABELS = {
    "three classes": ({"label": "three"}, DataError, "ben: label column 'three' has values that are neither 0 nor 1"),
    "a half": ({"label": "half"}, DataError, "ben: label column 'half' has values that are neither 0 nor 1"),
}  # fmt: skip


@pytest.fixture
def site(make_worker):
    """(alice's party, ben's worker, carol's), with a check at the end that all are there and hold nothing."""
    alice, _ = parties(make_worker, whole())
    plain = [(nn.Parameter(nn.Linear(2, 1).weight[0]).detach(), 1)] * 3
    ben = make_worker("ben", {"t": bens_table(), "plain": plain})
    carol = make_worker("carol")
    yield alice, ben, carol
    assert intersection_size(alice, Party(ben, "t", "who")) == 50  # 60 people, of whom ben has the first 50
    with on_shares(alice, Party(ben, "t", "who", ["c"], label="y"), third=carol) as run:
        assert len(run.fit(1)) == 1


def told(raised):
    """All that a client sees of an error: its own text, and those of what it follows from."""
    return "".join(traceback.format_exception(raised.value))


RUNS = {one.__name__: one for one in (encrypted, on_shares, in_parts)}


@pytest.mark.parametrize(
    ("run", "case"),
    [(run, case) for run in RUNS for case in CASES] + [(run, case) for run in list(RUNS)[:2] for case in LABELS],
)  # fmt: skip
def test_what_does_not_fit_is_told_by_party_and_column(site, run, case):
    alice, ben, carol = site
    change, kind, match = (CASES | LABELS)[case]
    about = {"epochs": 1, "timeout": 120}  # which it is told before
    given = {"dataset": "t", "ids": "who", "columns": ["c"], "label": "y"}
    for name, value in change.items():
        (about if name == "normalise" else given)[name] = value
    with pytest.raises(kind, match=match) as raised:
        RUNS[run](alice, Party(ben, **given), third=carol, **about)
    assert MARK not in told(raised)


@pytest.mark.parametrize("case", [one for one in CASES if not CASES[one][0].keys() & {"columns", "label"}])
def test_how_many_are_in_both_tells_as_much(site, case):
    alice, ben, _ = site
    change, kind, match = CASES[case]
    given = {"dataset": "t", "ids": "who", "normalise": "strip", **change}
    normalise = given.pop("normalise")
    if kind is AlignmentError:  # that is a number, too
        assert intersection_size(alice, Party(ben, **given), normalise=normalise) == 0
        return
    with pytest.raises(kind, match=match) as raised:
        intersection_size(alice, Party(ben, **given), normalise=normalise, timeout=120)
    assert MARK not in told(raised)


def test_the_one_who_fits_is_told_which_party_does_not(site):
    """Also where that is the first one of them, whom the others wait for."""
    alice, ben, carol = site
    wrong = Party(ben, "t", "who", ["gap"])
    right = Party(alice.worker, "t", "id", ["a"], label="b")
    with pytest.raises(DataError, match="ben: column 'gap'"):
        on_shares(wrong, right, third=carol, epochs=1, timeout=120)
    three = Party(ben, "t", "who", ["c"], label="three")
    with pytest.raises(DataError, match="ben: label column 'three'") as raised:
        on_shares(three, Party(alice.worker, "t", "id", ["a"]), third=carol, epochs=1, timeout=120)
    assert MARK not in told(raised)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"normalise": "casefold"}, "normalise ids alike"),
        ({"ids": ["who", "part"]}, "nobody is in both|compare equally many id columns|normalise ids alike"),
        ({"seed": 5}, "told different things"),
        ({"holdout": 0.5}, "told different things"),
    ],
)
def test_parties_that_are_told_different_things_do_not_begin(site, change, match):
    """No client of planrt's does that."""
    alice, ben, carol = site
    plan = Plan([alice, Party(ben, "t", "who", ["c"], label="y")], carol)
    made = on_shares(alice, Party(ben, "t", "who", ["c"], label="y"), third=carol)
    made.close()
    opens = plan.opens(made._opens[0].model, label_owner=1)
    opens[1] = msgspec.structs.replace(opens[1], **change)
    with pytest.raises(AlignmentError, match=match):
        begun(JointRun(plan.workers(), opens), "-")


def test_tables_without_rows_and_with_one(make_worker):
    alice, _ = parties(make_worker, whole())
    none = make_worker("none", {"t": Table({"who": [], "c": [], "y": []}, "who", label="y")})
    one = make_worker("one", {"t": Table({"who": ["person 3"], "c": [1.0], "y": [1.0]}, "who", label="y")})
    carol = make_worker("carol")
    assert intersection_size(alice, Party(none, "t", "who")) == 0
    assert intersection_size(Party(one, "t", "who"), alice) == 1
    for run in RUNS.values():
        with pytest.raises(AlignmentError, match="nobody is in both tables"):
            run(alice, Party(none, "t", "who", ["c"], label="y"), third=carol, epochs=1)
        with pytest.raises(AlignmentError, match="too few to train on"):
            run(alice, Party(one, "t", "who", ["c"], label="y"), third=carol, epochs=1)


def test_a_party_that_is_wrong_here_is_not_asked(make_worker):
    alice, ben = parties(make_worker, whole())
    for wrong in (
        {"ids": None}, {"ids": 5}, {"ids": []}, {"ids": [""]}, {"ids": ["id", "id"]}, {"dataset": None},
        {"columns": None}, {"columns": ["a", "a"]}, {"columns": [5]}, {"label": 5},
    ):  # fmt: skip
        with pytest.raises(OptionError):
            Party(**{"worker": alice.worker, "dataset": "t", "ids": "id", "columns": ["a"], **wrong})
    with pytest.raises(OptionError, match="'alice' is given twice"):
        intersection_size(alice, alice)
    with pytest.raises(OptionError, match="two or more"):
        intersection_size(alice, ben.worker)
