"""`planrt.send`, `get` and `move`: the methods as functions, on both transports."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import planrt
from planrt.errors import LocalError
from planrt.workers.pointers.plan import PointerPlan


def test_tensors_go_move_and_come_back(alice, bob):
    x = planrt.send(torch.arange(3.0), bob)
    assert x.location is bob
    assert planrt.move(x, alice) is x
    assert x.location is alice
    assert planrt.get(x * 2).tolist() == [0, 2, 4]
    both = planrt.send(torch.ones(2), alice, bob)
    assert [value.tolist() for value in planrt.get(both + both)] == [[2, 2], [2, 2]]
    kept = planrt.send(torch.ones(2).tag("#kept"), bob, garbage_collection=False)
    assert not kept.garbage_collection
    planrt.get(kept)


def test_modules_go_in_place(alice, bob):
    net = torch.nn.Linear(2, 1)
    weight = net.weight
    before = weight.detach().clone()
    assert planrt.send(net, bob) is net
    assert planrt.move(net, alice) is net
    assert planrt.get(net) is net
    assert net.weight is weight
    assert torch.equal(weight, before)


def test_plans_and_protocols(alice, bob):
    plan = planrt.func2plan(args_shape=[(-1,)])(lambda x: x + 1)
    there = planrt.send(plan, bob, purpose="a try")
    assert isinstance(there, PointerPlan)
    assert planrt.get(there(planrt.send(torch.ones(2), bob))).tolist() == [2, 2]
    assert planrt.get(there).hash == plan.hash
    chained = planrt.Protocol([("bob", plan), ("alice", plan)])
    assert planrt.get(planrt.send(chained, alice)).places == ("bob", "alice")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bob: planrt.send(3, bob), "send takes a tensor, a module, a plan or a protocol, not int"),
        (lambda bob: planrt.send(torch.nn.Linear, bob), "not the class Linear: write planrt.send"),
        (lambda bob: planrt.send(bob, torch.ones(1)), "not [A-Za-z]*Worker: write planrt.send.x, worker."),
        (lambda bob: planrt.send(torch.ones(1)), "send to whom"),
        (lambda bob: planrt.send(torch.ones(1), "bob"), "send takes workers, not str"),
        (
            lambda bob: planrt.get({"a": 1}.keys()),
            "get takes a pointer, or a module that was sent, not dict_keys",
        ),
        (lambda bob: planrt.get(torch.ones(1)), "this tensor is here"),
        (lambda bob: planrt.get(bob), "get takes a pointer"),
        (lambda bob: planrt.move(3, bob), "move takes a pointer"),
        (lambda bob: planrt.move(torch.ones(1), bob), "this tensor is here"),
    ],
)
def test_wrong_use_says_what_to_write(bob, call, message):
    with pytest.raises(LocalError, match=message):
        call(bob)


def test_no_hook_has_to_be_made_first():
    code = (
        "import torch, planrt; bob = planrt.VirtualWorker('bob'); "
        "print(planrt.get(planrt.send(torch.ones(2), bob)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("[1.0, 1.0]\n", "")
