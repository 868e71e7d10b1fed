"""Runs plans. `run` is a generator that yields where an op needs a peer; `execute` drives it to the end.

A plan is compiled once per device into a `Program`: values live in numbered slots, each step knows its
callable and the slots of its arguments, and a slot is emptied after its last use, so that memory follows what
the plan really needs. Constants sit in slots of their own, which makes the arguments of nearly every op one
`operator.itemgetter` call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import itemgetter
from typing import Any

import torch

from planrt.errors import ExecutionError, PlanArgumentError, PlanError
from planrt.plans.ir import ops as table
from planrt.plans.ir.graph import Graph, Op, refs_in
from planrt.plans.running import progress
from planrt.plans.running.modes import any_autocast, as_recorded, check_default_dtype, default_changed
from planrt.serde.values import DEVICE
from planrt.types import Nested, Ref, TensorSpec, leaves, map_leaves


@dataclass(frozen=True, slots=True)
class PeerRequest:
    """A request of an op to another worker; the driver sends the op's result back into the generator."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_GRAD_SWITCH = "torch.set_grad_enabled"

Execution = Generator[PeerRequest, Any, Nested]
"""A running plan: yields what it needs from peers, returns its outputs."""


def run(
    plan: Graph,
    inputs: Sequence[torch.Tensor],
    state: Sequence[torch.Tensor],
    *,
    device: torch.device | str | None = None,
    deadline: float = math.inf,
) -> Execution:
    """Run `plan` on `inputs` and `state`; tensors that are elsewhere are copied to `device`.

    `device` is by default that of the first tensor given. The grad mode is the caller's: a plan may turn it
    off for a while, never on, and it is restored. Ops that work in place change the tensors given here. No op
    begins after `deadline`, on `time.monotonic`'s clock (seconds); one that runs is not interrupted.

    A plan that differentiates gets the tensors detached and its own grad mode, and its results are detached:
    it cannot reach a graph or a `.grad` of the caller.

    Raises:
        PlanError: a plan that differentiates, under `torch.inference_mode`.
        PlanArgumentError: wrong number, shape or dtype of inputs or state; names which.
        ExecutionError: an op failed; carries its name, place and line, and torch's error as cause.
    """
    check_arguments(plan, inputs, state)
    given = [*inputs, *state]
    where = torch.device(device) if device is not None else given[0].device if given else torch.device("cpu")
    if any(tensor.device != where for tensor in given):
        inputs, state = ([tensor.to(where) for tensor in part] for part in (inputs, state))
    if plan.differentiates and torch.is_inference_mode_enabled():
        raise PlanError(f"plan {plan.name!r} computes gradients: run it outside torch.inference_mode()")
    if default_changed():
        check_default_dtype(plan)
    return program(plan, where).run(inputs, state, isolated=plan.differentiates, deadline=deadline)


def execute(
    plan: Graph,
    inputs: Sequence[torch.Tensor],
    state: Sequence[torch.Tensor] | None = None,
    *,
    device: torch.device | str | None = None,
    deadline: float = math.inf,
) -> Nested:
    """Run `plan` to the end in this process and return its outputs; see `run`.

    `state` defaults to the values the plan was traced with.
    """
    if state is None:
        state = local_state(plan)
    execution = run(plan, inputs, state, device=device, deadline=deadline)
    if not any_autocast():
        return drive(execution)
    with as_recorded(plan):
        return drive(execution)


def drive(execution: Execution) -> Nested:
    """Runs an execution that needs no peers, and returns its outputs.

    Raises:
        PlanError: it does need one.
    """
    try:
        request = next(execution)
    except StopIteration as done:
        return done.value
    execution.close()
    raise PlanError(f"{request.op} needs another worker: send the plan to workers instead of running it here")


