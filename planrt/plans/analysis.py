"""Says what a plan will do, from its inputs' shapes alone: sizes, memory, cost, and what each output depends on.

Every op runs on meta tensors, or rather, each kind of op once per process: a plan that does not differentiate is put
together from what its ops do one by one (`planrt.plans.effects`). A plan with backward passes cannot be: what a
pass computes hangs on the autograd graph that the ops before it left. It runs whole, through the interpreter, on
meta tensors, watched by `planrt.plans.tracker`. Both ways use the same rules for rows (`planrt.plans.rows`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from planrt.errors import ExecutionError, PlanArgumentError
from planrt.plans import ops as table
from planrt.plans.effects import Effect, Links, Made, NeedsValuesError, Operand, effect, on_meta
from planrt.plans.flow import INDEPENDENT, Info, Node, joined
from planrt.plans.graph import Graph, Op, refs_in
from planrt.plans.inference import Spec, needs_values, spec
from planrt.plans.interpreter import Program, drive, failure, last_uses
from planrt.plans.report import Dependence, OpReport, Report, Totals, Unforeseen, ValueReport
from planrt.plans.rows import Trace, fold, keep, lost
from planrt.plans.tracker import Tracker
from planrt.types import FREE, Nested, Ref, TensorSpec, leaves, map_leaves

_COPIES_BY_STRIDES = frozenset(
    f"{home}.{word}"
    for home in ("torch", "Tensor")
    for word in ("reshape", "reshape_as", "contiguous", "flatten", "ravel", "to", "type_as")
)
"""Ops whose result may be their argument's memory or a copy, depending on its strides. Those of a real run may differ
from these, so what is written into such a copy counts as written into the argument."""

_Output = tuple[str, TensorSpec | Unforeseen | None, Info]
_NO_ROWS = lost("a tensor without dimensions")


def analyse(graph: Graph, inputs: Sequence[TensorSpec | None] = (), *, gradients: bool = False) -> Report:
    """What `graph` does with inputs of these specs.

    Inputs and state are taken to be contiguous, and none to share memory with another: who runs the plan on the
    strength of this report has to make them so.

    Args:
        graph: the plan.
        inputs: shape and dtype of each input, without free sizes. One that the plan itself fixes may be None, and all
            may be left out where it fixes all.
        gradients: as a training loop runs the plan: trainable parameters require gradients, autograd keeps what a
            backward pass needs, and if the first output is a scalar that depends on them, the pass is run from it.
            Plans that differentiate do all that by themselves, where they say so.

    Raises:
        PlanArgumentError: specs that do not fit the plan's inputs, or leave a size free.
        ExecutionError: an op cannot run on such inputs; names it.
    """
    given = concrete_inputs(graph, inputs)
    if gradients or graph.differentiates:
        return _Whole(graph, given, gradients).report()
    return _Composed(graph, given).report()


def concrete_inputs(graph: Graph, inputs: Sequence[TensorSpec | None]) -> tuple[TensorSpec, ...]:
    """The specs of all inputs, from those that were given and those that the plan fixes; see `analyse`."""
    specs = list(inputs) if inputs else [None] * len(graph.inputs)
    if len(specs) != len(graph.inputs):
        raise PlanArgumentError(
            f"plan {graph.name!r} takes {len(graph.inputs)} inputs, got the specs of {len(specs)}"
        )
    found = []
    for index, (wanted, have) in enumerate(zip(graph.inputs, specs, strict=True)):
        name = graph.input_name(index)
        have = wanted if have is None else have
        if FREE in have.shape:
            raise PlanArgumentError(
                f"{name} of plan {graph.name!r} is {wanted}: say which sizes to check it for, for example "
                f"TensorSpec({tuple(32 if size == FREE else size for size in have.shape)}, {have.dtype})"
            )
        fits = len(have.shape) == len(wanted.shape) and all(
            size in (FREE, real) for size, real in zip(wanted.shape, have.shape, strict=True)
        )
        if not fits or have.dtype != wanted.dtype:
            raise PlanArgumentError(f"{name} of plan {graph.name!r}: wanted {wanted}, got {have}")
        if any(type(size) is not int or size < 0 for size in have.shape) or math.prod(have.shape) >= 2**48:
            raise PlanArgumentError(f"{name} of plan {graph.name!r}: {have} is no possible tensor")
        found.append(have)
    return tuple(found)


def _source_info(source: int, like: TensorSpec, rows: bool) -> Info:
    trace = {} if not rows else {source: keep(0, like.shape[0]) if like.shape else _NO_ROWS}
    return Info(1 << source, 0, trace)


def _bytes_of(like: TensorSpec) -> int:
    return math.prod(like.shape) * like.dtype.itemsize


class _Memory:
    """A piece of memory: its bytes, how many values of the plan look at it, and whose it is (a source, or -1)."""

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


class _Analysis:
    """What both ways share: the plan's sources, and the report."""

    def __init__(self, graph: Graph, inputs: tuple[TensorSpec, ...]) -> None:
        self.graph = graph
        self.inputs = inputs
        self.sources = [*inputs, *[entry.spec for entry in graph.state]]
        self.input_bytes = sum(_bytes_of(one) for one in inputs)
        self.state_bytes = sum(_bytes_of(entry.spec) for entry in graph.state)
        self.ops: list[OpReport] = []
        self.unbounded: list[int] = []
        self.unknown: set[str] = set()
        self.flops = 0
        self.written: dict[int, list[int]] = {}

    def note(
        self, index: int, outputs: tuple[TensorSpec | Unforeseen, ...], size: int | None, flops: int | None
    ) -> None:
        self.ops.append(OpReport(index, outputs, size, flops, self.graph))
        if size is None:
            self.unbounded.append(index)
        self.flops += flops or 0

    def make(
        self,
        outputs: Sequence[_Output],
        sources: Sequence[Info],
        output_bytes: int,
        peak: int,
    ) -> Report:
        written = [
            self._value(self._describe(source)[1], self.sources[source], sources[source], tuple(by), source)
            for source, by in sorted(self.written.items())
        ]
        return Report(
            graph=self.graph,
            inputs=self.inputs,
            ops=tuple(self.ops),
            outputs=tuple([self._value(path, like, info) for path, like, info in outputs]),
            written=tuple(written),
            totals=Totals(
                self.flops,
                self.input_bytes,
                self.state_bytes,
                output_bytes,
                self.input_bytes + self.state_bytes + peak,
                tuple(self.unbounded),
            ),
            unknown_kernels=tuple(sorted(self.unknown)),
        )

    def _value(
        self,
        path: str,
        like: TensorSpec | Unforeseen | None,
        info: Info,
        by: tuple[int, ...] = (),
        source: int | None = None,
    ) -> ValueReport:
        depends = tuple([self._dependence(one, info.rows.get(one)) for one in _bits(info.sources)])
        return ValueReport(path, like, depends, tuple(_bits(info.ops)), by, source)

    def _dependence(self, source: int, trace: Trace | None) -> Dependence:
        kind, name = self._describe(source)
        if trace is None or not self.sources[source].shape:
            return Dependence(source, kind, name, "used")
        if trace.raw:
            return Dependence(source, kind, name, "raw", 1, tuple(sorted(trace.kinds)), trace.lost)
        return Dependence(source, kind, name, "aggregated", trace.rows, tuple(sorted(trace.kinds)))

    def _describe(self, source: int) -> tuple[Any, str]:
        if source < len(self.inputs):
            return "input", self.graph.input_name(source)
        entry = self.graph.state[source - len(self.inputs)]
        return entry.kind, entry.name


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _paths(outputs: Nested, path: str = "output") -> Iterator[tuple[str, Any]]:
    """Every leaf of the outputs with its place, as Python would write it."""
    if isinstance(outputs, tuple | list):
        for index, item in enumerate(outputs):
            yield from _paths(item, f"{path}[{index}]")
    elif isinstance(outputs, dict):
        for key, item in outputs.items():
            yield from _paths(item, f"{path}[{key!r}]")
    else:
        yield path, outputs


