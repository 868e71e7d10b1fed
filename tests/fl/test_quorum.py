"""Rounds that go on without workers that are cut off, slow, or hang: a quorum and a time-out."""

import asyncio
import contextlib
import os
import re
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planrt.errors import OptionError, PlanrtError, QuorumError, RemoteError, WorkerLostError
from planrt.fl import RoundScheduler, TrainConfig, attendance, federated_avg
from planrt.fl.runs.children import WorkerProcesses
from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.wire import messages as m
from tests.fl.clocks import late_once_answered
from tests.fl.served import IDS, child, worker_processes
from tests.models import classification_data, seeded_classifier
from tests.processes import eventually
from tests.proxy import CuttingProxy
from tests.warm import send_signal

pytestmark = pytest.mark.usefixtures("warm_workers", "patient")


SHORT = 4.0
"""Seconds: a time-out that one worker is to exceed. Where others are asked too it passes once these have answered."""

LONG = 300.0
"""Seconds: what must not be waited for. A test that does so runs into the suite's own time limit."""


@pytest.fixture
def patient(monkeypatch):
    """Who is reached again is waited for, however long that takes; who is not refuses at once."""
    monkeypatch.setattr(attendance, "RECONNECTING", LONG)


def config(**options):
    options = {"batch_size": 8, "max_nr_batches": 4, "optimizer_args": {"lr": 0.1}, **options}
    return TrainConfig(seeded_classifier(), F.nll_loss, **options)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def expected(state, ids, number, job=None, **data):
    """The plain average of what the workers `ids` make of `state` in that round, each trained alone."""
    job = job or config()

    async def alone(worker):
        scheduler = RoundScheduler([worker], job, dataset_key="d", seed=7)
        await scheduler.prepare()
        return (await scheduler.run_round(number, state)).state

    trained = {}
    for id in ids:
        chosen = data.get(id) or classification_data(IDS.index(id))
        with VirtualWorker(id, datasets={"d": chosen}, auto_add=False) as worker:
            trained[id] = asyncio.run(alone(worker))
    return federated_avg(trained)


def run(scheduler, number, state, **options):
    return asyncio.run(scheduler.run_round(number, state, **options))


@contextlib.contextmanager
def serving(datasets, through=()):
    """Websocket workers with these data sets; those named in `through` are reached by a `CuttingProxy`."""
    with contextlib.ExitStack() as stack:
        workers, proxies = [], {}
        for id, data in datasets.items():
            server = WebsocketServerWorker(id, threads=1)
            server.add_dataset(data, "d")
            uri = stack.enter_context(server.running())
            if id in through:
                proxies[id] = CuttingProxy(uri)
                uri = stack.enter_context(proxies[id].running())
            workers.append(stack.enter_context(WebsocketClientWorker(id, uri=uri)))
        yield workers, proxies


def scheduler_of(workers, job=None, *, min_workers=2, round_timeout=LONG, **options):
    made = RoundScheduler(
        workers, job or config(), dataset_key="d", seed=7, min_workers=min_workers, round_timeout=round_timeout,
        **options,
    )  # fmt: skip
    asyncio.run(made.prepare())
    return made


def plain_data():
    return {id: classification_data(number) for number, id in enumerate(IDS)}


@pytest.mark.parametrize(
    ("direction", "nbytes"),
    [("up", 0), ("up", 700), ("down", 0), ("down", 3), ("down", 600)],
    ids=["before it", "while it is asked", "while it trains", "at its answer", "in its answer"],
)
def test_a_worker_that_is_cut_off_is_left_out_and_takes_part_in_the_next_round(direction, nbytes):
    with serving(plain_data(), through=["bob"]) as (workers, proxies):
        scheduler = scheduler_of(workers)
        first = scheduler.config.state
        proxies["bob"].cut_at(direction, nbytes)
        result = run(scheduler, 1, first)
        assert same(result.state, expected(first, ["alice", "charlie"], 1))
        assert result.workers.keys() == {"alice", "charlie"}
        assert result.missing.keys() == {"bob"}
        assert result.missing["bob"].kind == "lost"
        assert "without bob (lost)" in repr(result)
        again = run(scheduler, 2, result.state)
        assert again.missing == {}
        assert same(again.state, expected(result.state, IDS, 2))


def test_a_worker_that_cannot_be_reached_again_stays_out_until_it_can():
    with serving(plain_data(), through=["alice"]) as (workers, proxies):
        scheduler = scheduler_of(workers)
        state = scheduler.config.state
        proxies["alice"].refuses = True
        proxies["alice"].cut()
        assert eventually(lambda: workers[0].workplace.closed)
        for number in (1, 2):
            result = run(scheduler, number, state)
            assert result.missing["alice"].kind == "lost"
            assert same(result.state, expected(state, ["bob", "charlie"], number))
            state = result.state
        proxies["alice"].refuses = False
        result = run(scheduler, 3, state)
        assert same(result.state, expected(state, IDS, 3))


