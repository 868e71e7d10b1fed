"""Plans: PyTorch programs as lists of named ops. `ops` is the vocabulary, `interpreter` runs it."""

from planrt.plans.graph import Graph, Op, StateSpec
from planrt.plans.parsing import parse
from planrt.plans.plan import Plan, func2plan
from planrt.plans.tracer import trace

__all__ = ["Plan", "Op", "Graph", "StateSpec", "func2plan", "parse", "trace"]
