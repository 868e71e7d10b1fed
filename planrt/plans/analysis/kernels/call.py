"""A call of an ATen kernel, and the building blocks of what kernels do with dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from planrt.plans.analysis.rows import Trace, fold, keep, lost

Link = tuple[torch.Tensor, tuple[Trace, ...]]
"""A tensor that an output depends on, and the fates of its dimensions in that output."""
Links = list[list[Link]]
"""For each output its links."""


class Kernel:
    """The fixed facts about a kernel: its name without overload, its rule, its arguments' names and
    defaults."""

    __slots__ = ("defaults", "flops", "name", "overload", "positions", "rule", "writes")

    def __init__(self, function: Any, rules: Mapping[str, Callable[[Call], Links]]) -> None:
        schema = function._schema
        name = schema.name.removeprefix("aten::")
        self.writes = [
            (position, argument.name)
            for position, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        in_place = bool(self.writes) and name.endswith("_") and not name.endswith("__")
        self.name = name.removesuffix("_") if in_place else name
        self.overload = schema.overload_name
        self.positions = {argument.name: position for position, argument in enumerate(schema.arguments)}
        self.defaults = {argument.name: argument.default_value for argument in schema.arguments}
        self.rule = None if self.overload.endswith("out") else rules.get(self.name)
        self.flops = _flop_formulas().get(function._overloadpacket)


@lru_cache(maxsize=1)
def _flop_formulas() -> Mapping[Any, Callable[..., int]]:
    from torch.utils.flop_counter import flop_registry  # it loads much that plans otherwise do not need

    return flop_registry


class Call:
    """One call of a kernel: ``call["dim"]`` is an argument by its name in torch's schema, however it was
    given."""

    __slots__ = ("_args", "_kwargs", "kernel", "outputs", "shapes", "tensors")

    def __init__(
        self,
        kernel: Kernel,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: list[torch.Tensor],
        shapes: Mapping[int, tuple[int, ...]],
        outputs: list[torch.Tensor],
    ) -> None:
        self.kernel = kernel
        self._args = args
        self._kwargs = kwargs
        self.tensors = tensors
        self.shapes = shapes
        """id -> shape before the call, which may have changed it."""
        self.outputs = outputs

    def __getitem__(self, name: str) -> Any:
        position = self.kernel.positions[name]
        if position < len(self._args):
            return self._args[position]
        return self._kwargs.get(name, self.kernel.defaults.get(name))

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Returns the shape that an argument had."""
        return self.shapes[id(tensor)]

    @property
    def lost(self) -> Trace:
        """The fate of a dimension that this kernel takes apart."""
        return lost(self.kernel.name)


# Building blocks