def test_below_the_quorum_all_that_are_missing_are_named_and_nothing_is_lost():
    with serving(plain_data(), through=["alice", "bob"]) as (workers, proxies):
        scheduler = scheduler_of(workers)
        state = scheduler.config.state
        before = {name: value.clone() for name, value in state.items()}
        for proxy in proxies.values():
            proxy.cut_at("down", 0)
        with pytest.raises(
            QuorumError, match="round 1 needs 2 workers.*alice is lost.*bob is lost"
        ) as caught:
            run(scheduler, 1, state, in_place=True)
        error = caught.value
        assert isinstance(error, PlanrtError)
        assert error.needed == 2
        assert {"alice", "bob"} <= error.missing.keys()
        assert set(error.answered) | error.missing.keys() == set(IDS)
        assert same(state, before)
        assert same(run(scheduler, 1, state).state, expected(state, IDS, 1))  # the round is made again


def test_by_default_all_are_needed_and_the_error_is_the_workers_own():
    with serving(plain_data(), through=["bob"]) as (workers, proxies):
        scheduler = scheduler_of(workers, min_workers=None)
        state = scheduler.config.state
        proxies["bob"].cut_at("down", 0)
        with pytest.raises(WorkerLostError, match="'bob'"):
            run(scheduler, 1, state)
        assert same(run(scheduler, 1, state).state, expected(state, IDS, 1))
        proxies["bob"].refuses = True
        proxies["bob"].cut()
        assert eventually(lambda: workers[1].workplace.closed)
        with pytest.raises(WorkerLostError, match="'bob' is gone"):
            run(scheduler, 1, state)


def test_a_worker_that_cannot_train_is_left_out(make_worker):
    good = classification_data(0)
    bad = BaseDataset(good.data, good.targets + 5)  # labels that the network has no score for
    workers = [make_worker("alice", {"d": good}), make_worker("bob", {"d": bad})]
    scheduler = scheduler_of(workers, min_workers=1)
    state = scheduler.config.state
    result = run(scheduler, 1, state)
    assert result.missing["bob"].kind == "failed"
    assert "out of bounds" in result.missing["bob"].why
    assert same(result.state, expected(state, ["alice"], 1))
    with pytest.raises(RemoteError, match="'bob'"):
        run(scheduler_of(workers, min_workers=None), 1, state)


def test_workers_that_are_gone_before_the_first_round_do_not_stop_it():
    with serving(plain_data(), through=["alice"]) as (workers, proxies):
        proxies["alice"].refuses = True
        proxies["alice"].cut()
        assert eventually(lambda: workers[0].workplace.closed)
        scheduler = scheduler_of(workers)
        state = scheduler.config.state
        assert run(scheduler, 1, state).missing.keys() == {"alice"}


def test_a_worker_that_was_closed_here_is_not_connected_to_again():
    with serving(plain_data()) as (workers, _):
        scheduler = scheduler_of(workers)
        state = scheduler.config.state
        workers[2].close()
        result = run(scheduler, 1, state)
        assert "closed here: connect() it" in result.missing["charlie"].why
        workers[2].connect()
        assert run(scheduler, 2, result.state).missing == {}


def test_a_closed_virtual_worker_is_told_so_and_comes_back():
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(VirtualWorker(id, datasets={"d": data})) for id, data in plain_data().items()
        ]
        scheduler = scheduler_of(workers)
        state = scheduler.config.state
        workers[0].close()
        assert run(scheduler, 1, state).missing["alice"].kind == "lost"
        workers[0].connect()
        assert run(scheduler, 1, state).missing == {}


