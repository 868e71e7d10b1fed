"""What a run tells to whoever watches it: rounds, who is missing, who is waited for, checkpoints."""

import asyncio
import contextlib
import threading
from typing import get_args

import pytest
import torch

import planrt
from planrt.errors import PlanrtError, QuorumError, WorkerLostError
from planrt.fl import RoundScheduler, TrainConfig
from planrt.fl.attendance import Kind
from planrt.fl.runs.run_metrics import REASONS, RunMetrics, WatchedJob
from planrt.workers import BaseDataset
from tests.fl.clocks import standing_clock
from tests.processes import eventually
from tests.watching import health, samples


def data(items=8):
    return BaseDataset(torch.randn(items, 4), torch.randint(0, 2, (items,)))


def config(**options):
    torch.manual_seed(0)
    return TrainConfig(
        torch.nn.Linear(4, 2),
        torch.nn.functional.cross_entropy,
        batch_size=4,
        optimizer_args={"lr": 0.1},
        **options,
    )


class Hanging(torch.utils.data.Dataset):
    """One that hangs in its items once it is told to."""

    def __init__(self):
        self.hangs, self.go_on = False, threading.Event()

    def __len__(self):
        return 8

    def __getitem__(self, place):
        if self.hangs:
            self.go_on.wait(60)
        return torch.ones(4), torch.tensor(1)


def test_the_reasons_are_those_of_attendance():
    assert set(REASONS) == set(get_args(Kind))


def test_rounds_are_told_as_they_were(make_worker, tmp_path):
    workers = [make_worker(id, {"d": data()}) for id in ("alice", "bob")]
    scheduler = RoundScheduler(workers, config(), dataset_key="d", seed=1, run_dir=tmp_path / "run")
    with planrt.MetricsServer(scheduler.watched) as server:
        assert health(server.address)[1]["status"] == "running"
        assert samples(server.address).of("planrt_rounds_total", outcome="completed") == 0

        async def run():
            await scheduler.prepare()
            state, results = scheduler.state, []
            for number in (1, 2, 3):
                results.append(await scheduler.run_round(number, state))
                state = results[-1].state
            await scheduler.settled()
            return results

        results = asyncio.run(run())
        found = samples(server.address)
        assert found.of("planrt_rounds_total", outcome="completed") == 3
        assert found.of("planrt_rounds_total", outcome="failed") == 0
        assert found.of("planrt_round_seconds_count") == 3
        assert found.of("planrt_round_seconds_sum") == pytest.approx(sum(one.seconds for one in results))
        parts = [part for one in results for part in one.workers.values()]
        assert found.of("planrt_round_bytes_total", direction="out") == sum(part.bytes_sent for part in parts)
        assert found.of("planrt_round_bytes_total", direction="in") == sum(
            part.bytes_received for part in parts
        )
        assert found.of("planrt_last_round") == 3
        assert found.of("planrt_last_loss") == pytest.approx(results[-1].loss)
        assert found.of("planrt_checkpoints_total") == 4  # the first is of the model as it began
        assert found.of("planrt_last_checkpoint_time_seconds") > 1e9
        assert (found.of("planrt_run_workers"), found.of("planrt_run_workers_needed")) == (2, 2)
        status, told = health(server.address)
        assert (status, told["round"], told["next_round"], told["waiting"]) == (200, 3, 4, {})
        asyncio.run(scheduler.close())


def test_who_is_waited_for_and_who_is_missing(make_worker):
    slow = Hanging()
    alice, bob = make_worker("alice", {"d": data()}), make_worker("bob", {"d": slow})
    scheduler = RoundScheduler(
        [alice, bob], config(), dataset_key="d", seed=1, min_workers=1, round_timeout=3.0
    )
    asyncio.run(scheduler.prepare())
    slow.hangs = True
    with planrt.MetricsServer(scheduler.watched) as server, standing_clock() as clock:

        def one_round():
            with contextlib.suppress(
                QuorumError
            ):  # workers of one process compute in turn: alice may be late, too
                asyncio.run(scheduler.run_round(1, scheduler.config.state))

        running = threading.Thread(target=one_round)
        running.start()
        try:
            assert eventually(lambda: "bob" in health(server.address)[1]["waiting"])
            assert samples(server.address).of("planrt_waiting_seconds", worker="bob") > 0
            clock.passes(3.0)
            running.join()
        finally:
            slow.go_on.set()
            running.join()
        found = samples(server.address)
        assert sum(found.of("planrt_missing_workers_total", worker="bob", reason=one) for one in REASONS) == 1


def test_a_round_that_fails_is_told_until_one_is_completed(make_worker):
    alice, bob = make_worker("alice", {"d": data()}), make_worker("bob", {"d": data()})
    scheduler = RoundScheduler([alice, bob], config(), dataset_key="d", seed=1)
    asyncio.run(scheduler.prepare())
    with planrt.MetricsServer(scheduler.watched) as server:
        bob.close()
        with pytest.raises(WorkerLostError):
            asyncio.run(scheduler.run_round(1, scheduler.config.state))
        status, told = health(server.address)
        assert (status, told["status"], told["failed"]) == (503, "last round failed", "WorkerLostError")
        found = samples(server.address)
        assert found.of("planrt_rounds_total", outcome="failed") == 1
        assert found.of("planrt_missing_workers_total", worker="bob", reason="lost") == 1
        bob.connect()
        asyncio.run(scheduler.run_round(1, scheduler.config.state))
        assert health(server.address)[0] == 200


def test_below_the_quorum_all_who_are_missing_are_counted(make_worker):
    workers = [make_worker(id, {"d": data()}) for id in ("alice", "bob")]
    scheduler = RoundScheduler(workers, config(), dataset_key="d", seed=1, min_workers=2)
    asyncio.run(scheduler.prepare())
    for worker in workers:
        worker.close()
    with pytest.raises(QuorumError):
        asyncio.run(scheduler.run_round(1, scheduler.config.state))
    with planrt.MetricsServer(scheduler.watched) as server:
        found = samples(server.address)
        for worker in workers:
            assert found.of("planrt_missing_workers_total", worker=worker.id, reason="lost") == 1


def test_a_job_starts_runs_and_stops():
    job = WatchedJob()
    with planrt.MetricsServer(job) as server:
        assert health(server.address) == (200, {"status": "starting", "ok": True})
        assert samples(server.address).of("planrt_run_up") == 1
        job.run = RunMetrics(["alice"], 1, waiting=dict, next_round=lambda: 1, checkpoints=lambda: (0, 0.0))
        assert health(server.address)[1]["status"] == "running"
        job.stop()
        assert health(server.address) == (503, {"status": "stopping", "ok": False})
        assert samples(server.address).of("planrt_run_up") == 0


def test_a_worker_that_nobody_knows_adds_no_label():
    run = RunMetrics(["alice"], 1, waiting=dict, next_round=lambda: 1, checkpoints=lambda: (0, 0.0))
    for number in range(100):
        run.failed("QuorumError", {f"worker{number}": "lost", "alice": f"reason{number}"})
    (missing,) = [one for one in run.metrics() if one.name == "planrt_missing_workers"]
    assert len(missing.samples) == len(REASONS) + 1
    assert missing.samples["alice", "other"] == 100


def test_what_is_wrong_with_the_options_of_a_round_is_no_trouble_of_the_run(make_worker):
    scheduler = RoundScheduler([make_worker("alice", {"d": data()})], config(), dataset_key="d", seed=1)
    with contextlib.suppress(PlanrtError, TypeError):
        asyncio.run(scheduler.run_round(-1, {}))
    assert scheduler.watched.health().ok
