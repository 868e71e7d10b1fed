"""Where the rows of an input go: by cases with known answers, and by experiment on random plans."""

import copy
import random

import nets
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from planrt.plans import trace
from planrt.plans.analysis import flow, rows
from planrt.plans.analysis.analysing import analyse
from planrt.plans.analysis.flow import joined
from planrt.plans.ir import ops
from planrt.plans.ir.graph import Graph, Op
from planrt.plans.running.interpreter import execute
from planrt.types import Ref, TensorSpec

pytestmark = pytest.mark.filterwarnings(
    "ignore::planrt.errors.PlanWarning"
)  # they capture tensors on purpose

N = 6


def rows_of(function, *shapes, dtypes=None, both=True):
    """For each output what it says of input 0: "raw", a number of rows, or None; the two ways of analysis agree."""
    dtypes = dtypes or [torch.float32] * len(shapes)
    examples = [
        torch.rand(shape) + 0.5 if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    graph = trace(function, examples, free_dims=[()] * len(examples))
    found = [of_input(value) for value in analyse(graph).outputs]
    if both:
        assert [of_input(value) for value in analyse(graph, gradients=True).outputs] == found
    return found[0] if len(found) == 1 else found


@pytest.mark.parametrize("gradients", [False, True])
def test_looking_at_views_takes_time_in_proportion_to_their_number(monkeypatch, gradients):
    """Each is written to: all others share the memory, and none of them is asked about."""
    calls = []
    monkeypatch.setattr(flow, "joined", lambda *pair: calls.append(None) or joined(*pair))

    def cost(count):
        views = [Op("Tensor.__getitem__", (Ref(0), i % 8), {}, Ref(1 + i)) for i in range(count)]
        writes = [Op("Tensor.add_", (Ref(1 + i), 1.0), {}, Ref(1 + count + i)) for i in range(count)]
        graph = Graph((TensorSpec((8, 3), torch.float32),), (), (*views, *writes), Ref(0))
        calls.clear()
        analyse(graph, gradients=gradients)
        return len(calls)

    assert cost(120) <= 5 * cost(30)


def test_a_write_reaches_every_view_of_the_memory():
    """The row of `y` that is returned was written through another view of it, by way of a third."""

    def other_views(x, y):
        first, _ = y[0], y[1]
        whole = y.view(-1).view(2, 3)
        first.add_(x.sum(0))
        whole[1].add_(x[0])
        return y[0] + 0, y[1] + 0, first + 0, y.clone()

    assert rows_of(other_views, (N, 3), (2, 3)) == ["raw"] * 4

    def one_view(x, y):
        first = y[0]
        first.add_(x.sum(0))
        return first + 0, y[1] + 0, y.sum()

    assert rows_of(one_view, (N, 3), (2, 3)) == [N, N, N]


def of_input(value, source=0):
    for one in value.depends:
        if one.source == source:
            return one.rows if one.how == "aggregated" else one.how
    return None


CASES = {
    # elementwise and broadcasting
    "elementwise": (lambda x: x * 2 + 1, "raw"),
    "mean": (lambda x: x.mean(0), N),
    "sum of everything": (lambda x: x.sum(), N),
    "other dimension": (lambda x: x.sum(1), "raw"),
    "var": (lambda x: x.var(0), N),
    "std": (lambda x: x.std(0), N),
    "logsumexp": (lambda x: x.logsumexp(0), N),
    "norm": (lambda x: x.norm(dim=0), N),
    "largest norm": (lambda x: x.norm(p=float("inf"), dim=0), "raw"),
    "count": (lambda x: (x > 1).sum(0), N),
    "count_nonzero": (lambda x: torch.count_nonzero(x, 0), N),
    "mean kept": (lambda x: x.mean(0, keepdim=True), N),
    "mean expanded back": (lambda x: x.mean(0, keepdim=True).expand(N, 4), N),
    "mean added to rows": (lambda x: x - x.mean(0), "raw"),
    "centred, squared, averaged": (lambda x: ((x - x.mean(0)) ** 2).mean(0), N),
    "standardised over all": (lambda x: (x / x.sum()).sum(0), N),
    "repeated row, summed": (lambda x: x[:1].expand(N, 4).sum(0), "raw"),
    "broadcast row, summed": (lambda x: (x[:1] * torch.ones(N, 4)).sum(0), "raw"),
    "repeat": (lambda x: x.repeat(3, 1)[:N].sum(0), "raw"),
    "repeated features": (lambda x: x.repeat(1, 3).sum(0), N),
    # shapes
    "transpose": (lambda x: x.t().sum(1), N),
    "permute": (lambda x: x.unsqueeze(0).permute(2, 1, 0).sum(1), N),
    "flattened, summed": (lambda x: x.reshape(-1).sum(), N),
    "flattened": (lambda x: x.reshape(-1), "raw"),
    "features split": (lambda x: x.view(N, 2, 2).sum(0), N),
    "merged and split again": (lambda x: x.view(N * 4).view(N, 4).sum(0), N),
    "groups of rows": (lambda x: x.view(2, 3, 4).mean(1), 3),
    "groups, then all": (lambda x: x.view(2, 3, 4).mean(1).sum(0), N),
    "the other groups": (lambda x: x.view(2, 3, 4).mean(0), 2),
    "odd regrouping": (lambda x: x.reshape(4, N).sum(0), "raw"),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1).mean(0), N),
    "diagonal": (lambda x: (x @ x.t()).diagonal().sum(), "raw"),
    "lower triangle": (lambda x: (x @ x.t()).tril().sum(0), "raw"),
    "unfold": (lambda x: x.unfold(0, 2, 2).sum(-1), "raw"),
    # picking rows
    "one row": (lambda x: x[3], "raw"),
    "slice of one": (lambda x: x[:1].mean(0), "raw"),
    "slice of four": (lambda x: x[:4].mean(0), 4),
    "every other": (lambda x: x[::2].sum(0), 3),
    "slice of a slice": (lambda x: x[1:5][1:3].sum(0), 2),
    "columns": (lambda x: x[:, 1:3].mean(0), N),
    "one column": (lambda x: x[:, 0].mean(), N),
    "split": (lambda x: x.split([2, 4])[1].sum(0), 4),
    "chunk of columns": (lambda x: x.chunk(2, 1)[0].sum(0), N),
    "unbind": (lambda x: x.unbind(0)[0], "raw"),
    "unbind columns": (lambda x: x.unbind(1)[0].sum(0), N),
    "index_select": (lambda x: x.index_select(0, torch.zeros(N, dtype=torch.int64)).sum(0), "raw"),
    "index_select columns": (lambda x: x.index_select(1, torch.tensor([0, 0])).sum(0), N),
    "index": (lambda x: x[torch.tensor([0, 0, 0])].sum(0), "raw"),
    "index columns": (lambda x: x[:, torch.tensor([0, 1])].sum(0), N),
    "gather": (lambda x: x.gather(0, torch.zeros(N, 4, dtype=torch.int64)).sum(0), "raw"),
    "gather columns": (lambda x: x.gather(1, torch.zeros(N, 1, dtype=torch.int64)).sum(0), N),
    "sort": (lambda x: x.sort(0).values.sum(0), "raw"),
    "sort columns": (lambda x: x.sort(1).values.sum(0), N),
    "topk": (lambda x: x.topk(2, 0).values, "raw"),
    "max": (lambda x: x.max(0).values, "raw"),
    "max of all": (lambda x: x.max(), "raw"),
    "amax": (lambda x: x.amax(0), "raw"),
    "maximum of columns": (lambda x: x.amax(1).mean(0), N),
    "median": (lambda x: x.median(0).values, "raw"),
    "quantile": (lambda x: x.quantile(0.5, 0), "raw"),
    "argmax": (lambda x: x.argmax(0), "raw"),
    "any": (lambda x: (x > 1).any(0), "raw"),
    "prod": (lambda x: x.prod(0), "raw"),
    "cumsum": (lambda x: x.cumsum(0), "raw"),
    "cumsum, summed": (lambda x: x.cumsum(0).sum(0), "raw"),
    "softmax over rows": (lambda x: x.softmax(0).sum(0), "raw"),
    "softmax over classes": (lambda x: x.softmax(1).sum(0), N),
    "flip": (lambda x: x.flip(0).sum(0), N),
    "roll": (lambda x: x.roll(1, 0).sum(0), N),
    "telescope": (lambda x: (x[1:] - x[:-1]).sum(0), "raw"),
    "telescope by roll": (lambda x: (x - x.roll(1, 0))[1:].sum(0), "raw"),
    # joining
    "cat with itself": (lambda x: torch.cat([x, x]).mean(0), "raw"),
    "cat of columns": (lambda x: torch.cat([x, x], 1).mean(0), N),
    "cat of few among many": (lambda x: torch.cat([x[:2], torch.ones(50, 4)]).mean(0), 2),
    "part of joined rows": (lambda x: torch.cat([x[:2], torch.ones(50, 4)])[1:].mean(0), "raw"),
    "stack": (lambda x: torch.stack([x, 2 * x]).sum(1), N),
    "padding": (lambda x: F.pad(x[:1], (0, 0, 0, 99)).sum(0), "raw"),
    "shifting by padding": (lambda x: F.pad(x, (0, 0, 5, -5)).sum(0), "raw"),
    "padded columns": (lambda x: F.pad(x, (1, 1)).sum(0), N),
    # products
    "covariance": (lambda x: x.t() @ x, N),
    "cov, which meta tensors cannot do": (lambda x: x.t().cov(), "raw"),
    "gram": (lambda x: x @ x.t(), "raw"),
    "gram, one side": (lambda x: (x @ x.t()).sum(0), "raw"),
    "gram, both sides": (lambda x: (x @ x.t()).sum(), N),
    "einsum": (lambda x: torch.einsum("ni,nj->ij", x, x), N),
    "linear": (lambda x: F.linear(x, torch.ones(3, 4)).mean(0), N),
    "linear of tokens": (lambda x: F.linear(x.view(N, 2, 2), torch.ones(3, 2)).sum((0, 1)), N),
    "linear of tokens, raw": (lambda x: F.linear(x.view(N, 2, 2), torch.ones(3, 2)).sum(1), "raw"),
    "dot": (lambda x: torch.dot(x[:, 0], x[:, 1]), N),
    "cdist": (lambda x: torch.cdist(x, torch.ones(2, 4)).mean(0), N),
    "inverse": (lambda x: torch.linalg.inv(x[:4] + torch.eye(4)).sum(0), "raw"),
    # two aggregates
    "the smaller counts": (lambda x: x.mean(0) + x[:3].mean(0), 3),
    "raw and aggregated": (lambda x: x.mean() + x[0, 0], "raw"),
    "aggregate times rows": (lambda x: (x * x[:2].mean(0)).sum(0), 2),
    "max of means": (lambda x: x.mean(0).max(), N),
    "sort of means": (lambda x: x.mean(0).sort().values, N),
    # histograms
    "histc": (lambda x: torch.histc(x, 4, 0, 1), "raw"),
}


