"""Runs with a folder: after a crash at any moment they go on, and end with the bits of an unbroken run."""

import asyncio
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planrt.errors import LocalError, OptionError, QuorumError, RunFolderError
from planrt.fl import RoundScheduler, TrainConfig
from planrt.fl.runs import run_record
from planrt.fl.runs.run_folder import Journal, is_held
from planrt.serde.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from planrt.serde.disk import Disk
from planrt.workers import VirtualWorker
from tests.fl.dying import DyingDisk, FullDisk, KilledError
from tests.models import classification_data, seeded_classifier

IDS = ["alice", "bob"]
ROUNDS = 4


def config(**options):
    options = {"batch_size": 8, "max_nr_batches": 2, "optimizer_args": {"lr": 0.1}, **options}
    return TrainConfig(seeded_classifier(), F.nll_loss, **options)


def small():
    torch.manual_seed(3)
    return TrainConfig(
        nn.Linear(6, 3), F.cross_entropy, batch_size=8, max_nr_batches=1, optimizer_args={"lr": 0.1}
    )


@pytest.fixture
def workers():
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(VirtualWorker(id, datasets={"d": classification_data(n)}, auto_add=False))
            for n, id in enumerate(IDS)
        ]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


async def go(scheduler, until=ROUNDS):
    """The loop of the documentation."""
    await scheduler.prepare()
    state = scheduler.state
    for number in range(scheduler.next_round, until + 1):
        state = (await scheduler.run_round(number, state)).state
    await scheduler.close()
    return state


def fresh(workers, folder=None, job=None, **options):
    return RoundScheduler(workers, job or config(), dataset_key="d", seed=7, run_dir=folder, **options)


def killed(scheduler):
    """What is left of a process that is gone: its lock is free."""
    scheduler._written.record.folder.close()


# -------------------------------------------------------------------------------------- going on


def test_a_run_in_two_parts_ends_as_one_in_one(workers, tmp_path):
    whole = asyncio.run(go(fresh(workers)))
    asyncio.run(go(fresh(workers, tmp_path / "run"), 2))
    again = RoundScheduler.resume(tmp_path / "run", workers, config())
    assert again.next_round == 3
    assert same(asyncio.run(go(again)), whole)
    assert [line["round"] for line in Journal(tmp_path / "run").until(99)] == [1, 2, 3, 4]


def test_a_finished_run_may_be_made_longer(workers, tmp_path):
    whole = asyncio.run(go(fresh(workers), ROUNDS + 2))
    asyncio.run(go(fresh(workers, tmp_path)))
    assert same(asyncio.run(go(RoundScheduler.resume(tmp_path, workers, config()), ROUNDS + 2)), whole)


@pytest.mark.parametrize("every", [1, 2, 3, 0])
def test_with_fewer_checkpoints_more_rounds_are_made_again(workers, tmp_path, every):
    whole = asyncio.run(go(fresh(workers)))

    async def three(scheduler):
        await scheduler.prepare()
        state = scheduler.state
        for number in (1, 2, 3):
            state = (await scheduler.run_round(number, state)).state
        await scheduler.settled()

    first = fresh(workers, tmp_path, checkpoint_every=every)
    asyncio.run(three(first))
    killed(first)
    again = RoundScheduler.resume(tmp_path, workers, config())
    assert again.next_round == {1: 4, 2: 3, 3: 4, 0: 1}[every]
    assert len(again.history()) == again.next_round - 1
    assert same(asyncio.run(go(again)), whole)


def test_whatever_step_a_process_is_killed_at_the_run_goes_on_to_the_same_bits(
    workers, tmp_path, monkeypatch
):
    """Every single step of writing, one after the other: half of a write, no rename, no removal."""
    rounds = 2
    whole = asyncio.run(go(fresh(workers, job=small()), rounds))
    counting = DyingDisk()
    monkeypatch.setattr(run_record, "NEW_DISK", lambda: counting)
    assert same(asyncio.run(go(fresh(workers, tmp_path / "all", small()), rounds)), whole)
    assert counting.steps > 30
    for last in range(1, counting.steps + 1):
        folder = tmp_path / str(last)
        monkeypatch.setattr(run_record, "NEW_DISK", lambda last=last: DyingDisk(last))
        scheduler = fresh(workers, folder, small())
        with pytest.raises(KilledError):
            asyncio.run(go(scheduler, rounds))
        killed(scheduler)
        monkeypatch.setattr(run_record, "NEW_DISK", Disk)
        if Journal(folder).began is None:
            again = fresh(workers, folder, small())
        else:
            again = RoundScheduler.resume(folder, workers, small())
        assert same(asyncio.run(go(again, rounds)), whole), f"killed at step {last}"
        assert [line["round"] for line in Journal(folder).until(rounds)] == [1, 2]
        assert not Journal(folder).broken


