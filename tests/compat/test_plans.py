"""What programs of PySyft 0.2 expect of plans, in its calls."""

from __future__ import annotations

import copy

import pytest
import syft as sy
import torch
import torch.nn.functional as F
from syft.serde.serde import deserialize, serialize
from torch import nn, optim

from planrt.errors import GetNotPermittedError, LocalError, PlanArgumentError


def plan_abs(**options):
    return sy.func2plan(**{"args_shape": [(1,)], **options})(lambda data: data.abs())


class Net(sy.Plan):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(2, 3)
        self.fc2 = nn.Linear(3, 1)

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = self.fc2(x)
        return F.log_softmax(x, dim=0)


# -------------------------------------------------------------------------------------------------- building


def test_built_with_its_shapes():
    plan = plan_abs()
    assert isinstance(plan, sy.Plan)
    assert plan.is_built
    assert len(plan.readable_plan) > 0
    assert isinstance(str(plan), str)


@pytest.mark.parametrize("shapes", [(), None])
def test_built_later(shapes):
    plan = plan_abs(args_shape=shapes)
    assert not plan.is_built
    plan.build(torch.tensor([-1]))
    assert plan.is_built
    assert plan(torch.tensor([-3])).tolist() == [3]


def test_built_for_any_size():
    plan = plan_abs(args_shape=[(-1, 1)])
    for rows in (1, 2, 7):
        assert torch.equal(plan(-torch.ones(rows, 1)), torch.ones(rows, 1))


def test_shapes_may_come_first():
    @sy.func2plan([(1, 3)])
    def plan_double_abs(x):
        x = x + x
        return torch.abs(x)

    assert plan_double_abs.is_built
    assert plan_double_abs(torch.tensor([[-2.0, 2.0, 2.0]])).tolist() == [[4, 4, 4]]


@pytest.mark.parametrize("shapes", [[(1, -20)], [("a",)], [(1,), (1,)], [3]])
def test_shapes_that_are_none(shapes):
    with pytest.raises(ValueError, match="shape"):
        plan_abs(args_shape=shapes)


def test_a_plan_that_is_not_built_is_not_sent(bob):
    plan = plan_abs(args_shape=())
    with pytest.raises(RuntimeError, match="not built"):
        plan.send(bob)


# ------------------------------------------------------------------------------------------------ calling here


@pytest.mark.parametrize(
    "x", [torch.tensor([-1, 2]), torch.tensor([[-1.5]]), torch.tensor(-2.0), torch.ones(3, 2, 1)]
)
def test_called_with_other_sizes_ranks_and_dtypes(x):
    """`torch.compile` and `jax.jit` take these too."""
    assert torch.equal(plan_abs()(x), x.abs())


def test_an_input_that_is_the_output_and_one_that_is_not_used():
    @sy.func2plan(args_shape=[(1,)])
    def ambiguous(x):
        x = x + x
        y = x * 2  # noqa: F841
        return x

    assert ambiguous(torch.tensor([2.3])).item() == pytest.approx(4.6)


def test_which_of_its_inputs_it_gives(bob):
    first, second = sy.func2plan()(lambda x, y: x), sy.func2plan()(lambda x, y: y)
    for plan, expected in ((first, [-1, 2]), (second, [1, -2])):
        plan.build(torch.tensor([1.0, -2.0]), torch.tensor([1, 2]))
        inputs = torch.tensor([-1, 2.0]).send(bob), torch.tensor([1, -2.0]).send(bob)
        assert plan.send(bob)(*inputs).get().tolist() == expected


def test_several_outputs(bob):
    @sy.func2plan(args_shape=[(4,)])
    def halves(x):
        first, second = x.split(2)
        return first + 1, second

    assert [one.tolist() for one in halves(torch.arange(4.0))] == [[1, 2], [2, 3]]
    first, second = halves.send(bob)(torch.arange(4.0).send(bob))
    assert (first.get().tolist(), second.get().tolist()) == ([1, 2], [2, 3])


def test_too_few_and_too_many_arguments(bob):
    plan = plan_abs()
    for call in (plan, plan.send(bob)):
        for given in ((), (torch.ones(1), torch.ones(1))):
            with pytest.raises(PlanArgumentError):
                call(*given)


