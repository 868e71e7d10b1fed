"""Modes of a thread or process, and hooks: honoured, carried, or refused by name. `docs/modes.md` has the table."""

from __future__ import annotations

import asyncio
import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from nets import line_of
from torch import nn
from torch.nn.utils import parametrizations, prune

import planrt
from planrt.errors import LocalError, PlanError, PlanWarning, RemoteOpError, TraceError
from planrt.fl import RoundScheduler, TrainConfig

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 1])


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


# -------------------------------------------------------------------------------------------------- autocast


def test_autocast_in_a_recorded_function_or_around_it_is_refused():
    def inside(x):
        with autocast():
            return x @ x.T  # here

    with pytest.raises(TraceError, match=r"torch\.autocast cannot be recorded: use \.to") as caught:
        planrt.func2plan()(inside).build(X)
    assert caught.value.line == line_of(inside)
    with pytest.raises(TraceError, match=r"torch\.autocast"), autocast():
        planrt.func2plan()(lambda x: x @ x.T).build(X)


def test_autocast_that_is_off_is_no_matter():
    def f(x):
        with torch.autocast("cpu", enabled=False):
            return x @ x.T

    assert torch.equal(planrt.func2plan()(f).build(X)(X), X @ X.T)


def test_a_plan_computes_under_autocast_as_on_a_worker(make_worker):
    bob = make_worker("bob")
    plan = planrt.func2plan()(lambda x: x @ x.T).build(X)
    there = plan.send(bob)
    with autocast(), pytest.warns(PlanWarning, match=r"torch\.autocast has no part in plan") as caught:
        here, away = plan(X), there(X.send(bob)).get()
    assert here.dtype == away.dtype == torch.float32
    assert caught[0].filename == __file__


def test_ops_on_pointers_under_autocast_are_refused(make_worker):
    bob = make_worker("bob")
    x, model = X.send(bob), nn.LSTM(3, 2)
    model.send(bob)
    with autocast():
        for act in (lambda: x @ x, lambda: x + 1, lambda: model(x), lambda: nn.Linear(3, 2).send(bob)(x)):
            with pytest.raises(
                RemoteOpError, match=r"torch\.autocast does not reach workers.*\.to\(torch\.bfloat16\)"
            ):
                act()
        assert torch.equal(x.get(), X)


# ------------------------------------------------------------------------------------------ inference, grad mode


def test_inference_mode(make_worker):
    plan = planrt.func2plan()(lambda x: x * 2).build(X)
    bob = make_worker("bob")
    x = X.clone().requires_grad_().send(bob)
    with torch.inference_mode():
        with pytest.raises(TraceError, match=r"inference_mode cannot be recorded: use torch\.no_grad"):
            planrt.func2plan()(lambda x: x * 2).build(X)
        assert torch.equal(plan(X), X * 2)
        y = x * 2
        assert not y.requires_grad
        assert torch.equal(y.get(), X * 2)
    (x * 2).sum().backward()  # the same op, foreseen under inference_mode before
    assert torch.equal(x.grad.get(), torch.full((4, 3), 2.0))


# --------------------------------------------------------------------------------------------- default dtype


def test_the_default_dtype_is_written_into_a_plan():
    with default_dtype(torch.float64):
        plan = planrt.func2plan()(lambda x: x + torch.ones(3) + torch.arange(3.0)).build(X.double())
        want = plan(X.double())
    assert want.dtype == torch.float64
    got = plan(X.double())
    assert torch.equal(got, want)
    assert got.dtype == torch.float64


def test_a_result_that_follows_the_default_dtype_is_refused():
    ints = torch.arange(4)
    with default_dtype(torch.float64):
        with pytest.raises(TraceError, match=r"set_default_dtype\(torch\.float64\).*x\.to\(torch\.float64\)"):
            planrt.func2plan()(lambda x: x / 2).build(ints)
        plan = planrt.func2plan()(lambda x: x.to(torch.float64) / 2).build(ints)
    assert torch.equal(plan(ints), ints.double() / 2)


def test_a_plan_of_the_usual_default_is_refused_under_another():
    plan = planrt.func2plan()(lambda x: x + torch.ones(3)).build(X)
    ids = planrt.func2plan()(lambda x: x + torch.arange(3)).build(X)
    with default_dtype(torch.float64):
        with pytest.raises(PlanError, match=r"torch\.ones in it would give torch\.float64"):
            plan(X)
        assert ids(X).dtype == torch.float32
    assert plan(X).dtype == torch.float32