def local_state(plan: Graph) -> tuple[torch.Tensor, ...]:
    """Returns the state values that `plan` was traced with.

    Raises:
        PlanError: the plan came as bytes and has state, which then must be given.
    """
    if plan.state_values is not None:
        return plan.state_values
    if plan.state:
        raise PlanError(
            f"plan {plan.name!r} came without its {len(plan.state)} state tensors: pass state=..."
        )
    return ()


def check_arguments(plan: Graph, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]) -> None:
    """Raise PlanArgumentError unless inputs and state fit the plan's specs."""
    check_inputs(plan, inputs)
    check_state(plan, state)


def check_state(plan: Graph, state: Sequence[torch.Tensor]) -> None:
    """Raise PlanArgumentError unless `state` fits the plan's specs."""
    if len(state) != len(plan.state):
        raise PlanArgumentError(f"plan {plan.name!r} has {len(plan.state)} state tensors, got {len(state)}")
    for entry, tensor in zip(plan.state, state, strict=True):
        if not entry.spec.accepts(tensor):
            raise PlanArgumentError(f"state {entry.name!r}: wanted {entry.spec}, got {TensorSpec.of(tensor)}")


def check_inputs(plan: Graph, inputs: Sequence[torch.Tensor]) -> None:
    """Raise PlanArgumentError unless `inputs` fit the plan's specs."""
    if len(inputs) != len(plan.inputs):
        names = ", ".join(plan.input_name(index) for index in range(len(plan.inputs)))
        raise PlanArgumentError(
            f"plan {plan.name!r} takes {len(plan.inputs)} inputs ({names}), got {len(inputs)}"
        )
    for index, (spec, tensor) in enumerate(zip(plan.inputs, inputs, strict=True)):
        if not isinstance(tensor, torch.Tensor):
            raise PlanArgumentError(
                f"{plan.input_name(index)} of plan {plan.name!r}: wanted a tensor {spec}, "
                f"got {type(tensor).__name__}"
            )
        if not spec.accepts(tensor):
            raise PlanArgumentError(
                f"{plan.input_name(index)} of plan {plan.name!r}: wanted {spec}, got {TensorSpec.of(tensor)}"
            )


def program(plan: Graph, device: torch.device) -> Program:
    """Returns the compiled form of `plan` for `device`, made at the first call and kept with the plan."""
    cache: dict[torch.device, Program] = plan.__dict__.setdefault("_programs", {})
    found = cache.get(device)
    if found is None:
        found = cache[device] = Program(plan, device)
    return found


@dataclass(frozen=True, slots=True)
class _Special:
    """What is not a call with constant keyword arguments and at most one result."""

    kwargs_refs: bool
    results: Nested
    kind: _Kind


class _Kind(Enum):
    """How a step runs: by a call, by a peer, or as the switch of the grad mode."""

    CALL = 0
    PEER = 1
    GRAD_MODE = 2


_Step = tuple[
    Callable[..., Any],  # what it calls
    Callable[[list[Any]], tuple[Any, ...]],  # its positional arguments, from the slots
    dict[str, Any],  # its keyword arguments
    int,  # the slot of its result
    tuple[int, ...],  # the slots that are free after it
    _Special | None,
]


