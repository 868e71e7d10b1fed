"""What one op does, told from its arguments' specs: run once on meta tensors, then looked up.

The result is in terms of the op's own arguments: this result depends on that argument, whose dimensions meet
these fates (`planrt.plans.analysis.rows`). So it holds wherever the op stands, and a plan of many ops of few
kinds is checked in a few microseconds an op.

Why one run on meta tensors tells enough: what kernels an op comes down to hangs on specs and constants alone,
as long as no kernel asks for a value, and a meta tensor that is asked for one raises (`NeedsValuesError`). To
see where rows go, each dimension of each argument is followed as though it held them: argument n, dimension d
gets a source of its own (`_observe`), and what a result's `Info` says about that source is the fate of the
dimension. Fates compose (`rows.compose`), so the effect of an op, applied to what its arguments have become,
is what running the plan whole would have found. What does not compose is a backward pass: which kernels run
there hangs on the ops before. Plans with such a pass take the other way (`planrt.plans.analysis.run_whole`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planrt.plans.analysis.flow import Info
from planrt.plans.analysis.rows import Trace, keep
from planrt.plans.analysis.tracker import Tracker
from planrt.plans.ir import ops as table
from planrt.plans.running.inference import Spec, argument_key, is_short, needs_values, spec
from planrt.serde.values import DEVICE
from planrt.types import leaves, map_leaves

ArgumentFates = tuple[tuple[int, tuple[Trace, ...]], ...]
"""(number of an argument, fates of its dimensions), for each argument that something depends on. Arguments
are numbered in the order of `planrt.types.leaves`, keyword arguments last, tensors only."""


class Operand:
    """Anything with a spec that stands for a tensor among an op's arguments."""

    __slots__ = ()
    _spec: Spec | None


@dataclass(frozen=True, slots=True)
class MadeTensor:
    """A tensor that an op returns.

    `memory`: a number for memory that the op allocated, -1 where it is that of argument `base`. `same`: it is
    that argument, or looks at the same entries of it.
    """

    spec: Spec
    memory: int
    base: int
    same: bool
    links: ArgumentFates


@dataclass(frozen=True, slots=True)
class Effect:
    """The effect of one op. `results` nests `MadeTensor`s and constants as the op nests its results.

    `written`: arguments changed in place, with what they depend on then. `reshaped`: arguments that get
    another spec. `memory`: bytes of each piece of memory that results hold. `peak`: bytes in use while the op
    runs, results included. `unknown`: kernels that rows could not be followed through.
    """

    results: Any
    written: tuple[tuple[int, ArgumentFates], ...]
    reshaped: tuple[tuple[int, Spec, ArgumentFates], ...]
    memory: tuple[int, ...]
    peak: int
    flops: int
    unknown: tuple[str, ...]


class NeedsValuesError(Exception):
    """The result of an op depends on values, so its shape cannot be told from specs."""


_CACHE_SIZE = 20_000
_cache: dict[Any, Effect] = {}
_ARGUMENT_BITS = 7  # torch knows at most 64 dimensions


def effect(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], check: Callable[[], None] = lambda: None
) -> Effect:
    """Returns the effect of op `name` on these arguments, whose tensors are `Operand`s with known specs.

    `check` is called before each kernel; what it raises ends the look.

    Raises:
        NeedsValuesError: it cannot be told without values.
        Whatever torch raises for arguments that do not fit.
    """
    floats = name in table.RESULTS_FOLLOW_FLOATS
    try:
        key = (
            name,
            *[argument_key(arg, Operand, floats) for arg in args],
            *[(word, argument_key(arg, Operand, floats)) for word, arg in kwargs.items()],
        )
        found = _cache.get(key)
    except TypeError:  # an argument without a hash: not cached
        key, found = (), None
    if found is None:
        found = _observe(name, table.lookup(name), args, kwargs, check)
        if key and is_short(args, kwargs):
            if len(_cache) >= _CACHE_SIZE:
                _cache.clear()
            _cache[key] = found
    return found


def bound(name: str, args: Sequence[Any]) -> int | None:
    """Returns the most bytes that all results of an op can take whose sizes depend on values; None if unknown."""
    word = name.rpartition(".")[2]
    if not args or not isinstance(args[0], Operand) or args[0]._spec is None:
        return None
    like = args[0]._spec
    entries = math.prod(like.shape)
    if word in ("nonzero", "argwhere") or (word == "where" and len(args) == 1):
        return entries * max(len(like.shape), 1) * 8
    if word in ("unique", "unique_consecutive"):
        return entries * (like.dtype.itemsize + 16)  # values, where each went, how many there are
    if word == "masked_select" and len(args) > 1 and isinstance(args[1], Operand) and args[1]._spec:
        try:
            whole = torch.broadcast_shapes(like.shape, args[1]._spec.shape)  # type: ignore[no-untyped-call]
        except RuntimeError:  # they do not fit
            return None
        return int(math.prod(whole)) * like.dtype.itemsize
    if word == "narrow":  # from a place that is a tensor
        return entries * like.dtype.itemsize
    if word == "__getitem__" and len(args) > 1 and _picks_by_one_mask(args[1]):
        return entries * like.dtype.itemsize
    return None


