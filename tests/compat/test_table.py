"""The table of PySyft 0.2's names, walked row by row, and the modules that `planrt.compat` makes of it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import planrt
from planrt.compat import resolve
from planrt.compat_names import METHODS, MODULES, NAMES
from planrt.errors import UnknownNameError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("row", NAMES + METHODS, ids=lambda row: row.old)
def test_every_row_has_a_name_that_is_there_or_says_what_to_write(row):
    if row.new:
        resolve(row.new)
    else:
        assert len(row.note) > 15, row.old


def test_no_name_is_there_twice():
    every = [row.old for row in NAMES + METHODS]
    assert len(every) == len(set(every)) > 250


def test_migration_md_is_up_to_date():
    script = runpy.run_path(str(ROOT / "scripts" / "write_migration.py"))
    assert (ROOT / "MIGRATION.md").read_text(encoding="utf-8") == script["migration"](), (
        "run python scripts/write_migration.py"
    )


@pytest.mark.parametrize("row", NAMES, ids=lambda row: row.old)
def test_every_name_can_be_imported_from_where_it_was(row):
    module, _, name = row.old.rpartition(".")
    code = f"from {module} import {name} as found"
    names: dict[str, object] = {}
    if row.new:
        exec(code, names)
        assert names["found"] is resolve(row.new) or row.old in MODULES
    else:
        with pytest.raises(ImportError, match=r"planrt has no syft\.") as caught:
            exec(code, names)
        assert row.note in str(caught.value)
        with pytest.raises(AttributeError) as attribute:
            getattr(importlib.import_module(module), name)
        assert row.note in str(attribute.value)


def test_modules_are_attributes_of_their_parents_without_being_imported():
    code = (
        "import planrt.compat, syft as sy\n"
        "assert sy.frameworks.torch.fl.utils.federated_avg.__module__ == 'planrt.fl.averaging'\n"
        "assert sy.version.__version__ == sy.__version__\n"
        "assert sy.exceptions.GetNotPermittedError.__name__ == 'GetNotPermittedError'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_it_is_light_and_gives_the_same_twice():
    code = (
        "import sys, importlib, planrt.compat, syft\n"
        "assert 'torch' not in sys.modules\n"
        "importlib.reload(planrt.compat)\n"
        "import syft.workers.virtual, planrt\n"
        "assert syft.workers.virtual.VirtualWorker is planrt.VirtualWorker\n"
        "assert len([f for f in sys.meta_path if type(f).__name__ == '_Finder']) == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_planrt_alone_makes_no_syft():
    code = "import planrt\ntry:\n    import syft\nexcept ModuleNotFoundError:\n    print('none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"


@pytest.mark.parametrize("first", ["import syft, planrt.compat", "import planrt.compat"])
def test_a_real_pysyft_is_not_replaced(first, tmp_path):
    (tmp_path / "syft").mkdir()
    (tmp_path / "syft" / "__init__.py").write_text("REAL = True\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{first}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: a PySyft is installed here" in done.stderr
    assert "import planrt as sy" in done.stderr


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import syft.foo", "no 'foo' in syft"),
        ("from syft import TorchHok", "the nearest name is syft.TorchHook"),
        ("from syft.frameworks.torch.fl.utils import federated_average", "fl.utils.federated_avg"),
        ("from syft.workers import nothing_like_it", "MIGRATION.md"),
        ("import syft.VirtualWorker", "is no module: it is planrt.VirtualWorker"),
        ("from syft.workers.virtual.VirtualWorker import send", "no 'VirtualWorker'|is no module"),
    ],
)
def test_names_that_nobody_had_say_where_to_look(code, says):
    with pytest.raises(ImportError, match=says):
        exec(code, {})


def test_an_attribute_that_nobody_had():
    import syft as sy

    assert not hasattr(sy, "nothing_of_the_kind")
    with pytest.raises(UnknownNameError, match=r"MIGRATION\.md"):
        sy.nothing_of_the_kind  # noqa: B018


def test_star_and_dir():
    names: dict[str, object] = {}
    exec("from syft import *", names)
    assert names["VirtualWorker"] is planrt.VirtualWorker
    assert names["torch"] is torch
    import syft as sy

    assert {"TorchHook", "frameworks", "Plan", "serde"} <= set(dir(sy))
    assert "AdditiveSharingTensor" not in dir(sy)


def test_the_hook_and_worker_are_those_of_now():
    import syft as sy

    assert sy.hook is planrt.hook
    assert sy.local_worker is planrt.local_worker


def test_what_python_asks_of_every_module_is_answered_at_once(monkeypatch):
    """`inspect` looks for ``__file__`` of all modules, for each frame of a stack: nobody searches the table then."""
    import syft.frameworks.torch.fl  # noqa: F401

    def never(*args, **kwargs):
        raise AssertionError("searched for near names")

    monkeypatch.setattr(difflib, "get_close_matches", never)
    assert inspect.stack()[0].function == "test_what_python_asks_of_every_module_is_answered_at_once"
    for module in [one for name, one in sys.modules.items() if name.partition(".")[0] == "syft"]:
        assert not hasattr(module, "__file__")
        assert not hasattr(module, "__wrapped__")
