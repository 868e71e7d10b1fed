"""`Chain`: several plans, and which takes the results of which, as data. What a protocol is made of.

A chain's values are numbered as a graph's are: first its inputs, then what each step returns, in the order of
the steps. A step names a place, which stands for a worker, and takes earlier values by `Ref`; so a chain
cannot go round in circles. Its bytes are MessagePack of

    ["planrt-chain", 1, inputs, plans, steps, outputs]

where a plan is [its record's bytes, whether it is in training mode], and a step is [name, place, plan,
arguments].
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from planrt.errors import PlanError, PlanFormatError
from planrt.plans.ir.graph import Graph, refs_in
from planrt.plans.ir.record import PlanRecord
from planrt.serde.values import decode, encode, pack, unpack_sections
from planrt.types import Nested, Ref

CHAIN_VERSION: Final = 1
MAX_STEPS: Final = 10_000
MAX_INPUTS: Final = 10_000
_MAGIC: Final = "planrt-chain"
_MAX_NAME: Final = 200


@dataclass(frozen=True, slots=True)
class ChainPlan:
    """A plan of a chain, and the mode in which its steps run it."""

    record: PlanRecord
    training: bool

    @property
    def graph(self) -> Graph:
        """The graph that runs.

        Raises:
            PlanError: it could not be recorded in this mode.
        """
        return self.record.graph(training=self.training)


@dataclass(frozen=True, slots=True)
class ChainStep:
    """One plan at one place. `arguments` has a `Ref` for each input tensor of the plan."""

    name: str
    place: str
    plan: int
    arguments: tuple[Ref, ...]


@dataclass(frozen=True)
class Chain:
    """A checked list of steps over a list of plans; `outputs` nests `Ref`s to what steps return.

    Raises:
        PlanFormatError: references to values that do not exist yet, names that are none or not different,
            wrong numbers of arguments, too many steps.
    """

    inputs: tuple[str, ...]
    plans: tuple[ChainPlan, ...]
    steps: tuple[ChainStep, ...]
    outputs: Nested

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def results(self) -> tuple[range, ...]:
        """For each step the numbers of the values that it returns: one per `Ref` in its plan's outputs, in
        order."""
        found, known = [], len(self.inputs)
        for step in self.steps:
            count = sum(1 for _ in refs_in(self.plans[step.plan].graph.outputs))
            found.append(range(known, known + count))
            known += count
        return tuple(found)

    @cached_property
    def places(self) -> tuple[str, ...]:
        """The places of its steps, in the order in which they are named."""
        return tuple(dict.fromkeys(step.place for step in self.steps))

    def maker(self, value: int) -> int | None:
        """Returns the number of the step that returns `value`; None for an input."""
        return next((index for index, made in enumerate(self.results) if value in made), None)

    def short_name(self, value: int) -> str:
        """Returns the name of an input, or of the step that returns `value`."""
        maker = self.maker(value)
        return self.inputs[value] if maker is None else self.steps[maker].name

    def name_of(self, value: int) -> str:
        """Returns what errors call a value: ``input 'x'``, ``the result of step 'a'``."""
        maker = self.maker(value)
        return (
            f"input {self.inputs[value]!r}"
            if maker is None
            else f"the result of step {self.steps[maker].name!r}"
        )

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the bytes, as 64 hex digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Returns the chain as bytes: equal chains have equal bytes."""
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        return pack(
            [
                _MAGIC,
                CHAIN_VERSION,
                list(self.inputs),
                [[plan.record.to_bytes(), plan.training] for plan in self.plans],
                [[one.name, one.place, one.plan, [ref.index for ref in one.arguments]] for one in self.steps],
                encode(self.outputs),
            ]
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Chain:
        """Decodes what `to_bytes` made and checks every part of it; safe on bytes from anyone.

        Raises:
            PlanFormatError: truncated, altered, or of a newer version. OpNotAllowedError: an op off the
                table.
        """
        parts = unpack_sections(bytes(data), _MAGIC, CHAIN_VERSION, 6, what="protocol")
        inputs, plans, steps = (_items(part) for part in parts[2:5])
        if len(steps) > MAX_STEPS or len(plans) > len(steps):
            raise PlanFormatError(
                f"malformed protocol: {len(steps)} steps, of at most {MAX_STEPS}, and {len(plans)} plans"
            )
        made = cls(
            tuple(inputs),
            tuple(_decode_plan(*_fields(item, 2)) for item in plans),
            tuple(_decode_step(*_fields(item, 4)) for item in steps),
            decode(parts[5]),
        )
        if made.to_bytes() != data:
            raise PlanFormatError("these bytes are not the canonical form of a protocol")
        return made


def _check(chain: Chain) -> None:
    _check_names("inputs", chain.inputs)
    _check_names("steps", [step.name for step in chain.steps])
    if not chain.steps:
        raise PlanFormatError("a protocol without steps")
    if len(chain.steps) > MAX_STEPS or len(chain.inputs) > MAX_INPUTS:
        raise PlanFormatError(
            f"a protocol of {len(chain.steps)} steps and {len(chain.inputs)} inputs: the limits are {MAX_STEPS} and "
            f"{MAX_INPUTS}"
        )
    for plan in chain.plans:
        if not isinstance(plan.training, bool):
            raise PlanFormatError("malformed protocol: the mode of a plan is no bool")
        try:
            plan.graph  # noqa: B018 - raises if there is none
        except PlanError as error:
            raise PlanFormatError(str(error)) from error
    known = len(chain.inputs)
    for step in chain.steps:
        _check_name("place", step.place)
        if type(step.plan) is not int or not 0 <= step.plan < len(chain.plans):
            raise PlanFormatError(f"step {step.name!r} has no plan")
        graph = chain.plans[step.plan].graph
        if len(step.arguments) != len(graph.inputs):
            raise PlanFormatError(
                f"step {step.name!r} has {len(step.arguments)} arguments, its plan takes {len(graph.inputs)}"
            )
        if not all(type(ref.index) is int and 0 <= ref.index < known for ref in step.arguments):
            raise PlanFormatError(f"step {step.name!r} takes a value that no earlier step gives")
        known += sum(1 for _ in refs_in(graph.outputs))
    if not all(len(chain.inputs) <= ref.index < known for ref in refs_in(chain.outputs)):
        raise PlanFormatError("the outputs of a protocol are results of its steps")


def _check_names(what: str, names: Sequence[Any]) -> None:
    for name in names:
        _check_name(what, name)
    if len(set(names)) != len(names):
        raise PlanFormatError(f"two {what} have the same name")


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        raise PlanFormatError(f"{what}: names are texts of 1 to {_MAX_NAME} characters")


def _items(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise PlanFormatError("malformed protocol: a section is no array")
    return value


def _fields(value: Any, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        raise PlanFormatError(f"malformed protocol: expected an array of {count}")
    return value


def _decode_plan(record: Any, training: Any) -> ChainPlan:
    if not isinstance(record, bytes):
        raise PlanFormatError("malformed protocol: a plan is no bytes")
    return ChainPlan(PlanRecord.from_bytes(record), training)


def _decode_step(name: Any, place: Any, plan: Any, arguments: Any) -> ChainStep:
    if any(type(index) is not int for index in _items(arguments)):
        raise PlanFormatError("malformed protocol: an argument is no number")
    return ChainStep(name, place, plan, tuple(map(Ref, arguments)))
