"""What analysis says of shapes, memory, cost and dependence, compared with real runs."""

import gc

import nets
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from planrt.errors import ExecutionError, PlanArgumentError
from planrt.fl.runs.networks import seeded_net
from planrt.plans import Graph, Op, trace
from planrt.plans.analysis import effects
from planrt.plans.analysis.analysing import analyse
from planrt.plans.analysis.report import Unforeseen, count_bytes, count_flops
from planrt.plans.ir.graph import MAX_OPS
from planrt.plans.running.interpreter import Program, execute
from planrt.plans.training import trace_model
from planrt.types import Ref, TensorSpec, leaves

pytestmark = pytest.mark.filterwarnings(
    "ignore::planrt.errors.PlanWarning"
)  # they capture tensors on purpose

F32, I64 = torch.float32, torch.int64
X = torch.rand(6, 4) + 0.5


def graph_of(function, *examples, **options):
    options.setdefault("free_dims", [()] * len(examples))
    return trace(function, examples, **options)


def real_specs(graph, inputs):
    """The specs that every op's results have in a real run."""
    seen = []

    def noting(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            seen.append(
                [TensorSpec.of(leaf) for leaf in leaves(plain(result)) if isinstance(leaf, torch.Tensor)]
            )
            return result

        return call

    def plain(value):
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    from planrt.plans.ir import ops

    functions = {op.name: noting(ops.lookup(op.name)) for op in graph.ops}
    state = [tensor.clone() for tensor in graph.state_values]
    try:
        next(Program(graph, torch.device("cpu"), functions=functions).run([x.clone() for x in inputs], state))
    except StopIteration:
        return seen
    raise AssertionError("the plan asked for a peer")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x):
        return self.layer(x)


