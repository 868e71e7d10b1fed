"""Ops whose kernels trust their callers are checked first, wherever they run: here, in plans, on workers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planrt
from planrt.errors import ExecutionError, OpNotAllowedError, PlanrtError
from planrt.plans import Graph, Op
from planrt.plans.ir import ops
from planrt.plans.ir.guards import GUARDS
from planrt.plans.running.interpreter import execute
from planrt.types import Ref, TensorSpec, leaves, map_leaves

LEAST, MINUS_ONE = torch.full((4,), -(2**63)), torch.full((4,), -1)

HOSTILE = {
    "norms from behind the weight": ("torch._weight_norm", (torch.ones(6), torch.tensor(1.0)), {}),
    "bags whose offsets go down": (
        "nn.functional.embedding_bag",
        (torch.tensor([1, 5, 4, 5, 9]), torch.ones(10, 5), torch.tensor([0, 0, 1, 0])),
        {"mode": "sum"},
    ),
    "bags without offsets": (
        "nn.functional.embedding_bag",
        (torch.tensor([4, 1, 1]), torch.ones(5, 5), torch.zeros(0, dtype=torch.int64)),
        {},
    ),
    "bags whose offsets are a matrix": (
        "torch.embedding_bag",
        (torch.ones(7, 2), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)),
        {},
    ),
    "empty bags whose offsets are a matrix": (
        "torch.embedding_bag",
        (torch.ones(7, 0), torch.zeros(7, 0, dtype=torch.int64), torch.zeros(7, 0, dtype=torch.int64)),
        {},
    ),
    **{
        f"places that are {what}, {padding}": (
            "nn.functional.grid_sample",
            (torch.ones(2, 3, 5, 20), torch.full((2, 13, 10, 2), float(what))),
            {"padding_mode": padding, "align_corners": False},
        )
        for what in ("inf", "-inf", "nan", "1e30")
        for padding in ("border", "reflection")
    },
    "multiples of the least integer": ("Tensor.lcm", (torch.tensor([-8, -(2**63)]), torch.tensor(5)), {}),
    "divisors of the least integer": ("torch.gcd", (torch.tensor([-(2**63)]), torch.tensor([5])), {}),
    "random numbers from the largest one on": ("Tensor.random_", (torch.zeros(3), 2**63 - 1, None), {}),
    **{
        f"eigenvalues of what is {what}": ("linalg.eigvals", (torch.full((5, 5), float(what)),), {})
        for what in ("nan", "inf")
    },
    **{
        f"the largest step, of a convolution in {dims} dimensions": (
            f"nn.functional.conv{dims}d",
            (torch.ones(1, 1, *[4] * dims, requires_grad=True), torch.ones(1, 1, *[4] * dims)),
            {"stride": 2**31 - 1},
        )
        for dims in (2, 3)
    },
    "counts that are no numbers": (
        "torch.binomial",
        (torch.tensor([3.0, float("nan")]), torch.tensor([0.5, 0.1])),
        {},
    ),
    "fewer values than keys": (
        "nn.functional.scaled_dot_product_attention",
        (torch.ones(4, 3, 8), torch.ones(4, 6, 8), torch.ones(4, 4, 8)),
        {},
    ),
    "longer keys than queries": (
        "nn.functional.scaled_dot_product_attention",
        (torch.ones(4, 3, 4), torch.ones(4, 6, 8), torch.ones(4, 6, 8)),
        {},
    ),
    "groups without heads": (
        "nn.functional.scaled_dot_product_attention",
        (torch.ones(4, 3, 8), torch.ones(0, 6, 8), torch.ones(4, 6, 8)),
        {"enable_gqa": True},
    ),
    "distances between no rows": ("nn.functional.pdist", (torch.zeros(0, 1),), {}),
    "norms of nothing": ("torch._weight_norm", (torch.zeros(0), torch.zeros(1, 3)), {}),
    "norms along a dimension that is not there": (
        "torch._weight_norm",
        (torch.ones(6), torch.ones(1), 7),
        {},
    ),
    "an unknown mode": (
        "torch.grid_sampler_3d",
        (torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 9, 1, 1, 3), -1, 0, False),
        {},
    ),
    "an unknown mode, flat": (
        "torch.grid_sampler_2d",
        (torch.ones(1, 1, 1, 1), torch.zeros(1, 9, 1, 2), 7, 0, False),
        {},
    ),
    "an unknown padding": (
        "torch.grid_sampler",
        (torch.ones(1, 1, 1, 1), torch.zeros(1, 9, 1, 2), 0, 9, False),
        {},
    ),
    "bicubic in space": (
        "torch.grid_sampler",
        (torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 9, 1, 1, 3), 2, 0, False),
        {},
    ),
    "a division that traps": ("Tensor.div", (LEAST, MINUS_ONE), {"rounding_mode": "trunc"}),
    "a division by a number that traps": ("torch.div", (LEAST, -1), {"rounding_mode": "trunc"}),
    "a division of 32 bits that traps": (
        "Tensor.div_",
        (LEAST.new_full((4,), -(2**31), dtype=torch.int32), MINUS_ONE.int()),
        {"rounding_mode": "trunc"},
    ),
    "a division under its other name": ("torch.divide", (LEAST, MINUS_ONE), {"rounding_mode": "trunc"}),
    "endless combinations": ("torch.combinations", (torch.ones(3), 2**31 - 1, True), {}),
    "an endless polynomial": ("special.hermite_polynomial_h", (torch.ones(3), 2**31), {}),
    "endless polynomials by a tensor": (
        "special.chebyshev_polynomial_t",
        (torch.ones(3), torch.full((3,), 2.0**40)),
        {},
    ),
    "an endless power": ("linalg.matrix_power", (torch.eye(2), -(2**63)), {}),
    "a cell without its second state": (
        "torch.lstm_cell",
        (torch.ones(1, 2), [torch.ones(1, 3)], torch.ones(12, 2), torch.ones(12, 3)),
        {},
    ),
    "a cell whose weights do not fit": (
        "torch.gru_cell",
        (torch.ones(1, 2), torch.ones(1, 3), torch.ones(9, 2), torch.ones(7, 3)),
        {},
    ),
    "an endless window": ("torch.max_pool1d", (torch.ones(1, 2, 3), 2**40, 2), {}),
    "an endless window of a layer": (
        "nn.functional.max_pool1d",
        (torch.ones(1, 2, 3),),
        {"kernel_size": 2**40, "stride": 2, "padding": 2**39},
    ),
    "an endless window of powers": (
        "nn.functional.lp_pool2d",
        (torch.ones(1, 2, 3, 3), 2.0, (1, 2**40)),
        {"ceil_mode": True},
    ),
    "endless results": ("torch.adaptive_max_pool1d", (torch.ones(1, 2, 0), 2**40), {}),
    "endless results of a layer": (
        "nn.functional.adaptive_max_pool1d",
        (torch.ones(1, 2, 3),),
        {"output_size": 2**40},
    ),
    "endless means": ("nn.functional.adaptive_avg_pool2d", (torch.ones(0, 2, 3, 3), (1, 2**50)), {}),
    "endless iterations": ("torch.svd_lowrank", (torch.ones(3, 3),), {"niter": 2**40}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_plan_refuses(name):
    op, args, kwargs = HOSTILE[name]
    tensors = [arg for arg in leaves(args) if isinstance(arg, torch.Tensor)]
    numbers = iter(range(len(tensors)))
    refs = map_leaves(args, lambda arg: Ref(next(numbers)) if isinstance(arg, torch.Tensor) else arg)
    result = Ref(len(tensors))
    graph = Graph(tuple(map(TensorSpec.of, tensors)), (), (Op(op, refs, kwargs, result),), result)
    with pytest.raises(ExecutionError, match=op.rpartition(".")[2].strip("_").partition("_")[0][:4]):
        execute(graph, tensors)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_worker_refuses_and_goes_on(make_worker, name):
    planrt.TorchHook(torch)
    op, args, kwargs = HOSTILE[name]
    home, _, word = op.rpartition(".")
    homes = {"torch": torch, "Tensor": torch.Tensor, "special": torch.special}
    function = getattr({**homes, "linalg": torch.linalg, "nn.functional": F}[home], word)
    worker = make_worker("bob")
    sent = map_leaves(args, lambda a: a.clone().send(worker) if isinstance(a, torch.Tensor) else a)

    def call():
        made = function(*sent, **kwargs)
        return (made[0] if isinstance(made, tuple) else made).get()

    with pytest.raises((PlanrtError, ValueError)):
        call()
    assert (torch.ones(2).send(worker) + 1).get().tolist() == [2, 2]


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("torch.div(torch.tensor([-2**63] * 16), torch.tensor([-1] * 16), rounding_mode='trunc')", True),
        ("torch._weight_norm(torch.zeros(0), torch.zeros(1, 3))", True),
    ],
)
def test_without_the_check_the_process_ends(code, ends):
    """Why there is one: when a torch mends its kernel, this says that the check may go."""
    ended = subprocess.run([sys.executable, "-c", f"import torch; {code}"], capture_output=True, timeout=120)
    assert (ended.returncode < 0) is ends


def test_factors_without_their_data_have_no_history():
    """torch's own do, and the backward pass can end the process."""
    factors = ops.TABLE["torch.lu_unpack"]
    data, pivots = torch.linalg.lu_factor(torch.eye(3))
    data.requires_grad_()
    assert not any(one.requires_grad for one in factors(data, pivots, False, False))
    assert not any(one.requires_grad for one in factors(LU_data=data, LU_pivots=pivots, unpack_data=False))
    _, lower, upper = factors(data, pivots)
    (lower.sum() + 2 * upper.sum()).backward()
    assert torch.equal(data.grad, torch.ones(3, 3).tril(-1) + 2 * torch.ones(3, 3).triu())