@pytest.mark.parametrize("name", CASES)
def test_known_answers(name):
    function, answer = CASES[name]
    assert rows_of(function, (N, 4)) == answer


def test_nothing_of_an_input_whose_values_are_not_read():
    assert rows_of(lambda x: torch.ones_like(x), (N, 4)) is None
    assert rows_of(lambda x: torch.zeros(3) + x.shape[0], (N, 4)) is None


def test_scalars_have_no_rows():
    assert rows_of(lambda x: x * 2, ()) == "used"


def test_a_count_of_each_value_is_no_aggregate():
    found = rows_of(lambda x: torch.bincount(x, minlength=5), (N,), dtypes=[torch.int64], both=False)
    assert found == "raw"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "loss",
    [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
     F.poisson_nll_loss, F.soft_margin_loss],
)  # fmt: skip
def test_losses_aggregate_unless_told_not_to(loss, reduction):
    def both(x, y):
        return loss(torch.sigmoid(x), torch.sigmoid(y), reduction=reduction)

    expected = "raw" if reduction == "none" else N
    assert rows_of(both, (N, 4), (N, 4)) == expected
    assert rows_of(lambda y, x: both(x, y), (N, 4), (N, 4)) == expected


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction):
    def loss(x, y):
        return F.cross_entropy(x, y, reduction=reduction)

    expected = "raw" if reduction == "none" else N
    for shape, target in (((N, 4), (N,)), ((N, 4, 3, 3), (N, 3, 3))):
        assert rows_of(loss, shape, target, dtypes=[torch.float32, torch.int64]) == expected
        targets = rows_of(lambda y, x: loss(x, y), target, shape, dtypes=[torch.int64, torch.float32])
        assert targets == expected


