"""Records a PyTorch function into a `Plan` by running it on example arguments.

A `TorchFunctionMode` sees every public torch call and writes one op each, with the arguments as written. The
function runs twice, the second time with the free dimensions doubled. What is equal in both runs is a
constant; what follows the sizes stays computed from them; anything else that differs would silently freeze
the example's sizes, and is a `TraceError` that names the line. Tensors that the function uses but did not
make become state of the plan. The function's side effects on modules, tensors and generators are undone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode, resolve_name

from planrt.errors import PlanFormatError, PlanrtError, TraceError
from planrt.plans import seen
from planrt.plans.lifting import StateRegistry, Undo, check_plain
from planrt.plans.ops import SIZE_ARITHMETIC, SIZE_OPS, name_of
from planrt.plans.plan import Op, Plan, map_leaves, refs_in, show
from planrt.plans.sizes import TracedNumber, TracedShape, traced
from planrt.plans.source import line_of_error, user_line
from planrt.serde.values import DEVICE, encode, pack
from planrt.types import FREE, Nested, Ref, TensorSpec

# While recording, values are numbered in three ranges; `assemble` renumbers them when the state is complete.
_STATE: Final = 1 << 24
_RESULT: Final = 1 << 25

# Ops whose result shapes depend on the data: repeated data can give equal sizes, which prove nothing then.
_DATA_SHAPED = frozenset(
    f"{home}.{name}"
    for home in ("torch", "Tensor", "nn.functional")
    for name in ("unique", "unique_consecutive", "nonzero", "argwhere", "masked_select", "bincount",
                 "one_hot", "repeat_interleave", "where")
)  # fmt: skip


class SizesFixedError(TraceError):
    """The function could be recorded for the sizes of the examples only."""


@dataclass(frozen=True, slots=True)
class Step:
    """One recorded op. `value` is the number that a size op gave in this run."""

    op: Op
    line: str | None
    packed: bytes
    value: int | float | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """What one traced function did: steps and outputs, values numbered as while recording."""

    inputs: tuple[TensorSpec, ...]
    steps: tuple[Step, ...]
    outputs: Nested


def trace(
    function: Callable[..., Any],
    examples: Sequence[torch.Tensor],
    *,
    modules: Sequence[torch.nn.Module] = (),
    free_dims: Sequence[Sequence[int]] | None = None,
    name: str = "plan",
    input_names: Sequence[str] = (),
    doc: str = "",
) -> Plan:
    """Record ``function(*examples)`` into a plan.

    Args:
        function: takes tensors, gives tensors (also nested in tuples, lists and dicts with string keys).
        examples: one tensor per input; values matter only where the function depends on them.
        modules: modules the function uses; their parameters and buffers become named state, in module order.
        free_dims: per input, the dimensions that may have other sizes at run time; default: none.
        name: what the plan is called when printed.
        input_names: names of the inputs in error messages.
        doc: a docstring to carry along.

    Raises:
        TraceError: the function cannot be recorded faithfully; the message names the line.
    """
    registry = StateRegistry(modules)
    recording = record(function, examples, registry=registry, free_dims=free_dims)
    return assemble(recording, registry, name=name, input_names=input_names, doc=doc)


def record(
    function: Callable[..., Any],
    examples: Sequence[torch.Tensor],
    *,
    registry: StateRegistry,
    free_dims: Sequence[Sequence[int]] | None = None,
) -> Recording:
    """Run `function` twice and return what both runs have in common; see `trace`."""
    free = tuple(tuple(dims) for dims in free_dims) if free_dims is not None else ((),) * len(examples)
    specs = tuple(
        TensorSpec.of(check_plain(example, "an example argument"), free_dims=dims)
        for example, dims in zip(examples, free, strict=True)
    )
    with Undo(registry) as undo:
        first, outputs = _run_once(function, examples, specs, registry)
        undo.restore()
        try:
            others = [_extended(example, dims) for example, dims in zip(examples, free, strict=True)]
            second, other_outputs = _run_once(function, others, specs, registry, values=first.values)
        except _MadeUnseenError:
            raise
        except TraceError as error:
            raise SizesFixedError(f"cannot leave the free sizes open, with them doubled: {error}") from error
    _compare(first.steps, second.steps)
    if pack(outputs[1]) != pack(other_outputs[1]):
        raise SizesFixedError("the function returns something else when its free sizes change")
    is_free = any(free) and not any(step.op.name in _DATA_SHAPED for step in first.steps)
    same = [
        is_free and one.value is not None and one.value == other.value
        for one, other in zip(first.steps, second.steps, strict=True)
    ]
    return Recording(specs, *_folded(first.steps, same, outputs[0]))


def assemble(
    recording: Recording,
    registry: StateRegistry,
    *,
    name: str = "plan",
    input_names: Sequence[str] = (),
    doc: str = "",
) -> Plan:
    """The plan of a recording, with everything in `registry` as its state."""
    count = len(recording.inputs)
    results = [ref.index for step in recording.steps for ref in refs_in(step.op.results)]
    first_result = count + len(registry.entries)
    number = {key: Ref(first_result + index) for index, key in enumerate(results)}

    def renumber(leaf: Any) -> Any:
        if not isinstance(leaf, Ref) or leaf.index < _STATE:
            return leaf
        return Ref(count + leaf.index - _STATE) if leaf.index < _RESULT else number[leaf.index]

    return Plan(
        inputs=recording.inputs,
        state=tuple(entry.spec() for entry in registry.entries),
        ops=tuple(
            Op(
                step.op.name,
                map_leaves(step.op.args, renumber),
                map_leaves(step.op.kwargs, renumber),
                map_leaves(step.op.results, renumber),
            )
            for step in recording.steps
        ),
        outputs=map_leaves(recording.outputs, renumber),
        name=name,
        input_names=tuple(input_names),
        state_values=tuple(entry.tensor.detach() for entry in registry.entries),
        lines=tuple(step.line for step in recording.steps),
        doc=doc,
    )


class _MadeUnseenError(TraceError):
    """A tensor appeared that no recorded op made."""


class Recorder(TorchFunctionMode):
    """Writes down every torch call made under it. One recorder sees one run.

    `values` are the constants by value (arrays turned into tensors) of the first run, for a second one.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        specs: Sequence[TensorSpec],
        registry: StateRegistry,
        values: list[torch.Tensor] | None,
    ) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.failure: TraceError | None = None
        self.values: list[torch.Tensor] = []
        self._first_values = values
        self._specs = specs
        self._registry = registry
        self._alive: list[torch.Tensor] = [*inputs]  # ids below stay unique while these live
        self._refs = {id(tensor): Ref(index) for index, tensor in enumerate(inputs)}
        self._results = 0
        self._closed = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of `func`; torch calls made in here are not seen."""
        try:
            return self._call(func, args, kwargs or {})
        except TraceError as error:
            self.failure = self.failure or error  # user code may swallow it
            raise

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in seen.SHAPE_READS or func in seen.SIZE_READS or func in seen.COUNT_READS:
            return self._size(func, args, kwargs)
        if func in seen.METADATA or isinstance(func, type):
            return func(*args, **kwargs)
        name = name_of(func)
        if func in seen.TO_DEVICE:
            result = func(*args, **kwargs)
            return self._emit("Tensor.to", (args[0], torch.device("cpu")), {}, result)
        if func is torch.Tensor.type:
            result = func(*args, **kwargs)
            if isinstance(result, str):
                return result
            return self._emit("Tensor.to", (args[0], result.dtype), {}, result)
        if func is torch._assert and not isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)
        if name is None:
            line, _ = user_line()
            if func in seen.FROM_ARRAY:
                return self._constant(func(*args, **kwargs), line)
            raise TraceError(seen.why_refused(func, resolve_name(func)), line=line)
        if func in seen.FROM_ARRAY and seen.holds_array(args):
            return self._constant(func(*args, **kwargs), user_line()[0])
        recorded_args, recorded_kwargs = self._recorded(
            name, args, kwargs
        )  # before the call: it may change them
        result = func(*map_leaves(args, _plain), **map_leaves(kwargs, _plain))
        return self._write(name, recorded_args, recorded_kwargs, result)

    def _emit(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        return self._write(name, *self._recorded(name, args, kwargs), result)

    def _recorded(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if name == "Tensor.to" and len(args) > 1 and isinstance(args[1], str | int):
            args = (args[0], torch.device("cpu"), *args[2:])  # x.to("cuda"), x.to(0)
        recorded: dict[str, Any] = map_leaves(kwargs, self._leaf)
        if recorded.get("device") is not None:
            recorded["device"] = DEVICE
        return map_leaves(args, self._leaf), recorded

    def _write(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        line, in_function = user_line()
        if in_function:
            raise TraceError(
                "a custom autograd.Function cannot be recorded: the plan would lose its backward", line=line
            )
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise TraceError("torch.autocast cannot be recorded: cast with .to(dtype) instead", line=line)
        if torch.is_inference_mode_enabled():
            raise TraceError("inference_mode cannot be recorded: use torch.no_grad() instead", line=line)
        results = self._named(result, line)
        try:
            packed = pack([name, encode(args), encode(kwargs), encode(results)])
        except PlanFormatError as error:
            raise TraceError(f"{name}: {error}", line=line) from None
        self.steps.append(Step(Op(name, args, kwargs, results), line, packed))
        return result

    def _named(self, result: Any, line: str | None) -> Nested:
        if result is None:
            return None
        if isinstance(result, torch.Tensor):
            check_plain(result, "a result", line=line)
            self._refs[id(result)] = ref = self._new_ref()
            self._alive.append(result)
            return ref
        if isinstance(result, tuple | list):
            return tuple([self._named(item, line) for item in result])
        if isinstance(result, bool):  # the previous mode, from set_grad_enabled
            return None
        raise TraceError(f"an op gave a {type(result).__name__}, which a plan cannot hold", line=line)

    def _new_ref(self) -> Ref:
        self._results += 1
        return Ref(_RESULT + self._results - 1)

    def _leaf(self, leaf: Any) -> Any:
        """What stands in the plan for one argument."""
        if isinstance(leaf, torch.Tensor):
            return self._tensor_ref(leaf)
        if isinstance(leaf, TracedNumber):
            return leaf.ref if leaf.recorder is self else _plain(leaf)
        if isinstance(leaf, torch.device):
            return DEVICE
        if isinstance(leaf, type) and leaf in seen.PYTHON_DTYPES:
            return seen.PYTHON_DTYPES[leaf]
        return seen.without_numpy(leaf)

    def _tensor_ref(self, tensor: torch.Tensor) -> Ref:
        ref = self._refs.get(id(tensor))
        if ref is not None:
            return ref
        index = self._registry.find(tensor)
        if index is None:
            line, _ = user_line()
            if self._first_values is not None:
                raise _MadeUnseenError(
                    "a tensor that no recorded op made: a custom autograd.Function, or a library that works "
                    "behind torch's public functions",
                    line=line,
                )
            index = self._registry.capture(tensor, line)
        return Ref(_STATE + index)

    def _constant(self, tensor: torch.Tensor, line: str | None) -> torch.Tensor:
        """A tensor made from an array outside: state, if both runs make the same one."""
        position = len(self.values)
        if self._first_values is None:
            index = self._registry.capture(tensor, line)
        else:
            first = self._first_values[position] if position < len(self._first_values) else None
            if first is None or first.shape != tensor.shape or not torch.equal(first, tensor):
                raise SizesFixedError("an array turned into a tensor depends on the sizes", line=line)
            index = self._registry.find(first) or 0
        self.values.append(tensor)
        self._alive.append(tensor)
        self._refs[id(tensor)] = Ref(_STATE + index)
        return tensor

    # Sizes

    def _size(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        if func in seen.COUNT_READS:
            return self._number("Tensor.numel", (self._tensor_ref(tensor),), func(*args, **kwargs))
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if func in seen.SHAPE_READS or dim is None:
            return TracedShape([self._dim(tensor, index) for index in range(tensor.dim())])
        size = tensor.size(dim)  # raises torch's own error for a bad dim
        return self._dim(tensor, dim % tensor.dim()) if isinstance(dim, int) else size

    def _dim(self, tensor: torch.Tensor, dim: int) -> Any:
        size, ref = tensor.size(dim), self._tensor_ref(tensor)
        is_input = ref.index < len(self._specs)
        if _STATE <= ref.index < _RESULT or (is_input and self._specs[ref.index].shape[dim] != FREE):
            return size
        return self._number("Tensor.size", (ref, dim), size)

    def record_arithmetic(self, name: str, *operands: int | float) -> Any:
        """Called by `SizeInt` and `SizeFloat` for their operators."""
        value = SIZE_ARITHMETIC[f"operator.{name}"](*(_plain(operand) for operand in operands))
        if self._closed or any(o.recorder is not self for o in operands if isinstance(o, TracedNumber)):
            return value
        return self._number(f"operator.{name}", tuple(self._leaf(operand) for operand in operands), value)

    def _number(self, name: str, args: tuple[Any, ...], value: Any) -> Any:
        ref = self._new_ref()
        packed = pack([name, encode(args), encode(ref)])
        self.steps.append(Step(Op(name, args, {}, ref), user_line()[0], packed, value))
        return traced(value, ref, self)

    # The end of a run

    def finish(self, outputs: Any) -> tuple[Nested, Any]:
        """The outputs with every tensor replaced by its number, plain and encoded; closes the recorder."""
        self._write_back_buffers()
        named = map_leaves(outputs, self._leaf)
        self._closed = True
        try:
            return named, encode(named)
        except PlanFormatError as error:
            raise TraceError(f"the function returns something that a plan cannot: {error}") from None

    def _write_back_buffers(self) -> None:
        """``self.n = self.n + 1`` binds a new tensor to a buffer: copy it into the old one instead."""
        for name, old, new in self._registry.rebound():
            if not isinstance(new, torch.Tensor) or TensorSpec.of(new) != TensorSpec.of(old):
                raise TraceError(f"the module gives its state {name!r} another shape or dtype: a plan cannot")
            source = self._tensor_ref(new)
            self._write("Tensor.copy_", (self._tensor_ref(old), self._detached(source)), {}, None)

    def _detached(self, source: Ref) -> Ref:
        ref = self._new_ref()
        op = Op("Tensor.detach", (source,), {}, ref)
        self.steps.append(Step(op, None, pack([op.name, encode(op.args), encode(ref)])))
        return ref


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, TracedNumber):
        return int(leaf) if isinstance(leaf, int) else float(leaf)  # type: ignore[arg-type]
    return leaf


def _run_once(
    function: Callable[..., Any],
    examples: Sequence[torch.Tensor],
    specs: Sequence[TensorSpec],
    registry: StateRegistry,
    values: list[torch.Tensor] | None = None,
) -> tuple[Recorder, tuple[Nested, Any]]:
    inputs = [example.detach().clone().requires_grad_(example.requires_grad) for example in examples]
    recorder = Recorder(inputs, specs, registry, values)
    try:
        with torch.enable_grad(), recorder:
            outputs = function(*inputs)
        if recorder.failure is not None:
            raise recorder.failure
        return recorder, recorder.finish(outputs)
    except PlanrtError:
        raise recorder.failure or sys.exc_info()[1] from None  # type: ignore[misc]
    except Exception as error:
        if recorder.failure is not None:
            raise recorder.failure from error
        reason = (str(error).strip().splitlines() or [""])[0]
        raise TraceError(
            f"the function failed on its example arguments: {type(error).__name__}: {reason}",
            line=line_of_error(error),
        ) from error


def _extended(example: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """`example` with its free dimensions doubled by repeating its own entries: indices in it stay valid."""
    other = example.detach()
    for dim in dims:
        other = torch.cat([other, other], dim)
    return other.requires_grad_(example.requires_grad)


def _compare(first: list[Step], second: list[Step]) -> None:
    for one, other in zip(first, second, strict=False):
        if one.packed == other.packed:
            continue
        if one.op.name != other.op.name:
            raise SizesFixedError(
                f"the free sizes decide which op runs, {one.op.name} or {other.op.name}: a plan has one path",
                line=one.line,
            )
        differing = [
            (a, b)
            for a, b in zip(_leaves((one.op.args, one.op.kwargs)), _leaves((other.op.args, other.op.kwargs)),
                            strict=False)
            if pack(encode(a)) != pack(encode(b))
        ]  # fmt: skip
        what = (
            f"{show(differing[0][0])} became {show(differing[0][1])}" if differing else "its results differ"
        )
        raise SizesFixedError(
            f"a free size is frozen in an argument of {one.op.name} ({what} when the sizes doubled): use "
            "x.shape[...] and + - * // % on it; int(), len(), range() and math functions lose it",
            line=one.line,
        )
    if len(first) != len(second):
        longer = first if len(first) > len(second) else second
        raise SizesFixedError(
            "the free sizes decide how many ops run: a plan has one path",
            line=longer[min(len(first), len(second))].line,
        )


def _leaves(value: Nested) -> list[Any]:
    leaves: list[Any] = []
    map_leaves(value, leaves.append)
    return leaves


def _folded(steps: list[Step], same: list[bool], outputs: Nested) -> tuple[tuple[Step, ...], Nested]:
    """Sizes that no run can change become constants; size ops that nothing uses go."""
    constants: dict[int, int | float] = {}

    def fold(leaf: Any) -> Any:
        return constants.get(leaf.index, leaf) if isinstance(leaf, Ref) else leaf

    folded: list[Step] = []
    for step, is_same in zip(steps, same, strict=True):
        op = Op(
            step.op.name, map_leaves(step.op.args, fold), map_leaves(step.op.kwargs, fold), step.op.results
        )
        if step.value is not None:
            reads_tensor = op.name not in SIZE_ARITHMETIC
            if is_same if reads_tensor else not any(True for _ in refs_in(op.args)):
                constants[op.results.index] = step.value
                continue
        folded.append(Step(op, step.line, step.packed, step.value))
    outputs = map_leaves(outputs, fold)

    used = {ref.index for ref in refs_in(outputs)}
    kept: list[Step] = []
    for step in reversed(folded):
        if step.op.name in SIZE_OPS and step.op.results.index not in used:
            continue
        used.update(ref.index for ref in refs_in((step.op.args, step.op.kwargs)))
        kept.append(step)
    return tuple(reversed(kept)), outputs
