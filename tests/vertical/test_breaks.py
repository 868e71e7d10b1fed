"""Joint runs that are broken off: by a client who stops, an owner who changes their mind, or a process that hangs."""

import asyncio
import contextlib
import os
import random
import signal

import pytest
from torch import nn

from planrt.errors import JointError, NotApprovedError
from planrt.plans.policy.approvals import Approvals
from planrt.plans.policy.rules import Policy
from planrt.vertical import (
    Party,
    async_logistic_regression,
    async_split_network,
    async_table_columns,
    linear_regression,
    logistic_regression,
    split_network,
)
from tests.vertical.served import worker_processes
from tests.vertical.tables import SHORT, halves, parties, whole
from tests.vertical.training import once_it_trains, under_way
from tests.warm import send_signal

pytestmark = pytest.mark.filterwarnings("ignore:a key of 1024 bits")
LONG = {"normalise": "casefold", "epochs": 100_000, "lr": 1e-3, "batch_size": 2}


def long_run(alice, bob, carol, method):
    if method == "shares":
        return logistic_regression(alice, bob, method="shares", crypto_provider=carol, **LONG)
    return logistic_regression(alice, bob, key_holder=carol, allow_small_batches=True, **LONG, **SHORT)


@pytest.mark.parametrize("method", ["paillier", "shares"])
def test_ctrl_c_in_an_epoch_ends_the_run_and_another_one_begins(make_worker, method):
    alice, bob = parties(make_worker, whole())
    carol = make_worker("carol")
    run = long_run(alice, bob, carol, method)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with once_it_trains(run, os.kill, os.getpid(), signal.SIGINT), pytest.raises(KeyboardInterrupt):
            run.fit()
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(JointError, match="has ended: it was interrupted in a step; begin a new one"):
        run.fit(1)
    assert not run.is_open
    with long_run(alice, bob, carol, method) as run:
        assert len(run.fit(1)) == 1
        assert len(run.predict(["person 20"])) == 1


def test_a_task_that_is_cancelled_ends_the_run_and_another_one_begins(make_worker):
    alice, bob = parties(make_worker, whole())
    torch_parts = {
        "bottoms": [nn.Linear(2, 2), nn.Linear(3, 2)],
        "top": nn.Linear(4, 1),
        "loss_fn": nn.MSELoss(),
    }
    about = {"normalise": "casefold", "batch_size": 1, **torch_parts}

    async def cancelled(run):
        task = asyncio.create_task(run.async_fit())
        await under_way(run)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run = split_network(alice, bob, epochs=100_000, **about)
    asyncio.run(cancelled(run))
    with pytest.raises(JointError, match="was interrupted"):
        run.get()
    assert not run.is_open
    with split_network(alice, bob, epochs=1, **about) as run:
        run.fit()
        run.get()


def test_an_owner_who_denies_in_the_middle_is_heeded_from_the_next_step_on(make_owned, tmp_path):
    left, right = halves(whole())
    alice, _ = make_owned("alice", {"t": left})
    bob, _ = make_owned("bob", {"t": right}, policy=Policy(approval="ask"), approvals=tmp_path)
    carol, _ = make_owned("carol")
    one, two = Party(alice, "t", "id", ["a", "b"]), Party(bob, "t", "who", ["c"], label="y")
    about = {"key_holder": carol, "normalise": "casefold", "batch_size": 20, **SHORT}
    with pytest.raises(NotApprovedError, match="waits"):
        linear_regression(one, two, **about)
    (waiting,) = Approvals(tmp_path).pending()
    Approvals(tmp_path).approve(waiting.plan, by="ann")
    run = linear_regression(one, two, **about)
    run.fit(1)
    Approvals(tmp_path).deny(waiting.plan, by="ann", why="they asked for too much")
    with pytest.raises(NotApprovedError, match="they asked for too much"):
        run.weights()
    with pytest.raises(NotApprovedError, match="they asked for too much"):
        linear_regression(one, two, **about)