def test_tokens_of_one_person_are_one_row():
    def loss(x, y):
        return F.cross_entropy(x.view(-1, 5), y.view(-1))

    assert rows_of(loss, (N, 7, 5), (N, 7), dtypes=[torch.float32, torch.int64]) == N


def test_batch_norm_shows_rows_and_its_statistics_aggregate():
    def norm(x, mean, var):
        return F.batch_norm(x, mean, var, training=True), mean

    raw, running = rows_of(norm, (N, 4), (4,), (4,))
    assert (raw, running) == ("raw", N)
    assert rows_of(lambda x, m, v: F.batch_norm(x, m, v, training=True).sum(0), (N, 4), (4,), (4,)) == N
    assert rows_of(lambda x, m, v: F.batch_norm(x, m, v).sum(0), (N, 4), (4,), (4,)) == N


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: F.layer_norm(x, (3, 8, 8)),
        lambda x: F.group_norm(x, 3),
        lambda x: F.conv2d(x, torch.ones(2, 3, 3, 3), torch.ones(2)),
        lambda x: F.conv_transpose2d(x, torch.ones(3, 2, 3, 3)),
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: F.dropout(x, 0.5),
        lambda x: F.gelu(x),
        lambda x: x.flatten(1),
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.pixel_shuffle(x.view(N, 12, 4, 4), 2),
        lambda x: F.unfold(x, 3),
    ],
)
def test_layers_keep_examples_apart(layer):
    assert rows_of(lambda x: layer(x).mean(0), (N, 3, 8, 8)) == N
    assert rows_of(layer, (N, 3, 8, 8)) == "raw"


