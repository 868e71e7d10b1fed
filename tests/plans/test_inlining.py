"""Plans called in functions that are recorded: one plan, with free sizes, no-grad regions, lines and names."""

import pytest
import torch
import torch.nn.functional as F
from nets import line_of
from torch import nn

from planrt.errors import PlanArgumentError, PlanError, TraceError
from planrt.plans import Graph, Op, trace
from planrt.plans.recording.inlining import inline
from planrt.plans.recording.recorder import SizesFixedError
from planrt.plans.recording.traced_run import recording
from planrt.plans.running.interpreter import execute
from planrt.types import Ref, TensorSpec

X = torch.randn(4, 6)
FREE = {"free_dims": [[0]]}


def callable_plan(graph, state=None, name=None):
    """What a plan does when it is called."""
    state = list(graph.state_values) if state is None else state

    def call(*inputs):
        return inline(graph, inputs, state, name=name) if recording() else execute(graph, inputs, state)

    return call


def same(f, graph, sizes=(4, 1, 9)):
    received = Graph.from_bytes(graph.to_bytes())
    for size in sizes:
        x = torch.randn(size, 6)
        state = [tensor.clone() for tensor in graph.state_values or ()]
        torch.testing.assert_close(execute(received, [x.clone()], state), f(x.clone()), rtol=0, atol=0)


def test_ops_become_ops_of_the_outer_plan_and_sizes_stay_free():
    def halves(x):
        n = x.shape[0]
        return x.reshape(n * 3, -1).new_empty(n, 2).add(x.sum() / (n + 1)), n // 2, x.T

    inner = callable_plan(trace(halves, [X], **FREE))

    def f(x):
        assert recording()
        made, half, turned = inner(torch.cat([x, x]))
        return made[: half + 1], torch.zeros(half), turned * 2

    plan = trace(f, [X], **FREE)
    assert not recording()
    same(f_written_out, plan)
    assert "operator.floordiv" in plan.code
    assert "torch.empty" not in plan.code
    assert ".new_empty(" in plan.code
    assert {line.rpartition(":")[0] for line in plan.lines} == {__file__}


def f_written_out(x):
    x = torch.cat([x, x])
    n = x.shape[0]
    return x.new_zeros(n, 2).add(x.sum() / (n + 1))[: n // 2 + 1], torch.zeros(n // 2), x.T * 2


def test_lines_are_those_of_the_inner_function():
    def inner(x):
        return x.relu()  # here

    plan = callable_plan(trace(inner, [X]))

    def outer(x):
        return plan(x) + 1

    assert trace(outer, [X]).lines[0] == line_of(inner)
    received = Graph.from_bytes(trace(inner, [X]).to_bytes())

    def calls(x):
        return inline(received, [x], [])  # here

    assert trace(calls, [X]).lines == (line_of(calls),)


def test_state_has_readable_names_and_what_both_hold_is_one_entry():
    net = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    inner = trace(net, [X], modules=[net], **FREE)
    tensors = dict([*net.named_parameters(), *net.named_buffers()])
    held = [tensors[entry.name] for entry in inner.state]
    call = callable_plan(inner, held, name="encoder")

    def twice(x):
        return call(x) + call(x * 2) + net[0].bias.sum()

    plan = trace(twice, [X], **FREE)
    assert [entry.name for entry in plan.state] == [f"encoder.{entry.name}" for entry in inner.state]
    assert [(entry.kind, entry.requires_grad) for entry in plan.state] == [
        (entry.kind, entry.requires_grad) for entry in inner.state
    ]

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return call(x)

    outer = Outer()
    assert [entry.name for entry in trace(outer, [X], modules=[outer], **FREE).state] == [
        f"net.{name}" for name in outer.net.state_dict()
    ]

    other = callable_plan(inner, [tensor.detach().clone() for tensor in held], name="encoder")
    names = [entry.name for entry in trace(lambda x: call(x) + other(x), [X], **FREE).state]
    assert names[len(held)] == "encoder.0.weight_2"


def test_no_grad_regions_and_random_ops():
    def noisy(x):
        with torch.no_grad():
            scale = x.sigmoid()
        return x * scale + torch.rand(x.shape[0], 1)

    inner = callable_plan(trace(noisy, [X], **FREE))

    def f(x):
        with torch.enable_grad():
            return inner(x) + torch.randn(1)

    plan = trace(f, [X], **FREE)
    for size in (4, 7):
        x = torch.randn(size, 6, requires_grad=True)
        results = []
        for run in (lambda x: execute(plan, [x]), lambda x: noisy(x) + torch.randn(1)):
            torch.manual_seed(3)
            y = run(x)
            results += [y, torch.autograd.grad(y.sum(), x)[0]]
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])