def nesting(inner):
    def outer(x):
        return inner(x) + 1

    return outer


def test_a_plan_in_a_plan_built_or_not():
    @sy.func2plan()
    def not_built(data):
        return data.abs()

    for inner in (plan_abs(), not_built):
        outer = sy.func2plan(args_shape=[(1,)])(nesting(inner))
        assert outer(torch.tensor([-1.0])).item() == 2


def test_a_class_is_called_more_than_once():
    net = Net()
    net.build(torch.tensor([1.0, 2.0]))
    assert net(torch.tensor([1.0, 2])) == 0
    assert net(torch.tensor([1.0, 2.1])) == 0


# ----------------------------------------------------------------------------------------------- calling there


def test_executed_on_a_worker(bob):
    @sy.func2plan(args_shape=[(1,)])
    def my_plan(data):
        x = data * 2
        y = (x - 2) * 10
        return x + y

    result = my_plan.send(bob)(torch.tensor([-1, 2, 3]).send(bob)).get()
    assert result.tolist() == [-42, 24, 46]


def test_sent_to_one_and_then_to_another(bob, alice):
    plan = plan_abs()
    for worker in (bob, alice):
        assert plan.send(worker)(torch.tensor([-1, 7, 3.0]).send(worker)).get().tolist() == [1, 7, 3]


def test_sent_to_both_at_once(bob, alice):
    pointer = plan_abs().send(bob, alice)
    results = pointer(torch.tensor([-1, 7, 3.0]).send(bob, alice)).get()
    assert [one.tolist() for one in results] == [[1, 7, 3]] * 2


def test_sent_again_it_is_the_same_pointer(bob, alice):
    plan = plan_abs()
    first = plan.send(bob)
    assert plan.send(bob) is first
    assert plan.get_pointers() == {"bob": first}
    both = plan.send(bob, alice)
    assert len(plan.get_pointers()) == 2
    assert [one.location for one in both] == [bob, alice]


def test_sent_again_in_another_mode_it_is_another_pointer(bob):
    plan = sy.Plan(nn.Dropout(0.5)).build(torch.ones(3))
    trains = plan.send(bob)
    plan.eval()
    checks = plan.send(bob)
    assert (trains.training, checks.training) == (True, False)
    assert checks(torch.ones(3).send(bob)).get().tolist() == [1, 1, 1]


def test_a_class_on_two_workers_that_hold_data(bob, alice):
    for worker in (bob, alice):
        torch.tensor([-1, 2.0]).tag("input_data").send(worker)
    net = Net()
    net.build(torch.tensor([1.0, 2.0]))
    for worker in (bob, alice):
        result = net.send(worker)(worker.search("input_data")[0]).get()
        assert isinstance(result, torch.Tensor)
        assert result == torch.tensor([0.0])


