"""The examples in docstrings of what newcomers use first: each runs, on workers of both kinds."""

import ast
import asyncio
import inspect
import re
import textwrap
import types

import pytest
import torch
import torch.nn.functional as F

import planrt
from planrt.fl import Aggregation, RoundScheduler, TrainConfig, federated_avg
from planrt.plans import training
from planrt.plans.policy.rules import Policy, ReleaseRule
from planrt.plans.policy.verify import check
from planrt.plans.running.interpreter import Program, drive
from planrt.workers import BaseDataset


def examples(documented):
    """The indented blocks behind ``::`` in a docstring."""
    text = inspect.getdoc(documented)
    return [
        textwrap.dedent(found[1])
        for found in re.finditer(r"::\n\n((?:(?:    .*)?\n)+?)(?=\S|\Z)", f"{text}\n")
    ]


def run(code, names):
    """Runs a block, which may ``await`` at its top."""
    compiled = compile(code, "<example>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    done = types.FunctionType(compiled, names)()
    if inspect.iscoroutine(done):
        asyncio.run(done)


@pytest.fixture
def names(make_worker, tmp_path, monkeypatch):
    """What the examples take for granted: workers with data, a model, a few plans."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    data = BaseDataset(torch.randn(24, 4, generator=generator), torch.arange(24) % 3)
    torch.manual_seed(0)
    alice, bob, charlie = (make_worker(id, {"digits": data, "d": data}) for id in ("alice", "bob", "charlie"))
    add = [planrt.func2plan(args_shape=[(-1,)])(lambda x, n=n: x + n) for n in (1, 2, 3)]
    model = torch.nn.Linear(4, 3)
    mean = planrt.func2plan(args_shape=[(30, 2)])(lambda x: x.mean(0))
    graph = planrt.func2plan(args_shape=[(3,)])(lambda x: (x * x).sum()).graph
    return {
        "planrt": planrt, "torch": torch, "F": F, **vars(training), "alice": alice, "bob": bob, "charlie": charlie,
        "func2plan": planrt.func2plan, "Protocol": planrt.Protocol, "Step": planrt.Step, "load_plan": planrt.load_plan,
        "Policy": Policy, "ReleaseRule": ReleaseRule, "check": check, "Program": Program, "drive": drive,
        "TrainConfig": TrainConfig, "RoundScheduler": RoundScheduler, "federated_avg": federated_avg,
        "workers": [alice, bob, charlie], "model": model, "mean": mean, "graph": graph, "inputs": [torch.ones(3)],
        "config": TrainConfig(model, F.cross_entropy, batch_size=8), "state": [], "x": torch.zeros(2),
        "inc1": add[0], "inc2": add[1], "inc3": add[2], "local_update": add[0], "batches": list(data_batches()),
        "average": planrt.func2plan(args_shape=[(2,), (2,)])(lambda one, other: (one + other) / 2),
        "net": planrt.func2plan(args_shape=[(2,)])(lambda x: x * 2), "example_batch": next(iter(data_batches())),
        "trained_by_alice": torch.nn.Linear(4, 3), "trained_by_bob": torch.nn.Linear(4, 3),
        "one": torch.nn.Linear(4, 3), "other": torch.nn.Linear(4, 3),
    }  # fmt: skip


def data_batches():
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        yield torch.randn(8, 4, generator=generator), torch.arange(8) % 3


def on(worker, *values):
    return [torch.tensor(value).send(worker) for value in values]


def equal(value, *wanted):
    return torch.allclose(value, torch.tensor(wanted))


CASES = [
    (planrt.Plan, lambda names: names["pointer"].location is names["bob"]),
    (planrt.func2plan, lambda names: equal(names["result"], 5.0, 13.0)),
    (planrt.load_plan, lambda names: equal(names["again"](torch.ones(2)), 2.0, 2.0)),
    (planrt.Protocol, lambda names: equal(names["pointer"].get(), 6.0, 6.0)),
    (Policy, lambda names: names["report"].ok),
    (check, lambda names: not names["report"].ok and "#patients" in str(names["report"])),
    (Program, lambda names: names["counting"].counts == {"Tensor.mul": 1, "Tensor.sum": 1}),
    (training, lambda names: names["result"].samples == 24),
    (
        TrainConfig,
        lambda names: names["result"].samples == 48 and isinstance(names["model"], torch.nn.Linear),
    ),
    (RoundScheduler, lambda names: names["result"].round == 10),
    (federated_avg, lambda names: names["model"] is names["one"]),
    (Aggregation, lambda names: isinstance(names["scheduler"], RoundScheduler)),
]


@pytest.mark.parametrize(("documented", "then"), CASES, ids=[one.__name__ for one, _ in CASES])
def test_the_examples_of_a_docstring_run(documented, then, names):
    planrt.TorchHook(torch)
    names["x_on_bob"], names["center_on_bob"] = on(
        names["bob"], [[3.0, 4.0, 0.0], [5.0, 12.0, 0.0]], [0.0] * 3
    )
    if documented is planrt.Plan:
        (names["x_on_bob"],) = on(names["bob"], [[1.0, 2.0]] * 4)
    if documented is check:
        names["graph"] = planrt.func2plan(args_shape=[(30, 2)])(lambda x: x * 2).graph
    found = examples(documented)
    assert found
    for code in found:
        run(code, names)
    assert then(names)