def test_killed_again_and_again(workers, tmp_path, monkeypatch):
    whole = asyncio.run(go(fresh(workers, job=small())))
    rng = random.Random(5)
    scheduler = fresh(workers, tmp_path, small())
    for _ in range(12):
        scheduler._written.record.folder.disk = DyingDisk(rng.randrange(4, 40))
        try:
            state = asyncio.run(go(scheduler))
            break
        except KilledError:
            killed(scheduler)
        if Journal(tmp_path).began is None:
            scheduler = fresh(workers, tmp_path, small())
        else:
            scheduler = RoundScheduler.resume(tmp_path, workers, small())
    else:
        scheduler._written.record.folder.disk = Disk()
        state = asyncio.run(go(scheduler))
    assert same(state, whole)


PROGRAM = """
    import asyncio, os, sys, time
    import torch
    from planrt.fl import RoundScheduler
    from planrt.workers import VirtualWorker
    from tests.fl.test_resume import IDS, config, fresh
    from tests.models import classification_data
    from planrt.fl.runs.run_folder import Journal
    from pathlib import Path

    folder, until, stays = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    workers = [VirtualWorker(id, datasets={"d": classification_data(n)}) for n, id in enumerate(IDS)]

    async def main():
        started = Journal(folder).began is not None
        made = RoundScheduler.resume(folder, workers, config()) if started else fresh(workers, folder)
        await made.prepare()
        state = made.state
        for number in range(made.next_round, until + 1):
            state = (await made.run_round(number, state)).state
            print(number, flush=True)
            if number == stays:
                time.sleep(600)
        await made.close()
        torch.save(dict(state), folder / "end.pt")

    asyncio.run(main())
"""


