"""How much users may compute in an hour, on either transport: whatever computes is paid for, by its own user."""

from __future__ import annotations

import math

import pytest
import torch

import planrt
from planrt.errors import OptionError, PolicyError, PolicyRefusedError
from planrt.fl import TrainConfig
from planrt.plans.policy import budgets
from planrt.plans.policy.budgets import Budgets, Purse
from planrt.plans.policy.rules import Policy
from planrt.workers import BaseDataset
from tests.pointers.conftest import OWNER


class Clock:
    """The time, which goes on where a test says so."""

    def __init__(self):
        self.seconds = 1_000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(budgets, "now", made)
    return made


def computing(session=1_000_000, worker=None, **more):
    return Policy(approval="open", max_session_flops=session, max_worker_flops=worker, **more)


def used_up(what=".*", rule="max_session_flops"):
    return pytest.raises(
        PolicyRefusedError, match=rf"{what} breaks the policy: \[{rule}\] its computation is .* an hour"
    )


def spend_nearly_all(worker):
    """Nine tenths of a million operations."""
    x = torch.ones(100, 45).send(worker)
    y = torch.ones(45, 100).send(worker)
    assert (x @ y)[0, 0].get().item() == 45.0


def test_an_op_is_refused_once_its_user_has_computed_as_much_as_may_be(hospital, clock):
    connect = hospital(computing())
    first, second, other = connect(OWNER), connect(OWNER), connect()
    spend_nearly_all(first)
    x = torch.ones(50, 50).send(first)
    with used_up("Tensor.matmul"):
        (x @ x).get()
    assert (x + 1).sum().get().item() == 5_000.0  # less is there; nothing was lost
    with used_up("Tensor.matmul"):  # its other sessions have the same budget
        y = torch.ones(50, 50).send(second)
        (y @ y).get()
    z = torch.ones(50, 50).send(other)
    assert (z @ z).sum().get().item() == 125_000.0
    first.close()
    second.clear_objects()
    again = connect(OWNER)
    with used_up("Tensor.matmul"):  # nor has a new one another budget
        y = torch.ones(50, 50).send(again)
        (y @ y).get()
    clock.seconds += 1_800.0
    y = torch.ones(50, 50).send(again)
    assert (y @ y).sum().get().item() == 125_000.0


@planrt.func2plan()
def product(x, y):
    return x @ y


def loss_fn(target, pred):
    return ((pred - target) ** 2).mean()


def test_plans_are_paid_for(hospital, clock):
    connect = hospital(computing())
    worker = connect(OWNER)
    product.build(torch.ones(50, 50), torch.ones(50, 50))
    there, x = product.send(worker), torch.ones(50, 50).send(worker)
    for _ in range(3):  # of 250,000 each; what is sent and fetched counts, too
        assert there(x, x).get().shape == (50, 50)
    with used_up("plan 'product'"):
        there(x, x).get()
    other = connect()
    x = torch.ones(50, 50).send(other)
    assert product.send(other)(x, x)[0, 0].get().item() == 50.0


@pytest.mark.parametrize("what", ["training", "evaluating"])
def test_rounds_and_evaluations_are_paid_for(hospital, clock, what):
    data = BaseDataset(torch.ones(40, 30), torch.ones(40, 1))
    connect = hospital(computing(100_000), datasets={"k": data})
    worker, other = connect(OWNER), connect()

    def run(worker):
        config = TrainConfig(model=torch.nn.Linear(30, 1), loss_fn=loss_fn, batch_size=10)
        config.send(worker)
        if what == "training":
            return worker.fit("k").loss
        return worker.evaluate("k").loss

    with used_up(what) as refused:
        for _ in range(100):
            assert run(worker) >= 0
    assert "wait" in str(refused.value)
    assert run(other) >= 0
    clock.seconds += 3_600.0
    assert run(worker) >= 0


