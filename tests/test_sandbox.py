"""`create_sandbox`: what is in the globals afterwards, and what is on the workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import planrt
from planrt.errors import DataError, OptionError
from planrt.fl.data import boston
from planrt.sandbox import WORKERS, create_sandbox

BUNDLED = {
    "#diabetes": (442, 10), "#breast_cancer": (569, 30), "#digits": (1797, 64), "#iris": (150, 4), "#wine": (178, 13),
    "#linnerud": (20, 3),
}  # fmt: skip


def write_boston(folder: Path, items: int = 30) -> Path:
    """Random numbers in the shapes of the Boston Housing file."""
    random = np.random.default_rng(0)
    arrays = {
        "x_train": random.normal(size=(items, 13)), "y_train": random.normal(size=items),
        "x_test": random.normal(size=(5, 13)), "y_test": random.normal(size=5),
    }  # fmt: skip
    np.savez(folder / boston.FILE, **arrays)
    return folder


@pytest.fixture
def no_data(monkeypatch, tmp_path) -> Path:
    """A folder that PLANRT_DATA and the user's cache both name; there is nothing in it."""
    monkeypatch.setenv("PLANRT_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def names():
    """A program's globals; the workers in it are closed at the end."""
    names = {"bob": "something else", "mine": 1}
    yield names
    for worker in names.get("workers", ()):
        worker.close()


def test_a_sandbox_without_data(no_data, names, capsys):
    create_sandbox(names, download_data=False)
    assert set(names) == {*WORKERS, "workers", "hook", "grid", "torch", "sy", "mine"}
    assert [worker.id for worker in names["workers"]] == ["bob", "theo", "jason", "alice", "andy", "jon"]
    assert all(names[worker.id] is worker for worker in names["workers"])
    assert names["hook"] is planrt.TorchHook(torch)
    assert names["grid"].workers == names["workers"]
    assert (names["torch"], names["sy"]) == (torch, planrt)
    assert all(worker.objects_count() == 0 for worker in names["workers"])
    printed = capsys.readouterr().out
    assert all(id in printed for id in WORKERS)


def test_the_bundled_data_is_split_over_the_workers_and_tagged(no_data, names, capsys):
    create_sandbox(names, verbose=False)
    assert capsys.readouterr().out == ""
    grid = names["grid"]
    for name, (items, columns) in BUNDLED.items():
        data, target = grid.search(name, "#data"), grid.search(name, "#target")
        assert list(data) == list(target) == list(WORKERS)
        assert all(len(found) == 1 for found in (*data.values(), *target.values()))
        sizes = [len(found[0]) for found in data.values()]
        assert (sum(sizes), max(sizes) - min(sizes) <= 1) == (items, True)
        assert [len(found[0]) for found in target.values()] == sizes
        assert all(found[0].shape[1:] == (columns,) for found in data.values())
        assert all(found[0].dtype == torch.float32 for found in data.values())
        assert "dataset" in data["bob"][0].description
    assert grid.search("#iris", "#target")["bob"][0].dtype == torch.int64
    assert grid.search("#diabetes", "#target")["bob"][0].dtype == torch.float32
    assert grid.search("#boston") == {}


def test_the_parts_together_are_the_data_in_order(no_data, names):
    from sklearn.datasets import load_iris

    create_sandbox(names, verbose=False)
    for tag, wanted in (("#data", load_iris().data), ("#target", load_iris().target)):
        parts = [found[0].get() for found in names["grid"].search("#iris", tag).values()]
        assert torch.equal(torch.cat(parts), torch.from_numpy(wanted).to(parts[0].dtype))


def test_boston_housing_is_left_out_with_a_word_where_it_is_not_there(no_data, names, capsys):
    create_sandbox(names)
    assert f"set PLANRT_DATA to a folder that holds {boston.FILE}" in capsys.readouterr().out


def test_boston_housing_is_used_where_it_is_there(no_data, names, capsys):
    write_boston(no_data)
    create_sandbox(names)
    assert "Boston Housing: 30 items of 13 columns" in capsys.readouterr().out
    data = names["grid"].search("#boston", "#data")
    assert [list(found[0].shape) for found in data.values()] == [[5, 13]] * 6
    assert data["jon"][0].dtype == torch.float32
    assert data["jon"][0].tags == {"#boston", "#housing", "#boston_housing", "#data"}
    assert len(names["bob"].search(["#boston", "#housing"])) == 2
    sent = torch.cat([found[0].get() for found in names["grid"].search("#boston", "#target").values()])
    assert torch.equal(sent, boston.load(no_data).train_targets)


def test_a_sandbox_of_other_workers(no_data, names, make_worker):
    create_sandbox(names, verbose=False, make_worker=make_worker)
    assert [type(worker).__name__ for worker in names["workers"]] == [type(make_worker("other")).__name__] * 6
    assert list(names["grid"].search("#wine", "#data")) == list(WORKERS)


@pytest.mark.parametrize("gbs", [None, [], "globals", planrt])
def test_what_is_no_dict_is_refused(gbs):
    with pytest.raises(OptionError, match=r"create_sandbox\(globals\(\)\)"):
        create_sandbox(gbs)


def test_importing_planrt_and_its_sandbox_leaves_scikit_learn_alone():
    code = "import sys, planrt, planrt.sandbox; planrt.create_sandbox; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert done.stderr == ""


def test_public_names():
    assert planrt.create_sandbox is create_sandbox


# ------------------------------------------------------------------------------------------- Boston Housing's file


def test_standardized_columns_have_mean_0_and_deviation_1_but_for_the_yes_or_no(tmp_path):
    raw = boston.load(write_boston(tmp_path))
    ready = raw.standardized()
    others = [column != "CHAS" for column in boston.COLUMNS]
    assert ready.train_data.mean(0)[others].abs().max() < 1e-6
    assert (ready.train_data.std(0)[others] - 1).abs().max() < 1e-5
    for before, after in ((raw.train_data, ready.train_data), (raw.test_data, ready.test_data)):
        assert torch.equal(before[:, 3], after[:, 3])
    assert not torch.equal(raw.test_data[:, 0], ready.test_data[:, 0])
    assert ready.train_targets is raw.train_targets


def test_a_missing_or_damaged_file_is_named(no_data, monkeypatch):
    with pytest.raises(DataError, match=f"no {boston.FILE} in {no_data}"):
        boston.load()
    with pytest.raises(DataError, match="no .* in elsewhere: put it there"):
        boston.load("elsewhere")
    monkeypatch.delenv("PLANRT_DATA")
    assert boston.find() is None
    path = no_data / boston.FILE
    path.write_bytes(b"PK\x03\x04 not a zip file")
    with pytest.raises(DataError, match="cannot be read"):
        boston.load(no_data)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        boston.load(no_data)
    np.savez(path, x_train=np.ones((3, 13)))
    with pytest.raises(DataError, match="cannot be read"):
        boston.load(no_data)
    np.savez(path, x_train=np.ones((3, 12)), y_train=np.ones(3), x_test=np.ones((3, 12)), y_test=np.ones(3))
    with pytest.raises(DataError, match=r"shape \[3, 12\]"):
        boston.load(no_data)
    objects = np.array([object()], dtype=object)
    np.savez(path, x_train=objects, y_train=objects, x_test=objects, y_test=objects)
    with pytest.raises(DataError, match="cannot be read"):
        boston.load(no_data)


def test_the_real_file_has_its_shapes():
    folder = os.environ.get("PLANRT_DATA")
    if boston.find(folder) is None:
        (pytest.fail if os.environ.get("PLANRT_REQUIRE_DATA") == "1" else pytest.skip)(
            f"needs {boston.FILE} in the folder that PLANRT_DATA names"
        )
    loaded = boston.load(folder)
    assert list(loaded.train_data.shape) == [404, 13]
    assert list(loaded.test_data.shape) == [102, 13]
    assert loaded.train_data.dtype == loaded.test_targets.dtype == torch.float32
    torch.testing.assert_close(
        loaded.standardized().train_data[0, :3], torch.tensor([-0.2719, -0.4830, -0.4352]), atol=1e-4, rtol=0
    )
