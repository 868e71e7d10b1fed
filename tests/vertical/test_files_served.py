"""A hospital's Parquet file and a laboratory's CSV file about overlapping people, who are written differently in each.

Served by processes of their own (`planrt serve`), and by virtual workers: the same calls give the same.
"""

import contextlib
import datetime
import unicodedata

import numpy as np
import pytest

from planrt.errors import AlignmentError, DataError, OptionError
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.vertical import Party, Table, intersection_size, logistic_regression, table_columns
from planrt.workers import VirtualWorker, WebsocketClientWorker
from tests.vertical.tables import joined, some, trained, whole

pandas = pytest.importorskip("pandas")
PEOPLE, ALONE = 60, 10
"""Of either table ten people are in that one only."""
IDS = ("patient", "born", "phone", "name", "ward")


def born(row):
    return datetime.date(1950, 1, 1) + datetime.timedelta(days=row * 17)


def files(folder):
    """Both files; `whole` has the columns that they are parts of."""
    table = whole(PEOPLE)
    mine, theirs = range(PEOPLE - ALONE), list(range(ALONE, PEOPLE))[::-1]
    hospital = {
        "patient": pandas.array([1000 + row for row in mine], "Int64"),
        "born": pandas.to_datetime([born(row) for row in mine]),
        "phone": [f"+49 (170) {row:04}" for row in mine],
        "name": [unicodedata.normalize("NFD", f"Zoë Müller {row}") for row in mine],
        "ward": ["NA" if row % 2 else "None" for row in mine],
        "gap": pandas.array([None, *[5] * (len(mine) - 1)], "Int64"),
        **some(table, "ab", mine),
    }
    laboratory = {
        "patient": [f"{1000 + row}" for row in theirs],
        "born": [born(row).isoformat() for row in theirs],
        "phone": [f"49-170/{row:04}" for row in theirs],
        "name": [unicodedata.normalize("NFC", f" Zoë Müller {row}") for row in theirs],
        "ward": ["NA" if row % 2 else "None" for row in theirs],
        **some(table, "cdey", theirs),
    }
    paths = folder / "hospital.parquet", folder / "laboratory.csv"
    pandas.DataFrame(hospital).set_index("patient").to_parquet(paths[0])
    pandas.DataFrame(laboratory).to_csv(paths[1], index=False)
    return paths


@pytest.fixture(scope="module", params=["memory", "processes"])
def site(request, tmp_path_factory):
    """The hospital's worker, the laboratory's, and carol's."""
    paths = files(tmp_path_factory.mktemp("tables"))
    names = ("hospital", "laboratory", "carol")
    with contextlib.ExitStack() as stack:
        if request.param == "memory":
            tables = [{path.stem: Table.from_file(path, IDS)} for path in paths]
            workers = [
                VirtualWorker(name, datasets=one, auto_add=False)
                for name, one in zip(names, [*tables, {}], strict=True)
            ]
        else:
            ids = [word for name in IDS for word in ("--id-column", name)]
            options = [("--dataset", str(path), *ids) for path in paths] + [("--empty",)]
            children = [
                ChildOptions(name, 0, (*given, "--threads", "1"))
                for name, given in zip(names, options, strict=True)
            ]
            ready = stack.enter_context(WorkerProcesses(children)).wait_ready()
            workers = [WebsocketClientWorker(name, uri=ready[name].uri, auto_add=False) for name in names]
        yield [stack.enter_context(worker) for worker in workers]


def both(site, ids, *, columns=((), ()), label=None):
    return [
        Party(site[0], "hospital", ids, list(columns[0])),
        Party(site[1], "laboratory", ids, list(columns[1]), label=label),
    ]


def test_what_the_workers_tell_of_the_files(site):
    facts = [table_columns(one, one.id) for one in site[:2]]
    assert [one.rows for one in facts] == [PEOPLE - ALONE] * 2
    assert {tuple(one.ids) for one in facts} == {IDS}
    assert facts[0].columns == ["gap", "a", "b"]


@pytest.mark.parametrize(
    ("ids", "normalise", "people"),
    [
        ("patient", "exact", 40),
        (["patient", "born"], "exact", 40),
        (["born", "patient"], "strip", 40),
        ("born", "alphanumeric", 40),
        ("phone", "alphanumeric", 40),
        (["phone", "name"], "alphanumeric", 40),
        ("phone", "casefold", 0),
        ("name", "strip", 40),
        ("name", "casefold", 40),
        ("name", "exact", 0),
        (["name", "ward"], "strip", 40),
        (["patient", "born", "phone", "name", "ward"], "alphanumeric", 40),
    ],
)
def test_people_are_found_by_any_of_their_ids(site, ids, normalise, people):
    assert intersection_size(*both(site, ids), normalise=normalise) == people


def test_columns_that_say_of_nobody_who_it_is(site):
    with pytest.raises(DataError, match=r"(hospital|laboratory): id column 'ward' has 48 duplicates"):
        intersection_size(*both(site, "ward"))
    with pytest.raises(AlignmentError, match="nobody is in both tables"):
        logistic_regression(
            *both(site, ["born", "name"], columns=("ab", "cd"), label="y"), normalise="exact", method="shares",
            crypto_provider=site[2],
        )  # fmt: skip
    with pytest.raises(DataError, match="hospital: column 'gap' has 1 values that are missing"):
        logistic_regression(
            *both(site, "patient", columns=(["gap"], "cd"), label="y"),
            method="shares",
            crypto_provider=site[2],
        )


def test_training_and_predictions_by_any_kind_of_id(site):
    """As on the joined table, whose rows are in the order of the same ids."""
    table = whole(PEOPLE)
    about = {"epochs": 2, "batch_size": 20, "lr": 0.3, "seed": 4}
    owners = both(site, ["patient", "born"], columns=("ab", "cde"), label="y")
    with logistic_regression(
        *owners, method="shares", crypto_provider=site[2], exact=True, standardise=False, **about
    ) as run:
        assert run.size == 40
        run.fit()
        found = [weight for owned in run.weights().values() for weight in owned.values()]
        rows = [12, 30, 12]
        people = [
            (1012, born(12)),
            (np.int64(1030), np.datetime64(born(30), "ns")),
            ("1012", pandas.Timestamp(born(12))),
        ]
        predictions = run.predict(people)
        with pytest.raises(AlignmentError, match="person 1 of those asked for"):
            run.predict([people[0], (1003, born(3))])
        for wrong, match in (
            ([1012], "2 id columns: person 0 has 1"),
            ([(1012, None)], "person 0 has no id"),
            ([people[0], (1012, 2.0**60)], "person 1 is named by floats so large"),
            ([], "nobody to predict for"),
            ("1012", r"\['1012'\]"),
            (1012, r"\[1012\]"),
        ):
            with pytest.raises(OptionError, match=match):
                run.predict(wrong)
        assert run.is_open
    keyed = {**table, "id": [(1000 + row, born(row).isoformat()) for row in range(PEOPLE)]}
    values, labels = joined(keyed, seed=4, normalise="strip", several=True)
    expected, _ = trained(values, labels, "logistic", exact=True, **about)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    scores = np.array([[table[name][row] for name in "abcde"] for row in rows]) @ found[:-1] + found[-1]
    np.testing.assert_allclose(predictions.numpy(), 1 / (1 + np.exp(-scores)), atol=1e-6)
