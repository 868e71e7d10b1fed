"""The examples as their readers run them: in this process's workers, and in worker processes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from planrt.fl.data import boston
from tests.processes import PATIENCE, eventually, marked, write_small_mnist

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py"))


@dataclass
class Ended:
    """An example that ended."""

    code: int
    out: str
    err: str

    def number(self, pattern: str) -> float:
        """What `pattern`'s group matches last in the output."""
        found = re.findall(pattern, self.out)
        assert found, self.out + self.err
        return float(found[-1])


@dataclass
class Examples:
    """Starts examples in a folder without data, and marks them and all their children.

    They, and the worker processes that they start, are run by `python`.
    """

    folder: Path
    token: str
    python: str

    def start(self, name: str, *options: str, data: Path | None = None) -> subprocess.Popen[str]:
        env = {**os.environ, "PLANRT_TEST_TOKEN": self.token, "XDG_CACHE_HOME": str(self.folder)}
        env |= {"PLANRT_DATA": str(data or self.folder)}
        return subprocess.Popen(
            [self.python, str(EXAMPLES / f"{name}.py"), *options],
            cwd=self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, *processes: subprocess.Popen[str]) -> list[Ended]:
        """Waits for the ends, which must leave no process behind."""
        spoken = [process.communicate(timeout=4 * PATIENCE) for process in processes]
        assert eventually(lambda: not marked(self.token)), "processes left behind"
        return [Ended(process.returncode, *said) for process, said in zip(processes, spoken, strict=True)]

    def run(self, name: str, *options: str, data: Path | None = None) -> Ended:
        return self._succeeded(self.finish(self.start(name, *options, data=data)))[0]

    def run_both_ways(self, name: str, *options: str, data: Path | None = None) -> list[Ended]:
        """On virtual workers, and on worker processes, at the same time."""
        ways = [self.start(name, *options, *way, data=data) for way in ([], ["--websocket"])]
        return self._succeeded(self.finish(*ways))

    @staticmethod
    def _succeeded(ended: list[Ended]) -> list[Ended]:
        for one in ended:
            assert (one.code, one.err) == (0, ""), one  # no warnings either
        return ended


