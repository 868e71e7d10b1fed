"""Settings of a thread or process that change what torch calls do: `docs/modes.md` says which are honoured.

They come about without a call that could be recorded, and do not reach workers. So they are looked at where
an op is recorded, run or posted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from planrt.errors import PlanError, PlanWarning, TraceError
from planrt.plans.ir.ops import FACTORIES
from planrt.plans.ir.source import frames_to_user
from planrt.types import leaves

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planrt.plans.ir.graph import Graph

any_autocast: Final[Callable[[], bool]] = torch._C._is_any_autocast_enabled
"""Whether `torch.autocast` is on in this thread, for any device: one call of a tenth of a microsecond."""

_FOLLOW_FLOATS: Final = frozenset({
    "torch.arange", "torch.as_tensor", "torch.asarray", "torch.full", "torch.randint", "torch.randperm", "torch.tensor",
    "torch.tril_indices", "torch.triu_indices",
})  # fmt: skip
"""Factories that make integers of integers."""


def default_changed() -> bool:
    """Returns whether `torch.set_default_dtype` was called with another dtype than torch's own, which every
    worker has."""
    return torch.get_default_dtype() is not torch.float32


def refuse_modes(line: Callable[[], str | None]) -> None:
    """Raises TraceError where a mode is on under which nothing can be recorded."""
    if torch.is_inference_mode_enabled():
        raise TraceError("inference_mode cannot be recorded: use torch.no_grad()", line=line())
    if any_autocast():
        raise TraceError("torch.autocast cannot be recorded: use .to(dtype)", line=line())


def write_default_dtype(name: str, given: Any, kwargs: dict[str, Any], result: Any, line: str | None) -> None:
    """Puts the default dtype into the recorded `kwargs` of a factory whose result has it.

    Raises:
        TraceError: another op, whose result would be of another dtype on a worker.
    """
    default = torch.get_default_dtype()
    made = [leaf for leaf in leaves(result) if isinstance(leaf, torch.Tensor)]
    if _has_dtype(given, default) or all(one.dtype is not default for one in made):
        return
    if name not in FACTORIES:
        raise TraceError(
            f"the result of {name} follows torch.set_default_dtype({default}), which workers do not have: give the "
            f"dtype, for instance x.to({default})",
            line=line,
        )
    kwargs["dtype"] = default


def _has_dtype(values: Any, dtype: torch.dtype) -> bool:
    return any((leaf.dtype if isinstance(leaf, torch.Tensor) else leaf) is dtype for leaf in leaves(values))


def check_default_dtype(plan: Graph) -> None:
    """Raises PlanError where `plan` makes tensors of torch's default dtype, which this process has
    changed."""
    for op in plan.ops:
        given = leaves((op.args, op.kwargs))
        follows = op.name not in _FOLLOW_FLOATS or any(isinstance(leaf, float | complex) for leaf in given)
        if op.name in FACTORIES and op.kwargs.get("dtype") is None and follows:
            raise PlanError(
                f"plan {plan.name!r} was recorded with torch's own default dtype, float32, and {op.name} in it would "
                f"give {torch.get_default_dtype()} here: set the default back, or build the plan under this one"
            )


@contextmanager
def as_recorded(plan: Graph) -> Iterator[None]:
    """Without `torch.autocast`, which has no part in a plan.

    Warns:
        PlanWarning: it was on.
    """
    warnings.warn(
        f"torch.autocast has no part in plan {plan.name!r}, which computes here as on every worker, in the dtypes it "
        "was recorded with: give it arguments and state of another dtype",
        PlanWarning,
        stacklevel=frames_to_user() + 1,
    )
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
