"""Optimizers that step inside a recorded function: what they keep must be there before, and survive
recording.

The update itself is ordinary torch calls, which the recorder sees. What it does not see is the optimizer's
own book-keeping: `torch.optim.SGD` with momentum makes its buffers in the first step and looks for them in
the next one. Recorded, that first step would be every step. So an optimizer from outside the function must
have its state before; its tensors then are state of the plan, under names like ``weight.momentum_buffer``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_MAKES: Final = "every run would be its first step, since it then makes"
_NOT_SETTINGS: Final = ("params", "param_names")


@dataclass(slots=True)
class _Watched:
    """An optimizer as it was before its first step in a recording."""

    optimizer: Optimizer
    state: list[tuple[Any, dict[str, Any], dict[str, Any]]]
    """(parameter, its dict of state, a copy of that)."""
    groups: list[dict[str, Any]]
    change: str | None = None
    """What the run that saw it first changed for the next step, beyond the values of tensors."""

    def find_change(self) -> str | None:
        before = {id(key): copy for key, _, copy in self.state}
        for parameter, now in self.optimizer.state.items():
            old = before.get(id(parameter), {})
            for key, value in now.items():
                if key not in old:
                    return f"{_MAKES} {key!r}"
                if not _same(old[key], value):
                    return f"it keeps {key!r} outside its tensors"
        for group, old in zip(self.optimizer.param_groups, self.groups, strict=False):
            for key, value in group.items():
                if key not in _NOT_SETTINGS and not _same(old.get(key), value):
                    return f"its {key!r} is another after the step"
        return None

    def restore(self) -> None:
        self.optimizer.state.clear()
        for parameter, state, copy in self.state:
            state.clear()
            state.update(copy)
            self.optimizer.state[parameter] = state
        for group, copy in zip(self.optimizer.param_groups, self.groups, strict=False):
            group.clear()
            group.update(copy)


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) or isinstance(new, torch.Tensor):
        return old is new
    return bool(old == new)


class OptimizerWatch:
    """The optimizers that step while a function is recorded, over all runs of it.

    A recorder that begins a run sets `on_step`, which is called with an optimizer before it steps for the
    first time in that run, and with what a step of an earlier run has shown that a plan cannot hold (None:
    nothing).
    """

    def __init__(self) -> None:
        self.stepping: Optimizer | None = None
        """The optimizer whose step is under way."""
        self.on_step: Callable[[Optimizer, str | None], None] | None = None
        self._watched: dict[int, _Watched] = {}
        self._met: set[int] = set()
        self._handles: list[Any] = []
        self._thread = 0

    def __enter__(self) -> OptimizerWatch:
        self._thread = threading.get_ident()
        self._handles = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.on_step is None or threading.get_ident() != self._thread:
            return
        key = id(optimizer)
        watched = self._watched.get(key)
        if watched is None:
            watched = self._watched[key] = _Watched(
                optimizer,
                [(parameter, state, dict(state)) for parameter, state in optimizer.state.items()],
                [dict(group) for group in optimizer.param_groups],
            )
        self.stepping = optimizer
        if key not in self._met:
            self._met.add(key)
            self.on_step(optimizer, watched.change)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is self.stepping:
            self.stepping = None

    def restore(self) -> None:
        """Ends a run: the optimizers as they were before it."""
        for watched in self._watched.values():
            watched.change = watched.change or watched.find_change()
            watched.restore()
        self._met.clear()
        self.stepping = self.on_step = None


def why_no_step(optimizer: Optimizer, reason: str) -> str:
    """Explains why an optimizer's step cannot be recorded, and what to do instead."""
    name = type(optimizer).__name__
    if reason.startswith("_fused"):
        return f"optimizer {name} cannot step in a plan with fused=True, which is one kernel of its own: leave that out"
    if reason.startswith(_MAKES):
        advice = "let it step once before the plan is built"
    else:
        advice = f"let the worker step, which TrainConfig(optimizer={name!r}) does"
    return (
        f"optimizer {name} cannot step in a plan: {reason}; {advice}, or write the update out with tensors "
        "that are there before"
    )
