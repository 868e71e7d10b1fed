"""`PlanRecord`: all of a plan but the values of its state, as it travels and as it is saved.

The canonical bytes of a graph hold what decides its results, and nothing for people. A record adds the names,
the signature and the docstring, and holds both forms of a plan whose modules behave differently while they
train (dropout, batch norm). Its bytes are MessagePack of

    ["planrt-record", 1, name, doc, signature, state names, evaluation graph, training graph]

where a graph is its canonical bytes, or nil where there is none, and the training graph is true where it is
the same as the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import torch

from planrt.errors import PlanError, PlanFormatError
from planrt.plans.ir.graph import Graph, StateSpec
from planrt.plans.ir.signature import Parameter, Signature
from planrt.serde.dtypes import DTYPE_NAMES
from planrt.serde.tensors import raw_bytes
from planrt.serde.values import pack, unpack_sections
from planrt.types import Ref

RECORD_VERSION: Final = 1
_MAGIC: Final = "planrt-record"
_MAX_TEXT: Final = 64_000
_FIELDS: Final = 8


@dataclass(frozen=True)
class PlanRecord:
    """A plan without the values of its state.

    Attributes:
        name, doc: what people call it and say about it.
        signature: how it is called.
        evaluation, training: its two forms; the same graph where the mode makes no difference. One of them
            may be None: then it could not be recorded in that mode.

    Raises:
        PlanFormatError: graphs that do not belong together, or do not fit the signature.
    """

    name: str
    doc: str
    signature: Signature
    evaluation: Graph | None
    training: Graph | None

    def __post_init__(self) -> None:
        graphs = self.graphs
        if not graphs:
            raise PlanFormatError("malformed plan: it has no ops in either mode")
        for graph in graphs:
            if graph.state != graphs[0].state or graph.inputs != graphs[0].inputs:
                raise PlanFormatError("malformed plan: its two modes differ in their inputs or state")
        if len(graphs[0].inputs) != self.signature.count:
            raise PlanFormatError(
                f"malformed plan: it has {len(graphs[0].inputs)} inputs, its signature {self.signature.count}"
            )

    @property
    def graphs(self) -> list[Graph]:
        """The different graphs: one or two."""
        both = [graph for graph in (self.evaluation, self.training) if graph is not None]
        return both[:1] if len(both) == 2 and both[0] == both[1] else both

    @property
    def state(self) -> tuple[StateSpec, ...]:
        """The specs of its state."""
        return self.graphs[0].state

    def graph(self, *, training: bool) -> Graph:
        """Returns the form for that mode.

        Raises:
            PlanError: the plan could not be recorded in that mode.
        """
        found = self.training if training else self.evaluation
        if found is None:
            mode, other = ("training", "evaluation") if training else ("evaluation", "training")
            raise PlanError(
                f"plan {self.name!r} could be recorded in {other} mode only, and this is {mode} mode: build it with "
                f"examples that its {mode} mode takes"
            )
        return found

    def __deepcopy__(self, memo: Any) -> PlanRecord:
        return self

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the bytes, as 64 hex digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Returns the record as bytes."""
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        same = self.training is not None and self.training == self.evaluation
        return pack(
            [
                _MAGIC,
                RECORD_VERSION,
                self.name,
                self.doc,
                self.signature.encoded(),
                [entry.name for entry in self.state],
                self.evaluation.to_bytes() if self.evaluation is not None else None,
                True if same else self.training.to_bytes() if self.training is not None else None,
            ]
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> PlanRecord:
        """Decodes what `to_bytes` made and checks every part of it; safe on bytes from anyone.

        Raises:
            PlanFormatError: truncated, altered, or of a newer version. OpNotAllowedError: an op off the
                table.
        """
        parts = unpack_sections(bytes(data), _MAGIC, RECORD_VERSION, _FIELDS, what="plan")
        name, doc, signature, state_names, evaluation, training = parts[2:]
        for text in (name, doc):
            if not isinstance(text, str) or len(text) > _MAX_TEXT:
                raise PlanFormatError("malformed plan: its name or its docstring is no text")
        decoded = Signature.decoded(signature)

        def named(data: Any, mode: str) -> Graph | None:
            if data is None:
                return None
            if not isinstance(data, bytes):
                raise PlanFormatError(f"malformed plan: its {mode} graph is no bytes")
            return _named(Graph.from_bytes(data), name, doc, decoded.input_names, state_names)

        first = named(evaluation, "evaluation")
        second = first if training is True else named(training, "training")
        made = cls(name, doc, decoded, first, second)
        if made.to_bytes() != data:
            raise PlanFormatError("these bytes are not the canonical form of a plan")
        return made


def with_names(graph: Graph) -> bytes:
    """Returns the bytes of a record of `graph` alone, so that its name and those of its inputs and state
    travel along; where these are no names of parameters, its canonical bytes."""
    names = graph.input_names
    if (
        len(names) != len(graph.inputs)
        or len(set(names)) < len(names)
        or not all(map(str.isidentifier, names))
    ):
        return graph.to_bytes()
    signature = Signature(
        tuple(Parameter(name, "positional", False) for name in names),
        {name: Ref(place) for place, name in enumerate(names)},
    )
    return PlanRecord(graph.name, graph.doc, signature, None, graph).to_bytes()


def alone(data: bytes) -> Graph:
    """Returns the graph that `with_names` made these bytes of; safe on bytes from anyone.

    Raises:
        PlanFormatError: other bytes, or a record of two graphs. OpNotAllowedError: an op off the table.
    """
    if not is_record(data):
        return Graph.from_bytes(data)
    graphs = PlanRecord.from_bytes(data).graphs
    if len(graphs) != 1:
        raise PlanFormatError("a record of one plan is wanted, this is one of two")
    return graphs[0]


def is_record(data: bytes) -> bool:
    """Returns whether these bytes begin as those of a record do."""
    return bytes(data[:32]).find(_MAGIC.encode()) in range(8)


def _named(graph: Graph, name: str, doc: str, input_names: tuple[str, ...], state_names: Any) -> Graph:
    names_fit = (
        isinstance(state_names, list)
        and len(state_names) == len(graph.state)
        and all(isinstance(one, str) and 0 < len(one) <= _MAX_TEXT for one in state_names)
        and len(set(state_names)) == len(state_names)
    )
    if not names_fit:
        raise PlanFormatError("malformed plan: the names of its state do not fit")
    state = tuple(replace(entry, name=one) for entry, one in zip(graph.state, state_names, strict=True))
    return replace(graph, state=state, name=name, doc=doc, input_names=input_names)


def state_hash(tensors: Sequence[torch.Tensor]) -> str:
    """SHA-256 over dtypes, shapes and values of the state of a plan, as 64 hex digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{DTYPE_NAMES[tensor.dtype]}{list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