def test_conv_over_rows_mixes_them():
    assert rows_of(lambda x: F.conv1d(x.t().unsqueeze(0), torch.ones(1, 4, 3)).sum(-1), (N, 4)) == "raw"
    assert (
        rows_of(lambda x: F.avg_pool1d(x.t().unsqueeze(0), N), (N, 4)) == "raw"
    )  # padding or windows: not followed


# In place


def test_writes_through_views():
    def into_part(x):
        out = torch.zeros(N, 3)
        out[:, 0] = x[:, 0]
        out[:, 1] = x.sum(1)
        return out.sum(0), out, out[:, 2].clone()

    assert rows_of(into_part, (N, 4)) == [N, "raw", "raw"]

    def one_row(x):
        out = torch.zeros(N, 4)
        out[2] = x[3]
        return out.sum(0)

    assert rows_of(one_row, (N, 4)) == "raw"

    def view_first(x):
        out = torch.zeros(N, 4)
        part = out[:, :2]
        flat = out.view(-1)
        part.add_(x[:, :2])
        return flat, part.sum(0)

    assert rows_of(view_first, (N, 4)) == ["raw", N]

    def base_first(x):
        out = torch.zeros(N, 4)
        part = out.t()[0]
        out.copy_(x)
        return part.sum(), part

    assert rows_of(base_first, (N, 4)) == [N, "raw"]


def test_writes_add_to_what_was_there():
    """Overwriting frees nothing: `part` is a copy or not depending on strides."""

    def overwritten(x):
        made = x * 2
        part = made.contiguous()
        part.zero_()
        return made

    assert rows_of(overwritten, (N, 4)) == "raw"
    assert rows_of(lambda x: (x * 2).copy_(x.mean(0)), (N, 4)) == "raw"
    assert rows_of(lambda x: torch.zeros(4).copy_(x.mean(0)), (N, 4)) == N
    assert rows_of(lambda x: (x * 2).masked_fill_(x > 1, 0.0).sum(0), (N, 4)) == N


def test_writes_into_what_may_be_a_copy():
    """For an input stored column by column the reshape is a view, and the write changes the input."""

    def hidden(x, y):
        y.t().reshape(-1).copy_(x.reshape(-1))
        return y

    graph = trace(hidden, [torch.rand(N, 4), torch.rand(N, 4)], free_dims=[(), ()], input_names=("x", "y"))
    for gradients in (False, True):
        report = analyse(graph, gradients=gradients)
        assert of_input(report.outputs[0]) == "raw"
        assert [value.path for value in report.written] == ["y"]


def test_inputs_and_state_that_are_written_are_reported():
    mean = torch.zeros(4)

    def update(x, total):
        mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        total.add_(x.sum(0))
        return x.mean()

    graph = trace(update, [torch.ones(N, 4), torch.zeros(4)], free_dims=[(), ()], input_names=("x", "total"))
    for gradients in (False, True):
        report = analyse(graph, gradients=gradients)
        assert [(one.path, of_input(one)) for one in report.written] == [
            ("total", N),
            (graph.state[0].name, N),
        ]
        assert report.written[0].written_by == (3,) or len(report.written[0].written_by) == 1


