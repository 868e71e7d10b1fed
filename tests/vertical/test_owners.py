"""Owners of tables: served by processes of their own, asked before a run begins, and what happens when one is gone."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from planrt.errors import JointError, NotApprovedError, PolicyRefusedError, RemoteError
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.plans.policy.rules import Policy, ReleaseRule
from planrt.vertical import Party, intersection_size, linear_regression, logistic_regression, table_columns
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.joint import runs
from planrt.workers.wire import messages as m
from tests.vertical.served import waiting_less
from tests.vertical.tables import SHORT, halves, parties, whole
from tests.vertical.training import once_it_trains
from tests.watching import whole_lines

pytestmark = pytest.mark.filterwarnings("ignore:a key of 1024 bits")


def planrt(*command):
    done = subprocess.run(
        [sys.executable, "-m", "planrt", *command], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def served(tmp_path):
    """(alice's party, bob's, carol's worker, processes): tables in files, and bob wants to be asked."""
    table = whole()
    left, right = halves(table)
    for name, one in (("left", left), ("right", right)):
        columns = {**one.ids, **{key: values.tolist() for key, values in one.columns.items()}}
        rows = zip(*columns.values(), strict=True)
        lines = [",".join(columns), *[",".join(map(str, row)) for row in rows]]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "policy.toml").write_text(
        'approval = "ask"\n\n[[release]]\ntag = "#clients"\nmin_rows = 20\n'
    )
    asking = ("--policy", str(tmp_path / "policy.toml"), "--approvals", str(tmp_path / "approvals"))
    children = [
        ChildOptions("alice", 0, ("--dataset", str(tmp_path / "left.csv"), "--id-column", "id", "--threads", "1")),
        ChildOptions(
            "bob", 0,
            ("--dataset", str(tmp_path / "right.csv"), "--id-column", "who", "--label-column", "y", "--key", "clients",
             "--tag", "#clients", "--threads", "1", *asking),
        ),
        ChildOptions("carol", 0, ("--empty", "--threads", "1")),
    ]  # fmt: skip
    with WorkerProcesses(children) as processes:
        ready = processes.wait_ready()
        workers = [WebsocketClientWorker(id, uri=ready[id].uri, auto_add=False) for id in ready]
        alice, bob, carol = workers
        yield (
            Party(alice, "left", "id", ["a", "b"]),
            Party(bob, "clients", "who", ["c", "d", "e"], label="y"),
            carol,
            processes,
        )
        for one in workers:
            one.close()


def test_an_owner_is_asked_sees_the_run_and_a_party_that_dies_ends_it(served, tmp_path):
    alice, bob, carol, processes = served
    folder = ("--folder", str(tmp_path / "approvals"))
    run = {
        "key_holder": carol, "normalise": "casefold", "batch_size": 20, "epochs": 100_000, "lr": 0.001,
        "purpose": "who pays", **SHORT,
    }  # fmt: skip
    with pytest.raises(NotApprovedError, match="waits for the owner's approval"):
        logistic_regression(alice, bob, **run)
    waiting = planrt("pending", *folder)
    assert "called joint run(c, d, e)" in waiting
    assert "on clients, for: who pays" in waiting
    path = waiting.split("planrt inspect ")[1].split()[0]
    text = planrt("inspect", path)
    for said in (
        "joint run of alice at ws://", "with its table 'clients'", "columns computed with: c, d, e",
        "label column: y", "logistic regression", "learn how many rows the table has",
        "this worker's weights: True",
    ):  # fmt: skip
        assert said in text
    hash = os.path.basename(path).removesuffix(".joint")
    planrt("deny", hash, "--why", "not these columns", "--by", "ann", *folder)
    with pytest.raises(NotApprovedError, match="not these columns"):
        logistic_regression(alice, bob, **run)
    planrt("approve", hash, "--by", "ann", *folder)
    with pytest.raises(NotApprovedError, match="waits"):
        logistic_regression(alice, bob, **{**run, "lr": 0.002})  # another run than the one that was approved
    joint = logistic_regression(alice, bob, **run)
    assert joint.size == 40
    assert joint.fit(1)[0] == pytest.approx(0.6931, abs=1e-3)
    with (
        once_it_trains(joint, os.kill, processes.pids["alice"], signal.SIGKILL),
        pytest.raises(JointError, match="'alice' is gone"),
    ):
        joint.fit()
    assert not joint.is_open
    assert table_columns(bob.worker, "clients").rows == 50  # the others are there as before


@pytest.mark.parametrize(
    ("policy", "sizes", "match"),
    [
        (Policy(approval="open", intersection="size"), True, "the number of common people alone"),
        (Policy(approval="open", intersection="none"), False, "others may learn nothing"),
        (
            Policy(approval="open", release=(ReleaseRule("#t", 5),)),
            False,
            "release rules are about this table",
        ),
        (Policy(approval="list"), False, "not on the owner's list"),
    ],
)
def test_policies(policy, sizes, match):
    left, right = halves(whole())
    with (
        VirtualWorker("alice", datasets={"t": left}) as alice,
        VirtualWorker("carol") as carol,
        VirtualWorker("bob", policy=policy) as bob,
    ):
        bob.add_dataset(right, "t", tags=["#t"])
        one = Party(alice, "t", "id", ["a", "b"])
        two = Party(bob, "t", "who", ["c", "d", "e"], label="y")
        with pytest.raises((PolicyRefusedError, NotApprovedError), match=match):
            logistic_regression(one, two, key_holder=carol, normalise="casefold", batch_size=20, **SHORT)
        if sizes:
            assert intersection_size(one, two, normalise="casefold") == 40
        else:
            with pytest.raises((PolicyRefusedError, NotApprovedError), match=match):
                intersection_size(one, two, normalise="casefold")


