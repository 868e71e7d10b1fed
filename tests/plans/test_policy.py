"""Policies: reading them, and holding plans against them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from planrt.errors import OptionError, PlanError, PolicyError
from planrt.fl.runs.networks import seeded_net
from planrt.plans import Graph, Op, trace
from planrt.plans.policy.approvals import Approvals
from planrt.plans.policy.rules import Policy, ReleaseRule
from planrt.plans.policy.verify import check
from planrt.types import Ref, TensorSpec

pytestmark = pytest.mark.filterwarnings(
    "ignore::planrt.errors.PlanWarning"
)  # they capture tensors on purpose

F32 = torch.float32
EXAMPLE = Path(__file__).parents[2] / "examples" / "hospital_policy.toml"
PATIENTS = {0: ["#patients"]}


def graph_of(function, *shapes, names=("x", "y", "z")):
    return trace(
        function,
        [torch.rand(shape) for shape in shapes],
        free_dims=[()] * len(shapes),
        input_names=names[: len(shapes)],
    )


def rules(report):
    return [violation.rule for violation in report.violations]


# Reading


def written(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


def test_the_example_holds_every_key_and_is_as_it_says():
    policy = Policy.from_file(EXAMPLE)
    assert policy.approval == "ask"
    assert policy.max_memory == 4 * 2**30
    assert policy.max_ops == 2000
    assert policy.release == (
        ReleaseRule("#patients", 20),
        ReleaseRule("#rare-diseases", 100, ("sum", "mean", "count")),
    )
    assert "Tensor.sort" not in policy.allowed_ops
    assert "Tensor.add" in policy.allowed_ops
    text = EXAMPLE.read_text()
    assert all(name in text for name in Policy.__dataclass_fields__)


def test_an_empty_file_is_the_default(tmp_path):
    assert Policy.from_file(written(tmp_path, "")) == Policy()
    assert Policy().approval == "ask"


def test_bytes_have_units_and_limits_can_be_lifted(tmp_path):
    text = 'max_memory = "1.5 MiB"\nmax_input_bytes = "2MB"\nmax_output_bytes = 7\n'
    text += 'max_flops = "none"\nmax_seconds = 0.5'
    policy = Policy.from_file(written(tmp_path, text))
    assert (policy.max_memory, policy.max_input_bytes, policy.max_output_bytes) == (3 * 2**19, 2 * 10**6, 7)
    assert policy.max_flops is None
    assert policy.max_seconds == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_opps = 3", "unknown key 'max_opps'; known are approval"),
        ('max_ops = "many"', "max_ops must be a whole number, at least 1: got 'many'"),
        ("max_ops = -1", "max_ops must be a whole number"),
        ("max_ops = 1.5", "max_ops must be a whole number"),
        ("max_ops = true", "max_ops must be a whole number"),
        ('max_memory = "4 gigs"', 'max_memory must be a number of bytes, or as "512 MiB"'),
        ('max_memory = "GiB"', "max_memory must be a number of bytes"),
        ("max_seconds = 0", "max_seconds must be a number of seconds above 0"),
        ("max_seconds = inf", "max_seconds must be"),
        ("max_check_seconds = 0", "max_check_seconds must be a number of seconds above 0"),
        ('max_check_seconds = "soon"', "max_check_seconds must be"),
        ('approval = "yes"', 'approval must be "open", "list" or "ask", got \'yes\''),
        ("approved = 3", "approved must be a list of strings"),
        ('approved = ["abc"]', "approved: 'abc' is not a plan's hash"),
        ('allow = "torch.add"', "allow must be a list of strings"),
        ('allow = ["torch.ad"]', "allow: 'torch.ad' matches no op"),
        ('deny = ["os.*"]', r"deny: 'os.\*' matches no op"),
        ("release = 3", r"write \[\[release\]\]"),
        ("[[release]]\nmin_rows = 3", "release.tag is missing"),
        ('[[release]]\ntag = "#a"', "release.min_rows is missing"),
        ('[[release]]\ntag = "#a"\nmin_rows = 0', "release.min_rows must be a whole number, at least 1"),
        ('[[release]]\ntag = "a"\nmin_rows = 2', "release.tag must be a tag such as"),
        ('[[release]]\ntag = "#a"\nmin_rows = 2\nrows = 3', "unknown key 'release.rows'"),
        ('[[release]]\ntag = "#a"\nmin_rows = 2\naggregates = ["max"]', "'max' is none of"),
        ("max_ops = ", "not TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(OptionError, match=message) as error:
        Policy.from_file(written(tmp_path, text))
    assert "policy.toml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# of ours\n\nmax_ops = 3\nmax_opps = 3\n", 4),
        ("max_ops = 3\n  'max_opps'=3", 2),
        ("max_ops = 3\nmax_seconds = 0  # for now\nmax_opps = 3", 2),
        ('approval = "ask"\nallow = [\n  "torch.add",\n  "torch.ad",\n]', 2),
        ('[[release]]\ntag = "#a"\nmin_rows = 2\n\n[[release]]\ntag = "#b"\nrows = 3\nmin_rows = 2', 7),
        ('[[release]]\ntag = "#a"\nmin_rows = 2\n[[release]]\ntag = "#b"', 4),
        ('[[release]]\ntag = "#a"\nmin_rows = 2\naggregates = ["max"]', 4),
        ("[realease]\ntag = 3", 1),
        ("max_ops = 5\nrelease = 3", 2),
        ("max_ops = 5\nmax_oops.number = 3", 2),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path, text, line):
    with pytest.raises(OptionError, match=rf"policy.toml, line {line}: ") as error:
        Policy.from_file(written(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(OptionError, match="No such file"):
        Policy.from_file(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match="not TOML"):
        Policy.from_file(tmp_path / "binary.toml")


def test_versions_tell_policies_apart():
    assert Policy().version == Policy(approval="ask").version
    others = [Policy(approval="open"), Policy(max_ops=1), Policy(release=(ReleaseRule("*", 2),))]
    assert len({Policy().version, *[one.version for one in others]}) == 4
    assert len(Policy().version) == 12


def test_a_policy_prints_its_rules():
    page = str(Policy(max_flops=None, release=(ReleaseRule("#patients", 20, ("mean",)),)))
    assert "computation: no limit" in page
    assert "memory: at most 8 GiB" in page
    assert "release: of #patients only aggregates over at least 20 rows (mean)" in page
    assert "private data is not looked after" in str(Policy())


# Ops and limits


def test_a_plan_within_the_rules():
    report = check(graph_of(lambda x: x.mean(0), (6, 4)), Policy())
    assert report.ok
    assert report.raise_for_violations() is report
    assert f"Keeps policy {Policy().version}." in str(report)


def test_an_op_that_is_not_allowed_is_named_with_its_line():
    graph = graph_of(lambda x: x.exp().sort(0).values, (6, 4))
    report = check(graph, Policy(deny=("*.sort",)))
    (violation,) = report.violations
    assert (violation.rule, violation.op_index, violation.op) == ("ops", 1, "Tensor.sort")
    assert violation.line == "_2, _3 = _1.sort(0)"
    assert str(report).splitlines()[1:5] == [
        "  (Names and words are its author's, and may say anything; the hash, ops and sizes are what runs.)",
        "",
        f"BREAKS policy {report.policy_version}: 1 violation",
        "  ! [ops] op 1, _2, _3 = _1.sort(0): the policy does not allow Tensor.sort",
    ]
    with pytest.raises(PolicyError, match=r"breaks the policy: \[ops\] op 1") as error:
        report.raise_for_violations()
    assert (error.value.rule, error.value.op, error.value.index) == ("ops", "Tensor.sort", 1)
    assert error.value.line == violation.line
    assert isinstance(error.value, PlanError)
    assert rules(check(graph, Policy(allow=("Tensor.exp", "Tensor.s*")))) == []
    assert rules(check(graph, Policy(allow=("Tensor.s*",)))) == ["ops"]


@pytest.mark.parametrize(
    ("limits", "rule", "index"),
    [
        ({"max_ops": 1}, "max_ops", None),
        ({"max_flops": 2 * 6 * 4 * 6 - 1}, "max_flops", 1),
        ({"max_memory": 6 * 4 * 4 + 6 * 6 * 4}, "max_memory", 1),
        ({"max_input_bytes": 95}, "max_input_bytes", None),
        ({"max_output_bytes": 143}, "max_output_bytes", None),
    ],
)
def test_limits(limits, rule, index):
    graph = graph_of(lambda x: (x @ x.t()) + 1, (6, 4))
    report = check(graph, Policy(**limits))
    assert rules(report) == [rule]
    assert report.violations[0].op_index == index
    assert check(graph, Policy(**{name: limit + 500 for name, limit in limits.items()})).ok
    assert check(graph, Policy(**dict.fromkeys(limits))).ok


def test_a_long_plan_is_refused_without_being_analysed():
    spec = TensorSpec((2, 3), F32)
    wrong = Op("torch.matmul", (Ref(0), Ref(0)), {}, Ref(1))  # would fail
    report = check(Graph((spec,), (), (wrong, replace(wrong, results=Ref(2))), Ref(1)), Policy(max_ops=1))
    assert rules(report) == ["max_ops"]
    assert report.ops == ()


def many(count, name="torch.add", least=1):
    """A plan of so many different ops, each of which has to be looked at by itself."""
    ops = tuple(Op(name, (Ref(i), least + i), {}, Ref(i + 1)) for i in range(count))
    return Graph((TensorSpec((8, 8), F32),), (), ops, Ref(count))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("plan", [many(3000), many(300, "torch.matrix_power", 10**6)])
def test_a_plan_that_takes_long_to_look_at_is_refused(plan, gradients):
    report = check(plan, Policy(approval="open", max_check_seconds=1e-3), gradients=gradients)
    assert [str(one) for one in report.violations] == [
        "[max_check_seconds] looking at the plan takes more than 0.001 s"
    ]
    assert report.ops == ()
    assert not check(many(20), Policy(approval="open", max_check_seconds=60.0)).violations


def test_what_takes_no_time_to_look_at_keeps_its_version():
    assert Policy(max_check_seconds=10.0).version == Policy().version
    assert Policy(max_check_seconds=None).version != Policy().version


def test_sizes_that_nobody_can_tell_fail_closed():
    unbounded = graph_of(lambda x: torch.bincount(x.view(-1).long()), (6, 4))
    report = check(unbounded, Policy())
    assert rules(report) == ["max_flops", "max_memory", "max_output_bytes"]
    assert {violation.op for violation in report.violations} == {"torch.bincount"}
    assert check(unbounded, Policy(max_flops=None, max_memory=None, max_output_bytes=None)).ok
    bounded = graph_of(lambda x: x[x > 1], (6, 4))
    assert check(bounded, Policy()).ok
    assert rules(check(bounded, Policy(max_output_bytes=95))) == ["max_output_bytes"]


# Approval


def test_approval(tmp_path):
    graph = graph_of(lambda x: x.mean(0), (6, 4))
    assert check(graph, Policy(approval="open")).ok
    assert rules(check(graph, Policy(approval="list"))) == ["approval"]
    assert check(graph, Policy(approval="list", approved=(graph.hash,))).ok
    approvals = Approvals(tmp_path)
    asking = Policy(approval="ask")

    def says():
        report = check(graph, asking, approvals=approvals)
        return report.violations[0].message if report.violations else "ok"

    assert check(graph, asking).ok  # nobody to ask: `planrt inspect`
    assert says().endswith("has not been approved by the owner")
    approvals.submit(graph.hash, graph.to_bytes())
    assert says().endswith("waits for the owner's approval")
    approvals.deny(graph.hash, why="too curious")
    assert says().endswith("was denied by the owner: too curious")
    approvals.approve(graph.hash)
    assert says() == "ok"
    approvals.deny(graph.hash, why="changed my mind")
    assert check(graph, Policy(approved=(graph.hash,)), approvals=approvals).ok


# Release


def release(function, *shapes, rule=None, tags=PATIENTS):
    rule = rule or ReleaseRule("#patients", 5)
    return check(graph_of(function, *shapes), Policy(release=(rule,)), tags=tags)


def test_aggregates_over_enough_rows_may_leave():
    assert release(lambda x: x.mean(0), (6, 4)).ok
    assert release(lambda x: x.mean(0), (6, 4), rule=ReleaseRule("#patients", 6)).ok
    few = release(lambda x: x.mean(0), (6, 4), rule=ReleaseRule("#patients", 7))
    assert "by an aggregate over 6 rows; at least 7 are asked for" in few.violations[0].message


def test_rows_may_not():
    report = release(lambda x: {"mean": x.mean(), "worst": x.exp().amax(0) + 1}, (6, 4))
    (violation,) = report.violations
    assert violation.rule == "release"
    assert violation.line == "_3 = _2.amax(0)"
    assert violation.message == (
        "output['worst'] depends on x (#patients) without an aggregate over at least 5 rows: "
        "its rows cannot be followed through amax"
    )
    raw = release(lambda x: x * 2, (6, 4))
    assert raw.violations[0].op == "Tensor.mul"
    assert release(lambda x: x, (6, 4)).violations[0].op_index is None
    assert rules(release(lambda x: x * 2, ())) == ["release"]


def test_which_inputs_a_rule_is_about():
    def plan(x, y):
        return x.mean(), y * 2

    assert release(plan, (6, 4), (6, 4)).ok
    assert not release(plan, (6, 4), (6, 4), tags={1: ["#patients"]}).ok
    assert release(plan, (6, 4), (6, 4), tags={1: ["#others"]}).ok
    assert not release(plan, (6, 4), (6, 4), tags={1: []}, rule=ReleaseRule("*", 5)).ok
    assert release(plan, (6, 4), (6, 4), tags={}, rule=ReleaseRule("*", 5)).ok


def test_kinds_of_aggregates():
    only = ReleaseRule("#patients", 5, ("mean", "count"))
    assert release(lambda x: x.mean(0), (6, 4), rule=only).ok
    report = release(lambda x: x.std(0) + x.mean(0), (6, 4), rule=only)
    assert report.violations[0].message.endswith("by std; allowed are mean, count")


def test_what_a_plan_writes_leaves_too():
    def into_other(x, y):
        y.copy_(x)
        return x.mean()

    report = release(into_other, (6, 4), (6, 4))
    assert report.violations[0].message.startswith("y depends on x")
    assert release(into_other, (6, 4), (6, 4), tags={0: ["#patients"], 1: ["#patients"]}).ok

    def into_itself(x):
        x.mul_(2)
        return x.mean()

    assert release(into_itself, (6, 4)).ok
    memory = torch.zeros(6, 4)

    def into_state(x):
        memory.copy_(x)
        return x.mean()

    assert not release(into_state, (6, 4)).ok


def test_training_a_network_releases_aggregates():
    net = seeded_net(1)
    graph = trace(
        lambda images, labels: F.nll_loss(net(images), labels),
        [torch.rand(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64)],
        modules=[net],
        free_dims=[(0,), (0,)],
    )
    policy = Policy(release=(ReleaseRule("#patients", 20),))
    tags = {0: ["#patients"], 1: ["#patients"]}
    specs = [TensorSpec((32, 1, 28, 28), F32), TensorSpec((32,), torch.int64)]
    assert check(graph, policy, specs, tags).ok
    assert check(graph, policy, specs, tags, gradients=True).ok
    small = [TensorSpec((8, 1, 28, 28), F32), TensorSpec((8,), torch.int64)]
    assert rules(check(graph, policy, small, tags)) == ["release", "release"]


def test_training_releases_gradients_and_keeps_predictions():
    class Rows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = torch.nn.Parameter(torch.ones(4))
            self.each = torch.nn.Parameter(torch.ones(6, 4))

        def forward(self, x):
            return x * self.each * self.shared

    def plan_of(net):
        def loss(x):
            prediction = net(x)
            return prediction.sum(), prediction

        return trace(loss, [torch.rand(6, 4)], modules=[net], free_dims=[()], input_names=("x",))

    policy = Policy(release=(ReleaseRule("#patients", 5),))
    report = check(plan_of(Rows()), policy, tags=PATIENTS, gradients=True)
    (violation,) = report.violations
    assert violation.message.startswith("gradient of each depends on x (#patients) without an aggregate")
    assert "Gradients in training" in str(report)
    assert [value.path for value in report.gradients] == ["gradient of shared", "gradient of each"]
    net = Rows()
    net.each.requires_grad_(False)
    assert check(plan_of(net), policy, tags=PATIENTS, gradients=True).ok
    assert not check(plan_of(net), policy, tags=PATIENTS).ok


# One row as many: each of these is the first row, or a few, that look like 64.
MANY_OF_FEW = {
    "repeated": lambda x: x[:5].repeat(20, 1).sum(0),
    "repeated entries": lambda x: x[:5].repeat_interleave(20, 0).sum(0),
    "expanded": lambda x: x[:1].expand(64, -1).mean(0),
    "joined": lambda x: torch.cat([x[:5]] * 20).sum(0),
    "stacked": lambda x: torch.stack([x.unbind(0)[3]] * 64).sum(0),
    "indexed": lambda x: x[torch.zeros(64, dtype=torch.int64)].sum(0),
    "gathered": lambda x: x.gather(0, torch.zeros(64, 3, dtype=torch.int64)).sum(0),
    "looked up": lambda x: F.embedding(torch.zeros(64, dtype=torch.int64), x).sum(0),
    "a bag": lambda x: F.embedding_bag(torch.zeros(1, 64, dtype=torch.int64), x, mode="sum"),
    "broadcast": lambda x: (x[:1] + torch.zeros(64, 3)).sum(0),
    "multiplied": lambda x: (torch.ones(64, 1) @ x[:1]).sum(0),
    "padded": lambda x: F.pad(x[:1], (0, 0, 0, 63)).sum(0),
    "padded by itself": lambda x: F.pad(x.T[None][:, :, :1], (63, 0), mode="replicate").sum(-1),
    "written": lambda x: torch.zeros(64, 3).index_copy(0, torch.tensor([0]), x[:1]).sum(0),
    "put in a slice": lambda x: torch.slice_scatter(torch.zeros(64, 3), x[:1], 0, 0, 1).sum(0),
    "another dimension": lambda x: x.unsqueeze(0).expand(64, 64, 3).sum(0),
    "entries for rows": lambda x: x.flatten()[:20].sum(),
    "a class for a row": lambda x: F.nll_loss(x[:, 0][None], torch.tensor([5])),
    "channels for rows": lambda x: F.conv1d(x[None], torch.ones(64, 1, 1), groups=64),
    "as many windows": lambda x: F.adaptive_avg_pool1d(x.T[None], 64),
    "a window at the edge": lambda x: F.avg_pool1d(x.T[None], 20, stride=20, padding=10),
    "causal": lambda x: F.scaled_dot_product_attention(torch.ones(1, 1, 3), x[None], x[None], is_causal=True),
    "weighted": lambda x: torch.cov(x.T, fweights=torch.tensor([1, 1] + [0] * 62)),
    "transformed": lambda x: torch.fft.fft(x, n=1, dim=0).real.expand(64, 3).sum(0),
}


@pytest.mark.parametrize("attack", MANY_OF_FEW)
def test_few_rows_do_not_pass_for_many(attack):
    unlimited = dict.fromkeys(["max_flops", "max_memory", "max_output_bytes"])
    policy = Policy(approval="open", release=(ReleaseRule("#patients", min_rows=20),), **unlimited)
    report = check(graph_of(MANY_OF_FEW[attack], (64, 3)), policy, tags=PATIENTS)
    assert [one.rule for one in report.violations] == ["release"]