# ------------------------------------------------- processes that are killed, stopped, and hang in their data


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Three workers in processes of their own, and the folder whose files make them hang."""
    folder = tmp_path_factory.mktemp("hang")
    with worker_processes(folder) as (workers, running, ready):
        asyncio.run(warm(workers))
        yield workers, running, ready, folder


async def warm(workers):
    """A round without a time-out: what torch loads late is there before one counts."""
    scheduler = RoundScheduler(workers, config(), dataset_key="d", seed=1)
    await scheduler.prepare()
    await scheduler.run_round(0, scheduler.config.state)


def rounds_until_all_take_part(scheduler, state, number, job=None):
    """Rounds until all workers count; each is the plain average of those that it names. Returns the last number."""

    def all_back():
        nonlocal state, number
        number += 1
        before, result = state, run(scheduler, number, state)
        state = result.state
        who = [id for id in IDS if id not in result.missing]
        assert same(state, expected(before, who, number, job))  # no late answer is in it
        return who == IDS

    assert eventually(all_back)


@pytest.mark.parametrize("how", ["hanging in its data set", "stopped"])
def test_a_late_worker_costs_one_time_out_and_takes_part_again_when_it_is_free(processes, how):
    workers, running, _, folder = processes
    scheduler = scheduler_of(workers)
    state = scheduler.config.state
    hang = folder / "hang-alice"
    try:
        hang.touch() if how != "stopped" else send_signal(running.pids["alice"], signal.SIGSTOP)
        scheduler.round_timeout = SHORT
        with late_once_answered(workers[1:], m.Fit, SHORT):
            result = run(scheduler, 1, state)
        assert result.missing["alice"].kind == "late"
        assert "no answer within 4 s" in result.missing["alice"].why
        assert same(result.state, expected(state, ["bob", "charlie"], 1))
        scheduler.round_timeout = LONG
        for number in (2, 3):
            state = result.state
            result = run(scheduler, number, state)
            assert result.missing["alice"].kind == "busy"
            assert "round 1" in result.missing["alice"].why
            assert same(result.state, expected(state, ["bob", "charlie"], number))
    finally:
        hang.unlink(missing_ok=True)
        send_signal(running.pids["alice"], signal.SIGCONT)
    rounds_until_all_take_part(scheduler, result.state, 3)


@pytest.mark.parametrize("needed", [3, None], ids=["quorum", "default"])
def test_a_busy_worker_is_waited_for_where_the_quorum_needs_it(processes, needed):
    workers, _, _, folder = processes
    scheduler = scheduler_of(workers, min_workers=needed)
    state = scheduler.config.state
    scheduler.round_timeout = SHORT
    hang = folder / "hang-bob"
    hang.touch()
    try:
        with (
            late_once_answered(workers[::2], m.Fit, SHORT),
            pytest.raises(QuorumError, match=r"round 1 needs 3 workers, and 2 count: bob is late: no answer"),
        ):
            run(scheduler, 1, state)
        with pytest.raises(QuorumError, match=r"bob is busy: it has not answered round 1 yet"):
            run(scheduler, 1, state)
        scheduler.round_timeout = LONG
        threading.Timer(0.3, hang.unlink).start()
        assert same(run(scheduler, 1, state).state, expected(state, IDS, 1))
    finally:
        hang.unlink(missing_ok=True)


def test_large_answers_that_are_late_are_dropped_too(processes):
    """Models over 8 MB are added up in a thread, and replies that wait go to files."""
    workers, _, _, folder = processes
    torch.manual_seed(0)
    job = TrainConfig(nn.Linear(6, 400_000), F.cross_entropy, batch_size=2, max_nr_batches=1)
    scheduler = scheduler_of(workers, job, hold=0)
    hang = folder / "hang-alice"
    hang.touch()
    try:
        scheduler.round_timeout = SHORT
        with late_once_answered(workers[1:], m.Fit, SHORT):
            result = run(scheduler, 1, job.state)
        assert result.missing["alice"].kind == "late"
        assert same(result.state, expected(job.state, ["bob", "charlie"], 1, job))
    finally:
        hang.unlink()
    scheduler.round_timeout = LONG
    rounds_until_all_take_part(scheduler, result.state, 1, job)


def test_a_killed_worker_is_left_out_and_one_that_was_restarted_takes_part_with_the_plan_sent_again(
    processes,
):
    workers, running, ready, folder = processes
    scheduler = scheduler_of(workers)
    state = scheduler.config.state
    send_signal(running.pids["bob"], signal.SIGKILL)
    for number in (1, 2):
        result = run(scheduler, number, state)
        assert result.missing["bob"].kind == "lost"
        assert same(result.state, expected(state, ["alice", "charlie"], number))
        state = result.state
    with WorkerProcesses([child("bob", ready["bob"].port)]) as again:
        again.wait_ready()
        result = run(scheduler, 3, state)
        assert result.missing == {}
        assert same(result.state, expected(state, IDS, 3))
        assert result.workers["bob"].requests == 2  # the plan, and what it is to do
        state = result.state
        (folder / "hang-bob").touch()
        threading.Timer(0.5, os.kill, (again.pids["bob"], signal.SIGKILL)).start()
        result = run(scheduler, 4, state)  # it is killed while it trains
        assert result.missing["bob"].kind == "lost"
        assert same(result.state, expected(state, ["alice", "charlie"], 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_workers": 4}, "min_workers=4 is more than the workers that there are: 3"),
        ({"min_workers": 0}, "min_workers must be a whole number of at least 1, got 0"),
        ({"min_workers": 2.5}, "min_workers must be a whole number"),
        ({"min_workers": True}, "min_workers must be a whole number"),
        ({"round_timeout": -1}, "round_timeout must be a number of seconds above 0"),
        ({"round_timeout": 0}, "round_timeout must be a number of seconds above 0"),
        ({"round_timeout": float("nan")}, "round_timeout must be a number of seconds above 0"),
        ({"round_timeout": float("inf")}, "of at most 2,592,000, or None for no end, got inf"),
        ({"round_timeout": 1e300}, "of at most 2,592,000"),
        ({"round_timeout": "60"}, "round_timeout must be a number of seconds"),
        ({"max_update_norm": -1}, "max_update_norm must be a number above 0"),
    ],
)
def test_bad_options_are_refused_at_once(options, words):
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(VirtualWorker(id, datasets={"d": data})) for id, data in plain_data().items()
        ]
        with pytest.raises(OptionError, match=re.escape(words)):
            RoundScheduler(workers, config(), dataset_key="d", seed=1, **options)
