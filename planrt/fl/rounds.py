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
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from planrt.cards import card
from planrt.errors import OptionError
from planrt.fl.averaging import Aggregation, FederatedAveraging, check_aggregated, check_aggregation
from planrt.fl.config import TrainConfig
from planrt.fl.options import learning_rate, whole
from planrt.fl.recording_cache import dataset_of
from planrt.loop import on_loop
from planrt.plans.model_plans import ModelPlans
from planrt.plans.model_state import ModelState
from planrt.plans.training import EvaluationResult
from planrt.seeding import derive_seed
from planrt.serde.frames import MemoryStore, SpoolStore, Store
from planrt.shown import shown
from planrt.workers.base import BaseWorker
from planrt.workers.results import FitResult

_SMALL = 1 << 20
"""Replies under this many bytes are not worth a temporary file."""

_LARGE = 8 << 20
"""Folding states over this many bytes leaves the loop thread, which has pings to answer. Of replies over this
many bytes one less is held: what connections have in hand while they receive (about 10 MB in all) takes its
place."""


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
    ``model.load_state_dict`` takes them.
    """

    round: int
    seconds: float
    state: ModelState
    loss: float
    workers: dict[str, WorkerRound]
    worker_states: dict[str, ModelState] = field(default_factory=dict)

    def __repr__(self) -> str:
        workers = shown(", ".join(f"{id}: {part.loss:.4f}" for id, part in self.workers.items()), 200)
        return f"<RoundResult of round {self.round}: loss {self.loss:.4f} ({workers}), {self.seconds:.2f} s>"

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

    Memory of a round stays under (2 + `hold`) times the state for states over 10 MB: the state, the first
    reply, which becomes the average, and `hold` times as much for replies that arrive out of order and
    whatever connections have in hand. Further replies wait in temporary files. An aggregation of your own
    needs what it keeps in addition.

    Raises:
        OptionError: no workers, two with the same id, a negative `hold`, an `aggregation` without its
            methods.
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
        self._hold = whole("hold", hold, at_least=0)
        self._weighted = weighted
        self._aggregation: Aggregation[Any] = FederatedAveraging() if aggregation is None else aggregation
        check_aggregation(self._aggregation)

    def __repr__(self) -> str:
        ids = shown(", ".join(worker.id for worker in self.workers), 200)
        return (
            f"<RoundScheduler of {self.config!r} on {ids}: data set {self.dataset_key!r}, seed {self.seed}>"
        )

    @on_loop
    async def prepare(self) -> None:
        """Traces the plan if it is not yet, and sends it to every worker, once.

        Raises:
            UnknownDatasetError, TraceError: see `TrainConfig`. OptionError: the workers' data differ in
                shape.
        """
        infos = [dataset_of(worker, self.dataset_key) for worker in self.workers]
        specs = {str((info.data, info.target)) for info in infos}
        if len(specs) > 1:
            raise OptionError(
                f"the workers' data sets {self.dataset_key!r} have different shapes or dtypes: {'; '.join(specs)}"
            )
        plan = self.config.trace_for(self.workers[0], self.dataset_key).training
        await asyncio.gather(
            *(worker.workplace.put_plan(plan, purpose=self.config.purpose) for worker in self.workers)
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
            WorkerLostError: a worker went away; names it. RemoteError: a worker could not do it.
        """
        if isinstance(round_number, Mapping):
            raise OptionError("run_round takes the number of the round first: run_round(1, state)")
        if isinstance(state, torch.nn.Module):
            raise OptionError("run_round takes a state, not a model: pass model.state_dict()")
        round_number = whole("round_number", round_number, at_least=0)
        lr = None if lr is None else learning_rate(lr)
        started = time.perf_counter()
        plans = self.config.plans
        names = plans.names
        before = names.by_entry(state)
        checked = names.named(before)  # once for all workers: tied weights may have to be compared
        large = sum(value.nbytes for value in before.values()) > _LARGE
        leases = _Leases(max(0, self._hold - 1) if large else self._hold)
        aggregate = self._aggregation.init()
        added: dict[str, torch.Tensor] = {}
        parts: dict[str, WorkerRound] = {}
        kept: dict[str, ModelState] = {}
        try:
            async with asyncio.TaskGroup() as group:
                tasks = deque(
                    group.create_task(
                        self._fit(worker, plans, round_number, checked, lr, leases.lease(first=index == 0))
                    )
                    for index, worker in enumerate(self.workers)
                )
                for worker in self.workers:
                    result, part, lease = await tasks.popleft()
                    parts[worker.id] = part
                    if keep_worker_states:
                        kept[worker.id] = names.named({**before, **result.entries})
                    if part.samples:
                        weight = float(part.samples) if self._weighted else 1.0
                        added = added or {name: before[name] for name in result.entries}
                        entries = dict(result.entries)
                        if keep_worker_states:  # what is kept must not become the accumulator
                            entries = {name: value.clone() for name, value in entries.items()}
                        if large:
                            aggregate = await asyncio.to_thread(self._add, aggregate, entries, weight)
                        else:
                            aggregate = self._add(aggregate, entries, weight)
                        del entries
                    del result
                    lease.release()
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        samples = sum(part.samples for part in parts.values())
        loss = sum(part.loss * part.samples for part in parts.values() if part.samples)
        aggregated = check_aggregated(self._aggregation.result(aggregate), added) if added else {}
        after = names.assign(state, aggregated) if in_place else {**before, **aggregated}
        return RoundResult(
            round_number,
            time.perf_counter() - started,
            names.named(after),
            loss / samples if samples else float("nan"),
            parts,
            kept,
        )

    def _add(self, aggregate: Any, entries: dict[str, torch.Tensor], weight: float) -> Any:
        after = self._aggregation.add(aggregate, entries, weight)
        if after is None:
            raise OptionError(
                f"add of {type(self._aggregation).__name__} returned None: return the aggregate, also where it was "
                "changed in place"
            )
        return after

    async def _fit(
        self,
        worker: BaseWorker,
        plans: ModelPlans,
        round_number: int,
        state: Mapping[str, torch.Tensor],
        lr: float | None,
        lease: _Lease,
    ) -> tuple[FitResult, WorkerRound, _Lease]:
        before = worker.traffic.copy()
        result = await self.config.fit(
            worker,
            state,
            dataset_key=self.dataset_key,
            seed=derive_seed(self.seed, round_number, worker.id),
            lr=lr,
            allocate=lease.allocate,
            plans=plans,
        )
        used = worker.traffic.since(before)
        part = WorkerRound(
            used.messages_sent,
            used.messages_received,
            used.bytes_sent,
            used.bytes_received,
            result.loss,
            result.samples,
        )
        return result, part, lease


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


# ----------------------------------------------------------------------------- memory for the replies


class _Leases:
    """Bounds the replies of a round that are in memory: the accumulator, and `hold` more."""

    def __init__(self, hold: int) -> None:
        self.free = hold

    def lease(self, *, first: bool) -> _Lease:
        """The place of one worker's reply; the first in order becomes the accumulator."""
        return _Lease(self, first)


class _Lease:
    def __init__(self, leases: _Leases, first: bool) -> None:
        self._leases = leases
        self._first = first
        self._taken = False

    def allocate(self, message: object, nbytes: int) -> Store:
        if nbytes < _SMALL or self._first:
            return MemoryStore(nbytes)
        if not self._leases.free:
            return SpoolStore(nbytes)
        self._leases.free -= 1
        self._taken = True
        return MemoryStore(nbytes)

    def release(self) -> None:
        self._leases.free += self._taken
        self._taken = False
