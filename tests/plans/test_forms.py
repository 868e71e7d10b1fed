"""Plans called with other sizes, ranks and dtypes than they were built with."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import planrt
from planrt.errors import PlanArgumentError
from planrt.plans import other_sizes as forms


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


OTHERS = [
    torch.tensor([-1, 2]),
    torch.tensor([-1.0]),
    torch.tensor(-3.0),
    torch.randn(3, 2),
    torch.randn(2, 3, 4, dtype=torch.float64),
    torch.zeros(0, 2),
    torch.tensor([[-1, 2]], dtype=torch.int8),
]


@pytest.mark.parametrize("x", OTHERS, ids=lambda x: f"{x.dtype}{list(x.shape)}".removeprefix("torch."))
def test_a_plan_takes_what_its_function_takes(x, make_worker):
    @planrt.func2plan(args_shape=[(1,)])
    def f(x):
        return x.abs() + 1

    first = f.hash
    assert torch.equal(f(x), x.abs() + 1)
    assert f.hash == first, "the plan itself stays"
    bob = make_worker("bob")
    there = f.send(bob)
    for _ in range(2):
        assert torch.equal(there(x.send(bob)).get(), x.abs() + 1)
        assert torch.equal(f(x.send(bob)).get(), x.abs() + 1)


def test_a_form_is_recorded_once_and_leaves_its_batch_free():
    calls = []

    def f(x):
        calls.append(1)
        return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the list that grows
        plan = planrt.func2plan()(f).build(torch.zeros(2))
        plan(torch.zeros(2, 3))
    built = len(plan._forms)
    for size in (1, 2, 5):
        assert plan(torch.ones(size, 3)).tolist() == [[2.0] * 3] * size
        assert plan(torch.ones(size)).tolist() == [2.0] * size
    assert len(plan._forms) == built == 1


def test_forms_are_bounded():
    plan = planrt.func2plan()(lambda x: x * 2).build(torch.zeros(2))
    for width in range(1, forms.MOST + 5):
        assert plan(torch.ones(2, width)).shape == (2, width)
    assert len(plan._forms) == forms.MOST
    plan.build(torch.zeros(2))
    assert not plan._forms


class Net(planrt.Plan):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.fc(x).relu()


def test_forms_of_a_class_share_its_state():
    net = Net().build(torch.zeros(4, 3))
    x = torch.randn(2, 5, 3)
    net(torch.zeros(4, 3))
    assert torch.equal(net(x), net.fc(x).relu())
    assert net.calls == 2, "one state, whatever the form"
    net.fc.weight.data.mul_(2)
    assert torch.equal(net(x), net.fc(x).relu())
    twin = copy.deepcopy(net)
    twin.fc.weight.data.zero_()
    assert torch.equal(twin(x), twin.fc(x).relu())
    assert torch.equal(net(x), net.fc(x).relu())


def test_forms_follow_the_mode():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    plan = planrt.Plan(net).build(torch.zeros(4, 3))
    x = torch.randn(2, 4, 3)
    assert (plan(x) == 0).any()
    plan.eval()
    assert torch.equal(plan(x), net[0](x))


def test_a_plan_of_parameters_has_forms_on_a_worker(make_worker):
    bob = make_worker("bob")
    fc = nn.Linear(3, 2)
    plan = planrt.func2plan()(fc).build(torch.zeros(4, 3))
    there, x = plan.send(bob), torch.randn(2, 5, 3)
    assert torch.equal(there(x.send(bob)).get(), fc(x))
    with torch.no_grad():
        fc.weight.mul_(2)  # what is there now stands for other values
    wide = torch.randn(1, 2, 5, 3).send(bob)
    with pytest.raises(
        PlanArgumentError, match="a state of its own, apart from what is on worker 'bob'.*args_shape"
    ):
        there(wide)


def test_a_plan_that_writes_to_its_state_has_no_forms_on_a_worker(make_worker):
    bob = make_worker("bob")
    net = Net().build(torch.zeros(4, 3))
    there = net.send(bob)
    with pytest.raises(PlanArgumentError, match="a state of its own"):
        there(torch.randn(2, 5, 3).send(bob))
    there(torch.zeros(4, 3).send(bob))
    assert there.get().calls == 1


def test_strict_plans_and_plans_without_code_say_what_to_write(make_worker, tmp_path):
    bob = make_worker("bob")
    loose = planrt.func2plan()(lambda x: x + 1).build(torch.zeros(2))
    strict = planrt.func2plan(strict=True)(lambda x: x + 1).build(torch.zeros(2))
    late = planrt.func2plan()(lambda x: x + 1).build(torch.zeros(2), strict=True)
    loose.save(tmp_path / "f.plan")
    loaded, (found,) = planrt.load_plan(tmp_path / "f.plan"), (loose.tag("#f").send(bob) and bob.search("#f"))
    x = torch.zeros(2, 2)
    for plan, why in ((strict, "It is strict"), (late, "It is strict"), (loaded, "without its Python code")):
        with pytest.raises(
            PlanArgumentError, match=rf"wanted float32\[\*\], got float32\[2, 2\].*{why}.*args_shape"
        ):
            plan(x)
    for plan in (strict, loaded):
        with pytest.raises(PlanArgumentError, match=r"args_shape=\[\(-1,\)\]"):
            plan.send(bob)(x.send(bob))
    with pytest.raises(PlanArgumentError, match=r"came from a worker.*args_shape=\[\(-1,\)\]"):
        found(x.send(bob))


def test_what_the_function_does_not_take_is_told_with_its_reason(make_worker):
    bob = make_worker("bob")
    net = planrt.Plan(nn.Linear(3, 2)).build(torch.zeros(4, 3))
    for call in (lambda: net(torch.zeros(4, 5)), lambda: net.send(bob)(torch.zeros(4, 5).send(bob))):
        with pytest.raises(
            PlanArgumentError, match=r"wanted float32\[\*, 3\], got float32\[4, 5\].*cannot be recorded.*mat1"
        ):
            call()
    assert torch.equal(net(torch.zeros(1, 3)), net._function(torch.zeros(1, 3)))


def test_structure_and_constants_are_no_sizes():
    f = planrt.func2plan()(lambda x, n=2.0: x * n).build(torch.zeros(2))
    with pytest.raises(PlanArgumentError, match="fixed at 2.0"):
        f(torch.zeros(2), 3.0)
    with pytest.raises(PlanArgumentError, match="is a tensor, got list"):
        f([1.0])


def test_a_plan_in_a_plan_takes_other_sizes():
    inner = planrt.func2plan(args_shape=[(2,)])(lambda x: x * 2)
    outer = planrt.func2plan()(lambda x: inner(x) + 1).build(torch.zeros(3, 4))
    assert torch.equal(outer(torch.ones(5, 4)), torch.full((5, 4), 3.0))


def test_args_shape_of_nothing_builds_later():
    @planrt.func2plan(args_shape=())
    def f(x):
        return x + 1

    assert not f.is_built
    assert f(torch.ones(2)).tolist() == [2.0, 2.0]
    assert f.build(torch.zeros(2)).is_built


def test_a_form_is_approved_by_itself(make_worker):
    """A worker knows a form by its own hash."""
    bob = make_worker("bob")
    plan = planrt.func2plan()(lambda x: x + 1).build(torch.zeros(2))
    there = plan.send(bob)
    there(torch.zeros(2, 3).send(bob)).get()
    (form,) = plan._forms.values()
    assert form.hash != plan.hash
    assert form.record.hash != plan.record.hash
    assert form.send(bob).hash == form.hash
