"""The benchmarks' harness: what it compares is the same work, and it writes what it measured."""

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.child import Child
from benchmarks.measure import Goal, Row, Sample, in_turns, table
from benchmarks.memory import HOLD
from benchmarks.plain import PlainLoop, PlainWorkers
from benchmarks.rounds import Rounds
from benchmarks.workloads import mnist_config, set_width
from planrt.fl.data import digits as data
from planrt.workers import BaseDataset, VirtualWorker


def test_the_floor_does_the_arithmetic_of_a_round_bit_for_bit():
    """A floor that computes less than a round would make a ratio meaningless."""
    generator = torch.Generator().manual_seed(3)
    parts = {
        name: BaseDataset(
            torch.randint(0, 256, (90, 28, 28), dtype=torch.uint8, generator=generator),
            torch.randint(0, 10, (90,), generator=generator),
            batch_transform=data.normalize,
        )
        for name in data.PARTITIONS
    }
    workers = [VirtualWorker(name, datasets={data.TRAIN_KEY: part}) for name, part in parts.items()]
    rounds = Rounds(workers, mnist_config(2))
    ours = rounds.run(5).state
    for worker in workers:
        worker.close()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as virtual workers have
    try:
        plain = PlainWorkers(parts, batches=2)
        for name in parts:
            plain.train(name, rounds.state, 5)
        averages = [plain.average(), PlainLoop(parts, batches=2).round(rounds.state, 5)]
    finally:
        torch.set_num_threads(before)
    for average in averages:
        assert all(torch.equal(ours[name], average[name]) for name in ours)


def test_a_coordinator_needs_no_more_memory_than_promised(monkeypatch):
    """Also when the first in order answers last and all the others have to wait for it."""
    monkeypatch.setenv("PLANRT_BENCH_WIDTH", "")  # put back afterwards
    set_width(2000)  # 16 MB of parameters
    with Child("memory", "peak") as coordinator:
        figures = coordinator.ask({"workers": 5, "slow": True, "rounds": 2})
    assert min(figures["peaks"]) > 2 * figures["model"]  # it was measured at all
    assert max(figures["peaks"]) <= (2 + HOLD) * figures["model"]


def test_it_runs_and_writes_its_results(tmp_path, capsys):
    results = tmp_path / "results.json"
    assert main(["--quick", "--only", "plans", "--json", str(results)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(results.read_text())["groups"]["plans"]
    assert [row["name"] for row in rows] == [
        "training step",
        "whole step as a plan",
        "100 small ops",
        "tracing ResNet-18",
        "checking, 50 shapes",
        "checking, 1,000 shapes",
        "checking again",
    ]
    for row in rows:
        assert row["name"] in printed
        assert row["ours"]["median"] > 0
    for row in rows[:2]:
        assert row["ratio"]["median"] > 0
    assert isinstance(rows[0]["met"], bool)


def test_shares_are_measured_with_their_rounds_and_bytes(tmp_path, capsys):
    results = tmp_path / "results.json"
    assert main(["--quick", "--only", "sharing", "--json", str(results)]) == 0
    rows = json.loads(results.read_text())["groups"]["sharing"]
    assert len(rows) == 9
    for row in rows[:-2]:
        assert row["details"]["rounds"] == int(row["details"]["rounds"]) > 0
        assert row["details"]["sent"] > 0
    assert [rows[3]["details"]["rounds"], rows[4]["details"]["rounds"]] == [4, 1]
    assert rows[3]["details"]["sent"] <= 15 * 1000  # of 1,000 elements
    assert rows[-1]["floor_name"] == "the same labels and rate"
    assert rows[-1]["goal"] == "<= 1.15 x"
    assert "at 50 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal(at_most=2.0), True),
        (Goal(at_most=1.9), False),
        (Goal(at_least=2.1), False),
        (Goal(at_most=5.9, absolute=True), False),
        (Goal(at_least=6.0, at_most=6.0, absolute=True), True),
    ],
)
def test_goals_and_ratios(goal, met):
    row = Row("rounds", "ms", Sample((6.0, 4.0, 12.0)), Sample((3.0, 2.0, 1.0)), "plain", goal)
    assert row.ratio.values == (2.0, 2.0, 12.0)
    assert row.met is met
    assert ("MISSED" in table([row])) is not met


def test_candidates_take_turns():
    calls = []
    samples = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, warmup=1)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert [len(sample.values) for sample in samples.values()] == [2, 2]
