"""`torch.optim` on remote parameters: state follows its parameter, and what cannot work says so.

An optimizer keeps tensors such as momenta beside each parameter. Made while a parameter was on a worker, they are
there. They come back together with a module, and move with it; what was not moved with it follows before the next step.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planrt.errors import RemoteOpError, WorkerLostError
from planrt.plans.optimizer_states import COUNTERS, READ_VALUES
from planrt.workers.pointers.tensor import PointerTensor, make_pointer
from planrt.workers.wire.objects import contiguous

_stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Optimizers that may have state on workers."""
_staying: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Optimizers of one worker each: their state waits there for the model to come again."""


@dataclass(frozen=True, slots=True, eq=False)
class RemoteState:
    """One tensor of an optimizer's state that is where its parameter is."""

    entries: dict[Any, Any]
    key: Any
    pointer: PointerTensor


def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Runs before each step, as a global hook of `torch.optim`; does nothing for optimizers whose parameters are all
    here.

    Raises:
        RemoteOpError: an optimizer that cannot work on remote parameters. WorkerLostError: state is on a worker that
            is gone.
    """
    here: list[tuple[dict[Any, Any], Any]] = []
    to_send: dict[Any, list[tuple[dict[Any, Any], Any]]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter, PointerTensor):
                if optimizer not in _stepped:
                    _stepped.add(optimizer)
                    optimizer.register_state_dict_pre_hook(before_state_dict)
                _check(optimizer, group)
            for entries, key in _apart(optimizer.state.get(parameter), parameter):
                if isinstance(parameter, PointerTensor):
                    to_send.setdefault(parameter.location, []).append((entries, key))
                else:
                    here.append((entries, key))
    _bring(optimizer, here)
    for worker, many in to_send.items():
        for entries, key in many:
            if isinstance(entries[key], PointerTensor):
                _reached(optimizer, entries[key], lambda pointer, worker=worker: pointer.move(worker))
        local = [(entries, key) for entries, key in many if not isinstance(entries[key], PointerTensor)]
        for (entries, key), pointer in zip(local, _sent([e[k] for e, k in local], worker), strict=True):
            entries[key] = pointer


def before_state_dict(optimizer: torch.optim.Optimizer) -> None:
    """Runs before the `state_dict` of an optimizer that has stepped on workers: state of parameters that are here
    comes here.
    """
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    local = [one for one in parameters if not isinstance(one, PointerTensor)]
    _bring(optimizer, [found for one in local for found in _apart(optimizer.state.get(one), one)])


def stay(optimizer: torch.optim.Optimizer) -> None:
    """Keeps the state of `optimizer` where it is when its model leaves: it belongs to one worker, as of `Optims`."""
    _staying.add(optimizer)


def _bring(optimizer: torch.optim.Optimizer, states: list[tuple[dict[Any, Any], Any]]) -> None:
    for entries, key in states:
        entries[key] = _reached(optimizer, entries[key], lambda pointer: pointer.get())


def states_of(parameters: Sequence[PointerTensor]) -> list[RemoteState]:
    """Returns the state that optimizers keep of `parameters` on the workers that these are on."""
    return [
        RemoteState(entries, key, value)
        for optimizer in _stepped
        if optimizer not in _staying
        for parameter in parameters
        for entries in [optimizer.state.get(parameter)]
        if entries
        for key, value in entries.items()
        if isinstance(value, PointerTensor) and value._handle.alive and value.location is parameter.location
    ]


def _check(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    name = type(optimizer).__name__
    if name in READ_VALUES:
        raise RemoteOpError(
            f"{name} cannot step on remote parameters: {READ_VALUES[name]}; use another optimizer, such as Adam, or "
            "get() the model"
        )
    if group.get("foreach") and name == "ASGD":  # which gives such calls a number that is kept here
        raise RemoteOpError(
            f"{name}(foreach=True) cannot step on remote parameters: make it with foreach=False"
        )
    if group.get("fused"):
        raise RemoteOpError(
            f"{name}(fused=True) cannot step on remote parameters: workers run plain ops; make it without fused=True"
        )


def _apart(entries: dict[Any, Any] | None, parameter: torch.Tensor) -> list[tuple[dict[Any, Any], Any]]:
    """The tensors of a parameter's state that are somewhere else than the parameter."""
    found = []
    for key, value in (entries or {}).items():
        if not isinstance(value, torch.Tensor):
            continue
        if isinstance(value, PointerTensor):
            apart = not isinstance(parameter, PointerTensor) or value.location is not parameter.location
        else:
            apart = isinstance(parameter, PointerTensor) and not (key in COUNTERS and value.dim() == 0)
        if apart:
            found.append((entries, key))
    return found  # type: ignore[return-value]


def _reached(optimizer: torch.optim.Optimizer, value: PointerTensor, bring: Any) -> Any:
    try:
        return bring(value)
    except WorkerLostError as error:
        raise WorkerLostError(
            f"{error}; the state that {type(optimizer).__name__} keeps of a parameter is there: to go on without it, "
            "write optimizer.state.clear()",
            address=error.address,
            worker_id=error.worker_id,
        ) from error


def _sent(values: list[torch.Tensor], worker: Any) -> list[torch.Tensor]:
    handles = worker.workplace.objects.put(values) if values else []
    return [make_pointer(handle, contiguous(value)) for value, handle in zip(values, handles, strict=True)]