@pytest.mark.parametrize("way", ["backward", "grad"])
def test_backward_passes_are_paid_for(hospital, clock, way):
    connect = hospital(computing())
    worker = connect(OWNER)
    w = torch.ones(45, 45, requires_grad=True).send(worker)
    loss = (w @ w).sum()  # 182,250 operations, and its pass takes twice as many

    def go():
        if way == "backward":
            loss.backward(retain_graph=True)
            return w.grad.get()
        return torch.autograd.grad(loss, w, retain_graph=True)[0].get()

    with used_up("Tensor.backward" if way == "backward" else ".*autograd.grad"):
        for _ in range(4):
            go()
    assert (w[:1] + 1).sum().get().item() == 90.0  # the session goes on
    clock.seconds += 3_600.0
    assert go().shape == (45, 45)


def test_all_users_have_a_budget_together(hospital, clock):
    connect = hospital(computing(session=None, worker=1_000_000))
    first, second = connect(OWNER), connect()
    spend_nearly_all(first)
    x = torch.ones(50, 50).send(second)
    with used_up("Tensor.matmul", rule="max_worker_flops") as refused:
        (x @ x).get()
    assert " s," not in str(refused.value)  # how much others compute is not told
    clock.seconds += 3_600.0
    assert (x @ x).sum().get().item() == 125_000.0


def test_it_counts_where_nothing_else_is_limited(hospital, clock):
    worker = hospital(computing(max_flops=None, max_memory=None))()
    x = torch.ones(100, 100).send(worker)
    with used_up("Tensor.matmul") as refused:
        (x @ x).get()
    assert "it is more than an hour's" in str(refused.value)
    assert (x + 1).sum().get().item() == 20_000.0


def test_a_bucket_is_never_fuller_than_full(clock):
    of = Budgets(100, None)
    clock.seconds += 1e9
    assert of.draw("ann", 100, 100) == ("", 100)
    assert of.draw("ann", 1, 1) == ("max_session_flops", 36.0)
    clock.seconds += 36.0
    assert of.draw("ann", 1, 1) == ("", 1)
    assert of.draw("ben", 60, 70) == ("", 70)
    assert of.draw("ben", 25, 70) == ("", 30)
    assert of.draw("cy", 101, 101) == ("max_session_flops", math.inf)


def test_what_one_limit_refuses_is_not_taken_of_the_other(clock):
    of = Budgets(100, 50)
    assert of.draw("ann", 60, 60)[0] == "max_worker_flops"
    assert of.draw("ann", 50, 100) == ("", 50)
    assert of.draw("ben", 1, 1)[0] == "max_worker_flops"


def test_so_many_budgets_are_kept_track_of(clock, monkeypatch):
    monkeypatch.setattr(budgets, "MOST_USERS", 3)
    of = Budgets(100, None)
    for name, flops in (("a", 100), ("b", 10), ("c", 50), ("d", 1)):
        assert of.draw(name, flops, flops)[0] == ""
    assert set(of._users) == {"a", "c", "d"}
    assert of.draw("a", 1, 1)[0] == "max_session_flops"


def test_another_process_asks_seldom_and_loses_no_more_than_it_used(clock):
    of, asked = Budgets(10**9, None), []

    def draw(*args):
        asked.append(args)
        return of.draw(*args)

    purse = Purse("ann", 10**9, None, draw)
    for _ in range(20_000):
        purse.spend("an op", 1_000)
    assert len(asked) < 50
    assert 10**9 - of._users["ann"].left <= 20_000 * 1_000 + 10**6
    with pytest.raises(PolicyError, match="endless"):
        purse.spend("training", math.inf)


@pytest.mark.parametrize("value", [0, -5, 1.5, True, "many"])
@pytest.mark.parametrize("key", ["max_session_flops", "max_worker_flops"])
def test_limits_that_cannot_be(key, value, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(f"{key} = {value if not isinstance(value, str | bool) else repr(value).lower()}")
    with pytest.raises(
        OptionError, match=rf"policy .*policy.toml, line 1: {key} must be a whole number, at least 1"
    ):
        Policy.from_file(path)


def test_policies_say_them(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text('max_session_flops = "none"\nmax_worker_flops = 2_000_000')
    policy = Policy.from_file(path)
    assert "computation of a user, an hour: no limit" in str(policy)
    assert "computation of all users, an hour: at most 2 MFLOP" in str(policy)
