"""Holds a plan against a policy before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from planrt.plans.analysis.analysing import analyse, concrete_inputs
from planrt.plans.analysis.findings import AnalysisTimeError
from planrt.plans.analysis.report import (
    Dependence,
    Report,
    Totals,
    ValueReport,
    Violation,
    count_bytes,
    count_flops,
)
from planrt.plans.ir.constants import Constant, approval_hash, known_constants
from planrt.plans.ir.graph import Graph
from planrt.plans.policy.approvals import Approvals
from planrt.plans.policy.rules import ALL_PRIVATE, Policy, ReleaseRule
from planrt.types import TensorSpec


def check(
    graph: Graph,
    policy: Policy,
    inputs: Sequence[TensorSpec | None] = (),
    tags: Mapping[int, Iterable[str]] | None = None,
    *,
    approvals: Approvals | None = None,
    constants: Sequence[Constant] | None = None,
    gradients: bool = False,
) -> Report:
    """Checks `graph` for inputs of these specs, and returns the report with what it breaks of `policy`,
    approval included.

    For example, a plan that returns the rows that it was given::

        report = check(graph, Policy(approval="open", release=(ReleaseRule("#patients", 20),)), tags={0: ["#patients"]})
        report.ok          # False
        print(report)      # what the plan does, and which rule it breaks

    Nothing runs, and nothing is raised for a plan that breaks a rule: `Report.violations` has them all.

    Args:
        graph: the plan.
        policy: the owner's rules.
        inputs: see `planrt.plans.analysis.analyse`.
        tags: for each input that is private data its place and its tags, possibly none. Release rules are
            about these.
        approvals: the owner's decisions. Without them a plan that has to be asked for is not held up here.
        constants: the plan's constants, of which an approval is too; where None, from the state that `graph`
            has.
        gradients: as `check_rules` takes it.

    Raises:
        PlanArgumentError, ExecutionError: as `check_rules`.
    """
    constants = known_constants(graph) if constants is None else constants
    report = check_rules(graph, policy, inputs, tags, gradients=gradients).with_constants(constants)
    violations = [*_approval(graph, policy, approvals, constants), *report.violations]
    return report.with_violations(violations, report.policy_version, report.tags)


def check_rules(
    graph: Graph,
    policy: Policy,
    inputs: Sequence[TensorSpec | None] = (),
    tags: Mapping[int, Iterable[str]] | None = None,
    *,
    gradients: bool = False,
) -> Report:
    """Checks `graph`, and returns the report with what it breaks of the rules of `policy`, whether it was
    approved or not.

    Args:
        graph, policy, inputs, tags: as `check` takes them.
        gradients: the plan is to be trained with; see `planrt.plans.analysis.analyse`. Then the loss, the
            gradients and what the plan changes leave, and its other outputs (predictions) stay.

    A plan longer than `Policy.max_ops` is refused without being looked at further, and so is one that takes
    longer than `Policy.max_check_seconds` to look at.

    Raises:
        PlanArgumentError: specs that do not fit the plan.
        ExecutionError: an op cannot run on such inputs.
    """
    marked = {place: tuple(sorted(set(names))) for place, names in (tags or {}).items()}
    given = concrete_inputs(graph, inputs)
    violations: list[Violation] = []
    if policy.max_ops is not None and len(graph.ops) > policy.max_ops:
        message = f"{len(graph.ops):,} ops are more than the {policy.max_ops:,} that are allowed"
        return _refused(graph, given, Violation("max_ops", message), policy, marked)
    try:
        report = analyse(graph, given, gradients=gradients, seconds=policy.max_check_seconds)
    except AnalysisTimeError as error:
        return _refused(graph, given, Violation("max_check_seconds", str(error)), policy, marked)
    violations += _ops(graph, policy)
    violations += _limits(report, policy)
    for rule in policy.release:
        violations += _release(report, rule, marked, training=gradients)
    return report.with_violations(violations, policy.version, marked)


def _refused(
    graph: Graph,
    inputs: tuple[TensorSpec, ...],
    why: Violation,
    policy: Policy,
    tags: dict[int, tuple[str, ...]],
) -> Report:
    """The report on a plan that was not looked at to its end."""
    report = Report(graph, inputs, (), (), (), Totals(0, 0, 0, 0, 0))
    return report.with_violations([why], policy.version, tags)


def _approval(
    graph: Graph, policy: Policy, approvals: Approvals | None, constants: Sequence[Constant] | None
) -> Iterator[Violation]:
    if policy.approval == "open" or (policy.approval == "ask" and approvals is None):
        return
    if constants is None:
        yield Violation(
            "approval",
            f"an approval of plan {graph.hash} is of its constants too, whose values are not known here",
        )
        return
    filed = approval_hash(graph, constants)
    if filed in policy.approved:
        return
    if policy.approval == "list" or approvals is None:
        yield Violation("approval", f"plan {filed} is not on the owner's list")
        return
    status, why = approvals.status(graph.hash)
    if status != "denied":  # a denial of a plan's own hash is one with any constants
        status, why = approvals.status(filed)
    if status != "approved":
        said = {"denied": "was denied by the owner", "pending": "waits for the owner's approval"}
        reason = f": {why}" if why else ""
        yield Violation(
            "approval", f"plan {filed} {said.get(status, 'has not been approved by the owner')}{reason}"
        )


def _at(graph: Graph, index: int | None, rule: str, message: str) -> Violation:
    if index is None:
        return Violation(rule, message)
    op = graph.ops[index]
    return Violation(rule, message, index, op.name, str(op))


def _ops(graph: Graph, policy: Policy) -> Iterator[Violation]:
    allowed = policy.allowed_ops
    for index, op in enumerate(graph.ops):
        if op.name not in allowed:
            yield _at(graph, index, "ops", f"the policy does not allow {op.name}")


def _limits(report: Report, policy: Policy) -> Iterator[Violation]:
    totals = report.totals
    costly = max(report.ops, key=lambda op: op.flops or 0, default=None)
    large = max(report.ops, key=lambda op: op.bytes or 0, default=None)
    limits = [
        ("max_flops", totals.flops, policy.max_flops, count_flops, costly, "computation is"),
        ("max_memory", totals.peak_bytes, policy.max_memory, count_bytes, large, "peak of memory is"),
        (
            "max_output_bytes",
            totals.output_bytes,
            policy.max_output_bytes,
            count_bytes,
            None,
            "size of outputs is",
        ),
    ]
    if policy.max_input_bytes is not None and totals.input_bytes > policy.max_input_bytes:
        inputs, most = count_bytes(totals.input_bytes), count_bytes(policy.max_input_bytes)
        yield Violation("max_input_bytes", f"the size of inputs is {inputs}, more than the {most} allowed")
    for rule, have, limit, show, worst, what in limits:
        if limit is None:
            continue
        if have > limit:
            index = worst.index if worst is not None else None
            part = " (this op has the largest part)" if worst is not None else ""
            yield _at(
                report.graph,
                index,
                rule,
                f"the {what} {show(have)}, more than the {show(limit)} allowed{part}",
            )
        elif totals.unbounded:
            message = f"its size depends on values, so nobody can say whether the plan keeps to {show(limit)}"
            yield _at(report.graph, totals.unbounded[0], rule, message)


def _release(
    report: Report, rule: ReleaseRule, tags: Mapping[int, tuple[str, ...]], *, training: bool
) -> Iterator[Violation]:
    held = {place for place, names in tags.items() if rule.tag == ALL_PRIVATE or rule.tag in names}
    outputs = report.outputs[:1] if training else report.outputs
    for value in [*outputs, *report.written, *report.gradients]:
        if value.source in held:  # stays where it is
            continue
        for dependence in value.depends:
            if dependence.source in held:
                message = _released(value, dependence, rule)
                if message:
                    yield _at(report.graph, _blamed(value, dependence), "release", message)


def _released(value: ValueReport, dependence: Dependence, rule: ReleaseRule) -> str | None:
    what = f"{value.path} depends on {dependence.name} ({rule.tag})"
    if dependence.how != "aggregated":
        lost = (
            f": its rows cannot be followed through {dependence.lost[0].strip('_')}"
            if dependence.lost
            else ""
        )
        return f"{what} without an aggregate over at least {rule.min_rows} rows{lost}"
    rows = dependence.rows or 0
    if rows < rule.min_rows:
        return f"{what} by an aggregate over {rows} rows; at least {rule.min_rows} are asked for"
    other = [
        kind for kind in dependence.aggregates if rule.aggregates is not None and kind not in rule.aggregates
    ]
    if other:
        return f"{what} by {', '.join(other)}; allowed are {', '.join(rule.aggregates or ())}"
    return None


def _blamed(value: ValueReport, dependence: Dependence) -> int | None:
    if dependence.lost and dependence.lost[1] >= 0:
        return dependence.lost[1]
    return value.ops[-1] if value.ops else None