@pytest.fixture
def examples(tmp_path, warm_python) -> Iterator[Examples]:
    examples = Examples(tmp_path, uuid.uuid4().hex, warm_python)
    yield examples
    for pid in marked(examples.token):  # only after a test that failed half-way
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def boston_folder() -> Path:
    """The folder that holds the real Boston Housing file, from PLANRT_DATA; as `mnist_folder` does for MNIST."""
    folder = os.environ.get("PLANRT_DATA")
    if folder and (Path(folder) / boston.FILE).is_file():
        return Path(folder).resolve()
    reason = f"needs {boston.FILE}: set PLANRT_DATA to the folder that holds it"
    if os.environ.get("PLANRT_REQUIRE_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


# -------------------------------------------------------------------------------------------------- the toy


def test_the_toy_learns_from_both_workers_of_either_kind_alike(examples):
    """Also that examples, and their worker processes, start by themselves."""
    examples.python = sys.executable
    virtual, websocket = examples.run_both_ways("toy_in_turn")
    assert len(re.findall(r"Pass \d+: bob [\d.]+, alice [\d.]+\n", virtual.out)) == 10
    assert virtual.number(r"Final loss ([\d.]+)") < 0.03
    assert virtual.out.splitlines() == websocket.out.splitlines()[1:]  # the first line names the processes


def test_averaging_through_a_third_worker_learns_from_both(examples):
    for ended in examples.run_both_ways("model_averaging"):
        losses = [float(loss) for loss in re.findall(r"Round \d+: loss ([\d.]+)", ended.out)]
        assert len(losses) == 10
        assert losses[0] > losses[4] > losses[9]
        assert ended.number(r"Final loss ([\d.]+)") < 0.03


# ---------------------------------------------------------------------------------------------------- MNIST


def test_the_cnn_trains_on_both_halves(examples, tmp_path):
    small = write_small_mnist(tmp_path / "small")
    for ended in examples.run_both_ways("cnn_mnist", "--epochs", "2", "--batch-size", "8", data=small):
        assert "40 items (bob: 20, alice: 20)" in ended.out
        assert ended.number(r"Epoch 2: .*accuracy (\d+)/20") <= 20


def test_the_cnn_learns_mnist(examples, mnist_folder):
    ended = examples.run("cnn_mnist", "--train-items", "2000", "--epochs", "1", data=mnist_folder)
    assert "(bob: 1,000, alice: 1,000)" in ended.out
    assert ended.number(r"accuracy (\d+)/10000") > 6000


# --------------------------------------------------------------------------------------------------- Boston


def test_two_workers_learn_the_prices(examples, boston_folder):
    for ended in examples.run_both_ways("boston_two_workers", "--epochs", "20", "--data", str(boston_folder)):
        assert "404 items (bob: 202, alice: 202)" in ended.out
        assert ended.number(r"Final test MSE ([\d.]+)") < 25


def test_three_workers_learn_the_prices_and_nobody_sees_their_models(examples, boston_folder):
    for ended in examples.run_both_ways("boston_secure", "--epochs", "12", "--data", str(boston_folder)):
        assert len(re.findall(r"Round \d+: mean loss [\d.]+ over all workers", ended.out)) == 12
        assert ended.number(r"without secure aggregation: ([\d.e-]+)") < 1e-4
        assert ended.number(r"Final test MSE ([\d.]+)") < 30


@pytest.mark.parametrize("options", [("--train-items", "8"), ("--batch-size", "404")])
def test_prices_that_one_worker_has_alone_are_not_averaged(examples, boston_folder, options):
    """There would be no pair of batches: the example would train on nothing, and say nothing of it."""
    (ended,) = examples.finish(
        examples.start("encrypted_averaging", "--epochs", "1", *options, data=boston_folder)
    )
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1), ended
    assert (
        "each of the two workers needs one: write a smaller --batch-size, or more --train-items" in ended.err
    )


def test_prices_without_the_file_are_one_line(examples):
    (ended,) = examples.finish(examples.start("boston_two_workers"))
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert f"no {boston.FILE} in {examples.folder}" in ended.err
    assert "--data" in ended.err


# ------------------------------------------------------------------------------------------------- the sandbox


def test_the_sandbox_finds_and_trains(examples, boston_folder):
    ended = examples.run("sandbox_search", "--epochs", "8", data=boston_folder)
    assert "#boston is on bob, theo, jason, alice, andy, jon" in ended.out
    assert ended.number(r"Epoch 8: mean loss ([\d.]+)") < 80


def test_the_sandbox_on_worker_processes_and_without_boston(examples):
    ended = examples.run("sandbox_search", "--epochs", "2", "--websocket")
    losses = [float(loss) for loss in re.findall(r"mean loss ([\d.]+)", ended.out)]
    assert ended.out.count("ws://127.0.0.1:") == 6
    assert "Boston Housing: left out" in ended.out
    assert "#diabetes is on bob" in ended.out
    assert losses[1] < losses[0]


# ----------------------------------------------------------------------------------------- plans and protocols


def test_plans_of_all_kinds(examples):
    for ended in examples.run_both_ways("plans"):
        assert "_1 = _0.add(_0)" in ended.out
        assert "[2.0, 4.0, 6.0], in 1 answer\n" in ended.out
        assert "[1.0]\n[1.0, 1.0, 1.0]\n" in ended.out
        assert "As here: [True, True]\n" in ended.out
        assert "\tTags: #square\n" in ended.out
        assert "[9.0] ['_1 = _0.mul(_0)', 'return _1']\n" in ended.out
        assert ended.number(r"Final loss ([\d.]+)") < 0.03