@pytest.mark.parametrize("word", ["median", "nanmedian"])
def test_medians_of_expanded_views_are_right_and_of_their_own_memory(make_worker, word):
    """torch's own are neither: found by the fuzzer, whose two processes got what malloc had filled memory with."""
    planrt.TorchHook(torch)
    worker = make_worker("bob")
    rows = torch.arange(6.0).reshape(3, 2) + 10
    for view in (
        lambda x: x.expand(7, 3, 2),
        lambda x: x[0, 0].expand(4, 3, 2),
        lambda x: x[:1].expand(3, 3, 2),
    ):
        for dim in range(3):
            wanted = getattr(view(rows).contiguous(), word)(dim).values
            assert torch.equal(ops.TABLE[f"torch.{word}"](view(rows), dim).values, wanted)
            assert torch.equal(ops.TABLE[f"torch.{word}"](input=view(rows), dim=dim).values, wanted)
            assert torch.equal(getattr(view(rows.send(worker)), word)(dim).values.get(), wanted)


def test_cells_of_users_run(make_worker):
    planrt.TorchHook(torch)
    worker = make_worker("bob")
    for cell in (
        nn.LSTMCell(2, 3),
        nn.GRUCell(2, 3, bias=False),
        nn.RNNCell(2, 3),
        nn.RNNCell(2, 3, nonlinearity="relu"),
    ):
        plan = planrt.func2plan(cell)
        plan.build(torch.randn(4, 2))
        x = torch.randn(4, 2)
        there, here = plan.send(worker)(x.send(worker)), cell(x)
        for one, other in zip(
            there if isinstance(there, tuple) else (there,),
            here if isinstance(here, tuple) else (here,),
            strict=True,
        ):
            torch.testing.assert_close(one.get(), other)


