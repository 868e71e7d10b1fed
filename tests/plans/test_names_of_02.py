"""What scripts of PySyft 0.2 ask plans and protocols for, by the names it had there."""

from __future__ import annotations

import gc
import io

import pytest
import torch
from torch import nn

import planrt
from planrt.errors import OptionError, PlanFormatError

X = torch.tensor([[-1.0, 2.0]])


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


@pytest.fixture
def plan():
    torch.manual_seed(0)
    return planrt.Plan(nn.Linear(2, 2)).build(X).tag("#a").describe("a plan")


def test_readable_plan(plan, make_worker):
    assert plan.readable_plan == plan.code
    assert plan.send(make_worker("bob")).readable_plan == plan.code


def test_get_pointers_has_those_that_somebody_holds(plan, make_worker):
    bob, alice = make_worker("bob"), make_worker("alice")
    there, also = plan.send(bob), plan.send(alice)
    assert plan.get_pointers() == {"bob": there, "alice": also}
    del also
    gc.collect()
    assert plan.get_pointers() == {"bob": there}
    there.get()
    assert plan.get_pointers() == {}
    assert plan.copy().get_pointers() == {}


def test_plans_of_a_protocol():
    f = planrt.func2plan(args_shape=[(-1,)])(lambda x: x + 1)
    g = planrt.func2plan(args_shape=[(-1,)])(lambda x: x * 2)
    protocol = planrt.Protocol([("worker1", f), ("worker2", g), ("worker1", f)])
    assert protocol.plans == [("worker1", f), ("worker2", g), ("worker1", f)]


def test_a_plan_goes_through_a_file_that_is_open(plan, tmp_path):
    memory = io.BytesIO()
    plan.save(memory)
    plan.save(tmp_path / "p.plan")
    assert memory.getvalue() == (tmp_path / "p.plan").read_bytes()
    memory.seek(0)
    loaded = planrt.load_plan(memory)
    assert torch.equal(loaded(X), plan(X))
    assert (loaded.hash, loaded.tags, loaded.description) == (plan.hash, {"#a"}, "a plan")
    with open(tmp_path / "q.plan", "wb") as file:
        plan.save(file)
    with open(tmp_path / "q.plan", "rb") as file:
        assert planrt.load_plan(file).hash == plan.hash


def test_files_that_do_not_do(plan, tmp_path):
    closed = io.BytesIO()
    closed.close()
    with pytest.raises(OptionError, match="cannot save"):
        plan.save(closed)
    with pytest.raises(OptionError, match="binary mode"):
        plan.save(io.StringIO())
    with pytest.raises(OptionError, match="binary mode"):
        planrt.load_plan(io.StringIO("x"))
    with pytest.raises(PlanFormatError, match="not a plan file"):
        planrt.load_plan(io.BytesIO(b"x" * 100))
    with pytest.raises(OptionError, match="named by its path, not by int"):
        plan.save(5)
