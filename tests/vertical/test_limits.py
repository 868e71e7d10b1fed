"""What a client cannot do with joint runs: learn of few people, average noise away, or fill a worker."""

import asyncio
import contextlib

import pytest
import torch
from torch import nn

from planrt.errors import (
    AlignmentError,
    JointError,
    NotApprovedError,
    OptionError,
    PolicyRefusedError,
    RemoteError,
)
from planrt.loop import run as wait
from planrt.plans.policy.approvals import Approvals
from planrt.plans.policy.rules import Policy, ReleaseRule
from planrt.vertical import (
    Party,
    Table,
    async_intersection_size,
    async_linear_regression,
    async_split_network,
    async_table_columns,
    intersection_size,
    linear_regression,
    logistic_regression,
    split_network,
)
from planrt.vertical.opening import Plan
from planrt.vertical.runs import JointRun
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.wire import messages as m
from tests.processes import eventually
from tests.vertical.tables import SHORT, halves, parties, some, whole

pytestmark = pytest.mark.filterwarnings("ignore:a key of 1024 bits")


@pytest.fixture
def guarded(transport, tmp_path, make_worker):
    """(alice's party, bob's, carol's worker, opening -> the run): what leaves bob's table is of 20 people at least, and
    he approves what he is asked."""
    folder = tmp_path / "approvals"
    options = {"policy": Policy(approval="ask", release=(ReleaseRule("#t", 20),)), "approvals": folder}
    left, right = halves(whole())
    alice, carol = make_worker("alice", {"t": left}), make_worker("carol")

    def approved(opening):
        with pytest.raises(NotApprovedError, match="waits for the owner"):
            opening()
        for waiting in Approvals(folder).pending():
            Approvals(folder).approve(waiting.plan, by="ann")
        return opening()

    with contextlib.ExitStack() as stack:
        if transport == "memory":
            bob = stack.enter_context(VirtualWorker("bob", **options))
            bob.add_dataset(right, "t", tags=["#t"])
        else:
            server = WebsocketServerWorker("bob", threads=1, **options)
            server.add_dataset(right, "t", tags=["#t"])
            bob = stack.enter_context(WebsocketClientWorker("bob", uri=stack.enter_context(server.running())))
        yield (
            Party(alice, "t", "id", ["a", "b"]),
            Party(bob, "t", "who", ["c", "d", "e"], "y"),
            carol,
            approved,
        )


def test_release_rules_hold_for_all_that_a_run_tells(guarded):
    alice, bob, carol, approved = guarded
    about = {"key_holder": carol, "normalise": "casefold", "epochs": 1, **SHORT}

    def refused(what, opening):
        with pytest.raises(PolicyRefusedError, match=f"bob.*{what} of fewer than 20 people"):
            approved(opening)

    refused("a batch", lambda: logistic_regression(alice, bob, batch_size=10, **about))
    refused(  # the last batch of 30 and 10, and a network's batches of single rows
        "a batch", lambda: logistic_regression(alice, bob, batch_size=30, allow_small_batches=True, **about)
    )
    net = {"bottoms": [nn.Linear(2, 2), nn.Linear(3, 2)], "top": nn.Linear(4, 1), "loss_fn": nn.MSELoss()}
    refused("a batch", lambda: split_network(alice, bob, batch_size=1, normalise="casefold", **net))
    table = whole()
    few = Table(some(table, ["id", "a", "b"], range(10, 29)), "id")
    with VirtualWorker("few", datasets={"t": few}) as worker:
        ann = Party(worker, "t", "id", ["a", "b"])
        if bob.worker.link_address.startswith("memory"):  # a virtual worker is reached by virtual ones alone
            refused("an intersection", lambda: intersection_size(ann, bob, normalise="casefold"))
            refused("an intersection", lambda: logistic_regression(ann, bob, batch_size=19, **about))
    with approved(lambda: logistic_regression(alice, bob, batch_size=20, **about)) as run:
        run.fit()
        assert run.evaluate().people == 40
        assert len(run.predict(table["id"][12:32])) == 20
        with pytest.raises(PolicyRefusedError, match="predictions of fewer than 20 people"):
            run.predict([table["id"][20]] * 1000)
        assert len(run.predict(table["id"][12:32])) == 20, "what was refused has ended nothing"
    with approved(lambda: logistic_regression(alice, bob, batch_size=36, holdout=0.1, **about)) as run:
        with pytest.raises(PolicyRefusedError, match="figures of fewer than 20 people"):
            run.evaluate()
        assert len(run.fit()) == 1
    assert approved(lambda: intersection_size(alice, bob, normalise="casefold")) == 40


