"""The optimizers of `torch.optim` that a request may name, and the options that it may give them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

import torch

from planrt.errors import OptionError

OPTIMIZERS: Final[dict[str, type[torch.optim.Optimizer]]] = {
    name: getattr(torch.optim, name)
    for name in (
        "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "Muon", "NAdam",
        "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam",
    )
    if hasattr(torch.optim, name)
}  # fmt: skip
"""The optimizers that a request may name."""


def check_optimizer(name: str, args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Checks the keyword arguments for optimizer `name`, and returns them: names it takes, values that are
    plain data.

    Raises:
        OptionError: unknown optimizer, unknown keyword, or a value of another kind.
    """
    if name not in OPTIMIZERS:
        raise OptionError(f"unknown optimizer {name!r}: choose one of {', '.join(sorted(OPTIMIZERS))}")
    known = [key for key in inspect.signature(OPTIMIZERS[name]).parameters if key not in ("self", "params")]
    checked: dict[str, Any] = {}
    for key, value in (args or {}).items():
        if key not in known:
            raise OptionError(f"optimizer {name} has no option {key!r}; it has: {', '.join(known)}")
        checked[key] = _plain_option(name, key, value)
    return checked


def work_of(name: str, args: Mapping[str, Any] | None, batches: int) -> tuple[float, float]:
    """Returns how often an optimizer computes loss and gradients over so many batches, and how many numbers it keeps
    for each parameter: neither is more.

    All but LBFGS compute once a batch and keep four: averages, momenta, the largest of them.

    Raises:
        OptionError: as `check_optimizer`; or a number of LBFGS' that is none.
    """
    options = check_optimizer(name, args)
    if name != "LBFGS":
        return batches, 4
    iterations = _count(options.get("max_iter", 20), "max_iter")
    evaluations = options.get("max_eval")
    evaluations = iterations * 1.25 if evaluations is None else _count(evaluations, "max_eval")
    # A search along a line may begin when one evaluation is left, and takes up to 25.
    once = 1 + iterations if options.get("line_search_fn") is None else evaluations + 26
    history = _count(options.get("history_size", 100), "history_size")
    return batches * once if batches else 0, 8 + 2 * min(history, batches * iterations)


def _count(value: Any, option: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise OptionError(
            f"option {option!r} of optimizer LBFGS must be a number of at least 0, got {value!r}"
        )
    return value


def _plain_option(optimizer: str, key: str, value: Any) -> Any:
    if (
        value is None
        or isinstance(value, bool | int | float)
        or (isinstance(value, str) and len(value) <= 32)
    ):
        return value
    if (
        isinstance(value, tuple | list)
        and len(value) <= 8
        and all(type(x) in (int, float, type(None)) for x in value)
    ):
        return tuple(value)
    raise OptionError(
        f"option {key!r} of optimizer {optimizer} must be a number, a bool, None, a short string or a short "
        f"tuple of numbers, not {type(value).__name__}"
    )
