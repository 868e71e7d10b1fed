"""A graph of eighty thousand ops ends no worker, whatever has looked at it: tried in a process of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import contextlib, warnings
import torch
import planrt
from planrt.plans.policy.rules import Policy
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker

planrt.TorchHook(torch)
policy = Policy(approval="open", max_check_seconds=300.0)

@planrt.func2plan(args_shape=[(1,)])
def longer(x):
    for _ in range(2_500):
        x = x + 1
    return x

with contextlib.ExitStack() as stack:
    if "{transport}" == "memory":
        worker = stack.enter_context(VirtualWorker("alice", policy=policy))
    else:
        uri = stack.enter_context(WebsocketServerWorker("alice", threads=1, policy=policy).running())
        worker = stack.enter_context(WebsocketClientWorker("alice", uri=uri))
    there = longer.send(worker)
    x = torch.ones(1, requires_grad=True).send(worker)
    y = x
    for _ in range(32):
        y = there(y)
    y.backward(retain_graph=True)
    print(x.get().grad.item())
    del x, y
    worker.objects_count()
    print((torch.ones(1).send(worker) + 1).get().item())
"""


@pytest.mark.parametrize("transport", ["memory", "websocket"])
def test_a_long_graph_that_was_looked_at_is_freed(transport):
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{transport}", transport)], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout.split()) == (0, ["1.0", "2.0"]), ran.stderr[-2_000:]
