"""Where values of a program may leave the range that shares are right in: intervals, call by call; no secrets.

Every value gets an interval that holds it whatever the secrets are, if the arguments keep to theirs. At the finest
scale that a call has its result at (a product of two is finer than its factors until it is scaled down), the integers
must stay below 2**62. Intervals are wide: a bound that is kept is kept, one that is broken may be.
Source: Moore, Kearfott and Cloud, "Introduction to Interval Analysis" (SIAM 2009), chapters 2 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch

from planrt.sharing.fixed_point import LIMIT
from planrt.sharing.kernels.parts import Share
from planrt.sharing.programs.calls import Call, Program
from planrt.types import Ref, leaves

Interval: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Overflow:
    """A call whose result may leave the range. `str` of it is a line for people."""

    call: int
    name: str
    low: float
    high: float
    limit: float
    """Values are right below this in size."""
    certain: bool
    """Whether all of the interval is beyond the limit."""

    def __str__(self) -> str:
        said = "leaves" if self.certain else "may leave"
        return (
            f"call {self.call}, {self.name}: its result is from {self.low:.4g} to {self.high:.4g} and {said} "
            f"the range, which ends at {self.limit:.4g}"
        )


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of an argument of a call."""

    interval: Interval | None
    shape: tuple[int, ...]


class Ranges:
    """The intervals of a program's values, as far as they follow from those of its operands."""

    def __init__(
        self,
        program: Program,
        bounds: Sequence[Interval | None],
        shapes: Sequence[tuple[int, ...] | None],
        scales: dict[tuple[int, int], int],
    ) -> None:
        """Goes through the calls.

        Args:
            program: it.
            bounds: of its operands; None is unknown.
            shapes: of its values.
            scales: (call, value) -> the finest scale that the call had the value at (`needs.widest_scales`).
        """
        self.intervals: list[Interval | None] = [*bounds, *[None] * (program.values - program.operands)]
        self.overflows: list[Overflow] = []
        self.unknown: dict[str, None] = {}
        """Names of calls whose results could be anything, though what they are made of is known."""
        self._shapes = shapes
        origins: list[int] = list(range(program.operands))
        for number, (call, makes) in enumerate(zip(program.calls, program.makes, strict=True)):
            args = [self._argument(one) for one in call.args]
            found = _results(call, args, [self._shape(one) for one in makes])
            first = call.args[0].index if call.args and type(call.args[0]) is Ref else None
            origins += [origins[first] if first is not None else value for value in makes]
            if call.in_place and first is not None:
                self._write(number, call, first, found[0] if found else None, origins, scales)
            for value, interval in zip(makes, found, strict=False):
                self._note(number, call, value, interval, scales)

    def _shape(self, value: int) -> tuple[int, ...]:
        return self._shapes[value] or ()

    def _argument(self, leaf: Any) -> Any:
        if type(leaf) is Ref:
            return _Known(self.intervals[leaf.index], self._shape(leaf.index))
        if isinstance(leaf, tuple | list):
            return [self._argument(one) for one in leaf]
        if isinstance(leaf, bool | int | float):
            return _Known((float(leaf), float(leaf)), ())
        return leaf

    def _note(
        self,
        number: int,
        call: Call,
        value: int,
        interval: Interval | None,
        scales: dict[tuple[int, int], int],
    ) -> None:
        self.intervals[value] = interval
        if interval is None:
            known = [self.intervals[one] for one in call.reads]
            if all(one is not None for one in known):
                self.unknown[call.name] = None
            return
        scale = scales.get((number, value))
        if scale is None:
            return
        limit = LIMIT / scale
        low, high = interval
        if max(abs(low), abs(high)) < limit:
            return
        self.overflows.append(Overflow(number, call.name, low, high, limit, low >= limit or high <= -limit))
        self.intervals[value] = None  # said once: what follows is about wrapped values

    def _write(
        self,
        number: int,
        call: Call,
        target: int,
        interval: Interval | None,
        origins: Sequence[int],
        scales: dict[tuple[int, int], int],
    ) -> None:
        same = [one for one, origin in enumerate(origins) if origin == origins[target] and one != target]
        self._note(number, call, target, interval, scales)
        for one in same:  # views of it, or what it is a view of: partly the old values
            self.intervals[one] = _union([self.intervals[one], self.intervals[target]])


def _union(intervals: Sequence[Interval | None]) -> Interval | None:
    known = [one for one in intervals if one is not None]
    if len(known) < len(intervals) or not known:
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def _times(left: Interval, right: Interval, count: float = 1) -> Interval:
    products = [a * b if a and b else 0.0 for a in left for b in right]
    return count * min(products), count * max(products)


