"""Plans as programs of `torch.export` and as ONNX models: equal in results, or an error that names the op."""

import sys

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from nets import make
from torch import nn

from planrt.errors import MissingPackageError, OptionError, PlanArgumentError, PlanError
from planrt.plans import Plan
from planrt.types import leaves

X = torch.randn(4, 6)


class Norm(Plan):
    """Changes its state while it trains."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.drop(self.norm(x)) + self.calls


def same(exported, plan, *args, **kwargs):
    torch.manual_seed(2)
    expected = plan(*args, **kwargs)
    torch.manual_seed(2)
    torch.testing.assert_close(exported.module()(*args, **kwargs), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["mnist", "resnet18", "unet", "embedding", "lstm", "tied", "transformer"])
def test_networks_export_with_free_batches(name):
    net, _, batches = make(name)
    plan = Plan(net).build(batches[0][0]).eval()
    exported = plan.to_exported_program(batches[0][0])
    for data, _ in batches:
        same(exported, plan, data)
    same(exported, plan, batches[0][0][:1])


FUNCTIONS = {
    "sizes": lambda x: x.view(x.shape[0] * 2, 3).sum() / x.shape[0],
    "in place": lambda x: x.clone().add_(1)[1:].mul_(2),
    "random": lambda x: F.dropout(x) + torch.rand(x.shape[0], 1),
    "made": lambda x: torch.zeros(x.shape[0], 6) + torch.arange(x.shape[0])[:, None] + torch.empty(1, 6),
    "shapes by value": lambda x: x[x > 0].sum(),
    "nothing": lambda x: x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_export(name):
    plan = Plan(FUNCTIONS[name]).build(X)
    for exported in (plan.to_exported_program(X), plan.to_exported_program()):
        for size in (4, 7, 20):
            same(exported, plan, torch.randn(size, 6))


def test_no_grad_regions_stay():
    def f(x):
        with torch.no_grad():
            scale = x.mean(0)
        return x * scale

    plan = Plan(f).build(X)
    exported = plan.to_exported_program()
    x, other = torch.randn(5, 6).requires_grad_(), torch.randn(5, 6)
    exported.module()(x).sum().backward()
    assert torch.allclose(x.grad, x.mean(0).detach().expand(5, 6))
    same(exported, plan, other)


def test_both_modes_and_changes_of_state():
    plan = Norm().build(X)
    training, evaluation = plan.to_exported_program(), plan.eval().to_exported_program()
    program, before = training.module(), plan.norm.running_mean.clone()
    plan.train()
    for _ in range(2):
        torch.manual_seed(0)
        expected = plan(X)
        torch.manual_seed(0)
        assert torch.equal(program(X), expected)
    assert torch.equal(program.norm.running_mean, plan.norm.running_mean)
    assert not torch.equal(before, plan.norm.running_mean)
    assert program.calls == 2
    assert evaluation.module().calls == 0  # its own copy
    fresh = Norm().build(X).eval()
    same(evaluation, fresh, torch.randn(9, 6))


def test_it_is_called_as_the_plan_is():
    def f(x, *, d, scale=2.0):
        return {"sum": x + d["a"][0] * scale, "more": [d["a"][1], x.shape[0]]}

    plan = Plan(f).build(X, d={"a": (X, X[0])})
    for exported in (plan.to_exported_program(), plan.to_exported_program(X, d={"a": (X, X[0])})):
        x, y, z = torch.randn(7, 6), torch.randn(7, 6), torch.randn(6)
        same(exported, plan, x, d={"a": (y, z)})
    plan = Plan(lambda *xs: torch.stack(xs)).build(X, X)
    same(plan.to_exported_program(), plan, torch.randn(3, 6), torch.randn(3, 6))
    plan = Plan(lambda x, **more: x + more["y"] + more["z"]).build(X, z=X, y=X)
    same(plan.to_exported_program(), plan, X[:3], z=X[:3], y=X[1:])
    plan = Plan(lambda x, k, mode="mean", y=None: F.mse_loss(x * k, y, reduction=mode)).build(X, 2.0, y=X)
    same(plan.to_exported_program(), plan, X[:3], 2.0, y=X[1:])
    net = nn.Sequential(nn.Linear(6, 2), nn.ReLU())
    plan = Plan(lambda model, x: model(x)).build(net, X)
    exported = plan.to_exported_program(net, X)
    assert torch.allclose(exported.module()(dict(net.named_parameters()), X[:3]), net(X[:3]))


def test_a_batch_of_one_as_the_example_leaves_the_batch_free():
    plan = Plan(nn.Linear(6, 2)).build(X)
    exported = plan.to_exported_program(X[:1])
    for size in (1, 2, 9):
        same(exported, plan, torch.randn(size, 6))
    assert {name for name, _ in exported.named_parameters()} == {"weight", "bias"}


def test_the_export_has_a_copy_of_the_state():
    net = nn.Linear(6, 2)
    plan = Plan(net).build(X)
    exported = plan.to_exported_program()
    before = net(X).detach()
    with torch.no_grad():
        net.weight.zero_()
    assert torch.equal(exported.module()(X), before)
    same(plan.to_exported_program(), plan, X)


# ONNX


def run(path, *inputs):
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path))
    names = [one.name for one in session.get_inputs()]
    return session.run(None, {name: one.numpy() for name, one in zip(names, inputs, strict=True)})


def same_in_onnx(path, plan, *inputs):
    expected = [leaf for leaf in leaves(plan(*inputs)) if leaf is not None]
    found = run(path, *inputs)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(one), torch.as_tensor(other).detach(), rtol=1e-4, atol=1e-4, check_dtype=False
        )


@pytest.mark.parametrize("name", ["mnist", "embedding", "lstm", "transformer"])
def test_networks_as_onnx(name, tmp_path):
    net, _, batches = make(name)
    plan = Plan(net).build(batches[0][0]).eval()
    path = tmp_path / "net.onnx"
    plan.to_onnx(path, batches[0][0])
    for data, _ in batches:
        same_in_onnx(path, plan, data)
    assert list(tmp_path.iterdir()) == [path]


def test_functions_as_onnx(tmp_path):
    def f(x, y):
        with torch.no_grad():
            scale = x.mean(0)
        z = (x * scale).clone().add_(1)
        return {"z": z[1:], "both": (y, x.shape[0], z.view(x.shape[0] * 2, 3).sum(0)), "none": None}

    plan = Plan(f).build(X, X[0], free_dims=[(0,), ()])
    plan.to_onnx(str(tmp_path / "f.onnx"))
    for size in (2, 4, 9):
        same_in_onnx(tmp_path / "f.onnx", plan, torch.randn(size, 6), torch.randn(6))


def test_large_state_goes_into_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr("planrt.plans.forms.export._MAX_IN_ONE_FILE", 0)
    plan = Plan(nn.Linear(6, 200)).build(X)
    plan.to_onnx(tmp_path / "f.onnx")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["f.onnx", "f.onnx.data"]
    same_in_onnx(tmp_path / "f.onnx", plan, X)
    with pytest.raises(OptionError, match="cannot save to"):
        plan.to_onnx(tmp_path / "no" / "place")


def test_random_ops_draw_other_numbers_in_onnx(tmp_path):
    path = tmp_path / "f.onnx"
    Plan(lambda x: x + torch.rand(x.shape[0], 6)).build(X).to_onnx(path)
    (drawn,) = run(path, torch.zeros(50, 6))
    assert drawn.shape == (50, 6)
    assert 0 <= drawn.min() < drawn.max() <= 1


# What has no exported form


def test_ops_that_torch_cannot_export_are_named():
    plan = Plan(lambda x: (x * 2).data.add(1).relu()).build(X)
    with pytest.raises(
        PlanError, match=r"^op 1 of plan '<lambda>' cannot be exported: _2 = _1\.data: "
    ) as caught:
        plan.to_exported_program()
    assert caught.value.__cause__ is not None


def test_ops_that_onnx_does_not_have_are_named(tmp_path):
    path = tmp_path / "f.onnx"
    plan = Plan(lambda x: torch.special.airy_ai(x.relu()).add(1)).build(X)
    with pytest.raises(
        PlanError,
        match=r"^op 1 of plan .* cannot be exported: _2 = torch\.special\.airy_ai\(_1\): No ONNX function",
    ):
        plan.to_onnx(path)
    assert torch.equal(plan.to_exported_program().module()(X), plan(X))
    assert not path.exists()


def test_onnx_models_change_nothing(tmp_path):
    plan = Norm().build(X)
    with pytest.raises(
        PlanError,
        match=r"op 0 of plan 'Norm' .*_1\.add_\(1\): it changes the state 'calls', .*plan\.eval\(\)",
    ):
        plan.to_onnx(tmp_path / "norm.onnx")
    plan.eval().to_onnx(tmp_path / "norm.onnx")
    same_in_onnx(tmp_path / "norm.onnx", plan, X)
    plan = Plan(lambda x: x.relu() + x.add_(1), name="f").build(X)
    with pytest.raises(PlanError, match=r"op 1 of plan 'f' .*: _2 = _0\.add_\(1\): it changes the input 'x'"):
        plan.to_onnx(tmp_path / "f.onnx")
    changed = X.clone()
    plan.to_exported_program().module()(changed)
    assert torch.equal(changed, X + 1)
    with pytest.raises(PlanError, match=r"returns the constant 'text', which ONNX cannot"):
        Plan(lambda x: (x + 1, "text")).build(X).to_onnx(tmp_path / "f.onnx")


def test_plans_that_differentiate_are_refused(tmp_path):
    def step(x, w):
        w = w.detach().requires_grad_()
        (x @ w).sum().backward()
        return w.grad

    plan = Plan(step).build(X, X[0])
    for export in (plan.to_exported_program, lambda: plan.to_onnx(tmp_path / "f.onnx")):
        with pytest.raises(
            PlanError, match=r"'step' computes gradients, which .* cannot \(op 1: .*_2\.requires_grad_\(\)\)"
        ):
            export()


def test_what_a_plan_assumes_of_its_sizes_is_checked():
    plan = Plan(lambda x: x + 1 if x.shape[0] > 3 else x - 1).build(X)
    exported = plan.to_exported_program(X)
    same(exported, plan, torch.randn(9, 6))
    with pytest.raises((RuntimeError, AssertionError)):
        exported.module()(X[:2])
    plan = Plan(lambda x: x - 1 if x.shape[0] == 12 else x + 1).build(X)
    same(plan.to_exported_program(X), plan, X[:3])
    with pytest.raises(
        PlanError, match=r"op 1 of plan .*assume_ne\(_1, 12\): .*goes another way for such sizes"
    ):
        plan.to_exported_program()  # on examples of its own, of size 12


def test_bad_arguments(tmp_path, monkeypatch):
    plan = Plan(lambda x: x + 1, name="f")
    for export in (plan.to_exported_program, lambda: plan.to_onnx(tmp_path / "f.onnx")):
        with pytest.raises(PlanError, match="'f' is not built"):
            export()
    plan.build(X)
    with pytest.raises(PlanArgumentError, match=r"wanted float32\[\*, 6\], got float32\[2\]"):
        plan.to_exported_program(torch.ones(2))
    with pytest.raises(PlanArgumentError, match="f takes"):
        plan.to_onnx(tmp_path / "f.onnx", X, X)
    with pytest.raises(OptionError, match="is a directory"):
        plan.to_onnx(tmp_path)
    with pytest.raises(OptionError, match="No such file or directory"):
        plan.to_onnx(tmp_path / "no" / "place")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        MissingPackageError, match=r"needs the package onnxscript: pip install 'planrt\[onnx\]'"
    ):
        plan.to_onnx(tmp_path / "f.onnx")
    assert not list(tmp_path.iterdir())