def test_plans_in_plans_in_plans():
    first = callable_plan(trace(lambda x: x * x.shape[0], [X], name="first", **FREE))
    second = callable_plan(trace(lambda x: first(x)[1:] + 1, [X], name="second", **FREE))
    plan = trace(lambda x: second(x) - second(x * 2), [X], **FREE)
    same(lambda x: (x * x.shape[0])[1:] + 1 - ((x * 2 * x.shape[0])[1:] + 1), plan)


def test_a_training_step_inside_another_plan():
    net = nn.Linear(6, 2)

    def step(x):
        net.zero_grad()
        loss = net(x).pow(2).mean()
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad
        return loss

    inner = callable_plan(trace(step, [X], modules=[net], **FREE), list(net.parameters()), name="trainer")

    def two_steps(x):
        return inner(x), inner(x)

    plan = trace(two_steps, [X], **FREE)
    assert [entry.name for entry in plan.state] == ["trainer.weight", "trainer.bias"]
    state = [p.detach().clone() for p in net.parameters()]
    for size in (4, 2):
        x = torch.randn(size, 6)
        assert torch.equal(torch.stack(execute(plan, [x], state)), torch.stack([step(x), step(x)]))
    assert torch.equal(state[0], net.weight)


def test_inputs_that_do_not_fit_the_inner_plan():
    fixed = callable_plan(trace(lambda x: x + 1, [X], name="fixed"))
    with pytest.raises(
        PlanArgumentError, match=r"of plan 'fixed': wanted float32\[4, 6\], got float32\[6, 4\]"
    ):
        trace(lambda x: fixed(x.T), [X])
    with pytest.raises(SizesFixedError, match=r"wanted float32\[4, 6\], got float32\[8, 6\]"):
        trace(fixed, [X], **FREE)


def test_an_op_of_the_inner_plan_that_fails_is_named_with_its_line():
    def inner(x, y):
        return x @ y  # here

    plan = callable_plan(trace(inner, [X, X.T], name="product", free_dims=[[0, 1], [0, 1]]))
    with pytest.raises(
        TraceError, match=r"plan 'product', called in the function, failed: op 0 .*matmul"
    ) as caught:
        trace(lambda x: plan(x, x), [X])
    assert caught.value.line == line_of(inner)


def test_building_a_plan_while_another_is_recorded():
    def f(x):
        trace(lambda y: y + 1, [x])  # here
        return x

    with pytest.raises(
        TraceError, match="cannot be built while another one is recorded: build it before"
    ) as caught:
        trace(f, [X])
    assert caught.value.line == line_of(f)
    assert not recording()
    trace(lambda y: y + 1, [X])


def test_there_is_nothing_to_inline_into():
    with pytest.raises(PlanError, match="no plan is being recorded"):
        inline(trace(F.relu, [X]), [X], [])


def test_a_plan_from_anyone_runs_under_a_recorder_as_it_does_without():
    spec = TensorSpec((-1, 6), torch.float32)
    hostile = Graph((spec,), (), (Op("Tensor.mul", (Ref(0), "text"), {}, Ref(1)),), Ref(1), name="hostile")
    with pytest.raises(TraceError, match="plan 'hostile', called in the function, failed: op 0"):
        trace(callable_plan(hostile, []), [X])