def _picks_by_one_mask(index: Any) -> bool:
    """Whether an index gives no entry twice: a mask, and besides it whole numbers and slices only."""
    parts = index if isinstance(index, tuple) else (index,)
    masks = [part for part in parts if isinstance(part, Operand)]
    return (
        len(masks) == 1
        and masks[0]._spec is not None
        and masks[0]._spec.dtype == torch.bool
        and all(part is masks[0] or part is ... or isinstance(part, int | slice) for part in parts)
    )


def forget() -> None:
    """Empty the cache."""
    _cache.clear()


def _observe(
    name: str,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    check: Callable[[], None],
) -> Effect:
    tracker = Tracker(check)
    twins: list[torch.Tensor] = []

    def twin_of(leaf: Any) -> Any:
        if isinstance(leaf, Operand):
            twin = leaf._spec.twin()  # type: ignore[union-attr]
            first = len(twins) << _ARGUMENT_BITS
            rows = {first + dim: keep(dim, size) for dim, size in enumerate(twin.shape)}
            tracker.register(twin, Info(1 << len(twins), 0, rows))
            twins.append(twin)
            return twin
        return "meta" if leaf is DEVICE else leaf

    twin_args, twin_kwargs = map_leaves(tuple(args), twin_of), map_leaves(dict(kwargs), twin_of)
    if isinstance(twin_kwargs.get("device"), str) or (
        name in table.FACTORIES and twin_kwargs.get("device") is None
    ):
        twin_kwargs["device"] = "meta"
    before = [(tracker.info(twin), _spec_without_autograd(twin)) for twin in twins]
    try:
        with torch.no_grad(), tracker:
            result = function(*twin_args, **twin_kwargs)
            result = map_leaves(_as_tuples(result), on_meta)
    except Exception as error:
        if needs_values(error):
            raise NeedsValuesError(str(error)) from error
        raise
    return _described(tracker, result, twins, before)


def _described(
    tracker: Tracker, result: Any, twins: Sequence[torch.Tensor], before: Sequence[tuple[Info, Spec]]
) -> Effect:
    numbers = {tracker.memory(twin): number for number, twin in enumerate(twins)}
    made = [leaf for leaf in leaves(result) if isinstance(leaf, torch.Tensor)]
    tracker.settle(made, twins)
    allocated = tracker.allocated([one for one in made if tracker.memory(one) not in numbers])
    places = {key: place for place, key in enumerate(allocated)}

    def describe(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        key = tracker.memory(leaf)
        base = numbers.get(key, -1)
        now = _spec_without_autograd(leaf)
        same = base >= 0 and (
            leaf is twins[base] or (now is before[base][1] and int(leaf.storage_offset()) == 0)
        )
        return MadeTensor(now, places.get(key, -1), base, same, _links(tracker.info(leaf), before))

    written, reshaped = [], []
    for number, (twin, (info, spec_before)) in enumerate(zip(twins, before, strict=True)):
        now = _spec_without_autograd(twin)
        if now is not spec_before:
            reshaped.append((number, now, _links(tracker.info(twin), before)))
        elif tracker.info(twin) is not info:
            written.append((number, _links(tracker.info(twin), before)))
    return Effect(
        map_leaves(result, describe),
        tuple(written),
        tuple(reshaped),
        tuple(allocated.values()),
        tracker.peak,
        tracker.flops,
        tuple(sorted(tracker.unknown)),
    )


def _links(info: Info, before: Sequence[tuple[Info, Spec]]) -> ArgumentFates:
    found = []
    for number, (_, like) in enumerate(before):
        if info.sources >> number & 1:
            first = number << _ARGUMENT_BITS
            found.append((number, tuple([info.rows[first + dim] for dim in range(len(like.shape))])))
    return tuple(found)


def _spec_without_autograd(tensor: torch.Tensor) -> Spec:
    """Without autograd's flags: a plan that does not differentiate has none."""
    return spec(tuple(tensor.shape), tensor.stride(), tensor.dtype, False, True)


def on_meta(leaf: Any) -> Any:
    """Moves a tensor to the meta device: those made of constants (`torch.as_tensor`) come on the CPU."""
    if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
        return leaf.to("meta")
    return leaf


def _as_tuples(value: Any) -> Any:
    """Named tuples and other sequences of torch as tuples."""
    if isinstance(value, tuple | list):
        return tuple([_as_tuples(item) for item in value])
    return value
