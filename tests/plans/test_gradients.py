"""Plans that differentiate: whole training steps, bit for bit those of eager PyTorch, and gradients of their own."""

import copy
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from nets import line_of
from torch import nn

from planrt.errors import ExecutionError, PlanError, TraceError
from planrt.fl.runs.networks import seeded_net
from planrt.plans import Graph, Op, trace
from planrt.plans.forms.torchscript import to_torchscript
from planrt.plans.ir import ops
from planrt.plans.running.interpreter import execute
from planrt.plans.training import OPTIMIZERS, trace_model, train
from planrt.types import Ref, TensorSpec

X, Y = torch.randn(6, 4), torch.randint(0, 3, (6,))
BATCHES = [(torch.randn(n, 4), torch.randint(0, 3, (n,))) for n in (6, 3, 5)]
FREE = {"free_dims": [[0], [0]]}


def mlp(*, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def same_steps(step, net, batches=BATCHES, *, seeds=None, extra=(), **options):
    """`step` recorded and run from bytes is `step`, in results and in what it does to `net` and `extra`."""
    gradients = [p.grad for p in net.parameters()]
    before = copy.deepcopy(net.state_dict())
    plan = trace(step, batches[0], modules=[net], **{**FREE, **options})
    assert all(p.grad is g for p, g in zip(net.parameters(), gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert plan.differentiates
    received = Graph.from_bytes(plan.to_bytes())
    state = [tensor.clone() for tensor in plan.state_values]
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        wanted = step(*batch)
        torch.manual_seed(number)
        got = execute(received, batch, state)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, check_stride=False)
        for leaf in got if isinstance(got, tuple) else [got]:
            assert not leaf.requires_grad
    ours = dict(zip([entry.name for entry in plan.state], state, strict=True))
    for name, tensor in net.state_dict().items():
        assert torch.equal(ours[name], tensor), name
    for name, tensor in extra:
        assert torch.equal(ours[name], tensor), name
    return plan


def by_hand(net, loss_fn=F.cross_entropy, lr=0.1):
    def step(x, y):
        net.zero_grad()
        loss = loss_fn(net(x), y)
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= lr * p.grad
        return loss

    return step


class Everything(nn.Module):
    """Batch norm, dropout and a counter."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return self.last(F.dropout(self.norm(self.first(x)).relu(), 0.4))


def test_a_step_with_updates_by_hand():
    net = mlp()
    for p in net.parameters():
        p.grad = torch.ones_like(p)  # the user's own, which recording leaves alone
    plan = same_steps(by_hand(net), net)
    assert plan.code.splitlines()[:2] == ["_6 = _2.detach()", "_6.requires_grad_()"]
    assert "_13.backward()" in plan.code
    assert "= _6.grad" in plan.code


def test_a_step_with_batch_norm_and_dropout():
    net = Everything()
    same_steps(by_hand(net), net)


def test_a_step_of_the_mnist_network():
    net = seeded_net(1)
    batches = [(torch.randn(n, 1, 28, 28), torch.randint(0, 10, (n,))) for n in (4, 3, 2)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x, y):
        optimizer.zero_grad()
        loss = F.nll_loss(net(x), y)
        loss.backward()
        optimizer.step()
        return loss, net.fc2.weight.grad.norm() if hasattr(net, "fc2") else loss

    same_steps(step, net, batches)


def test_weights_that_are_arguments():
    def step(x, y, w, b):
        loss = F.cross_entropy(x @ w + b, y)
        loss.backward()
        with torch.no_grad():
            w.sub_(w.grad, alpha=0.1)
            b.data -= 0.1 * b.grad
        return loss, w, b

    weights = [torch.randn(4, 3, requires_grad=True), torch.zeros(3, requires_grad=True)]
    plan = trace(step, [X, Y, *weights], free_dims=[[0], [0], [], []])
    mine = [w.detach().clone() for w in weights]  # gradients are the plan's own: these need none
    for x, y in BATCHES:
        for w in weights:
            w.grad = None
        wanted = step(x, y, *weights)
        got = execute(plan, [x, y, *mine])
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)
    assert got[1].data_ptr() == mine[0].data_ptr()  # what is returned is the memory that was given
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in (*mine, *got))


def test_gradients_as_results():
    def gradients(x, y, w):
        return torch.autograd.grad(F.cross_entropy(x @ w, y), [w, x])

    w = torch.randn(4, 3)
    plan = trace(
        gradients, [X.clone().requires_grad_(), Y, w.clone().requires_grad_()], free_dims=[[0], [0], []]
    )
    for x, y in BATCHES:
        wanted = gradients(x.clone().requires_grad_(), y, w.clone().requires_grad_())
        for a, b in zip(execute(plan, [x, y, w]), wanted, strict=True):
            assert torch.equal(a, b)


def test_nothing_accumulates_and_nothing_reaches_the_callers_graph():
    net = mlp()
    plan = trace(lambda x, y: F.cross_entropy(net(x), y).backward(), [X, Y], modules=[net], **FREE)
    state = [p.detach().clone().requires_grad_() for p in net.parameters()]
    x = (X.clone().requires_grad_() * 1).requires_grad_()
    for _ in range(2):
        execute(plan, [x, Y], state)
    assert all(p.grad is None for p in state)
    gone_through = torch.autograd.grad(x.sum(), [x], allow_unused=True)
    assert gone_through[0] is not None


def test_a_hostile_plan_cannot_reach_the_callers_graph():
    spec = TensorSpec((3,), torch.float32)
    w = torch.ones(3, requires_grad=True)
    for op in (
        Op("Tensor.backward", (Ref(0), Ref(1)), {}, None),
        Op("autograd.backward", ([Ref(0)], [Ref(1)]), {}, None),
        Op("autograd.grad", ([Ref(0)], [Ref(1)], [Ref(1)]), {}, Ref(2)),
        Op("Tensor.grad.__set__", (Ref(0), Ref(1)), {}, None),
        Op("Tensor.requires_grad_", (Ref(1),), {}, None),
        Op("Tensor.retain_grad", (Ref(0),), {}, None),
    ):
        x, plain = w * 2, torch.ones(3)
        plan = Graph((spec, spec), (), (op,), Ref(0))
        assert plan.differentiates
        try:
            result = execute(plan, [x, plain])
        except ExecutionError:
            pass
        else:
            assert not result.requires_grad
        assert not x.retains_grad
        assert not plain.requires_grad
        assert w.grad is None
        x.sum().backward()  # its graph is whole
        w.grad = None


def test_the_callers_grad_mode_does_not_matter_and_is_kept():
    net = mlp()
    plan = trace(by_hand(net), [X, Y], modules=[net], **FREE)
    losses = []
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            losses.append(execute(plan, [X, Y], [t.clone() for t in plan.state_values]))
            assert torch.is_grad_enabled() is mode
    assert torch.equal(*losses)
    with torch.inference_mode(), pytest.raises(PlanError, match="run it outside torch.inference_mode"):
        execute(plan, [X, Y], list(plan.state_values))


def test_a_failing_backward_is_named_with_its_line():
    def f(x, w):
        y = (x * w).sum(0)
        y.backward(torch.ones_like(x[0]))  # here
        return w.grad

    w = torch.randn(4, requires_grad=True)
    plan = trace(f, [X, w], free_dims=[[0], []])
    assert torch.equal(execute(plan, [X, w]), X.sum(0))
    steps = (Op("Tensor.backward", (Ref(0),), {}, None),)
    with pytest.raises(ExecutionError, match=r"op 0 of plan 'plan' failed: _0.backward\(\): .*require grad"):
        execute(Graph((TensorSpec((), torch.float32),), (), steps, Ref(0)), [torch.ones(())])
    refused = "the function failed on its example arguments: RuntimeError: .*require grad"
    with pytest.raises(TraceError, match=refused) as caught:
        trace(f, [X, w.detach()])
    assert line_of(f) in str(caught.value)


# What a step may contain


def test_second_derivatives():
    net = mlp()

    def step(x, y):
        x = x.clone().requires_grad_()
        loss = F.cross_entropy(net(x), y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        total = loss + 10 * slope.pow(2).sum()
        grads = torch.autograd.grad(total, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                p.add_(g, alpha=-0.1)
        return total, slope.detach()

    same_steps(step, net)


def test_a_jacobian_from_torchs_own_helpers():
    def f(x):
        return torch.autograd.functional.jacobian(lambda v: (v**2).cumsum(0), x)

    plan = trace(f, [torch.arange(3.0)])
    assert torch.equal(execute(plan, [torch.ones(3)]), f(torch.ones(3)))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_create_graph_leaves_no_memory_behind():
    def f(x, w):
        (x @ w).pow(3).sum().backward(create_graph=True)
        first = w.grad
        w.grad = None
        first.pow(2).sum().backward()
        second = w.grad
        return first, second

    def leaks(x, w):
        (x @ w).pow(3).sum().backward(create_graph=True)
        return w.grad

    w = torch.randn(4)
    plan = trace(f, [X, w.clone().requires_grad_()])
    for a, b in zip(execute(plan, [X, w]), f(X, w.clone().requires_grad_()), strict=True):
        assert torch.equal(a, b)
    plan = trace(leaks, [X, w.clone().requires_grad_()])
    array = np.ones(4, dtype=np.float32)
    memory = weakref.ref(array)  # lives as long as a tensor that shares its memory does
    given = torch.from_numpy(array)
    execute(plan, [X, given])
    del array, given
    gc.collect()
    assert memory() is None


def test_clipped_gradients():
    net = mlp()

    def step(x, y):
        net.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        nn.utils.clip_grad_value_(net.parameters(), 0.01)
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(p.grad)
        return loss, norm

    same_steps(step, net)


def test_two_backward_passes_accumulate():
    net = mlp()

    def step(x, y):
        net.zero_grad()
        out = net(x)
        first = F.cross_entropy(out, y)
        first.backward(retain_graph=True)
        second = out.pow(2).mean()
        second.backward(inputs=list(net[2].parameters()))
        torch.autograd.backward([net(x).sum()], [torch.tensor(0.5)])
        with torch.no_grad():
            for p in net.parameters():
                p.grad *= 0.5
                p.sub_(p.grad)
        return first, second

    plan = same_steps(step, net)
    assert "retain_graph=True" in plan.code
    assert "torch.autograd.backward((" in plan.code


def test_whether_there_is_a_gradient():
    net, unused = mlp(), nn.Linear(2, 2)
    both = nn.ModuleList([net, unused])

    def step(x, y):
        for p in both.parameters():
            p.grad = None
        F.cross_entropy(net(x), y).backward()
        none = 0
        with torch.no_grad():
            for p in both.parameters():
                if p.grad is None:
                    none += 1
                else:
                    p -= p.grad
                    del p.grad
        return torch.tensor(none) + (net[0].weight.grad is None)

    same_steps(step, both)


def test_gradients_that_are_set_and_retained():
    def f(x, w):
        hidden = x * w
        hidden.retain_grad()
        w.grad = torch.ones_like(w)
        hidden.sum().backward()
        return w.grad, hidden.grad

    plan = trace(f, [X, torch.ones(4, requires_grad=True)])
    got = execute(plan, [X, torch.ones(4)])
    for a, b in zip(got, f(X, torch.ones(4, requires_grad=True)), strict=True):
        assert torch.equal(a, b)


def test_frozen_and_thawed_parameters():
    net = mlp()
    net[0].requires_grad_(False)

    def step(x, y):
        net[2].weight.requires_grad = False
        out = net(x)
        F.cross_entropy(out, y).backward()
        with torch.no_grad():
            net[2].bias.sub_(net[2].bias.grad)
        bias, net[2].bias.grad = net[2].bias.grad, None
        return bias

    plan = trace(step, [X, Y], modules=[net], **FREE)
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]
    assert plan.code.count("detach()") == 2
    state = [t.clone() for t in plan.state_values]
    assert torch.equal(execute(plan, [X, Y], state), step(X, Y))
    assert torch.equal(state[3], net[2].bias)


def test_momentum_and_adam_written_out():
    net = mlp()
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in net.parameters()]
    count = torch.zeros(())

    def step(x, y):
        net.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        with torch.no_grad():
            count.add_(1)
            for p, (mean, square) in zip(net.parameters(), moments, strict=True):
                mean.lerp_(p.grad, 0.1)
                square.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                step_size = 0.01 / (1 - 0.9**count)
                p -= step_size * mean / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        return loss

    plan = same_steps(step, net, notice=False)
    assert {entry.kind for entry in plan.state if entry.name.startswith("captured")} == {"buffer"}


def test_what_is_changed_past_the_version_counter_is_a_buffer():
    seen = torch.zeros(4)

    def f(x):
        seen.data.add_(x.mean(0) * 0)  # adds nothing: only the op tells that it writes
        return seen + 1

    assert [entry.kind for entry in trace(f, [X], notice=False).state] == ["buffer"]


# Optimizers

RECORDED = {"Adadelta", "Muon", "RMSprop", "Rprop", "SGD"}
RECORDED_INSIDE = {"ASGD", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"}
"""Those which count steps: made in the function, they count from nought at every run, which is no secret."""
OPTIONS = [(name, {}) for name in OPTIMIZERS] + [
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
]


def stepping(name, options, *, inside=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))  # Muon wants 2-d

    def make():
        return OPTIMIZERS[name](net.parameters(), **options)

    outside = make()

    def step(x, y):
        optimizer = make() if inside else outside
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step(lambda: loss)  # here
        return loss

    return step, net, outside


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_optimizer_is_recorded_faithfully_or_refused_with_a_reason(name, options):
    if name == "SparseAdam":
        with pytest.raises(TraceError, match="does not support dense gradients"):
            trace(stepping(name, options)[0], [X, Y], **FREE, notice=False)
        return
    for inside in (False, True):
        step, net, optimizer = stepping(name, options, inside=inside)
        for p in net.parameters():  # a first step that changes nothing: the optimizer makes its state
            p.grad = torch.zeros_like(p)
        optimizer.step(lambda: torch.zeros(()))
        kept = copy.deepcopy(optimizer.state_dict())
        if inside and name in RECORDED_INSIDE:
            same_steps(step, net)
            continue
        if name in RECORDED:
            plan = same_steps(step, net)
            assert inside or len(plan.state) == 2 + sum(
                isinstance(value, torch.Tensor)
                for entry in optimizer.state.values()
                for value in entry.values()
            )
            continue
        with pytest.raises(TraceError, match=rf"optimizer {name} cannot step in a plan: ") as caught:
            trace(step, [X, Y], modules=[net], **FREE)
        assert "reads the value of a tensor; let the worker step" in str(caught.value)
        assert f"TrainConfig(optimizer='{name}')" in str(caught.value)
        assert line_of(step) == caught.value.line
        torch.testing.assert_close(optimizer.state_dict(), kept, rtol=0, atol=0)


def test_state_of_an_optimizer_has_readable_names_and_is_carried_on():
    step, net, optimizer = stepping("SGD", {"momentum": 0.9})
    step(X, Y)
    buffers = [
        (f"{name}.momentum_buffer", optimizer.state[p]["momentum_buffer"])
        for name, p in net.named_parameters()
    ]
    same_steps(step, net, extra=buffers)


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_an_optimizer_that_has_not_stepped_yet(name):
    step, net, optimizer = stepping(name, {"momentum": 0.9})
    with pytest.raises(TraceError, match="every run would be its first step, since it then makes '") as e:
        trace(step, [X, Y], modules=[net], **FREE)
    assert "let it step once before the plan is built" in str(e.value)
    assert e.value.line == line_of(step)
    assert not any(optimizer.state.values())


def test_a_learning_rate_that_changes_in_the_function():
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x, y):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9

    with pytest.raises(TraceError, match="its 'lr' is another after the step"):
        trace(step, [X, Y], modules=[net], **FREE)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_optimizers_on_lists_of_tensors_are_the_plain_ops():
    net = mlp()

    def step(x, y):
        optimizer = torch.optim.RMSprop(net.parameters(), lr=0.01, foreach=True, momentum=0.5, centered=True)
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        return loss

    plan = same_steps(step, net)
    assert "foreach" not in plan.code


def test_kernels_that_fuse_a_step_are_no_ops():
    net = mlp()

    def step(x, y):
        F.cross_entropy(net(x), y).backward()
        torch.optim.SGD(net.parameters(), lr=0.1, fused=True).step()  # here

    with pytest.raises(
        TraceError, match="optimizer SGD cannot step in a plan with fused=True.*leave that out"
    ) as e:
        trace(step, [X, Y], modules=[net])
    assert e.value.line == line_of(step)


def test_recurrent_attention_and_checkpointed_modules():
    def gradients(module, run):
        def step(x):
            run(x).sum().backward()
            found = [p.grad.clone() for p in module.parameters()]
            module.zero_grad()
            return tuple(found)

        return step

    lstm = nn.LSTM(4, 3, batch_first=True)
    attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    net = mlp()
    for module, run in (
        (lstm, lambda x: lstm(x)[0]),
        (attention, attention),
        (net, lambda x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)),
    ):
        step = gradients(module, run)
        plan = trace(step, [torch.randn(2, 5, 4)], modules=[module], free_dims=[[0, 1]])
        x = torch.randn(3, 4, 4)
        torch.manual_seed(0)
        got = execute(plan, [x])
        torch.manual_seed(0)
        torch.testing.assert_close(got, step(x), rtol=0, atol=0, check_stride=False)


def test_modules_made_in_the_function():
    with pytest.raises(
        TraceError, match="a parameter made in the function: make modules and parameters before"
    ):
        trace(lambda x: nn.Linear(4, 2)(x), [X])


def test_optimizers_that_step_elsewhere_meanwhile_are_left_alone():
    net, other = mlp(), nn.Linear(2, 2)
    elsewhere = torch.optim.Adam(other.parameters())
    plan = trace(by_hand(net), [X, Y], modules=[net], **FREE)
    other(torch.ones(1, 2)).sum().backward()
    elsewhere.step()
    assert len(elsewhere.state) == 2
    assert plan.differentiates


# What cannot be recorded


def test_hooks_would_be_lost():
    def hooked(parameter):
        net = mlp()
        parameter(net)
        return net

    for hook in (
        lambda net: net[0].weight.register_hook(lambda g: g * 2),
        lambda net: net[0].weight.register_post_accumulate_grad_hook(lambda p: None),
    ):
        net = hooked(hook)
        with pytest.raises(
            TraceError, match="state '0.weight' has hooks on its gradient; a plan would lose"
        ) as e:
            trace(by_hand(net), [X, Y], modules=[net])
        assert "test_gradients.py" in e.value.line
    net = mlp()
    net[0].register_full_backward_hook(lambda module, given, got: None)
    with pytest.raises(TraceError, match="hook|custom autograd.Function"):
        trace(by_hand(net), [X, Y], modules=[net])

    def inside(x, w):
        y = x * w
        y.grad_fn.register_hook(lambda *_: None)  # here
        return y

    with pytest.raises(TraceError, match="grad_fn.register_hook cannot be recorded") as caught:
        trace(inside, [X, torch.ones(4, requires_grad=True)])
    assert caught.value.line == line_of(inside)
    assert (
        trace(lambda w: (w * 2).grad_fn.name(), [torch.ones(4, requires_grad=True)]).outputs == "MulBackward0"
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda w: setattr(w, "data", torch.ones(4)),
            r"assigning to .data gives a tensor other memory.* use .copy_",
        ),
        (lambda w: w.detach().set_(torch.ones(4)), r"set_ gives a tensor other memory"),
        (lambda w: setattr(w, "_grad", w), "_grad"),
    ],
)
def test_other_memory_and_side_doors(change, match):
    def f(w):
        change(w)
        return w

    with pytest.raises(TraceError, match=match):
        trace(f, [torch.ones(4, requires_grad=True)])


def test_everything_is_put_back_when_recording_fails_half_way():
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    F.cross_entropy(net(X), Y).backward()
    optimizer.step()
    before, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    gradients = [(p.grad, p.grad.clone()) for p in net.parameters()]

    def step(x, y):
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        net[0].weight.requires_grad_(False)
        return net[0].weight.grad.sum().item()

    with pytest.raises(TraceError, match="reads the value"):
        trace(step, [X, Y], modules=[net])
    torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    for p, (grad, value) in zip(net.parameters(), gradients, strict=True):
        assert p.requires_grad
        assert p.grad is grad
        assert torch.equal(grad, value)


def test_gradients_of_captured_parameters_are_put_back():
    w = torch.ones(4, requires_grad=True)
    w.grad = mine = torch.full((4,), 7.0)

    def f(x):
        (x * w).sum().backward()
        return w.grad

    plan = trace(f, [X], notice=False)
    assert w.grad is mine
    assert torch.equal(execute(plan, [X]), X.sum(0))
    assert w.grad is mine


def test_such_a_plan_is_no_torchscript():
    net = mlp()
    with pytest.raises(PlanError, match="computes gradients, which TorchScript cannot"):
        to_torchscript(trace(by_hand(net), [X, Y], modules=[net]))


def test_plans_that_do_not_differentiate_say_so():
    assert not trace(lambda x: x.relu().detach(), [X]).differentiates
    for name in (*ops.GRADIENTS, "Tensor.requires_grad_"):
        op = Op(name, (Ref(0),), {}, None)
        assert Graph((TensorSpec((), torch.float32),), (), (op,), Ref(0)).differentiates


class Potential(nn.Module):
    """A force field: the prediction is itself a gradient."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        x = x.clone().requires_grad_()
        return -torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


def test_a_model_that_differentiates_trains_and_evaluates_like_any_other():
    torch.manual_seed(0)
    net = Potential()
    batches = [(torch.randn(5, 3), torch.randn(5, 3)) for _ in range(3)]
    plans = trace_model(net, F.mse_loss, *batches[0])
    state = [tensor.clone() for tensor in plans.state.values()]
    result = train(plans.training, state, batches, optimizer="SGD", optimizer_args={"lr": 0.1}, seed=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    for ours, theirs in zip(result.state, net.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        loss, prediction = execute(plans.evaluation, batches[0], result.state)
    assert not loss.requires_grad
    torch.testing.assert_close(prediction, net(batches[0][0]))


def test_recording_gives_no_warnings_of_its_own():
    net = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(by_hand(net), [X, Y], modules=[net], **FREE)