# Gradients


GRADIENT_OPS = {
    "Tensor.backward": torch.Tensor.backward,
    "Tensor.grad": lambda tensor: tensor.grad,
    "autograd.grad": torch.autograd.grad,
}


@pytest.fixture
def gradient_ops(monkeypatch):
    """The ops of plans that differentiate, on the table."""
    for name, function in GRADIENT_OPS.items():
        if name not in ops.TABLE:
            monkeypatch.setitem(ops.TABLE, name, function)


def training_plan(loss_ops, weight, *inputs):
    """Inputs, then a weight as state; `loss_ops` (of the leaf's number) end with the loss. Gives loss and gradient."""
    from planrt.plans.ir.graph import StateSpec

    state = (StateSpec("weight", TensorSpec(weight, torch.float32), "parameter", True),)
    number = len(inputs)
    steps = [
        Op("Tensor.detach", (Ref(number),), {}, Ref(number + 1)),
        Op("Tensor.requires_grad_", (Ref(number + 1),), {}, Ref(number + 2)),
    ]
    for name, args in loss_ops(Ref(number + 2)):
        steps.append(Op(name, args, {}, Ref(number + len(steps) + 1)))
    loss = Ref(number + len(steps))
    steps.append(Op("Tensor.backward", (loss,), {}, None))
    gradient = Ref(loss.index + 1)
    steps.append(Op("Tensor.grad", (Ref(number + 2),), {}, gradient))
    return Graph(tuple(inputs), state, tuple(steps), (loss, gradient))


def test_gradients_of_shared_parameters_are_aggregates(gradient_ops):
    def linear(w):
        number = w.index
        return [("torch.matmul", (Ref(0), w)), ("nn.functional.cross_entropy", (Ref(number + 1), Ref(1)))]

    x, y = TensorSpec((N, 4), torch.float32), TensorSpec((N,), torch.int64)
    report = analyse(training_plan(linear, (4, 3), x, y))
    assert [of_input(value) for value in report.outputs] == [N, N]
    assert [of_input(value, 1) for value in report.outputs] == [N, N]
    assert report.outputs[1].spec == TensorSpec((4, 3), torch.float32)
    assert 4 in report.outputs[1].ops


def test_gradients_with_a_place_for_each_row_are_raw(gradient_ops):
    def weighted(w):
        return [("torch.mul", (Ref(0), w)), ("torch.sum", (Ref(w.index + 1),))]

    report = analyse(training_plan(weighted, (N, 4), TensorSpec((N, 4), torch.float32)))
    assert [of_input(value) for value in report.outputs] == [N, "raw"]


def test_gradients_of_embeddings_show_who_used_an_entry(gradient_ops):
    def embedded(w):
        return [("nn.functional.embedding", (Ref(0), w)), ("torch.sum", (Ref(w.index + 1),))]

    report = analyse(training_plan(embedded, (9, 4), TensorSpec((N, 3), torch.int64)))
    assert of_input(report.outputs[1]) == "raw"


NEED_VALUES = ("masked", "packed")  # torch's own modules look at values, which meta tensors have not


@pytest.mark.parametrize("name", [name for name in nets.NETS if name not in ("embedding", *NEED_VALUES)])
def test_gradients_of_networks_are_aggregates(name):
    """The whole training step below autograd: forward, loss, backward, for every parameter."""
    from planrt.plans.analysis.flow import Info
    from planrt.plans.analysis.rows import keep
    from planrt.plans.analysis.tracker import Tracker

    net, loss, ((x, y), *_) = nets.make(name)
    if name == "transformer":
        net.embed.requires_grad_(False)  # its gradient shows tokens
    net.to("meta")
    if name == "frozen":
        net.eval()  # in training it binds buffers anew
    tracker = Tracker()
    x, y = x.to("meta"), y.to("meta")
    for number, tensor in enumerate((x, y)):
        tracker.register(tensor, Info(1 << number, 0, {number: keep(0, len(tensor))}))
    for number, tensor in enumerate([*net.parameters(), *net.buffers()], 2):
        tracker.register(tensor, Info(1 << number))
    if isinstance(loss, torch.nn.Module):
        loss = copy.deepcopy(loss).to("meta")
        for tensor in loss.buffers():
            tracker.register(tensor, Info())
    with tracker:
        loss(net(x), y).backward()
    assert not tracker.unknown
    trained = [p for p in net.parameters() if p.grad is not None]
    assert len(trained) >= 2
    for parameter in trained:
        rows = tracker.info(parameter.grad).rows
        assert {trace.rows for trace in rows.values()} == {len(x)}, [
            str(trace.lost) for trace in rows.values()
        ]