def test_trained_here_and_then_sent(bob):
    class Toy(sy.Plan):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(2, 3)
            self.fc2 = nn.Linear(3, 1)

        def forward(self, x):
            return self.fc2(torch.tanh(self.fc1(x)))

    torch.manual_seed(0)
    model = Toy()
    data, target = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor([[0.0], [0], [1], [1]])
    optimizer = optim.SGD(params=model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = ((model(data) - target) ** 2).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.build(data)
    result = model.send(bob)(data.send(bob)).get()
    assert torch.allclose(result, model(data))
    assert not (result == 0).all()


# -------------------------------------------------------------------------------------------------- with state


def with_state():
    @sy.func2plan(args_shape=[(1,)], state=(torch.tensor([1.0]),))
    def foo(x, state):
        (bias,) = state.read()
        return x.abs() + bias

    return foo


def test_state_is_built_in():
    foo = with_state()
    assert foo.is_built
    assert len(foo.state) == 1
    assert foo.state.tensors()[0] is foo.state.read()[0]
    assert foo(torch.tensor([-1.0, 2])).tolist() == [2, 3]


def test_state_without_a_build():
    @sy.func2plan(state=(torch.tensor([1.0]),))
    def foo(x, state):
        (bias,) = state.read()
        return x + bias

    assert foo(torch.tensor([1.0, 2])).tolist() == [2, 3]


def test_state_goes_to_several_workers(bob, alice):
    pointer = with_state().send(bob, alice)
    results = pointer(torch.tensor([-1, 7, 3]).send(bob, alice)).get()
    assert [one.tolist() for one in results] == [[2, 8, 4]] * 2


def test_a_plan_with_state_as_torchscript():
    foo = with_state()
    t = torch.tensor([1.0, 2])
    assert foo.torchscript(t).tolist() == [2, 3]
    traced = torch.jit.trace(foo, (torch.ones(1),))
    assert traced(t).tolist() == [2, 3]


def test_a_class_as_torchscript():
    net = Net()
    net.build(torch.zeros(2))
    x = torch.randn(2)
    assert torch.allclose(net.torchscript(x), net(x))


# ------------------------------------------------------------------------------------------ fetched, serialised


@pytest.mark.parametrize("kind", ["function", "class"])
def test_fetched_by_its_owner(bob, kind):
    if kind == "function":
        plan = with_state()
    else:
        plan = Net()
        plan.build(torch.tensor([1.0, 2.0]))
    pointer = plan.send(bob)
    fetched = plan.owner.fetch_plan(plan.id, bob)
    x = torch.tensor([-1.26, 2.0])
    assert fetched.is_built
    assert torch.equal(
        fetched(x) if kind == "class" else fetched(x[:1]), plan(x if kind == "class" else x[:1])
    )
    assert torch.equal(pointer(x.send(bob)).get(), plan(x))


def test_serialised_and_back():
    @sy.func2plan(args_shape=[(1, 3)])
    def my_plan(data):
        x = data * 2
        y = (x - 2) * 10
        return x + y

    back = deserialize(serialize(my_plan))
    assert back(torch.tensor([[-1.0, 2, 3]])).tolist() == [[-42, 24, 46]]
    with pytest.raises(PlanArgumentError, match="came without its Python code"):
        back(torch.tensor([-1, 2, 3]))


# ------------------------------------------------------------------------------- parameters of a plan that was sent


def built_net():
    torch.manual_seed(0)
    net = Net()
    net.build(torch.tensor([1.0, 2.0]))
    return net


def test_parameters_of_a_sent_plan_are_pointers(bob):
    net = built_net()
    sent = net.send(bob)
    there = sent.parameters()
    assert [one.shape for one in there] == [one.shape for one in net.parameters()]
    for pointer, own in zip(there, net.parameters(), strict=True):
        assert pointer.is_wrapper
        assert pointer.child.location is bob
        assert pointer.requires_grad
        assert torch.equal(pointer.copy().get(), own)
    assert bob.objects_count() == 5
    del there, pointer
    assert bob.objects_count() == 1


def test_a_plan_without_parameters_has_none(bob):
    assert plan_abs().send(bob).parameters() == []
    assert with_state().send(bob).parameters() == []


class Linear(sy.Plan):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        return self.fc(x) * self.scale


def test_a_sent_plan_is_trained_by_its_parameters(bob):
    torch.manual_seed(0)
    plan, x, y = Linear(), torch.randn(8, 2), torch.randn(8, 1)
    plan.build(x)
    twin = nn.Linear(2, 1)
    twin.load_state_dict(plan.fc.state_dict())
    before = plan.fc.weight.detach().clone()
    pointer = plan.send(bob)
    data, target = x.send(bob), y.send(bob)
    optimizer = optim.SGD(pointer.parameters(), lr=0.1)
    local = optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        ((pointer(data) - target) ** 2).mean().backward()
        optimizer.step()
        local.zero_grad()
        ((twin(x) - y) ** 2).mean().backward()
        local.step()
    assert torch.allclose(pointer(data).get(), twin(x), atol=1e-6)
    assert torch.equal(plan.fc.weight, before)
    back = pointer.get()
    assert torch.allclose(dict(back.named_parameters())["fc.weight"], twin.weight, atol=1e-6)


def test_a_plan_that_was_changed_there_is_sent_again(bob):
    plan = Linear()
    plan.build(torch.ones(1, 2))
    first = plan.send(bob)
    with torch.no_grad():
        for one in first.parameters():
            one.zero_()
    again = plan.send(bob)
    x = torch.ones(1, 2)
    assert again.id_at_location != first.id_at_location
    assert first(x.send(bob)).get().tolist() == [[0.0]]
    assert torch.equal(again(x.send(bob)).get(), plan(x))


def test_a_changed_plan_has_no_form_with_the_old_parameters(bob, alice):
    plan = Linear()
    plan.build(torch.ones(1, 2))
    pointer = plan.send(bob)
    with torch.no_grad():
        pointer.parameters()[0].zero_()
    with pytest.raises(PlanArgumentError, match="state of its own"):
        pointer(torch.ones(2).send(bob))
    pointer.move(alice)
    with pytest.raises(PlanArgumentError, match="state of its own"):
        pointer(torch.ones(2).send(alice))


def test_parameters_follow_adam_and_batch_norm(bob):
    class Normed(sy.Plan):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)
            self.fc = nn.Linear(3, 1)

        def forward(self, x):
            return self.fc(self.bn(x))

    torch.manual_seed(0)
    plan, x, y = Normed(), torch.randn(16, 3), torch.randn(16, 1)
    plan.build(x)
    twin = nn.Sequential(copy.deepcopy(plan.bn), copy.deepcopy(plan.fc))
    pointer, data, target = plan.send(bob), x.send(bob), y.send(bob)
    optimizer, local = (optim.Adam(one.parameters(), lr=0.05) for one in (pointer, twin))
    for _ in range(5):
        optimizer.zero_grad()
        ((pointer(data) - target) ** 2).mean().backward()
        optimizer.step()
        local.zero_grad()
        ((twin(x) - y) ** 2).mean().backward()
        local.step()
    back = pointer.get().eval()
    assert torch.allclose(back(x), twin.eval()(x), atol=1e-5)