def test_the_owners_log_tells_each_step(tmp_path):
    import json

    left, right = halves(whole())
    log = tmp_path / "audit.jsonl"
    carol = WebsocketServerWorker("carol", threads=1, audit=str(log))
    with VirtualWorker("alice", datasets={"t": left}), carol.running() as uri:
        servers = []
        for id, table in (("al", left), ("bo", right)):
            server = WebsocketServerWorker(id, threads=1)
            server.add_dataset(table, "t")
            servers.append(server)
        with servers[0].running() as first, servers[1].running() as second:
            al, bo, ca = [
                WebsocketClientWorker(id, uri=at)
                for id, at in (("al", first), ("bo", second), ("carol", uri))
            ]
            one = Party(al, "t", "id", ["a", "b"])
            two = Party(bo, "t", "who", ["c", "d", "e"], label="y")
            with linear_regression(
                one, two, key_holder=ca, normalise="casefold", batch_size=20, epochs=1, **SHORT
            ) as run:
                run.fit()
            for each in (al, bo, ca):
                each.close()
    events = [json.loads(line) for line in whole_lines(log)]
    joint = [one for one in events if one["event"] == "joint"]
    assert [one["request"] for one in joint if one["request"] != "decrypt"] == ["open", "align", "epoch"]
    decrypted = [(one["to"], one["rows"]) for one in joint if one["request"] == "decrypt"]
    assert decrypted == [("al", 1), ("bo", 2)] * 2  # batches of 20: the columns of one, and of the other


def test_strangers_and_parties_that_were_told_different_things(make_worker):
    alice, bob = parties(make_worker, whole())
    with linear_regression(
        alice, bob, key_holder=make_worker("carol"), normalise="casefold", batch_size=20, **SHORT
    ) as run:
        opens = run._opens

        def ask(kind, body, tensors=(), worker=alice.worker):
            from planrt.loop import run as wait

            return wait(worker.ask(kind, body, tensors), instead="-")

        with pytest.raises(RemoteError, match="known here already"):
            ask(m.Done, opens[0])
        with pytest.raises(RemoteError, match="no joint run"):
            ask(m.Done, m.JoinJoint(run.id, "0" * 32, 1, "0" * 64))
        with pytest.raises(RemoteError, match="is here already"):
            ask(m.Done, m.JoinJoint(run.id, opens[0].token, 1, "0" * 64))
        alice.worker.workplace.post(m.Parcel(run.id, 0, "outputs"), [torch.zeros(1)])
        with pytest.raises(RemoteError, match="came from none of its parties"):
            ask(m.Counted, m.CountObjects())
        with pytest.raises(RemoteError, match="no joint run 'other' here"):
            ask(m.JointDone, m.WorkJoint("other", "epoch"))
        run.fit(1)  # and none of that has disturbed it
        with pytest.raises(RemoteError, match="epoch 7 is not the next one: 1 of at most 10"):
            ask(m.JointDone, m.WorkJoint(run.id, "epoch", 7))
        with pytest.raises(JointError):
            run.fit(1)


def test_parties_that_normalise_differently_are_refused(make_worker):
    alice, bob = parties(make_worker, whole())
    from planrt.errors import AlignmentError
    from planrt.vertical.opening import Plan
    from planrt.vertical.runs import JointRun, begun

    plan = Plan([alice, bob], size_only=True)
    one, two = plan.opens(None)
    import msgspec

    opens = [one, msgspec.structs.replace(two, normalise="casefold")]
    with pytest.raises(AlignmentError, match="normalise ids alike"):
        begun(JointRun(plan.workers(), opens), "-")


@pytest.mark.parametrize(
    "change",
    [
        {"number": 5}, {"owners": 3}, {"dataset": ""}, {"ids": []}, {"columns": [1]}, {"label_owner": 2},
        {"label": "a"}, {"features": []}, {"size_only": True}, {"predictions_to": "zed"}, {"normalise": "soundex"},
        {"model": None, "size_only": True, "owners": 3},
    ],
)  # fmt: skip
def test_a_worker_looks_at_what_it_is_told(make_worker, change):
    import msgspec

    from planrt.loop import run as wait
    from planrt.vertical.opening import Plan

    alice, bob = parties(make_worker, whole())
    terms = m.LinearTerms("linear", 20, 1, 0.1, 0.0, 2048, 17)
    opened = Plan([alice, bob], make_worker("carol")).opens(terms, label_owner=1)[0]
    with pytest.raises(RemoteError, match=r"."):
        wait(alice.worker.ask(m.Done, msgspec.structs.replace(opened, **change)), instead="-")
    wait(alice.worker.ask(m.Done, opened), instead="-")


def test_a_party_that_says_nothing_is_not_awaited_for_ever(make_worker, monkeypatch):
    """Both have time to join the run; for what bob never sends alice waits 2 s."""
    monkeypatch.setattr(runs, "role_of", waiting_less(2.0, "align"))
    alice, bob = parties(make_worker, whole())
    from planrt.loop import run as wait
    from planrt.vertical.opening import Plan
    from planrt.vertical.runs import JointRun

    plan = Plan([alice, bob], size_only=True)
    joint = JointRun(plan.workers(), plan.opens(None))

    async def one_alone():
        await joint._each(m.Done, joint._opens)
        await joint._step("join")
        await joint._workers[0].ask(m.JointDone, m.WorkJoint(joint.id, "align"))

    with pytest.raises(RemoteError, match="party 'bob' did not answer within 2 s"):
        wait(one_alone(), instead="-")
