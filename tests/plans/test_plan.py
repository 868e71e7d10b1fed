"""`@func2plan`: building, calling and printing functions as plans."""

import contextlib

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from planrt.errors import ExecutionError, PlanArgumentError, PlanError, PlanFormatError, TraceError
from planrt.plans import Graph, Plan, func2plan
from planrt.plans.ir.record import PlanRecord
from planrt.plans.running.interpreter import execute


@func2plan(args_shape=[(-1, 1)])
def add_two(x):
    """Adds two."""
    return x + 1 + 1


def test_built_at_once_from_shapes_with_free_sizes():
    assert add_two.is_built
    for size in (1, 2, 7):
        x = torch.randn(size, 1)
        assert torch.equal(add_two(x), x + 1 + 1)
    strict = func2plan(args_shape=[(-1, 1)], strict=True)(lambda x: x + 1)
    with pytest.raises(
        PlanArgumentError, match=r"x of plan .*: wanted float32\[\*, 1\], got float32\[1, 2\]"
    ):
        strict(torch.ones(1, 2))


def test_not_built_until_build_is_called():
    @func2plan()
    def f(x, y):
        return x @ y.T

    assert not f.is_built
    assert str(f) == f"<Plan f id:{f.id} owner:me not built: call f.build(...)>"
    assert torch.equal(f(torch.ones(1, 2), torch.ones(3, 2)), torch.full((1, 3), 2.0))  # as written
    for use in (
        lambda: f.hash,
        lambda: f.code,
        lambda: f.graph,
        lambda: f.torchscript,
    ):
        with pytest.raises(PlanError, match=r"plan 'f' is not built: call f\.build\(\.\.\.\)"):
            use()
    assert f.build(torch.ones(2, 3), torch.ones(4, 3)) is f
    assert f.is_built
    x, y = torch.randn(5, 3), torch.randn(2, 3)
    assert torch.equal(f(x, y), x @ y.T)


def test_printing_a_built_plan():
    assert str(add_two).splitlines() == [
        f"<Plan add_two id:{add_two.id} owner:me built>",
        f"plan add_two sha256:{add_two.hash}",
        "  # Adds two.",
        "  _0: input x float32[*, 1]",
        "  _1 = _0.add(1)",
        "  _2 = _1.add(1)",
        "  return _2",
    ]
    assert add_two.code == "_1 = _0.add(1)\n_2 = _1.add(1)\nreturn _2"
    assert (add_two.name, add_two.__doc__) == ("add_two", "Adds two.")
    assert add_two.graph.doc == "Adds two."


def test_sizes_are_those_of_the_examples_where_the_function_needs_them():
    f = func2plan(strict=True)(lambda x, w: x @ w)
    f.build(torch.ones(2, 3), torch.ones(3, 4))
    assert f(torch.ones(5, 3), torch.ones(3, 4)).shape == (5, 4)  # the first one's batch is free
    with pytest.raises(PlanArgumentError):
        f(torch.ones(5, 3), torch.ones(3, 9))
    f.build(torch.ones(2, 3), torch.ones(3, 4), free_dims=[[0], [-1]])
    assert f(torch.ones(5, 3), torch.ones(3, 9)).shape == (5, 9)


def test_scalars_and_results_of_any_nesting():
    f = func2plan()(lambda x, scale: {"a": (x * scale, [scale])}).build(torch.ones(2), torch.tensor(3.0))
    assert f(torch.ones(5), torch.tensor(2.0))["a"][0].tolist() == [2.0] * 5


def test_as_a_plain_call_and_on_a_module():
    net = nn.Linear(3, 2)
    f = func2plan(args_shape=[(-1, 3)])(net)
    x = torch.randn(4, 3)
    assert torch.equal(f(x), net(x))
    assert [entry.name for entry in f.graph.state] == ["weight", "bias"]
    assert isinstance(f, Plan)


def test_the_plan_travels_as_bytes():
    plan = Graph.from_bytes(add_two.graph.to_bytes())
    assert plan.hash == add_two.hash
    assert execute(plan, [torch.zeros(3, 1)]).tolist() == [[2.0]] * 3


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1,)], r"f takes 2 arguments \(x, y\), got 1 shapes"),
        ([(1,), (1,), (1,)], "got 3 shapes"),
        ([(1,), (-2,)], r"\(-2,\) is not a shape for argument y"),
        ([(1.5,), (1,)], "is not a shape for argument x"),
        ([(True,), (1,)], "is not a shape for argument x"),
    ],
)
def test_shapes_that_are_wrong(shapes, message):
    with pytest.raises(PlanArgumentError, match=message):
        func2plan(args_shape=shapes)(_f)
    with pytest.raises(ValueError, match=message):
        func2plan(args_shape=shapes)(_f)


