"""Recording functions: the same results for other values and sizes, or an error that names the line."""

import gc
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from nets import line_of
from torch import nn

from planrt.errors import PlanrtError, PlanWarning, TraceError
from planrt.plans import Graph, trace
from planrt.plans.recording.recorder import SizesFixedError
from planrt.plans.running.interpreter import execute


def same(f, example, others, **options):
    """`f` traced on `example`, sent through bytes, equals `f` on `others`."""
    plan = trace(f, example, **options)
    state = plan.state_values
    received = Graph.from_bytes(plan.to_bytes())
    for inputs in (example, *others):
        wanted = f(*[x.clone() for x in inputs])
        got = execute(received, [x.clone() for x in inputs], state)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    return plan


def refused(f, *examples, match, error=TraceError, **options):
    with pytest.raises(error, match=match) as caught:
        trace(f, examples, **options)
    if "# here" in inspect.getsource(f):
        assert line_of(f) in str(caught.value)
        assert "\n" not in str(caught.value)


X = torch.randn(4, 6)
FREE = {"free_dims": [[0]]}
OTHER_SIZES = [[torch.randn(n, 6)] for n in (1, 3, 9)]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.view(x.shape[0], 2, 3).reshape(x.size(0) * 2, -1),
        lambda x: x.new_zeros(x.shape) + torch.arange(x.shape[0])[:, None],
        lambda x: torch.zeros((1, *x.shape[1:])).expand(x.shape[0], *x.shape[1:]) + x,
        lambda x: x.sum() / x.shape[0] + x.numel() + x.shape.numel() + x.size().numel(),
        lambda x: x[: x.shape[0] // 2 + 1, -(x.shape[1] - 1) :],
        lambda x: x * (1 / x.shape[0]) + (x.shape[0] - 1) % 3 - (7 - x.shape[0]) // 2,
        lambda x: x.reshape(x.shape[:1] + (2, 3)),  # noqa: RUF005
        lambda x: x.reshape(torch.Size([x.shape[0]]) + (3, 2)),  # noqa: RUF005
        lambda x: torch.ones(2 * x.shape[0] + 1, dtype=torch.int64).cumsum(0),
        lambda x: F.interpolate(x[None], size=2 * x.shape[1]),
        lambda x: [row * 2 for row in x.t()],
        lambda x: dict(zip("ab", x.split(3, dim=1), strict=True)),
        lambda x: (x.max(1).values, torch.sort(x, 1)[1], x.topk(2), x.shape[0]),
        lambda x: torch.where(x > 0, x, -x).clamp_(max=0.5),
        lambda x: x[x > 0].shape[0] * x,
        lambda x: torch.full((len(x.shape), 2), float(x.dim())),
        lambda x: x.to(torch.float64).to("cpu").type(torch.FloatTensor).cpu() + x.type(torch.float16),
        lambda x: torch.tensor([x.shape[0], 2.5]) + torch.tensor(3),
        lambda x: torch.einsum("ij,kj->ik", x, x) @ x,
        lambda x: (1 - x) ** 2 / (1 + 2**x) // 1 % 3 + abs(-x) * (x != x.T.T),
        lambda x: x.unique(),
        lambda x: torch.linalg.vector_norm(torch.fft.rfft(x).abs(), dim=1) + torch.special.expit(x[:, 0]),
        lambda x: F.pad(x, (1, 2)).unfold(1, 3, 2).flatten(1),
    ],
)  # fmt: skip
def test_other_sizes_give_what_the_function_gives(f):
    same(f, [X], OTHER_SIZES, **FREE)


