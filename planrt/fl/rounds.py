"""Federated rounds: the plan once, then per round and worker one request, one reply.

The messages, with workers alice and bob:

    prepare()       StorePlan  -> alice, bob     the training plan, once; a worker that has it is not sent it again
                    Stored     <- each
    run_round(1)    Fit        -> alice, bob     both at once: hash of the plan, data set, optimizer, seed; the state
                    Fitted     <- bob            loss, samples; the entries that training changed
                    Fitted     <- alice
    run_round(2)    Fit        -> alice, bob     ...

Replies are added up in the order of the worker ids, not in that in which they come: so neither result nor
memory depends on who answers first. Here bob's reply is held until alice's is in. At most `hold` replies wait
in memory, and the others in temporary files.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from planrt.cards import card
from planrt.errors import OptionError, WorkerLostError
from planrt.fl.attendance import (
    WORKERS_OWN,
    Attendance,
    Missing,
    below_quorum,
    cancelled,
    looks,
    why_missing,
)
from planrt.fl.averaging import Aggregation, FederatedAveraging, check_aggregation
from planrt.fl.config import TrainConfig
from planrt.fl.exchange import Exchange, PlainExchange, RoundOrder
from planrt.fl.options import learning_rate, positive, seconds, whole
from planrt.fl.recording_cache import dataset_of
from planrt.fl.replies import Lease, Leases
from planrt.fl.waiting import LONGEST_TIMEOUT, ROUND_TIMEOUT, Answers, Deadline, LateError
from planrt.logs import get_logger
from planrt.loop import on_loop
from planrt.plans.model_state import ModelState
from planrt.plans.training import EvaluationResult
from planrt.shown import shown
from planrt.workers.base import BaseWorker
from planrt.workers.results import FitResult

log = get_logger("planrt.fl")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WorkerRound:
    """One worker's part in a round: messages and bytes each way, the mean loss over its samples."""

    requests: int
    replies: int
    bytes_sent: int
    bytes_received: int
    loss: float
    samples: int


@dataclass(frozen=True, slots=True)
class RoundResult:
    """A round: `seconds` of training and averaging, the averaged state, each worker's part.

    `loss` is the mean over all samples; `worker_states` is filled only if asked for. States are as
    ``model.load_state_dict`` takes them. `missing` are the workers that do not count in it, and why.
    """

    round: int
    seconds: float
    state: ModelState
    loss: float
    workers: dict[str, WorkerRound]
    worker_states: dict[str, ModelState] = field(default_factory=dict)
    missing: dict[str, Missing] = field(default_factory=dict)

    def __repr__(self) -> str:
        workers = shown(", ".join(f"{id}: {part.loss:.4f}" for id, part in self.workers.items()), 200)
        without = shown(", ".join(f"{id} ({why.kind})" for id, why in self.missing.items()), 200)
        return (
            f"<RoundResult of round {self.round}: loss {self.loss:.4f} ({workers}), {self.seconds:.2f} s"
            f"{f', without {without}' if without else ''}>"
        )

    def _repr_html_(self) -> str:
        rows = [
            (id, f"{part.loss:.4f}", f"{part.samples:,}", f"{part.bytes_sent:,}", f"{part.bytes_received:,}")
            for id, part in self.workers.items()
        ]
        return card(
            f"RoundResult of round {self.round}",
            [
                ("loss", f"{self.loss:.4f}"),
                ("seconds", f"{self.seconds:.2f}"),
                ("state", f"{len(self.state)} entries"),
                *((f"without {id}", str(why)) for id, why in self.missing.items()),
            ],
            columns=("worker", "loss", "samples", "bytes sent", "bytes received"),
            rows=rows,
        )


