"""Holds one op, as a client posts it on a pointer, to the limits of a policy before it runs.

What it takes is told from the shapes of its arguments, as for an op of a plan (`planrt.plans.analysis.effects`): so
the answer tells nothing of their values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from planrt.errors import PolicyError
from planrt.plans.analysis.effects import NeedsValuesError, Operand, bound, effect
from planrt.plans.analysis.findings import AnalysisTimeError, Clock
from planrt.plans.analysis.report import count_bytes, count_flops
from planrt.plans.policy.rules import Policy
from planrt.plans.running.inference import Spec, spec
from planrt.types import map_leaves


class _Argument(Operand):
    """Stands for a tensor among the arguments of an op."""

    __slots__ = ("_spec", "nbytes", "storage")
    _spec: Spec

    def __init__(self, tensor: torch.Tensor) -> None:
        # Without autograd's flags: what an op takes does not depend on them.
        self._spec = spec(tuple(tensor.shape), tensor.stride(), tensor.dtype, False, True)
        storage = tensor.untyped_storage()
        self.storage = storage._cdata
        self.nbytes = min(tensor.numel() * tensor.element_size(), storage.nbytes())


def check_op(policy: Policy, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Raises unless op `name` of the table keeps to `policy.max_memory` and `policy.max_flops` on these arguments;
    returns how many operations it computes, 0 where nothing limits that.

    Its memory is what is in use at its peak: its arguments' (of tensors that share memory once, of an expanded one what
    is there), its results' and what its kernels ask for meanwhile. Its devices are those of the wire: `DEVICE`.

    Raises:
        PolicyError: it takes more than a limit allows, what it takes depends on values, or to look at it takes longer
            than `policy.max_check_seconds`.
        Whatever torch raises for arguments that do not fit.
    """
    if policy.max_memory is None and not policy.counted:
        return 0
    operands: list[_Argument] = []

    def operand(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        operands.append(_Argument(leaf))
        return operands[-1]

    own_args, own_kwargs = map_leaves(tuple(args), operand), map_leaves(dict(kwargs), operand)
    try:
        found = effect(name, own_args, own_kwargs, Clock(policy.max_check_seconds).check)
        peak, flops = found.peak, found.flops
    except AnalysisTimeError:
        message = f"looking at it takes more than {policy.max_check_seconds:g} s"
        raise _beyond(name, "max_check_seconds", message) from None
    except NeedsValuesError:
        most = bound(name, own_args)
        if most is None and (policy.max_memory is not None or policy.max_flops is not None):
            raise _beyond(
                name,
                "max_flops" if policy.max_memory is None else "max_memory",
                "what it takes cannot be told without values, so nobody can say whether it keeps to the limit: give "
                "sizes where it takes them (output_size= of repeat_interleave, num_classes= of one_hot), or put "
                "it together from other ops",
            ) from None
        peak, flops = most or 0, sum(math.prod(one._spec.shape) for one in operands)
    if policy.max_flops is not None and flops > policy.max_flops:
        raise _beyond(
            name,
            "max_flops",
            f"its computation is {count_flops(flops)}, more than the {count_flops(policy.max_flops)} allowed",
        )
    if policy.max_memory is not None:
        held: dict[int, int] = {}
        for one in operands:
            held[one.storage] = max(held.get(one.storage, 0), one.nbytes)
        total = peak + sum(held.values())
        if total > policy.max_memory:
            raise _beyond(
                name,
                "max_memory",
                f"its peak of memory is {count_bytes(total)}, more than the {count_bytes(policy.max_memory)} allowed",
            )
    return flops


def _beyond(name: str, rule: str, message: str) -> PolicyError:
    return PolicyError(f"{name} breaks the policy: [{rule}] {message}", rule=rule, op=name)