def dims_of(dims: Any, count: int) -> list[int]:
    """Dimensions as numbers from 0; None or an empty list for all of them."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(count))
    return [dim % max(count, 1) for dim in ([dims] if isinstance(dims, int) else dims)]


def linked(call: Call, tensor: torch.Tensor, to: Callable[[int, int], Trace | int | None]) -> Link:
    """Links an argument by a function of (dimension, size): a fate, the dimension of the output it becomes,
    or None for lost."""
    fates = []
    for dim, size in enumerate(call.shape(tensor)):
        fate = to(dim, size)
        fates.append(call.lost if fate is None else keep(fate, size) if isinstance(fate, int) else fate)
    return tensor, tuple(fates)


def all_lost(call: Call) -> Links:
    """Makes every output depend on every argument, with all rows lost."""
    every = [linked(call, tensor, lambda dim, size: None) for tensor in call.tensors]
    return [every for _ in call.outputs]


def aligned(call: Call, tensor: torch.Tensor, shape: Sequence[int]) -> Link:
    """Broadcast against a result of `shape`: what is repeated no longer stands for different rows."""
    offset = len(shape) - len(call.shape(tensor))

    def to(dim: int, size: int) -> int | None:
        place = dim + offset
        return place if place >= 0 and shape[place] == size else None

    return linked(call, tensor, to)


def elementwise(call: Call) -> Links:
    """Makes each entry depend on the entries at its place, broadcast."""
    return [[aligned(call, tensor, output.shape) for tensor in call.tensors] for output in call.outputs]


def independent(call: Call) -> Links:
    """Depends on no argument: a factory, a random draw, zeros."""
    return [[] for _ in call.outputs]


def copied(call: Call) -> Links:
    """`copy_`: what was there before is gone."""
    return [[aligned(call, call["src"], call.outputs[0].shape)]]


def shifted(dims: list[int], keepdim: bool) -> Callable[[int], int]:
    """Returns the places of the other dimensions when `dims` are reduced."""
    return lambda dim: dim if keepdim else dim - sum(1 for one in dims if one < dim)


def aggregate(kind: str, dims: str = "dim") -> Callable[[Call], Links]:
    """Aggregates over dimensions."""

    def rule(call: Call) -> Links:
        source = call.tensors[0]
        shape = call.shape(source)
        names = call.kernel.positions
        folded = dims_of(call[dims] if dims in names else None, len(shape))
        place = shifted(folded, bool(call["keepdim"]) if "keepdim" in names else False)
        link = linked(call, source, lambda dim, size: fold(size, kind) if dim in folded else place(dim))
        return [[link] for _ in call.outputs]

    return rule


def norm_of(kind: str, order: str) -> Callable[[Call], Links]:
    """Aggregates by a vector norm; an infinite one selects."""
    reduce = aggregate(kind)

    def rule(call: Call) -> Links:
        infinite = isinstance(call[order], float) and math.isinf(call[order])  # the largest value of one row
        return select(call) if infinite else reduce(call)

    return rule


def select(call: Call) -> Links:
    """Selects one entry out of each line along some dimensions, or its place: maximum, median, `argmin`,
    `any`."""
    if call.kernel.overload == "other":
        return elementwise(call)
    source = call.tensors[0]
    names = call.kernel.positions
    taken = dims_of(call["dim"] if "dim" in names else None, len(call.shape(source)))
    place = shifted(taken, bool(call["keepdim"]) if "keepdim" in names else False)
    link = linked(call, source, lambda dim, size: None if dim in taken else place(dim))
    return [[link] for _ in call.outputs]


def along(*names: str) -> Callable[[Call], Links]:
    """Works along one dimension (several), each line for itself: softmax, sort, cumulative sums."""

    def rule(call: Call) -> Links:
        rank = call.outputs[0].dim()
        taken = {dim for name in names for dim in dims_of(call[name], rank)}
        every = [
            linked(call, tensor, lambda dim, size: None if dim in taken else dim)
            if len(call.shape(tensor)) == rank
            else linked(call, tensor, lambda dim, size: None)
            for tensor in call.tensors
        ]
        return [every for _ in call.outputs]

    return rule


def inner(count: int) -> Callable[[Call], Links]:
    """Works on the last `count` dimensions: pooling, padding, matrix decompositions. Dimensions before
    stay."""

    def rule(call: Call) -> Links:
        return [[last_mixed(call, tensor, output) for tensor in call.tensors] for output in call.outputs]

    def last_mixed(call: Call, tensor: torch.Tensor, output: torch.Tensor) -> Link:
        shape = call.shape(tensor)
        lead = len(shape) - count
        fits = lead >= 0 and list(shape[:lead]) == list(output.shape[:lead])
        return linked(call, tensor, lambda dim, size: dim if fits and dim < lead else None)

    return rule


def fill(call: Call) -> Links:
    """Overwrites everything; by a tensor or a number."""
    value = call["value"]
    return [[linked(call, value, lambda dim, size: None)] if isinstance(value, torch.Tensor) else []]


def drawn(call: Call) -> Links:
    """`bernoulli` and `normal`: of numbers, or of the tensors that hold the distributions' parameters."""
    tensors = [tensor for tensor in call.tensors if tensor is not call.outputs[0]]
    return [[aligned(call, tensor, call.outputs[0].shape) for tensor in tensors]]


def complex_pair(call: Call) -> Links:
    """Makes the last dimension the two parts of complex numbers, or drops it for them."""
    return [[linked(call, call.tensors[0], lambda dim, size: dim if dim < call.outputs[0].dim() else None)]]
