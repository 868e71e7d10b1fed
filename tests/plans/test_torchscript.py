"""TorchScript from plans and plans from TorchScript."""

import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import make
from torch import nn

from planrt.errors import PlanError, TraceError
from planrt.plans import Graph, Plan, func2plan, trace
from planrt.plans.forms.torchscript import from_torchscript, to_torchscript
from planrt.plans.running.interpreter import execute

X = torch.randn(4, 6)


def quiet(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


@pytest.mark.parametrize("name", ["mnist", "resnet18", "unet", "embedding", "lstm", "tied", "transformer"])
def test_a_plan_as_torchscript_gives_the_same_result(name):
    net, _, batches = make(name)
    net.eval()
    plan = trace(net, [batches[0][0]], modules=[net], free_dims=[[0]])
    script = to_torchscript(plan, batches[0][0])
    assert isinstance(script, torch.jit.ScriptModule)
    for data, _ in batches:
        torch.testing.assert_close(quiet(script, data), execute(plan, [data]), rtol=0, atol=1e-6)
    assert {path for path, _ in script.named_parameters()} == {path for path, _ in net.named_parameters()}


def test_torchscript_has_its_own_state_as_it_was_traced():
    net, _, batches = make("resnet18")
    plan = trace(net, [batches[0][0]], modules=[net], free_dims=[[0]])
    before = net.bn1.running_mean.clone()
    generator = torch.get_rng_state()
    script = to_torchscript(plan)
    assert torch.equal(script.bn1.running_mean, before)
    assert torch.equal(net.bn1.running_mean, before)
    assert torch.equal(torch.get_rng_state(), generator)
    net.conv1.weight.data.zero_()
    assert script.conv1.weight.any()


def test_torchscript_of_a_function_saves_and_loads():
    @func2plan(args_shape=[(-1, 6)])
    def f(x):
        return x.view(x.shape[0] * 2, 3).relu()

    archive = io.BytesIO()
    quiet(torch.jit.save, f.torchscript, archive)
    archive.seek(0)
    script = quiet(torch.jit.load, archive)
    assert torch.equal(script(X), f(X))


def test_plans_that_cannot_be_torchscript_say_why():
    def f(x):
        with torch.no_grad():
            return x + 1

    with pytest.raises(PlanError, match=r"no_grad regions, .* \(op 0: torch\.set_grad_enabled\(False\)\)"):
        to_torchscript(trace(f, [X]))
    with pytest.raises(PlanError, match="came without its 1 state"):
        to_torchscript(Graph.from_bytes(trace(lambda x: x + X[0], [X], notice=False).to_bytes()))
    with pytest.raises(PlanError, match="cannot be made TorchScript"):
        to_torchscript(trace(lambda x: (x, "text"), [X]))


class Norm(Plan):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.drop(self.norm(x)) + self.calls


def test_it_is_the_plan_in_its_mode_and_with_its_state():
    plan = Norm().build(X)
    for mode in (True, False, True):
        script = plan.train(mode).torchscript
        for _ in range(2):
            x = torch.randn(7, 6)
            torch.manual_seed(0)
            expected = plan(x)
            torch.manual_seed(0)
            assert torch.equal(script(x), expected)
            assert torch.equal(script.norm.running_mean, plan.norm.running_mean)
            assert torch.equal(script.calls, plan.calls)
    assert plan.calls == 4
    with torch.no_grad():
        plan.norm.weight.zero_()
    assert torch.equal(plan.eval().torchscript(X), plan.calls.expand(4, 6))


def test_it_takes_the_inputs_in_order_and_gives_any_nesting_of_tensors():
    net = nn.Linear(6, 2)
    plan = Plan(lambda x, *, y, model, k=2.0: {"a": (x, y * k), "b": (model(x), y)}).build(X, y=X, model=net)
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    found, expected = plan.torchscript(x, y, net.weight, net.bias), plan(x, y=y, model=net)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    plan = Plan(lambda d: [d["x"][0] + 1, d["y"]]).build({"x": [X], "y": X})
    torch.testing.assert_close(plan.torchscript(x, y), plan({"x": [x], "y": y}))
    plan = Plan(lambda x: (x, (x.shape[0] * 2, x.relu()))).build(X)
    assert plan.torchscript(x)[1][0] == 10


@pytest.mark.parametrize(
    ("f", "returned"),
    [
        (lambda x: (x, 3), r"\(_0, 3\)"),
        (lambda x: {"a": x, "b": (x,)}, r"\{'a': _0, 'b': \(_0,\)\}"),
        (lambda x: {"a": {"b": x}}, r"\{'a': \{'b': _0\}\}"),
    ],
)
def test_outputs_that_torchscript_has_not(f, returned):
    with pytest.raises(
        PlanError, match=f"cannot be made TorchScript: it returns {returned}, and TorchScript has"
    ):
        _ = Plan(f).build(X).torchscript


def test_plans_that_differentiate_have_none():
    plan = Plan(lambda x: torch.autograd.grad(x.sum(), [x])[0], name="g").build(X.clone().requires_grad_())
    with pytest.raises(
        PlanError, match=r"'g' computes gradients, which TorchScript cannot \(op 1: _1\.requires_grad_"
    ):
        _ = plan.torchscript


def traced(f, *examples):
    return quiet(torch.jit.trace, f, examples, check_trace=False)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.view(x.shape[0], 2, 3).permute(0, 2, 1).reshape(x.size(0) * 2, -1),
        lambda x: x[1:, ::2] + x[-1, :3] - 1.5,
        lambda x: x[:, torch.tensor([0, 2])],
        lambda x: torch.cat([x, x * 2], 1).chunk(2, dim=1)[1],
        lambda x: torch.stack(x.split([2, 4], dim=1)[0].unbind(1)),
        lambda x: x / x.shape[0] + (x.shape[0] - 1) // 2 + (x.shape[0] % 3),
        lambda x: (x.max(1), x.sum(0, keepdim=True), x.mean(dtype=torch.float64)),
        lambda x: x.to(torch.float64).type_as(x).long().float().to("cpu"),
        lambda x: torch.zeros(x.shape[0], 2, dtype=torch.int32) + torch.arange(2),
        lambda x: F.hardtanh(F.elu(x), -1, 0.5) + F.silu(x.clone(), inplace=True) + F.leaky_relu(x, 0.3),
        lambda x: F.interpolate(x[:, None, None], scale_factor=(2, 2), mode="nearest"),
        lambda x: F.interpolate(x[:, None, None], size=(4, 5), mode="bilinear", align_corners=True),
        lambda x: F.adaptive_max_pool2d(x[:, None, None], (1, 2)) + F.max_pool2d(x[:, None, None], (1, 3)),
        lambda x: F.mse_loss(x, x * 2) + F.cross_entropy(x, x.argmax(1), label_smoothing=0.1),
        lambda x: F.scaled_dot_product_attention(x, x, x) + torch.linalg.vector_norm(x),
        lambda x: 2 - x.add(x, alpha=3).sub(1, alpha=2) + (1 - x).masked_fill(x > 0, 0.0),
        lambda x: torch.einsum("ij,kj->ik", x, x).softmax(1).contiguous() @ x,
        lambda x: x.clone().add_(1).clamp_(0, 1).expand(2, -1, -1).transpose(1, 2).flatten(1),
    ],
)
def test_traced_functions_translate(f):
    plan = Graph.from_bytes(from_torchscript(traced(f, X)).to_bytes())
    torch.testing.assert_close(execute(plan, [X], state_of(f)), f(X), rtol=0, atol=0)