def test_a_copy_has_parameters_of_its_own(bob):
    plan = Linear()
    plan.build(torch.ones(1, 2))
    pointer = plan.send(bob)
    copied = pointer.copy()
    with torch.no_grad():
        pointer.parameters()[0].zero_()
    x = torch.ones(1, 2)
    assert torch.equal(copied(x.send(bob)).get(), plan(x))
    assert torch.allclose(pointer(x.send(bob)).get(), plan.fc.bias.view(1, 1))
    pointer.parameters()[1].get()
    assert torch.allclose(pointer(x.send(bob)).get(), plan.fc.bias.view(1, 1))


def test_a_plan_that_was_found_has_parameters(bob, me):
    plan = Linear().tag("#net")
    plan.build(torch.ones(1, 2))
    plan.send(bob)
    (found,) = bob.search("#net")
    assert [one.shape for one in found.parameters()] == [(1, 2), (1,)]


def test_parameters_of_a_private_plan_are_not_read(bob):
    plan = Linear()
    plan.build(torch.ones(1, 2))
    pointer = plan.send(bob, private=True)
    with pytest.raises(GetNotPermittedError):
        pointer.parameters()[0].get()
    with pytest.raises(GetNotPermittedError):
        (pointer.parameters()[0] * 2).get()


def test_private_data_written_to_a_parameter_makes_the_plan_private(bob):
    plan = Linear()
    plan.build(torch.ones(1, 2))
    pointer = plan.send(bob)
    secret = torch.full((1, 2), 7.0).send(bob, private=True)
    with torch.no_grad():
        pointer.parameters()[0].copy_(secret)
    with pytest.raises(GetNotPermittedError):
        pointer(torch.ones(1, 2).send(bob)).get()
    with pytest.raises(GetNotPermittedError):
        pointer.get()


def test_parameters_of_a_plan_that_is_gone(bob):
    plan = Linear()
    plan.build(torch.ones(1, 2))
    pointer = plan.send(bob)
    pointer.get()
    with pytest.raises(LocalError, match="used up"):
        pointer.parameters()


# -------------------------------------------------------------------------------------------- methods as plans


class WithMethods(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)

    @sy.method2plan()
    def forward(self, x):
        return self.fc(x)

    @sy.method2plan(args_shape=[(1,)])
    def double(self, x):
        """Twice."""
        return x + x


