"""What type checkers see of planrt: a user's program under mypy --strict, which also runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PROGRAMS = ("user_program", "wrong_program")


@pytest.fixture(scope="module")
def told():
    """Name of a file -> what mypy says of it, in the order of the lines, as its comments have it."""
    # The options, and so the cache, of the project's own run: torch takes minutes the first time.
    paths = [f"tests/typing/{name}.py" for name in PROGRAMS]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-pretty", *paths],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
    )
    found: dict[str, list[tuple[int, str]]] = {name: [] for name in PROGRAMS}
    for line in done.stdout.splitlines():
        part = re.fullmatch(r"tests/typing/(\w+)\.py:(\d+): (error|note): (.*)", line)
        if part is None:
            assert line.startswith("Found "), done.stdout
            continue
        revealed = re.fullmatch(r'Revealed type is "(.*)"', part[4])
        code = re.search(r"\[([a-z-]+)\]$", part[4])
        if part[3] == "error":
            found[part[1]].append((int(part[2]), f"error: {code[1] if code else line}"))
        elif revealed:  # other notes explain the error before them
            found[part[1]].append((int(part[2]), f"reveals: {revealed[1].replace('builtins.', '')}"))
    return {name: [text for _, text in sorted(said)] for name, said in found.items()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_mypy_says_what_the_comments_say(told, name):
    wanted = re.findall(r"# ((?:reveals|error): .*)$", (HERE / f"{name}.py").read_text(), re.MULTILINE)
    assert len(wanted) >= 10
    assert told[name] == wanted


@pytest.mark.filterwarnings("default")
def test_the_program_runs():
    done = subprocess.run(
        [sys.executable, "-m", "tests.typing.user_program"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all of it ran\n"


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "planrt" / "py.typed").is_file()