def _shown(like: Spec) -> TensorSpec:
    return TensorSpec(like.shape, like.dtype)


# Put together from single ops


class _Composed(_Analysis):
    """A plan that does not differentiate."""

    def report(self) -> Report:
        graph = self.graph
        followed = len(self.inputs)
        self.values: dict[int, Any] = {}
        self.owned: list[_Value] = []
        for source, like in enumerate(self.sources):
            node = Node(_source_info(source, like, source < followed), like.shape)
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
        outputs: list[_Output] = []
        output_bytes = 0
        for path, leaf in _paths(graph.outputs):
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
            found = effect(op.name, args, kwargs)
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

        def gathered(links: Links) -> Info:
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
            if type(leaf) is not Made:
                return leaf
            made.append(_shown(leaf.spec))
            if leaf.base < 0:
                memory = pieces[leaf.memory]
                if op.name in _COPIES_BY_STRIDES and operands:
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
        self._bind(op.results, value(results) if type(results) is Made else map_leaves(results, value))
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
        info = unforeseen_info(op.name, [(one.node.info, one.node.shape) for one in operands], index)
        bound = _bound(op.name, args) if all(one._spec for one in operands) else None
        for operand in _operands(table.written_operands(op.name, tuple(args), {}), {}):
            self._note_write(operand, index)
            operand.node.write(_all_lost(info, op.name, index))
        memory = _Memory(bound or 0)
        self.live += memory.size
        self.peak = max(self.peak, self.live)
        refs = list(refs_in(op.results))
        for place, ref in enumerate(refs):
            at_most = None if bound is None else bound if place == 0 else 0
            value = _Value(None, Node(info, ()), memory, at_most)
            memory.users += 1
            self.values[ref.index] = value
        flops = sum(math.prod(one._spec.shape) for one in operands if one._spec)
        self.note(index, tuple([Unforeseen(bound)] * len(refs)), bound, None if bound is None else flops)


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
    return Unforeseen(value.at_most) if value._spec is None else _shown(value._spec)


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