REAL = {
    "mnist cnn": (lambda: seeded_net(1), (1, 28, 28)),
    "lstm": (lambda: nets.LstmClassifier(), (5, 6)),
    "encoder layer": (Encoder, (7, 16)),
    "resnet18": (nets.NETS["resnet18"][0], (3, 32, 32)),
    "unet": (nets.UNet, (1, 8, 8)),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("training", [True, False])
def test_shapes_are_those_of_real_runs(name, training):
    build, shape = REAL[name]
    net = build().train(training)
    graph = graph_of(net, torch.rand(2, *shape), modules=[net], free_dims=[(0,)])
    for batch in (3, 5):
        x = torch.rand(batch, *shape)
        for gradients in (False, True):
            report = analyse(graph, [TensorSpec.of(x)], gradients=gradients)
            assert [list(op.outputs) for op in report.ops] == real_specs(graph, [x])
            assert [op.index for op in report.ops] == list(range(len(graph.ops)))
            assert report.outputs[0].spec == TensorSpec.of(execute(graph, [x]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(
        [
            lambda x: x.sum(0),
            lambda x: x.view(-1),
            lambda x: x.t() @ x,
            lambda x: x[1:, ::2],
            lambda x: torch.cat([x, x * 2], 1),
            lambda x: F.softmax(x.unsqueeze(0), -1),
            lambda x: x.topk(1, 0),
            lambda x: x.to(torch.float64) + x.int(),
            lambda x: x.mean(0).expand(3, -1),
            lambda x: x > x.mean(),
        ]
    ),
    st.integers(2, 9),
    st.integers(2, 9),
)
def test_shapes_follow_the_inputs(function, rows, columns):
    graph = graph_of(function, torch.rand(2, 3), free_dims=[(0, 1)])
    x = torch.rand(rows, columns)
    report = analyse(graph, [TensorSpec.of(x)])
    made = [leaf for leaf in leaves(execute(graph, [x])) if isinstance(leaf, torch.Tensor)]
    assert [value.spec for value in report.outputs] == [TensorSpec.of(tensor) for tensor in made]


# Cost and memory


def test_flops_are_those_that_torch_counts():
    net = seeded_net(1)
    x = torch.rand(4, 1, 28, 28)
    graph = graph_of(net, torch.rand(2, 1, 28, 28), modules=[net], free_dims=[(0,)])
    with FlopCounterMode(display=False) as counter:
        net(x)
    report = analyse(graph, [TensorSpec.of(x)])
    products = sum(op.flops for op in report.ops if op.name in ("torch.conv2d", "nn.functional.linear"))
    assert products == counter.get_total_flops()
    relu = next(op for op in report.ops if op.name == "nn.functional.relu")
    assert relu.flops == 4 * 20 * 24 * 24
    assert report.totals.flops == sum(op.flops for op in report.ops)


def test_views_allocate_nothing_and_reductions_count_their_input():
    report = analyse(graph_of(lambda x: x.view(2, 12).t()[1:].sum(), X))
    view, transpose, part, total = report.ops
    assert [view.bytes, transpose.bytes, part.bytes, total.bytes] == [0, 0, 0, 4]
    assert [view.flops, transpose.flops, part.flops, total.flops] == [0, 0, 0, 22]


def test_peak_follows_the_interpreters_schedule():
    big = 1000 * 4

    def chain(x):
        for _ in range(5):
            x = x + 1
        return x.sum()

    x = torch.zeros(1000)
    assert (
        analyse(graph_of(chain, x)).totals.peak_bytes == big + 2 * big
    )  # the input, an old value and a new one

    def hoard(x):
        parts = [x + number for number in range(5)]
        return torch.stack(parts).sum()

    assert analyse(graph_of(hoard, x)).totals.peak_bytes == big + 5 * big + 5 * big

    def by_view(x):
        y = (x + 1)[:1]  # keeps all of its memory
        z = x + 2
        return y + z[:1]

    assert analyse(graph_of(by_view, x)).totals.peak_bytes == big + 2 * big + 4

    def in_place(x):
        y = x + 1
        for _ in range(5):
            y.mul_(2)
        return y

    assert analyse(graph_of(in_place, x)).totals.peak_bytes == 2 * big


def test_both_ways_count_the_same_memory_and_gradients_cost_more():
    net = seeded_net(1)
    graph = graph_of(net, torch.rand(2, 1, 28, 28), modules=[net], free_dims=[(0,)])
    spec = [TensorSpec((32, 1, 28, 28), F32)]
    without = analyse(graph, spec).totals
    frozen = Graph(
        graph.inputs,
        tuple(type(entry)(entry.name, entry.spec, "buffer", False) for entry in graph.state),
        graph.ops,
        graph.outputs,
    )
    assert analyse(frozen, spec, gradients=True).totals == without
    assert analyse(graph, spec, gradients=True).totals.peak_bytes > without.peak_bytes
    assert without.input_bytes == 32 * 28 * 28 * 4
    assert without.state_bytes == 431_080 * 4
    assert without.output_bytes == 32 * 10 * 4


def test_nothing_is_computed_or_allocated():
    """An exabyte of intermediate results, on meta tensors."""
    spec = TensorSpec((2**20, 2**20), F32)
    step = Op("torch.matmul", (Ref(0), Ref(0)), {}, Ref(1))
    report = analyse(Graph((spec,), (), (step,), Ref(1)), [spec])
    assert report.totals.flops == 2 * 2**60
    assert report.totals.peak_bytes == 2 * 4 * 2**40


def test_memory_of_the_analysis_itself_goes():
    def tensors():
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    graph = graph_of(lambda x: x @ x.t(), X)
    analyse(graph, gradients=True)
    before = tensors()
    for _ in range(3):
        analyse(graph, gradients=True)
    assert tensors() <= before


# Dependence


def test_dependences_and_the_ops_on_the_way():
    weight, unused = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))

    def function(x, y, z):
        a = x @ weight
        b = y + unused
        c = a.relu()
        return {"first": c, "rest": (b.sum(), torch.zeros(2) + z.shape[0])}

    graph = graph_of(function, X, torch.ones(6, 3), X, input_names=("x", "y", "z"), free_dims=[(), (), (0,)])
    for gradients in (False, True):
        first, total, zeros = analyse(
            graph, [None, None, TensorSpec((6, 4), F32)], gradients=gradients
        ).outputs
        assert first.path == "output['first']"
        assert next((d.name, d.kind, d.how) for d in first.depends) == ("x", "input", "raw")
        assert [d.kind for d in first.depends] == ["input", "parameter"]
        assert [graph.ops[index].name for index in first.ops] == ["Tensor.matmul", "Tensor.relu"]
        assert total.path == "output['rest'][0]"
        assert next((d.name, d.how, d.rows) for d in total.depends) == ("y", "aggregated", 6)
        assert (zeros.path, zeros.depends) == ("output['rest'][1]", ())


def test_outputs_that_are_inputs_numbers_or_constants():
    spec = TensorSpec((-1, 4), F32)
    size = Op("Tensor.size", (Ref(0), 0), {}, Ref(1))
    report = analyse(Graph((spec,), (), (size,), (Ref(0), Ref(1), 7)), [TensorSpec((6, 4), F32)])
    same, number, constant = report.outputs
    assert [(d.how, d.source) for d in same.depends] == [("raw", 0)]
    assert same.ops == ()
    assert number.spec is None
    assert constant.spec is None
    assert "a number, from sizes alone" in str(report)


# Sizes that depend on values