def test_the_default_dtype_and_pointers(make_worker):
    bob = make_worker("bob")
    ints, floats = torch.arange(4).send(bob), X.double().send(bob)
    with default_dtype(torch.float64):
        lstm = nn.LSTM(3, 2)
        want = lstm(X.double())[0]
        lstm.send(bob)  # its forward makes zeros
        with pytest.raises(RemoteOpError, match=r"set_default_dtype\(torch\.float64\).*pointer\.to"):
            ints / 2
        assert (ints.to(torch.float64) / 2).dtype == torch.float64
        assert (floats + 1).get().dtype == torch.float64
        got = lstm(floats)[0].get()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want)


# -------------------------------------------------------------------------------- modes that change no values here


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.autograd.set_detect_anomaly(True),
        lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        lambda: torch.device("cpu"),
        lambda: deterministic(),
        lambda: torch.autograd.graph.save_on_cpu(),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly")
def test_modes_that_a_plan_has_no_need_of(mode, make_worker):
    bob = make_worker("bob")
    model = nn.Linear(3, 2)
    plan = planrt.Plan(model).build(X)
    with mode():
        again = planrt.Plan(model).build(X)
        assert again.hash == plan.hash
        assert torch.equal(plan(X), model(X))
        x = X.clone().requires_grad_().send(bob)
        (x * 2).sum().backward()
        assert torch.equal(x.grad.get(), torch.full((4, 3), 2.0))


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------------ forward hooks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def hooked(kind):
    """A net with a forward hook of that kind, and what removes a global one."""
    torch.manual_seed(0)
    net = Net()
    if kind == "hook":
        net.a.register_forward_hook(lambda module, args, out: out * 2)
    elif kind == "pre":
        net.a.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    elif kind == "keywords":
        net.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] - 1,), kwargs), with_kwargs=True)
    elif kind == "always":
        net.b.register_forward_hook(lambda module, args, out: out.tanh(), always_call=True)
    return net


@pytest.mark.parametrize("kind", ["hook", "pre", "keywords", "always", "global"])
def test_forward_hooks_are_recorded_and_run_on_models_that_were_sent(kind, make_worker):
    net = hooked(kind)
    handle = None
    if kind == "global":
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: out + 1)
    try:
        want = net(X)
        plan = planrt.Plan(copy.deepcopy(net)).build(X)
        bob = make_worker("bob")
        sent = copy.deepcopy(net)
        sent.send(bob)
        got = sent(X.send(bob)).get()
    finally:
        if handle is not None:
            handle.remove()
    assert torch.equal(plan(X), want)
    torch.testing.assert_close(got, want)


def local_steps(net, loss_fn):
    net = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for i in (0, 2):
        optimizer.zero_grad()
        loss_fn(net(X[i : i + 2]), Y[i : i + 2]).backward()
        optimizer.step()
    return net.state_dict()


def round_of(worker, net):
    async def run():
        config = TrainConfig(net, F.cross_entropy, batch_size=2, shuffle=False)
        scheduler = RoundScheduler([worker], config, dataset_key="d", seed=1)
        await scheduler.prepare()
        return (await scheduler.run_round(1, config.state)).state

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["hook", "pre", "keywords", "always"])
def test_forward_hooks_train_in_rounds(kind, make_worker):
    worker = make_worker("bob", {"d": planrt.BaseDataset(X, Y)})
    net = hooked(kind)
    want = local_steps(net, F.cross_entropy)
    for name, value in round_of(worker, net).items():
        torch.testing.assert_close(value, want[name])


# ----------------------------------------------------------------------------------------------- backward hooks

GRADIENT_HOOKS = {
    "register_hook": lambda net: net.a.weight.register_hook(lambda grad: grad * 0),
    "register_post_accumulate_grad_hook": lambda net: net.a.weight.register_post_accumulate_grad_hook(
        lambda p: None
    ),
    "register_full_backward_hook": lambda net: net.a.register_full_backward_hook(lambda *a: None),
    "register_full_backward_pre_hook": lambda net: net.a.register_full_backward_pre_hook(lambda *a: None),
}