def test_a_method_is_a_plan(bob):
    net, other = WithMethods(), WithMethods()
    x = torch.randn(3, 2)
    assert isinstance(net.forward, sy.Plan)
    assert not net.forward.is_built
    assert torch.equal(net(x), net.fc(x))
    net.forward.build(x)
    assert net.forward.is_built
    assert not other.forward.is_built
    assert torch.equal(net(x), net.fc(x))
    pointer = net.forward.send(bob)
    assert torch.equal(pointer(x.send(bob)).get(), net.fc(x))
    assert [one.shape for one in pointer.parameters()] == [(1, 2), (1,)]
    assert set(net.state_dict()) == {"fc.weight", "fc.bias"}
    assert len(list(net.parameters())) == 2


def test_a_method_with_shapes_is_built_when_it_is_used(bob):
    net = WithMethods()
    assert net.double.is_built
    assert net.double is net.double
    assert net.double.send(bob)(torch.tensor([1, 2]).send(bob)).get().tolist() == [2, 4]
    assert WithMethods.double.__doc__ == "Twice."
    assert WithMethods.double(net, 3) == 6


def test_a_method_of_a_base_class(bob):
    class Child(WithMethods):
        @sy.method2plan()
        def forward(self, x):
            return super().forward(x) + 1

    net, x = Child(), torch.randn(2, 2)
    net.forward.build(x)
    assert torch.equal(net(x), net.fc(x) + 1)
    assert torch.equal(net.forward.send(bob)(x.send(bob)).get(), net.fc(x) + 1)


def test_the_plan_of_a_copy_is_its_own():
    net, x = WithMethods(), torch.randn(2, 2)
    net.forward.build(x)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.fc.weight.zero_()
        twin.fc.bias.zero_()
    assert twin(x).abs().sum() == 0
    assert torch.equal(net(x), net.fc(x))
    assert net(x).abs().sum() != 0


def test_a_module_with_such_a_method_goes_to_a_worker(bob):
    net, x = WithMethods(), torch.randn(3, 2)
    net.forward.build(x)
    expected = net.fc(x)
    net.send(bob)
    result = net(x.send(bob))
    assert torch.allclose(result.get(), expected)
    with pytest.raises(RuntimeError, match=r"get\(\) the module first"):
        net.forward.send(bob)
    net(x.send(bob)).sum().backward()
    net.get()
    assert net.fc.weight.grad is not None
    assert torch.equal(net(x), expected)


def test_a_plan_of_a_module_that_was_sent(bob):
    module, x = nn.Linear(2, 1), torch.randn(3, 2)
    plan = sy.Plan(module).build(x)
    module.send(bob)
    assert torch.allclose(plan(x.send(bob)).get(), module.get()(x))


def test_an_object_without_attributes():
    class Slotted:
        __slots__ = ()

        @sy.method2plan()
        def double(self, x):
            return x + x

    with pytest.raises(PlanArgumentError, match="__slots__"):
        Slotted().double  # noqa: B018


def test_a_method_follows_the_mode_of_its_module(bob):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        @sy.method2plan(args_shape=[(100,)])
        def forward(self, x):
            return self.drop(x)

    net, x = Dropping(), torch.ones(100)
    assert (net(x) == 0).any()
    net.eval()
    assert torch.equal(net(x), x)
    assert torch.equal(net.forward.send(bob)(x.send(bob)).get(), x)
    net.forward.train()
    assert net.training
    assert (net(x) == 0).any()


def test_a_method_of_an_object_that_is_no_module():
    class Scale:
        def __init__(self, by):
            self.by = by

        @sy.method2plan(args_shape=[(2,)])
        def apply(self, x):
            return x * self.by

    assert Scale(3).apply(torch.ones(2)).tolist() == [3, 3]
    assert Scale(4).apply(torch.ones(2)).tolist() == [4, 4]


def test_what_is_no_method():
    for wrong in (3, "a", Net):
        with pytest.raises(PlanArgumentError, match="method2plan makes a plan of a method"):
            sy.method2plan()(wrong)
    assert sy.method2plan([(1,)])(lambda self, x: x).__get__(WithMethods(), WithMethods).is_built
