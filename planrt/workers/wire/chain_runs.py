"""`ChainRun`: one run of a chain of plans, as messages to the workers of its places. No I/O.

Who runs a chain sends what ``start`` returns, in order, and hands over what was answered under each key::

    sends = run.start()
    while run.outstanding:
        ...carry out sends; wait for an answer under one of run.outstanding...
        sends = run.answered(key, body, tensors)      or  run.failed(key, kind)
    ...carry out the last sends...; run.outputs, or run.failure

A client and a worker both do that, on their own sessions at the places. A step is sent as soon as its arguments
are at its place, so what does not depend on each other runs at the same time. A result goes from its place
straight to those that need it. After a failure or ``cancel`` nothing new starts, what is under way is awaited, and
then all that the run made is dropped.

Where a plan changes objects in place, the steps at its place that share one of them (an argument, or the state of
a plan) reach it in the order of the description. To another place a value goes as it is when it is there, before
any step takes it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from planrt.errors import LocalError, PlanFormatError
from planrt.plans.ir import ops
from planrt.plans.ir.chain import Chain
from planrt.plans.ir.graph import Graph, refs_in
from planrt.seeding import derive_seed
from planrt.serde.values import decode
from planrt.types import Ref
from planrt.workers.wire import messages as m
from planrt.workers.wire import plan_call
from planrt.workers.wire.objects import new_id
from planrt.workers.wire.posted import PostedOp

StepState = Literal["waiting", "running", "done", "failed"]
Transfer = Literal["send", "copy", "move"]
AtPlace: TypeAlias = tuple[int, str]
"""(number of a value or of a plan, place)."""


@dataclass(frozen=True, slots=True)
class Send:
    """A message to the worker of `place`; with a `key` its answer is wanted."""

    place: str
    body: m.Body
    tensors: Sequence[torch.Tensor] = ()
    key: str = ""


@dataclass(frozen=True, slots=True)
class Given:
    """One input of a run: a tensor to be sent, or objects that are at places already."""

    tensor: torch.Tensor | None = None
    allowed: list[str] | None = None
    """Users who may read the tensor; None for everyone."""
    placed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a run that failed: an error at the step `name`, on `worker`; `during` says what it waited for, if it
    did.
    """

    name: str
    worker: str
    error: Exception
    during: str = ""

    def where(self, *, worker: bool) -> str:
        """Returns the step in words, with its worker or without."""
        at = f" on worker {self.worker!r}" if worker else ""
        return f"step {self.name!r}{at}" + (f", which takes {self.during}" if self.during else "")


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that a run gave."""

    place: str
    id: int
    spec: m.ObjectSpec


@dataclass(frozen=True, slots=True)
class _Call:
    step: int
    plan: int
    """The plan's id there."""
    again: bool


@dataclass(frozen=True, slots=True)
class _Moving:
    value: int
    source: str
    target: str
    id: int
    """At the source."""
    new: int
    """At the target."""
    keep: bool
    """Whether it stays at the source."""
    token: str = ""
    """Empty when the value comes through here."""


StoringMessage: TypeAlias = Callable[[int, int], tuple[m.StorePlan, Sequence[torch.Tensor]]]
"""(number of a plan, id) -> the message that stores it under that id."""


Reaches: TypeAlias = Callable[[str, str], bool]
"""(address of a worker, of another) -> whether the first can dial the second."""


def always(source: str, target: str) -> bool:
    """Returns True: every worker reaches every other."""
    return True