# Both ways agree, and what they claim is so


@pytest.mark.parametrize("name", [name for name in nets.NETS if name != "packed"])  # its sizes follow values
@pytest.mark.parametrize("training", [True, False])
def test_op_by_op_and_whole_runs_agree_on_networks(name, training):
    net, loss, ((x, y), *_) = nets.make(name)
    net.train(training)

    def both(x, y):
        out = net(x)
        return out, loss(out, y)

    graph = trace(both, (x, y), modules=[net], free_dims=[(0,), (0,)])
    specs = TensorSpec.of(x), TensorSpec.of(y)
    one, whole = analyse(graph, specs), analyse(graph, specs, gradients=True)
    for ours, theirs in zip([*one.outputs, *one.written], [*whole.outputs, *whole.written], strict=True):
        assert (ours.path, ours.spec) == (theirs.path, theirs.spec)
        assert set(ours.ops) <= set(theirs.ops)
        assert [(d.source, d.how, d.rows) for d in ours.depends] == [
            (d.source, d.how, d.rows) for d in theirs.depends
        ]
    assert of_input(one.outputs[0]) == "raw"
    assert of_input(one.outputs[1]) == len(x)


STEPS = [
    lambda a, b, r: a + b,
    lambda a, b, r: a * b,
    lambda a, b, r: torch.exp(a * 0.1),
    lambda a, b, r: a / (1 + b),
    lambda a, b, r: a.sum(r.randrange(a.dim()), keepdim=r.random() < 0.5),
    lambda a, b, r: a.mean(0),
    lambda a, b, r: a.mean(),
    lambda a, b, r: a.logsumexp(r.randrange(a.dim())),
    lambda a, b, r: a.transpose(0, -1),
    lambda a, b, r: a.reshape(-1),
    lambda a, b, r: a.reshape(r.choice([d for d in range(1, a.numel() + 1) if a.numel() % d == 0]), -1),
    lambda a, b, r: a.unsqueeze(r.randrange(a.dim() + 1)),
    lambda a, b, r: a.squeeze(),
    lambda a, b, r: a[: r.randint(1, len(a))],
    lambda a, b, r: a[r.randrange(len(a)) :: r.randint(1, 2)],
    lambda a, b, r: a[r.randrange(len(a))],
    lambda a, b, r: a.expand(3, *a.shape),
    lambda a, b, r: a[:1].expand(4, *a.shape[1:]),
    lambda a, b, r: torch.cat([a, b], r.randrange(a.dim())),
    lambda a, b, r: torch.stack([a, b], r.randrange(a.dim() + 1)),
    lambda a, b, r: a.flip(0),
    lambda a, b, r: a.roll(1, 0),
    lambda a, b, r: a.repeat(2, *[1] * (a.dim() - 1)),
    lambda a, b, r: F.pad(a, [0, 0] * (a.dim() - 1) + [1, 2]),
    lambda a, b, r: a.cumsum(0),
    lambda a, b, r: a.softmax(r.randrange(a.dim())),
    lambda a, b, r: a.amax(r.randrange(a.dim())),
    lambda a, b, r: a.sort(r.randrange(a.dim())).values,
    lambda a, b, r: a.t() @ b,
    lambda a, b, r: a @ b.t(),
    lambda a, b, r: torch.einsum("ij,ij->j", a, b),
    lambda a, b, r: a.view(2, -1, *a.shape[1:]).mean(1),
    lambda a, b, r: a.view(-1, 2, *a.shape[1:]).sum(1),
    lambda a, b, r: a.clone().add_(b),
    lambda a, b, r: _written(a, b),
    lambda a, b, r: F.layer_norm(a, a.shape[-1:]) + 3,
    lambda a, b, r: a.split(2)[0],
    lambda a, b, r: a.diagonal(),
    lambda a, b, r: a.gather(0, torch.zeros_like(a, dtype=torch.int64)),
    lambda a, b, r: a[:2].var(0, correction=0),
]  # fmt: skip


