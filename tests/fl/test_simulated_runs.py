"""The journal and the checkpoints of a run under a simulated disk: crashes, torn writes, full disks, by a seed.

No worker, no socket, no thread: a round is a function of the state and its number, as it is in a run. What must hold
however a run is broken: it can be taken up or begun, what it goes on from is the state of a round that was made,
checkpoints that were settled are never lost, and the end has the bits of an unbroken run. Run more of them by
``PLANRT_SIMULATIONS=20000 pytest tests/fl/test_simulated_runs.py``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import time

import pytest
import torch

from planrt.errors import RunFolderError
from planrt.fl.runs import run_record
from planrt.fl.runs.run_folder import Journal
from planrt.fl.runs.run_record import RunRecord
from tests.fl.dying import KilledError
from tests.fl.simulated_disk import SimulatedDisk

RUNS = int(os.environ.get("PLANRT_SIMULATIONS", "150"))
ROUNDS = 4
IDENTITY = {"plan": "p", "seed": 1, "dataset": "d", "data": {}, "training": {}, "rules": {}}


def after(state: torch.Tensor, number: int) -> torch.Tensor:
    """A round."""
    return state * 31 + number


def unbroken() -> list[torch.Tensor]:
    states = [torch.arange(5)]
    for number in range(1, ROUNDS + 1):
        states.append(after(states[-1], number))
    return states


STATES = unbroken()


class Part:
    """One process's part of a run: from what is there to the end, or to where it is broken."""

    def __init__(self, folder, disk, *, every: int) -> None:
        self.folder, self.disk, self.every = folder, disk, every
        self.settled = -1
        """The newest round whose checkpoint is on the disk for sure."""

    async def run(self) -> None:
        began = (self.folder / "journal.jsonl").exists() and Journal(self.folder).began is not None
        record = RunRecord(self.folder, every=self.every, resuming=began)
        try:
            await asyncio.to_thread(record.begin, IDENTITY, {})
            if record.restored is None:
                assert record.next_round == 1
                state = STATES[0]
                await record.save(0, {}, {}, {"x": state}, checkpoint=True)
                await record.settled()
                self.settled = 0
            else:
                state = record.restored.tensors["x"]
                number = record.next_round - 1
                assert torch.equal(state, STATES[number]), "the state of another round"
                assert record.restored.facts["round"] == number
                self.settled = number
                assert [line["round"] for line in record.history()] == list(range(1, number + 1))
            for number in range(record.next_round, ROUNDS + 1):
                state = after(state, number)
                due = record.due(number)
                await record.save(number, {"round": number}, {}, {"x": state}, checkpoint=due)
                if self.disk.random.random() < 0.5:
                    await record.settled()
                    self.settled = number if due else self.settled
            await record.settled()
            if record.unsaved:
                await record.save(ROUNDS, {}, {}, {"x": state}, checkpoint=True)
                await record.settled()
            self.settled = ROUNDS
            assert torch.equal(state, STATES[-1])
        finally:
            try:
                await record.close()
            except (KilledError, RunFolderError):
                record.folder.close()


async def inline(function, *args, **kwargs):
    """In place of `asyncio.to_thread`: everything happens in one order, which the seed gives."""
    return function(*args, **kwargs)


def simulate(folder, seed: int, monkeypatch, runner) -> int:
    """One run, broken again and again; returns how often."""
    rng = random.Random(seed)
    every = rng.choice([1, 1, 2, 3])
    sure = -1
    for broken in range(50):
        kind = rng.choice(["crash", "power cut", "full"])
        disk = SimulatedDisk(
            rng.randrange(2**32),
            last=rng.randrange(1, 60) if kind != "full" else 10**9,
            room=rng.randrange(6_000) if kind == "full" else 10**12,
        )
        if broken > 8:
            disk = SimulatedDisk(0)
        monkeypatch.setattr(run_record, "NEW_DISK", lambda disk=disk: disk)
        part = Part(folder, disk, every=every)
        try:
            runner.run(part.run())
            return broken
        except KilledError:
            if kind == "power cut":
                disk.crash()
        except RunFolderError as error:
            assert kind == "full", error
            assert "No space left on device" in str(error)
        sure = max(sure, part.settled)
        if sure >= 0:  # nothing that was settled is lost
            again = RunRecord(folder, resuming=True)
            assert again.next_round - 1 >= sure, (seed, again.next_round, sure)
            again.folder.close()
    raise AssertionError(f"seed {seed} does not come to an end")


@pytest.mark.parametrize("part", range(3))
def test_runs_that_are_broken_at_random_end_as_unbroken_ones(part, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(asyncio, "to_thread", inline)
    caplog.set_level(logging.ERROR)  # journals that are cut are told of by the thousand
    began, broken = time.perf_counter(), 0
    with asyncio.Runner() as runner:
        for seed in range(part, RUNS, 3):
            folder = tmp_path / str(seed)
            try:
                broken += simulate(folder, seed, monkeypatch, runner)
            except BaseException:
                print(f"seed {seed}")
                raise
            shutil.rmtree(folder)
    took = time.perf_counter() - began
    print(f"{RUNS // 3} runs, broken {broken} times, {RUNS // 3 / took * 60:,.0f} a minute")
    assert broken > RUNS // 6
