"""`torch.optim` on parameters in shares: what it keeps of a parameter is in shares as the parameter is, or the next
step is refused. Nothing is opened that nobody asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from planrt.deadlines import bounded
from planrt.errors import SharingError
from planrt.plans.optimizer_states import COUNTERS, READ_VALUES
from planrt.sharing.tensors.shared import SharedTensor


def before_shared_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Runs before each step, as a global hook of `torch.optim`; nothing has changed where it raises.

    Raises:
        SharingError: an optimizer that cannot step on shares; or a parameter was shared, opened, or shared among
            others, after steps whose means or momenta the optimizer has kept.
    """
    _check(optimizer)
    for parameter, entries, key in _kept(optimizer):
        kept = entries[key]
        if not isinstance(parameter, SharedTensor) and not isinstance(kept, SharedTensor):
            continue
        told = f"{type(optimizer).__name__} keeps {key!r} of a parameter"
        if not isinstance(parameter, SharedTensor):
            raise SharingError(
                f"{told} in shares, and the parameter is open: write optimizer.get() to open that too, or "
                "optimizer.state.clear() to begin anew"
            )
        if not isinstance(kept, SharedTensor):
            if key in COUNTERS and not kept.dim():
                continue
            raise SharingError(
                f"{told} from before it was shared, which all know: write optimizer.state.clear() to begin anew, or "
                "make the optimizer after share()"
            )
        if kept.session is not parameter.session:
            raise SharingError(
                f"{told} in other shares than the parameter's: write optimizer.state.clear() to begin anew, or make "
                "the optimizer after share()"
            )


def _check(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if not any(isinstance(one, SharedTensor) for one in group["params"]):
            continue
        if name in READ_VALUES:
            raise SharingError(
                f"{name} does not step on shares: {READ_VALUES[name]}; use another optimizer, such as SGD or Adam"
            )
        for option in ("fused", "foreach"):
            if group.get(option) and (option == "fused" or name in _NOT_FOREACH):
                raise SharingError(
                    f"{name}({option}=True) does not step on shares: make it with {option}=False"
                )


_NOT_FOREACH = ("RAdam",)
"""Optimizers whose steps on lists divide by zero, and take what is not infinite then."""


@bounded
def get_optimizer(self: torch.optim.Optimizer, *, timeout: float | None = None) -> torch.optim.Optimizer:
    """Opens what the optimizer keeps in shares, such as momenta, in place, and returns it: after ``model.get()``.

    Raises:
        SharingError: a party is gone; nothing has changed then.
    """
    shared = [one for one in _kept(self) if isinstance(one[1][one[2]], SharedTensor)]
    for (_, entries, key), value in zip(shared, [one[1][one[2]].get() for one in shared], strict=True):
        entries[key] = value
    return self


def _kept(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, dict[Any, Any], Any]]:
    """The tensors that the optimizer keeps: the parameter, its entries, and the key of one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            entries = optimizer.state.get(parameter) or {}
            for key in [name for name, value in entries.items() if isinstance(value, torch.Tensor)]:
                yield parameter, entries, key