# Run whole


class _Whole(_Analysis):
    """A plan that differentiates, or is to be differentiated."""

    def __init__(self, graph: Graph, inputs: tuple[TensorSpec, ...], gradients: bool) -> None:
        super().__init__(graph, inputs)
        self.gradients = gradients
        self.tracker = Tracker()
        self.index = 0

    def report(self) -> Report:
        graph, tracker = self.graph, self.tracker
        followed = len(self.inputs)
        tensors = []
        for source, like in enumerate(self.sources):
            entry = graph.state[source - followed] if source >= followed else None
            tensor = torch.empty(
                like.shape,
                dtype=like.dtype,
                device="meta",
                requires_grad=self.gradients and entry is not None and entry.trainable,
            )
            tracker.register(tensor, _source_info(source, like, entry is None))
            tensors.append(tensor)
        self.owners = {tracker.memory(tensor): source for source, tensor in enumerate(tensors)}
        functions = {op.name: self._watched(op.name, table.lookup(op.name)) for op in graph.ops}
        program = Program(graph, torch.device("meta"), functions=functions)
        try:
            with torch.enable_grad(), tracker:
                results = drive(program.run(tensors[:followed], tensors[followed:]))
                gradients = self._gradients(results, tensors[followed:])
        except ExecutionError as error:
            if not isinstance(error.__cause__, Exception) or not needs_values(error.__cause__):
                raise
            return self._cut_off(tensors)
        outputs: list[_Output] = []
        output_bytes = 0
        for path, leaf in _paths(results):
            if isinstance(leaf, torch.Tensor):
                like = TensorSpec.of(leaf)
                outputs.append((path, like, tracker.info(leaf)))
                output_bytes += _bytes_of(like)
            else:
                outputs.append((path, None, INDEPENDENT))
        self.unknown = tracker.unknown
        report = self.make(outputs, [tracker.info(one) for one in tensors], output_bytes, tracker.peak)
        return replace(report, gradients=gradients)

    def _gradients(self, results: Nested, state: Sequence[torch.Tensor]) -> tuple[ValueReport, ...]:
        """What a training loop gets by a backward pass from the loss."""
        loss = next((leaf for _, leaf in _paths(results)), None)
        trained = [place for place, tensor in enumerate(state) if tensor.requires_grad]
        if not trained or not isinstance(loss, torch.Tensor) or loss.dim() or not loss.requires_grad:
            return ()
        tracker, before = self.tracker, self.tracker.flops
        tracker.op = -1
        made = torch.autograd.grad(
            loss, [state[place] for place in trained], retain_graph=True, allow_unused=True
        )
        self.flops += tracker.flops - before
        return tuple(
            [
                self._value(
                    f"gradient of {self.graph.state[place].name}", TensorSpec.of(one), tracker.info(one)
                )
                for place, one in zip(trained, made, strict=True)
                if one is not None
            ]
        )

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, taking notes. The interpreter calls one function for each op, in their order."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            index, self.index = self.index, self.index + 1
            tracker = self.tracker
            tracker.op = index
            tracker.written.clear()
            flops = tracker.flops
            result = map_leaves(function(*args, **kwargs), on_meta)
            made = [leaf for leaf in leaves(result) if isinstance(leaf, torch.Tensor)]
            tracker.settle(made, [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)])
            operand = args[0] if args else None
            if name in _COPIES_BY_STRIDES and made and isinstance(operand, torch.Tensor):
                tracker.tie(made[0], operand)
                owner = self.owners.get(tracker.memory(operand))
                if owner is not None:
                    self.owners[tracker.memory(made[0])] = owner
            for source in sorted({self.owners.get(key, -1) for key in tracker.written} - {-1}):
                self.written.setdefault(source, []).append(index)
            size = sum(tracker.allocated(made).values())
            self.note(index, tuple([TensorSpec.of(one) for one in made]), size, tracker.flops - flops)
            return result

        return watched

    def _cut_off(self, tensors: Sequence[torch.Tensor]) -> Report:
        """An op needed values: nothing is known from there on, so everything may depend on everything, raw."""
        first = len(self.ops)
        everything = INDEPENDENT
        for tensor in tensors:
            everything = joined(everything, self.tracker.info(tensor))
        everything = _all_lost(everything, self.graph.ops[first].name, first)
        for index in range(first, len(self.graph.ops)):
            op = self.graph.ops[index]
            self.note(index, tuple([Unforeseen()] * len(list(refs_in(op.results)))), None, None)
            written = table.written_operands(op.name, op.args, op.kwargs)
            if any(isinstance(leaf, Ref) for leaf in written):  # through views it may be any source
                for source in range(len(self.sources)):
                    self.written.setdefault(source, []).append(index)
        outputs: list[_Output] = [
            (path, Unforeseen() if isinstance(leaf, Ref) else None, everything)
            for path, leaf in _paths(self.graph.outputs)
        ]
        return self.make(outputs, [everything] * len(self.sources), 0, self.tracker.peak)