def _written(a, b):
    made = a * 1
    made.t()[0].copy_(b.t()[0] if b.dim() == 2 else b)
    return made


def random_plan(seed):
    """A traceable function of x [6, 4] and y [6, 4] that returns everything it computed."""
    choice = random.Random(seed)
    steps, program = choice.randint(2, 7), []
    values = [torch.rand(6, 4) + 0.5, torch.rand(6, 4) + 0.5]
    for _ in range(steps):
        for _attempt in range(20):
            step, one, two = (
                choice.choice(STEPS),
                choice.randrange(len(values)),
                choice.randrange(len(values)),
            )
            draw = choice.randrange(10**6)
            try:
                made = step(values[one], values[two], random.Random(draw))
            except (RuntimeError, IndexError, ValueError, TypeError):
                continue
            if made.numel() == 0 or made.numel() > 400 or made.abs().max() > 9:  # large ones drown others
                continue
            program.append((step, one, two, draw))
            values.append(made)
            break

    def run(x, y):
        found = [x, y]
        for step, one, two, draw in program:
            found.append(step(found[one], found[two], random.Random(draw)))
        return tuple(found[2:])

    return run


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 10**9))
def test_claims_hold_by_experiment(seed):
    """No entry that is called aggregated over k rows depends on fewer than k, but on some; and so for no rows."""
    function = random_plan(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(6, 4, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    graph = trace(function, (x, y), free_dims=[(), ()])
    report = analyse(graph)
    whole = analyse(graph, gradients=True)
    for source, given_input in enumerate((x, y)):
        moves = []
        for row in range(6):
            changed = given_input.clone()
            # so little that no order of values changes: a sort of sums would show it for some rows only
            changed[row] += 1e-4 * (torch.rand(4, generator=generator, dtype=torch.float64) + 0.5)
            arguments = (changed, y) if source == 0 else (x, changed)
            moves.append(execute(graph, arguments, []))
        before = execute(graph, (x, y), [])
        for place, value in enumerate(report.outputs):
            claim = of_input(value, source)
            assert value.spec == TensorSpec.of(before[place])
            assert of_input(whole.outputs[place], source) == claim
            was = before[place].double()
            slack = 1e-13 * was.abs().clamp_min(
                1
            )  # what is constant in exact numbers may still move by rounding
            touched = sum(((move[place].double() - was).abs() > slack).int() for move in moves)
            if claim is None:
                assert not touched.any()
            elif claim != "raw":
                assert not ((touched > 0) & (touched < claim)).any(), f"{value.path} {claim}\n{graph}"


def test_the_example_of_the_module_is_right():
    x = rows.keep(0, 6)
    fates = rows.reshaped(4, 6, (2, 3, 4), "view"), rows.reshaped(1, 4, (2, 3, 4), "view")
    y = rows.compose(x, (6, 4), fates)
    (axis,) = y.axes
    assert axis.digits == (rows.Digit(1, 1, 3, 1), rows.Digit(0, 1, 2, 3))
    z = rows.compose(y, (2, 3, 4), (rows.keep(0, 2), rows.fold(3, "sum"), rows.keep(1, 4)))
    assert z.axes == (rows.Axis(2, (rows.Digit(0, 1, 2, 3),), 3),)
    total = rows.compose(z, (2, 4), (rows.fold(2, "sum"), rows.keep(0, 4)))
    assert (total.axes, total.least) == ((), 6)
    other = rows.compose(y, (2, 3, 4), (rows.fold(2, "sum"), rows.keep(0, 3), rows.keep(1, 4)))
    assert other.axes == (rows.Axis(3, (rows.Digit(0, 1, 3, 1),), 2),)
    assert [trace.rows for trace in (x, y, z, total, other)] == [1, 1, 3, 6, 2]


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: x.view(2, 3, 4).sum(1), 3), (lambda x: x.view(2, 3, 4).sum(1).sum(0), 6),
        (lambda x: x.view(2, 3, 4).sum(0), 2), (lambda x: (x[1:] - x[:-1]).sum(0), "raw"),
        (lambda x: x.max(0).values, "raw"), (lambda x: x.view(4, 6).sum(0), "raw"),
    ],
)  # fmt: skip
def test_the_examples_of_lost_rows_are_right(function, found):
    assert rows_of(function, (6, 4)) == found