def test_what_is_off_the_table_says_why(make_worker):
    planrt.TorchHook(torch)
    worker = make_worker("bob")
    with pytest.raises(PlanrtError, match="does not check its arguments"):
        torch.linalg.ldl_solve(torch.eye(3).send(worker), torch.ones(3, dtype=torch.int32), torch.ones(3, 1))
    with pytest.raises(OpNotAllowedError):
        ops.lookup("linalg.ldl_solve")


def test_what_users_write_is_as_it_was():
    weight = torch.randn(4, 3)
    for dim in (0, 1, -1):
        norms = torch.norm_except_dim(weight, 2, dim)
        got = ops.lookup("torch._weight_norm")(weight, norms, dim)
        assert torch.equal(got, torch._weight_norm(weight, norms, dim))
    image, grid = torch.randn(2, 3, 5, 5), torch.rand(2, 4, 4, 2) * 2 - 1
    for mode, number in (("bilinear", 0), ("nearest", 1), ("bicubic", 2)):
        got = ops.lookup("torch.grid_sampler")(image, grid, number, 1, False)
        assert torch.equal(got, F.grid_sample(image, grid, mode, "border", align_corners=False))
    convolved = ops.lookup("nn.functional.conv2d")(image, torch.ones(2, 3, 2, 2), None, 2, (1, 0), dilation=2)
    assert torch.equal(convolved, F.conv2d(image, torch.ones(2, 3, 2, 2), None, 2, (1, 0), dilation=2))
    division = ops.lookup("Tensor.div")
    assert division(LEAST, torch.full((4,), 2), rounding_mode="trunc").tolist() == [-(2**62)] * 4
    assert division(torch.tensor([7, -7]), -1, rounding_mode="trunc").tolist() == [-7, 7]
    assert division(torch.tensor([7.0]), -1, rounding_mode="trunc").tolist() == [-7]
    assert division(torch.tensor([200], dtype=torch.uint8), 3, rounding_mode="trunc").tolist() == [66]
    assert division(torch.tensor([True]), torch.tensor([True])).tolist() == [1]
    polynomial = ops.lookup("special.legendre_polynomial_p")
    assert torch.equal(polynomial(torch.ones(2), 3), torch.special.legendre_polynomial_p(torch.ones(2), 3))
    assert len(ops.lookup("torch.combinations")(torch.arange(5), 3)) == 10


def test_weight_normed_layers_are_recorded_and_run(make_worker):
    planrt.TorchHook(torch)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    plan = planrt.func2plan(layer)
    plan.build(torch.randn(4, 3))
    worker = make_worker("bob")
    x = torch.randn(5, 3)
    torch.testing.assert_close(plan.send(worker)(x.send(worker)).get(), layer(x))
    assert torch.equal(plan(x), layer(x))


def test_every_guard_stands_before_an_op():
    assert {name for name in GUARDS if name not in ops.TABLE} <= {"Tensor.polygamma_", "Tensor.mvlgamma_"}
    assert all(ops.TABLE[name].__wrapped__ is not None for name in GUARDS if name in ops.TABLE)
