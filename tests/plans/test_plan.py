"""`@func2plan`: building, calling and printing functions as plans."""

import pytest
import torch
from torch import nn

from planrt.errors import ExecutionError, PlanArgumentError, PlanError, TraceError
from planrt.plans import Graph, Plan, func2plan
from planrt.plans.interpreter import execute


@func2plan(args_shape=[(-1, 1)])
def add_two(x):
    """Adds two."""
    return x + 1 + 1


def test_built_at_once_from_shapes_with_free_sizes():
    assert add_two.is_built
    for size in (1, 2, 7):
        x = torch.randn(size, 1)
        assert torch.equal(add_two(x), x + 1 + 1)
    with pytest.raises(
        PlanArgumentError, match=r"x of plan 'add_two': wanted float32\[\*, 1\], got float32\[1, 2\]"
    ):
        add_two(torch.ones(1, 2))


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
    f = func2plan()(lambda x, w: x @ w)
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
        ([], r"f takes 2 arguments \(x, y\), got 0 shapes"),
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
