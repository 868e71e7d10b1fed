"""Errors of planrt show the user's own lines: in scripts and in notebooks."""

import json
import os
import subprocess
import sys

import jupyter_client
import pytest

SET_UP = "import torch, planrt as sy\nhook = sy.TorchHook(torch)\nbob = sy.VirtualWorker(hook, id='bob')\n"
FAILING = {
    "an op on a worker": "x = torch.ones(3).send(bob)\nx.index_select(0, torch.tensor([7]).send(bob)).get()",
    "shapes that do not fit": "torch.ones(3).send(bob) + torch.ones(4).send(bob)",
    "torch's own Python code": "torch.nn.functional.cross_entropy(torch.ones(3, 2).send(bob), torch.ones(4).send(bob))",
    "reading a remote value": "float(torch.ones(3).send(bob).sum())",
    "a wrong option": "bob.fit('nothing here')",
    "recording": "def f(x):\n    return x if x.sum() > 0 else -x\n\nsy.func2plan()(f).build(torch.ones(2))",
    "nobody there": "sy.WebsocketClientWorker('alice', '127.0.0.1', 1)",
    "awaited": "import asyncio\nasyncio.run(sy.WebsocketClientWorker.connect('alice', 'ws://127.0.0.1:1'))",
    "a plan on a worker": (
        "@sy.func2plan(args_shape=[(-1,), (1,)])\ndef h(x, i):\n    return x[i.to(torch.int64)]\n\n"
        "bob.run(h, torch.ones(3), torch.tensor([9.0]))"
    ),
}
LONGEST = 8
"""Lines: the head, the user's frames with their lines and carets, and the words of the error."""


RUN_ALL = """
import json, runpy, sys
for path in json.loads(sys.argv[1]):
    try:
        runpy.run_path(path)
    except BaseException as error:
        here = error.__traceback__
        sys.excepthook(type(error), error.with_traceback(here.tb_next), here.tb_next)
    print("-----", file=sys.stderr, flush=True)
"""


def stderr_of(folder, *programs, **environment):
    """What scripts print to stderr when they fail; all of them in one process, as torch takes seconds to import."""
    paths = [folder / f"program{number}.py" for number, _ in enumerate(programs)]
    for path, program in zip(paths, programs, strict=True):
        path.write_text(SET_UP + program + "\n")
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps([str(path) for path in paths])],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.split("-----\n")[:-1]


@pytest.fixture(scope="module")
def shown_by_scripts(tmp_path_factory):
    texts = stderr_of(tmp_path_factory.mktemp("programs"), "import planrt", *FAILING.values())
    return dict(zip(FAILING, texts[1:], strict=True))


@pytest.mark.parametrize("name", FAILING)
def test_a_script_shows_the_users_lines_only(shown_by_scripts, name):
    shown = shown_by_scripts[name]
    assert 3 <= len(shown.splitlines()) <= LONGEST, shown
    assert FAILING[name].splitlines()[-1] in shown
    assert "loop.py" not in shown
    assert "site-packages" not in shown


def test_the_whole_traceback_is_there_for_who_asks(tmp_path):
    (shown,) = stderr_of(tmp_path, FAILING["an op on a worker"], PLANRT_FULL_TRACEBACK="1")
    assert len(shown.splitlines()) > LONGEST
    assert "loop.py" in shown


def test_the_users_own_code_is_shown_as_ever_and_as_a_cause(tmp_path):
    own = "def load():\n    raise KeyError('mine')\n\nload()"
    cause = """
def count(x):
    raise KeyError("mine")

try:
    count(1)
except KeyError as error:
    raise sy.errors.DataError("no data") from error
"""
    shown_own, shown_cause = stderr_of(tmp_path, own, cause)
    assert shown_own.splitlines()[-1] == "KeyError: 'mine'"
    assert "in load" in shown_own
    assert "KeyError: 'mine'" in shown_cause
    assert "direct cause" in shown_cause
    assert shown_cause.splitlines()[-1] == "planrt.errors.DataError: no data"


def test_a_hook_of_somebody_elses_stays(tmp_path):
    path = tmp_path / "program.py"
    path.write_text("import sys\nsys.excepthook = print\nimport planrt\nassert sys.excepthook is print\n")
    subprocess.run([sys.executable, str(path)], check=True, timeout=60)


@pytest.mark.filterwarnings("default")
def test_a_notebook_shows_a_few_lines_and_names_the_cell():
    manager = jupyter_client.KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    problems = []

    def collect(message):
        if message["msg_type"] == "error":
            problems.append(message["content"]["traceback"])

    try:
        client.wait_for_ready(timeout=60)
        client.execute_interactive(SET_UP, timeout=60, output_hook=collect)
        assert not problems
        for name in (
            "an op on a worker",
            "a plan on a worker",
            "recording",
            "a wrong option",
            "nobody there",
            "shapes that do not fit",
            "torch's own Python code",
        ):
            client.execute_interactive(FAILING[name], timeout=60, output_hook=collect)
            lines = "\n".join(problems.pop()).splitlines()
            assert len(lines) <= LONGEST, lines
            assert any(line.startswith("Cell In[") for line in lines), lines
            assert any(FAILING[name].splitlines()[-1] in line for line in lines), lines
        assert not problems
        client.execute_interactive(
            "import traceback\ntry:\n    bob.fit('x')\nexcept sy.errors.LocalError as error:\n"
            "    assert len(traceback.extract_tb(error.__traceback__)) > 3",
            timeout=60,
            output_hook=collect,
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert not problems, problems  # the error itself keeps every frame, for debuggers