async def opened(parties, kind, timeout=120):
    """A run that trains for as long as anybody waits. Of three parties two have columns, and the last one the key of an
    encrypted run; of four each has a column."""
    columns = [["a", "b"], ["c", "d", "e"]] if len(parties) == 3 else [[name] for name in "abcd"]
    owners = [
        Party(worker, "t", "id", names, label="y" if names is columns[-1] else None)
        for worker, names in zip(parties, columns, strict=False)
    ]
    if kind == "network":
        return await async_split_network(
            *owners, bottoms=[nn.Linear(len(names), 2) for names in columns], top=nn.Linear(2 * len(owners), 1),
            loss_fn=nn.MSELoss(), epochs=100_000, batch_size=1, timeout=timeout,
        )  # fmt: skip
    return await async_logistic_regression(
        *owners, key_holder=parties[2], allow_small_batches=True, timeout=timeout, **LONG, **SHORT
    )


@contextlib.contextmanager
def stopped(pid):
    send_signal(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        send_signal(pid, signal.SIGCONT)


async def hangs_and_dies(parties, place, pid):
    """What all others are told when the one at that place hangs in training, or before a run is opened, or dies; and
    that they go on."""
    who = parties[place].id
    kinds = ["paillier"] if place == 2 else ["paillier", "network"]
    runs = [await opened(parties, kind) for kind in kinds]
    fits = [asyncio.create_task(run.async_fit()) for run in runs]
    await under_way(*runs)
    with stopped(pid):
        openings = [opened(parties, kind, timeout=10) for kind in kinds]
        errors = await asyncio.gather(*fits, *openings, return_exceptions=True)
    for error in errors:
        with pytest.raises(JointError, match=f"'{who}' did not answer within (10|20) s"):
            raise error
    assert not any(run.is_open for run in runs)
    run = await opened(parties, kinds[-1])
    fit = asyncio.create_task(run.async_fit())
    await under_way(run)
    send_signal(pid, signal.SIGKILL)
    with pytest.raises(JointError, match=f"'{who}' is gone"):
        await fit
    assert not run.is_open
    assert (await async_table_columns(parties[place - 1], "t")).rows == 60


@pytest.mark.usefixtures("warm_workers")
def test_processes_that_hang_or_die_are_named_and_others_go_on():
    """Another one in each of three threesomes, all at the same time: that takes as long as one. Whoever waits for a
    party that waits for the silent one does not name that."""
    threes = [[f"{name}{number}" for name in ("alice", "bob", "carol")] for number in range(3)]

    async def all_at_once():
        parties = [[workers[id] for id in ids] for ids in threes]
        await asyncio.gather(
            *(hangs_and_dies(three, place, pids[three[place].id]) for place, three in enumerate(parties))
        )

    with worker_processes([id for ids in threes for id in ids]) as (workers, pids):
        asyncio.run(all_at_once())


@pytest.mark.usefixtures("warm_workers")
@pytest.mark.parametrize("count", [3, 4])
def test_whoever_is_stopped_at_any_time_of_training_is_the_one_that_is_named(count):
    """Of three parties one holds the key; of four each has a table. Who waits for whom when it stops is anybody's, and
    another one's in each of the runs that they train together."""
    ids = ["alice", "bob", "carol", "dave"][:count]
    draw = random.Random(count)

    async def named(who, parties, pid):
        runs = [await opened(parties, "paillier" if count == 3 else "network") for _ in range(2)]
        fits = [asyncio.create_task(run.async_fit()) for run in runs]
        await under_way(*runs)
        await asyncio.sleep(draw.uniform(0.0, 1.0))
        with stopped(pid):
            errors = await asyncio.gather(*fits, return_exceptions=True)
        for run, error in zip(runs, errors, strict=True):
            with pytest.raises(JointError, match=f"party '{who}' did not answer within (10|20) s"):
                raise error
            assert not run.is_open

    with worker_processes(ids) as (workers, pids):
        for who in draw.sample(ids, 2):
            asyncio.run(named(who, list(workers.values()), pids[who]))
