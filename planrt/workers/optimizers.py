"""`torch.optim` on remote parameters: state follows its parameter, and what cannot work says so.

An optimizer keeps tensors such as momenta beside each parameter. Made while a parameter was on a worker, they
are there; when the parameter has moved since the last step, they follow it before the next one.
"""

from __future__ import annotations

from typing import Any

import torch

from planrt.errors import RemoteOpError
from planrt.workers.pointers import PointerTensor

_READ_VALUES = {
    "LBFGS": "its line search reads losses and gradients",
    "Adafactor": "it reads the size of parameters and updates",
    "SparseAdam": "it needs sparse gradients",
}


def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A global pre-step hook of `torch.optim`: does nothing for optimizers whose parameters are all here.

    Raises:
        RemoteOpError: an optimizer that cannot work on remote parameters.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            remote = isinstance(parameter, PointerTensor)
            if remote and type(optimizer).__name__ in _READ_VALUES:
                name = type(optimizer).__name__
                raise RemoteOpError(
                    f"{name} cannot step on remote parameters: {_READ_VALUES[name]}; use another optimizer, such as "
                    "Adam, or get() the model"
                )
            state = optimizer.state.get(parameter)
            if state:
                _follow(state, parameter, remote=remote)


def _follow(state: dict[Any, Any], parameter: torch.Tensor, *, remote: bool) -> None:
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or (key == "step" and not isinstance(value, PointerTensor)):
            continue
        if remote and isinstance(parameter, PointerTensor):
            worker = parameter.location
            if not isinstance(value, PointerTensor):
                if value.dim() > 0 or key not in ("step", "eta", "mu", "mu_product"):
                    state[key] = _send(value, worker)
            elif value.location is not worker:
                state[key] = value.move(worker)
        elif isinstance(value, PointerTensor):
            state[key] = value.get()


def _send(value: torch.Tensor, worker: Any) -> torch.Tensor:
    from planrt.workers.objects import contiguous
    from planrt.workers.pointers import make_pointer

    (handle,) = worker.put([value])
    return make_pointer(handle, contiguous(value))
