"""Numbers and names that users give for training: checked where they are given, not in the round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch

from planrt.errors import OptionError
from planrt.plans.optimizer_options import OPTIMIZERS, check_optimizer
from planrt.types import plain

_BY_LOWER_CASE: Final = {name.lower(): name for name in OPTIMIZERS}


_LARGEST: Final = 2**63 - 1
"""What a message can carry."""


def whole(name: str, value: Any, *, at_least: int) -> int:
    """`value` as an int, if it is a whole number of at least that: a Python or NumPy integer or a 0-d tensor
    of one.

    Raises:
        OptionError: it is not; `name` says which option is meant.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < at_least:
        hint = f": write {int(number)}" if isinstance(number, float) and number.is_integer() else ""
        raise OptionError(
            f"{name} must be a whole number of at least {at_least}, got {_for_error(value)}{hint}"
        )
    if number > _LARGEST:
        raise OptionError(f"{name} must be under 2**63, got {_for_error(value)}")
    return number


def flag(name: str, value: Any) -> bool:
    """`value` as a bool: True or False, of Python, NumPy or a 0-d tensor.

    Raises:
        OptionError: it is something else, which Python would take for true.
    """
    given = plain(value)
    if not isinstance(given, bool):
        raise OptionError(f"{name} must be True or False, got {_for_error(value)}")
    return given


def seconds(name: str, value: Any, *, at_most: float) -> float | None:
    """`value` as a time-out in seconds: a number above 0, or None for no end.

    Raises:
        OptionError: it is something else, or over `at_most` seconds.
    """
    number = plain(value)
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= at_most:
        raise OptionError(
            f"{name} must be a number of seconds above 0 and of at most {at_most:,.0f}, or None for no end, got "
            f"{_for_error(value)}"
        )
    return float(number)


def positive(name: str, value: Any) -> float:
    """`value` as a finite number above 0.

    Raises:
        OptionError: it is something else.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
        raise OptionError(f"{name} must be a number above 0, got {_for_error(value)}")
    return float(number)


def learning_rate(value: Any) -> float:
    """`value` as a learning rate: a finite number of at least 0.

    Raises:
        OptionError: it is something else; a schedule is told how to be used.
    """
    number = plain(value)
    if callable(number):
        raise OptionError(
            "lr takes one number, not a function: call your schedule yourself, run_round(number, state, "
            "lr=schedule(number))"
        )
    if hasattr(number, "get_last_lr"):
        raise OptionError(
            "lr takes one number, not a scheduler: pass run_round(number, state, lr=scheduler.get_last_lr()[0])"
        )
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
        raise OptionError(f"lr must be a number of at least 0, got {_for_error(value)}")
    return float(number)


def optimizer_name(given: Any) -> str:
    """Returns the name of an optimizer of torch.optim, given as such in any case, or as its class.

    Raises:
        OptionError: torch.optim has none like it, or planrt does not know it.
    """
    if isinstance(given, torch.optim.Optimizer):
        name = type(given).__name__
        raise OptionError(
            f"optimizer takes a class or a name, since each worker makes its own: write optimizer={name!r} and "
            "optimizer_args={'lr': ...}"
        )
    if isinstance(given, type) and given.__name__.lower() in _BY_LOWER_CASE:
        if OPTIMIZERS[_BY_LOWER_CASE[given.__name__.lower()]] is given:
            return given.__name__
        raise OptionError(
            f"{given.__module__}.{given.__name__} is not torch.optim's: workers know the optimizers of torch.optim only"
        )
    shown = str(getattr(given, "__name__", given))
    name = _BY_LOWER_CASE.get(shown.lower(), "")
    if not name or not isinstance(given, str):
        raise OptionError(f"unknown optimizer {shown!r}: choose one of {', '.join(sorted(OPTIMIZERS))}")
    return name


def optimizer_options(name: str, args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the keyword arguments of optimizer `name` as plain data, tried on the optimizer itself.

    Raises:
        OptionError: arguments it does not take, or does not accept.
    """
    if args is not None and not isinstance(args, Mapping):
        raise OptionError(f"optimizer_args must be a dict, such as {{'lr': 0.1}}, not {type(args).__name__}")
    given = {key: _plain_option(value) for key, value in ({"lr": 0.1} if args is None else args).items()}
    if given.get("lr") is not None:
        given["lr"] = learning_rate(given["lr"])
    checked = check_optimizer(name, given)
    if any(isinstance(value, float) and math.isnan(value) for value in checked.values()):
        raise OptionError(f"optimizer {name}: an option is nan: {checked}")
    try:
        OPTIMIZERS[name]([], **checked)  # checks its options, then that there is nothing to do
    except (ValueError, TypeError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "empty parameter list" not in reason:
            raise OptionError(f"optimizer {name} does not accept these options: {reason}") from error
    return checked


def _plain_option(value: Any) -> Any:
    return [plain(one) for one in value] if isinstance(value, tuple | list) else plain(value)


def _for_error(value: Any) -> str:
    """Short text for an error; of a model or a tensor only what it is."""
    if isinstance(value, torch.nn.Module | torch.Tensor | dict | list):
        return f"a {type(value).__name__}"
    return repr(value)[:80]
