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
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from planrt.deadlines import LONGEST_ROUND
from planrt.errors import OptionError, PlanrtError, QuorumError, RunFolderError
from planrt.fl.asking import Asking
from planrt.fl.attendance import WORKERS_OWN, below_quorum, looks, why_missing
from planrt.fl.averaging import Aggregation, FederatedAveraging, check_aggregation
from planrt.fl.config import TrainConfig
from planrt.fl.evaluator import ModelEvaluator
from planrt.fl.exchange import Exchange, PlainExchange, RoundOrder
from planrt.fl.going_on.resuming import CHANGEABLE, SETTINGS, named
from planrt.fl.going_on.worker_optimizers import WorkerOptimizers
from planrt.fl.going_on.written_run import WrittenRun
from planrt.fl.options import learning_rate, positive, seconds, whole
from planrt.fl.recording_cache import dataset_of
from planrt.fl.round_result import RoundResult, WorkerRound
from planrt.fl.runs.run_metrics import RunMetrics
from planrt.fl.runs.run_record import RunRecord
from planrt.fl.secure import SecureAggregation, SecureExchange, secure_options
from planrt.fl.waiting import ROUND_TIMEOUT, Deadline, Lease, Leases
from planrt.logs import get_logger
from planrt.loop import on_loop
from planrt.plans.model_state import ModelState
from planrt.shown import shown
from planrt.workers.base import BaseWorker
from planrt.workers.results import FitResult
from planrt.workers.wire import messages as m

__all__ = ["ModelEvaluator", "RoundResult", "RoundScheduler", "WorkerRound"]

