"""What the workers' optimizers keep between rounds, as checkpoints have it: read from the workers, and put back.

Optimizers that keep their state (`TrainConfig(keep_optimizer_state=True)`) live in the sessions of the workers. A
checkpoint needs what they keep after its round and before the next one. A worker whose session has ended (it was
restarted, or its connection was cut) gets back what was last read of it, before it trains again; a run that goes on
from a checkpoint makes the same of it. A worker gives its state where it gave its updates; what comes from masked ones
stays there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import torch

from planrt.errors import RemoteError, RunFolderError, TransportError
from planrt.fl.attendance import cancelled
from planrt.fl.config import TrainConfig
from planrt.fl.waiting import Deadline
from planrt.logs import get_logger
from planrt.serde.checkpoints import Checkpoint
from planrt.workers.base import BaseWorker
from planrt.workers.wire import messages as m

log = get_logger("planrt.fl")

_FACT, _TENSOR = "optimizers", "optimizer"

Kept = tuple[list[m.OptimizerValue], list[torch.Tensor]]
"""The values of one optimizer, and the tensors that they name."""


class WorkerOptimizers:
    """The optimizers of `config` on workers; without `keep_optimizer_state` there is nothing to do for them.

    Attributes:
        trained_since: whether a worker was asked to train after the last round whose result there is: what its
            optimizer keeps then belongs to no round.
    """

    def __init__(self, config: TrainConfig, dataset_key: str) -> None:
        self._config = config
        self._dataset_key = dataset_key
        self._kept: dict[str, Kept | None] = {}
        """What was last read, of each worker; None where it had not trained."""
        self._places: dict[str, object] = {}
        """The sessions that the optimizers are in."""
        self._owed: dict[str, Kept | None] = {}
        """What a checkpoint has, as long as it was not put back."""
        self.trained_since = False

    @property
    def on(self) -> bool:
        """Tells whether optimizers keep anything."""
        return bool(self._config.keep_optimizer_state)

    async def read(
        self,
        workers: Sequence[BaseWorker],
        deadline: Deadline,
        late: Callable[[str, asyncio.Task[Any]], None],
    ) -> bool:
        """Asks `workers` for what their optimizers keep, for the next checkpoint. Those that are not asked keep what
        they kept before.

        Returns:
            Whether all has come; `late` is called with the tasks of those that have not answered in time.

        Raises:
            RunFolderError: a worker does not give it; says what to write instead.
        """
        tasks = {
            worker.id: asyncio.create_task(self._read(worker))
            for worker in workers
            if worker.id not in self._owed
        }
        if not tasks:
            return True
        try:
            await asyncio.wait(tasks.values(), timeout=deadline.left())
        except BaseException:
            await cancelled(list(tasks.values()))
            raise
        complete = True
        for id, task in tasks.items():
            if not task.done():
                complete = False
                late(id, task)
                continue
            try:
                self._kept[id] = task.result()
            except TransportError as error:  # its session is over: it will get back what was read before
                log.warning("optimizer_state_lost", worker=id, why=str(error))
            except RemoteError as error:
                raise RunFolderError(
                    f"worker {id!r} does not give what its optimizer keeps, so that no checkpoint can have it "
                    f"({error.reason}): leave run_dir= out, or write TrainConfig(keep_optimizer_state=False)"
                ) from error
        return complete

    async def _read(self, worker: BaseWorker) -> Kept | None:
        plan = self._config.plans.training
        body = m.ReadOptimizer(plan.hash, self._dataset_key, self._config.optimizer)
        answer, tensors = await worker.ask(m.OptimizerState, body, plan=plan)
        return None if answer.values is None else (answer.values, tensors)

    async def put_back(self, worker: BaseWorker) -> None:
        """Puts what a worker's optimizer kept back there, where its session does not have it: in a run that goes on,
        and after its session has ended.

        Raises:
            RunFolderError: the worker does not take it; says what to write instead. TransportError: it is gone.
        """
        place = worker.workplace
        if worker.id in self._owed:
            kept = self._owed[worker.id]
        elif self._places.get(worker.id, place) is not place and self._kept.get(worker.id) is not None:
            kept = self._kept[worker.id]
            log.warning("optimizer_state_put_back", worker=worker.id)
        else:
            self._places[worker.id] = place
            return
        values, tensors = kept or ([], [])
        plan = self._config.plans.training
        body = m.PutOptimizer(plan.hash, self._dataset_key, self._config.optimizer, values)
        try:
            await worker.ask(m.Done, body, tensors, plan=plan)
        except RemoteError as error:
            raise RunFolderError(
                f"worker {worker.id!r} does not take what its optimizer kept, so that the run cannot go on with the "
                f"same bits ({error.reason}): begin another run, or one of TrainConfig(keep_optimizer_state=False)"
            ) from error
        self._places[worker.id] = place
        self._kept[worker.id] = kept
        self._owed.pop(worker.id, None)

    def captured(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Returns what a checkpoint has of what was read: plain facts, and tensors."""
        if not self.on:
            return {}, {}
        facts: list[Any] = []
        tensors: dict[str, torch.Tensor] = {}
        for number, (id, kept) in enumerate(sorted((self._kept | self._owed).items())):
            if kept is None:
                facts.append([id, None, 0])
                continue
            values, named = kept
            facts.append([id, [[one.parameter, one.name, one.value] for one in values], len(named)])
            tensors |= {f"{_TENSOR}/{number}/{index}": tensor for index, tensor in enumerate(named)}
        return {_FACT: facts}, tensors

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes over what a checkpoint has; `put_back` brings it to the workers.

        Raises:
            RunFolderError: it has something else.
        """
        if not self.on:
            return
        try:
            for number, (id, values, count) in enumerate(checkpoint.facts[_FACT]):
                named = [checkpoint.tensors[f"{_TENSOR}/{number}/{index}"] for index in range(count)]
                self._owed[id] = (
                    None if values is None else ([m.OptimizerValue(*one) for one in values], named)
                )
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(
                f"the checkpoint has no states of the workers' optimizers: {error}"
            ) from error