def test_protocols_of_all_shapes(examples):
    for ended in examples.run_both_ways("protocols"):
        assert re.search(
            r"<Protocol id:\d+ owner:me resolved>\n - alice: \[PointerPlan \| me:\d+ -> alice:", ended.out
        )
        assert "send alice\nmove alice -> bob\nmove bob -> charlie\n(Wrapper)>[PointerTensor" in ended.out
        assert "send remote run request to james\n" in ended.out
        assert re.search(
            r"-> james:\d+ -> charlie\]\n\(Wrapper\)>\[PointerTensor \| me:\d+ -> charlie:", ended.out
        )
        assert re.search(r"\[\[PointerProtocol \| me:\d+ -> james:\d+\]\]", ended.out)
        assert ended.out.count("tensor([4.])\n") == 3
        assert "average done\nAfter 10 rounds: y = 1.993 x + -1.000" in ended.out


def test_split_networks_have_the_losses_of_the_whole_one(examples, tmp_path):
    small = write_small_mnist(tmp_path / "small")
    options = ("--epochs", "3", "--batch-size", "10", "--lr", "0.05")
    virtual, websocket = examples.run_both_ways("split_learning", *options, data=small)
    for ended, most in ((virtual, 0.0), (websocket, 1e-4)):
        assert ended.number(r"Largest difference to the whole network: ([\d.e+-]+)") <= most
        for way in ("whole", "two workers", "three workers"):
            losses = [float(loss) for loss in re.findall(way + r" ([\d.]+)", ended.out)]
            assert len(losses) == 3
            assert losses[2] < losses[0]


def test_split_networks_learn_mnist(examples, mnist_folder):
    ended = examples.run("split_learning", "--train-items", "3000", "--epochs", "2", data=mnist_folder)
    assert ended.number(r"Epoch 2: .*three workers ([\d.]+)") < 0.6
    assert ended.number(r"whole network: ([\d.e+-]+)") == 0


def test_owners_of_different_columns_train_as_on_the_joined_table(examples, tmp_path, boston_folder):
    options = ("--epochs", "2", "--key-bits", "1024", "--shares", "--data", str(boston_folder))
    plot = ("--plot", str(tmp_path / "losses.png"))
    for ended in examples.run_both_ways("vertical", *options, *plot):
        off = [float(one) for one in re.findall(r"to the joined table: ([\d.e+-]+)", ended.out)]
        assert len(off) == 5  # of both data sets, encrypted and on shares; and the exact loss
        assert max(off) < 1e-5
        assert "399 people in common>, 320 to train on and 79 held out" in ended.out
        assert ended.number(r"together: loss [\d.]+, accuracy ([\d.]+)") > 0.8
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_owners_of_different_columns_go_on_after_a_break(examples, tmp_path):
    """The bank was gone before it had kept the second epoch; processes go on where virtual workers were."""
    kept = tmp_path / "kept"
    options = ("--epochs", "2", "--key-bits", "1024", "--keep", str(kept))
    first = examples.run("vertical", *options)
    for path in (kept / "breast cancer" / "bank").glob("*-0000002.run"):
        path.unlink()
    again = examples.run("vertical", *options, "--resume", "--websocket")
    assert "breast cancer: goes on after epoch 1\n" in again.out
    weights = [re.findall(r"[+-]\d\.\d{6}  joined", ended.out) for ended in (first, again)]
    assert len(weights[0]) >= 31
    assert weights[0] == weights[1]


# ------------------------------------------------------------------------------------------------- encrypted


def test_the_encrypted_calculator(examples):
    for ended in examples.run_both_ways("encrypted_calculator"):
        assert "(Wrapper)>[AdditiveSharingTensor]\n\t-> [PointerTensor | me:" in ended.out
        assert "\t*crypto provider: james*\ntensor([25])\n" in ended.out
        assert (
            "x * y: tensor([125])\nx > y: tensor([1])\nx < y: tensor([0])\nx == y: tensor([0])\n" in ended.out
        )
        assert "x.mm(y): [[2, 4], [6, 8]]\nx.max(dim=0): tensor([4, 3]) at tensor([1, 0])\n" in ended.out