def _f(x, y):
    return x + y


_f.__name__ = "f"


def test_shapes_that_the_function_cannot_take():
    with pytest.raises(ValueError, match=r"could not be built with args_shape .* check the shapes"):
        func2plan(args_shape=[(2, 3), (4, 5)])(_f)
    with pytest.raises(TraceError, match="free sizes"):
        func2plan(args_shape=[(-1, 3), (2, 3)])(_f)


def test_examples_that_are_wrong():
    f = func2plan()(_f)
    with pytest.raises(PlanArgumentError, match=r"f takes \(x, y\), got 1: missing a required argument: 'y'"):
        f.build(torch.ones(1))
    with pytest.raises(
        PlanArgumentError, match="f: y is a set: plans take tensors, modules, numbers, strings"
    ):
        f.build(torch.ones(1), {2.0})
    with pytest.raises(TraceError, match=r"free_dims \(1,\) of example argument 1, which is 1-d"):
        f.build(torch.ones(1), torch.ones(1), free_dims=[[0], [1]])
    with pytest.raises(TraceError, match="free_dims has 1 entries for 2"):
        f.build(torch.ones(1), torch.ones(1), free_dims=[[0]])
    assert not f.is_built


def test_a_function_of_any_number_of_arguments():
    f = func2plan()(lambda *xs: torch.stack(xs).sum(0)).build(torch.ones(2), torch.ones(2))
    assert f(torch.ones(4), torch.ones(4)).tolist() == [2.0] * 4


def test_errors_while_running_say_where():
    f = func2plan()(lambda x, index: x[index]).build(torch.ones(3), torch.tensor([0]))
    with pytest.raises(ExecutionError, match="traced at"):
        f(torch.ones(3), torch.tensor([7]))


# -------------------------------------------------------------------------------------------- class plans


class Net(Plan):
    """A small network."""

    def __init__(self, width=3):
        super().__init__()
        self.fc = nn.Linear(2, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.fc(x).relu())


def test_a_class_plan_is_a_module():
    net, x = Net(), torch.randn(4, 2)
    assert isinstance(net, nn.Module)
    assert not net.is_built
    assert "not built: call Net.build(...)" in str(net)
    net.eval()
    before = net(x)  # as a module
    assert net.build(torch.zeros(1, 2)) is net
    assert [(entry.name, entry.kind) for entry in net.graph.state] == [
        ("fc.weight", "parameter"),
        ("fc.bias", "parameter"),
    ]
    assert torch.equal(net(x), before)
    assert net.record.doc == "A small network."
    assert f"<Plan Net id:{net.id} owner:me built>" in str(net)


def test_a_plan_follows_its_mode_and_its_parameters():
    net, x = Net().build(torch.zeros(1, 2)), torch.randn(64, 2)
    assert net.record.training != net.record.evaluation
    assert (net(x) == 0).float().mean() > (net.eval()(x) == 0).float().mean()
    with torch.no_grad():
        net.fc.weight.zero_()
        net.fc.bias.fill_(2.0)
    assert (net(x) == 2.0).all()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    net(x).sum().backward()
    optimizer.step()
    assert (net(x) == 0.0).all()  # 2 - 64


def test_a_plan_that_its_other_mode_cannot_be_recorded_in():
    class Normed(Plan):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x)

    plan = Normed().eval()
    plan.build(torch.ones(1, 2), free_dims=[[]])  # a batch of one: batch norm cannot train on that
    assert plan(torch.ones(1, 2)).shape == (1, 2)
    with pytest.raises(
        PlanError, match="could be recorded in evaluation mode only, and this is training mode"
    ):
        plan.train()(torch.ones(1, 2))


def test_the_modes_of_single_modules_are_recorded_as_they_are():
    class Frozen(Plan):
        def __init__(self):
            super().__init__()
            self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(self.drop(x))

    plan = Frozen()
    plan.norm.eval()
    plan.build(torch.ones(2, 2))
    plan(torch.randn(8, 2) + 5)
    assert plan.norm.num_batches_tracked == 0
    assert plan.drop.training
    assert not plan.norm.training  # building put everything back


def test_a_copy_has_a_state_of_its_own():
    net = Net().eval().build(torch.zeros(1, 2))
    other, x = net.copy(), torch.randn(2, 2)
    assert torch.equal(other(x), net(x))
    assert other.hash == net.hash
    assert other.state_hash == net.state_hash
    with torch.no_grad():
        other.fc.bias.add_(1)
    assert other.state_hash != net.state_hash
    assert not torch.equal(other(x), net(x))


def test_torchscript_has_the_state_of_now():
    net = Net().eval().build(torch.zeros(1, 2))
    with torch.no_grad():
        net.fc.weight.mul_(3)
    x = torch.randn(5, 2)
    assert torch.equal(net.torchscript(x), net(x))


