"""`method2plan`: methods that are plans, each object with one of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, Self

import torch

from planrt.errors import PlanArgumentError
from planrt.plans.functions import func2plan
from planrt.plans.plan import Plan

_PLANS = "_planrt_method_plans"
"""The attribute of an object that holds the plans of its methods, by where they are defined."""


class _Method(torch.nn.Module):
    """A method of a module, as a module with the same parts under the same names."""

    def __init__(self, owner: torch.nn.Module, method: MethodType) -> None:
        super().__init__()
        self.__dict__.update(
            _owner=owner,
            forward=method,
            training=owner.training,
            __doc__=method.__doc__,
            _parameters=owner._parameters,
            _buffers=owner._buffers,
            _modules=owner._modules,
        )

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the module whose method it is."""
        self.__dict__["_owner"].train(mode)
        self.training = mode
        return self


class PlanMethod:
    """A method that is a plan: ``object.method`` is the `Plan`, whose state are the tensors of `object` it
    uses."""

    def __init__(
        self, function: Callable[..., Any], args_shape: Sequence[Sequence[int]] | None, *, strict: bool
    ) -> None:
        self._function = function
        self._args_shape = args_shape
        self._strict = strict
        functools.update_wrapper(self, function)

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        """The plan of `owner`, which is built at the first use if it was given shapes."""
        if owner is None:
            return self
        if not hasattr(owner, "__dict__"):
            raise PlanArgumentError(
                f"{self._function.__qualname__}: a {type(owner).__name__} has __slots__, and no place for a plan: add "
                '"__dict__" to them'
            )
        # Not by setattr: a module would count the plan among its own parts.
        plans: dict[str, Plan] = owner.__dict__.setdefault(_PLANS, {})
        name = self._function.__qualname__  # a class and its base may both have such a method
        made = plans.get(name)
        if made is None:
            made = plans[name] = self._plan_of(owner)
            if self._args_shape is not None and len(self._args_shape):
                try:
                    made.build_from_shapes(self._args_shape)
                except BaseException:
                    del plans[name]
                    raise
        if isinstance(owner, torch.nn.Module) and made.training != owner.training:
            made.train(owner.training)
        return made

    def _plan_of(self, owner: Any) -> Plan:
        method = MethodType(self._function, owner)
        if isinstance(owner, torch.nn.Module):
            return Plan(_Method(owner, method), name=self._function.__name__, strict=self._strict)
        made: Plan = func2plan(method, strict=self._strict)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method as it is written, for ``Class.method(object, x)``."""
        return self._function(*args, **kwargs)


def method2plan(
    function: Callable[..., Any] | list[Any] | tuple[Any, ...] | None = None,
    *,
    args_shape: Sequence[Sequence[int]] | None = None,
    strict: bool = False,
) -> Any:
    """Turns a method into a plan, one for each object: ``@method2plan()`` above ``def forward(self, x):``.

    ``net.forward.build(x)``, ``net.forward.send(worker)`` and ``net.forward(x)`` are those of a `Plan`;
    tensors of the object that the method uses are its state. With `args_shape` it is built when it is first
    used. `strict` is as of `func2plan`.

    Raises:
        PlanArgumentError: it decorates something that is no function.
    """
    if isinstance(function, list | tuple):
        return method2plan(args_shape=function, strict=strict)

    def decorate(function: Callable[..., Any]) -> PlanMethod:
        if not callable(function) or isinstance(function, Plan | type):
            raise PlanArgumentError(
                f"method2plan makes a plan of a method, not of {type(function).__name__}: write it above a def"
            )
        return PlanMethod(function, args_shape, strict=strict)

    return decorate if function is None else decorate(function)