def test_predictions_are_for_one_person_at_all_parties(make_worker):
    """Or a client would put one party's part for somebody together with another one's for somebody else, and have
    weights that stay where they are. Whom the parties do not know costs nothing."""
    table = whole()
    alice, bob = parties(make_worker, table)
    with linear_regression(
        alice, bob, key_holder=make_worker("carol"), normalise="casefold", batch_size=20, epochs=2,
        weights_to_client=False, **SHORT,
    ) as run:  # fmt: skip
        run.fit(1)
        known, other, unknown = table["id"][20], table["id"][21], table["id"][3]
        first = run.predict([known, other])
        with pytest.raises(AlignmentError, match="person 1 of those asked for is not among"):
            run.predict([known, unknown])

        def told(*people):
            bodies = [m.WorkJoint(run.id, "predict", people=[[one]]) for one in people]
            return wait(run._each(m.JointDone, bodies), instead="-")

        with pytest.raises(AlignmentError, match="person 0 of those"):
            told(known, unknown, known)
        assert torch.equal(run.predict([known, other]), first)
        run.fit(1)
        with pytest.raises(JointError, match="were told different people"):
            told(known, other, known)
    with pytest.raises(JointError, match="has ended"):
        run.predict([known])


def test_noise_is_not_averaged_away(make_worker):
    table = whole()
    alice, bob = parties(make_worker, table)
    torch.manual_seed(0)
    with split_network(
        alice, bob, bottoms=[nn.Linear(2, 2), nn.Linear(3, 2)], top=nn.Linear(4, 1), loss_fn=nn.MSELoss(),
        normalise="casefold", noise=1.0, epochs=2,
    ) as run:  # fmt: skip
        one = table["id"][20]
        first = run.predict([one] * 50)
        assert torch.equal(first, first[:1].expand(50, 1))
        assert torch.equal(run.predict([table["id"][21], one])[1:], first[:1])
        assert run.evaluate() == run.evaluate()
        run.fit(1)
        assert not torch.equal(run.predict([one]), first[:1])


def test_one_client_does_not_take_all_runs_of_a_worker(transport):
    left, right = halves(whole())
    with contextlib.ExitStack() as stack:
        servers = {}
        for id, table in (("alice", left), ("bob", right)):
            servers[id] = WebsocketServerWorker(id, threads=1)
            servers[id].add_dataset(table, "t")
        uris = {id: stack.enter_context(server.running()) for id, server in servers.items()}

        def connected():
            workers = [
                stack.enter_context(WebsocketClientWorker(id, uri=uri, auto_add=False))
                for id, uri in uris.items()
            ]
            return [Party(worker, "t", ids) for worker, ids in zip(workers, ("id", "who"), strict=True)]

        greedy, other = connected(), connected()
        opens = [Plan(greedy, size_only=True).opens(None)[0] for _ in range(25)]
        alice = greedy[0].worker
        for one in opens[:20]:
            wait(alice.ask(m.Done, one), instead="-")
        with pytest.raises(RemoteError, match="20 joint runs of this client, its limit"):
            wait(alice.ask(m.Done, opens[20]), instead="-")
        assert intersection_size(*other, normalise="casefold") == 40
        alice.workplace.post(m.EndJoint(opens[0].joint))
        wait(alice.ask(m.Done, opens[21]), instead="-")
        state = servers["alice"]._state._parts.joint
        # What ends the other client's run comes over another connection.
        assert eventually(lambda: len(state._runs) == 20)
        alice.close()
        assert intersection_size(*other, normalise="casefold") == 40
        assert eventually(lambda: not state._runs.keys() & {one.joint for one in opens})