def _plus(left: Interval, right: Interval) -> Interval:
    return left[0] + right[0], left[1] + right[1]


def _of(value: Any) -> Interval | None:
    return value.interval if isinstance(value, _Known) else None


_Rule: TypeAlias = Callable[[Call, Sequence[Any], Sequence[tuple[int, ...]]], "Interval | None"]
"""A call, its arguments, and the shapes of its results -> where its (first) result is."""


def _monotonic(function: Callable[[float], float], low: float = -math.inf, high: float = math.inf) -> _Rule:
    """The rule of what grows with its argument, which is taken from `low` to `high`."""

    def rule(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
        given = _of(args[0])
        return (
            None
            if given is None
            else (
                function(min(max(given[0], low), high)),
                function(min(max(given[1], low), high)),
            )
        )

    return rule


def _dipping(depth: float) -> _Rule:
    """The rule of what is below its argument where that is positive, and a little below zero else."""

    def rule(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
        given = _of(args[0])
        return None if given is None else (-depth, max(given[1], 0.0) + 0.01)

    return rule


def _within(low: float, high: float) -> _Rule:
    return lambda call, args, shapes: (low, high)


def _first(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    return _of(args[0]) if args else None


def _with_zero(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    return _union([_of(args[0]), (0.0, 0.0)])


def _any_of(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    return _union([_of(one) for one in leaves(list(args)) if isinstance(one, _Known)])


def _add(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    left, right = _of(args[0]), _of(args[1])
    alpha = call.kwargs.get("alpha", args[2].interval[0] if len(args) > 2 else 1)
    if left is None or right is None:
        return None
    if call.name == "rsub":
        return _plus(right, _times(left, (-alpha, -alpha)))
    factor = -alpha if call.name == "sub" else alpha
    return _plus(left, _times(right, (factor, factor)))


def _mul(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    left, right = _of(args[0]), _of(args[1])
    if left is None or right is None:
        return None
    if type(call.args[0]) is Ref and call.args[0] == call.args[1]:
        most = max(abs(left[0]), abs(left[1])) ** 2
        return (0.0 if left[0] <= 0 <= left[1] else min(abs(left[0]), abs(left[1])) ** 2), most
    return _times(left, right)


def _div(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    left, right = _of(args[0]), _of(args[1])
    if left is None or right is None or right[0] <= 0 <= right[1]:
        return None
    return _times(left, (1 / right[1], 1 / right[0]))


def _product(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    left, right = _of(args[0]), _of(args[1])
    return None if left is None or right is None else _times(left, right, (args[0].shape or (1,))[-1])


def _with_bias(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    bias, product = _of(args[0]), _product(call, args[1:], shapes)
    if bias is None or product is None:
        return None
    beta, alpha = call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1)
    product = _times(product, (alpha, alpha))
    return _union([product, _plus(_times(bias, (beta, beta)), product)])  # the product must fit too


def _convolution(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    value, weight = _of(args[0]), _of(args[1])
    if value is None or weight is None:
        return None
    found = _times(value, weight, math.prod(args[1].shape[1:]))
    found = min(found[0], 0.0), max(found[1], 0.0)  # at the border less is added up
    if args[2] is None:
        return found
    bias = _of(args[2])
    return None if bias is None else _union([found, _plus(found, bias)])


def _sum(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    given = _of(args[0])
    count = math.prod(args[0].shape) / max(math.prod(shapes[0]), 1) if shapes else 1
    return None if given is None else _times(given, (count, count))


def _running_sum(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    given = _of(args[0])
    return None if given is None else _union([given, _times(given, (1, 1), math.prod(args[0].shape))])


def _abs(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    given = _of(args[0])
    return None if given is None else (0.0, max(abs(given[0]), abs(given[1])))


def _neg(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    given = _of(args[0])
    return None if given is None else (-given[1], -given[0])


def _clamp(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    given = _of(args[0])
    if given is None:
        return None
    low = (
        args[1].interval[0]
        if len(args) > 1 and isinstance(args[1], _Known) and args[1].interval
        else -math.inf
    )
    high = (
        args[2].interval[1]
        if len(args) > 2 and isinstance(args[2], _Known) and args[2].interval
        else math.inf
    )
    if call.name == "clamp_max":
        low, high = -math.inf, low
    return min(max(given[0], low), high), min(max(given[1], low), high)


def _power(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    given, exponent = _of(args[0]), _of(args[1])
    if (
        given is None
        or exponent is None
        or exponent[0] != exponent[1]
        or not exponent[0].is_integer()
        or exponent[0] < 1
    ):
        return None
    try:
        ends = [given[0] ** exponent[0], given[1] ** exponent[0]]
    except OverflowError:
        return -math.inf, math.inf
    return min([*ends, 0.0] if given[0] <= 0 <= given[1] else ends), max(ends)


def _squared_error(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    left, right = _of(args[0]), _of(args[1])
    if left is None or right is None:
        return None
    most = max(abs(left[0] - right[1]), abs(left[1] - right[0])) ** 2
    reduction = int(args[2].interval[0]) if len(args) > 2 else 1
    return 0.0, most * (math.prod(args[0].shape) if reduction else 1)  # the sum must fit too


def _filled(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> Interval | None:
    return _of(args[-1])


_SAME: Final = (
    "view _unsafe_view _reshape_alias t slice split split_with_sizes unbind as_strided transpose permute expand "
    "unsqueeze squeeze select diagonal unfold clone refresh _to_copy flip roll rot90 repeat index index_select mean "
    "amax amin avg_pool2d _adaptive_avg_pool2d max_pool2d_with_indices adaptive_max_pool2d max min topk "
    "sort kthvalue median"
)
_OR_ZERO: Final = (
    "threshold_backward hardtanh_backward slice_backward select_backward diagonal_backward tril triu diag_embed "
    "max_pool2d_with_indices_backward adaptive_max_pool2d_backward embedding"
)
_FLAGS: Final = (
    "eq ne lt le gt ge sigmoid _softmax logical_and logical_or logical_xor logical_not any all isnan isinf isfinite "
    "one_hot ones_like new_ones bernoulli"
)
_CHOICES: Final = (
    "where cat stack maximum minimum masked_fill index_put _index_put_impl index_copy slice_scatter scatter"
)

_SIGNS: Final = "tanh erf sign sgn"
_ZEROS: Final = "zeros_like new_zeros new_empty new_empty_strided empty_like zero"

_RULES: Final[dict[str, _Rule]] = {
    **dict.fromkeys(_SAME.split(), _first),
    **dict.fromkeys(_OR_ZERO.split(), _with_zero),
    **dict.fromkeys(_FLAGS.split(), _within(0.0, 1.0)),
    **dict.fromkeys(_CHOICES.split(), _any_of),
    **dict.fromkeys(("add", "sub", "rsub"), _add),
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), _product),
    **dict.fromkeys(("addmm", "addmv", "baddbmm"), _with_bias),
    **dict.fromkeys(_ZEROS.split(), _within(0.0, 0.0)),
    **dict.fromkeys(_SIGNS.split(), _within(-1.0, 1.0)),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh"), _clamp),
    **dict.fromkeys(("full_like", "fill", "new_full"), _filled),
    "copy": lambda call, args, shapes: _of(args[1]),
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "sum": _sum,
    "cumsum": _running_sum,
    "abs": _abs,
    "pow": _power,
    "relu": _monotonic(lambda x: max(x, 0.0)),
    "exp": _monotonic(math.exp, -745.0, 12.0),
    "sqrt": _monotonic(math.sqrt, 0.0),
    "softplus": _monotonic(lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x)))),
    "gelu": _dipping(0.2),
    "silu": _dipping(0.3),
    "convolution": _convolution,
    "mse_loss": _squared_error,
}  # fmt: skip


def _results(call: Call, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> list[Interval | None]:
    rule = _RULES.get(call.name)
    found: Interval | None = None
    if call.name in ("argmax", "argmin"):
        found = (0.0, float(max(math.prod(args[0].shape) - 1, 0)))
    elif rule is not None:
        try:
            found = rule(call, args, shapes)
        except (
            AttributeError,
            IndexError,
            TypeError,
            OverflowError,
        ):  # called in a way that the rule does not know
            found = None
    if found is not None and any(math.isnan(one) for one in found):
        found = None
    count = max(len(shapes), 1)
    if (
        call.name
        in (
            "max",
            "min",
            "topk",
            "sort",
            "median",
            "kthvalue",
            "max_pool2d_with_indices",
            "adaptive_max_pool2d",
        )
        and count == 2
    ):
        return [found, (0.0, float(math.prod(args[0].shape)))]
    return [found] * count


def interval_of(values: torch.Tensor) -> Interval | None:
    """Returns the least and the greatest of values that all know; None of none at all, and of complex ones."""
    if not values.numel() or values.is_complex():
        return None
    low, high = values.double().aminmax()
    return float(low), float(high)


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Returns the shape of a program's value after a run; None of one that is not there."""
    return tuple(value.shape) if isinstance(value, Share | torch.Tensor) else None