# Ops whose results' sizes depend on values


def unforeseen_info(name: str, operands: Sequence[tuple[Info, tuple[int, ...]]], index: int) -> Info:
    """What results depend on of an op that cannot be run without values: on everything, rows lost."""
    counts = name.rpartition(".")[2] == "bincount"
    total = INDEPENDENT
    for info, shape in operands:
        if counts and len(shape) == 1:
            part = info.through(shape, (fold(shape[0], "count"),))
        else:
            part = _all_lost(info, name.rpartition(".")[2], index)
        total = joined(total, part)
    return Info(total.sources, total.ops | 1 << index, total.rows)


def _all_lost(info: Info, kernel: str, index: int) -> Info:
    rows = {
        source: Trace((), 0, frozenset(), (kernel, index)) if trace.axes else trace
        for source, trace in info.rows.items()
    }
    return Info(info.sources, info.ops, rows)


def _bound(name: str, args: Sequence[Any]) -> int | None:
    """The most bytes that all results of an op can take whose sizes depend on values; None if unknown."""
    word = name.rpartition(".")[2]
    if not args or not isinstance(args[0], _Value) or args[0]._spec is None:
        return None
    like = args[0]._spec
    entries = math.prod(like.shape)
    if word in ("nonzero", "argwhere"):
        return entries * max(len(like.shape), 1) * 8
    if word in ("unique", "unique_consecutive"):
        return entries * (like.dtype.itemsize + 16)  # values, where each went, how many there are
    if word == "masked_select" and len(args) > 1 and isinstance(args[1], _Value) and args[1]._spec:
        return entries * math.prod(args[1]._spec.shape) * like.dtype.itemsize  # as far as broadcasting can go
    if word == "__getitem__" and isinstance(args[1], _Value) and args[1]._spec:
        return entries * like.dtype.itemsize if args[1]._spec.dtype == torch.bool else None
    return None
