"""The commands as real processes: what they print, how they end, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import termios
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from planrt.fl.data.digits import find
from planrt.fl.runs.children import WorkerProcesses, mnist_children
from planrt.fl.runs.networks import Net, seeded_net
from planrt.workers import WebsocketClientWorker
from tests import warm
from tests.processes import MNIST_FILES, PATIENCE, eventually, marked, write_small_mnist
from tests.watching import health

ROOT = Path(__file__).parents[2]
SERVE = ["-m", "planrt.fl.serve"]
START = [str(ROOT / "scripts" / "start_websocket_servers.py")]
TRAIN = ["-m", "planrt.fl.mnist_async"]
PATIENT = [str(ROOT / "tests" / "patient.py")]
BACKGROUND = [*PATIENT, "--background"]
NOBODY = ["--worker", "a=ws://127.0.0.1:1", "--worker", "testing=ws://127.0.0.1:1"]
"""Workers that are not there: who tries to connect to them says so."""
QUICK = ["--batch-size", "4", "--federate-after-n-batches", "1"]


@dataclass
class Ended:
    """A command that ended."""

    code: int
    out: str
    err: str


@dataclass
class Commands:
    """Runs commands in a folder of their own, in an environment that marks them and all their children, by
    `python`."""

    folder: Path
    python: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        env = {**os.environ, "PLANRT_TEST_TOKEN": self.token, **environment}
        if "PLANRT_DATA" not in environment:
            env.pop("PLANRT_DATA", None)
        return subprocess.Popen(
            [self.python, *command],
            cwd=self.folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def run(self, command: Sequence[str], **environment: str) -> Ended:
        return self.finish(self.start(command, **environment))

    def finish(self, process: subprocess.Popen[str]) -> Ended:
        """Waits for the end, which must leave no process behind."""
        out, err = process.communicate(timeout=4 * PATIENCE)
        assert eventually(lambda: not marked(self.token)), "processes left behind"
        return Ended(process.returncode, out, err)


@pytest.fixture
def python(warm_python: str) -> str:
    """What runs the commands of a file's tests; those that try a real start say so."""
    return warm_python


@pytest.fixture
def commands(tmp_path: Path, python: str) -> Iterator[Commands]:
    folder = tmp_path / "cwd"
    folder.mkdir()
    commands = Commands(folder, python)
    yield commands
    for pid in marked(commands.token):  # only after a test that failed half-way
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_small_mnist(tmp_path_factory.mktemp("data") / "small"))


@pytest.fixture(scope="module")
def workers(small: str, warm_workers: None) -> Iterator[dict[str, str]]:
    """Four workers that stay up for this file's tests: id -> address."""
    with WorkerProcesses(mnist_children(find("mnist", small), threads=1)) as processes:
        yield {worker.id: worker.uri for worker in processes.wait_ready().values()}


def named(workers: dict[str, str], *ids: str) -> list[str]:
    return [
        part for worker_id in ids or workers for part in ("--worker", f"{worker_id}={workers[worker_id]}")
    ]


def is_one_line_error(ended: Ended, code: int) -> bool:
    return ended.code == code and ended.err.count("\n") == 1 and "error: " in ended.err


