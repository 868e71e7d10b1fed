"""`func2plan`: a function as a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch

from planrt.errors import PlanArgumentError
from planrt.plans.plan import P, Plan, R

Shapes = Sequence[Sequence[int]]


@overload
def func2plan(
    function: Callable[P, R], *, args_shape: Shapes | None = None, state: None = None, strict: bool = False
) -> Plan[P, R]: ...


@overload
def func2plan(
    function: list[Any] | tuple[Any, ...] | None = None,
    *,
    args_shape: Shapes | None = None,
    state: None = None,
    strict: bool = False,
) -> Callable[[Callable[P, R]], Plan[P, R]]: ...


@overload
def func2plan(
    function: Callable[..., R],
    *,
    args_shape: Shapes | None = None,
    state: Sequence[torch.Tensor],
    strict: bool = False,
) -> Plan[..., R]: ...


@overload
def func2plan(
    function: list[Any] | tuple[Any, ...] | None = None,
    *,
    args_shape: Shapes | None = None,
    state: Sequence[torch.Tensor],
    strict: bool = False,
) -> Callable[[Callable[..., R]], Plan[..., R]]: ...


def func2plan(
    function: Callable[..., Any] | list[Any] | tuple[Any, ...] | None = None,
    *,
    args_shape: Shapes | None = None,
    state: Sequence[torch.Tensor] | None = None,
    strict: bool = False,
) -> Any:
    """Turns a function of tensors into a `Plan`, as a decorator or by a call.

    For example::

        @func2plan(args_shape=[(-1, 3), (3,)])
        def distances(x, center):
            return (x - center).pow(2).sum(dim=1).sqrt()

        distances(torch.ones(5, 3), torch.zeros(3))          # runs here: the recorded ops
        pointer = distances.send(bob)                        # once; from then on one message a call
        result = pointer(x_on_bob, center_on_bob).get()

    With `args_shape`, one shape per argument (-1 for a size that stays free), it is built at once, on float32
    tensors; without, by `Plan.build`. With `state`, the function gets a `PlanState` as its last argument (or
    as the one called ``state``), which callers do not pass. With `strict`, calls with other sizes, ranks or
    dtypes are refused; without, the plan is recorded for them too, which is a form of it with a hash of its
    own. A list in place of the function is taken as `args_shape`.

    Raises:
        PlanArgumentError: wrong number of shapes, or impossible ones.
        TraceError: the function cannot be recorded.
    """

    if isinstance(function, list | tuple):
        return func2plan(args_shape=function, state=state, strict=strict)

    def decorate(function: Callable[..., Any]) -> Plan[..., Any]:
        if not callable(function):
            raise PlanArgumentError(f"func2plan makes a plan of a function, not of {type(function).__name__}")
        made: Plan[..., Any] = Plan(function, state=state, strict=strict)
        if args_shape is None or (len(args_shape) == 0 and made._signature().parameters):
            return made  # ``args_shape=()``: not built yet
        return made.build_from_shapes(args_shape)

    return decorate if function is None else decorate(function)