def state_of(f):
    return from_torchscript(traced(f, X)).state_values


def test_batch_sizes_stay_free():
    script = traced(lambda x: x.view(x.shape[0] * 3, 2).sum(1), X)
    plan = from_torchscript(script)
    other = torch.randn(9, 6)
    assert torch.equal(execute(plan, [other]), other.view(27, 2).sum(1))


def test_names_and_kinds_of_state_are_those_of_the_module():
    net, _, batches = make("embedding")
    plan = from_torchscript(traced(net.eval(), batches[0][0]))
    assert [(entry.name, entry.kind) for entry in plan.state] == [
        ("embed.weight", "parameter"), ("norm.weight", "parameter"), ("norm.bias", "parameter"),
        ("norm.running_mean", "buffer"), ("norm.running_var", "buffer"), ("norm.num_batches_tracked", "buffer"),
        ("head.weight", "parameter"), ("head.bias", "parameter"),
    ]  # fmt: skip


def test_scripted_code_is_refused():
    class Branching(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    script = quiet(torch.jit.script, Branching())
    with pytest.raises(TraceError, match=r"'Branching' in TorchScript reads the value"):
        from_torchscript(script, [X])
    with pytest.raises(TraceError, match=r"does not say the shape of input 0: pass examples"):
        from_torchscript(script)


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.factor = 2.0

    def forward(self, x):
        x = self.drop(F.relu(self.norm(self.first(x)))) * self.factor
        if self.training:
            x = x + 1
        return x.view(x.size(0), -1)


@pytest.mark.parametrize("training", [True, False])
def test_scripted_modules_translate_in_both_modes(training):
    torch.manual_seed(0)
    net = Scripted().train(training)
    script = quiet(torch.jit.script, net)
    plan = Graph.from_bytes(from_torchscript(script, [X], training=training).to_bytes())
    state = [tensor.clone() for tensor in from_torchscript(script, [X], training=training).state_values]
    torch.manual_seed(1)
    expected = net(X)
    torch.manual_seed(1)
    assert torch.equal(execute(plan, [X], state), expected)
    assert torch.equal(
        execute(plan, [X[:3]], state).shape and execute(plan, [X[:3]], state)[:, :0], X[:3, :0]
    )


def scripted_losses():
    @torch.jit.script
    def named(target, pred):
        return F.nll_loss(input=pred, target=target)

    @torch.jit.script
    def summed(prediction, target):
        return F.cross_entropy(prediction, target) + 0.5 * F.mse_loss(prediction, prediction * 2)

    return {"named": named, "summed": summed}


@pytest.mark.parametrize("name", ["named", "summed"])
def test_scripted_losses_translate(name):
    from planrt.plans.training import trace_model

    script = quiet(scripted_losses)[name]
    target = torch.tensor([0, 1, 2, 1])
    net = nn.Linear(6, 3)
    plans = trace_model(net, script, X, target)
    loss, prediction = execute(plans.training, [X, target], list(net.parameters()))
    expected = script(target, prediction) if name == "named" else script(prediction, target)
    torch.testing.assert_close(loss, expected)


def test_a_scripted_loss_that_branches_on_sizes_is_refused():
    @torch.jit.script
    def loss(pred, target):
        if pred.size(0) > 3:
            return pred.sum()
        return (pred - target).sum()

    from planrt.plans.training import trace_model

    with pytest.raises(
        TraceError, match=r"control flow of 'loss'.*pass the nn\.Module or Python function itself"
    ):
        trace_model(nn.Linear(6, 3), loss, X, torch.zeros(4, 3))


def test_operators_off_the_table_and_reads_are_refused():
    with pytest.raises(TraceError, match=r"aten::as_strided .* not on the table"):
        from_torchscript(traced(lambda x: x.as_strided((2, 2), (1, 1)), X))
    with pytest.raises(TraceError, match="takes 1 inputs, got 2 examples"):
        from_torchscript(traced(lambda x: x + 1, X), [X, X])