def lines_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """The output up to the line that holds `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if text in line:
            return lines
    raise AssertionError(f"no line with {text!r} in {lines}: {process.stderr.read()}")


# -------------------------------------------------------------------------------------- wrong options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds: must be at least 1, got 0"),
        (["--rounds", "-3"], "--rounds: must be at least 1, got -3"),
        (["--rounds", "many"], "--rounds: must be a whole number, got 'many'"),
        (["--batch-size", "0"], "--batch-size: must be at least 1"),
        (["--federate-after-n-batches", "0"], "--federate-after-n-batches: must be at least 1"),
        (["--test-batch-size", "-1"], "--test-batch-size: must be at least 1"),
        (["--lr", "0"], "--lr: must be a number above 0"),
        (["--lr", "nan"], "--lr: must be a number above 0"),
        (["--lr", "-0.1"], "--lr: must be a number above 0"),
        (["--seed", "-1"], "--seed: must be at least 0"),
        (["--dataset", "cifar"], "--dataset: invalid choice: 'cifar'"),
        (["--round", "3"], "unrecognized arguments: --round"),
        (["--save-model", "model.onnx"], "end the name in .safetensors, .pt or .pth"),
        (["--worker", "alice"], "must look like alice=ws://HOST:PORT"),
        (["--worker", "alice=http://127.0.0.1:1"], "must look like alice=ws://HOST:PORT"),
        (["--worker", "alice=ws://127.0.0.1:1"], "add --worker testing=ws://HOST:PORT"),
        (["--worker", "testing=ws://127.0.0.1:1"], "no worker to train on"),
        (["--worker", "a=ws://h:1", "--worker", "a=ws://h:2"], "two workers have the same name"),
        (["--metrics-port", "0", "--metrics-host", "0.0.0.0"], "write --metrics-insecure"),
        (["--metrics-port", "65536"], "--metrics-port: must be from 0 to 65535"),
        (["--min-workers", "9"], "--min-workers 9: workers to train on there are 3"),
        ([*NOBODY, "--min-workers", "2"], "--min-workers 2: workers to train on there are 1"),
        (["--secure-aggregation", "--min-workers", "1"], "the threshold of 3 workers is from 2 to 3, not 1"),
        ([*NOBODY, "--secure-aggregation"], "a secure aggregation takes from 2 to 1000 workers, not 1"),
        (["--secure-aggregation", "--aggregation", "median"], "leave one of the two out"),
        (["--secure-aggregation", "--max-update-norm", "1"], "leave one of the two out"),
        (["--aggregation", "best"], "use mean, median, trimmed-mean:N"),
        (["--aggregation", "krum:1"], "needs at least 5 workers in a round, and there are 3"),
        (["--aggregation", "trimmed-mean:1", "--min-workers", "2"], "and there are 3, of which 2 are enough"),
        (["--run-dir", "new", "--report", "new/journal.jsonl"], "is a file of the run itself"),
    ],
)
def test_wrong_training_options_are_one_line(commands, options, message):
    ended = commands.run([*TRAIN, *options])
    assert is_one_line_error(ended, 2), ended
    assert message in ended.err
    assert list(commands.folder.rglob("*")) in ([], [commands.folder / "runs"])


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "--id"),
        (["--id", "dora"], 1, "no data is meant for worker 'dora'"),
        (["--id", "alice", "--port", "70000"], 2, "--port: must be from 0 to 65535"),
        (["--id", "alice", "--threads", "0"], 2, "--threads: must be at least 1"),
        (["--id", "alice", "--dataset", "cifar"], 2, "package.module:factory"),
        (["--id", "alice", "--data", "nowhere"], 1, "'nowhere' does not exist"),
        (["--id", "alice", "--data", ".", "--dataset", "mnist"], 1, "no MNIST in"),
        (["--id", "me", "--key", "k"], 2, "--key names your own data set"),
        (["--id", "me", "--dataset", "os:getcwd"], 2, "add --key KEY"),
        (["--id", "me", "--dataset", "nothing.there:make", "--key", "k"], 1, "No module named"),
        (["--id", "me", "--dataset", "os:nothing", "--key", "k"], 1, "no attribute 'nothing'"),
        (["--id", "me", "--dataset", "os:getcwd", "--key", "k", "--testing"], 2, "leave them out"),
        (["--id", "me", "--empty", "--metrics-insecure"], 2, "--metrics-port: add that"),
        (
            ["--id", "me", "--empty", "--port", "0", "--metrics-port", "x"],
            2,
            "--metrics-port: must be a whole number",
        ),
    ],
)
def test_wrong_serving_options_are_one_line(commands, options, code, message):
    ended = commands.run([*SERVE, *options])
    assert is_one_line_error(ended, code), ended
    assert message in ended.err


def test_verbose_adds_the_traceback(commands):
    ended = commands.run([*SERVE, "--id", "dora", "--verbose"])
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert ended.err.splitlines()[-1].startswith("worker dora: error: no data is meant")


@pytest.mark.parametrize("command", [[*SERVE, "--id", "alice"], START, TRAIN])
def test_half_a_dataset_is_one_line(commands, tmp_path, command):
    half = write_small_mnist(tmp_path / "half")
    (half / "MNIST" / "raw" / MNIST_FILES[2]).unlink()
    ended = commands.run([*command, "--data", str(half)])
    assert is_one_line_error(ended, 1), ended
    assert MNIST_FILES[2] in ended.err


@pytest.mark.parametrize("option", ["--run-dir", "--report", "--save-model"])
def test_unwritable_places_are_one_line_and_found_before_training(commands, option):
    (commands.folder / "file").write_text("in the way")
    name = {"--run-dir": "run", "--report": "report.json", "--save-model": "model.pt"}[option]
    ended = commands.run([*TRAIN, option, f"file/{name}"])
    assert is_one_line_error(ended, 2), ended
    assert f"{option}: cannot write to file" in ended.err
    assert "starting" not in ended.out


# -------------------------------------------------------------------------------------- serving by hand


def test_a_port_in_use_and_a_foreign_host_are_one_line(commands, small):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = commands.run([*SERVE, "--id", "alice", "--data", small, "--port", str(port)])
    assert is_one_line_error(ended, 1), ended
    assert f"127.0.0.1:{port}" in ended.err
    ended = commands.run([*SERVE, "--id", "alice", "--data", small, "--host", "192.0.2.1", "--insecure"])
    assert is_one_line_error(ended, 1), ended
    assert "192.0.2.1" in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serving_says_what_and_where_and_stops_cleanly(commands, small, number):
    process = commands.start([*SERVE, "--id", "charlie", "--data", small, "--port", "0"])
    lines = lines_until(process, "Ctrl-C")
    assert lines[0] == "charlie holds 'mnist': MNIST, training images of 7-9, 12 items"
    assert [line.split() for line in lines[1:4]] == [[f"{digit}:", "4", "images"] for digit in (7, 8, 9)]
    assert "serves at ws://127.0.0.1:" in lines[4]
    process.send_signal(number)
    ended = commands.finish(process)
    assert (ended.code, ended.err) == (0, "")


def test_serving_in_the_background_ignores_ctrl_c_and_says_what_stops_it(commands):
    commands.python = warm.REAL  # it says its own number, not a launcher's
    process = commands.start([*BACKGROUND, *SERVE, "--id", "bob", "--empty", "--port", "0"])
    line = lines_until(process, " serves at ")[-1]
    assert line.endswith(f"; kill {process.pid} stops it")
    process.send_signal(signal.SIGINT)
    with WebsocketClientWorker("bob", uri=line.split(" at ")[1].partition(";")[0]) as client:
        assert client.objects_count() == 0
    process.terminate()
    ended = commands.finish(process)
    assert (ended.code, ended.err) == (0, "")


def test_the_test_images_are_served_under_their_key(commands, small):
    process = commands.start([*SERVE, "--id", "testing", "--testing", "--data", small, "--port", "0"])
    uri = lines_until(process, "Ctrl-C")[-1].split(" at ")[1].partition(";")[0]
    with WebsocketClientWorker("testing", uri=uri) as client:
        assert client.datasets["mnist_testing"].length == 20
    process.terminate()
    assert commands.finish(process).code == 0


def test_owners_serve_data_sets_of_their_own(commands):
    (commands.folder / "clinic.py").write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "def records():\n"
        "    print('loading')\n"
        "    return TensorDataset(torch.zeros(5, 3), torch.zeros(5))\n"
    )
    own = ["--dataset", "clinic:records", "--key", "records", "--tag", "#clinic", "--tag", "#2024"]
    process = commands.start([*SERVE, "--id", "clinic", "--port", "0", *own])
    uri = lines_until(process, "Ctrl-C")[-1].split(" at ")[1].partition(";")[0]
    with WebsocketClientWorker("clinic", uri=uri) as client:
        info = client.datasets["records"]
        assert (info.length, list(info.tags)) == (5, ["#clinic", "#2024"])
    process.terminate()
    assert commands.finish(process).code == 0


@pytest.mark.parametrize("form", [[], ["--json-logs"]])
def test_logs_are_lines_for_people_or_json_on_stderr(commands, form):
    process = commands.start([*SERVE, "--id", "bob", "--port", "0", "--empty", "--verbose", *form])
    uri = lines_until(process, "Ctrl-C")[-1].split(" at ")[1].partition(";")[0]
    WebsocketClientWorker("bob", uri=uri).close()
    logged = []
    while sum("connected" in line for line in logged) < 2:  # it has heard of the end too
        logged.append(process.stderr.readline())
        assert logged[-1], logged
    process.terminate()
    ended = commands.finish(process)
    logged += ended.err.splitlines()
    lines = [line for line in logged if "connected" in line]
    assert (ended.code, len(lines)) == (0, 2), logged
    if form:
        entries = [json.loads(line) for line in logged]
        connected = next(entry for entry in entries if entry["event"] == "connected")
        assert (connected["level"], connected["worker"]) == ("debug", "bob")
        assert {"timestamp", "client"} <= connected.keys()
    else:
        assert "worker=bob" in lines[0]
        assert "\x1b" not in "".join(logged)  # no colours where there is no terminal


# ------------------------------------------------------------------------------- training, workers named


def test_a_run_prints_evaluates_and_leaves_report_model_and_plot(commands, workers):
    options = [
        "--rounds",
        "12",
        *QUICK,
        "--run-dir",
        "run",
        "--save-model",
        "out/mnist.pt",
        "--report",
        "r.json",
    ]
    ended = commands.run([*TRAIN, *named(workers), *options])
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    rounds = [line for line in lines if line.startswith("Training round")]
    assert [line.partition(":")[0] for line in rounds] == [f"Training round {n}/12" for n in range(1, 13)]
    first = lines.index("Evaluating models")
    for place, title in enumerate(
        ("Model update alice", "Model update bob", "Model update charlie", "Federated model")
    ):
        shares, result = lines[first + 1 + 2 * place : first + 3 + 2 * place]
        assert shares.startswith(f"  {title}: Percentage numbers 0-3: ")
        assert result.startswith(f"  {title}: Average loss: ")
        assert "/20 (" in result
    assert lines.count("Evaluating models") == 3

    report = json.loads((commands.folder / "r.json").read_text())
    assert [entry["round"] for entry in report["rounds"] if "evaluation" in entry] == [1, 11, 12]
    assert set(report["rounds"][0]["evaluation"]) == {"alice", "bob", "charlie", "federated"}
    assert report["final_accuracy"] == report["rounds"][-1]["evaluation"]["federated"]["accuracy"]
    assert report["dataset"] == "mnist"
    for entry in report["rounds"]:
        assert entry["seconds"] > 0
        for part in entry["workers"].values():
            assert (part["requests"], part["replies"], part["samples"]) == (1, 1, 4)
            assert 4 * 431_080 < part["bytes_sent"] < 1.01 * 4 * 431_080
    assert sum(report["rounds"][0]["evaluation"]["federated"]["histogram"]) == 20

    assert sorted(path.name for path in (commands.folder / "run").iterdir()) == [
        "accuracy.png",
        "checkpoint-000011.run",
        "checkpoint-000012.run",
        "journal.jsonl",
        "model.safetensors",
        "now.json",
        "options.json",
        "run.lock",
    ]
    net = Net()
    net.load_state_dict(load_file(commands.folder / "run" / "model.safetensors"))
    saved = torch.load(commands.folder / "out" / "mnist.pt", weights_only=True)
    for name, value in net.state_dict().items():
        assert torch.equal(saved[name], value)
    assert not torch.equal(net.fc2.weight, seeded_net(1).fc2.weight)


def test_with_secure_aggregation_no_single_model_is_evaluated(commands, workers):
    options = ["--rounds", "2", *QUICK, "--run-dir", "run", "--secure-aggregation"]
    ended = commands.run([*TRAIN, *named(workers), *options])
    assert (ended.code, ended.err) == (0, "")
    assert "Model update" not in ended.out
    assert ended.out.count("  Federated model: Average loss: ") == 2
    report = json.loads((commands.folder / "run" / "report.json").read_text())
    assert report["options"]["secure-aggregation"] is True
    for entry in report["rounds"]:
        assert set(entry["evaluation"]) == {"federated"}
        assert [part["loss"] for part in entry["workers"].values()] == [None] * 3


def test_the_seed_decides_the_run_and_two_workers_are_enough(commands, workers):
    def train(seed: int, run: str) -> dict[str, torch.Tensor]:
        options = ["--rounds", "2", *QUICK, "--seed", str(seed), "--run-dir", run]
        assert commands.run([*TRAIN, *named(workers, "alice", "bob", "testing"), *options]).code == 0
        return load_file(commands.folder / run / "model.safetensors")

    first, again, other = train(1, "a"), train(1, "b"), train(2, "c")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    report = json.loads((commands.folder / "a" / "report.json").read_text())
    assert list(report["rounds"][0]["workers"]) == ["alice", "bob"]


def test_a_progress_bar_shows_on_a_terminal_only(commands, workers):
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [commands.python, *TRAIN, *named(workers, "bob", "testing"), "--rounds", "2", *QUICK]
    with subprocess.Popen(
        command, cwd=commands.folder, stdout=subprocess.PIPE, stderr=terminal, text=True
    ) as run:
        os.close(terminal)
        seen = b""
        while True:
            try:
                chunk = os.read(controller, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not chunk:
                break
            seen += chunk
        out = run.stdout.read()
    os.close(controller)
    assert run.returncode == 0
    assert b"2/2" in seen
    assert "it/s" not in out
    assert "Federated model" in out


@pytest.mark.parametrize(
    ("swap", "options", "message"),
    [
        ({"bob": "ws://127.0.0.1:1"}, [], "127.0.0.1:1"),
        ({"bob": "ws://no.such.host.invalid:8777"}, [], "no.such.host.invalid"),
        ({"bob": "alice"}, [], "alice"),
        ({"testing": "bob"}, [], "bob"),
        ({}, ["--dataset", "digits"], "the workers that run serve mnist"),
    ],
)
def test_workers_that_do_not_fit_are_one_line(commands, workers, swap, options, message):
    addresses = {**workers, **{worker_id: workers.get(other, other) for worker_id, other in swap.items()}}
    ended = commands.run([*TRAIN, *named(addresses), *QUICK, *options])
    assert is_one_line_error(ended, 1), ended
    assert message in ended.err
    assert not list(commands.folder.rglob("*.json"))


def test_an_unknown_dataset_key_is_one_line(commands, workers, small):
    (commands.folder / "own.py").write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "def make():\n"
        "    return TensorDataset(torch.zeros(5, 3), torch.zeros(5))\n"
    )
    own = ["--id", "bob", "--port", "0", "--dataset", "own:make", "--key", "numbers"]
    process = commands.start([*SERVE, *own])
    uri = lines_until(process, "Ctrl-C")[-1].split(" at ")[1].partition(";")[0]
    trainer = Commands(commands.folder, commands.python)
    ended = trainer.run([*TRAIN, *named({**workers, "bob": uri}), *QUICK])
    assert is_one_line_error(ended, 1), ended
    assert "worker 'bob' has no data set 'mnist' (it has: 'numbers')" in ended.err
    process.terminate()
    commands.finish(process)


@pytest.mark.usefixtures("warm_workers")
def test_a_worker_that_dies_mid_run_is_named(commands, small):
    with WorkerProcesses(mnist_children(find("mnist", small), threads=1)) as processes:
        addresses = {worker.id: worker.uri for worker in processes.wait_ready().values()}
        process = commands.start([*TRAIN, *named(addresses), *QUICK, "--rounds", "100000"])
        lines_until(process, "Training round 2/")
        os.kill(processes.pids["bob"], signal.SIGKILL)
        process.stdout.read()
        ended = commands.finish(process)
    assert is_one_line_error(ended, 1), ended
    assert "bob" in ended.err


# ----------------------------------------------------------------------- training, workers of its own


@pytest.fixture
def usual_ports_are_free() -> None:
    """Fails early, and says why, where something else on this machine has the usual ports."""
    for port in range(8777, 8781):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
@pytest.mark.usefixtures("usual_ports_are_free")
def test_started_workers_end_with_the_run_however_it_ends(commands, small, number, code):
    if number == signal.SIGKILL:
        commands.python = warm.REAL  # the system takes the workers along, with nothing in between
    process = commands.start([*TRAIN, "--data", small, *QUICK, "--rounds", "100000"])
    lines_until(process, "Training round 2/")
    assert len(marked(commands.token)) == 5
    process.send_signal(number)
    process.stdout.read()
    ended = commands.finish(process)  # checks that nobody is left
    assert ended.code == code
    assert "Traceback" not in ended.err


@pytest.mark.usefixtures("usual_ports_are_free")
def test_a_started_worker_that_dies_ends_the_run_with_one_line(commands, small):
    process = commands.start([*TRAIN, "--data", small, *QUICK, "--rounds", "100000"])
    lines_until(process, "Training round 2/")
    children = [pid for pid in marked(commands.token) if pid != process.pid]
    os.kill(children[0], signal.SIGKILL)
    process.stdout.read()
    ended = commands.finish(process)
    assert is_one_line_error(ended, 1), ended


@pytest.mark.usefixtures("usual_ports_are_free")
def test_without_mnist_the_digits_are_trained_on_with_a_notice(commands):
    ended = commands.run([*TRAIN, "--data", ".", *QUICK, "--rounds", "1", "--run-dir", "run"])
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("Notice: no MNIST in .: using scikit-learn's 1,797 handwritten digits")
    assert json.loads((commands.folder / "run" / "report.json").read_text())["dataset"] == "digits"


# ------------------------------------------------------------------------------------ the four workers


@pytest.mark.usefixtures("usual_ports_are_free")
def test_the_script_starts_four_workers_that_a_run_finds_on_real_mnist(commands, mnist_folder):
    commands.python = warm.REAL  # as users start them
    servers = commands.start([*PATIENT, *START], PLANRT_DATA=str(mnist_folder))
    text = "\n".join(lines_until(servers, "Ctrl-C"))
    for worker_id, items in (
        ("alice", "24,754"),
        ("bob", "17,181"),
        ("charlie", "18,065"),
        ("testing", "10,000"),
    ):
        assert f"{worker_id} holds" in text
        assert f"{items} items" in text
    assert "0:  5,923 images" in text

    trainer = Commands(commands.folder, commands.python)
    ended = trainer.run([*PATIENT, *TRAIN, "--rounds", "3", "--run-dir", "run"])
    assert (ended.code, ended.err) == (0, "")
    assert "starting" not in ended.out  # it used the four
    assert "/10000 (" in ended.out
    report = json.loads((commands.folder / "run" / "report.json").read_text())
    assert report["final_accuracy"] > 0.2
    assert report["rounds"][0]["workers"]["bob"]["samples"] == 320

    servers.send_signal(signal.SIGINT)
    ended = commands.finish(servers)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.endswith("Interrupted: stopping the workers\nAll four workers are stopped\n")


@pytest.mark.usefixtures("usual_ports_are_free")
def test_the_script_in_the_background_ignores_ctrl_c_and_says_what_stops_it(commands, small):
    commands.python = warm.REAL  # it says its own number, not a launcher's
    servers = commands.start([*BACKGROUND, *START, "--data", small, "--metrics-port", "0"])
    lines = lines_until(servers, "All four")
    assert lines[-1] == f"All four workers serve; kill {servers.pid} stops them"
    ends = re.findall(r"metrics at (http://\S+)/metrics", "\n".join(lines))
    assert [health(end)[1]["worker"] for end in ends] == ["alice", "bob", "charlie", "testing"]
    servers.send_signal(signal.SIGINT)
    servers.terminate()
    ended = commands.finish(servers)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "Terminated: stopping the workers\nAll four workers are stopped\n"


@pytest.mark.usefixtures("usual_ports_are_free")
def test_the_script_is_stopped_while_it_starts(commands, small):
    servers = commands.start([*START, "--data", small])
    assert eventually(lambda: len(marked(commands.token)) == 5)
    servers.terminate()
    ended = commands.finish(servers)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.endswith("Terminated: stopping the workers\nAll four workers are stopped\n")


@pytest.mark.usefixtures("usual_ports_are_free")
def test_the_script_says_which_port_is_taken_and_stops_the_others(commands, small):
    with socket.create_server(("127.0.0.1", 8779)):
        ended = commands.run([*START, "--data", small])
    assert is_one_line_error(ended, 1), ended
    assert "worker 'charlie': cannot listen on ws://127.0.0.1:8779" in ended.err


@pytest.mark.usefixtures("usual_ports_are_free")
def test_the_script_ends_when_a_worker_dies(commands, small):
    servers = commands.start([*START, "--data", small])
    lines_until(servers, "Ctrl-C")
    children = [pid for pid in marked(commands.token) if pid != servers.pid]
    assert len(children) == 4
    os.kill(children[0], signal.SIGKILL)
    ended = commands.finish(servers)
    assert is_one_line_error(ended, 1), ended
    assert "ended with exit code -9" in ended.err


@contextlib.contextmanager
def hanging_up(listening: socket.socket) -> Iterator[None]:
    """Takes connections, and ends each at once."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                listening.accept()[0].close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.usefixtures("usual_ports_are_free")
def test_a_run_says_which_workers_are_missing_when_only_some_run(commands, small):
    process = commands.start([*SERVE, "--id", "bob", "--port", "8778", "--data", small])
    lines_until(process, "Ctrl-C")
    # A program that is no worker counts as missing too.
    with socket.create_server(("127.0.0.1", 8779)) as other, hanging_up(other):
        ended = Commands(commands.folder, commands.python).run([*TRAIN, *QUICK])
    assert is_one_line_error(ended, 1), ended
    for missing in ("alice at ws://127.0.0.1:8777", "charlie at ws://127.0.0.1:8779", "testing at"):
        assert missing in ended.err
    assert "bob running" in ended.err
    process.terminate()
    assert commands.finish(process).code == 0


def test_the_hand_script_is_the_same_command(commands, small):
    script = str(ROOT / "scripts" / "run_websocket_server.py")
    process = commands.start([script, "--id", "alice", "--data", small, "--port", "0"])
    assert "alice holds 'mnist'" in lines_until(process, "Ctrl-C")[0]
    process.terminate()
    assert commands.finish(process).code == 0
