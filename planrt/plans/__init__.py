"""Plans: PyTorch programs as lists of named ops. `ops` is the vocabulary, `interpreter` runs it."""

from planrt.plans.files import PlanFile, load_file, load_plan
from planrt.plans.graph import Graph, Op, StateSpec
from planrt.plans.parsing import parse
from planrt.plans.plan import Plan, func2plan
from planrt.plans.tracer import trace

__all__ = [
    "Plan",
    "Op",
    "Graph",
    "PlanFile",
    "StateSpec",
    "func2plan",
    "load_file",
    "load_plan",
    "parse",
    "trace",
]