def test_the_encrypted_toy_is_closer_with_more_digits(examples):
    for ended in examples.run_both_ways("encrypted_toy"):
        off = [float(one) for one in re.findall(r"at most ([\d.]+) off", ended.out)]
        assert off[2] < off[1] < off[0] < 0.1


def test_encrypted_training(examples, tmp_path):
    small = write_small_mnist(tmp_path / "small")
    for ended in examples.run_both_ways(
        "encrypted_training", "--epochs", "2", "--batch-size", "20", "--lr", "0.001", data=small
    ):
        losses = [float(loss) for loss in re.findall(r"Epoch \d: loss ([\d.]+)", ended.out)]
        assert losses[1] < losses[0]
        assert ended.number(r"Test: (\d+)/20 ") <= 20


def test_encrypted_evaluation_gives_the_same_answers(examples, mnist_folder):
    options = ("--train-items", "1000", "--test-items", "20", "--batch-size", "20")
    for ended in examples.run_both_ways("encrypted_evaluation", *options, data=mnist_folder):
        assert "The same answers as in the clear: 20/20" in ended.out
        assert ended.number(r"Encrypted: (\d+)/20 right") > 10


def test_encrypted_evaluation_of_a_convolutional_network(examples, mnist_folder):
    options = ("--convolutional", "--train-items", "300", "--test-items", "4", "--batch-size", "4")
    ended = examples.run("encrypted_evaluation", *options, data=mnist_folder)
    assert "The same answers as in the clear: 4/4" in ended.out


def test_encrypted_averaging(examples, boston_folder):
    options = ("--epochs", "1", "--train-items", "48", "--data", str(boston_folder))
    virtual, websocket = (
        one.number(r"Epoch 1: test MSE ([\d.]+)")
        for one in examples.run_both_ways("encrypted_averaging", *options)
    )
    assert virtual < 620
    assert abs(virtual - websocket) < 0.1


# ---------------------------------------------------------------------------------------------- the hospital


def test_a_hospital_approves_a_plan_and_gives_out_nothing_else(examples):
    virtual, websocket = examples.run_both_ways("hospital", "--epochs", "20")
    for ended in (virtual, websocket):
        for kind in ("GetNotPermittedError", "NotApprovedError", "PolicyRefusedError"):
            assert f"{kind}: worker 'hospital': " in ended.out
        assert "status: pending" in ended.out
        assert "was not approved: these are five patients" in ended.out
        assert "x: aggregated over 569 rows (loss)" in ended.out
        assert "3 decisions, the record's hash is" in ended.out
        assert ended.number(r"Step 20: loss [\d.]+, ([\d.]+)% right") > 90
    steps = [re.findall(r"Step .*", ended.out) for ended in (virtual, websocket)]
    assert steps[0] == steps[1]


# ------------------------------------------------------------------------------------------- misuse, interruption


def test_every_example_is_tested_here():
    tested = Path(__file__).read_text()
    assert SCRIPTS
    assert [name for name in SCRIPTS if f'"{name}"' not in tested] == []


def test_wrong_options_are_one_line(examples):
    names = [name for name in SCRIPTS if "--epochs" in (EXAMPLES / f"{name}.py").read_text()]
    assert len(names) >= len(SCRIPTS) - 1
    started = [examples.start(name, "--epochs", "0") for name in names]
    for ended in examples.finish(*started):
        assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1), ended
        assert "must be at least 1, got 0" in ended.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_example_takes_its_worker_processes_along(examples, number, code):
    if number == signal.SIGINT:
        examples.python = sys.executable  # with nothing in between
    process = examples.start("toy_in_turn", "--websocket", "--epochs", "1000000")
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("Worker processes") for line in lines)
    os.kill(process.pid, number)
    (ended,) = examples.finish(process)
    assert ended.code == code
    assert "Traceback" not in ended.err
