"""Whatever a client can have a worker compute is paid for, by its own user, and refused by name where nothing is left.

Each kind of message is in one of two lists here. For one that makes a worker compute there is a program of a user that
sends it: the budget goes down while it is handled, and if there is nothing left just then, the program is told so.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import get_args

import pytest
import torch
from torch import nn

import planrt
from planrt import Protocol
from planrt.errors import PlanrtError, PolicyError, PolicyRefusedError
from planrt.fl import RoundScheduler, TrainConfig
from planrt.loop import run as wait
from planrt.plans.policy import budgets
from planrt.plans.policy.budgets import Budgets, Purse
from planrt.plans.policy.rules import Policy
from planrt.vertical import (
    Party,
    intersection_size,
    linear_regression,
    logistic_regression,
    split_network,
)
from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.counting import work
from planrt.workers.machine.handling.posting import Posts
from planrt.workers.machine.handling.requests import Requests
from planrt.workers.serving.sum_keys import write_key
from planrt.workers.wire import messages as m
from tests.vertical.tables import SHORT, halves, whole

pytestmark = pytest.mark.filterwarnings("ignore:a key of 1024 bits")

planrt.TorchHook(torch)

NAMES = ("alice", "bob", "carol")


@planrt.func2plan()
def product(x, y):
    return x @ y


def loss_fn(target, pred):
    return ((pred - target) ** 2).mean()


# ---------------------------------------------------------------------------- what users write


def on_pointers(workers):
    alice, bob, _ = workers
    x = torch.ones(4, 4).send(alice)
    w = torch.ones(4, 4, requires_grad=True).send(alice)
    assert len(x[x > 0].get()) == 16
    (x @ w).sum().backward()
    assert w.grad.get().sum() == 64
    x.tag("#of-alice")
    assert alice.objects_count() > 1
    assert len(alice.search("#of-alice")) == 1
    assert wait(alice.async_list_objects(), instead="-")
    assert alice.status().objects > 1
    there = torch.ones(3).send(alice)
    assert there.move(bob).get().sum() == 3


def with_plans(workers):
    alice = workers[0]
    x = torch.ones(4, 4)
    product.build(x, x)
    there, here = product.send(alice), x.send(alice)
    assert there(here, here).get().sum() == 64
    assert there.copy()(here, here).get().sum() == 64
    assert wait(alice.async_run(product, x, x), instead="-").sum() == 64


def in_rounds(workers):
    alice = workers[0]
    config = TrainConfig(
        nn.Linear(3, 1), loss_fn, batch_size=10, example=(torch.ones(2, 3), torch.ones(2, 1))
    )
    config.send(alice)
    assert alice.fit("d").loss >= 0
    assert alice.evaluate("d").loss >= 0
    values = [m.OptimizerValue(0, "momentum_buffer", "tensor")]
    body = m.PutOptimizer(config.plans.training.hash, "d", "SGD", values)
    wait(alice.ask(m.Done, body, [torch.ones(1, 3)]), instead="-")


def in_secure_rounds(workers):
    model = nn.Linear(3, 1)
    config = TrainConfig(model, loss_fn, batch_size=10)
    scheduler = RoundScheduler(workers, config, dataset_key="d", seed=1, secure_aggregation=True)

    async def go():
        await scheduler.prepare()
        await scheduler.run_round(1, model.state_dict())

    asyncio.run(go())


def with_protocols(workers):
    alice, bob, _ = workers
    x = torch.ones(4, 4)
    product.build(x, x)
    protocol = Protocol([("first", product)]).deploy(bob)
    protocol.send(alice)
    assert protocol.run(x.send(alice), x.send(alice)).get().get().sum() == 64


def on_shares(workers):
    alice, bob, carol = workers
    x = torch.ones(4, 4).long().share(alice, bob, crypto_provider=carol)
    assert (x.mm(x) * x > 3).get().sum() == 16
    there = torch.ones(4, 4).long().send(alice).share(alice, bob, crypto_provider=carol)
    assert there.get().get().sum() == 16


def plans_on_shares(workers):
    x = torch.ones(4, 4).fix_precision()
    alice, bob, carol = workers
    x = x.share(alice, bob, crypto_provider=carol)
    product.build(torch.ones(4, 4), torch.ones(4, 4))
    assert product(x, x).get().float_precision().sum() == 64


def owners(workers):
    alice, bob, _ = workers
    return Party(alice, "t", "id", ["a", "b"]), Party(bob, "t", "who", ["c", "d", "e"], "y")


def with_tables_on_shares(workers):
    about = {
        "method": "shares",
        "crypto_provider": workers[2],
        "normalise": "casefold",
        "epochs": 1,
        "batch_size": 20,
    }
    with linear_regression(*owners(workers), **about) as run:
        run.fit()


def with_parts_of_networks(workers):
    net = {"bottoms": [nn.Linear(2, 2), nn.Linear(3, 2)], "top": nn.Linear(4, 1), "loss_fn": nn.MSELoss()}
    with split_network(*owners(workers), normalise="casefold", batch_size=20, epochs=1, **net) as run:
        run.fit()
        assert run.evaluate().people == 40


def with_tables(workers):
    carol = workers[2]
    left, right = owners(workers)
    assert intersection_size(left, right, normalise="casefold") == 40
    with logistic_regression(
        left, right, key_holder=carol, normalise="casefold", epochs=1, batch_size=20, **SHORT
    ) as run:
        run.fit()
        assert run.evaluate().people == 40


PROGRAMS = {
    on_pointers: (m.Put, m.Post, m.Call, m.Backward, m.Fetch, m.Search, m.ListObjects, m.AskStatus, m.Move),
    with_plans: (m.StorePlan, m.PutPlan, m.RunPlan),
    in_rounds: (m.Fit, m.Evaluate, m.PutOptimizer),
    in_secure_rounds: (m.JoinSum, m.ShareSecrets, m.FitMasked, m.SignSurvivors, m.RevealShares),
    with_protocols: (m.StoreProtocol, m.RunProtocol),
    on_shares: (m.PutShare, m.ShareOut, m.Deal),
    plans_on_shares: (m.Post,),
    with_tables: (m.OpenJoint, m.WorkJoint),
    with_tables_on_shares: (m.WorkJoint,),
    with_parts_of_networks: (m.WorkJoint,),
}
"""A program of a user -> the kinds of messages that it has workers compute by."""

ANSWERS = {
    m.Challenge, m.Welcome, m.Done, m.Failure, m.WorkerStatus, m.Approval, m.Values, m.Fitted, m.Evaluated,
    m.OptimizerState, m.SumKeys, m.SecretsShared, m.Masked, m.SurvivorsSigned, m.Revealed, m.Made, m.Fetched,
    m.Gradients, m.Found, m.Listed, m.Counted, m.FetchedPointer, m.Lent, m.Ticket, m.FetchedPlan, m.FetchedProtocol,
    m.RunStates, m.Needs, m.FetchedShare, m.GroupTraffic, m.TableColumns, m.JointDone, m.Waits,
}  # fmt: skip
ELSEWHERE = {
    m.Claim: "between processes of a worker a copy: see tests/workers/test_isolated_limits.py",
    m.Lend: "what another process of the worker says: who asked for it pays for it there",
    m.Opening: "paid for with the program that opens it",
    m.Corrections: "paid for with the program that needs them",
    m.Parcel: "paid for with the step that takes it: `WorkJoint`",
}
LITTLE = {
    m.Hello, m.Prove, m.Ack, m.Bye, m.AskApproval, m.ReadOptimizer, m.Resume, m.Describe, m.Remove, m.Clear,
    m.CountObjects, m.PutPointer, m.HandOver, m.Delegate, m.ActFor, m.ReadPlan, m.DeployProtocol, m.CancelRun,
    m.ReadRun, m.MakeGroup, m.MakeDealer, m.GiveSeed, m.JoinGroup, m.AskNeeds, m.AskGroup, m.FailGroup, m.EndGroup,
    m.ReadTraffic, m.ReadTable, m.JoinJoint, m.AskJoint, m.FailJoint, m.EndJoint,
}  # fmt: skip
"""What is looked up, noted, freed or ended: it takes no more the more is asked for."""

PAID = [(program, kind) for program, kinds in PROGRAMS.items() for kind in kinds]


def test_every_kind_of_message_is_in_a_list():
    computing = {kind for _, kind in PAID}
    everything = set(get_args(m.Body))
    assert computing | ANSWERS | ELSEWHERE.keys() | LITTLE == everything
    assert len(computing) + len(ANSWERS) + len(ELSEWHERE) + len(LITTLE) == len(everything)


class Meter:
    """How much is spent while messages of a kind are handled; there is nothing to be spent then, if it says so."""

    def __init__(self, monkeypatch):
        self.spent, self.kind, self.empty = {}, None, False
        monkeypatch.setattr(budgets, "now", lambda: 1_000.0)  # nothing comes in
        advance, take = Requests.advance, Posts.take

        def advanced(requests, request, sent):
            with self._measured(requests._store, type(request.body)):
                return advance(requests, request, sent)

        def taken(posts, session, event, over):
            with self._measured(posts._parts.store, type(event.envelope.body)):
                return take(posts, session, event, over)

        monkeypatch.setattr(Requests, "advance", advanced)
        monkeypatch.setattr(Posts, "take", taken)

    @contextlib.contextmanager
    def _measured(self, store, kind):
        purses = {id(one): one._purse for one in list(store._accounts.values())}.values()
        before = sum(purse.used for purse in purses)
        empty = self.empty and kind is self.kind
        if empty:
            kept = [self._emptied(purse) for purse in purses]
        try:
            yield
        finally:
            if empty:
                for purse, left, bucket, inside in kept:
                    purse._left, bucket._left = left, inside
        self.spent[kind] = self.spent.get(kind, 0) + sum(purse.used for purse in purses) - before

    @staticmethod
    def _emptied(purse):
        bucket = purse._draw.__self__._users.of(purse._whose)
        kept = purse, purse._left, bucket, bucket._left
        purse._left, bucket._left = 0, 0.0
        return kept


@pytest.fixture
def start(transport, tmp_path):
    """``start()`` -> alice, bob and carol, whose owners let nobody compute for ever."""
    keys = {name: write_key(tmp_path / f"{name}.pem") for name in NAMES}
    tables = dict(zip(NAMES, (*halves(whole()), None), strict=True))
    with contextlib.ExitStack() as stack:

        def made(name, **limits):
            options = {
                "policy": Policy(approval="open", **{"max_session_flops": 10**15, **limits}),
                "sum_key": tmp_path / f"{name}.pem",
                "sum_peers": keys,
            }
            data = {"d": BaseDataset(torch.ones(40, 3), torch.ones(40, 1)), "t": tables[name]}
            data = {key: one for key, one in data.items() if one is not None}
            if transport == "memory":
                return stack.enter_context(VirtualWorker(name, datasets=data, auto_add=False, **options))
            server = WebsocketServerWorker(name, threads=1, **options)
            for key, one in data.items():
                server.add_dataset(one, key)
            uri = stack.enter_context(server.running())
            return stack.enter_context(WebsocketClientWorker(name, uri=uri, auto_add=False))

        yield lambda **limits: [made(name, **limits) for name in NAMES]


@pytest.mark.parametrize(
    ("program", "kind"), PAID, ids=[f"{program.__name__}-{kind.__name__}" for program, kind in PAID]
)
def test_it_is_paid_for_and_refused_by_name_where_nothing_is_left(start, monkeypatch, program, kind):
    meter = Meter(monkeypatch)
    program(start())
    assert meter.spent[kind] > 0
    meter.kind, meter.empty = kind, True
    with pytest.raises(PlanrtError) as refused:
        program(start())
    told = []
    error = refused.value
    for _ in range(5):
        told.append(str(error))
        error = error and (error.__cause__ or error.__context__)
    assert "[max_session_flops] its computation is" in " ".join(told)


def test_the_parts_of_a_network_keep_the_owners_rules(start):
    net = {"bottoms": [nn.Linear(2, 2), nn.Linear(3, 2)], "top": nn.Linear(4, 1), "loss_fn": nn.MSELoss()}
    with (
        split_network(*owners(start(max_flops=100)), normalise="casefold", epochs=1, **net) as run,
        pytest.raises(PolicyRefusedError, match=r"breaks the policy: .*max_flops"),
    ):
        run.fit()


def test_a_program_that_is_refused_once_it_was_looked_at_takes_all_that_is_left():
    of = Budgets(1_000, None)
    purse = Purse("ann", 1_000, None, of.draw)
    purse.spend("an op", 100)
    with pytest.raises(PolicyError, match="max_session_flops"):
        purse.spend("an op", 2_000)
    purse.spend("an op", 100)
    with pytest.raises(PolicyError, match="max_session_flops"):
        purse.spend("mm on shares", 2_000, seen=True)
    with pytest.raises(PolicyError, match="max_session_flops"):
        purse.spend("an op", 10)


def test_figures_of_large_numbers_are_of_the_right_size():
    assert 9e6 < work.power(2048, 2048) < 11e6
    assert work.encryption(2048) == work.power(4096, 2048)
    assert work.decryption(2048) < work.encryption(2048) / 3
    assert 1e5 < work.CURVE < 2e5
