"""Plans: PyTorch programs as lists of named ops. `ops` is the vocabulary, `interpreter` runs it."""

from planrt.plans.func2plan import FunctionPlan, func2plan
from planrt.plans.plan import Op, Plan, StateSpec
from planrt.plans.tracer import trace

__all__ = ["FunctionPlan", "Op", "Plan", "StateSpec", "func2plan", "trace"]
