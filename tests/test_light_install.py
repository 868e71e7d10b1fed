"""planrt without the packages of its extra ``run``: the jobs that need them import them, and nothing else does."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from planrt.errors import LocalError, MissingPackageError
from planrt.extras import needed
from planrt.fl.report import plot
from planrt.fl.utils import iris_data_partial
from planrt.sandbox import create_sandbox
from tests.fl.test_report import report

ROOT = Path(__file__).parents[1]
ABSENT = ("sklearn", "matplotlib", "tqdm", "torchvision", "prometheus_client")
OPTIONAL = {
    "run": {"scikit-learn", "matplotlib", "tqdm"}, "onnx": {"onnx", "onnxscript"}, "metrics": {"prometheus-client"},
    "vertical": {"phe", "gmpy2", "pandas", "pyarrow"},
}  # fmt: skip

ROUNDS = """
import asyncio, sys, torch, planrt
from planrt.fl import RoundScheduler, TrainConfig

assert sys.modules["sklearn"] is None
x = torch.arange(40.0).reshape(20, 2) / 40
datasets = {"bob": {"points": planrt.BaseDataset(x, x.sum(1, keepdim=True))}}


async def main():
    async with planrt.local_workers("bob", datasets=datasets, threads=1) as workers:
        config = TrainConfig(torch.nn.Linear(2, 1), torch.nn.MSELoss(), batch_size=20, optimizer_args={"lr": 0.1})
        scheduler = RoundScheduler(workers, config, dataset_key="points", seed=1)
        await scheduler.prepare()
        state, losses = config.state, []
        for number in range(1, 6):
            result = await scheduler.run_round(number, state)
            state = result.state
            losses.append(result.loss)
        assert losses[-1] < losses[0], losses


if __name__ == "__main__":
    asyncio.run(main())
    print("trained")
"""


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """``without(arguments...)`` runs Python where the packages cannot be imported, nor in the processes it starts."""
    folder = tmp_path_factory.mktemp("without")
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in ABSENT)
    (folder / "sitecustomize.py").write_text(f"import sys\n{blocked}")
    (folder / "rounds.py").write_text(ROUNDS)
    (folder / "empty").mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
        environment |= {"PLANRT_DATA": str(folder / "empty"), "XDG_CACHE_HOME": str(folder / "empty")}
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            timeout=240,
        )

    return run


def test_planrt_imports_and_a_served_worker_trains_a_data_set_of_tensors(without):
    done = without("rounds.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "trained\n", "")


def test_every_public_name_is_there(without):
    done = without(
        "-c", "import planrt; [getattr(planrt, name) for name in planrt.__all__]; import planrt.fl.utils"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "--dataset", "digits"], "planrt run: error: this run needs the package tqdm: "),
        (
            ["serve", "--id", "alice", "--dataset", "digits"],
            "worker alice: error: the data set of handwritten digits needs the package scikit-learn: ",
        ),
        (
            ["serve", "--id", "alice", "--data", "."],
            "worker alice: error: no MNIST in .: using scikit-learn's 1,797 handwritten digits instead, which needs "
            "the package scikit-learn: ",
        ),
    ],
)
def test_a_command_that_needs_more_says_in_one_line_what_to_install(without, command, message):
    done = without("-m", "planrt", *command)
    assert done.returncode == 1
    assert done.stderr == f"{message}pip install 'planrt[run]'\n"
    assert "starting" not in done.stdout


def test_a_worker_that_shows_metrics_says_in_one_line_what_to_install(without):
    done = without("-m", "planrt", "serve", "--id", "alice", "--empty", "--metrics-port", "0")
    assert (done.returncode, done.stderr) == (
        1,
        "worker alice: error: --metrics-port needs the package prometheus-client: pip install 'planrt[metrics]'\n",
    )


@pytest.mark.parametrize(
    ("job", "package"),
    [
        (lambda path: create_sandbox({}), "scikit-learn"),
        (lambda path: iris_data_partial(), "scikit-learn"),
        (lambda path: plot(report(), path / "plot.png"), "matplotlib"),
    ],
)
def test_a_job_that_needs_more_is_a_typed_error(job, package, monkeypatch, tmp_path, capsys):
    for name in [one for one in sys.modules if one.partition(".")[0] in ABSENT]:
        monkeypatch.delitem(sys.modules, name)
    for name in ABSENT:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingPackageError, match=rf"needs the package {package}: pip install 'planrt\[run\]'$"
    ) as one:
        job(tmp_path)
    assert isinstance(one.value, LocalError)
    assert isinstance(one.value, ImportError)
    assert one.value.name == {"scikit-learn": "sklearn"}.get(package, package)
    assert capsys.readouterr().out == ""  # said before anything was made
    assert not list(tmp_path.iterdir())


def test_a_sandbox_without_data_needs_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    names: dict[str, object] = {}
    create_sandbox(names, verbose=False, download_data=False)
    for worker in names["workers"]:
        worker.close()


def test_a_package_that_is_there_and_broken_says_why(tmp_path, monkeypatch):
    (tmp_path / "halfmade.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        MissingPackageError, match="needs the package halfmade .importing it failed: No module named"
    ):
        needed("halfmade", by="a test")


def test_the_extras_hold_what_jobs_ask_for_and_nothing_imports_it_otherwise():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {
        extra: {_package(text) for text in project["optional-dependencies"][extra]} for extra in OPTIONAL
    }
    assert named == OPTIONAL
    optional = set().union(*OPTIONAL.values())
    assert not optional & {_package(text) for text in project["dependencies"]}
    modules = {"sklearn" if package == "scikit-learn" else package.replace("-", "_") for package in optional}
    for path in (ROOT / "planrt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not modules & {name.partition(".")[0] for name in names}, f"{path}:{node.lineno}"


def _package(text: str) -> str:
    return text.partition(">")[0].partition("[")[0].strip()
