"""Joint runs that are broken off: by a client who stops, an owner who changes their mind, or a process that hangs."""

import asyncio
import contextlib
import os
import random
import signal
import threading

import pytest
from torch import nn

from planrt.errors import JointError, NotApprovedError
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.plans.policy.approvals import Approvals
from planrt.plans.policy.rules import Policy
from planrt.vertical import Party, linear_regression, logistic_regression, split_network, table_columns
from planrt.workers import WebsocketClientWorker
from tests.vertical.tables import SHORT, halves, parties, whole

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
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run.fit()
    finally:
        timer.join()
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
        await asyncio.sleep(0.3)
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


def test_processes_that_hang_or_die_are_named_and_others_go_on(tmp_path):
    left, right = halves(whole())
    for name, table in (("left", left), ("right", right)):
        columns = {**table.ids, **{key: values.tolist() for key, values in table.columns.items()}}
        lines = [",".join(columns), *[",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    children = [
        ChildOptions("alice", 0, ("--dataset", str(tmp_path / "left.csv"), "--id-column", "id", "--threads", "1")),
        ChildOptions("bob", 0, ("--dataset", str(tmp_path / "right.csv"), "--id-column", "who", "--threads", "1")),
        ChildOptions("carol", 0, ("--empty", "--threads", "1")),
    ]  # fmt: skip
    with WorkerProcesses(children) as processes:
        ready = processes.wait_ready()
        workers = {id: WebsocketClientWorker(id, uri=ready[id].uri, auto_add=False) for id in ready}
        alice = Party(workers["alice"], "left", "id", ["a", "b"])
        bob = Party(workers["bob"], "right", "who", ["c", "d", "e"], label="y")

        def opened(network):
            if network:
                return split_network(
                    alice, bob, bottoms=[nn.Linear(2, 2), nn.Linear(3, 2)], top=nn.Linear(4, 1),
                    loss_fn=nn.MSELoss(), normalise="casefold", epochs=100_000, batch_size=1, timeout=2,
                )  # fmt: skip
            return logistic_regression(
                alice,
                bob,
                key_holder=workers["carol"],
                allow_small_batches=True,
                timeout=2,
                **LONG,
                **SHORT,
            )

        def struck(who, how, match, network=False):
            run = opened(network)
            run.fit(1)
            timer = threading.Timer(0.3, os.kill, (processes.pids[who], how))
            timer.start()
            with pytest.raises(JointError, match=match):
                run.fit()
            timer.join()
            assert not run.is_open
            if how == signal.SIGSTOP:
                os.kill(processes.pids[who], signal.SIGCONT)

        # Whoever waits for a party that waits for the silent one does not name that.
        for who, network in (("bob", True), ("carol", False)):
            struck(who, signal.SIGSTOP, f"party '{who}' did not answer within 2 s", network)
        for who in ("alice", "bob", "carol"):  # before it is opened: told, and a run can be opened later
            os.kill(processes.pids[who], signal.SIGSTOP)
            try:
                for network in (False, True) if who != "carol" else (False,):
                    with pytest.raises(JointError, match=f"'{who}' did not answer within 2 s"):
                        opened(network)
            finally:
                os.kill(processes.pids[who], signal.SIGCONT)
            opened(False).close()
        struck("carol", signal.SIGKILL, "'carol' is gone")
        struck("bob", signal.SIGKILL, "'bob' is gone", network=True)
        assert table_columns(workers["alice"], "left").rows == 50
        for one in workers.values():
            one.close()


def written(folder, name, columns):
    lines = [",".join(columns), *[",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]]
    path = folder / f"{name}.csv"
    path.write_text("\n".join(lines) + "\n")
    return ("--dataset", str(path), "--id-column", "id", "--threads", "1")


@contextlib.contextmanager
def stopped_after(pid, seconds):
    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGSTOP))
    timer.start()
    try:
        yield
    finally:
        timer.join()
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("count", [3, 4])
def test_whoever_is_stopped_at_any_time_of_training_is_the_one_that_is_named(tmp_path, count):
    """Of three parties one holds the key; of four each has a table. Who waits for whom when it stops is anybody's."""
    table = whole()
    owners = ["alice", "bob", "carol", "dave"][: 2 if count == 3 else 4]
    columns = dict(zip(owners, ("a", "b", "c", "d"), strict=False))
    options = {
        name: written(tmp_path, name, {key: list(map(str, table[key])) for key in ("id", columns[name], "y")})
        for name in owners
    }
    if count == 3:
        options["holder"] = ("--empty", "--threads", "1")
    draw = random.Random(count)
    with WorkerProcesses([ChildOptions(name, 0, given) for name, given in options.items()]) as processes:
        ready = processes.wait_ready()
        workers = {id: WebsocketClientWorker(id, uri=ready[id].uri, auto_add=False) for id in ready}
        parties = [
            Party(workers[name], name, "id", [columns[name]], label="y" if name == owners[-1] else None)
            for name in owners
        ]
        for _ in range(4):
            if count == 3:
                run = logistic_regression(
                    *parties,
                    key_holder=workers["holder"],
                    allow_small_batches=True,
                    timeout=2,
                    **LONG,
                    **SHORT,
                )
            else:
                run = split_network(
                    *parties, bottoms=[nn.Linear(1, 2) for _ in parties], top=nn.Linear(8, 1),
                    loss_fn=nn.MSELoss(), epochs=100_000, batch_size=1, timeout=2,
                )  # fmt: skip
            who = draw.choice(list(options))
            with (
                stopped_after(processes.pids[who], draw.uniform(0.0, 1.0)),
                pytest.raises(JointError, match=f"party '{who}' did not answer within [24] s"),
            ):
                run.fit()
            assert not run.is_open
        for one in workers.values():
            one.close()
