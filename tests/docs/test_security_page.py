"""SECURITY.md names modules and tests that are there: each defence one of each at least."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
HEADER = ["what", "how", "where", "tests that try it"]
NAMED = re.compile(r"`([\w./-]+\.py)(?:::(\w+))?`")


def section(text: str, heading: str) -> str:
    """Returns what stands under a heading of the second level."""
    (found,) = re.findall(rf"(?ms)^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text)
    return found


def defences(text: str) -> list[list[str]]:
    """Returns the rows of the tables of defences, as their cells."""
    lines = [line for line in section(text, "What is defended").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row != HEADER and not all(re.fullmatch("-+", cell) for cell in row)]


@cache
def decorators_of_tests(path: Path) -> dict[str, str]:
    """Returns the tests that pytest finds in a file, each with its decorators as text."""
    if not re.fullmatch(r"test_\w+\.py", path.name):
        return {}
    return {
        node.name: " ".join(ast.unparse(one) for one in node.decorator_list)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def wrong(text: str) -> list[str]:
    """Returns what a text names and is not there, or is there and does not run."""
    found = []
    for file, test in NAMED.findall(text):
        path = ROOT / file
        tests = decorators_of_tests(path) if path.is_file() and test else {}
        if not path.is_file() or (
            test and (test not in tests or re.search(r"mark\.(skip|xfail)", tests[test]))
        ):
            found.append(f"{file}::{test}" if test else file)
    return found


def test_what_the_page_names_is_there():
    assert wrong(PAGE) == []


@pytest.mark.parametrize("row", defences(PAGE), ids=lambda row: row[0])
def test_each_defence_has_a_module_and_a_test_that_tries_it(row):
    what, how, where, tried = row
    assert what
    assert how
    for cell in (where, tried):
        assert re.sub(NAMED, "", cell).strip() == "", "names in backticks only"
    modules, tests = NAMED.findall(where), NAMED.findall(tried)
    assert modules
    assert all(file.startswith(("planrt/", "fuzz/")) and not test for file, test in modules)
    assert tests
    assert all(file.startswith("tests/") and test for file, test in tests)


def test_the_page_has_its_parts():
    assert len(defences(PAGE)) > 40
    for heading in ("How to report a hole", "Who the parties are", "What is not defended"):
        assert len(section(PAGE, heading)) > 300
    for page in ("README.md", "ARCHITECTURE.md"):
        assert "](SECURITY.md)" in (ROOT / page).read_text(encoding="utf-8")


def test_names_that_are_wrong_are_found():
    here = "tests/docs/test_security_page.py"
    assert wrong(f"`{here}::test_the_page_has_its_parts` and `planrt/shown.py`") == []
    for name in (
        "planrt/none.py", "tests/none.py::test_x", f"{here}::test_nobody_wrote", f"{here}::wrong",
        "planrt/shown.py::shown",
    ):  # fmt: skip
        assert wrong(f"and `{name}`,") == [name]
