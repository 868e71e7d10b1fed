"""What ATen kernels do with the rows of their arguments: a closed table, reviewed by hand.

Below autograd, whatever a plan does comes down to these kernels: `cross_entropy` is a log-softmax and a
gather, a backward pass is products and sums. For each output of a kernel, a rule returns the tensors that it
depends on, each with the fates of its dimensions (`planrt.plans.analysis.rows`). A kernel without a rule
loses every row that reaches it.

For example ``h = x @ w`` with x [32, 10] and w [10, 5], the kernel `mm`, whose rule is ``contract("self
mat2", "ik,kj->ij")``. Letter i is in the result: x's dimension 0 becomes dimension 0, and its rows are kept.
Letter k is not: x's dimension 1 is folded by "matmul", an aggregate of 10. The backward pass computes ``x.T @
grad``, [10, 32] by [32, 5], and there the rows are k: the gradient of w is an aggregate over 32 rows, though
no rule speaks of gradients.

A rule says less than is true rather than more. What selects (an index, a sort, a maximum) may show one row,
and loses the dimension that it selects from. Dimensions come in negative and positive numbers; `_dims` sorts
it out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from planrt.plans.analysis.kernels.call import Call, Kernel, Link, Links, all_lost
from planrt.plans.analysis.kernels.maths import hidden_writes
from planrt.plans.analysis.kernels.table import AGGREGATES, RULES, VIEWS

__all__ = ["AGGREGATES", "RULES", "VIEWS", "Call", "Kernel", "Link", "hidden_writes", "kernel", "links"]


@lru_cache(maxsize=4096)
def kernel(function: Any) -> Kernel:
    """Returns the `Kernel` of an ATen overload."""
    return Kernel(function, RULES)


def links(call: Call) -> Links:
    """Returns the links of every output of a call; from every argument, with all rows lost, where there is no
    rule, or one that does not know of all the outputs that came."""
    found = call.kernel.rule(call) if call.kernel.rule is not None else None
    return found if found is not None and len(found) == len(call.outputs) else all_lost(call)
