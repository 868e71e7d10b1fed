"""Plans: PyTorch programs as lists of named ops. `ops` is the vocabulary, `interpreter` runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planrt.lazy import names_of

if TYPE_CHECKING:
    from planrt.plans.forms.files import PlanFile, load_file
    from planrt.plans.functions import func2plan
    from planrt.plans.ir.graph import Graph, Op, StateSpec
    from planrt.plans.ir.parsing import parse
    from planrt.plans.methods import method2plan
    from planrt.plans.plan import Plan
    from planrt.plans.recording.tracer import trace
    from planrt.plans.saving import load_plan

_HOMES = {
    "Plan": "planrt.plans.plan",
    "Op": "planrt.plans.ir.graph",
    "Graph": "planrt.plans.ir.graph",
    "PlanFile": "planrt.plans.forms.files",
    "StateSpec": "planrt.plans.ir.graph",
    "func2plan": "planrt.plans.functions",
    "load_file": "planrt.plans.forms.files",
    "load_plan": "planrt.plans.saving",
    "method2plan": "planrt.plans.methods",
    "parse": "planrt.plans.ir.parsing",
    "trace": "planrt.plans.recording.tracer",
}
"""Public name -> module, imported at first use: `planrt.plans.policy.approvals` needs no torch."""

__all__ = [
    "Plan",
    "Op",
    "Graph",
    "PlanFile",
    "StateSpec",
    "func2plan",
    "load_file",
    "load_plan",
    "method2plan",
    "parse",
    "trace",
]

__getattr__ = names_of(__name__, _HOMES)
