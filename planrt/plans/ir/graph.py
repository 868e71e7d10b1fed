"""`Graph`: a PyTorch program as data. A list of named ops, the specs of what goes in, and what comes out.

Every value of a plan has a number: first the inputs, then the state (parameters, buffers and constants), then
the results of the ops in order. An op refers to earlier values by `Ref`. The canonical bytes hold exactly
what decides the result: specs, ops and outputs. Names, source lines and state values stay local. The SHA-256
of those bytes is the plan's identity wherever plans are cached, sent or approved.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal, get_args

import torch

from planrt.errors import OpNotAllowedError, PlanFormatError
from planrt.plans.ir import ops as table
from planrt.plans.ir.text import code_lines, graph_text, op_line, show_name
from planrt.serde.dtypes import DTYPE_NAMES, DTYPES
from planrt.serde.values import decode, encode, pack, unpack_sections
from planrt.types import FREE, Nested, Ref, TensorSpec, leaves

FORMAT_VERSION: Final = 1
MAX_OPS: Final = 100_000
MAX_TENSORS: Final = 100_000
"""Most inputs, and most state entries."""
MAX_BYTES: Final = 64 * 2**20
"""Longest canonical form, in bytes, that `Graph.from_bytes` reads."""
_MAGIC = "planrt-plan"
_MAX_DIMS = 64  # torch's own limit

StateKind = Literal["parameter", "buffer", "constant"]


@dataclass(frozen=True, slots=True)
class Op:
    """One step: the name of an op in the table, its arguments, and the numbers of its results.

    `results` is a `Ref`, None (nothing is kept), or a tuple of those for ops that return several values.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: Nested

    def __str__(self) -> str:
        return op_line(self)


@dataclass(frozen=True, slots=True)
class StateSpec:
    """A tensor that belongs to the plan: a parameter, a buffer, or a constant it captured."""

    name: str
    spec: TensorSpec
    kind: StateKind
    requires_grad: bool

    @property
    def trainable(self) -> bool:
        """Tells whether an optimizer may change it."""
        return self.kind == "parameter" and self.requires_grad

    @property
    def can_change(self) -> bool:
        """Tells whether a training round may change it: trainable parameters and buffers can."""
        return self.trainable or self.kind == "buffer"