@pytest.mark.parametrize(
    ("function", "at_most"),
    [
        (lambda x: x.nonzero(), 24 * 2 * 8),
        (lambda x: torch.argwhere(x > 1), 24 * 2 * 8),
        (lambda x: x[x > 1], 24 * 4),
        (lambda x: x.unique(), 24 * (4 + 16)),
        (lambda x: torch.bincount(x[:, 0].long()), None),
        (lambda x: torch.repeat_interleave(x, (x[0] * 2).long(), 1), None),
    ],
)
def test_sizes_that_depend_on_values_are_said_to(function, at_most):
    graph = graph_of(function, X)
    report = analyse(graph)
    assert report.outputs[0].spec == Unforeseen(at_most)
    assert report.exact is (at_most is not None)
    assert report.totals.unbounded == (() if at_most is not None else (len(graph.ops) - 1,))
    assert report.outputs[0].depends[0].source == 0
    made = execute(graph, [X])
    if at_most is not None:
        assert made.numel() * made.element_size() <= at_most
        assert report.totals.output_bytes == at_most
    assert "depends on values" in str(report)


@pytest.mark.parametrize("gradients", [False, True])
def test_what_follows_such_an_op_is_unknown_and_raw(gradients):
    report = analyse(graph_of(lambda x, y: (x[x > 1].mean(), y.sum()), X, X), gradients=gradients)
    mean, total = report.outputs
    assert isinstance(mean.spec, Unforeseen)
    assert [d.how for d in mean.depends if d.source == 0] == ["raw"]
    assert not report.exact
    if not gradients:
        assert [(d.source, d.rows) for d in total.depends] == [(1, 6)]


# Errors


def test_specs_must_fit():
    graph = trace(
        lambda images: images * 2, [torch.ones(2, 4)], free_dims=[(0,)], input_names=("images",), name="p"
    )
    with pytest.raises(
        PlanArgumentError, match=r"images of plan 'p' is float32\[\*, 4\]: say which sizes .*\(32, 4\)"
    ):
        analyse(graph)
    with pytest.raises(
        PlanArgumentError, match=r"images of plan 'p': wanted float32\[\*, 4\], got float32\[2, 5\]"
    ):
        analyse(graph, [TensorSpec((2, 5), F32)])
    with pytest.raises(PlanArgumentError, match="wanted float32"):
        analyse(graph, [TensorSpec((2, 4), I64)])
    with pytest.raises(PlanArgumentError, match="takes 1 inputs, got the specs of 2"):
        analyse(graph, [TensorSpec((2, 4), F32)] * 2)
    with pytest.raises(PlanArgumentError, match="no possible tensor"):
        analyse(graph, [TensorSpec((2**60, 4), F32)])


@pytest.mark.parametrize("gradients", [False, True])
def test_an_op_that_cannot_run_is_named(gradients):
    graph = Graph(
        (TensorSpec((-1, 3), F32),),
        (),
        (
            Op("Tensor.neg", (Ref(0),), {}, Ref(1)),
            Op("torch.matmul", (Ref(1), Ref(0)), {}, Ref(2)),
        ),
        Ref(2),
        name="p",
    )
    analyse(graph, [TensorSpec((3, 3), F32)], gradients=gradients)
    with pytest.raises(
        ExecutionError, match=r"op 1 of plan 'p' failed: _2 = torch.matmul\(_1, _0\)"
    ) as error:
        analyse(graph, [TensorSpec((2, 3), F32)], gradients=gradients)
    assert (error.value.op, error.value.index) == ("torch.matmul", 1)


@pytest.mark.parametrize("gradients", [False, True])
def test_results_that_do_not_fit_their_names(gradients):
    spec = TensorSpec((4, 3), F32)
    graph = Graph((spec,), (), (Op("Tensor.unbind", (Ref(0),), {}, (Ref(1), Ref(2))),), Ref(1), name="p")
    with pytest.raises(ExecutionError, match="4 results where the plan expects 2"):
        analyse(graph, [spec], gradients=gradients)


def test_the_callers_grad_mode_and_random_state_stay():
    graph = graph_of(lambda x: F.dropout(x, 0.5) + torch.rand(4), X)
    state = torch.get_rng_state()
    with torch.no_grad():
        analyse(graph)
        analyse(graph, gradients=True)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


# The cache


def test_constants_that_matter_are_told_apart():
    """One kind of op with different constants: infinity makes a norm a maximum, 1 is not True."""
    effects.forget()
    norms = [
        analyse(graph_of(lambda x, p=p: x.norm(p=p, dim=0), X)).outputs[0].depends[0].how
        for p in (2.0, float("inf"), 3.0)
    ]
    assert norms == ["aggregated", "raw", "aggregated"]
    dtypes = [analyse(graph_of(lambda x, c=c: x.long() + c, X)).outputs[0].spec.dtype for c in (1, True, 1.0)]
    assert dtypes == [I64, I64, F32]


