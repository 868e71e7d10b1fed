"""Modules that moved into rooms are found under the paths that they had in planrt 0.1."""

import subprocess
import sys
from importlib import import_module

import pytest

from planrt.moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_a_module_has_its_names_under_its_old_path(old):
    new = import_module(MOVED[old][0])
    found = import_module(old)
    names = [name for name, value in vars(new).items() if getattr(value, "__module__", None) == new.__name__]
    assert names
    assert all(getattr(found, name) is getattr(new, name) for name in names)


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("planrt.plans.policy", "Policy"), ("planrt.plans.analysis", "analyse"), ("planrt.fl.data", "find"),
        ("planrt.workers.pointers", "PointerTensor"), ("planrt.plans.files", "load_plan"),
        ("planrt.workers.objects", "fetch_all"), ("planrt.workers.state", "own_versions"),
    ],
)  # fmt: skip
def test_names_are_where_scripts_look_for_them(package, name):
    code = f"from {package} import {name}; assert callable({name}), {name}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_not_there_says_where_the_module_is():
    with pytest.raises(
        AttributeError, match=r"planrt\.fl\.children.*now planrt\.fl\.runs\.children.*no attribute 'nobody'"
    ):
        import_module("planrt.fl.children").nobody  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match=r"planrt\.fl\.nowhere"):
        import_module("planrt.fl.nowhere")
