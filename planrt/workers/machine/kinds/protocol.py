"""Protocols as objects of a worker: a chain with the state of its plans, run from here on other workers. No I/O.

A run is a request like any other. Its generator carries out what a `ChainRun` says: it yields `ToPeer` for each
message and waits for whatever of them is answered first. Towards the workers of its places this worker is a client;
what the run makes there belongs to its session there until it is handed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from planrt.errors import LocalError
from planrt.plans.ir.chain import Chain
from planrt.plans.ir.graph import refs_in
from planrt.plans.policy.quotas import PLAN_BYTES
from planrt.plans.running import interpreter
from planrt.serde.values import encode
from planrt.types import Ref, map_leaves
from planrt.workers.machine.events import Answer, Steps
from planrt.workers.machine.kinds.base import Freed, ObjectKind, StoredObject
from planrt.workers.machine.kinds.plan import PlanObject, new_plan_object
from planrt.workers.machine.labels import Label, MemoryLabels
from planrt.workers.machine.rounds.sent_plans import check_size
from planrt.workers.machine.sessions import Session
from planrt.workers.wire import messages as m
from planrt.workers.wire.chain_runs import AtPlace, ChainRun, Given, Output, Reaches, StepState


class RunCancelledError(LocalError):
    """Ends a run whose client has given it up."""


class PeerError(LocalError):
    """The worker could not reach a peer that a request needs; `key` is what was asked of it."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


@dataclass(slots=True, eq=False, weakref_slot=True)
class ProtocolObject:
    """A protocol that a worker holds for a client."""

    chain: Chain
    plans: list[PlanObject]
    places: dict[str, m.PeerAddress] = field(default_factory=dict)
    """Place -> worker, as it is reached in the client's name; empty before it is deployed."""
    deployed: dict[AtPlace, int] = field(default_factory=dict)
    """Ids of the plans that were stored at their places."""
    gone: bool = False
    """Whether nobody can use it any more."""

    @property
    def state(self) -> list[torch.Tensor]:
        """The tensors of its plans."""
        return [tensor for plan in self.plans for tensor in plan.state]

    def chain_bytes(self) -> torch.Tensor:
        """Returns its chain, as it travels."""
        return torch.frombuffer(bytearray(self.chain.to_bytes()), dtype=torch.uint8)

    def snapshot(self) -> ProtocolObject:
        """Returns the same protocol, sharing memory until somebody writes."""
        return ProtocolObject(self.chain, [plan.snapshot() for plan in self.plans], dict(self.places))

    def deploy(self, places: Mapping[str, m.PeerAddress]) -> Iterator[tuple[m.PeerAddress, list[int]]]:
        """Puts workers at its places; returns what the workers before can free.

        Raises:
            LocalError: not the places of the chain.
        """
        if set(places) != set(self.chain.places):
            raise LocalError(
                f"the protocol has the places {', '.join(self.chain.places)}, not {', '.join(places) or 'none'}"
            )
        kept: dict[AtPlace, int] = {}
        freed: dict[m.PeerAddress, list[int]] = {}
        for where, id in self.deployed.items():
            before = self.places[where[1]]
            if before == places[where[1]]:
                kept[where] = id
            else:
                freed.setdefault(before, []).append(id)
        self.places, self.deployed = dict(places), kept
        yield from freed.items()

    def freed(self) -> Iterator[tuple[m.PeerAddress, list[int]]]:
        """Marks that nobody can use it any more; returns what other workers can free."""
        self.gone = True
        for (_, place), id in self.deployed.items():
            yield self.places[place], [id]
        self.deployed.clear()


