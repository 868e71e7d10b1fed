"""The worker as a state machine: events in, instructions out; no sockets, no loop, no threads.

The host (`planrt.workers.host`) turns what happens into events and calls ``handle``, one event at a time::

    Received(connection, envelope, tensors)    a message arrived
    Disconnected(connection)                   a connection ended
    PeerSent(key, tensors)                     another worker sent something for a waiting request
    PeerFailed(key, reason)                    it never will

and carries out, in order, the instructions it returns::

    Reply(connection, envelope, tensors)       send this to the client
    ToPeer(worker, key, tensors)               send this to another worker
    Wait(key)                                  nothing to do until PeerSent with that key
    Close(connection)                          close the connection (after the replies before it)

A request is handled by a generator. It yields `ToPeer` and `Wait` where it needs another worker and returns
its answer; while it waits, the machine takes other events, so two requests that meet on two workers in
opposite order cannot lock each other out. Every request gets exactly one reply, a `Failure` if it raised.
"""

from __future__ import annotations

import hashlib
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from planrt.errors import ExecutionError, LocalError, OptionError, PlanError
from planrt.plans import interpreter, ops, training
from planrt.plans.plan import Plan
from planrt.seeding import derive_seed, seeded
from planrt.serde.dtypes import DTYPE_NAMES
from planrt.types import Ref, TensorSpec, leaves
from planrt.version import VERSION
from planrt.workers import messages as m
from planrt.workers.datasets import BatchSource, as_batches, iterate, sample_specs

