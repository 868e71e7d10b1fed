"""Runs of the main job that are killed, interrupted and refused, and go on: real processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from planrt.cli import main
from planrt.fl.data.digits import find
from planrt.fl.runs.children import WorkerProcesses, mnist_children
from planrt.fl.runs.run_folder import RunFolder
from tests import warm
from tests.processes import eventually, write_small_mnist
from tests.scripts.test_commands import (
    QUICK,
    TRAIN,
    commands,
    is_one_line_error,
    lines_until,
    named,
    python,
)

pytestmark = pytest.mark.usefixtures("warm_workers")


__all__ = ["commands", "python"]  # the fixtures

ROUNDS = ["--rounds", "60", *QUICK]
"""More than a run makes between a line that a test reads and the signal that it sends."""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    small = str(write_small_mnist(tmp_path_factory.mktemp("data") / "small"))
    with WorkerProcesses(mnist_children(find("mnist", small), threads=1)) as running:
        addresses = {worker.id: worker.uri for worker in running.wait_ready().values()}
        yield running, addresses


def status(folder, capsys, *more):
    assert main(["status", str(folder), *more]) == 0
    return capsys.readouterr().out


def test_killed_then_interrupted_then_finished_has_the_bits_of_an_unbroken_run(commands, processes, capsys):
    running, workers = processes
    whole = commands.run([*TRAIN, *named(workers), *ROUNDS, "--run-dir", "whole"])
    assert (whole.code, whole.err) == (0, "")

    folder = commands.folder / "run"
    process = commands.start([*TRAIN, *named(workers), *ROUNDS, "--run-dir", "run"])
    lines_until(process, "Training round 3/60")
    warm.send_signal(running.pids["charlie"], signal.SIGSTOP)  # or the run may be over before it is looked at
    try:
        assert json.loads(status(folder, capsys, "--json"))["state"] == "running"
        process.kill()
        assert commands.finish(process).code == -signal.SIGKILL
    finally:
        warm.send_signal(running.pids["charlie"], signal.SIGCONT)
    told = status(folder, capsys)
    assert f"{folder}: stopped, " in told
    assert f"planrt run --resume {folder}" in told

    process = commands.start([*TRAIN, "--resume", "run"])
    assert "from round" in lines_until(process, "ready after")[-1]
    lines_until(process, "Training round")
    process.send_signal(signal.SIGINT)
    ended = commands.finish(process)
    assert ended.code == 130
    assert ended.err == "mnist_async: interrupted\n"
    assert "go on:   planrt run --resume run" in ended.out
    report = json.loads((folder / "report.json").read_text())
    assert report["stopped"] == "interrupted"
    assert [entry["round"] for entry in report["rounds"]] == list(range(1, len(report["rounds"]) + 1))
    assert 0 < len(report["rounds"]) < 60

    ended = commands.run([*TRAIN, "--resume", "run"])
    assert (ended.code, ended.err) == (0, "")
    ours, theirs = (load_file(commands.folder / name / "model.safetensors") for name in ("run", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    reports = [json.loads((commands.folder / name / "report.json").read_text()) for name in ("run", "whole")]
    for one, other in zip(*(report["rounds"] for report in reports), strict=True):
        assert one["round"] == other["round"]
        assert one.get("evaluation") == other.get("evaluation")
        assert [part["loss"] for part in one["workers"].values()] == [
            part["loss"] for part in other["workers"].values()
        ]
    assert "stopped" not in reports[0]
    assert f"{folder}: finished, 60 of 60 rounds done" in status(folder, capsys)

    longer = commands.run([*TRAIN, "--resume", "run", "--rounds", "61"])
    assert (longer.code, longer.err) == (0, "")
    assert "Training round 61/61" in longer.out


def hashed(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_masked_rounds_that_are_cut_in_the_middle_end_with_the_same_file(commands, processes, capsys):
    """Killed, then interrupted. Whatever keys and shares a cut round had: the next start makes it again with others."""
    running, workers = processes
    masked = ["--rounds", "30", *QUICK, "--secure-aggregation", "--checkpoint-every", "2"]
    whole = commands.run([*TRAIN, *named(workers), *masked, "--run-dir", "whole"])
    assert (whole.code, whole.err) == (0, "")

    folder = commands.folder / "run"
    begun = [*TRAIN, *named(workers), *masked, "--run-dir", "run"]
    for command, number in [(begun, signal.SIGKILL), ([*TRAIN, "--resume", "run"], signal.SIGINT)]:
        process = commands.start(command)
        lines_until(process, "Training round")
        warm.send_signal(running.pids["charlie"], signal.SIGSTOP)
        try:
            assert eventually(lambda: "waits for charlie since " in status(folder, capsys))
            process.send_signal(number)
            ended = commands.finish(process)
        finally:
            warm.send_signal(running.pids["charlie"], signal.SIGCONT)
        assert ended.code == (130 if number == signal.SIGINT else -number)
        assert not (folder / "model.safetensors").exists()
    ended = commands.run([*TRAIN, "--resume", "run"])
    assert (ended.code, ended.err) == (0, "")
    assert hashed(folder / "model.safetensors") == hashed(commands.folder / "whole" / "model.safetensors")
    assert json.loads((folder / "options.json").read_text())["secure-aggregation"] is True


def test_a_frozen_worker_costs_a_time_out_and_is_named_in_output_and_report(commands, processes):
    running, workers = processes
    warm.send_signal(running.pids["charlie"], signal.SIGSTOP)
    try:
        process = commands.start(
            [*TRAIN, *named(workers), "--rounds", "3", *QUICK, "--run-dir", "run", "--round-timeout", "600",
             "--min-workers", "2"]
        )  # fmt: skip
        ended = commands.finish(process)
    finally:
        warm.send_signal(running.pids["charlie"], signal.SIGCONT)
    # A stopped process takes connections and answers nothing: it is left out at the start.
    assert ended.code == 0, ended
    assert "Notice: the run goes on without charlie" in ended.out
    report = json.loads((commands.folder / "run" / "report.json").read_text())
    assert [sorted(entry["workers"]) for entry in report["rounds"]] == [["alice", "bob"]] * 3


def test_a_worker_that_freezes_while_it_runs_is_left_out(commands, processes):
    running, workers = processes
    options = ["--rounds", "400", *QUICK, "--run-dir", "run", "--round-timeout", "20", "--min-workers", "2"]
    process = commands.start([*TRAIN, *named(workers), *options])
    lines_until(process, "Training round 2/400")
    warm.send_signal(running.pids["charlie"], signal.SIGSTOP)
    try:
        line = lines_until(process, "without charlie")[-1]
        assert "(late: no answer within 20 s)" in line
        lines_until(process, "without charlie (busy: it has not answered round")
        process.send_signal(signal.SIGINT)
        assert commands.finish(process).code == 130
    finally:
        warm.send_signal(running.pids["charlie"], signal.SIGCONT)
    report = json.loads((commands.folder / "run" / "report.json").read_text())
    late = next(entry for entry in report["rounds"] if "charlie" in entry.get("missing", {}))
    assert late["missing"]["charlie"]["kind"] == "late"


def test_bad_input_is_one_line_each(commands, processes):
    _, workers = processes
    done = commands.run([*TRAIN, *named(workers), "--rounds", "1", *QUICK, "--run-dir", "run"])
    assert done.code == 0, done
    assert (commands.folder / "run" / "options.json").is_file()
    for arguments, code, words in [
        (["--resume", "run", "--seed", "5"], 2, "--seed 5: the run in run has --seed 1"),
        (["--resume", "run", "--batch-size", "5"], 2, "--batch-size 5: the run in run has --batch-size 4"),
        (["--resume", "run", "--run-dir", "other"], 2, "leave --run-dir out"),
        (["--resume", "nowhere"], 2, "there is no run to go on with in nowhere"),
        (["--run-dir", "run"], 2, "--run-dir run has a run already: go on with it by --resume"),
        (
            [*named(workers), "--min-workers", "9"],
            2,
            "--min-workers 9: workers to train on there are 3",
        ),
        ([*named(workers), "--min-workers", "0"], 2, "--min-workers: must be at least 1"),
        (
            [*named(workers), "--round-timeout", "-1"],
            2,
            "--round-timeout: must be a number of seconds above 0",
        ),
        (
            [*named(workers), "--round-timeout", "1e12"],
            2,
            "--round-timeout: must be a number of seconds above 0 and of at most 2,592,000",
        ),
        ([*named(workers), "--aggregation", "krum"], 2, "use mean, median, trimmed-mean:N"),
        ([*named(workers), "--aggregation", "krum:1"], 2, "--aggregation krum:1 needs at least 5 workers"),
        (
            [*named(workers, "alice", "testing"), "--resume", "run"],
            1,
            "its workers are alice, bob, charlie, not alice",
        ),
    ]:
        ended = commands.run([*TRAIN, *arguments])
        assert is_one_line_error(ended, code), (arguments, ended)
        assert words in ended.err, (arguments, ended.err)
    held = RunFolder(commands.folder / "run")
    ended = commands.run([*TRAIN, "--resume", "run", "--rounds", "2"])
    held.close()
    assert is_one_line_error(ended, 1), ended
    assert "is in use by another coordinator" in ended.err
    assert not (commands.folder / "runs").exists() or not list((commands.folder / "runs").iterdir())


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("[]", "it has no names and values"),
        ("{", "there is no run to go on with"),
        ('{"rounds": "many"}', "--rounds: must be a whole number, got 'many'"),
        ('{"rounds": 1e999}', "--rounds: must be a whole number"),
        ('{"rounds": -1}', "--rounds: must be at least 1"),
        ('{"lr": [0.1, "x"]}', "--lr: must be a number"),
        ('{"worker": "alice"}', "--worker: must look like alice=ws://HOST:PORT"),
        (
            '{"round-timeout": 1e300}',
            "--round-timeout: must be a number of seconds above 0 and of at most 2,592,000",
        ),
        ('{"verbose": "yes"}', "--verbose: ignored explicit argument"),
        ('{"of-a-later-planrt": 5}', "unrecognized arguments: --of-a-later-planrt"),
    ],
)
def test_options_of_a_run_folder_are_held_to_what_the_command_takes(tmp_path, capsys, written, told):
    Path(tmp_path, "options.json").write_text(written)
    assert main(["run", "--resume", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error


def test_status_of_what_is_no_run(tmp_path, capsys):
    assert main(["status", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["status", str(tmp_path)]) == 2
    assert "it has no journal" in capsys.readouterr().err
    Path(tmp_path, "journal.jsonl").write_text("hello\n")
    assert main(["status", str(tmp_path)]) == 2
    assert "it has no journal" in capsys.readouterr().err


def test_a_disk_without_room_for_the_model_is_told_before_anything_is_trained(processes, tmp_path):
    """Files may have 1,000 KiB here: less than the model, let alone its checkpoints."""
    _, workers = processes
    run = [warm.REAL, "-m", "planrt.fl.mnist_async", *named(workers), *ROUNDS, "--run-dir", "run"]
    ended = subprocess.run(
        ["bash", "-c", 'ulimit -f 1000; exec "$@"', "bash", *run],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "no room for the model and its checkpoints in run" in ended.stderr
    assert "Training" not in ended.stdout
