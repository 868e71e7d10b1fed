"""`Recorder`: every torch call that a function makes, written down as a step.

The tracer runs a function several times (`planrt.plans.recording.traced_run`), each time under a recorder of
its own, and makes a plan of what all runs agree on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import torch
from torch.overrides import TorchFunctionMode, resolve_name

from planrt.errors import PlanFormatError, PlanWarning, TraceError
from planrt.plans.ir.graph import Op
from planrt.plans.ir.guards import GUARDS
from planrt.plans.ir.ops import COMPARISONS, GRADIENTS, SIZE_ARITHMETIC, name_of
from planrt.plans.ir.source import called_by_user, frames_to_user, running_modules, user_line
from planrt.plans.recording import foreach, torch_calls, torch_code, traced_sizes
from planrt.plans.recording.known_values import KnownValues
from planrt.plans.recording.lifting import LOST_BACKWARD, StateRegistry, check_plain
from planrt.plans.recording.optimizers import OptimizerWatch, why_no_step
from planrt.plans.recording.python_rng import Draws, why_not
from planrt.plans.recording.python_state import Left
from planrt.plans.recording.traced_sizes import TracedNumber, TracedShape, traced
from planrt.plans.running.modes import default_changed, refuse_modes, write_default_dtype
from planrt.serde.values import DEVICE, encode, pack
from planrt.types import FREE, Nested, Ref, TensorSpec, map_leaves

# While recording, values are numbered in three ranges: inputs from 0, state and results from these. The final
# numbers are known when the state is complete.
FIRST_STATE: Final = 1 << 24
FIRST_RESULT: Final = 1 << 25


class SizesFixedError(TraceError):
    """The function could be recorded for the sizes of the examples only."""


@dataclass(frozen=True, slots=True)
class RecordedOp:
    """One recorded op: the user's line, the module whose forward ran (``layer2.0.bn1 (BatchNorm2d)``), and
    the number that a size op returned in this run."""

    op: Op
    line: str | None
    packed: bytes
    value: int | float | None = None
    module: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a function: its recorder, and its outputs with every tensor replaced by its number."""

    recorder: Recorder
    outputs: Nested
    encoded: Any


class SecondRunError(TraceError):
    """Something that only a second run shows, and that has nothing to do with sizes."""


class DrawnError(TraceError):
    """Somebody drew Python's or NumPy's random numbers during a run: the function, or another thread."""