def test_arguments_stand_as_written():
    plan = trace(lambda x: x.view(-1, x.shape[1] // 2, 2), [X], **FREE)
    assert str(plan.ops[0]) == "_1 = _0.view(-1, 3, 2)"


def test_sizes_that_nothing_needs_are_not_in_the_plan():
    plan = trace(lambda x: x + 1 if x.shape[0] * 2 and x.shape[1] > 0 else x, [X], **FREE)
    assert [op.name for op in plan.ops][-1] == "Tensor.add"
    plan = trace(lambda x: (x.shape[0] * 3, x + 1)[1], [X], **FREE)
    assert [op.name for op in plan.ops] == ["Tensor.add"]


def test_several_free_dimensions_of_several_inputs():
    def f(x, y):
        return torch.nn.functional.pad(x @ y, (0, y.shape[1], x.shape[0], 0))

    others = [[torch.randn(2, 3), torch.randn(3, 7)], [torch.randn(5, 3), torch.randn(3, 1)]]
    same(f, [torch.randn(4, 3), torch.randn(3, 5)], others, free_dims=[[0], [1]])


def test_in_place_ops_and_inputs_handed_back():
    def f(x, y):
        y += x.sum(0)
        x[0] = y.sum()
        x[:, 1:3].mul_(2)
        x.t_()
        return {"x": x, "y": [y, (x.shape[0], 1.5)]}

    same(f, [X, torch.randn(6)], [[torch.randn(4, 6), torch.randn(6)]])


def test_constants_among_the_results():
    plan = trace(lambda x: (None, "text", {"a": [x, True]}), [X])
    assert execute(Graph.from_bytes(plan.to_bytes()), [X]) == (None, "text", {"a": [X, True]})


def test_an_input_that_the_function_returns_is_the_input():
    x = torch.randn(3)
    assert execute(trace(lambda x: (x, x), [x]), [x]) == (x, x)


def test_the_examples_are_not_touched():
    x = torch.ones(3)
    plan = trace(lambda x: x.add_(1), [x])
    assert x.tolist() == [1, 1, 1]
    execute(plan, [x])
    assert x.tolist() == [2, 2, 2]


def test_no_grad_regions_are_recorded():
    def f(x, w):
        with torch.no_grad():
            frozen = x * w
        return frozen + w, frozen

    plan = trace(f, [X, torch.randn(6, requires_grad=True)])
    w = torch.randn(6, requires_grad=True)
    total, frozen = execute(plan, [X, w])
    assert not frozen.requires_grad
    total.sum().backward()
    assert w.grad.tolist() == [4.0] * 6
    with torch.no_grad():  # the end of the region does not turn gradients on
        assert not execute(plan, [X, w])[0].requires_grad
        assert not torch.is_grad_enabled()


def test_captured_tensors_become_state():
    constant, parameter = torch.randn(6), nn.Parameter(torch.randn(6))
    array = np.arange(6, dtype=np.float32)

    def f(x):
        return x * constant + parameter + constant + torch.tensor(array) + torch.as_tensor(array)

    with pytest.warns(
        PlanWarning, match=r"captured 4 tensors .*float32\[6\].* first at .*test_tracer.py:\d+"
    ) as told:
        plan = same(f, [X], OTHER_SIZES, **FREE)
    assert [warning.filename for warning in told] == [__file__]
    assert [(s.kind, s.requires_grad) for s in plan.state] == [
        ("constant", False), ("parameter", True), ("constant", False), ("constant", False),
    ]  # fmt: skip


def test_a_captured_tensor_that_is_changed_is_a_buffer():
    count = torch.zeros(())

    def f(x):
        count.add_(1)
        return x + count

    plan = trace(f, [X], notice=False)
    assert count.item() == 0
    assert plan.state[0].kind == "buffer"
    state = [torch.tensor(4.0)]
    assert torch.equal(execute(plan, [X], state), X + 5)
    assert state[0].item() == 5


def test_numpy_numbers_and_python_types_as_arguments():
    same(lambda x: x * np.float32(2.5) + np.int64(3) + x.to(float), [X], OTHER_SIZES, **FREE)


class Stateful(nn.Module):
    """Keeps a hidden state and a counter between calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.hidden = None
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.steps = self.steps + 1
        self.hidden = x
        return x * self.steps


def test_attributes_that_forward_sets_do_not_leak_and_buffers_are_written_back():
    module = Stateful()
    steps = module.steps
    with pytest.warns(PlanWarning, match=r"changes self\.calls of Stateful at every call"):
        plan = trace(module, [X], modules=[module], **FREE)
    assert (module.calls, module.hidden) == (0, None)
    assert module.steps is steps
    assert steps.item() == 0
    state = [torch.tensor(6)]
    assert torch.equal(execute(plan, [X], state), X * 7)
    assert state[0].item() == 7


def test_a_loop_unrolls_and_a_branch_takes_the_recorded_side():
    def f(x):
        for _ in range(3):
            x = x + 1 if x.dim() == 2 else x - 1
        return x

    assert [op.name for op in trace(f, [X]).ops] == ["Tensor.add"] * 3


def test_factories_and_devices_follow_the_plan():
    def f(x):
        return torch.zeros(2, device="cpu") + torch.ones(2, device=x.device) + x.to("cpu")[0, 0]

    code = trace(f, [X]).code
    assert code.count("device=DEVICE") == 2
    assert ".to(DEVICE)" in code
    same(f, [X], [])


def test_empty_memory_is_cleared():
    def f(x):
        return torch.empty(50), torch.empty_like(x), x.new_empty(7), torch.empty_strided((2, 3), (3, 1))

    plan = trace(f, [torch.full((300,), 7.0)])
    _ = [torch.full((50,), 3.0) for _ in range(20)]  # freed at once: memory that torch hands out again
    assert all(not tensor.any() for tensor in execute(plan, [torch.full((300,), 7.0)]))


# What cannot be recorded


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 100


def reads(read):
    def f(x):
        read(x.sum())
        return x

    return f


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, bool, float, int, torch.Tensor.tolist, torch.Tensor.numpy, complex,
             lambda t: torch.equal(t, t), lambda t: torch.allclose(t, t), lambda t: np.asarray(t),
             lambda t: range(3)[t.long()], lambda t: 3 in t, lambda t: torch.is_nonzero(t)]
)  # fmt: skip
def test_reading_a_value(read):
    refused(reads(read), X, match=r"reads the value of a tensor.* \(at .*test_tracer\.py:\d+\)(\n    .*)?$")


def test_the_line_that_reads_is_named():
    def f(x):
        y = x + 1
        if y.sum() > 0:  # here
            return y
        return x

    refused(f, X, match="Tensor.__bool__ reads the value of a tensor")


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: x.as_strided((2,), (1,)), "Tensor.as_strided is not on the table"),
        (lambda x: torch.ops.aten.add(x, x), "aten.add.* is not on the table"),
        (lambda x: x.apply_(lambda v: v), "Tensor.apply_ is not on the table"),
        (lambda x: x.resize_(3), "Tensor.resize_ is not on the table"),
        (lambda x: Double.apply(x), "custom autograd.Function"),
        (lambda x: torch.vmap(torch.sum)(x), r"(vmap|no recorded op)"),
        (lambda x: x.to_sparse(), "not on the table"),
        (lambda x: x + torch.ones(4, 6).to_sparse(), "not on the table"),
        (lambda x: x.to(torch.float8_e5m2), "float8"),
        (
            lambda x: torch.rand(3, generator=torch.Generator()),
            "Generator cannot go into a plan: .* seed the plan",
        ),
        (lambda x: x.register_hook(print), "register_hook: a plan would lose the hook"),
        (lambda x: x.undefined, "AttributeError"),
        (lambda x: x @ x, "RuntimeError: .*mat1 and mat2"),
    ],
)
def test_calls_that_cannot_be_recorded(function, match):
    def f(x):
        return function(x)  # the line of the lambda is named

    with pytest.raises(TraceError, match=match) as caught:
        trace(f, [X.clone().requires_grad_()])
    assert __file__ in str(caught.value)


def test_writes_that_a_recorder_cannot_see():
    def real(x):
        z = torch.complex(x, x)
        z.real = x * 2  # here
        return z

    def other_memory(x):
        y = x * 2
        y.set_(x)  # here
        return y

    refused(real, X, match="aten::copy_ writes to a tensor behind torch's public functions")
    refused(other_memory, X, match="Tensor.set_ gives a tensor other memory")


def test_a_function_that_seeds():
    for seed in (0, 1):
        torch.manual_seed(seed)
        g = lambda x, seed=seed: (torch.manual_seed(seed), x + torch.rand(6))[1]  # noqa: E731
        refused(g, X, match="seeds torch's generator, which a plan cannot: seed the plan where it runs")
    before = torch.get_rng_state()
    plan = trace(lambda x: x + torch.rand(x.shape[0], 1), [X], **FREE)
    assert torch.equal(torch.get_rng_state(), before)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(execute(plan, [X]))
    assert torch.equal(*draws)


def test_grad_modes_nested_and_as_decorators():
    @torch.no_grad()
    def frozen(x):
        with torch.enable_grad():
            open_again = x * 2
        return open_again, x * 3

    @torch.set_grad_enabled(False)
    def off(x):
        return x * 4

    def f(x):
        first, second = frozen(x)
        return first, second, off(x), x * 5

    plan = trace(f, [X.clone().requires_grad_()])
    x = X.clone().requires_grad_()
    assert [y.requires_grad for y in execute(plan, [x])] == [True, False, False, True]
    assert [y.requires_grad for y in f(x)] == [True, False, False, True]


def test_default_arguments_that_are_tensors_become_state():
    twos = torch.full((6,), 2.0)

    def f(x, scale=twos):
        return x * scale

    with pytest.warns(
        PlanWarning, match=r"captured 1 tensor from outside the function \(float32\[6\]; the first at"
    ):
        plan = trace(f, [X], **FREE)
    assert torch.equal(execute(plan, [X]), X * 2)


def test_the_notice_is_given_once_and_lists_a_few():
    many = [torch.ones(6) for _ in range(7)]
    with pytest.warns(
        PlanWarning, match=r"captured 7 tensors .*(float32\[6\], ){5}\.\.\.; the first at"
    ) as told:
        trace(lambda x: x + sum(many), [X], **FREE)
    assert len(told) == 1
    net = nn.Linear(6, 2)
    trace(net, [X], modules=[net])  # what belongs to it is no surprise
    with pytest.warns(PlanWarning, match="captured 2 tensors"):
        trace(lambda x: net(x), [X])


def test_modes_that_cannot_be_recorded():
    def inference(x):
        with torch.inference_mode():
            return x + 1  # here

    def mixed(x):
        with torch.autocast("cpu"):
            return x + 1  # here

    refused(inference, X, match="inference_mode")
    refused(mixed, X, match="autocast")


def test_custom_functions_are_refused_even_without_gradients():
    def f(x):
        return Double.apply(x) + 1

    def g(x):
        with torch.no_grad():
            return torch.utils.checkpoint.checkpoint(torch.relu, x, use_reentrant=True)

    def h(x):
        return torch.utils.checkpoint.checkpoint(torch.relu, x, use_reentrant=True) + 1

    refused(f, X, match="custom autograd.Function")
    refused(h, X.clone().requires_grad_(), match="custom autograd.Function")
    same(g, [X.clone().requires_grad_()], [])  # nothing is lost where no gradient flows


def test_an_error_that_the_function_swallows_is_not_swallowed():
    def f(x):
        try:
            x.sum().item()  # here
        except Exception:
            return x
        return x + 1

    refused(f, X, match="reads the value")


def test_tensors_from_nowhere():
    def f(x):
        return x + torch.FloatTensor([1.0])  # here

    def g(x):
        return x + torch.from_numpy(np.ones(6, dtype=np.float32))  # here

    refused(f, X, match="no recorded op made")
    refused(g, X, match="no recorded op made")


def test_captured_tensors_with_a_history():
    outside = torch.randn(6, requires_grad=True) * 2
    refused(lambda x: x + outside, X, match=r"detach\(\) it")


def test_sparse_state_and_inputs():
    sparse = torch.eye(3).to_sparse()
    refused(lambda x: x + 1, sparse, match="sparse, quantised or nested")
    refused(lambda x: torch.mul(sparse, x), torch.ones(3, 3), match="sparse, quantised or nested")


def test_results_that_plans_cannot_return():
    refused(lambda x: {1: x}, X, match="keys in a plan are strings")
    refused(lambda x: object(), X, match="type object")


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: x / math.sqrt(x.shape[0]), "frozen in an argument of Tensor.div"),
        (lambda x: x * len(x), "4 became 8 when the sizes changed"),
        (lambda x: x * int(x.shape[0]), "frozen"),
        (lambda x: x.view(4, 6), "doubled"),
        (lambda x: sum(x[i] for i in range(x.shape[0])), "how many ops run|frozen"),
        (lambda x: x.sum() if x.shape[0] > 4 else x.mean(), "decide which op runs"),
        (lambda x: list(x), "frozen|returns something else|doubled|results differ"),
        (lambda x: (x, len(x)), "returns something else"),
        (lambda x: x + torch.tensor(np.ones((len(x), 1), dtype=np.float32)), "depends on the sizes"),
        (lambda x: x * x.nbytes, "frozen"),
    ],
)
def test_sizes_that_would_be_frozen(function, match):
    refused(lambda x: function(x), X, match=match, error=SizesFixedError, **FREE)


def test_sizes_that_depend_on_the_data_are_not_folded():
    def f(x):
        return x.unique().shape[0] * torch.ones(2)

    same(f, [torch.tensor([1.0, 2.0])], [[torch.arange(5.0)]], **FREE)
    same(f, [torch.tensor([1.0, 2.0])], [[torch.tensor([3.0, 3.0])]])


def test_frozen_sizes_are_fine_where_sizes_are_fixed():
    same(lambda x: x / math.sqrt(x.shape[0]) + len(x), [X], [[torch.randn(4, 6)]])
    same(lambda x: x / math.sqrt(x.shape[1]), [X], OTHER_SIZES, **FREE)


def test_examples_and_state_that_have_no_shape():
    refused(lambda x: x + x.shape[0], torch.ones(0, 2), match="is empty on a free dimension", **FREE)
    refused(lambda x: x, 3.0, match="example argument 0 must be a tensor, not float")
    lazy = nn.LazyLinear(2)
    refused(lambda x: lazy(x), X, modules=[lazy], match="'weight' has no shape yet: run the lazy module once")


def test_state_that_changes_its_shape():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.seen = torch.cat([self.seen, x[0]])
            return x

    module = Growing()
    with pytest.raises(TraceError, match="gives its state 'seen' another shape"):
        trace(module, [X], modules=[module])
    assert module.seen.shape == (1,)


def test_everything_is_undone_after_a_failure():
    module = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(7, 2))
    before = module[0].running_mean.clone()
    generator = torch.get_rng_state()
    with pytest.raises(PlanrtError):
        trace(lambda x: module(x + torch.rand(6)), [X], modules=[module])
    assert torch.equal(module[0].running_mean, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled()


def test_what_python_collects_meanwhile_is_no_part_of_the_plan():
    """A generator that somebody left inside a `no_grad` block leaves it when it is collected."""

    class Leftover:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            finalized.append(1)
            if len(finalized) < 1000:  # in one run, and not in the others
                torch.set_grad_enabled(True)

    finalized = []

    def function(x):
        for _ in range(1000):
            Leftover()
        return x + 1

    before = gc.get_threshold()
    gc.set_threshold(20)
    try:
        graph = trace(function, [X], **FREE)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert [op.name for op in graph.ops] == ["Tensor.add"]
    assert len(finalized) >= 2000
    assert gc.isenabled()
