"""Tables: made of columns, of files, and served by a process of their owner's."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from planrt.errors import DataError, OptionError
from planrt.vertical import Table


def test_columns_of_all_kinds():
    table = Table(
        {
            "id": np.array([3, 1, 2]),
            "whole": [1, 2, 3],
            "flag": np.array([True, False, True]),
            "tensor": torch.tensor([0.5, 1.5, 2.5]),
            "text": ["a", "b", "c"],
            "gap": [1, None, 3],
        },
        "id",
        label="flag",
    )
    assert len(table) == 3
    assert table.ids == {"id": ["3", "1", "2"]}
    assert table.numeric == ["whole", "flag", "tensor", "gap"]
    data, target = table[1]
    assert data[:2].tolist() == [2.0, 1.5]
    assert target == 0
    with pytest.raises(IndexError):
        table[3]
    assert "3 rows" in repr(table)
    np.testing.assert_array_equal(
        table.values(["tensor", "whole"], whose="x"), [[0.5, 1], [1.5, 2], [2.5, 3]]
    )


@pytest.mark.parametrize(
    ("columns", "ids", "options", "kind", "match"),
    [
        ({"a": [1, 2]}, "id", {}, DataError, "no id column 'id'; the table has a"),
        ({"id": [1, 2], "a": [1]}, "id", {}, DataError, "id 2, a 1"),
        ({"id": [1, None]}, "id", {}, DataError, "id column 'id' has 1 missing"),
        ({"id": [1, float("nan")]}, "id", {}, DataError, "id column 'id' has 1 missing"),
        ({"id": [1], "a": np.ones((1, 2))}, "id", {}, DataError, "column 'a' has 2 dimensions"),
        ({"id": [1]}, [], {}, OptionError, "one or more id columns"),
        ({"id": [1]}, ["id", "id"], {}, OptionError, "twice"),
        ({"id": [1]}, "id", {"label": "y"}, DataError, "no label column 'y'"),
        ([1, 2], "id", {}, DataError, "mapping of names to values, or as a DataFrame"),
        ({1: [1]}, "id", {}, DataError, "mapping of names"),
    ],
)
def test_wrong_tables(columns, ids, options, kind, match):
    with pytest.raises(kind, match=match):
        Table(columns, ids, **options)


def test_a_table_is_a_data_set_of_rounds_too(make_worker):
    import planrt as sy

    table = Table({"id": range(8), "x": range(8), "y": [0.0, 1.0] * 4}, "id", label="y")
    bob = make_worker("bob", {"t": table})
    info = bob.datasets["t"]
    assert (info.length, info.data, info.target) == (8, ("float32", [-1, 1]), ("float32", [-1]))
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Flatten(0))
    config = sy.TrainConfig(
        model=model, loss_fn=torch.nn.functional.mse_loss, batch_size=4, epochs=1, optimizer_args={"lr": 0.01}
    )
    config.send(bob)
    assert bob.fit(dataset_key="t") is not None


def test_files(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": ["007", "7"], "age": [30, None], "name": ["x", "y"]})
    csv, parquet = tmp_path / "t.csv", tmp_path / "t.parquet"
    frame.to_csv(csv, index=False)
    frame.to_parquet(parquet)
    for path in (csv, str(parquet)):
        table = Table.from_file(path, "id")
        assert table.ids == {"id": ["007", "7"]}
        assert table.numeric == ["age"]
        assert np.isnan(table.columns["age"][1])
    assert Table(frame, "id").ids == {"id": ["007", "7"]}
    with pytest.raises(DataError, match=r"t.csv: there is no id column 'key'"):
        Table.from_file(csv, "key")
    with pytest.raises(DataError, match="ends in .csv or .parquet"):
        Table.from_file(tmp_path / "t.xlsx", "id")
    with pytest.raises(DataError, match="No such file"):
        Table.from_file(tmp_path / "gone.csv", "id")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read as a table"):
        Table.from_file(tmp_path / "bad.parquet", "id")
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read as a table"):
        Table.from_file(tmp_path / "empty.csv", "id")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dataset", "t.csv"], "--id-column"),
        (["--dataset", "gone.csv", "--id-column", "id"], "gone.csv: No such file"),
        (["--dataset", "digits", "--id-column", "id"], "give it with --dataset table.csv"),
        (["--dataset", "t.csv", "--id-column", "key"], "no id column 'key'"),
        (["--dataset", "t.csv", "--id-column", "id", "--testing"], "leave them out with a table"),
        (["--empty", "--id-column", "id"], "--empty serves no data set"),
    ],
)
def test_the_command_tells_what_is_wrong_with_a_table(tmp_path, options, said):
    (tmp_path / "t.csv").write_text("id,x\n1,2\n")
    done = subprocess.run(
        [sys.executable, "-m", "planrt.fl.serve", "--id", "alice", "--port", "0", *options],
        capture_output=True, text=True, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