@pytest.mark.parametrize("kind", GRADIENT_HOOKS)
def test_gradient_hooks_are_refused_in_rounds_and_on_models_that_are_sent(kind, make_worker):
    worker = make_worker("bob", {"d": planrt.BaseDataset(X, Y)})
    net = Net()
    GRADIENT_HOOKS[kind](net)
    part = "a.weight" if "full" not in kind else "'a'"
    with pytest.raises(TraceError, match=rf"{part}.*hook") as caught:
        round_of(worker, net)
    assert kind in str(caught.value)
    with pytest.raises(LocalError, match=rf"{part.strip(chr(39))}.*hook"):
        net.send(worker)
    assert type(net.a.weight) is nn.Parameter, "nothing was sent"


def test_hooks_of_frozen_parameters_are_no_matter(make_worker):
    worker = make_worker("bob", {"d": planrt.BaseDataset(X, Y)})
    net = Net()
    net.a.weight.register_hook(lambda grad: grad * 0)
    net.a.requires_grad_(False)
    want = local_steps(net, F.cross_entropy)
    for name, value in round_of(worker, net).items():
        torch.testing.assert_close(value, want[name])


def test_gradient_hooks_of_a_plan_that_does_not_differentiate_run_here():
    net = Net()
    seen = []
    net.a.weight.register_hook(lambda grad: seen.append(1))
    planrt.Plan(net).build(X)(X).sum().backward()
    assert seen == [1]


def test_backward_hooks_added_after_send_are_refused_when_they_would_run(make_worker):
    bob = make_worker("bob")
    net = Net()
    net.send(bob)
    x = X.send(bob)
    with pytest.raises(RemoteOpError, match="register_hook cannot run on a remote tensor"):
        net.a.weight.register_hook(lambda grad: grad)
    for register in (
        net.a.register_full_backward_hook,
        nn.modules.module.register_module_full_backward_hook,
    ):
        handle = register(lambda *a: None)
        try:
            with pytest.raises(RemoteOpError, match="backward hook of a module"):
                net(x)
        finally:
            handle.remove()
    net(x).sum().backward()


def test_a_global_backward_hook_is_refused_while_recording():
    handle = nn.modules.module.register_module_full_backward_hook(lambda *a: None)
    try:
        with pytest.raises(TraceError, match="a backward hook of a module"):
            planrt.Plan(Net()).build(X)
    finally:
        handle.remove()


@pytest.mark.parametrize("way", ["send", "send_", "async_send"])
def test_a_tensor_with_a_gradient_hook_is_not_sent(way, make_worker):
    bob = make_worker("bob")
    x = X.clone().requires_grad_()
    x.register_hook(lambda grad: grad)

    async def send():
        sent = getattr(x, way)(bob)
        return await sent if way == "async_send" else sent

    with pytest.raises(LocalError, match="hooks on its gradient"):
        asyncio.run(send())


# ---------------------------------------------------------------------------------------------- computed weights


def weight_norm_old(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module)


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm (old)": weight_norm_old,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm (old)": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("training", [True, False])
def test_computed_weights_are_recorded(name, training):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(COMPUTED[name](nn.Linear(3, 3)), nn.Tanh())

    net, eager = make(), make()
    plan = planrt.Plan(net).train(training).build(X)
    got = plan(X)
    torch.testing.assert_close(got, eager.train(training)(X), rtol=0, atol=0)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in COMPUTED if name != "prune"])
def test_computed_weights_train_in_rounds(name, make_worker):
    worker = make_worker("bob", {"d": planrt.BaseDataset(X, Y)})
    torch.manual_seed(0)
    net = nn.Sequential(COMPUTED[name](nn.Linear(3, 3)), nn.Tanh())
    reference = nn.Sequential(COMPUTED[name](nn.Linear(3, 3)), nn.Tanh())
    reference.load_state_dict(net.state_dict())
    optimizer = torch.optim.SGD(reference.train().parameters(), lr=0.1)
    for i in (0, 2):
        optimizer.zero_grad()
        F.cross_entropy(reference(X[i : i + 2]), Y[i : i + 2]).backward()
        optimizer.step()
    want = reference.state_dict()
    for key, value in round_of(worker, net).items():
        torch.testing.assert_close(value, want[key])