log = get_logger("planrt.fl")


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

    With `secure_aggregation` (True, or a `SecureAggregation`) nobody sees the update of a single worker, only the sum:
    so it is the worker that looks at its own, and no `aggregation` but the mean can be made. A worker that trained on
    nothing is missing there, since it would hide nobody. `RoundResult.workers` has no loss and no samples then.
    ``docs/secure_aggregation.md`` says whom it protects from whom.

    With `run_dir`, the run is written down there: a journal, and after every `checkpoint_every` rounds a checkpoint (0
    for none) of the state, of what the aggregation keeps (its `state_dict()`, if it has one), of what the workers'
    optimizers keep (`keep_optimizer_state`; in memory here as well, for all workers) and of the random generators.
    `RoundScheduler.resume` goes on from there, with the same bits::

        scheduler = RoundScheduler([alice, bob], config, dataset_key="digits", seed=1, run_dir="runs/a")
        await scheduler.prepare()
        state = scheduler.state
        for number in range(scheduler.next_round, 11):
            state = (await scheduler.run_round(number, state)).state
        await scheduler.close()

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
        RunFolderError: `run_dir` holds a run already, is in use, or cannot be written.
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
        secure_aggregation: bool | SecureAggregation = False,
        exchange: Exchange | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1,
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
        self.round_timeout = seconds("round_timeout", round_timeout, at_most=LONGEST_ROUND)
        self.hold = whole("hold", hold, at_least=0)
        self.max_update_norm: float | None = None
        self.weighted = weighted
        secure = secure_options(secure_aggregation)
        if secure is not None:
            _check_alone(aggregation=aggregation, max_update_norm=max_update_norm, exchange=exchange)
            exchange = SecureExchange(secure, workers=len(ids), min_workers=self.min_workers)
        elif exchange is None:
            aggregation = FederatedAveraging() if aggregation is None else aggregation
            check_aggregation(aggregation)
            self._check_quorum(aggregation)
            norm = None if max_update_norm is None else positive("max_update_norm", max_update_norm)
            exchange = PlainExchange(aggregation, max_update_norm=norm)
            self.max_update_norm = norm
        elif aggregation is not None or max_update_norm is not None:
            raise OptionError(
                "aggregation= and max_update_norm= are for rounds without an exchange= of their own"
            )
        self._exchange = exchange
        self._turns = asyncio.Lock()
        self._combining = named(exchange if aggregation is None else aggregation)
        self._asking = Asking(self.workers, self.min_workers, dataset_key)
        self.checkpoint_every = whole("checkpoint_every", checkpoint_every, at_least=0)
        self._written: WrittenRun | None = None
        self._optimizers = WorkerOptimizers(config, dataset_key)
        self.watched = RunMetrics(
            ids,
            self._asking.needed,
            waiting=lambda: dict(self._asking.waiting),
            next_round=lambda: self.next_round if self._written is not None else 0,
            checkpoints=lambda: (0, 0.0) if self._written is None else self._written.record.checkpoints,
        )
        """The rounds as monitoring sees them; see `planrt.MetricsServer`."""
        if run_dir is not None:
            _check_kept(config, exchange)
            self._write_to(RunRecord(run_dir, every=self.checkpoint_every))

    @classmethod
    def resume(
        cls,
        run_dir: str | os.PathLike[str],
        workers: Sequence[BaseWorker],
        config: TrainConfig,
        *,
        aggregation: Aggregation[Any] | None = None,
        secure_aggregation: bool | SecureAggregation = False,
        exchange: Exchange | None = None,
        **changed: Any,
    ) -> RoundScheduler:
        """Returns a scheduler that goes on with the run in a folder, from its newest checkpoint.

        After `prepare`, `state` and `next_round` are those of the checkpoint, and what follows has the bits that it
        would have had without the interruption. Data set, seed and all other options are those of the folder, unless
        `changed`: `min_workers`, `round_timeout`, `hold` and `checkpoint_every` may be. `workers`, `config` and an
        `aggregation` or `exchange` of your own must be as they were, and so must `secure_aggregation`.

        Raises:
            RunFolderError: there is no run, or no checkpoint that can be used; another process runs it; or, by
                `prepare`, it is of another model, data set or seed.
            OptionError: an option that a run that goes on cannot change.
        """
        record = RunRecord(run_dir, resuming=True)
        try:
            kept = dict(record.began.get("settings", {}))
            if odd := sorted(changed.keys() - CHANGEABLE):
                raise OptionError(
                    f"a run that goes on has its own {', '.join(odd)}: what may be changed is "
                    f"{', '.join(sorted(CHANGEABLE))}"
                )
            if exchange is not None or secure_aggregation:
                kept.pop("max_update_norm", None)
            identity = record.began["identity"]
            options = {name: value for name, value in {**kept, **changed}.items() if name in SETTINGS}
            made = cls(
                workers, config, dataset_key=identity["dataset"], seed=identity["seed"], aggregation=aggregation,
                secure_aggregation=secure_aggregation, exchange=exchange, **options,
            )  # fmt: skip
            _check_kept(config, made._exchange)
            record.every = made.checkpoint_every
            made._write_to(record)
        except BaseException:
            record.folder.close()
            raise
        return made

    def _write_to(self, record: RunRecord) -> None:
        self._written = WrittenRun(
            record, self.config, self._exchange, self._asking, self._optimizers, self.round_timeout
        )

    def _check_quorum(self, aggregation: object) -> None:
        fewest = getattr(aggregation, "fewest", 1)
        needed = len(self.workers) if self.min_workers is None else self.min_workers
        if fewest > needed:
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
                shape. QuorumError, WorkerLostError, RemoteError: as `run_round`. RunFolderError: the folder has another
                run, and is let go of.
        """
        infos = [dataset_of(worker, self.dataset_key) for worker in self.workers]
        specs = {str((info.data, info.target)) for info in infos}
        if len(specs) > 1:
            raise OptionError(
                f"the workers' data sets {self.dataset_key!r} have different shapes or dtypes: {'; '.join(specs)}"
            )
        plan = self.config.trace_for(self.workers[0], self.dataset_key).training
        begins = self._written is not None and self._written.state is None
        if self._written is not None and begins:
            data = {worker.id: info for worker, info in zip(self.workers, infos, strict=True)}
            try:
                await self._begin(self._written, plan.hash, data)
            except RunFolderError:
                self._written.record.folder.close()
                raise
        self._asking.attendance.like = looks(infos[0])
        deadline = Deadline(self.round_timeout)
        present, missing = await self._asking.present("preparing", deadline)

        async def prepared(worker: BaseWorker, _: None) -> None:
            log.debug("prepared", worker=worker.id)

        await self._asking.ask_all(
            "preparing",
            0,
            present,
            missing,
            deadline,
            lambda worker: worker.workplace.put_plan(plan, purpose=self.config.purpose),
            prepared,
        )
        if self._written is not None and begins:
            await self._written.began([worker for worker in present if worker.id not in missing])

    @on_loop
    async def run_round(
        self,
        round_number: int,
        state: Mapping[str, torch.Tensor],
        *,
        lr: float | None = None,
        keep_worker_states: bool = False,
        in_place: bool = False,
        save: bool = True,
    ) -> RoundResult:
        """Trains `state` on every worker, with learning rate `lr` if given, and averages what comes back.

        `state` stays as it is, unless `in_place`: then a round that succeeds ends by writing the average into
        its tensors, which saves the memory of a second model. `keep_worker_states` keeps each worker's result
        as well (a model each). A worker that has trained on nothing (its data set is empty, or `drop_last`
        left nothing) does not count. Rounds of one scheduler that are started at once run in turn. A run with a folder
        is written down there; without `save` only once `save` is called, before the next round.

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
        async with self._turns:  # an exchange serves one round after the other
            try:
                result = await self._in_turn(round_number, state, lr, keep_worker_states, in_place, save)
            except Exception as error:
                self._count_failed(error)
                raise
        traffic = [(part.bytes_sent, part.bytes_received) for part in result.workers.values()]
        missing = {id: why.kind for id, why in result.missing.items()}
        self.watched.completed(round_number, result.seconds, result.loss, traffic, missing)
        return result

    def _count_failed(self, error: Exception) -> None:
        missing: dict[str, str] = {}
        if isinstance(error, QuorumError):
            missing = {id: why.partition(":")[0] for id, why in error.missing.items()}
        elif isinstance(error, WORKERS_OWN) and (id := getattr(error, "worker_id", "")):
            missing = {id: why_missing(error).kind}
        self.watched.failed(type(error).__name__, missing)

    async def _in_turn(
        self,
        round_number: int,
        state: Mapping[str, torch.Tensor],
        lr: float | None,
        keep_worker_states: bool,
        in_place: bool,
        save: bool,
    ) -> RoundResult:
        if self._written is None:
            return await self._round(round_number, state, lr, keep_worker_states, in_place)
        await self._written.before_round(round_number)
        try:
            result = await self._round(round_number, state, lr, keep_worker_states, in_place)
        except PlanrtError as error:
            await self._written.failed(round_number, error)
            raise
        self._written.last = replace(result, worker_states={})
        self._optimizers.trained_since = False
        if save:
            await self.save()
        return result

    async def _round(
        self,
        round_number: int,
        state: Mapping[str, torch.Tensor],
        lr: float | None,
        keep_worker_states: bool,
        in_place: bool,
    ) -> RoundResult:
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
            weighted=self.weighted,
            copies=keep_worker_states,
            deadline=deadline,
            asks=self._asking.watched,
        )
        parts: dict[str, WorkerRound] = {}
        kept: dict[str, ModelState] = {}
        what = f"round {round_number}"
        present, missing = await self._asking.present(what, deadline)
        missing |= await self._exchange.begin(order, present)
        present = [worker for worker in present if worker.id not in missing]
        if len(present) < self._asking.needed:
            raise below_quorum(what, missing, [worker.id for worker in present], self._asking.needed)
        leases = Leases(max(0, self.hold - 1) if order.large else self.hold)
        places = {worker.id: leases.lease(first=index == 0) for index, worker in enumerate(present)}

        async def answered(worker: BaseWorker, answer: tuple[FitResult, WorkerRound]) -> None:
            result, part = answer
            await self._exchange.add(worker, order, result)
            parts[worker.id] = part
            if keep_worker_states:
                kept[worker.id] = names.named({**before, **result.entries})

        await self._asking.ask_all(
            what,
            round_number,
            present,
            missing,
            deadline,
            lambda worker: self._fit(worker, order, places[worker.id]),
            answered,
            lambda worker, late: places[worker.id].too_late() if late else places[worker.id].release(),
        )
        made = await self._exchange.end(order, list(parts))
        if in_place:
            await self.settled()
        after = names.assign(state, made.changed) if in_place else {**before, **made.changed}
        seconds_taken = time.perf_counter() - started
        return RoundResult(round_number, seconds_taken, names.named(after), made.loss, parts, kept, missing)

    # ------------------------------------------------------------------------- what is written down

    @property
    def next_round(self) -> int:
        """The number of the round that comes next in a run with a folder: 1, or where it goes on."""
        return 1 if self._written is None else self._written.record.next_round

    @property
    def state(self) -> ModelState:
        """The state that a run with a folder goes on from: of the checkpoint, after `resume` and `prepare`, then of
        the last round. Without a folder, or before the first round, the model's own.

        Raises:
            LocalError: nothing was traced yet: await `prepare` first.
        """
        written = self._written
        if written is not None and written.last is not None:
            return written.last.state
        return self.config.state if written is None or written.state is None else written.state

    @property
    def waiting(self) -> dict[str, float]:
        """The workers that have not answered the round that is under way, and for how long it waits (seconds)."""
        return {id: time.time() - since for id, since in list(self._asking.waiting.items())}

    def history(self) -> list[dict[str, Any]]:
        """Returns what the folder says of the rounds before the place where the run went on: see
        `RoundResult.as_line`."""
        return [] if self._written is None else self._written.record.history()

    @on_loop
    async def save(self, **notes: Any) -> None:
        """Writes the last round down in the run's folder, with `notes` (plain values that JSON has), and a checkpoint
        if one is due. It is on the disk once the next round, `save` or `close` has returned.

        Raises:
            RunFolderError: it cannot be written; the checkpoint before is as it was. Or a worker does not give what its
                optimizer keeps.
        """
        if self._written is not None:
            await self._written.save(notes)

    @on_loop
    async def settled(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
            RunFolderError: it could not be written; the checkpoint before is as it was.
        """
        if self._written is not None:
            await self._written.record.settled()

    @on_loop
    async def close(self) -> None:
        """Makes a checkpoint of the last round, if it has none, and lets go of the run's folder.

        Raises:
            RunFolderError: it cannot be written; the checkpoint before is as it was.
        """
        if self._written is not None:
            await self._written.close()

    async def _begin(self, written: WrittenRun, plan: str, infos: Mapping[str, m.DatasetInfo]) -> None:
        identity = {
            "plan": plan,
            "dataset": self.dataset_key,
            "seed": self.seed,
            "rules": {"weighted": self.weighted, "combining": self._combining},
        }
        settings = {name: getattr(self, name) for name in sorted(SETTINGS)}
        await written.begin(identity, settings, infos, fewer=self.min_workers is not None)

    async def _fit(
        self, worker: BaseWorker, order: RoundOrder, place: Lease
    ) -> tuple[FitResult, WorkerRound]:
        await self._optimizers.put_back(worker)
        self._optimizers.trained_since = True
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


def _check_alone(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise OptionError(
                f"{name}= needs the update of each worker, and with secure_aggregation nobody sees a single one: leave "
                "one of the two out"
            )


def _check_kept(config: TrainConfig, exchange: Exchange | None) -> None:
    if config.keep_optimizer_state and isinstance(exchange, SecureExchange):
        raise OptionError(
            "keep_optimizer_state=True keeps on each worker what would uncover its updates, so with secure_aggregation "
            "no checkpoint can have it: leave run_dir= out, or begin each round with a fresh optimizer"
        )