def test_a_function_with_state():
    @func2plan(args_shape=[(-1, 2)], state=(torch.tensor([1.0, 2.0]), torch.nn.Parameter(torch.tensor(3.0))))
    def scaled(x, state):
        shift, scale = state.read()
        return (x + shift) * scale

    x = torch.ones(3, 2)
    assert torch.equal(scaled(x), (x + torch.tensor([1.0, 2.0])) * 3)
    assert [(entry.name, entry.kind) for entry in scaled.graph.state] == [
        ("state.1", "parameter"),
        ("state.0", "buffer"),
    ]
    scaled(x).sum().backward()
    assert scaled.state.read()[1].grad.item() == 15.0
    scaled.state.read()[0].zero_()
    assert torch.equal(scaled(x).detach(), x * 3)


@pytest.mark.parametrize("name", ["state", "s"])
def test_the_argument_that_takes_the_state(name):
    functions = {
        "state": lambda x, state, y: x + state.read()[0] + y,
        "s": lambda x, y, s: x + s.read()[0] + y,
    }
    plan = func2plan(functions[name], state=[torch.ones(1)]).build(torch.ones(2), torch.ones(2))
    assert plan(torch.ones(2), torch.ones(2)).tolist() == [3.0, 3.0]


def test_state_that_is_no_tensor_or_has_no_place():
    with pytest.raises(PlanArgumentError, match=r"state holds tensors, not int \(item 1\)"):
        func2plan(lambda x, state: x, state=(torch.ones(1), 2))
    with pytest.raises(PlanArgumentError, match="has state, and no argument to take it"):
        func2plan(lambda: torch.ones(1), state=(torch.ones(1),)).build()


def test_plain_calls_and_things_that_are_no_functions():
    assert func2plan(lambda x: x + 1, args_shape=[(2,)])(torch.ones(2)).tolist() == [2.0, 2.0]
    with pytest.raises(PlanArgumentError, match="makes a plan of a function, not of int"):
        func2plan(3)
    with pytest.raises(PlanError, match="plan 'empty' has no forward"):
        Plan(name="empty").build(torch.ones(1))


def test_optional_arguments_with_shapes():
    def f(x, y=None, *, scale=2):
        return x * scale if y is None else x * scale + y

    assert func2plan(f, args_shape=[(2,)])(torch.ones(2)).tolist() == [2.0, 2.0]
    both = func2plan(f, args_shape=[(2,), (2,)])
    assert both(torch.ones(2), torch.ones(2)).tolist() == [3.0, 3.0]
    assert both(torch.ones(2), y=torch.ones(2)).tolist() == [3.0, 3.0]
    with pytest.raises(PlanArgumentError, match="was built with a tensor for 'y': pass one"):
        both(torch.ones(2))
    with pytest.raises(PlanArgumentError, match="got 3: too many positional arguments"):
        func2plan(f, args_shape=[(2,), (2,), (2,)])


def test_two_plans_of_one_function_are_equal_and_states_are_told_apart():
    one, other = (func2plan(lambda x: x * 2, args_shape=[(-1,)]) for _ in range(2))
    assert one.hash == other.hash
    assert one.id != other.id
    assert Net().build(torch.zeros(1, 2)).state_hash != Net().build(torch.zeros(1, 2)).state_hash


def test_the_record_travels_as_bytes():
    net = Net().build(torch.zeros(1, 2))
    record = PlanRecord.from_bytes(net.record.to_bytes())
    assert record.hash == net.record.hash
    back = Plan.from_record(record, [tensor.clone() for tensor in net.state_tensors()])
    assert back.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(back.eval()(torch.ones(1, 2)), net.eval()(torch.ones(1, 2)))
    assert (back.name, back.__doc__) == ("Net", "A small network.")
    Net().load_state_dict(back.state_dict())
    with pytest.raises(PlanArgumentError, match="x of plan 'Net' is a tensor, got int"):
        back(3)


DATA = Net().build(torch.zeros(1, 2)).record.to_bytes()


@given(position=st.integers(0, len(DATA) - 1), value=st.integers(0, 255))
def test_altered_records_are_refused_or_harmless(position, value):
    altered = DATA[:position] + bytes([value]) + DATA[position + 1 :]
    with contextlib.suppress(PlanError):
        assert PlanRecord.from_bytes(altered).to_bytes() == altered


def test_truncated_records_and_newer_ones():
    for end in range(len(DATA)):
        with pytest.raises(PlanFormatError):
            PlanRecord.from_bytes(DATA[:end])
    with pytest.raises(PlanFormatError, match="format 2, newer than 1: update planrt"):
        PlanRecord.from_bytes(msgpack.packb(["planrt-record", 2]))