class ProtocolKind(ObjectKind[ProtocolObject]):
    """Protocols, with the state of their plans. What one has stored at its places goes with it."""

    python_type = ProtocolObject
    name: ClassVar[Literal["protocol"]] = "protocol"

    def tensors(self, value: ProtocolObject) -> Sequence[torch.Tensor]:
        """Returns the tensors of the state of its plans."""
        return value.state

    def bytes_beside(self, value: ProtocolObject) -> int:
        """Returns what the ops of its plans take."""
        return len(value.chain.to_bytes()) * PLAN_BYTES

    def can_be_found(self, value: ProtocolObject) -> bool:
        """Returns True."""
        return True

    def snapshot(self, value: ProtocolObject) -> ProtocolObject:
        """Returns a protocol whose state shares the memory until somebody writes."""
        return value.snapshot()

    def freed(self, value: ProtocolObject) -> Freed:
        """Returns the plans that it has stored at its places."""
        return value.freed()

    def read(self, value: ProtocolObject, id: int) -> Answer:
        """Returns its chain."""
        return m.FetchedProtocol(), [value.chain_bytes()]

    def fetch(
        self, session: Session, id: int, stored: StoredObject, label: Label, memory: MemoryLabels
    ) -> Steps:
        """Returns its chain and the state of its plans."""
        yield from ()  # asks nobody
        protocol: ProtocolObject = stored.value
        return m.FetchedProtocol(), [protocol.chain_bytes(), *(one.detach() for one in protocol.state)]


def new_protocol_object(tensors: Sequence[torch.Tensor], device: torch.device) -> ProtocolObject:
    """Returns a protocol from the bytes of its chain and the state of its plans, which it owns from here on.

    Raises:
        PlanFormatError, OpNotAllowedError: as `Chain.from_bytes`. PlanArgumentError: tensors that are not its state.
        LocalError: no such tensors.
    """
    if not tensors or tensors[0].dtype != torch.uint8:
        raise LocalError("a protocol travels as its chain, a uint8 tensor, and the state of its plans")
    check_size(tensors[0])
    chain = Chain.from_bytes(tensors[0].numpy().tobytes())
    rest = list(tensors[1:])
    wanted = sum(len(plan.record.state) for plan in chain.plans)
    if len(rest) != wanted:
        raise LocalError(f"the plans of the protocol have {wanted} state tensors, got {len(rest)}")
    plans = []
    for plan in chain.plans:
        state, rest = rest[: len(plan.record.state)], rest[len(plan.record.state) :]
        interpreter.check_state(plan.graph, state)
        plans.append(new_plan_object(plan.record, state, training=plan.training, device=device))
    return ProtocolObject(chain, plans)


def new_run(
    protocol: ProtocolObject,
    given: Sequence[Given],
    allowed: list[str] | None,
    body: m.RunProtocol,
    states: dict[str, StepState],
    reaches: Reaches,
) -> ChainRun:
    """Returns a run of `protocol` that `body` asks for; `allowed` are the users who may read the state of its plans.

    `states` gets the state of each step, by its name.

    Raises:
        LocalError: it is not deployed, or given what does not fit.
    """
    chain = protocol.chain
    if not protocol.places:
        raise LocalError("the protocol is not deployed: deploy(...) it to workers first")
    wanted = sum(1 for _ in refs_in(chain.outputs))
    if len(given) != len(chain.inputs) or len(body.results) != wanted:
        raise LocalError(
            f"the protocol has {len(chain.inputs)} inputs and {wanted} results, got {len(given)} and "
            f"{len(body.results)}"
        )

    def store(number: int, id: int) -> tuple[m.StorePlan, Sequence[torch.Tensor]]:
        plan = protocol.plans[number]
        state = [tensor.detach().clone() for tensor in plan.state]
        return m.StorePlan(id, plan.training, allowed=allowed), [plan.record_bytes(), *state]

    def on_step(step: str, place: str, state: StepState) -> None:
        states[step] = state

    return ChainRun(
        chain,
        {place: m.PeerAddress(one.worker, one.address) for place, one in protocol.places.items()},
        given,
        protocol.deployed,
        grad=body.grad,
        seed=body.seed,
        store=store,
        reaches=reaches,
        on_step=on_step,
    )


def made_by(run: ChainRun, chain: Chain, ids: Sequence[int]) -> tuple[m.Made, list[tuple[int, Output]]]:
    """Returns the answer to a `RunProtocol`, and the outputs of the run under `ids`."""
    outputs = run.outputs
    kept: dict[tuple[str, int], int] = {}
    """(place, id there) -> number among the answer's objects."""
    objects: list[tuple[int, Output]] = []
    rest = iter(zip(outputs, ids, strict=True))

    def named(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        output, id = next(rest)
        if not isinstance(output, Output):
            return output
        there = (output.place, output.id)
        if there not in kept:
            kept[there] = len(objects)
            objects.append((id, output))
        return Ref(kept[there])

    results = map_leaves(chain.outputs, named)
    return m.Made(encode(results), [(id, output.spec) for id, output in objects]), objects