class RoundScheduler:
    """Runs rounds of `config` on `workers`, each on its data set `dataset_key`.

    For example::

        scheduler = RoundScheduler([alice, bob], config, dataset_key="digits", seed=1)
        await scheduler.prepare()
        state = config.state
        for number in range(1, 11):
            result = await scheduler.run_round(number, state)
            state = result.state
        model.load_state_dict(state)

    Both coroutines may be awaited on any loop. A round makes the mean of the workers' states (`federated_avg`
    has the formula), or what an `aggregation` of your own makes of them (`planrt.fl.Aggregation`).

    Every random choice of a worker derives from (`seed`, round, worker id): the same run has the same bits on
    virtual and on websocket workers with the same torch build and number of threads. `weighted` counts each
    worker by the samples it trained on.

    A round needs `min_workers` of them (all, by default), and waits for `round_timeout` seconds (an hour, by
    default; None for no end). Workers that are gone, frozen, slow, or return what cannot count are left out: the
    average is that of the others, and `RoundResult.missing` says why. With fewer than `min_workers` the round
    raises a `QuorumError` that names them, and makes nothing. Where all are needed by default, a worker's own error
    is raised as it is, as soon as it comes. A worker whose connection was lost is connected to again at the start of
    the next round; one that did not answer in time is asked again once its late answer has come, which is dropped.

    Updates are looked at before they count: names, shapes, dtypes, finite values, no more samples than the data set
    gives, and with `max_update_norm` the Euclidean norm of what training changed.

    Memory of a round stays under (2 + `hold`) times the state for states over 10 MB: the state, the first
    reply, which becomes the average, and `hold` times as much for replies that arrive out of order and
    whatever connections have in hand. Further replies wait in temporary files. An aggregation of your own
    needs what it keeps in addition.

    `exchange` is how workers are asked, in place of `planrt.fl.exchange.PlainExchange`, which `aggregation` and
    `max_update_norm` are for.

    Raises:
        OptionError: no workers, two with the same id, a negative `hold`, an `aggregation` without its
            methods, `min_workers` under 1 or above the number of workers, a `round_timeout` that is not above 0 or
            over 30 days.
    """

    def __init__(
        self,
        workers: Sequence[BaseWorker],
        config: TrainConfig,
        *,
        dataset_key: str,
        seed: int,
        hold: int = 2,
        weighted: bool = False,
        aggregation: Aggregation[Any] | None = None,
        min_workers: int | None = None,
        round_timeout: float | None = ROUND_TIMEOUT,
        max_update_norm: float | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        if isinstance(workers, BaseWorker):
            raise OptionError("workers is a list: write RoundScheduler([worker], config, ...)")
        for one in workers:
            if not isinstance(one, BaseWorker):
                raise OptionError(f"a round runs on workers, not on {type(one).__name__}: {str(one)[:80]!r}")
        self.workers = sorted(workers, key=lambda worker: worker.id)
        ids = [worker.id for worker in self.workers]
        if not ids:
            raise OptionError("a round needs at least one worker")
        if len(set(ids)) < len(ids):
            raise OptionError(f"worker ids must differ, these do not: {', '.join(ids)}")
        if not isinstance(config, TrainConfig):
            raise OptionError(f"RoundScheduler takes workers and a TrainConfig, not {type(config).__name__}")
        self.config = config
        self.dataset_key = dataset_key
        self.seed = whole("seed", seed, at_least=0)
        self.min_workers = None if min_workers is None else whole("min_workers", min_workers, at_least=1)
        if self.min_workers is not None and self.min_workers > len(ids):
            raise OptionError(
                f"min_workers={self.min_workers} is more than the workers that there are: {len(ids)}"
            )
        self.round_timeout = seconds("round_timeout", round_timeout, at_most=LONGEST_TIMEOUT)
        self._hold = whole("hold", hold, at_least=0)
        self._weighted = weighted
        if exchange is None:
            aggregation = FederatedAveraging() if aggregation is None else aggregation
            check_aggregation(aggregation)
            self._check_quorum(aggregation)
            norm = None if max_update_norm is None else positive("max_update_norm", max_update_norm)
            exchange = PlainExchange(aggregation, max_update_norm=norm)
        elif aggregation is not None or max_update_norm is not None:
            raise OptionError(
                "aggregation= and max_update_norm= are for rounds without an exchange= of their own"
            )
        self._exchange = exchange
        self._attendance = Attendance(self.workers, dataset_key)

    def _check_quorum(self, aggregation: object) -> None:
        fewest = getattr(aggregation, "fewest", 1)
        if fewest > self._needed:
            short = (
                f"and there are {len(self.workers)}"
                if fewest > len(self.workers)
                else f"and min_workers={self.min_workers} would let fewer count"
            )
            raise OptionError(f"{aggregation!r} needs at least {fewest} workers in a round, {short}")

    def __repr__(self) -> str:
        ids = shown(", ".join(worker.id for worker in self.workers), 200)
        return (
            f"<RoundScheduler of {self.config!r} on {ids}: data set {self.dataset_key!r}, seed {self.seed}>"
        )

    @on_loop
    async def prepare(self) -> None:
        """Traces the plan if it is not yet, and sends it to every worker, once.

        With `min_workers`, those that are not there or do not answer are left for the rounds to come.

        Raises:
            UnknownDatasetError, TraceError: see `TrainConfig`. OptionError: the workers' data differ in
                shape. QuorumError, WorkerLostError, RemoteError: as `run_round`.
        """
        infos = [dataset_of(worker, self.dataset_key) for worker in self.workers]
        specs = {str((info.data, info.target)) for info in infos}
        if len(specs) > 1:
            raise OptionError(
                f"the workers' data sets {self.dataset_key!r} have different shapes or dtypes: {'; '.join(specs)}"
            )
        plan = self.config.trace_for(self.workers[0], self.dataset_key).training
        self._attendance.like = looks(infos[0])
        deadline = Deadline(self.round_timeout)
        present, missing = await self._present("preparing", deadline)

        async def prepared(worker: BaseWorker, _: None) -> None:
            log.debug("prepared", worker=worker.id)

        await self._ask(
            "preparing",
            0,
            present,
            missing,
            deadline,
            lambda worker: worker.workplace.put_plan(plan, purpose=self.config.purpose),
            prepared,
        )

    @on_loop
    async def run_round(
        self,
        round_number: int,
        state: Mapping[str, torch.Tensor],
        *,
        lr: float | None = None,
        keep_worker_states: bool = False,
        in_place: bool = False,
    ) -> RoundResult:
        """Trains `state` on every worker, with learning rate `lr` if given, and averages what comes back.

        `state` stays as it is, unless `in_place`: then a round that succeeds ends by writing the average into
        its tensors, which saves the memory of a second model. `keep_worker_states` keeps each worker's result
        as well (a model each). A worker that has trained on nothing (its data set is empty, or `drop_last`
        left nothing) does not count.

        Raises:
            OptionError: the arguments are swapped, the state does not fit the model, or the aggregation makes
                another state than it was given.
            QuorumError: fewer workers than `min_workers` count; names those that are missing, and why.
            WorkerLostError, RemoteError, UpdateRefusedError: where all workers are needed by default, one went
                away, could not do it, or returned what cannot count; names it.
        """
        if isinstance(round_number, Mapping):
            raise OptionError("run_round takes the number of the round first: run_round(1, state)")
        if isinstance(state, torch.nn.Module):
            raise OptionError("run_round takes a state, not a model: pass model.state_dict()")
        round_number = whole("round_number", round_number, at_least=0)
        lr = None if lr is None else learning_rate(lr)
        started = time.perf_counter()
        deadline = Deadline(self.round_timeout)
        plans = self.config.plans
        names = plans.names
        before = names.by_entry(state)
        order = RoundOrder(
            number=round_number,
            seed=self.seed,
            dataset_key=self.dataset_key,
            lr=lr,
            config=self.config,
            plans=plans,
            state=names.named(before),  # once for all workers: tied weights may have to be compared
            before=before,
            wanted={entry.name: before[entry.name] for entry in plans.training.state if entry.can_change},
            weighted=self._weighted,
            copies=keep_worker_states,
            deadline=deadline,
        )
        parts: dict[str, WorkerRound] = {}
        kept: dict[str, ModelState] = {}
        what = f"round {round_number}"
        present, missing = await self._present(what, deadline)
        missing |= await self._exchange.begin(order, present)
        present = [worker for worker in present if worker.id not in missing]
        leases = Leases(max(0, self._hold - 1) if order.large else self._hold)
        places = {worker.id: leases.lease(first=index == 0) for index, worker in enumerate(present)}

        async def answered(worker: BaseWorker, answer: tuple[FitResult, WorkerRound]) -> None:
            result, part = answer
            await self._exchange.add(worker, order, result)
            parts[worker.id] = part
            if keep_worker_states:
                kept[worker.id] = names.named({**before, **result.entries})

        await self._ask(
            what,
            round_number,
            present,
            missing,
            deadline,
            lambda worker: self._fit(worker, order, places[worker.id]),
            answered,
            lambda worker, late: places[worker.id].too_late() if late else places[worker.id].release(),
        )
        samples = sum(part.samples for part in parts.values())
        loss = sum(part.loss * part.samples for part in parts.values() if part.samples)
        changed = await self._exchange.end(order, list(parts))
        after = names.assign(state, changed) if in_place else {**before, **changed}
        return RoundResult(
            round_number,
            time.perf_counter() - started,
            names.named(after),
            loss / samples if samples else float("nan"),
            parts,
            kept,
            missing,
        )

    # ------------------------------------------------------------------ who takes part, and who answers

    @property
    def _needed(self) -> int:
        return len(self.workers) if self.min_workers is None else self.min_workers

    async def _present(self, what: str, deadline: Deadline) -> tuple[list[BaseWorker], dict[str, Missing]]:
        """The workers that can be asked, and why the others cannot.

        Raises:
            QuorumError: too few can. WorkerLostError: one is gone, where all are needed by default.
        """
        present, missing = await self._attendance.roll_call(needed=self._needed, deadline=deadline)
        for worker in self.workers:
            if self.min_workers is None and worker.id in missing and missing[worker.id].kind == "lost":
                raise WorkerLostError(
                    f"worker {worker.id!r} is gone: {missing[worker.id].why}",
                    address=worker.address,
                    worker_id=worker.id,
                )
        if len(present) < self._needed:
            raise below_quorum(what, missing, [worker.id for worker in present], self._needed)
        return present, missing

    async def _ask(
        self,
        what: str,
        number: int,
        present: Sequence[BaseWorker],
        missing: dict[str, Missing],
        deadline: Deadline,
        ask: Callable[[BaseWorker], Coroutine[Any, Any, T]],
        answered: Callable[[BaseWorker, T], Coroutine[Any, Any, None]],
        over: Callable[[BaseWorker, bool], None] = lambda worker, late: None,
    ) -> None:
        """Asks all who are present at once, and hands their answers to `answered` in the order of their ids.

        `over` is called when the round is done with a worker, or without it (late). Adds who does not count to
        `missing`, and raises where too many do not.
        """
        counting: list[str] = []

        def failed(id: str, error: BaseException) -> None:
            if self.min_workers is None or not isinstance(error, WORKERS_OWN):
                raise error
            missing[id] = why_missing(error)
            if len(self.workers) - len(missing) < self._needed:
                left = {worker.id for worker in present} - missing.keys() - set(counting)
                missing.update(
                    {id: Missing("left", "too many were missing before its answer") for id in left}
                )
                raise below_quorum(what, missing, counting, self._needed)

        answers = Answers(
            {worker.id: asyncio.create_task(ask(worker)) for worker in present}, deadline, failed
        )
        try:
            for worker in present:
                late = False
                try:
                    await answered(worker, await answers.take(worker.id))
                    counting.append(worker.id)
                except LateError as error:
                    late = True
                    missing[worker.id] = Missing("late", f"no answer within {deadline.seconds:g} s")
                    self._attendance.owes(worker.id, number, error.task)
                except WORKERS_OWN as error:
                    failed(worker.id, error)
                over(worker, late)
                if worker.id in missing:
                    log.warning("worker_missing", worker=worker.id, round=number, why=str(missing[worker.id]))
        finally:
            await cancelled(answers.rest())
        if len(counting) < self._needed:
            raise below_quorum(what, missing, counting, self._needed)

    async def _fit(
        self, worker: BaseWorker, order: RoundOrder, place: Lease
    ) -> tuple[FitResult, WorkerRound]:
        before = worker.traffic.copy()
        result = await self._exchange.ask(worker, order, place.allocate)
        used = worker.traffic.since(before)
        part = WorkerRound(
            used.messages_sent,
            used.messages_received,
            used.bytes_sent,
            used.bytes_received,
            result.loss,
            result.samples,
        )
        return result, part


class ModelEvaluator:
    """Evaluates states of `config`'s model on one worker's data set.

    `bins` is the number of classes to count predictions in (0 for outputs that are no class scores).
    """

    def __init__(
        self, worker: BaseWorker, config: TrainConfig, *, dataset_key: str, batch_size: int, bins: int = 10
    ) -> None:
        self.worker = worker
        self.config = config
        self.dataset_key = dataset_key
        self.batch_size = whole("the test batch size", batch_size, at_least=1)
        self.bins = whole("bins", bins, at_least=0)

    def __repr__(self) -> str:
        return (
            f"<ModelEvaluator of {self.config!r} on {shown(self.worker.id)}: data set {self.dataset_key!r}>"
        )

    @on_loop
    async def prepare(self) -> None:
        """Traces the plan if it is not yet, and sends it to the worker, once."""
        plan = self.config.trace_for(self.worker, self.dataset_key).evaluation
        await self.worker.workplace.put_plan(plan, purpose=self.config.purpose)

    @on_loop
    async def evaluate(self, state: Mapping[str, torch.Tensor]) -> EvaluationResult:
        """Evaluates `state` by one request and one reply, and returns the figures."""
        return await self.config.evaluate(
            self.worker, state, dataset_key=self.dataset_key, batch_size=self.batch_size, bins=self.bins
        )