def test_processes_that_are_really_killed_go_on_to_the_same_bits(workers, tmp_path):
    until = 40
    whole = asyncio.run(go(fresh(workers), until))
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    folder = tmp_path / "run"
    command = [sys.executable, str(program), str(folder), str(until)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for after in (3, 17):  # it stays a few rounds later: whoever reads this may be slow
        stays = str(after + 3)
        with subprocess.Popen(
            [*command, stays], stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            for line in process.stdout:
                if int(line) >= after:
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL
        assert not is_held(folder)
    subprocess.run([*command, "0"], check=True, env=environment, stdout=subprocess.DEVNULL, timeout=120)
    assert same(torch.load(folder / "end.pt"), dict(whole))
    assert [line["round"] for line in Journal(folder).until(until)] == list(range(1, until + 1))


def test_what_an_aggregation_keeps_goes_on_too(workers, tmp_path):
    class Momentum:
        """The server's step with momentum: Hsu et al., arXiv:1909.06335."""

        def __init__(self):
            self.kept = {}
            self.rounds = 0

        def init(self):
            return []

        def add(self, states, entries, weight):
            return [*states, entries]

        def result(self, states):
            self.rounds += 1
            mean = {name: sum(one[name] for one in states) / len(states) for name in states[0]}
            for name, value in mean.items():
                self.kept[name] = 0.9 * self.kept.get(name, value) + 0.1 * value
            return {name: value.to(states[0][name].dtype) for name, value in self.kept.items()}

        def state_dict(self):
            return {**self.kept, "rounds": self.rounds}

        def load_state_dict(self, state):
            self.rounds = state["rounds"]
            self.kept = {name: value for name, value in state.items() if name != "rounds"}

    whole = asyncio.run(go(fresh(workers, job=small(), aggregation=Momentum())))
    asyncio.run(go(fresh(workers, tmp_path, small(), aggregation=Momentum()), 2))
    kept = Momentum()
    again = RoundScheduler.resume(tmp_path, workers, small(), aggregation=kept)
    assert same(asyncio.run(go(again)), whole)
    assert kept.rounds == ROUNDS
    other = RoundScheduler.resume(tmp_path, workers, small())
    with pytest.raises(
        RunFolderError, match="its combining is 'test_what.*Momentum', not '.*FederatedAveraging'"
    ):
        asyncio.run(go(other))
    killed(other)


def test_random_generators_go_on_where_they_were(workers, tmp_path):
    def draw():
        return torch.rand(3), random.random(), np.random.rand()

    async def rounds(scheduler, until):
        await scheduler.prepare()
        state, drawn = scheduler.state, []
        for number in range(scheduler.next_round, until + 1):
            drawn.append(draw())
            state = (await scheduler.run_round(number, state)).state
        await scheduler.close()
        return drawn

    job = config()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    whole = asyncio.run(rounds(fresh(workers, tmp_path / "a", job), 3))
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    asyncio.run(rounds(fresh(workers, tmp_path / "b", job), 2))
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    last = asyncio.run(rounds(RoundScheduler.resume(tmp_path / "b", workers, job), 3))
    assert torch.equal(last[0][0], whole[2][0])
    assert last[0][1:] == whole[2][1:]


def test_in_place_rounds_and_changes_of_the_callers_do_not_reach_into_a_checkpoint(workers, tmp_path):
    async def first():
        scheduler = fresh(workers, tmp_path)
        await scheduler.prepare()
        state = {name: value.clone() for name, value in scheduler.state.items()}
        result = await scheduler.run_round(1, state, in_place=True)
        there = {name: value.clone() for name, value in result.state.items()}
        for value in state.values():
            value.zero_()
        await scheduler.settled()
        killed(scheduler)
        return there

    there = asyncio.run(first())
    again = RoundScheduler.resume(tmp_path, workers, config())
    asyncio.run(again.prepare())
    assert same(again.state, there)
    asyncio.run(again.close())


def test_large_states_are_saved_before_the_round_returns(workers, tmp_path):
    torch.manual_seed(0)
    job = TrainConfig(nn.Linear(6, 400_000), F.cross_entropy, batch_size=2, max_nr_batches=1)

    async def one():
        scheduler = fresh(workers, tmp_path, job)
        await scheduler.prepare()
        result = await scheduler.run_round(1, scheduler.state)
        found = read_checkpoint(tmp_path / "checkpoint-000001.run")
        assert torch.equal(found.tensors["state/weight"], result.state["weight"])
        await scheduler.close()

    asyncio.run(one())


def test_notes_of_the_caller_and_what_went_wrong_stand_in_the_journal(workers, tmp_path):
    async def main():
        scheduler = fresh(workers, tmp_path, min_workers=1)
        await scheduler.prepare()
        await scheduler.run_round(1, scheduler.state, save=False)
        await scheduler.save(accuracy=0.5)
        workers[0].close()
        result = await scheduler.run_round(2, scheduler.state)
        assert result.missing.keys() == {"alice"}
        workers[1].close()
        with pytest.raises(QuorumError):
            await scheduler.run_round(3, scheduler.state)
        await scheduler.close()

    asyncio.run(main())
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines] == ["began", "round", "round", "failed"]
    assert lines[1]["accuracy"] == 0.5
    assert lines[2]["missing"]["alice"]["kind"] == "lost"
    assert "bob is lost" in lines[3]["why"]


# ---------------------------------------------------------------------------- damage, and full disks


def half_a_run(workers, folder):
    asyncio.run(go(fresh(workers, folder), 2))
    return sorted(folder.glob("checkpoint-*.run"))


def test_two_checkpoints_are_kept(workers, tmp_path):
    assert [path.name for path in half_a_run(workers, tmp_path)] == [
        "checkpoint-000001.run",
        "checkpoint-000002.run",
    ]
    assert not list(tmp_path.glob(".*tmp"))


def test_a_checkpoint_in_the_place_of_another_is_left_out(workers, tmp_path, caplog):
    """Two that are whole, of the same model: only what they say of themselves tells them apart."""
    caplog.set_level(logging.WARNING, "planrt.fl")
    whole = asyncio.run(go(fresh(workers)))
    one, two = half_a_run(workers, tmp_path / "a")
    two.write_bytes(one.read_bytes())
    again = RoundScheduler.resume(tmp_path / "a", workers, config())
    assert again.next_round == 2
    assert any(record.getMessage() == "checkpoint_left_out" for record in caplog.records)
    assert same(asyncio.run(go(again)), whole)
    for foreign, own in zip(
        half_a_run(workers, tmp_path / "b"), half_a_run(workers, tmp_path / "c"), strict=True
    ):
        own.write_bytes(foreign.read_bytes())
    with pytest.raises(RunFolderError, match=r"no checkpoint .* can be used: .*000002.run is of another run"):
        RoundScheduler.resume(tmp_path / "c", workers, config())


@pytest.mark.parametrize("damage", ["torn", "one bit", "empty", "not one of ours", "longer"])
def test_a_damaged_checkpoint_leaves_the_one_before(workers, tmp_path, damage, caplog):
    caplog.set_level(logging.WARNING, "planrt.fl")
    whole = asyncio.run(go(fresh(workers)))
    newest = half_a_run(workers, tmp_path)[-1]
    data = bytearray(newest.read_bytes())
    if damage == "one bit":
        data[len(data) // 2] ^= 1
    new = {
        "torn": data[: len(data) // 2],
        "empty": b"",
        "not one of ours": b"hello" * 99,
        "longer": data + b"x",
    }
    newest.write_bytes(new.get(damage, data))
    again = RoundScheduler.resume(tmp_path, workers, config())
    assert again.next_round == 2
    assert any(record.getMessage() == "checkpoint_left_out" for record in caplog.records)
    assert same(asyncio.run(go(again)), whole)


def test_without_any_good_checkpoint_it_is_said_which_and_why(workers, tmp_path):
    for path in half_a_run(workers, tmp_path):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(
        RunFolderError, match="no checkpoint of .* can be used: .*000002.run: its SHA-256.*000001"
    ):
        RoundScheduler.resume(tmp_path, workers, config())


@pytest.mark.parametrize("cut", [1, 30, 400])
def test_half_a_line_at_the_end_of_the_journal_is_cut_off(workers, tmp_path, cut):
    whole = asyncio.run(go(fresh(workers)))
    half_a_run(workers, tmp_path)
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    assert same(asyncio.run(go(RoundScheduler.resume(tmp_path, workers, config()))), whole)
    assert not Journal(tmp_path).broken


def test_a_changed_line_of_the_journal_ends_its_history_and_nothing_else(workers, tmp_path):
    whole = asyncio.run(go(fresh(workers)))
    half_a_run(workers, tmp_path)
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"round": 1', b'"round": 9'))
    assert "chain is broken" in Journal(tmp_path).broken
    assert same(asyncio.run(go(RoundScheduler.resume(tmp_path, workers, config()))), whole)


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(workers, tmp_path):
    whole = asyncio.run(go(fresh(workers)))
    for room in (0, 100, 2_000, 4_000, 6_000, 9_000):
        folder = tmp_path / str(room)
        asyncio.run(go(fresh(workers, folder), 1))
        scheduler = RoundScheduler.resume(folder, workers, config())
        scheduler._written.record.folder.disk = FullDisk(room)
        with pytest.raises(RunFolderError, match="No space left on device"):
            asyncio.run(go(scheduler))
        killed(scheduler)
        assert not list(folder.glob(".*tmp"))
        assert same(asyncio.run(go(RoundScheduler.resume(folder, workers, config()))), whole), room


def test_a_real_limit_of_file_sizes_is_told_in_one_line(tmp_path):
    code = """
        import resource, signal, sys
        import torch
        from pathlib import Path
        from planrt.serde.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
        from planrt.serde.disk import Disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = Path(sys.argv[1]) / "a.run"
        write_checkpoint(Disk(), path, Checkpoint({"n": 1}, {"w": torch.ones(10)}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write_checkpoint(Disk(), path, Checkpoint({"n": 2}, {"w": torch.ones(100_000)}))
        except OSError as error:
            print(error.strerror, read_checkpoint(path).facts["n"], len(list(path.parent.iterdir())))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "File too large 1 1"


# ------------------------------------------------------------------------------------- bad input


def test_the_run_of_another_model_seed_data_set_or_rule_is_refused_by_name(workers, tmp_path):
    half_a_run(workers, tmp_path)

    def refused(words, job=None, chosen=None, **options):
        scheduler = RoundScheduler.resume(tmp_path, chosen or workers, job or config(), **options)
        with pytest.raises(RunFolderError, match=words):  # and lets go of the folder
            asyncio.run(scheduler.prepare())

    refused("of another run: its model, loss or shapes are not these", small())
    refused("its batch_size is 8, not 4", config(batch_size=4))
    refused("its optimizer is 'SGD', not 'Adam'", config(optimizer="Adam", optimizer_args={"lr": 0.1}))
    with VirtualWorker("bob", datasets={"d": classification_data(1, samples=50)}, auto_add=False) as bob:
        refused("the data set of worker 'bob' had 60 items .*, and has 50 items", chosen=[workers[0], bob])
    with VirtualWorker("carl", datasets={"d": classification_data(1)}, auto_add=False) as carl:
        refused("its workers are alice, bob, not alice, carl", chosen=[workers[0], carl])
    with pytest.raises(OptionError, match="a run that goes on has its own seed"):
        RoundScheduler.resume(tmp_path, workers, config(), seed=8)
    asyncio.run(go(RoundScheduler.resume(tmp_path, workers, config(), min_workers=2, round_timeout=60)))


def test_two_coordinators_cannot_have_one_folder(workers, tmp_path):
    scheduler = fresh(workers, tmp_path)
    with pytest.raises(RunFolderError, match=rf"is in use by another coordinator \(process {os.getpid()} on"):
        fresh(workers, tmp_path)
    asyncio.run(go(scheduler, 1))
    with pytest.raises(RunFolderError, match="has a run already, of 1 rounds: go on with it"):
        fresh(workers, tmp_path)
    first = RoundScheduler.resume(tmp_path, workers, config())
    with pytest.raises(RunFolderError, match=r"in use .*: await close\(\) of the scheduler that has it here"):
        RoundScheduler.resume(tmp_path, workers, config())
    asyncio.run(go(first, 2))


def test_newer_files_are_refused_by_their_version(workers, tmp_path):
    newest = half_a_run(workers, tmp_path / "a")[-1]
    data = bytearray(newest.read_bytes())
    data[8] = 2
    newest.write_bytes(data)
    with pytest.raises(
        RunFolderError, match="of a newer planrt \\(checkpoints of version 2; this one reads 1\\)"
    ):
        RoundScheduler.resume(tmp_path / "a", workers, config())
    half_a_run(workers, tmp_path / "b")
    journal = tmp_path / "b" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(
        RunFolderError, match="of a newer planrt \\(journals of version 2; this one reads 1\\)"
    ):
        RoundScheduler.resume(tmp_path / "b", workers, config())


def test_other_mistakes(workers, tmp_path):
    with pytest.raises(RunFolderError, match="there is no run to go on with"):
        RoundScheduler.resume(tmp_path / "empty", workers, config())
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="cannot write to the run folder"):
        fresh(workers, tmp_path / "file")
    with pytest.raises(OptionError, match="checkpoint_every must be a whole number"):
        fresh(workers, tmp_path / "b", checkpoint_every=-1)
    assert not is_held(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "journal.jsonl").write_text('{"previous": "' + "0" * 64 + '"}\n')
    with pytest.raises(RunFolderError, match="is no journal of a run"):
        fresh(workers, tmp_path / "c")
    scheduler = fresh(workers, tmp_path / "d")
    with pytest.raises(LocalError):
        _ = scheduler.state
    with pytest.raises(OptionError, match="begins with prepare"):
        asyncio.run(scheduler.run_round(1, {}))
    asyncio.run(scheduler.prepare())
    with pytest.raises(OptionError, match="round 1 comes next in the run folder .*, not 5"):
        asyncio.run(scheduler.run_round(5, scheduler.state))
    asyncio.run(scheduler.close())
    shutil.rmtree(tmp_path / "d")


def test_a_checkpoint_is_an_exact_inverse_for_every_dtype(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.zeros(0, 3),
        "c": torch.tensor(True),
        "d": torch.randn(5).bfloat16(),
        "e": torch.randn(2, 2, dtype=torch.complex64),
        "f": torch.arange(6).view(2, 3).t(),
    }
    write_checkpoint(Disk(), tmp_path / "x.run", Checkpoint({"n": [1, None, "é"]}, tensors))
    found = read_checkpoint(tmp_path / "x.run")
    assert found.facts == {"n": [1, None, "é"]}
    assert same(found.tensors, tensors)
    assert all(found.tensors[name].dtype == value.dtype for name, value in tensors.items())