@dataclass(frozen=True, eq=False)
class Graph:
    """A checked list of ops with its signature. Immutable; equal where the canonical bytes are equal.

    `inputs`, `state`, `ops` and `outputs` are the plan itself; the keyword-only rest is local. `state_values`
    are the tensors that `state` had when the plan was traced (None for a plan read from bytes).

    Raises:
        PlanFormatError: references to values that do not exist yet, malformed specs, too many ops.
        OpNotAllowedError: an op that is not on the table.
    """

    inputs: tuple[TensorSpec, ...]
    state: tuple[StateSpec, ...]
    ops: tuple[Op, ...]
    outputs: Nested
    name: str = field(default="plan", kw_only=True)
    input_names: tuple[str, ...] = field(default=(), kw_only=True)
    state_values: tuple[torch.Tensor, ...] | None = field(default=None, kw_only=True)
    lines: tuple[str | None, ...] = field(default=(), kw_only=True)
    modules: tuple[str | None, ...] = field(default=(), kw_only=True)
    doc: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        _check(self)

    # The canonical form

    def to_bytes(self) -> bytes:
        """Returns the canonical bytes: equal plans have equal bytes on every machine."""
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        return pack(
            [
                _MAGIC,
                FORMAT_VERSION,
                [_encode_spec(spec) for spec in self.inputs],
                [[*_encode_spec(entry.spec), entry.kind, entry.requires_grad] for entry in self.state],
                [[op.name, encode(op.args), encode(op.kwargs), encode(op.results)] for op in self.ops],
                encode(self.outputs),
            ]
        )

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical bytes, as 64 hex digits."""
        return hashlib.sha256(self._bytes).hexdigest()

    @cached_property
    def is_random(self) -> bool:
        """Tells whether it draws random numbers."""
        return any(op.name in table.RANDOM for op in self.ops)

    @cached_property
    def differentiates(self) -> bool:
        """Tells whether it computes gradients itself. Such a plan begins without gradients at every run,
        changes nothing outside but by in-place ops, and returns results without history."""
        return any(op.name in table.GRADIENTS or op.name == table.REQUIRES_GRAD for op in self.ops)

    @classmethod
    def from_bytes(cls, data: bytes) -> Graph:
        """Decodes canonical bytes into the plan, every part of it checked; safe on bytes from anyone.

        Raises:
            PlanFormatError: bytes that are truncated, altered, of another version, or not canonical.
            OpNotAllowedError: an op that is not on the table.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise PlanFormatError(f"a plan is read from bytes, not from {type(data).__name__}")
        if len(data) > MAX_BYTES:
            raise PlanFormatError(f"a plan of {len(data)} bytes is longer than the limit of {MAX_BYTES}")
        parts = unpack_sections(bytes(data), _MAGIC, FORMAT_VERSION, 6, what="plan")
        plan = cls(
            inputs=tuple(
                _decode_spec(*_fields(item, 2, "input")) for item in _items(parts[2], "inputs", MAX_TENSORS)
            ),
            state=tuple(
                _decode_state(index, *_fields(item, 4, "state entry"))
                for index, item in enumerate(_items(parts[3], "state entries", MAX_TENSORS))
            ),
            ops=tuple(_decode_op(*_fields(item, 4, "op")) for item in _items(parts[4], "ops", MAX_OPS)),
            outputs=decode(parts[5]),
        )
        if plan._bytes != data:  # a second spelling of the same plan would have a second hash
            raise PlanFormatError("these bytes are not the canonical form of a plan")
        return plan

    def with_state_values(self, values: tuple[torch.Tensor, ...] | None) -> Graph:
        """Returns the same plan, with other tensors (or none) as the values of its state."""
        other = copy.copy(self)
        other.__dict__["state_values"] = values
        other.__dict__.pop("_programs", None)  # compiled forms know the plan that they are of
        return other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self._bytes == other._bytes

    def __hash__(self) -> int:
        return hash(self._bytes)

    def __deepcopy__(self, memo: Any) -> Graph:
        return self

    # For people

    def place(self, index: int) -> str:
        """Returns where op `index` came from: ``module layer2.0.bn1 (BatchNorm2d), traced at net.py:12``;
        empty if unknown."""
        module = self.modules[index] if index < len(self.modules) else None
        line = self.lines[index] if index < len(self.lines) else None
        return ", ".join([f"module {module}"] * bool(module) + [f"traced at {line}"] * bool(line))

    def input_name(self, index: int) -> str:
        """Returns the name of an input, or ``argument N`` where the plan came without names."""
        return self.input_names[index] if index < len(self.input_names) else f"argument {index}"

    @property
    def code(self) -> str:
        """The ops, one per line, in the form ``_2 = _1.add(1)``, and what is returned."""
        return "\n".join(code_lines(self))

    def __str__(self) -> str:
        return graph_text(self)

    def __repr__(self) -> str:
        return (
            f"<Graph {show_name(self.name)} {self.hash[:12]}: {len(self.inputs)} inputs, {len(self.ops)} ops>"
        )


# References inside nested values


