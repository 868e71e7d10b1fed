"""So many runs of a user may fail on data that it may not see, over all of its sessions, on either transport."""

from __future__ import annotations

import itertools
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planrt
from planrt.errors import OptionError, PolicyRefusedError, RemoteError, TransportError
from planrt.fl import TrainConfig
from planrt.plans.policy import budgets
from planrt.plans.policy.budgets import DAY, NOBODIES, Failures
from planrt.plans.policy.rules import Policy, ReleaseRule
from planrt.workers import BaseDataset, VirtualWorker
from tests.pointers.conftest import OWNER
from tests.pointers.test_budgets import Clock
from tests.watching import whole_lines

ROWS = 64
RULE = (ReleaseRule("#patients", min_rows=20),)


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(budgets, "now", made)
    return made


class Asks(nn.Module):
    """Fails where the first row of the data has a place that is none, and trains where not."""

    def __init__(self, above=0):
        super().__init__()
        self.linear, self.above = nn.Linear(3, 1), above

    def forward(self, x):
        torch.zeros(1).take((x[0, 0] > self.above).long())
        return self.linear(x).squeeze(1)


def patients():
    torch.manual_seed(3)
    values = torch.rand(ROWS, 3)
    values[0, 0] = 50.0
    return BaseDataset(values, values.sum(1))


def allowing(daily, a_session=None):
    return Policy(approval="open", release=RULE, max_failures=a_session, max_daily_failures=daily)


def fit(worker, above):
    model = Asks(above)
    TrainConfig(model=model, loss_fn=F.mse_loss, batch_size=ROWS, shuffle=False).send(worker)
    return worker.fit("patients").loss


def failing(worker):
    with pytest.raises(RemoteError, match="for the worker's owner only"):
        fit(worker, 0)


def no_more():
    return pytest.raises(
        PolicyRefusedError, match=r"\[max_daily_failures\] nothing of yours runs on such data"
    )


@pytest.fixture
def patients_at(hospital):
    return lambda policy: hospital(policy, datasets={"patients": patients()}, tags=("#patients",))


def test_a_new_session_brings_no_more_failures(patients_at, clock, caplog):
    connect = patients_at(allowing(4, a_session=2))
    with caplog.at_level(logging.WARNING, logger="planrt.worker"):
        for _ in range(2):
            worker = connect()
            failing(worker)
            failing(worker)
            with pytest.raises(TransportError):  # as `max_failures` says
                worker.objects_count()
        worker = connect()
        with no_more():
            fit(worker, 0)
        with no_more():  # what would not fail says as much
            fit(worker, 100)
    (told,) = [one for one in caplog.records if one.getMessage() == "no_more_failures"]
    assert told.user == "nobody"
    assert (torch.ones(3).send(worker) * 2).get().tolist() == [2.0] * 3  # the rest of its work goes on
    assert fit(connect(OWNER), 100) > 0  # and so do others


def test_they_come_back_with_the_time(patients_at, clock):
    connect = patients_at(allowing(4))
    worker = connect()
    for _ in range(4):
        failing(worker)
    with pytest.raises(PolicyRefusedError, match="for the next 21,600 s"):  # six hours
        fit(worker, 0)
    clock.seconds += DAY / 4
    failing(worker)
    with no_more():
        fit(worker, 0)
    clock.seconds += DAY
    for _ in range(4):
        failing(worker)
    with no_more():
        fit(worker, 0)


def test_what_does_not_fail_takes_nothing(patients_at, clock):
    worker = patients_at(allowing(1))()
    for _ in range(5):
        assert fit(worker, 100) > 0
    failing(worker)
    with no_more():
        worker.evaluate("patients")


@planrt.func2plan(args_shape=[(-1, 3)])
def mean_if(x):
    torch.zeros(1).take((x[0, 0] > 0).long())
    return x.mean(0)


@planrt.func2plan(args_shape=[(-1, 3)])
def mean_of(x):
    return x.mean(0)


def test_plans_on_private_objects_are_counted_too(hospital, clock):
    connect = hospital(allowing(2))
    owner = connect(OWNER)
    patients().data.tag("#patients").send(owner, allowed_users=["owner"])
    owner.objects_count()
    for _ in range(2):
        worker = connect()
        (x,) = worker.search("#patients")
        there = mean_if.send(worker)
        with pytest.raises(RemoteError, match="is private, or was computed from private data"):
            there(x).get()
    worker = connect()
    (x,) = worker.search("#patients")
    for plan in (mean_if, mean_of):
        there = plan.send(worker)
        with no_more():
            there(x).get()
    (own,) = owner.search("#patients")
    assert torch.allclose(mean_of.send(owner)(own).get(), patients().data.mean(0))  # may see it


def test_the_owner_has_it_in_the_log(tmp_path, clock):
    path = tmp_path / "audit.jsonl"
    users = {"ann": "a token for ann of length"}
    with VirtualWorker("hospital", users=users, policy=allowing(1), audit=path) as worker:
        worker.add_dataset(patients(), "patients", tags=["#patients"])
        with worker.connect_as("a token for ann of length") as ann:
            failing(ann)
            with no_more():
                fit(ann, 0)
    lines = [json.loads(line) for line in whole_lines(path)]
    (used,) = [line for line in lines if line["event"] == "no_more_failures"]
    assert (used["user"], used["outcome"], used["rule"]) == ("ann", "refused", "max_daily_failures")
    refused = [line for line in lines if line["event"] == "fit" and line["outcome"] == "refused"]
    assert [line["rule"] for line in refused] == ["max_daily_failures"]
    assert "50.0" not in path.read_text()  # no value


# -------------------------------------------------------------------------------------- what is counted


def test_many_addresses_have_no_more_than_so_many_together(clock):
    counted = Failures(3)
    failures = 0
    for number in itertools.count():
        whose = f"nobody at 10.0.{number // 256}.{number % 256}"
        if counted.seconds(whose, nobody=True):
            break
        while not counted.seconds(whose, nobody=True):
            counted.add(whose, nobody=True)
            failures += 1
    assert failures == 3 * NOBODIES
    assert number == NOBODIES
    assert counted.seconds("nobody at 192.168.0.1", nobody=True) > 0
    assert counted.seconds("user ann", nobody=False) == 0.0  # the owner made her a user
    clock.seconds += DAY
    assert counted.seconds("nobody at 192.168.0.1", nobody=True) == 0.0


def test_what_runs_at_the_same_time_is_paid_for_later(clock):
    counted = Failures(3)
    for _ in range(1_000):
        counted.add("nobody at here", nobody=True)
    assert counted.seconds("nobody at there", nobody=True) == 0.0  # others lose no more than these three
    clock.seconds += DAY
    assert counted.seconds("nobody at here", nobody=True) > 0
    clock.seconds += DAY
    assert counted.seconds("nobody at here", nobody=True) == 0.0


def test_no_limit_is_none(clock):
    counted = Failures(None)
    assert {counted.add("user ann", nobody=False) for _ in range(1_000)} == {0.0}


def test_a_policy_with_it_is_another_one():
    assert Policy(max_daily_failures=7).version != Policy().version
    with pytest.raises(OptionError, match="max_daily_failure"):
        Policy.from_values({"max_daily_failure": 7})  # an unknown key
