"""Running plans: argument checks, failures that name the op, memory, grad mode."""

import gc
import weakref

import pytest
import torch

from planrt.errors import ExecutionError, PlanArgumentError, PlanError
from planrt.plans import Graph, Op, trace
from planrt.plans.ir import ops
from planrt.plans.running.interpreter import PeerRequest, execute, run
from planrt.types import Ref, TensorSpec

X = torch.randn(2, 3)


def plan_of(*steps, outputs, inputs=1):
    spec = TensorSpec((-1, 3), torch.float32)
    return Graph((spec,) * inputs, (), tuple(steps), outputs, input_names=("x", "y")[:inputs], name="p")


def test_run_is_a_generator_that_returns_the_outputs():
    execution = run(plan_of(Op("Tensor.neg", (Ref(0),), {}, Ref(1)), outputs=Ref(1)), [X], [])
    with pytest.raises(StopIteration) as done:
        next(execution)
    assert torch.equal(done.value.value, -X)


def test_an_op_that_needs_a_peer_is_asked_for_and_answered(monkeypatch):
    monkeypatch.setattr(ops, "PEER_OPS", frozenset({"Tensor.neg"}))
    plan = plan_of(
        Op("Tensor.neg", (Ref(0),), {}, Ref(1)), Op("Tensor.add", (Ref(1), 1), {}, Ref(2)), outputs=Ref(2)
    )
    execution = run(plan, [X], [])
    request = next(execution)
    assert isinstance(request, PeerRequest)
    assert request.op == "Tensor.neg"
    assert request.args[0] is X
    with pytest.raises(StopIteration) as done:
        execution.send(X * 10)
    assert torch.equal(done.value.value, X * 10 + 1)
    with pytest.raises(PlanError, match="needs another worker"):
        execute(plan, [X])


def test_a_failing_op_is_named_with_its_place_and_line():
    plan = plan_of(
        Op("Tensor.neg", (Ref(0),), {}, Ref(1)),
        Op("torch.matmul", (Ref(1), Ref(0)), {}, Ref(2)),
        outputs=Ref(2),
    )
    with pytest.raises(
        ExecutionError, match=r"op 1 of plan 'p' failed: _2 = torch.matmul\(_1, _0\): .*mat1"
    ) as e:
        execute(plan, [X])
    assert (e.value.op, e.value.index, e.value.line) == ("torch.matmul", 1, "_2 = torch.matmul(_1, _0)")
    assert isinstance(e.value.__cause__, RuntimeError)


def test_a_failing_op_of_a_traced_plan_names_the_users_line():
    def f(x, y):
        return x[:, y]

    plan = trace(f, [X, torch.tensor([0])])
    with pytest.raises(ExecutionError, match=rf"traced at {__file__}:\d+\)"):
        execute(plan, [X, torch.tensor([9])])


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (Op("Tensor.chunk", (Ref(0), 2), {}, (Ref(1), Ref(2), Ref(3))), "gave 2 results where .* expects 3"),
        (Op("Tensor.neg", (Ref(0),), {}, (Ref(1), Ref(2))), "gave 1 results where the plan expects 2"),
        (Op("operator.add", (Ref(0), 1), {}, Ref(1)), "takes sizes, not tensors"),
        (Op("operator.mul", (2**40, 2**40), {}, Ref(1)), "left the 64-bit range"),
        (Op("operator.floordiv", (1, 0), {}, Ref(1)), "zero"),
        (Op("torch.zeros", (2**50,), {}, Ref(1)), "memory"),
        (Op("torch.add", (Ref(0),), {"nonsense": 1}, Ref(1)), "torch.add"),
        (Op("torch.set_grad_enabled", (), {}, None), "set_grad_enabled"),
        (Op("Tensor.T", (1,), {}, Ref(1)), "T"),
        (Op("Tensor.add", (), {}, Ref(1)), "add"),
    ],
)
def test_ops_of_a_hostile_plan_fail_as_execution_errors(op, reason):
    with pytest.raises(ExecutionError, match=reason):
        execute(plan_of(op, outputs=Ref(0)), [X])
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([X], r"takes 2 inputs \(x, y\), got 1"),
        ([X, X, X], r"takes 2 inputs \(x, y\), got 3"),
        ([X, X.double()], r"y of plan 'p': wanted float32\[\*, 3\], got float64\[2, 3\]"),
        ([X, X.T], r"y of plan 'p': wanted float32\[\*, 3\], got float32\[3, 2\]"),
        ([X[0], X], r"x of plan 'p': wanted float32\[\*, 3\], got float32\[3\]"),
        ([X, 3.0], r"y of plan 'p': wanted a tensor float32\[\*, 3\], got float"),
    ],
)
def test_arguments_that_do_not_fit(inputs, message):
    plan = plan_of(Op("torch.add", (Ref(0), Ref(1)), {}, Ref(2)), outputs=Ref(2), inputs=2)
    with pytest.raises(PlanArgumentError, match=message):
        execute(plan, inputs)
    with pytest.raises(ValueError, match=message):
        run(plan, inputs, [])


def test_state_that_is_missing():
    weight = torch.randn(3)
    plan = Graph.from_bytes(trace(lambda x: x * weight, [X], notice=False).to_bytes())
    with pytest.raises(PlanError, match="came without its 1 state tensors"):
        execute(plan, [X])
    with pytest.raises(PlanArgumentError, match="has 1 state tensors, got 0"):
        execute(plan, [X], [])
    assert torch.equal(execute(plan, [X], [weight]), X * weight)


def test_values_are_freed_after_their_last_use(monkeypatch):
    made = []

    def watched(x):
        result = torch.neg(x)
        made.append(weakref.ref(result))
        if len(made) == 3:
            gc.collect()
            assert made[0]() is None
            assert made[1]() is x
        return result

    monkeypatch.setitem(ops.TABLE, "torch.neg", watched)
    steps = [Op("torch.neg", (Ref(index),), {}, Ref(index + 1)) for index in range(3)]
    execute(plan_of(*steps, outputs=Ref(3)), [X])
    assert len(made) == 3


def test_the_grad_mode_is_put_back_after_a_failure():
    plan = plan_of(
        Op("torch.set_grad_enabled", (False,), {}, None),
        Op("torch.matmul", (Ref(0), Ref(0)), {}, Ref(1)),
        outputs=Ref(1),
    )
    with pytest.raises(ExecutionError):
        execute(plan, [X])
    assert torch.is_grad_enabled()


def test_gradients_flow_to_inputs_and_state():
    weight = torch.randn(3, requires_grad=True)
    plan = trace(lambda x: (x * weight).sum(), [X], notice=False)
    x, w = X.clone().requires_grad_(), weight.detach().clone().requires_grad_()
    execute(plan, [x, w][:1], [w]).backward()
    torch.testing.assert_close(x.grad, w.detach().expand(2, 3))
    torch.testing.assert_close(w.grad, X.sum(0))
