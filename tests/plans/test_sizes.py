"""Sizes that a plan must not freeze: computed, compared, or caught with the line. And what is caught at run time."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import line_of

from planrt.errors import ExecutionError, TraceError
from planrt.plans import Graph, func2plan, trace
from planrt.plans.forms.torchscript import to_torchscript
from planrt.plans.recording.recorder import SizesFixedError
from planrt.plans.running.interpreter import execute

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 16)


def outcome(run, *inputs):
    try:
        return run(*[x.clone() for x in inputs])
    except Exception as error:
        return error


def never_wrong(f, n, *, width=6):
    """`f` on examples of size `n` is refused with its line, or its plan gives for every size what `f` gives, or fails.

    Returns the sizes that the plan takes, None where `f` was refused.
    """
    try:
        plan = trace(f, [torch.randn(n, width)], free_dims=[[0]])
    except TraceError as error:
        assert error.line or "returns something else" in str(error), str(error)
        return None
    taken = []
    for size in SIZES:
        x = torch.randn(size, width)
        wanted, got = outcome(f, x), outcome(lambda x: execute(Graph.from_bytes(plan.to_bytes()), [x]), x)
        if isinstance(got, ExecutionError):
            continue
        assert not isinstance(wanted, Exception), (
            f"size {size}: {wanted!r} in PyTorch, and a result from the plan"
        )
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        taken.append(size)
    return taken


EVERY_SIZE = {
    "list of sizes": lambda x: x.new_zeros([x.shape[0], *list(x.shape)]),
    "Size arithmetic": lambda x: x.reshape(torch.Size([x.shape[0]]) + x.shape[1:]),
    "isinstance Size": lambda x: x * 2 if isinstance(x.shape, torch.Size) else x,
    "view(size, -1)": lambda x: x.view(x.size(0), -1),
    "reshape(-1, ...)": lambda x: x.reshape(-1, 2, 3),
    "size of a slice": lambda x: x[:4].shape[0] * x,
    "size of a slice of a result": lambda x: torch.zeros((x * 2)[1:4].shape[0]),
    "broadcast": lambda x: x + torch.ones(x.shape[0], 6) * torch.ones(1, 6),
    "powers": lambda x: x * x.shape[0] ** 2 + x.shape[0] ** 1,
    "divmod": lambda x: x * divmod(x.shape[0], 3)[0] + divmod(7, x.shape[0])[1],
    "sum and prod of a shape": lambda x: x * sum(x.shape) + math.prod(x.shape),
    "tensor of a shape": lambda x: torch.tensor(x.shape).sum() * x,
    "sqrt of a tensor of a size": lambda x: x / torch.tensor(x.shape[0]).sqrt(),
    "sqrt of a fixed size": lambda x: x / math.sqrt(x.shape[-1]),
    "slices": lambda x: (x[: x.shape[0]], x[-1], x[:4], x[x.shape[0] // 2 :]),
    "reversed": lambda x: x[torch.arange(x.shape[0] - 1, -1, -1)],
    "numel": lambda x: x.reshape(x.shape[0], x.numel() // x.shape[0]),
    "squeeze": lambda x: x.squeeze(0) * 1,
    "shapes as results": lambda x: (x.shape, x.size(), x.dim()),
    "compared and used alike": lambda x: x + 1 if x.shape[0] >= 0 else x,
    "interpolate": lambda x: F.interpolate(x[None, None], scale_factor=2.0),
    "unary": lambda x: x * +x.shape[0] - -x.shape[0],
}


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("what", EVERY_SIZE)
def test_what_follows_the_size_is_right_for_every_size(what, n):
    assert never_wrong(EVERY_SIZE[what], n) == [*SIZES]


SOME_SIZES = {
    "== 4": lambda x: x * 2 if x.shape[0] == 4 else x * 3,
    "== 1": lambda x: x * 2 if x.shape[0] == 1 else x * 3,
    "== 8": lambda x: x * 2 if x.shape[0] == 8 else x * 3,
    "> 2": lambda x: x * 2 if x.shape[0] > 2 else x * 3,
    "a chain": lambda x: x * 2 if 1 < x.shape[0] <= 4 else x * 3,
    "even": lambda x: x * 2 if x.shape[0] % 2 == 0 else x * 3,
    "bool": lambda x: x if x.shape[0] - 1 else x * 2,
    "not": lambda x: x * 2 if not x.shape[0] // 3 else x,
    "in": lambda x: x * 2 if x.shape[0] in (1, 3, 8) else x,
    "min": lambda x: x[: min(x.shape[0], 3)],
    "max": lambda x: x.sum() / max(x.shape[0], 2),
    "abs": lambda x: x * abs(x.shape[0] - 3),
    "a dict": lambda x: x * {1: 1.0, 2: 2.0, 4: 4.0, 8: 4.0}.get(x.shape[0], 7.0),
    "of a fraction": lambda x: x * 2 if x.shape[0] / 3 > 1.5 else x,
    "of shapes": lambda x: x * 2 if x.shape == (4, 6) else x,
    "range": lambda x: sum(x[i] for i in range(x.shape[0])),
    "int": lambda x: x * int(x.shape[0]),
    "float": lambda x: x * float(x.shape[0]),
    "len": lambda x: x * len(x),
    "len in a branch": lambda x: x * 2 if len(x) > 2 else x,
    "sqrt": lambda x: x / math.sqrt(x.shape[0]),
    "ceil": lambda x: x * math.ceil(x.shape[0] / 3),
    "round": lambda x: x * round(x.shape[0] / 3),
    "ceil of the size": lambda x: x * math.ceil(x.shape[0] * 0.1),
    "a set": lambda x: x * 2 if x.shape[0] in {1, 3, 8} else x,
    "a power of two": lambda x: x * min(2 ** x.shape[0], 8),
    "text": lambda x: x * int(f"{x.shape[0]}"),
    "bits": lambda x: x * (x.shape[0] & 1),
    "index of a list": lambda x: x * [*range(1, 40)][x.shape[0]],
    "index that depends on evenness": lambda x: x * [5.0, 6.0][x.shape[0] % 2],
    "range of evenness": lambda x: x * len(range(x.shape[0] % 2)),
    "stride": lambda x: x * x.t().contiguous().stride(0),
    "nbytes": lambda x: x * x.nbytes,
    "comprehension": lambda x: torch.stack([row * 2 for row in x]),
    "chunk": lambda x: x.chunk(2)[0],
    "cat of chunks": lambda x: torch.cat(x.chunk(2)),
    "split in two": lambda x: x.split(x.shape[0] // 2 or 1)[0],
    "split(2)": lambda x: x.split(2)[0],
    "unbind": lambda x: x.unbind(0)[0],
}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("what", SOME_SIZES)
def test_what_cannot_follow_every_size_is_refused_or_fails_but_is_never_wrong(what, n):
    assert never_wrong(SOME_SIZES[what], n) != [*SIZES]


def test_a_number_that_happens_to_be_the_size():
    def f(x):
        return x + torch.arange(4)[:, None]  # here

    with pytest.raises(SizesFixedError, match="with them doubled") as caught:
        trace(f, [torch.randn(4, 6)], free_dims=[[0]])
    assert caught.value.line == line_of(f)


def test_results_whose_number_depends_on_the_size_are_refused_when_recorded():
    for f, n in ((lambda x: x.split(2)[0], 1), (lambda x: torch.cat(x.split(x.shape[0] // 2)), 2)):
        with pytest.raises(SizesFixedError, match="split .its results differ|1 became") as caught:
            trace(f, [torch.randn(n, 6)], free_dims=[[0]])
        assert __file__ in caught.value.line


def test_a_comparison_is_checked_when_the_plan_runs():
    def f(x):
        if x.shape[0] > 100:  # here
            return x[:100]
        return x

    plan = trace(f, [torch.randn(2, 6)], free_dims=[[0]])
    assert plan.code.splitlines() == ["_1 = _0.size(0)", "operator.assume_le(_1, 100)", "return _0"]
    assert plan.lines[1] == line_of(f)
    assert execute(plan, [torch.ones(100, 6)]).shape == (100, 6)
    reason = (
        r"operator.assume_le\(_1, 100\) \(traced at .*\): with these sizes it is 101 and 100, .* another way"
    )
    with pytest.raises(ExecutionError, match=reason) as caught:
        execute(plan, [torch.ones(101, 6)])
    assert line_of(f) in str(caught.value)
    script = to_torchscript(plan)
    assert script(torch.ones(3, 6)).shape == (3, 6)


def test_a_comparison_that_changes_nothing_is_no_assumption():
    said = []

    def f(x):
        if x.shape[0] > 6:
            said.append("large")
        return x * 2

    plan = trace(f, [torch.randn(4, 6)], free_dims=[[0]])
    assert [op.name for op in plan.ops] == ["Tensor.mul"]


def test_a_comparison_of_fixed_sizes_is_no_assumption():
    plan = trace(
        lambda x: x if x.shape[1] == 6 and x.dim() == 2 else x + 1, [torch.randn(4, 6)], free_dims=[[0]]
    )
    assert plan.ops == ()


def test_comparisons_in_torchs_own_modules_are_theirs():
    norm = torch.nn.BatchNorm1d(6)
    plan = trace(norm, [torch.randn(4, 6)], modules=[norm], free_dims=[[0]])
    assert not any(op.name.startswith("operator.") for op in plan.ops)


def test_a_size_that_never_changes_may_be_a_plain_number():
    def f(x):
        rows = x.sum(0)
        return [rows[i] for i in range(len(rows))], int(rows.shape[0])

    plan = trace(f, [torch.randn(4, 3)], free_dims=[[0]])
    assert plan.code.count("operator.assume_eq(") == 2
    assert execute(plan, [torch.ones(9, 3)])[1] == 3


def test_a_size_that_depends_on_values_is_checked():
    def f(x):
        kept = x[x > 0]
        return kept * 2 if kept.shape[0] > 1 else kept

    plan = trace(f, [torch.tensor([1.0, -1.0, 2.0])])
    assert execute(plan, [torch.tensor([3.0, -1.0, 2.0])]).tolist() == [6.0, 4.0]
    with pytest.raises(ExecutionError, match="with these sizes it is 1 and 1"):
        execute(plan, [torch.tensor([3.0, -1.0, -2.0])])


# Several inputs


def test_inputs_that_must_agree_fail_at_run_time_like_the_function():
    plan = trace(
        lambda x, y: torch.zeros(x.shape[0], 2) + y, [torch.randn(4), torch.randn(4, 2)], free_dims=[[0], [0]]
    )
    assert torch.equal(execute(plan, [torch.randn(7), torch.ones(7, 2)]), torch.ones(7, 2))
    with pytest.raises(ExecutionError, match="must match"):
        execute(plan, [torch.randn(7), torch.ones(3, 2)])


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: x.sum() + y.sum() if len(x) == len(y) else x.sum(),
        lambda x, y: y * len(x) / len(y),
        lambda x, y: x.sum() * [2.0, 3.0, 4.0, 5.0][y.shape[0] - x.shape[0]],
        lambda x, y: x.sum() * (2 if int(x.shape[0]) == int(y.shape[0]) else 3),
    ],
)
def test_inputs_that_happen_to_have_equal_sizes(f):
    with pytest.raises(SizesFixedError) as caught:
        trace(f, [torch.randn(4), torch.randn(4)], free_dims=[[0], [0]])
    assert __file__ in caught.value.line


def test_equal_sizes_that_the_function_asks_for_are_checked():
    def f(x, y):
        if x.shape != y.shape:
            raise ValueError("other shapes")
        return x.sum() + y.sum()

    plan = trace(f, [torch.randn(4, 2), torch.randn(4, 2)], free_dims=[[0], [0]])
    x = torch.randn(5, 2)
    assert torch.equal(execute(plan, [x, x]), f(x, x))
    with pytest.raises(ExecutionError, match="with these sizes it is 5 and 4"):
        execute(plan, [x, x[:4]])


class Note:
    """Something to write to that recording does not put back."""

    __slots__ = ("value",)

    def __init__(self):
        self.value = None


def test_warnings_about_sizes_that_nobody_asked_for_are_not_shown():
    told = Note()

    def f(x, y):
        if x.numel() != y.numel():
            told.value = True
            warnings.warn("other sizes", stacklevel=1)
        return x * y.sum()

    trace(f, [torch.randn(4), torch.randn(4)], free_dims=[[0], [0]])
    assert told.value


def test_functions_that_want_even_sizes():
    plan = trace(lambda x: x.view(x.shape[0] // 2, 2, 6), [torch.randn(4, 6)], free_dims=[[0]])
    assert execute(plan, [torch.randn(6, 6)]).shape == (3, 2, 6)
    with pytest.raises(ExecutionError, match="invalid for input of size"):
        execute(plan, [torch.randn(5, 6)])


def test_a_broadcast_example_of_size_one():
    with pytest.raises(SizesFixedError):
        trace(lambda x, y: x + y, [torch.randn(1, 6), torch.randn(4, 6)], free_dims=[[0], []])
    plan = trace(lambda x, y: x + y, [torch.randn(1, 6), torch.randn(1, 6)], free_dims=[[0], []])
    assert execute(plan, [torch.ones(9, 6), torch.ones(1, 6)]).shape == (9, 6)


def test_sizes_are_numbers_to_python():
    seen = Note()

    def f(x):
        n = x.shape[0]
        seen.value = {
            "hash": hash(n),
            "sorted": sorted([n, 2, 9]),
            "shape": repr(x.shape),
            "power": 2**n,
            "mod": pow(n, 2, 3),
        }
        return x

    trace(f, [torch.randn(4, 6)])
    assert seen.value == {
        "hash": hash(4),
        "sorted": [2, 4, 9],
        "shape": "torch.Size([4, 6])",
        "power": 16,
        "mod": 1,
    }


def test_states_of_one_batch_bind_the_batch_and_nothing_reads_past_their_ends():
    """torch's own kernel does, where the recorder tries another batch."""
    layer = torch.nn.LSTM(3, 4, batch_first=True)
    weights = [one.detach() for one in layer.parameters()]

    def recurrent(x, *weights):
        zeros = torch.zeros(1, 4, 4)
        return torch.lstm(x, (zeros, zeros), list(weights), True, 1, 0.0, False, False, True)[0]

    x = torch.randn(4, 3, 3)
    plan = func2plan()(recurrent).build(x, *weights)
    assert torch.equal(plan(x, *weights), recurrent(x, *weights))