class Program:
    """A plan compiled for one device. `functions` replaces callables of the table, by name.

    Methods call each other as follows:

        Program(plan, device)     once for a plan and a device; `program` keeps it
            _compile              for each op: its callable, where its arguments lie, where its result goes,
                                  and which slots are free after it
                _function         the callable behind the op's name; classes derived from this override it
                _arguments        how to pick the positional arguments out of the slots
        run                       for each call: a generator, which goes through the steps
            _filled               keyword arguments that hold values of the plan
            _store                several results
            _detached             with `isolated`: results without history

    The slots of a plan with 2 inputs, 1 state entry and 2 ops, where op 1 adds a constant:

        0 1       2       3 4              5         6
        inputs    state   results of ops   nowhere   constants

    A program that counts the calls of each op::

        class Counting(Program):
            def __init__(self, plan, device):
                self.counts = {}
                super().__init__(plan, device)

            def _function(self, index, op):
                function = super()._function(index, op)

                def counted(*args, **kwargs):
                    self.counts[op.name] = self.counts.get(op.name, 0) + 1
                    return function(*args, **kwargs)

                return counted

        counting = Counting(graph, torch.device("cpu"))
        outputs = drive(counting.run(inputs, state))
        counting.counts  # {'Tensor.mul': 1, 'Tensor.sum': 1}
    """

    def __init__(
        self, plan: Graph, device: torch.device, *, functions: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        self._plan = plan
        self._device = device
        self._functions = {**table.TABLE, **(functions or {})}
        self._size = len(plan.inputs) + len(plan.state)
        self._constants: list[Any] = []
        results = [len(list(refs_in(op.results))) for op in plan.ops]
        self._nowhere = self._size + sum(results)  # where results go that nobody asked for
        self._slots = self._nowhere + 1  # constants follow the plan's own values
        # What `create_graph` leaves in `.grad` refers to its own leaf: memory that nothing would free.
        self._has_cycles = any(_may_create_graph(op) for op in plan.ops)
        last_use = {} if self._has_cycles else last_uses(plan)
        self._steps = [self._compile(index, op, last_use.get(index, ())) for index, op in enumerate(plan.ops)]

    def run(
        self,
        inputs: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
        *,
        isolated: bool = False,
        deadline: float = math.inf,
    ) -> Execution:
        """Run on arguments that are known to fit; see `run` of the module.

        `isolated` keeps autograd inside: what comes in and goes out is detached. Without it, a plan that
        differentiates works on the caller's gradients, as if its ops were written there.
        """
        given = [*inputs, *state]
        if isolated:
            given = [tensor.detach() for tensor in given]
        slots = [*given, *([None] * (self._slots - self._size)), *self._constants]
        caller_mode = torch.is_grad_enabled()
        grad_mode = caller_mode or self._plan.differentiates
        index, limited, watched = 0, deadline != math.inf, progress.watcher is not None
        try:
            if not caller_mode and grad_mode:
                torch.set_grad_enabled(True)
            for index, (function, arguments, kwargs, slot, free, special) in enumerate(self._steps):
                if limited and time.monotonic() > deadline:
                    raise TimeoutError("the time that the plan may take is over")
                if watched:
                    progress.began(self._plan.ops[index].name)
                if special is not None:
                    if special.kwargs_refs:
                        kwargs = _filled(kwargs, slots)
                    if special.kind is _Kind.CALL:
                        result = function(*arguments(slots), **kwargs)
                    elif special.kind is _Kind.PEER:
                        result = yield PeerRequest(self._plan.ops[index].name, arguments(slots), kwargs)
                    else:  # True is the end of a no_grad block: back to the caller's mode, which may be off
                        result = function(arguments(slots)[0] and grad_mode)
                    _store(special.results, result, slots)
                elif kwargs:
                    slots[slot] = function(*arguments(slots), **kwargs)
                else:
                    slots[slot] = function(*arguments(slots))
                for last in free:
                    slots[last] = None
        except Exception as error:
            raise failure(self._plan, index, error) from error
        finally:
            if torch.is_grad_enabled() is not caller_mode:
                torch.set_grad_enabled(caller_mode)
            if isolated and self._has_cycles:
                _drop_gradients(slots)
        outputs = _filled(self._plan.outputs, slots)
        return map_leaves(outputs, _detached) if isolated else outputs

    def _function(self, index: int, op: Op) -> Callable[..., Any]:
        """What step `index` calls."""
        return self._functions[op.name]

    def _compile(self, index: int, op: Op, free: tuple[int, ...]) -> _Step:
        kwargs = {key: map_leaves(value, self._resolved) for key, value in op.kwargs.items()}
        if op.name in table.FACTORIES and kwargs.get("device") is None and self._device.type != "cpu":
            kwargs["device"] = self._device
        kwargs_refs = any(True for _ in refs_in(kwargs))
        kind = _kind(op.name)
        plain = kind is _Kind.CALL and not kwargs_refs and (op.results is None or isinstance(op.results, Ref))
        return (
            self._function(index, op),
            self._arguments([map_leaves(arg, self._resolved) for arg in op.args]),
            kwargs,
            op.results.index if isinstance(op.results, Ref) else self._nowhere,
            free,
            None if plain else _Special(kwargs_refs, op.results, kind),
        )

    def _resolved(self, leaf: Any) -> Any:
        return self._device if leaf is DEVICE else leaf

    def _arguments(self, args: list[Any]) -> Callable[[list[Any]], tuple[Any, ...]]:
        if any(not isinstance(arg, Ref) and any(True for _ in refs_in(arg)) for arg in args):
            return lambda slots: tuple([_filled(arg, slots) for arg in args])
        if not args:
            return lambda slots: ()
        where = [arg.index if isinstance(arg, Ref) else self._constant(arg) for arg in args]
        if len(where) == 1:
            only = where[0]
            return lambda slots: (slots[only],)
        return itemgetter(*where)

    def _constant(self, value: Any) -> int:
        self._constants.append(value)
        return self._slots + len(self._constants) - 1


def _kind(name: str) -> _Kind:
    if name in table.PEER_OPS:
        return _Kind.PEER
    return _Kind.GRAD_MODE if name == _GRAD_SWITCH else _Kind.CALL


def _may_create_graph(op: Op) -> bool:
    position = 3  # of `create_graph`, in Tensor.backward and in autograd.backward
    create_graph = op.args[position] if len(op.args) > position else op.kwargs.get("create_graph", False)
    return op.name in table.PLANS_ONLY and create_graph is not False


def _drop_gradients(slots: list[Any]) -> None:
    for value in leaves(slots):
        if isinstance(value, torch.Tensor) and (value.is_leaf or value.retains_grad):
            value.grad = None


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def last_uses(plan: Graph) -> dict[int, tuple[int, ...]]:
    """Op index -> the op results and inputs that nothing after it needs. State stays: its owner holds it."""
    first_state = len(plan.inputs)
    first_result = first_state + len(plan.state)
    last: dict[int, int] = {}
    for index, op in enumerate(plan.ops):
        for part in (*op.args, *op.kwargs.values(), op.results):
            if type(part) is Ref:  # nearly always, and much faster than looking inside
                last[part.index] = index
            elif isinstance(part, tuple | list | dict | slice):
                for ref in refs_in(part):
                    last[ref.index] = index
    for ref in refs_in(plan.outputs):
        last.pop(ref.index, None)
    freed: dict[int, list[int]] = {}
    for slot, index in last.items():
        if slot < first_state or slot >= first_result:
            freed.setdefault(index, []).append(slot)
    return {index: tuple(slots) for index, slots in freed.items()}


def _filled(value: Nested, slots: list[Any]) -> Nested:
    return map_leaves(value, lambda leaf: slots[leaf.index] if isinstance(leaf, Ref) else leaf)


def _store(results: Nested, value: Any, slots: list[Any]) -> None:
    """Put the parts of `value` into the slots that `results` names."""
    if results is None:
        return
    if isinstance(results, Ref):
        slots[results.index] = value
        return
    if not isinstance(value, tuple | list) or len(value) != len(results):
        count = len(value) if isinstance(value, tuple | list) else 1
        raise ValueError(f"it gave {count} results where the plan expects {len(results)}")
    for part, item in zip(results, value, strict=True):
        _store(part, item, slots)


def failure(plan: Graph, index: int, error: Exception) -> ExecutionError:
    """Returns the error that names the op of `plan` at which `error` came up."""
    op = plan.ops[index]
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    line = str(op)
    source = f" ({place})" if (place := plan.place(index)) else ""
    return ExecutionError(
        f"op {index} of plan {plan.name!r} failed: {line}{source}: {reason}",
        op=op.name,
        index=index,
        line=line,
    )
