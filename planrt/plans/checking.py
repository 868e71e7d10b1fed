"""`check_plan`, which is `Plan.check`: what a plan does, and what it breaks of a policy, before it is
sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from planrt.errors import PlanArgumentError
from planrt.plans.analysis.analysing import analyse
from planrt.plans.analysis.report import Report
from planrt.plans.ir.constants import constants_of
from planrt.plans.plan import Plan
from planrt.plans.policy.rules import Policy
from planrt.plans.policy.verify import check
from planrt.types import TensorSpec


def check_plan(
    plan: Plan,
    policy: Policy | None,
    inputs: Sequence[TensorSpec | torch.Tensor | None],
    tags: Mapping[str, Sequence[str]],
) -> Report:
    """Analyses `plan`, and holds it against `policy`; see `Plan.check`."""
    graph = plan.graph
    specs = [TensorSpec.of(one) if isinstance(one, torch.Tensor) else one for one in inputs]
    unknown = [name for name in tags if name not in graph.input_names]
    if unknown:
        known = ", ".join(graph.input_names)
        raise PlanArgumentError(f"plan {plan.name!r} has no input {unknown[0]!r}: it has {known}")
    places = {graph.input_names.index(name): tuple(names) for name, names in tags.items()}
    constants = constants_of(graph, plan.state_tensors())
    if policy is None:
        return analyse(graph, specs).with_constants(constants).with_violations((), None, places)
    return check(graph, policy, specs, places, constants=constants)
