"""What a client says of a joint run before it is opened: options, looked at, and the message for each party."""

from __future__ import annotations

import inspect
import math
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from planrt.errors import OptionError
from planrt.vertical.parties import Party
from planrt.workers.base import BaseWorker
from planrt.workers.wire import messages as m

DEFAULT_TIMEOUT = 600.0
"""Seconds that a party waits for another one."""
CLIENT = "client"

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    """The options of a run, before it is opened."""

    owners: Sequence[Party]
    holder: BaseWorker | None = None
    normalise: str = "strip"
    size_only: bool = False
    standardise: bool = False
    holdout: float = 0.0
    seed: int = 0
    predictions_to: str = CLIENT
    weights_to_client: bool = True
    timeout: float = DEFAULT_TIMEOUT
    purpose: str = ""
    keep: str = ""
    resume: bool = False

    def workers(self) -> list[BaseWorker]:
        """Returns the parties' workers: owners, then who holds the key or hands out randomness.

        Raises:
            OptionError: fewer than two owners, or one worker twice.
        """
        if len(self.owners) < 2 or not all(isinstance(one, Party) for one in self.owners):
            raise OptionError("a joint run takes two or more planrt.vertical.Party(...)")
        found = [one.worker for one in self.owners] + ([] if self.holder is None else [self.holder])
        names = [one.id for one in found]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise OptionError(
                f"worker {twice[0]!r} is given twice: the parties of a joint run are all different"
            )
        if len({len(one.id_columns) for one in self.owners}) > 1:
            raise OptionError("all parties name equally many id columns: they are compared in their order")
        return found

    def label_owner(self) -> int:
        """Returns the number of the party with the label.

        Raises:
            OptionError: there is none, or more than one.
        """
        found = [number for number, one in enumerate(self.owners) if one.label is not None]
        if len(found) != 1:
            raise OptionError(f"one party names the label, not {len(found)}: Party(..., label='paid')")
        return found[0]

    def opens(
        self, model: Mapping[int, Any] | m.LinearTerms | m.SharedTerms | None, *, label_owner: int = 0
    ) -> list[m.OpenJoint]:
        """Returns what each party is told: `model` is the same for all, or number -> what that one is told.

        Raises:
            OptionError: a value out of range; names it.
        """
        workers, joint, token = self.workers(), secrets.token_hex(8), secrets.token_hex(16)
        for name, value, least, most in (
            ("holdout", self.holdout, 0.0, 0.999), ("timeout", self.timeout, 1e-3, 86_400.0),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise OptionError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise OptionError(f"seed must be a whole number from 0 and below 2**63, got {self.seed!r}")
        if not isinstance(self.keep, str) or len(self.keep) > 200:
            raise OptionError(f"keep is a name of up to 200 characters, got {self.keep!r}")
        if self.resume and not self.keep:
            raise OptionError("resume=True goes on from what was kept under a name: give keep='that name'")
        parties = [m.PeerAddress(one.id, one.link_address) for one in workers]
        trains = model is not None
        opens = []
        for number in range(len(workers)):
            owner = self.owners[number] if number < len(self.owners) else None
            opens.append(
                m.OpenJoint(
                    joint=joint,
                    token=token,
                    number=number,
                    parties=parties,
                    owners=len(self.owners),
                    dataset="" if owner is None else owner.dataset,
                    ids=[] if owner is None else owner.id_columns,
                    normalise=self.normalise,
                    size_only=self.size_only,
                    features=list(owner.columns) if owner is not None and trains else [],
                    label=owner.label or "" if owner is not None and trains else "",
                    label_owner=label_owner,
                    columns=[len(one.columns) if trains else 0 for one in self.owners],
                    model=model[number] if isinstance(model, Mapping) else model,
                    standardise=self.standardise,
                    as_is=[] if owner is None or not trains else list(owner.as_is),
                    holdout=float(self.holdout),
                    seed=self.seed,
                    predictions_to=self.predictions_to,
                    weights_to_client=self.weights_to_client,
                    timeout=float(self.timeout),
                    purpose=self.purpose,
                    keep=self.keep,
                    resume=bool(self.resume),
                    tells_waits=all(one.versions.tells_waits for one in workers),
                )
            )
        return opens


def whole(name: str, value: Any, *, least: int = 1, most: int = 2**31) -> int:
    """Returns a whole number within bounds.

    Raises:
        OptionError: it is none; names it.
    """
    if type(value) is not int or not least <= value <= most:
        raise OptionError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    return value


def number(name: str, value: Any, *, above: float | None = None) -> float:
    """Returns a finite number of at least 0, or above `above`.

    Raises:
        OptionError: it is none; names it.
    """
    fits = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value <= 1e9
    )
    if not fits or value < 0 or (above is not None and value <= above):
        raise OptionError(
            f"{name} must be a number {'above' if above is not None else 'of at least'} 0, got {value!r}"
        )
    return float(value)


def awaited_form_of(
    function: Callable[P, T],
) -> Callable[[Callable[..., Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Gives a coroutine function the signature of the blocking one: for `help`, for whoever inspects it, and for type
    checkers."""

    def decorated(form: Callable[..., Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        form.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return form

    return decorated


def with_defaults(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a function: its defaults, and those that are given.

    Raises:
        TypeError: it takes no such option, or one is missing.
    """
    bound = inspect.signature(function).bind_partial(**given)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "parties"}
