"""What a round asks its workers, and what it makes of their answers: `Exchange`, and the plain one.

`planrt.fl.rounds` knows who takes part and how long it waits. An exchange knows the messages: one that keeps the
server from seeing single updates is another class with these four methods.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from planrt.errors import OptionError
from planrt.fl.attendance import Missing
from planrt.fl.averaging import Aggregation, apart, check_aggregated
from planrt.fl.config import TrainConfig
from planrt.fl.recording_cache import dataset_of
from planrt.fl.updates import check_update, most_samples
from planrt.fl.waiting import LARGE, Deadline
from planrt.plans.model_plans import ModelPlans
from planrt.plans.model_state import ModelState
from planrt.seeding import derive_seed
from planrt.serde.frames import Allocate
from planrt.workers.base import BaseWorker
from planrt.workers.results import FitResult
from planrt.workers.wire import messages as m

T = TypeVar("T")


class Asks(Protocol):
    """A function that begins to ask a worker; see `RoundOrder`."""

    def __call__(self, id: str, asked: Coroutine[Any, Any, T], /) -> asyncio.Task[T]:
        """Returns the task of `asked`, with which the worker `id` is asked for something."""


@dataclass(frozen=True, slots=True)
class RoundOrder:
    """The things to be done in a round, the same for all of its workers.

    Attributes:
        number: the round's number.
        seed: the run's seed.
        dataset_key: the data set that each worker trains on.
        lr: another learning rate than the config's.
        config, plans: what is trained, and how.
        state: the state that is sent, as the model has it.
        before: the same tensors, by the names of the plan's state.
        weighted: whether workers count by their samples.
        wanted: those of `before` that training can change: what a worker returns.
        copies: whether what workers return is also kept for the caller, so that it must not be overwritten.
        deadline: until when the round waits for its workers.
        asks: begins to ask a worker, by its id and the coroutine that does; it is seen that the round waits for it. A
            round does so itself for `Exchange.ask`.
    """

    number: int
    seed: int
    dataset_key: str
    lr: float | None
    config: TrainConfig
    plans: ModelPlans
    state: ModelState
    before: Mapping[str, torch.Tensor]
    wanted: Mapping[str, torch.Tensor]
    weighted: bool
    copies: bool
    deadline: Deadline
    asks: Asks

    def seed_of(self, worker: BaseWorker) -> int:
        """Returns the seed of one worker's random choices in this round."""
        return derive_seed(self.seed, self.number, worker.id)

    @property
    def large(self) -> bool:
        """Tells whether states are so large that what is done with them leaves the loop thread."""
        return sum(value.nbytes for value in self.before.values()) > LARGE


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a round: new values of those entries that it `changed`, and the mean `loss` over all samples."""

    changed: Mapping[str, torch.Tensor]
    loss: float


class Exchange(Protocol):
    """The way in which a round talks to its workers. One object serves all rounds of a scheduler, one after the other.

    A round calls `begin`, then `ask` of all workers at once; then `add` for each answer that came in time, in the order
    of the workers' ids and never two at a time; then `end`, unless there were too few. An error of a worker's in `ask`
    or `add` (a `TransportError`, a `RemoteError` or an `UpdateRefusedError`) leaves that worker out.
    """

    async def begin(self, order: RoundOrder, workers: Sequence[BaseWorker]) -> Mapping[str, Missing]:
        """Starts a round with `workers`, which are all there; called before any of them is asked.

        Returns which of them drop out here (id -> why): they are not asked.
        """

    async def ask(self, worker: BaseWorker, order: RoundOrder, allocate: Allocate[m.Envelope]) -> FitResult:
        """Has `worker` train, and returns what it answers; `allocate` says where its tensors go."""

    async def add(self, worker: BaseWorker, order: RoundOrder, result: FitResult) -> None:
        """Looks at an answer, and adds it to what the round makes.

        Raises:
            UpdateRefusedError: it cannot count, and was not added.
        """

    async def end(self, order: RoundOrder, answered: Sequence[str]) -> Outcome:
        """Returns what the round has made; `answered` are the ids of the workers whose answers were added."""


class PlainExchange:
    """The exchange of rounds by default: each worker gets the state by a `Fit` message and returns its update, which is
    looked at and given to an aggregation."""

    def __init__(self, aggregation: Aggregation[Any], *, max_update_norm: float | None = None) -> None:
        self._aggregation = aggregation
        self._max_norm = max_update_norm
        self._aggregate: Any = None
        self._added: dict[str, torch.Tensor] = {}
        self._losses: list[tuple[float, int]] = []

    def state_dict(self) -> Mapping[str, Any]:
        """Returns what the aggregation keeps from round to round, if it has a `state_dict` that says so."""
        of = getattr(self._aggregation, "state_dict", None)
        return of() if callable(of) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Gives the aggregation what it kept; without anything kept it is not asked."""
        if state:
            self._aggregation.load_state_dict(state)  # type: ignore[attr-defined]

    async def begin(self, order: RoundOrder, workers: Sequence[BaseWorker]) -> Mapping[str, Missing]:
        """Starts with the aggregate of no states. Nobody drops out."""
        self._aggregate, self._added = self._aggregation.init(), {}
        self._losses = []
        return {}

    async def ask(self, worker: BaseWorker, order: RoundOrder, allocate: Allocate[m.Envelope]) -> FitResult:
        """Trains the state on the worker by one request and one reply."""
        return await order.config.fit(
            worker,
            order.state,
            dataset_key=order.dataset_key,
            seed=order.seed_of(worker),
            lr=order.lr,
            allocate=allocate,
            plans=order.plans,
        )

    async def add(self, worker: BaseWorker, order: RoundOrder, result: FitResult) -> None:
        """Looks at the update with `check_update`, and gives it to the aggregation unless it is of no samples.

        Raises:
            UpdateRefusedError: it cannot count. OptionError: the aggregation's `add` returned nothing.
        """
        if order.large:
            await asyncio.to_thread(self._add, worker, order, result)
        else:
            self._add(worker, order, result)

    def _add(self, worker: BaseWorker, order: RoundOrder, result: FitResult) -> None:
        config = order.config
        most = most_samples(
            dataset_of(worker, order.dataset_key).length,
            batch_size=config.batch_size,
            epochs=config.epochs,
            max_nr_batches=config.max_nr_batches,
            drop_last=config.drop_last,
        )
        check_update(result, before=order.before, wanted=order.wanted, most=most, max_norm=self._max_norm)
        if not result.samples:
            return
        entries = dict(result.entries)
        if order.copies:  # what is kept must not become the accumulator
            entries = {name: value.clone() for name, value in entries.items()}
        weight = float(result.samples) if order.weighted else 1.0
        after = self._aggregation.add(self._aggregate, entries, weight)
        if after is None:
            raise OptionError(
                f"add of {type(self._aggregation).__name__} returned None: return the aggregate, also where it was "
                "changed in place"
            )
        self._aggregate = after
        self._losses.append((result.loss, result.samples))
        self._added = self._added or {name: order.before[name] for name in entries}

    async def end(self, order: RoundOrder, answered: Sequence[str]) -> Outcome:
        """Returns what the aggregation makes; nothing where no worker trained on anything.

        Raises:
            OptionError: it makes another state than it was given.
        """
        aggregate, self._aggregate = self._aggregate, None
        samples = sum(count for _, count in self._losses)
        loss = sum(loss * count for loss, count in self._losses)
        mean = loss / samples if samples else float("nan")
        if not self._added:
            return Outcome({}, mean)
        return Outcome(apart(check_aggregated(self._aggregation.result(aggregate), self._added)), mean)
