"""Limits of a policy hold for backward passes, copies of plans, moves and whole rounds, on either transport.

Each is an attack: what a client would do who keeps every single op within the limits.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planrt
from planrt.errors import PolicyRefusedError
from planrt.fl import TrainConfig
from planrt.loop import run
from planrt.plans.analysis.tracker import Tracker
from planrt.plans.optimizer_options import OPTIMIZERS, work_of
from planrt.plans.policy.passes import cost_of
from planrt.plans.policy.rules import Policy
from planrt.workers import BaseDataset
from planrt.workers.machine.rounds.batches import as_batches, iterate, number_of_batches

# Inside out: what a pass takes


def _mlp():
    return nn.Sequential(nn.Linear(100, 200), nn.Tanh(), nn.Linear(200, 50))(torch.ones(64, 100)).sum()


def _convolutions():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3, groups=2))
    return model(torch.ones(4, 3, 32, 32, requires_grad=True)).sum()


def _leaf(*shape):
    return torch.ones(*shape, requires_grad=True)


PROGRAMS = {
    "linear layers": _mlp,
    "convolutions": _convolutions,
    "a transposed one": lambda: nn.ConvTranspose2d(6, 16, 3)(_leaf(4, 6, 12, 12)).sum(),
    "recurrent": lambda: nn.LSTM(10, 20, 2)(_leaf(7, 4, 10))[0].sum(),
    "gru": lambda: nn.GRU(10, 20, 2)(_leaf(7, 4, 10))[0].sum(),
    "attention": lambda: nn.TransformerEncoderLayer(32, 4, dropout=0.0)(_leaf(9, 5, 32)).sum(),
    "its kernel": lambda: F.scaled_dot_product_attention(*[_leaf(2, 4, 50, 16)] * 3).sum(),
    "slices": lambda: sum((_leaf(1000)[i] for i in range(10)), torch.zeros(())),
    "slices of one": lambda: sum(one[3:] for one in [_leaf(1000)] * 10).sum(),
    "expanded": lambda: _leaf(1).expand(2**20).sum(),
    "norms": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.GELU(), nn.LayerNorm(8))(_leaf(4, 4, 8, 8)).sum(),
    "embedding": lambda: nn.Embedding(1000, 16)(torch.ones(10, dtype=torch.long)).sum(),
    "einsum": lambda: torch.einsum("bij,bjk->bik", _leaf(3, 4, 5), _leaf(3, 5, 6)).sum(),
    "addbmm": lambda: torch.addbmm(torch.ones(4, 6), _leaf(3, 4, 5), _leaf(3, 5, 6)).sum(),
    "matrix and vector": lambda: (_leaf(40, 50) @ _leaf(50)).sum(),
    "loss": lambda: F.cross_entropy(_leaf(40, 50), torch.ones(40, dtype=torch.long)),
    "inverse": lambda: torch.linalg.inv(_leaf(40, 40)).sum(),
    "solve": lambda: torch.linalg.solve(_leaf(40, 40), _leaf(40, 30)).sum(),
    "distances": lambda: torch.cdist(_leaf(40, 30), _leaf(50, 30)).sum(),
    "bilinear": lambda: nn.Bilinear(10, 20, 30)(_leaf(7, 10), _leaf(7, 20)).sum(),
    "written in place": lambda: _leaf(50, 60).mul(2).add_(1).t().relu_().sum(),
    "a gradient of one": lambda: (
        torch.autograd.grad((_leaf(9, 9) @ (w := _leaf(9, 9))).tanh().sum(), w, create_graph=True)[0] ** 2
    ).sum(),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_pass_takes_about_what_is_told_before(name, create_graph):
    """Kernels are counted as they run, on tensors without values; nothing is seen of what they keep to themselves."""
    with torch.device("meta"):
        loss = PROGRAMS[name]()
    told = cost_of([loss], create_graph=create_graph)
    with Tracker() as tracker:
        loss.backward(create_graph=create_graph)
    assert tracker.flops <= 3 * told.flops
    assert tracker.peak <= 1.1 * told.peak + 100


def test_only_what_leads_to_the_inputs_counts():
    x, w = _leaf(100, 100), _leaf(100, 100)
    cheap = x[0] * 2
    loss = (x @ w @ w).sum() + cheap.sum()
    assert cost_of([loss], [cheap]).flops < 1_000
    assert cost_of([loss]).flops > 4 * 10**6
    assert cost_of([torch.ones(3)]).flops == 0


@pytest.mark.parametrize("items", [0, 1, 7, 12])
def test_batches_are_counted_as_they_come(items):
    source = as_batches(torch.utils.data.TensorDataset(torch.zeros(items, 2), torch.zeros(items)))
    for options in (
        {"batch_size": 4}, {"batch_size": 4, "drop_last": True}, {"batch_size": 5, "epochs": 3},
        {"batch_size": 4, "epochs": 2, "max_nr_batches": 3}, {"batch_size": 4, "max_nr_batches": 0},
    ):  # fmt: skip
        batches = iterate(source, shuffle=False, seed=0, **options)
        assert number_of_batches(items, **options) == len(list(batches)), options


def _counted(name, options, batches=3):
    """How often an optimizer computes a loss, and how many numbers it keeps for each parameter."""
    parameter, count = torch.ones(20, 30, requires_grad=True), 0
    optimizer = OPTIMIZERS[name]([parameter], **options)

    def closure():
        nonlocal count
        count += 1
        optimizer.zero_grad()
        loss = (parameter**4).sum() + parameter.sin().sum()
        loss.backward()
        return loss

    for _ in range(batches):
        optimizer.step(closure)

    def entries(state):
        if isinstance(state, torch.Tensor):
            return state.numel() if state.numel() > 1 else 0
        values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
        return sum(map(entries, values))

    return count, entries(dict(optimizer.state)[parameter]) / parameter.numel()


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"SparseAdam", "LBFGS"}))
def test_optimizers_take_no_more_than_is_told(name):
    options = {"amsgrad": True} if name in ("Adam", "AdamW") else {}
    options |= {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    passes, kept = _counted(name, options)
    told = work_of(name, options, 3)
    assert passes <= told[0]
    assert kept <= told[1]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"max_iter": 1}, {"max_iter": 50, "history_size": 3}, {"line_search_fn": "strong_wolfe"},
        {"max_iter": 30, "max_eval": 2, "line_search_fn": "strong_wolfe"}, {"max_iter": 0},
    ],
)  # fmt: skip
def test_lbfgs_takes_no_more_than_is_told(options):
    passes, kept = _counted("LBFGS", options)
    told = work_of("LBFGS", options, 3)
    assert passes <= told[0]
    assert kept <= told[1]


# From the outside in


def refused(rule, what):
    return pytest.raises(PolicyRefusedError, match=rf"{what}.* breaks the policy: \[{rule}\]")


def small(**keys):
    return Policy(approval="open", **keys)


def test_a_pass_over_many_ops_that_were_allowed_one_by_one(hospital):
    worker = hospital(small(max_flops=10**7))()
    w = torch.eye(100, requires_grad=True).send(worker)
    y = torch.ones(100, 100).send(worker)
    for _ in range(5):
        y = y @ w  # 2 MFLOP each, and twice that for their gradients
    loss = y.sum()
    loss.backward()
    with refused("max_flops", "Tensor.backward") as raised:
        worker.objects_count()
    assert raised.value.op == "Tensor.backward"
    assert loss.get().item() == 10_000.0  # the worker goes on
    assert w.grad is None  # and nothing was left half done
    (w * 2).sum().backward()
    assert w.grad.get().unique().tolist() == [2.0]


def test_a_pass_by_autograd_grad(hospital):
    worker = hospital(small(max_flops=10**7))()
    x = torch.eye(100, requires_grad=True).send(worker)
    y = x @ x @ x @ x
    with refused("max_flops", "autograd.grad"):
        torch.autograd.grad(y.sum(), x)[0].get()
    (g,) = torch.autograd.grad((x @ x).sum(), x)
    assert g.get()[0, 0].item() == 2.0


def test_slices_whose_gradients_are_as_large_as_what_they_are_of(hospital):
    """A slice takes nothing; its gradient has room for everything."""
    worker = hospital(small(max_flops=10**6))()
    x = torch.ones(100_000, requires_grad=True).send(worker)
    total = x[0]
    for index in range(1, 20):
        total = total + x[index]
    total.backward()
    with refused("max_flops", "Tensor.backward"):
        worker.objects_count()


def test_what_was_expanded_takes_nothing_and_its_gradient_does(hospital):
    worker = hospital(small(max_memory=2**20, max_flops=None))()
    x = torch.ones(1, requires_grad=True).send(worker)
    parts = [x.expand(100_000) for _ in range(3)]
    assert parts[0][0].get().item() == 1.0
    (parts[0] + parts[1]).backward(torch.ones(1).send(worker).expand(100_000))
    with refused("max_memory", "Tensor.backward"):
        worker.objects_count()


def test_graphs_of_graphs_count_for_all_that_they_keep(hospital):
    """Passes with create_graph=True, one over the other: each longer than the one before."""
    worker = hospital(small(max_flops=2 * 10**5, max_memory=10**7))()
    x = torch.ones(1_000, requires_grad=True).send(worker)
    y = torch.exp(torch.sin(x))

    def again(y):
        for _ in range(12):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            y[0].detach().get()

    with refused("max_flops", "autograd.grad"):
        again(y)
    assert x.get().sum().item() == 1_000.0


def test_a_retained_graph_is_looked_at_each_time(hospital):
    worker = hospital(small(max_memory=100_000, max_flops=None))()
    x = torch.ones(1_000, requires_grad=True).send(worker)
    loss = (x * 2).sum()
    for _ in range(3):
        loss.backward(retain_graph=True)
    many = x
    for _ in range(20):
        many = many * x
    many.sum().backward(create_graph=True, retain_graph=True)
    with refused("max_memory", "Tensor.backward"):
        worker.objects_count()
    assert x.get().grad[0].item() == 6.0


@pytest.mark.filterwarnings("ignore::planrt.errors.PlanWarning")
def test_a_plan_is_not_copied_beyond_the_limits(hospital):
    worker = hospital(small(max_memory=60_000, max_session_memory=100_000))()
    x = torch.ones(1, 100).send(worker)

    def sent(rows):
        weight = torch.ones(rows, 100)
        return planrt.func2plan(args_shape=[(1, 100)])(lambda x: F.linear(x, weight)).send(worker)

    large = sent(100)
    result = large.copy()(x)
    with pytest.raises(PolicyRefusedError, match=r"a copy breaks the policy: \[max_memory\]"):
        result.get()
    del large, result
    plan = sent(50)
    copies = [plan.copy() for _ in range(9)]  # 20,000 bytes each
    assert copies[0](x).get().shape == (1, 50)
    with pytest.raises(PolicyRefusedError, match=r"\[max_session_memory\]"):
        copies[-1](x).get()


def test_a_move_takes_no_more_along_than_a_fetch(hospital, make_worker):
    worker, other = hospital(small(max_output_bytes=1_000))(), make_worker("other")
    x = torch.ones(500).send(worker)
    for one in (x, x[:1].expand(2**40)):
        with refused("max_output_bytes", "a move to another worker"):
            one.move(other)
    small_one = (x[:100] * 1).move(other)
    assert small_one.location is other
    assert small_one.get().sum().item() == 100.0


# Rounds


@pytest.fixture
def clinic(hospital):
    """``clinic(max_flops=...)`` -> a client of a worker that serves 40 rows."""
    data = BaseDataset(torch.randn(40, 30), torch.randint(0, 2, (40,)))
    return lambda **keys: hospital(small(**keys), datasets={"train": data})()


def fitted(worker, **options):
    TrainConfig(nn.Linear(30, 2), F.cross_entropy, batch_size=10, **options).send(worker)
    return worker.fit("train")


def test_batches_that_are_allowed_one_by_one(clinic):
    worker = clinic(max_flops=50_000)
    assert fitted(worker).batches == 4
    with refused("max_flops", "training") as raised:
        fitted(worker, epochs=100)
    assert "400 passes over batches of" in str(raised.value)
    with refused("max_flops", "training"):
        fitted(worker, epochs=2**40)
    assert fitted(worker, epochs=2**40, max_nr_batches=3).batches == 3


@pytest.mark.parametrize("options", [{"max_iter": 10**9}, {"max_iter": 1e300, "max_eval": 10**9}])
def test_an_optimizer_that_computes_again_and_again(clinic, options):
    worker = clinic(max_flops=10**6)
    with refused("max_flops", "training"):
        fitted(worker, optimizer="LBFGS", optimizer_args=options)
    assert fitted(worker, optimizer="LBFGS", optimizer_args={"max_iter": 2}).batches == 4


def test_an_optimizer_that_keeps_all_it_has_seen(clinic):
    worker = clinic(max_memory=10**5)
    with refused("max_memory", "training"):
        fitted(worker, optimizer="LBFGS", optimizer_args={"history_size": 10**9, "max_iter": 1000})
    assert fitted(worker, optimizer="Adam").batches == 4


@pytest.mark.parametrize("enough", [True, False])
def test_an_evaluation_of_many_batches(clinic, enough):
    worker, model = clinic(max_flops=20_000 if enough else 2_000), nn.Linear(30, 2)
    asked = TrainConfig(model, F.cross_entropy).evaluate(
        worker, model.state_dict(), dataset_key="train", batch_size=4, bins=2
    )
    with contextlib.nullcontext() if enough else refused("max_flops", "evaluating"):
        assert run(asked, instead="await it").samples == 40
