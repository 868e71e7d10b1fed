"""What the pages show runs: every block of Python and of shell, in order, or it says why not."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from benchmarks import soak
from planrt import cli
from planrt.fl import mnist_async, serve
from tests.docs.pages import LANGUAGES, PAGES, ROOT, RUNNABLE, Block, blocks, commands, programs

ALL = [block for page in PAGES for block in blocks(page)]

NOT_RUN = {
    ("README.md", "pip install"): "it installs a few GB",
    (
        "README.md",
        "make run",
    ): "it installs a few GB; the command itself is run by tests/scripts/test_commands.py",
    ("README.md", ".venv/bin/planrt run"): (
        "it trains for half a minute; tests/scripts/test_commands.py runs it with fewer rounds"
    ),
    ("README.md", "make test"): "it is the test suite",
    ("README.md", "planrt serve --id clinic --empty"): (
        "it runs until it is stopped; the same worker, within this process, follows"
    ),
    ("README.md", "planrt serve --id clinic --port"): "it runs until it is stopped",
    ("README.md", "python scripts/start"): "it runs until it is stopped; see tests/scripts/test_commands.py",
    ("README.md", "planrt serve --id alice"): "they run until they are stopped, and listen on all networks",
    ("README.md", "planrt run --worker"): "it needs these two machines",
    ("README.md", "planrt serve --id clinic --dataset"): (
        "it runs until it is stopped; see tests/scripts/test_commands.py"
    ),
    ("README.md", "planrt audit audit.jsonl --user"): "there is no such log here",
    ("docs/connect.md", "planrt serve --id alice"): "they run until they are stopped",
    ("docs/runs.md", "planrt run --rounds 40"): (
        "it trains for half a minute; tests/scripts/test_going_on.py runs it with fewer rounds"
    ),
    ("docs/connect.md", "planrt serve --id clinic"): "it runs until it is stopped",
    ("deploy/README.md", "docker compose"): (
        "it needs a container runtime; tests/deploy/test_compose.py starts the same processes"
    ),
    ("deploy/README.md", "kubectl create"): "it needs a cluster",
    ("docs/operations.md", "planrt serve --id alice"): (
        "it runs until it is stopped; tests/deploy/test_compose.py starts such workers"
    ),
    ("docs/operations.md", "planrt run --rounds 40"): (
        "it trains for half a minute; tests/scripts/test_going_on.py kills, freezes and resumes such runs"
    ),
    ("docs/isolation.md", "planrt serve --id clinic"): "it runs until it is stopped",
    ("CONTRIBUTING.md", "make check"): "these are the test suite and the benchmarks",
    ("CONTRIBUTING.md", "bash scripts/test_versions.sh"): "it installs several versions of PyTorch",
    ("benchmarks/README.md", ".venv/bin/python -m benchmarks.soak"): (
        "it takes a quarter of an hour; tests/test_soak.py runs half a minute of it"
    ),
    ("benchmarks/README.md", "make bench"): (
        "it measures for ten minutes; tests/test_benchmarks.py runs the quick form"
    ),
}
"""Page and how the block begins -> why it is not run. Whoever adds a block that is not run says so here too."""


def named(block: Block) -> str:
    return f"{block.page.relative_to(ROOT)}:{block.line}"


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, number) for page in PAGES for number, _ in enumerate(programs(page))],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_the_blocks_of_a_program_run_in_order(page, number, tmp_path, warm_python):
    done = subprocess.run(
        [warm_python, "-m", "tests.docs.run_page", str(page), str(number)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warnings either
    *printed, counts = done.stdout.splitlines()
    program = programs(page)[number]
    assert json.loads(counts)["ran"] == sum(block.runs for block in program)
    claims = sum(block.text.count("  # tensor(") for block in program if block.runs)
    assert json.loads(counts)["compared"] >= claims + sum(block.language == "console" for block in program)
    losses = [float(line[5:]) for line in printed if re.fullmatch(r"loss \d\.\d+", line)]
    assert all(loss < 0.6 for loss in losses)


def test_the_readme_has_programs_of_each_kind():
    found = programs(ROOT / "README.md")
    assert len(found) >= 4
    assert sum(block.runs for program in found for block in program) >= 14


def test_every_block_says_what_it_is():
    for block in ALL:
        assert block.language in LANGUAGES, f"{named(block)}: write one of {LANGUAGES} behind the fence"
        assert not (block.not_run and block.language not in RUNNABLE), named(block)
    for page in PAGES:
        indented = re.findall(r"(?m)(?<=\n\n)    \S.*$", re.sub(r"(?ms)^```.*?^```", "", page.read_text()))
        assert page.name == "ARCHITECTURE.md" or not indented, f"{page.name}: fence {indented}"


def test_what_is_not_run_says_why_and_is_listed_here():
    found = {}
    for block in (one for one in ALL if one.not_run):
        begins = [
            key
            for key in NOT_RUN
            if key[0] == str(block.page.relative_to(ROOT)) and block.text.startswith(key[1])
        ]
        assert len(begins) == 1, f"{named(block)} is not run ({block.not_run}): list it in this test"
        found[begins[0]] = block.not_run
    assert found == NOT_RUN


OTHERS = ("git", "bash", "mkdir", "docker", "kubectl", "kill", "rm", "df")


def checked_command(words: list[str]) -> None:
    """That a command of ours takes these words, without running it. Other commands must be files or targets here."""
    if words[1:3] == ["-m", "benchmarks.soak"]:
        soak.parser().parse_args(words[3:])
        return
    if words[:2] == ["python", "-m"]:
        words = {"planrt.fl.serve": ["planrt", "serve"], "planrt.fl.mnist_async": ["planrt", "run"]}[
            words[2]
        ] + words[3:]
    program = words[0].removeprefix(".venv/bin/")
    if program == "planrt" and words[1] == "serve":
        serve.parser("planrt serve").parse_args(words[2:])
    elif program == "planrt" and words[1] == "run":
        mnist_async.parser("planrt run").parse_args(words[2:])
    elif program == "planrt":
        cli._parser().parse_args(words[1:])
    elif program == "make":
        assert re.search(rf"(?m)^{words[1]}:", (ROOT / "Makefile").read_text()), words
    elif program == "python":
        assert (ROOT / words[1]).is_file() or words[1] == "-c", words
    else:
        assert words[:2] == ["pip", "install"] or program in OTHERS, words


@pytest.mark.parametrize("block", [one for one in ALL if one.language in ("sh", "console")], ids=named)
def test_every_command_takes_the_options_that_are_shown(block):
    found = commands(block)
    assert found
    for command in found:
        checked_command(shlex.split(command))


def test_commands_within_the_text_take_their_options():
    found = 0
    for page in PAGES:
        text = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
        for command in re.findall(r"`((?:planrt [a-z]+|python|make) [^`\n]*)`", text):
            checked_command(shlex.split(command))
            found += 1
    assert found >= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", linked.read_text(encoding="utf-8"))
            anchors = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
            assert anchor in anchors, f"{page.name} links to {target}"


@pytest.mark.parametrize(
    ("words", "rounds"), [([], []), (["ARGS=--rounds 3"], ["3"]), (["ROUNDS=7", "ARGS=--seed 2"], ["7"])]
)
def test_make_run_hands_its_words_on_once(words, rounds):
    done = subprocess.run(["make", "-n", "run", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    (command,) = [line for line in done.stdout.splitlines() if "planrt.fl.mnist_async" in line]
    assert re.findall(r"--rounds (\d+)", command) == rounds
    mnist_async.parser("mnist_async").parse_args(shlex.split(command)[3:])