# -------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Received:
    """A message arrived on a connection."""

    connection: int
    envelope: m.Envelope
    tensors: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A connection ended, for whatever reason."""

    connection: int


@dataclass(frozen=True, slots=True)
class PeerSent:
    """Another worker sent tensors under a key that both computed."""

    key: str
    tensors: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class PeerFailed:
    """The exchange with another worker under that key has failed."""

    key: str
    reason: str


Event: TypeAlias = Received | Disconnected | PeerSent | PeerFailed

# -------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class Reply:
    """Send `envelope` and `tensors` on `connection`."""

    connection: int
    envelope: m.Envelope
    tensors: Sequence[torch.Tensor] = ()


@dataclass(frozen=True, slots=True)
class ToPeer:
    """Send `tensors` to the worker `worker`, who waits for `key`."""

    worker: str
    key: str
    tensors: Sequence[torch.Tensor] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """The request goes on when a peer has sent something under `key`."""

    key: str


@dataclass(frozen=True, slots=True)
class Close:
    """Close `connection`."""

    connection: int


Instruction: TypeAlias = Reply | ToPeer | Wait | Close

Answer: TypeAlias = tuple[m.Body, Sequence[torch.Tensor]]
Steps: TypeAlias = Generator[ToPeer | Wait, list[torch.Tensor] | None, Answer]
"""A request being handled: yields what it needs of peers (a `Wait` gives it what they sent)."""

# ------------------------------------------------------------------------------------------- machine

MAX_PLANS = 256
"""Plans a worker keeps; the least recently used goes first, and its client sends it again when needed."""


class PeerError(LocalError):
    """The worker could not reach a peer that a request needs."""


class _UnknownPlanError(LocalError):
    """Reported to the client under the kind "UnknownPlanError"."""


class _UnknownDatasetError(LocalError):
    """Reported to the client under the kind "UnknownDatasetError"."""


@dataclass(slots=True)
class _Dataset:
    source: BatchSource
    info: m.DatasetInfo


@dataclass(slots=True)
class _Session:
    id: str
    optimizer_states: dict[tuple[str, str, str], Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Request:
    connection: int
    id: int
    steps: Steps


class WorkerState:
    """One worker: its data sets, the plans it was sent, its sessions and the requests that wait for peers.

    `id` names the worker; `device` is where its torch work runs.
    """

    def __init__(self, id: str, *, device: str | torch.device = "cpu") -> None:
        if not 1 <= len(id) <= 200:
            raise OptionError(f"a worker id has 1 to 200 characters, not {len(id)}")
        self.id = id
        self.device = torch.device(device)
        self._datasets: dict[str, _Dataset] = {}
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._sessions: dict[int, _Session] = {}
        self._waiting: dict[str, _Request] = {}
        self._mailbox: dict[str, list[torch.Tensor]] = {}

    # ------------------------------------------------------------------------------ the owner's side

    def add_dataset(
        self, dataset: Any, key: str, *, tags: Sequence[str] = (), description: str = ""
    ) -> m.DatasetInfo:
        """Serves a map-style data set of (data, target) pairs under `key`.

        Raises:
            DataError: no map-style data set, or its items are no pairs of tensors or numbers.
            OptionError: the key is taken.
        """
        if key in self._datasets:
            raise OptionError(f"worker {self.id!r} already has a data set under the key {key!r}")
        source = as_batches(dataset, key=key)
        data, target = (_spec_to_wire(spec) for spec in sample_specs(source, key=key))
        info = m.DatasetInfo(len(source), data, target, list(tags), description)
        self._datasets[key] = _Dataset(source, info)
        return info

    @property
    def datasets(self) -> Mapping[str, m.DatasetInfo]:
        """key -> what clients are told about the data set."""
        return {key: dataset.info for key, dataset in self._datasets.items()}

    # ------------------------------------------------------------------------------------ the machine

    def handle(self, event: Event) -> list[Instruction]:
        """Takes one event and says what to do; never raises for anything a client sent."""
        match event:
            case Received(connection, envelope, tensors):
                return self._received(connection, envelope, tensors)
            case PeerSent(key, tensors):
                if request := self._waiting.pop(key, None):
                    return self._advance(request, tensors)
                self._mailbox[key] = tensors
                return []
            case PeerFailed(key, reason):
                request = self._waiting.pop(key, None)
                return self._advance(request, PeerError(reason)) if request else []
            case Disconnected(connection):
                self._sessions.pop(connection, None)
                for key in [
                    key for key, request in self._waiting.items() if request.connection == connection
                ]:
                    self._waiting.pop(key).steps.close()
                return []

    def _received(
        self, connection: int, envelope: m.Envelope, tensors: list[torch.Tensor]
    ) -> list[Instruction]:
        session = self._sessions.get(connection)
        if isinstance(envelope.body, m.Hello):
            return self._open(connection, envelope, envelope.body)
        if session is None:
            failure = m.Failure("HandshakeError", "the first message of a connection must be Hello")
            return [Reply(connection, m.Envelope(envelope.id, failure)), Close(connection)]
        steps = self._steps(session, envelope.body, tensors)
        return self._advance(_Request(connection, envelope.id, steps), None)

    def _open(self, connection: int, envelope: m.Envelope, hello: m.Hello) -> list[Instruction]:
        mine = own_versions()
        if hello.versions.protocol != mine.protocol:
            failure = m.Failure(
                "HandshakeError",
                f"protocol version {hello.versions.protocol} (planrt {hello.versions.planrt}) does not fit this "
                f"worker's {mine.protocol} (planrt {mine.planrt}): install the same planrt on both sides",
            )
            return [Reply(connection, m.Envelope(envelope.id, failure)), Close(connection)]
        self._sessions[connection] = _Session(hello.session)
        welcome = m.Welcome(self.id, mine, dict(self.datasets))
        return [Reply(connection, m.Envelope(envelope.id, welcome))]

    def _advance(self, request: _Request, sent: list[torch.Tensor] | PeerError | None) -> list[Instruction]:
        """Runs a request until it waits for a peer or is answered; `sent` is what it waited for."""
        instructions: list[Instruction] = []
        try:
            while True:
                step = request.steps.throw(sent) if isinstance(sent, PeerError) else request.steps.send(sent)
                sent = None
                instructions.append(step)
                if isinstance(step, Wait):
                    sent = self._mailbox.pop(step.key, None)
                    if sent is None:
                        self._waiting[step.key] = request
                        return instructions
                    instructions.pop()
        except StopIteration as stop:
            body, tensors = stop.value
        except Exception as error:  # whatever a request raises is its client's answer, never the worker's end
            body, tensors = failure_of(error), ()
        instructions.append(Reply(request.connection, m.Envelope(request.id, body), tensors))
        return instructions

    # ----------------------------------------------------------------------------------- the requests

    def _steps(self, session: _Session, body: m.Body, tensors: list[torch.Tensor]) -> Steps:
        yield from ()  # no op needs a peer yet; those that will come yield ToPeer and Wait here
        match body:
            case m.RunPlan():
                return self._run_plan(body, tensors)
            case m.PutPlan():
                return self._put_plan(body, tensors)
            case m.Fit():
                return self._fit(session, body, tensors)
            case m.Evaluate():
                return self._evaluate(body, tensors)
            case _:
                raise LocalError(f"a worker does not take messages of type {type(body).__name__}")

    def _put_plan(self, body: m.PutPlan, tensors: list[torch.Tensor]) -> Answer:
        if len(tensors) != 1 or tensors[0].dtype != torch.uint8:
            raise PlanError("a plan travels as one uint8 tensor: its canonical bytes")
        plan = _decoded(tensors[0].numpy().tobytes())
        if plan.hash != body.plan:
            raise PlanError(f"the plan's bytes have the hash {plan.hash}, not {body.plan} as announced")
        self._plans[plan.hash] = plan
        self._plans.move_to_end(plan.hash)
        while len(self._plans) > MAX_PLANS:
            self._plans.popitem(last=False)
        return m.Done(), ()

    def _run_plan(self, body: m.RunPlan, tensors: list[torch.Tensor]) -> Answer:
        plan = self._plan(body.plan)
        inputs, state = tensors[: len(plan.inputs)], tensors[len(plan.inputs) :]
        with seeded(body.seed, self.device):
            outputs = interpreter.execute(plan, inputs, state, device=self.device)
        wanted = leaves(plan.outputs)
        values = [value for value, leaf in zip(leaves(outputs), wanted, strict=True) if isinstance(leaf, Ref)]
        numbers = [None if isinstance(value, torch.Tensor) else value for value in values]
        return m.Values(numbers), [value.detach() for value in values if isinstance(value, torch.Tensor)]

    def _fit(self, session: _Session, body: m.Fit, tensors: list[torch.Tensor]) -> Answer:
        plan = self._plan(body.plan)
        batches = iterate(
            self._dataset(body.dataset),
            batch_size=body.batch_size,
            max_nr_batches=body.max_nr_batches,
            epochs=body.epochs,
            shuffle=body.shuffle,
            seed=derive_seed(body.seed, "order"),  # not the stream that dropout draws from
        )
        kept = (body.plan, body.dataset, body.optimizer)
        result = training.train(
            plan,
            tensors,
            batches,
            optimizer=body.optimizer,
            optimizer_args=body.optimizer_args,
            optimizer_state=session.optimizer_states.get(kept) if body.keep_optimizer_state else None,
            device=self.device,
            seed=body.seed,
        )
        if body.keep_optimizer_state:
            session.optimizer_states[kept] = result.optimizer_state
        return m.Fitted(result.loss, result.samples, result.batches, list(result.changed)), result.state

    def _evaluate(self, body: m.Evaluate, tensors: list[torch.Tensor]) -> Answer:
        plan = self._plan(body.plan)
        batches = iterate(self._dataset(body.dataset), batch_size=body.batch_size, shuffle=False, seed=0)
        result = training.evaluate(plan, tensors, batches, bins=body.bins, device=self.device)
        return m.Evaluated(
            result.loss, result.samples, result.correct, result.histogram, result.target_histogram
        ), ()

    def _plan(self, hash: str) -> Plan:
        try:
            self._plans.move_to_end(hash)
            return self._plans[hash]
        except KeyError:
            raise _UnknownPlanError(f"no plan with the hash {hash}: send it first") from None

    def _dataset(self, key: str) -> BatchSource:
        try:
            return self._datasets[key].source
        except KeyError:
            keys = ", ".join(sorted(self._datasets)) or "none"
            raise _UnknownDatasetError(f"no data set under the key {key!r}; it has: {keys}") from None


_plans_by_hash: weakref.WeakValueDictionary[str, Plan] = weakref.WeakValueDictionary()
"""Plans that some worker of this process holds. Plans are immutable: a thousand virtual workers share one."""


def _decoded(data: bytes) -> Plan:
    key = hashlib.sha256(data).hexdigest()
    plan = _plans_by_hash.get(key)
    if plan is None:
        plan = _plans_by_hash[key] = Plan.from_bytes(data)
    return plan


def own_versions() -> m.Versions:
    """What this side runs."""
    return m.Versions(m.PROTOCOL_VERSION, VERSION, str(torch.__version__), ops.TABLE_HASH)


def failure_of(error: Exception) -> m.Failure:
    """`error` as the client is told of it."""
    kind = type(error).__name__.removeprefix("_")
    text = str(error) if isinstance(error, LocalError) else f"{kind}: {error}"
    op, line = (error.op, error.line) if isinstance(error, ExecutionError) else (None, None)
    trace = "".join(traceback.format_exception(error))
    return m.Failure(kind, text[:60_000], op, line, trace[-60_000:])


def _spec_to_wire(spec: TensorSpec) -> tuple[str, list[int]]:
    return DTYPE_NAMES[spec.dtype], list(spec.shape)