def refs_in(value: Nested) -> Iterator[Ref]:
    """Yields every `Ref` in a nested value, left to right."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, Ref))


# Checks, shared by plans from the tracer and plans from bytes


def _check(plan: Graph) -> None:
    _check_count(len(plan.ops), "ops", MAX_OPS)
    _check_count(len(plan.inputs), "inputs", MAX_TENSORS)
    _check_count(len(plan.state), "state entries", MAX_TENSORS)
    for spec in plan.inputs:
        check_spec(spec)
    for entry in plan.state:
        if not isinstance(entry, StateSpec):
            raise PlanFormatError(f"a state entry is a StateSpec, not {type(entry).__name__}")
        check_spec(entry.spec)
        if FREE in entry.spec.shape:
            raise PlanFormatError("malformed plan: state with a free dimension")
    for index, op in enumerate(plan.ops):
        if not isinstance(op, Op) or not isinstance(op.name, str):
            raise PlanFormatError(f"op {index} of the plan is not an Op with a name")
        if op.name not in table.TABLE:
            raise OpNotAllowedError(f"op {index} of the plan, {op.name[:80]!r}, is not on the table of ops")
        if not isinstance(op.args, tuple) or not isinstance(op.kwargs, dict):
            raise PlanFormatError(f"malformed op {op.name!r}: arguments are not a tuple and a dict")
    _ = plan._bytes  # refuses what has no byte form, and what is nested for ever
    known = len(plan.inputs) + len(plan.state)
    for index, op in enumerate(plan.ops):
        _check_refs(op.args, known, f"op {index} ({op.name})")
        _check_refs(op.kwargs, known, f"op {index} ({op.name})")
        for ref in _result_refs(op.results, index):
            if type(ref.index) is not int or ref.index != known:
                raise PlanFormatError(
                    f"op {index} ({op.name}) gives its result the number {ref.index}, not {known}"
                )
            known += 1
    _check_refs(plan.outputs, known, "the plan's output")


def _check_count(count: int, what: str, most: int) -> None:
    if count > most:
        raise PlanFormatError(f"a plan with {count} {what} is over the limit of {most}")


def _check_refs(value: Nested, known: int, where: str) -> None:
    for ref in refs_in(value):
        if type(ref.index) is not int or not 0 <= ref.index < known:
            raise PlanFormatError(f"{where} refers to {ref}, which no earlier step makes")


def _result_refs(results: Nested, index: int) -> Iterable[Ref]:
    if results is None:
        return ()
    if isinstance(results, Ref):
        return (results,)
    if isinstance(results, tuple):
        return [ref for item in results for ref in _result_refs(item, index)]
    raise PlanFormatError(f"op {index} has a malformed result: {type(results).__name__}")


def check_spec(spec: TensorSpec) -> None:
    """Raise PlanFormatError unless a plan can hold such a tensor."""
    if not isinstance(spec, TensorSpec) or not isinstance(spec.shape, tuple):
        raise PlanFormatError("inputs and state are described by a TensorSpec, whose shape is a tuple")
    if spec.dtype not in DTYPE_NAMES:
        raise PlanFormatError(f"tensors of {spec.dtype} cannot go into a plan")
    if len(spec.shape) > _MAX_DIMS:
        raise PlanFormatError(f"a tensor of {len(spec.shape)} dimensions; torch knows at most {_MAX_DIMS}")
    if any(type(size) is not int or size < FREE for size in spec.shape):
        raise PlanFormatError("malformed shape: sizes are integers from 0, or -1 for a free one")
    if math.prod(size for size in spec.shape if size > 0) >= 2**48:
        raise PlanFormatError("a tensor with more than 2**48 elements")


# From unpacked parts


def _items(value: Any, what: str, most: int) -> list[Any]:
    if not isinstance(value, list):
        raise PlanFormatError(f"malformed plan: its {what} are not an array")
    _check_count(len(value), what, most)
    return value


def _fields(value: Any, count: int, what: str) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        raise PlanFormatError(f"malformed {what}: expected an array of {count}")
    return value


def _encode_spec(spec: TensorSpec) -> list[Any]:
    return [DTYPE_NAMES[spec.dtype], list(spec.shape)]


def _decode_spec(dtype: Any, shape: Any) -> TensorSpec:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise PlanFormatError(f"unknown dtype {str(dtype)[:40]!r}")
    return TensorSpec(tuple(_items(shape, "dimensions", _MAX_DIMS)), DTYPES[dtype])


def _decode_state(index: int, dtype: Any, shape: Any, kind: Any, requires_grad: Any) -> StateSpec:
    if kind not in get_args(StateKind) or not isinstance(requires_grad, bool):
        raise PlanFormatError(f"malformed state entry {index}")
    return StateSpec(f"state {index}", _decode_spec(dtype, shape), kind, requires_grad)


def _decode_op(name: Any, args: Any, kwargs: Any, results: Any) -> Op:
    if not isinstance(name, str):
        raise PlanFormatError("malformed op: its name is not a string")
    args, kwargs = decode(args), decode(kwargs)
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise PlanFormatError(f"malformed op {name[:80]!r}: arguments are not a tuple and a dict")
    return Op(name, args, kwargs, decode(results))
