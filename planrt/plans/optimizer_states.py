"""What optimizers of torch keep between steps, as a flat list of plain values and tensors, and back.

An optimizer keeps a few values by name for each parameter: tensors, numbers, and lists of them (LBFGS). `packed` lists
them as ``(parameter, name, value)``, where "tensor" stands in a value for the next of the tensors beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from planrt.errors import OptionError

TENSOR: Final = "tensor"

COUNTERS: Final = ("step", "eta", "mu", "mu_product")
"""State of no dimensions that optimizers read: it stays with the optimizer, wherever its parameters are."""

READ_VALUES: Final = {
    "LBFGS": "its line search reads losses and gradients",
    "Adafactor": "it reads the size of parameters and updates",
    "SparseAdam": "it needs sparse gradients",
}
"""Optimizers that step only where the values are, and why."""

Kept = dict[Any, Any]
"""Position of a parameter -> name -> value: ``optimizer.state_dict()["state"]``."""


def packed(state: Kept) -> tuple[list[tuple[int, str, Any]], list[torch.Tensor]]:
    """Returns the values of `state` in order, and copies of the tensors in them.

    Raises:
        OptionError: the optimizer keeps something else.
    """
    values: list[tuple[int, str, Any]] = []
    tensors: list[torch.Tensor] = []

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value.detach().clone())
            return TENSOR
        if value is None or isinstance(value, bool | int | float):
            return value
        raise OptionError(f"the optimizer keeps a {type(value).__name__} as {name!r}, which cannot be sent")

    for parameter, kept in state.items():
        for name, value in kept.items():
            several = isinstance(value, list | tuple)
            values.append(
                (parameter, name, [plain(one, name) for one in value] if several else plain(value, name))
            )
    return values, tensors


def unpacked(
    values: Sequence[tuple[int, str, Any]], tensors: Sequence[torch.Tensor], *, parameters: int
) -> Kept:
    """Returns the state that `packed` took apart, with copies of the tensors; it is of `parameters` parameters.

    Raises:
        OptionError: it is of more parameters, or the tensors are not as many as there should be.
    """
    rest = iter(tensors)
    state: Kept = {}

    def whole(value: Any) -> Any:
        if value != TENSOR:
            return value
        tensor = next(rest, None)
        if tensor is None:
            raise OptionError("the state of an optimizer came with fewer tensors than it names")
        return tensor.detach().clone()

    for parameter, name, value in values:
        if parameter >= parameters:
            raise OptionError(
                f"the state of an optimizer is of parameter {parameter}, and the plan trains {parameters}"
            )
        state.setdefault(parameter, {})[name] = (
            [whole(one) for one in value] if isinstance(value, list) else whole(value)
        )
    if next(rest, None) is not None:
        raise OptionError("the state of an optimizer came with more tensors than it names")
    return state


def copied(state: Any) -> Any:
    """Returns a copy of a state, with its tensors: steps write to them in place."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [copied(value) for value in state]
    return state


def tensors_in(state: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in a state, wherever they are in it."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, Mapping):
        for item in state.values():
            yield from tensors_in(item)
    elif isinstance(state, list | tuple):
        for item in state:
            yield from tensors_in(item)