class Recorder(TorchFunctionMode):
    """Writes down every torch call made under it. One recorder sees one run.

    `values` are the constants by value (arrays turned into tensors) of the first run, for a second one.
    `left` is what an earlier run left behind, for one that begins there.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        specs: Sequence[TensorSpec],
        registry: StateRegistry,
        values: list[torch.Tensor] | None,
        optimizers: OptimizerWatch,
        left: Left | None = None,
    ) -> None:
        super().__init__()
        self.steps: list[RecordedOp] = []
        self.failure: TraceError | None = None
        self.in_call = False
        """Whether torch runs a call that is being recorded."""
        self.values: list[torch.Tensor] = []
        self.assumptions: dict[bytes, tuple[int, RecordedOp]] = {}
        """Comparisons of free sizes by their encoded form: the number of steps before, and the check."""
        self.readings: dict[int, tuple[int, RecordedOp]] = {}
        """The same for free sizes of which the function saw the plain number, by their number in the plan."""
        self._first_values = values
        self._specs = specs
        self.registry = registry
        self._alive: list[torch.Tensor] = [*inputs]  # ids below stay unique while these live
        self._refs = {id(tensor): Ref(index) for index, tensor in enumerate(inputs)}
        self._left = left
        self._draws = Draws()
        self.known = KnownValues()
        self.reused = False
        """Whether the function used a tensor that an earlier run had left for it."""
        self._results = 0
        self._grad_mode = True
        self._closed = False
        self._at: str | None = None
        self._inlining = False
        self._has_gradients = False
        self._optimizers = optimizers
        optimizers.on_step = self._on_step

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of `func`; torch calls made in here are not seen."""
        self.in_call = True
        try:
            return self._call(func, args, kwargs or {})
        except TraceError as error:
            if self._optimizers.stepping is not None:
                reason = error.message.partition(":")[0]
                error = type(error)(why_no_step(self._optimizers.stepping, reason), line=error.line)
            self.failure = self.failure or error  # user code may swallow it
            raise error
        finally:
            self.in_call = False

    def fail(self, message: str, line: str | None) -> NoReturn:
        """Break off the recording; also if the function catches the error."""
        self.failure = self.failure or TraceError(message, line=line)
        raise self.failure

    @contextmanager
    def at(self, line: str | None) -> Iterator[None]:
        """Marks what is recorded under it as coming from an inner plan: from `line` of its function, if that
        is known."""
        before = self._at, self._inlining
        self._at, self._inlining = line, True
        try:
            yield
        finally:
            self._at, self._inlining = before

    def _module(self) -> str | None:
        running = running_modules()
        return self.registry.module_name(running[0], running[-1]) if running else None

    def _line(self) -> str | None:
        return self._at or user_line()

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (
            func in torch_calls.SHAPE_READS
            or func in torch_calls.SIZE_READS
            or func in torch_calls.COUNT_READS
        ):
            return self._size(func, args, kwargs)
        if func is torch.Tensor.__len__ and args[0].dim():
            size = self._dim(args[0], 0)
            if isinstance(size, TracedNumber):
                self._note_reading(size)
            return _untraced(size)
        if func in torch_calls.METADATA or func in torch_calls.PASSES or isinstance(func, type):
            return func(*args, **kwargs)
        if func == torch_calls.GRAD_FN:  # accessors are new objects at every access: equal, not the same
            node = func(*args, **kwargs)
            return node if node is None else torch_calls.RecordedNode(node)
        if func == torch_calls.SETS_DATA and torch_calls.share_all_memory(*args):
            return None  # the end of `p.data -= ...`, which has changed p's memory
        if func == torch_calls.SETS_REQUIRES_GRAD:
            func, args = torch.Tensor.requires_grad_, (args[0], bool(args[1]))
        if func == torch_calls.DELETES_GRAD:
            func, args = torch_calls.SETS_GRAD, (args[0], None)
        if func in foreach.ON_EACH:
            results = [self._call(*call) for call in foreach.calls(func, args, kwargs)]
            return None if results[:1] == [None] else results
        name = name_of(func)
        if func in torch_calls.TO_DEVICE:
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
            return self._unlisted(func, args, kwargs)
        if func in torch_calls.FROM_ARRAY and torch_calls.holds_array(args):
            return self._constant(func(*args, **kwargs), self._line())
        self._check_modes()
        if name in GRADIENTS:
            return self._gradients(name, func, args, kwargs)
        recorded_args, recorded_kwargs = self._recorded(name, args, kwargs)  # before the call may change them
        watched = self.known.before((args, kwargs))
        if name in _TRUSTING:
            func = GUARDS[name](func)
        result = func(*map_leaves(args, _untraced), **map_leaves(kwargs, _untraced))
        if name == "torch.set_grad_enabled":
            self._grad_mode = torch.is_grad_enabled()
        self.known.after(name, watched, result)
        if default_changed():
            write_default_dtype(name, (args, kwargs), recorded_kwargs, result, self._line())
        return self._write(name, recorded_args, recorded_kwargs, result)

    def _unlisted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that is no op: the answer, where a plan has one."""
        asker = torch_code.asker() if self._optimizers.stepping is None else None
        if func is torch_code.CHOOSES_NESTED and asker is not None:
            if self._first_values is None:
                warnings.warn(torch_code.NOT_NESTED, PlanWarning, stacklevel=frames_to_user() + 1)
            return False
        if torch_calls.reads_plain_values(func):
            if self.known.knows_all((args, kwargs)):
                return func(*args, **kwargs)
            answer = torch_code.answer(getattr(func, "__name__", ""))
            if answer is not None:
                return func(*args, **kwargs) if answer else False
        raise TraceError(torch_calls.why_refused(func, resolve_name(func), asker), line=self._line())

    def _gradients(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Backward passes, and reading and setting `.grad`. A tensor's gradient begins empty in a
        recording."""
        if name == "Tensor.grad":
            (tensor,) = args
            self._tensor_ref(tensor)  # a tensor from outside leaves its own gradient there
            grad = tensor.grad
            if grad is None or id(grad) in self._refs:
                return grad  # whether there is one follows from the ops before, the same at every run
            if not self._has_gradients:
                raise TraceError(
                    "a gradient that no recorded call made: use loss.backward()", line=self._line()
                )
        elif name != "Tensor.retain_grad":
            self._has_gradients = True
            self._check_hooks()
        kwargs = {
            key: value for key, value in kwargs.items() if not torch_calls.is_backward_default(key, value)
        }
        recorded_args, recorded_kwargs = self._recorded(name, args, kwargs)
        result = func(*map_leaves(args, _untraced), **map_leaves(kwargs, _untraced))
        return self._write(name, recorded_args, recorded_kwargs, result)

    def check_draws(self, line: str | None) -> None:
        """Raises where the function drew from a generator that is not torch's."""
        whose = self._draws.found()
        if whose is not None:
            self.failure = self.failure or DrawnError(why_not(whose), line=line)
            raise self.failure

    def _check_hooks(self) -> None:
        for what, tensor in self.registry.named(self._alive[: len(self._specs)]):
            if torch_calls.hooked(tensor):
                raise TraceError(
                    f"{what} has hooks on its gradient; {torch_calls.NO_HOOKS}", line=self._line()
                )

    def _on_step(self, optimizer: torch.optim.Optimizer, change: str | None) -> None:
        """Called before an optimizer's first step in this run."""
        with torch._C.DisableTorchFunction():  # nothing in here is the function's
            self.registry.name_optimizer_state(optimizer)
        if change is not None:
            self.failure = self.failure or SecondRunError(why_no_step(optimizer, change), line=self._line())
            raise self.failure

    def _check_modes(self) -> None:
        """Modes that change what ops do, and that come about without a call that could be recorded."""
        refuse_modes(self._line)
        if torch.is_grad_enabled() != self._grad_mode:  # its forward runs without, and nobody said no_grad
            by_hook = torch_code.is_in("utils/hooks.py")
            raise TraceError(torch_calls.LOST_HOOK if by_hook else LOST_BACKWARD, line=self._line())

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
        line = self._line()
        self.check_draws(line)
        results = self._named(result, line)
        try:
            packed = pack([name, encode(args), encode(kwargs), encode(results)])
        except PlanFormatError as error:
            raise TraceError(f"{name}: {error}; leave it out", line=line) from None
        self.steps.append(RecordedOp(Op(name, args, kwargs, results), line, packed, module=self._module()))
        if name == "Tensor.data" and FIRST_STATE <= args[0].index < FIRST_RESULT:
            self.registry.entries[args[0].index - FIRST_STATE].unversioned.append((result, result._version))
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
        return Ref(FIRST_RESULT + self._results - 1)

    def _leaf(self, leaf: Any) -> Any:
        """What stands in the plan for one argument."""
        if isinstance(leaf, torch.Tensor):
            return self._tensor_ref(leaf)
        if isinstance(leaf, TracedNumber):
            return leaf.ref if leaf.recorder is self else _untraced(leaf)
        if isinstance(leaf, torch.device):
            return DEVICE
        if isinstance(leaf, torch.Generator):
            raise TraceError(
                "a torch.Generator cannot go into a plan: leave it out, and seed the plan where it runs "
                "(torch.manual_seed here, a request's seed on a worker)",
                line=self._line(),
            )
        if isinstance(leaf, type) and leaf in torch_calls.PYTHON_DTYPES:
            return torch_calls.PYTHON_DTYPES[leaf]
        return torch_calls.without_numpy(leaf)

    def _tensor_ref(self, tensor: torch.Tensor) -> Ref:
        ref = self._refs.get(id(tensor))
        if ref is not None:
            return ref
        index = self.registry.find(tensor)
        if index is None:
            line = self._line()
            if self._left is not None and self._left.reuses(tensor):
                self.reused = True
                self._alive.append(tensor)
                self._refs[id(tensor)] = ref = self._new_ref()
                return ref
            if self._first_values is not None:
                raise SecondRunError(torch_calls.why_from_nowhere(tensor), line=line)
            index = self.registry.capture(tensor, line)
        return Ref(FIRST_STATE + index)

    def hold(self, tensor: torch.Tensor) -> None:
        """Make `tensor` state of the plan, unless the recording knows it already."""
        self._tensor_ref(tensor)

    def _constant(self, tensor: torch.Tensor, line: str | None) -> torch.Tensor:
        """A tensor made from an array outside: state, if both runs make the same one."""
        position = len(self.values)
        if self._first_values is None:
            index = self.registry.capture(tensor, line)
        else:
            first = self._first_values[position] if position < len(self._first_values) else None
            if first is None or first.shape != tensor.shape or not torch.equal(first, tensor):
                raise SizesFixedError("an array turned into a tensor depends on the sizes", line=line)
            index = self.registry.find(first) or 0
        self.values.append(tensor)
        self._alive.append(tensor)
        self._refs[id(tensor)] = Ref(FIRST_STATE + index)
        return tensor

    # Sizes

    def _size(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        if func in torch_calls.COUNT_READS:
            return self._number("Tensor.numel", (self._tensor_ref(tensor),), func(*args, **kwargs))
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if func in torch_calls.SHAPE_READS or dim is None:
            return TracedShape([self._dim(tensor, index) for index in range(tensor.dim())])
        size = tensor.size(dim)  # raises torch's own error for a bad dim
        return self._dim(tensor, dim % tensor.dim()) if isinstance(dim, int) else size

    def _dim(self, tensor: torch.Tensor, dim: int) -> Any:
        size, ref = tensor.size(dim), self._tensor_ref(tensor)
        is_input = ref.index < len(self._specs)
        if FIRST_STATE <= ref.index < FIRST_RESULT or (
            is_input and self._specs[ref.index].shape[dim] != FREE
        ):
            return size
        return self._number("Tensor.size", (ref, dim), size)

    def record_arithmetic(self, name: str, *operands: int | float) -> Any:
        """Called by `SizeInt` and `SizeFloat` for their operators."""
        value = SIZE_ARITHMETIC[f"operator.{name}"](*(_untraced(operand) for operand in operands))
        if self._closed or any(o.recorder is not self for o in operands if isinstance(o, TracedNumber)):
            return value
        return self._number(f"operator.{name}", tuple(self._leaf(operand) for operand in operands), value)

    def record_comparison(self, name: str, left: int | float, right: int | float) -> bool:
        """Called by `SizeInt` and `SizeFloat` for comparisons: the outcome is what the plan assumes.

        What torch's own modules compare is left out: they raise for sizes that do not fit, as the op will.
        """
        holds = COMPARISONS[name](_untraced(left), _untraced(right))
        if self._is_asked(left, right):
            word = name if holds else _OPPOSITE[name]
            op = Op(f"operator.assume_{word}", (self._leaf(left), self._leaf(right)), {}, None)
            packed = pack([op.name, encode(op.args)])
            self.assumptions.setdefault(packed, (len(self.steps), RecordedOp(op, self._line(), packed)))
        return holds

    def record_reading(self, number: Any) -> Any:
        """Called by `SizeInt` and `SizeFloat` where their memory is lost."""
        if self._is_asked(number):
            self._note_reading(number)
        return _untraced(number)

    def _is_asked(self, *numbers: Any) -> bool:
        """Whether it is the function that looks at `numbers`, while it runs."""
        mine = all(number.recorder is self for number in numbers if isinstance(number, TracedNumber))
        return mine and not self._closed and (self._inlining or called_by_user(_SIZES))

    def _note_reading(self, number: TracedNumber) -> None:
        line = self._line()
        op = Op("operator.assume_eq", (number.ref, number.plain), {}, None)
        step = RecordedOp(op, line, pack([op.name, encode(op.args)]), number.plain)
        self.readings.setdefault(number.ref.index, (len(self.steps), step))

    def _number(self, name: str, args: tuple[Any, ...], value: Any) -> Any:
        ref = self._new_ref()
        packed = pack([name, encode(args), encode(ref)])
        self.steps.append(RecordedOp(Op(name, args, {}, ref), self._line(), packed, value))
        return traced(value, ref, self)

    # The end of a run

    def finish(self, outputs: Any) -> Run:
        """Closes the recorder, and returns the run with its outputs."""
        self._write_back_buffers()
        named = map_leaves(outputs, self._leaf)
        self._closed = True
        self._alive.clear()
        self._refs.clear()
        try:
            return Run(self, named, encode(named))
        except PlanFormatError as error:
            raise TraceError(f"the function returns something that a plan cannot: {error}") from None

    def _write_back_buffers(self) -> None:
        """``self.n = self.n + 1`` binds a new tensor to a buffer: copy it into the old one instead."""
        for name, old, new in self.registry.rebound():
            if not isinstance(new, torch.Tensor) or TensorSpec.of(new) != TensorSpec.of(old):
                raise TraceError(f"the module gives its state {name!r} another shape or dtype: a plan cannot")
            source = self._tensor_ref(new)
            self._write("Tensor.copy_", (self._tensor_ref(old), self._detached(source)), {}, None)

    def _detached(self, source: Ref) -> Ref:
        ref = self._new_ref()
        op = Op("Tensor.detach", (source,), {}, ref)
        self.steps.append(RecordedOp(op, None, pack([op.name, encode(op.args), encode(ref)])))
        return ref


_TRUSTING = frozenset(["torch.lstm", "torch.gru", "torch.rnn_tanh", "torch.rnn_relu"])
"""Kernels that take states of any batch, and read past their ends: a function that is recorded with another batch may
hold its own of one size."""
_SIZES = traced_sizes.__file__
_OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}


def _untraced(leaf: Any) -> Any:
    return leaf.plain if isinstance(leaf, TracedNumber) else leaf