def test_runs_that_fail_leave_nothing_but_their_reasons(make_worker):
    alice, bob = parties(make_worker, whole())
    wrong = Party(bob.worker, "t", "who")
    kept = []
    for _ in range(30):
        joint = JointRun([alice.worker, bob.worker], Plan([alice, wrong], size_only=True).opens(None))
        wait(joint._each(m.Done, joint._opens), instead="-")
        wait(joint._step("join"), instead="-")
        with pytest.raises(RemoteError, match="epoch 7 is not the next one"):
            wait(alice.worker.ask(m.JointDone, m.WorkJoint(joint.id, "epoch", 7)), instead="-")
        with pytest.raises(RemoteError, match="epoch 7 is not the next one") as raised:
            wait(alice.worker.ask(m.JointDone, m.WorkJoint(joint.id, "align")), instead="-")
        assert (raised.value.kind, raised.value.cause) == ("JointFailedError", "JointError")
        kept.append(joint)
    with pytest.raises(RemoteError, match="has no joint run"):
        wait(alice.worker.ask(m.JointDone, m.WorkJoint(kept[0].id, "align")), instead="-")
    assert intersection_size(alice, bob, normalise="casefold") == 40


def test_what_runs_hold_counts_for_the_quota_of_their_user(tmp_path):
    left, right = halves(whole(20_000))
    server = WebsocketServerWorker("bob", threads=1, max_session_memory=10_000_000)
    server.add_dataset(right, "t")
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri, auto_add=False) as bob:
        alice = VirtualWorker("alice", auto_add=False)
        with alice:
            owners = [Party(alice, "t", "id", ["a"]), Party(bob, "t", "who", ["c", "d", "e"], label="y")]

            def opened():
                opening = Plan(owners).opens(
                    {0: None, 1: m.SplitTerms("", "", "", "", [0, 0], False, 2, 1, "SGD", {}, 0.0)},
                    label_owner=1,
                )[1]
                wait(bob.ask(m.Done, opening), instead="-")
                return opening.joint

            first = opened()
            with pytest.raises(PolicyRefusedError, match="max_session_memory"):
                opened()
            bob.workplace.post(m.EndJoint(first))
            opened()
    assert len(left) == 19_990


def test_runs_are_opened_from_coroutines(make_worker):
    alice, bob = parties(make_worker, whole())
    carol = make_worker("carol")

    async def all_of_it():
        ticks = 0

        async def ticking():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        clock = asyncio.create_task(ticking())
        assert (await async_table_columns(bob.worker, "t")).rows == 50
        assert await async_intersection_size(alice, bob, normalise="casefold") == 40
        about = {"normalise": "casefold", "epochs": 1, "batch_size": 20}
        async with await async_linear_regression(alice, bob, key_holder=carol, **about, **SHORT) as run:
            losses = await run.async_fit()
            weights = await run.async_weights()
        before = ticks
        async with await async_split_network(
            alice, bob, bottoms=[nn.Linear(2, 2), nn.Linear(3, 2)], top=nn.Linear(4, 1), loss_fn=nn.MSELoss(), **about
        ) as split:  # fmt: skip
            await split.async_fit()
            await split.async_get()
        clock.cancel()
        assert ticks > before > 0
        with pytest.raises(TypeError, match="bottom"):
            await async_split_network(alice, bob, bottom=[])
        with pytest.raises(OptionError, match="lr"):
            await async_linear_regression(alice, bob, key_holder=carol, lr=-1)
        with pytest.raises(JointError, match="has ended"):
            await run.async_weights()
        return losses, weights

    losses, weights = asyncio.run(all_of_it())
    with linear_regression(
        alice, bob, key_holder=carol, normalise="casefold", epochs=1, batch_size=20, **SHORT
    ) as run:
        assert run.fit() == losses
        assert run.weights() == weights