def test_a_plan_of_the_greatest_length():
    spec = TensorSpec((3,), F32)
    steps = tuple(Op("Tensor.add", (Ref(index), 1), {}, Ref(index + 1)) for index in range(MAX_OPS // 10))
    report = analyse(Graph((spec,), (), steps, Ref(len(steps))), [spec])
    assert report.outputs[0].ops == tuple(range(len(steps)))
    page = str(report)
    assert "more ops" in page
    assert len(page.splitlines()) < 500


def test_units():
    assert [count_bytes(n) for n in (0, 1023, 1024, 1536, 10**9, 2**50)] == [
        "0 B", "1023 B", "1 KiB", "1.5 KiB", "954 MiB", "1024 TiB",
    ]  # fmt: skip
    assert [count_flops(n) for n in (0, 999, 1000, 2_340_000)] == [
        "0 FLOP",
        "999 FLOP",
        "1 kFLOP",
        "2.34 MFLOP",
    ]


def test_the_page_and_its_json():
    net = seeded_net(1)
    graph = trace(
        lambda images, labels: F.nll_loss(net(images), labels),
        [torch.rand(2, 1, 28, 28), torch.zeros(2, dtype=I64)],
        modules=[net],
        free_dims=[(0,), (0,)],
        input_names=("images", "labels"),
        name="loss",
        doc="The loss of the network.\n\nMore.",
    )
    report = analyse(graph, [TensorSpec((64, 1, 28, 28), F32), TensorSpec((64,), I64)])
    page = str(report)
    for part in (
        f"Plan loss  {graph.hash}",
        "The loss of the network.",
        "_0 images: float32[64, 1, 28, 28]",
        "conv1.weight: parameter float32[20, 1, 5, 5]",
        "output: float32[]",
        "images: aggregated over 64 rows (loss)",
        "through 12 ops: 0-11",
        "computation  295 MFLOP",
        "torch.conv2d",
    ):
        assert part in page
    assert report.ops[0].source.startswith("networks.py") or ":" in report.ops[0].source
    values = report.as_json()
    assert values["ok"] is True
    assert values["ops"][0]["outputs"] == ["float32[64, 20, 24, 24]"]
    assert values["outputs"][0]["depends"][0] == {
        "name": "images", "kind": "input", "how": "aggregated", "rows": 64, "aggregates": ["loss"], "lost_in": None,
    }  # fmt: skip


FIRST_LAYERS = {
    "batch norm": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "batch norm without momentum": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (4, 3)),
    "batch norm of images": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True), (4, 3, 5)),
    "instance norm with statistics": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (4, 3, 5, 5),
    ),
    "group norm": (lambda: nn.GroupNorm(3, 6), (4, 6, 5)),
    "layer norm": (lambda: nn.LayerNorm(3), (4, 3)),
    "rms norm": (lambda: nn.RMSNorm(3), (4, 3)),
    "linear": (lambda: nn.Linear(3, 2), (4, 3)),
    "convolution": (lambda: nn.Conv2d(3, 2, 3), (4, 3, 5, 5)),
    "convolution by channels": (lambda: nn.Conv1d(3, 6, 2, groups=3), (4, 3, 5)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(3, 2, 2), (4, 3, 5)),
    "prelu": (lambda: nn.PReLU(3), (4, 3)),
    "embedding": (lambda: nn.Embedding(5, 3), torch.zeros(4, 2, dtype=torch.int64)),
    "embedding bag": (lambda: nn.EmbeddingBag(5, 3), torch.zeros(4, 2, dtype=torch.int64)),
    "lstm": (lambda: nn.LSTM(3, 2, batch_first=True), (4, 5, 3)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (4, 5, 4)),
}


@pytest.mark.parametrize("name", FIRST_LAYERS)
def test_the_training_of_any_first_layer_is_told(name):
    """A first layer passes no gradient on to the data: kernels then return less than they could."""
    make, example = FIRST_LAYERS[name]
    layer = make()
    data = torch.randn(example) if isinstance(example, tuple) else example
    target = torch.zeros(len(data))

    def loss(prediction, target):
        first = prediction[0] if isinstance(prediction, tuple) else prediction
        return F.mse_loss(first.flatten(1).sum(1), target)

    plans = trace_model(layer, loss, data, target)
    report = analyse(plans.training, [data, target], gradients=True)
    told = {one.path for one in report.gradients}
    assert told == {f"gradient of {name}" for name, _ in layer.named_parameters()}