class ChainRun:
    """See the module's docstring.

    Args:
        places: place -> its worker.
        given: one for each input of the chain.
        plans: ids of the plans that are at their places. The others are stored there first, by `store`, and put
            into `plans`; so are those that turn out to be gone.
        grad, seed: the grad mode, and what random ops draw from.
        on_step: called with a step's name, its place and its state, when that changes.
        reaches: whether a worker at the first address can dial one at the second; where it cannot, values go through
            here.
        on_transfer: called with "send", "copy" or "move", the place it comes from ("" for here) and the place it goes
            to.
    """

    def __init__(
        self,
        chain: Chain,
        places: Mapping[str, m.PeerAddress],
        given: Sequence[Given],
        plans: dict[AtPlace, int],
        *,
        grad: bool,
        seed: int,
        store: StoringMessage | None = None,
        reaches: Reaches = always,
        on_step: Callable[[str, str, StepState], None] = lambda step, place, state: None,
        on_transfer: Callable[[Transfer, str, str], None] = lambda kind, source, target: None,
    ) -> None:
        self._chain = chain
        self._places = places
        self._given = given
        self._plans = plans
        self._grad = grad
        self._seed = seed
        self._store = store
        self._reaches = reaches
        self._on_step = on_step
        self._on_transfer = on_transfer
        self._pending: dict[str, _Call | _Moving] = {}
        self._at: dict[AtPlace, int] = {}
        self._owned: dict[tuple[str, int], None] = {}
        """(place, id) of what the run made and nobody else knows of."""
        self._results: dict[int, Output | Any] = {}
        """What those values were that are outputs, or no tensors."""
        self._ending = False
        self.failure: Failed | None = None
        self._wanted = {ref.index for ref in refs_in(chain.outputs)}
        self._takers: dict[int, dict[str, list[int]]] = {}
        self._missing: list[set[Any]] = [set() for _ in chain.steps]
        self._following: dict[int, list[int]] = {}
        self._begun: set[int] = set()
        self._uses: dict[AtPlace, int] = {}
        self._plan_needs()

    def _plan_needs(self) -> None:
        """Finds what each step waits for: its arguments at its place, and earlier steps that must reach an object
        first.

        Of two steps at one place that share an object, and of which one writes to it, the earlier must be sent first:
        one connection keeps its order, so the worker then runs them in that order. For each object:

        1. a step waits for the last step before it that writes (read after write, write after write);
        2. a step that writes waits for every step that has read since then (write after read), and is the last writer
           from here on;
        3. steps that only read wait for no other reader.

        A plan that writes to one of its operands, or to its state, counts as writing to all that it shares.

        By 1 and 2 each step waits for the nearest ones before it that it must follow, and these wait for theirs. The
        numbers of the steps that a step waits for are smaller than its own, so they never wait in a circle.

        Example: steps 0, 1, 2, 3 at one place all take value 0, and 1 writes to it. Then 1 waits for 0; 2 and 3 wait
        for 1, and not for each other.
        """
        writer: dict[Any, int] = {}
        readers: dict[Any, list[int]] = {}
        """Since the last writer."""
        for number, step in enumerate(self._chain.steps):
            plan = self._chain.plans[step.plan]
            shared: list[Any] = [(ref.index, step.place) for ref in dict.fromkeys(step.arguments)]
            for value, _ in shared:
                self._takers.setdefault(value, {}).setdefault(step.place, []).append(number)
                self._missing[number].add((value, step.place))
                self._uses[value, step.place] = self._uses.get((value, step.place), 0) + 1
            if plan.record.state:
                shared.append(("plan", step.plan, step.place))
            writes = _writes(plan.graph)
            before: set[int] = set()
            for one in shared:
                before |= {writer[one]} if one in writer else set()
                if writes:
                    before |= set(readers.pop(one, ()))
                    writer[one] = number
                else:
                    readers.setdefault(one, []).append(number)
            for other in before:
                self._missing[number].add(other)
                self._following.setdefault(other, []).append(number)

    # ------------------------------------------------------------------------------------ for drivers

    @property
    def outstanding(self) -> tuple[str, ...]:
        """Keys of what was sent and is not answered yet."""
        return tuple(self._pending)

    @property
    def outputs(self) -> list[Output | Any]:
        """For each `Ref` of the chain's outputs, in order, the tensor; or the value, if it is none."""
        return [self._results[ref.index] for ref in refs_in(self._chain.outputs)]

    @property
    def cancelled(self) -> bool:
        """True if the run ended without a failure, and without its results."""
        return self._ending and self.failure is None

    def start(self) -> list[Send]:
        """Returns the first messages; to be called once, before anything else.

        Then send them in order, wait for an answer under one of the keys in `outstanding`, and call `answered` or
        `failed` with it.
        """
        sends: list[Send] = []
        for step in self._chain.steps:
            self._on_step(step.name, step.place, "waiting")
        for value, given in enumerate(self._given):
            places = self._takers.get(value, {})
            if given.tensor is not None:
                for place in places:
                    self._put(value, place, given.tensor, given.allowed, sends)
                    self._on_transfer("send", "", place)
                continue
            home = next((place for place in places if place in given.placed), "")
            for place in places:
                if place not in given.placed:
                    self._transfer(value, home, given.placed[home], place, sends, keep=True)
            for place in places:
                if place in given.placed:
                    self._arrived(value, place, given.placed[place], sends)
        for number, missing in enumerate(self._missing):
            if not missing and number not in self._begun:  # it takes nothing
                self._begin(number, sends)
        return sends

    def answered(self, key: str, body: m.Body, tensors: Sequence[torch.Tensor] = ()) -> list[Send]:
        """Takes the answer `body` under `key`; returns the messages to send now.

        Go on while `outstanding` has keys. After that read `failure`, and where there is none `outputs`.
        """
        pending = self._pending.pop(key)
        sends: list[Send] = []
        try:
            if isinstance(pending, _Call):
                self._called(pending.step, body, sends)
            else:
                self._moved(pending, body, tensors, sends)
        except LocalError as error:
            self._fail(pending, error)
        return [*sends, *self._ended()]

    def failed(self, key: str, error: Exception, kind: str = "") -> list[Send]:
        """Takes a failure, of that kind on the worker that told it, as the answer under `key`; returns the messages
        to send now.
        """
        pending = self._pending.pop(key)
        sends: list[Send] = []
        gone = kind == "UnknownObjectError" and self._store is not None
        if isinstance(pending, _Call) and gone and not pending.again and not self._ending:
            step = self._chain.steps[pending.step]
            where = (step.plan, step.place)
            if self._plans.get(where) == pending.plan:  # else another step has stored it again
                del self._plans[where]
            self._call(pending.step, sends, again=True)
            return sends
        self._fail(pending, error)
        return self._ended()

    def cancel(self) -> list[Send]:
        """Starts nothing more; returns the messages to send now. What was made is dropped once nothing is outstanding,
        so go on with `answered` and `failed` until then.
        """
        self._ending = True
        return self._ended()

    # ----------------------------------------------------------------------------------------- values

    def _put(
        self, value: int, place: str, tensor: torch.Tensor, allowed: list[str] | None, sends: list[Send]
    ) -> None:
        id = new_id()
        self._owned[place, id] = None
        sends.append(
            Send(place, m.Put([m.PutItem(id, tensor.requires_grad, allowed=allowed)]), [tensor.detach()])
        )
        self._arrived(value, place, id, sends)

    def _arrived(self, value: int, place: str, id: int, sends: list[Send]) -> None:
        self._at[value, place] = id
        for number in self._takers.get(value, {}).get(place, ()):
            self._satisfied(number, (value, place), sends)

    def _satisfied(self, number: int, need: Any, sends: list[Send]) -> None:
        self._missing[number].discard(need)
        if not self._missing[number] and not self._ending:
            self._begin(number, sends)

    def _made(self, value: int, place: str, id: int, sends: list[Send]) -> None:
        """A step gave a tensor: it goes to where it is needed, and stays where somebody needs it here."""
        self._owned[place, id] = None
        takers = self._takers.get(value, {})
        keep = value in self._wanted or place in takers
        targets = [one for one in takers if one != place]
        for target in targets:
            self._transfer(value, place, id, target, sends, keep=keep or target != targets[-1])
        if not keep and not targets:
            self._drop(place, id, sends)
        self._arrived(value, place, id, sends)

    def _transfer(
        self, value: int, source: str, id: int, target: str, sends: list[Send], *, keep: bool
    ) -> None:
        """Hands a value over from worker to worker; with `keep` a copy of it."""
        self._on_transfer("copy" if keep else "move", source, target)
        key, new = secrets.token_hex(8), new_id()
        there = self._places[target]
        if not self._reaches(self._places[source].address, there.address):  # through here, then
            self._pending[key] = _Moving(value, source, target, id, new, keep)
            sends.append(Send(source, m.Fetch(id, not keep), (), key))
            return
        token = secrets.token_hex(16)
        self._pending[key] = _Moving(value, source, target, id, new, keep, token)
        sends.append(Send(source, m.Move(id, there, new, token, keep), (), key))

    def _moved(
        self, moving: _Moving, body: m.Body, tensors: Sequence[torch.Tensor], sends: list[Send]
    ) -> None:
        if moving.token:
            if not isinstance(body, m.Done):
                raise _unexpected(self._worker(moving.source), body)
            if not moving.keep:
                self._owned.pop((moving.source, moving.id), None)
            self._owned[moving.target, moving.new] = None
            sends.append(Send(moving.target, m.Claim([moving.new], moving.token)))
            self._arrived(moving.value, moving.target, moving.new, sends)
            return
        if not isinstance(body, m.Fetched) or not tensors:
            raise _unexpected(self._worker(moving.source), body)
        if not moving.keep:
            self._owned.pop((moving.source, moving.id), None)
        tensor = tensors[0].requires_grad_(body.requires_grad)
        if not self._ending:
            self._put(moving.value, moving.target, tensor, body.allowed, sends)

    def _drop(self, place: str, id: int, sends: list[Send]) -> None:
        if self._owned.pop((place, id), 0) is None:
            sends.append(Send(place, m.Post([], [id])))

    # ------------------------------------------------------------------------------------------ steps

    def _begin(self, number: int, sends: list[Send]) -> None:
        self._begun.add(number)
        self._call(number, sends)
        step = self._chain.steps[number]
        self._on_step(step.name, step.place, "running")
        for follower in self._following.get(number, ()):
            self._satisfied(follower, number, sends)

    def _call(self, number: int, sends: list[Send], *, again: bool = False) -> None:
        step = self._chain.steps[number]
        plan = self._chain.plans[step.plan]
        if (step.plan, step.place) not in self._plans:
            assert self._store is not None  # noqa: S101 - who gives no `store` has stored all plans
            id = self._plans[step.plan, step.place] = new_id()
            sends.append(Send(step.place, *self._store(step.plan, id)))
        operands = [Ref(self._at[ref.index, step.place]) for ref in step.arguments]
        op = PostedOp(
            plan_call.CALL,
            (Ref(self._plans[step.plan, step.place]), plan.training, *operands),
            {},
            None,
            self._grad,
            derive_seed(self._seed, "step", number) if plan.graph.is_random else None,
        )
        key = secrets.token_hex(8)
        self._pending[key] = _Call(number, self._plans[step.plan, step.place], again)
        sends.append(Send(step.place, m.Call(op.pack()), (), key))

    def _called(self, number: int, body: m.Body, sends: list[Send]) -> None:
        step = self._chain.steps[number]
        values = self._chain.results[number]
        if not isinstance(body, m.Made):
            raise _unexpected(self._worker(step.place), body)
        made = decode(body.results)
        refs = [part.index for part in made if isinstance(part, Ref)] if isinstance(made, tuple) else None
        if refs is None or len(made) != len(values) or refs != list(range(len(body.objects))):
            raise _unexpected(self._worker(step.place), body)
        for id, _ in body.objects:
            self._owned[step.place, id] = None
        self._on_step(step.name, step.place, "done")
        if self._ending:
            return
        for value, part in zip(values, made, strict=True):
            if isinstance(part, Ref):
                id, spec = body.objects[part.index]
                self._results[value] = Output(step.place, id, spec)
                self._made(value, step.place, id, sends)
            elif value in self._takers:
                taker = self._chain.steps[next(iter(self._takers[value].values()))[0]].name
                raise LocalError(
                    f"step {taker!r} takes a number of it ({part!r}): plans take tensors from each other"
                )
            else:
                self._results[value] = part
        for ref in dict.fromkeys(step.arguments):
            where = (ref.index, step.place)
            self._uses[where] -= 1
            if not self._uses[where] and ref.index not in self._wanted:
                self._drop(step.place, self._at[where], sends)

    # -------------------------------------------------------------------------------------------- ends

    def _worker(self, place: str) -> str:
        return self._places[place].worker

    def _fail(self, pending: _Call | _Moving, error: Exception) -> None:
        during = ""
        if isinstance(pending, _Call):
            number = pending.step
        else:
            number = self._takers[pending.value][pending.target][0]
            during = f"{self._chain.name_of(pending.value)} from worker {self._worker(pending.source)!r}"
        step = self._chain.steps[number]
        self._ending = True
        self._on_step(step.name, step.place, "failed")
        if self.failure is None:
            self.failure = Failed(step.name, self._worker(step.place), error, during)

    def _ended(self) -> list[Send]:
        """When nothing is outstanding any more: what the run made and does not give is dropped."""
        if self._pending:
            return []
        kept = (
            set()
            if self._ending
            else {(one.place, one.id) for one in self.outputs if isinstance(one, Output)}
        )
        drops: dict[str, list[int]] = {}
        for place, id in self._owned:
            if (place, id) not in kept:
                drops.setdefault(place, []).append(id)
        self._owned.clear()
        return [Send(place, m.Post([], ids)) for place, ids in drops.items()]


def _writes(graph: Graph) -> bool:
    """Whether a plan may change its inputs or its state in place."""
    known: dict[str, bool] = graph.__dict__  # goes with the plan, as a cache of plans would not
    if "_writes" not in known:
        known["_writes"] = any(
            isinstance(operand, Ref)
            for op in graph.ops
            for operand in ops.written_operands(op.name, op.args, op.kwargs)
        )
    return known["_writes"]


def _unexpected(worker: str, body: object) -> PlanFormatError:
    return PlanFormatError(f"worker {worker!r} answered with an unexpected {type(body).__name__}")
