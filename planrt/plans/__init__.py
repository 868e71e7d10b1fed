"""Plans: PyTorch programs as lists of named ops. `ops` is the vocabulary, `interpreter` runs it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planrt.plans.files import PlanFile, load_file, load_plan
    from planrt.plans.graph import Graph, Op, StateSpec
    from planrt.plans.methods import method2plan
    from planrt.plans.parsing import parse
    from planrt.plans.plan import Plan, func2plan
    from planrt.plans.tracer import trace

_HOMES = {
    "Plan": "planrt.plans.plan",
    "Op": "planrt.plans.graph",
    "Graph": "planrt.plans.graph",
    "PlanFile": "planrt.plans.files",
    "StateSpec": "planrt.plans.graph",
    "func2plan": "planrt.plans.plan",
    "load_file": "planrt.plans.files",
    "load_plan": "planrt.plans.files",
    "method2plan": "planrt.plans.methods",
    "parse": "planrt.plans.parsing",
    "trace": "planrt.plans.tracer",
}
"""Public name -> module, imported at first use: `planrt.plans.approvals` needs no torch."""

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


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'planrt.plans' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value
