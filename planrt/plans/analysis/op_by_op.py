"""The analysis of a plan that does not differentiate: put together from what its ops do one by one.

One of the two ways of `planrt.plans.analysis.analyse`. No tensor is made here and no kernel runs: what an op
does is looked up (`planrt.plans.analysis.effects`), and this module fits it to the values that the plan has
at that point, with their memory and what they depend on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from planrt.plans.analysis.effects import (
    ArgumentFates,
    Effect,
    MadeTensor,
    NeedsValuesError,
    Operand,
    bound,
    effect,
)
from planrt.plans.analysis.findings import COPIES_BY_STRIDES, Findings, Output, paths, source_info
from planrt.plans.analysis.flow import INDEPENDENT, Info, Node, all_lost, joined
from planrt.plans.analysis.report import Report, Unforeseen
from planrt.plans.analysis.rows import Trace, lost
from planrt.plans.ir import ops as table
from planrt.plans.ir.graph import Op, refs_in
from planrt.plans.running.inference import Spec, spec
from planrt.plans.running.interpreter import failure, last_uses
from planrt.types import Nested, Ref, TensorSpec, leaves, map_leaves


class _Memory:
    """A piece of memory: its bytes, how many values of the plan look at it, and whose it is (a source, or
    -1)."""

    __slots__ = ("owner", "size", "users")

    def __init__(self, size: int, owner: int = -1) -> None:
        self.size = size
        self.users = 0
        self.owner = owner


class _Value(Operand):
    """A tensor of the plan. `_spec` is None where its size depends on values; then `at_most` may be known."""

    __slots__ = ("_spec", "at_most", "memory", "node")

    def __init__(self, like: Spec | None, node: Node, memory: _Memory, at_most: int | None = None) -> None:
        self._spec = like
        self.node = node
        self.memory = memory
        self.at_most = at_most


class Composed(Findings):
    """A plan that does not differentiate."""

    def report(self) -> Report:
        """Goes through the plan op by op.

        Raises:
            ExecutionError: an op cannot run on such inputs; names it.
        """
        graph = self.graph
        followed = len(self.inputs)
        self.values: dict[int, Any] = {}
        self.owned: list[_Value] = []
        for source, like in enumerate(self.sources):
            node = Node(source_info(source, like, source < followed), like.shape)
            contiguous = spec(like.shape, _strides(like.shape), like.dtype, False, True)
            value = _Value(contiguous, node, _Memory(0, source))
            value.memory.users = 1  # its owner
            self.values[source] = value
            self.owned.append(value)
        self.live = self.peak = 0
        freed = last_uses(graph)
        for index, op in enumerate(graph.ops):
            self._step(index, op)
            for slot in freed.get(index, ()):
                self._free(self.values.pop(slot, None))
        outputs: list[Output] = []
        output_bytes = 0
        for path, leaf in paths(graph.outputs):
            value = self.values[leaf.index] if isinstance(leaf, Ref) else leaf
            if not isinstance(value, _Value):
                outputs.append((path, None, INDEPENDENT))
                continue
            outputs.append((path, _spec_or_unforeseen(value), value.node.info))
            output_bytes += _value_bytes(value)
        return self.make(outputs, [one.node.info for one in self.owned], output_bytes, self.peak)

    def _step(self, index: int, op: Op) -> None:
        if op.name == "torch.set_grad_enabled":
            self.note(index, (), 0, 0)
            return
        args = [self._filled(arg) for arg in op.args]
        kwargs = {word: self._filled(arg) for word, arg in op.kwargs.items()} if op.kwargs else {}
        operands = _operands(args, kwargs)
        try:
            for one in operands:
                if one._spec is None:
                    raise NeedsValuesError
            found = effect(op.name, args, kwargs, self.clock.check)
            self._apply(index, op, found, operands)
        except NeedsValuesError:
            self._unforeseen(index, op, args, operands)
        except Exception as error:
            raise failure(self.graph, index, error) from error

    def _filled(self, arg: Any) -> Any:
        kind = type(arg)
        if kind is Ref:
            return self.values[arg.index]
        if kind is int or kind is float or kind is str or arg is None or kind is bool:
            return arg
        return map_leaves(arg, lambda leaf: self.values[leaf.index] if isinstance(leaf, Ref) else leaf)

    def _apply(self, index: int, op: Op, found: Effect, operands: list[_Value]) -> None:
        before = [one.node for one in operands]
        infos = [node.info for node in before]
        bit = 1 << index
        self.peak = max(self.peak, self.live + found.peak)
        pieces = [_Memory(size) for size in found.memory]
        self.live += sum(found.memory)
        made: list[TensorSpec | Unforeseen] = []

        def gathered(links: ArgumentFates) -> Info:
            total = INDEPENDENT
            changed = False
            for number, fates in links:
                part = infos[number]
                moved = part.through(before[number].shape, fates)
                changed = changed or moved is not part
                total = joined(total, moved)
            rows = total.rows
            if (changed or len(links) > 1) and any(trace.lost for trace in rows.values()):
                rows = {source: _blamed(trace, index) for source, trace in rows.items()}
            return Info(total.sources, total.ops | bit, rows)

        def value(leaf: Any) -> Any:
            if type(leaf) is not MadeTensor:
                return leaf
            made.append(_tensor_spec(leaf.spec))
            if leaf.base < 0:
                memory = pieces[leaf.memory]
                if op.name in COPIES_BY_STRIDES and operands:
                    memory.owner = operands[0].memory.owner
                    tie = dict(leaf.links).get(0, ())
                    return _Value(
                        leaf.spec, Node(gathered(leaf.links), leaf.spec.shape, before[0], tie), memory
                    )
                return _Value(leaf.spec, Node(gathered(leaf.links), leaf.spec.shape), memory)
            base = operands[leaf.base]
            if leaf.same:
                return base if base._spec is leaf.spec else _Value(leaf.spec, base.node, base.memory)
            fates = dict(leaf.links).get(leaf.base) or tuple([lost(op.name)] * len(before[leaf.base].shape))
            return _Value(
                leaf.spec, Node(gathered(leaf.links), leaf.spec.shape, before[leaf.base], fates), base.memory
            )

        # Results are read after writes: those of an op in place are its argument.
        for number, links in found.written:
            self._note_write(operands[number], index)
            before[number].write(gathered(links))
        for number, like, links in found.reshaped:
            operand = operands[number]
            self._note_write(operand, index)
            fates = dict(links).get(number) or tuple([lost(op.name)] * len(before[number].shape))
            operand._spec = like
            operand.node = Node(gathered(links), like.shape, before[number], fates)
        results = found.results
        self._bind(op.results, value(results) if type(results) is MadeTensor else map_leaves(results, value))
        if found.unknown:
            self.unknown.update(found.unknown)
        self.note(index, tuple(made), sum(found.memory), found.flops)

    def _note_write(self, operand: _Value, index: int) -> None:
        if operand.memory.owner >= 0:
            by = self.written.setdefault(operand.memory.owner, [])
            if index not in by[-1:]:
                by.append(index)

    def _bind(self, results: Nested, value: Any) -> None:
        if results is None:
            return
        if isinstance(results, Ref):
            self.values[results.index] = value
            if isinstance(value, _Value):
                value.memory.users += 1
            return
        if not isinstance(value, tuple) or len(value) != len(results):
            count = len(value) if isinstance(value, tuple) else 1
            raise ValueError(f"it gave {count} results where the plan expects {len(results)}")
        for part, item in zip(results, value, strict=True):
            self._bind(part, item)

    def _free(self, value: Any) -> None:
        if isinstance(value, _Value):
            value.memory.users -= 1
            if value.memory.users == 0:
                self.live -= value.memory.size

    def _unforeseen(self, index: int, op: Op, args: list[Any], operands: list[_Value]) -> None:
        info = _unforeseen_info(op.name, [(one.node.info, one.node.shape) for one in operands], index)
        most = bound(op.name, args) if all(one._spec for one in operands) else None
        for operand in _operands(table.written_operands(op.name, tuple(args), {}), {}):
            self._note_write(operand, index)
            operand.node.write(all_lost(info, op.name, index))
        memory = _Memory(most or 0)
        self.live += memory.size
        self.peak = max(self.peak, self.live)
        refs = list(refs_in(op.results))
        for place, ref in enumerate(refs):
            at_most = None if most is None else most if place == 0 else 0
            value = _Value(None, Node(info, ()), memory, at_most)
            memory.users += 1
            self.values[ref.index] = value
        flops = sum(math.prod(one._spec.shape) for one in operands if one._spec)
        self.note(index, tuple([Unforeseen(most)] * len(refs)), most, None if most is None else flops)


def _operands(args: Any, kwargs: Mapping[str, Any]) -> list[_Value]:
    found = []
    for arg in args:
        if type(arg) is _Value:
            found.append(arg)
        elif isinstance(arg, tuple | list | dict | slice):
            found += [leaf for leaf in leaves(arg) if type(leaf) is _Value]
    for arg in kwargs.values():
        found += [leaf for leaf in leaves(arg) if type(leaf) is _Value]
    return found


def _spec_or_unforeseen(value: _Value) -> TensorSpec | Unforeseen:
    return Unforeseen(value.at_most) if value._spec is None else _tensor_spec(value._spec)


def _value_bytes(value: _Value) -> int:
    if value._spec is None:
        return value.at_most or 0
    return math.prod(value._spec.shape) * value._spec.dtype.itemsize


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _blamed(trace: Trace, index: int) -> Trace:
    if trace.lost and trace.lost[1] < 0:
        return trace._replace(lost=(trace.lost[0], index))
    return trace


def _tensor_spec(like: Spec) -> TensorSpec:
    return TensorSpec(like.shape, like.dtype)


# Ops whose results' sizes depend on values


def _unforeseen_info(name: str, operands: Sequence[tuple[Info, tuple[int, ...]]], index: int) -> Info:
    """What results depend on of an op that cannot be run without values: on everything, rows lost."""
    total = INDEPENDENT
    for info, _ in operands:
        total = joined(total, all_lost(info, name.rpartition(".")[2], index))
    return Info(total.sources, total.ops | 1 << index, total.rows)
