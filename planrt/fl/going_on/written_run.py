"""A scheduler's run as it is written down, round by round, and taken up again: `WrittenRun`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from planrt.errors import OptionError, PlanrtError
from planrt.fl.asking import Asking
from planrt.fl.config import TrainConfig
from planrt.fl.exchange import Exchange
from planrt.fl.going_on.resuming import captured, data_of, put_back
from planrt.fl.going_on.worker_optimizers import WorkerOptimizers
from planrt.fl.round_result import RoundResult
from planrt.fl.runs.run_record import RunRecord, set_random_state
from planrt.fl.waiting import Deadline
from planrt.logs import get_logger
from planrt.plans.model_state import ModelState
from planrt.workers.base import BaseWorker
from planrt.workers.wire import messages as m

log = get_logger("planrt.fl")

SHOWN_AFTER: Final = 0.25
"""Seconds from a change of who is waited for to the moment when `planrt status` shows it."""


class WrittenRun:
    """Tells the folder of `record` what happens in a run.

    Attributes:
        state: what the run goes on from; None before `begin`.
        last: the last round, without the workers' states.
        optimizers: what the workers' optimizers keep.
    """

    def __init__(
        self,
        record: RunRecord,
        config: TrainConfig,
        exchange: Exchange,
        asking: Asking,
        optimizers: WorkerOptimizers,
        round_timeout: float | None,
    ) -> None:
        self.record = record
        self.optimizers = optimizers
        self.state: ModelState | None = None
        self.last: RoundResult | None = None
        self._config = config
        self._exchange = exchange
        self._asking = asking
        self._round_timeout = round_timeout
        self._since = time.time()
        self._showing: asyncio.TimerHandle | None = None

    async def begin(
        self,
        identity: Mapping[str, Any],
        settings: Mapping[str, Any],
        infos: Mapping[str, m.DatasetInfo],
        *,
        fewer: bool,
    ) -> None:
        """Begins the run in its folder, or takes up the one that is there.

        Raises:
            RunFolderError: it is another run, or cannot be written.
        """
        training = {
            **self._config.fit_options(),
            "keep_optimizer_state": bool(self._config.keep_optimizer_state),
        }
        identity = {**identity, "data": data_of(infos), "training": training}
        record = self.record
        await asyncio.to_thread(record.begin, identity, settings, fewer=fewer)
        self._asking.changed = self._show_soon
        self._show()
        if record.restored is not None:
            self.state = put_back(record.restored, self._config.plans, self._exchange)
            self.optimizers.restore(record.restored)
            set_random_state(record.restored.facts["random"])

    async def began(self, present: Sequence[BaseWorker]) -> None:
        """Ends the beginning, once the workers that are `present` have the plan: what their optimizers kept goes back
        there, or the checkpoint from before the first round is written.

        Raises:
            RunFolderError: it cannot be written, or a worker does not give or take what its optimizer keeps.
        """
        if self.state is not None:
            for worker in present:
                await self.optimizers.put_back(worker)
            return
        self.state = self._config.state
        if await self._read_optimizers(0):
            await self.record.save(0, {}, *self._captured(self.state), checkpoint=True)
            await self.record.settled()

    async def before_round(self, number: int) -> None:
        """Writes down what was not yet, before round `number`.

        Raises:
            OptionError: another round comes next. RunFolderError: it cannot be written.
        """
        if self.state is None:
            raise OptionError("a run with a folder begins with prepare(): await scheduler.prepare() first")
        await self.save({})
        if number != self.record.next_round:
            raise OptionError(
                f"round {self.record.next_round} comes next in the run folder {self.record.path}, not {number}"
            )
        self._since = time.time()

    async def save(self, notes: Mapping[str, Any]) -> None:
        """Writes the last round down, unless it is, and a checkpoint if one is due.

        Raises:
            RunFolderError: it cannot be written.
        """
        last, record = self.last, self.record
        if last is None or last.round != record.next_round:
            return
        checkpoint = record.due(last.round) and await self._read_optimizers(last.round)
        facts, tensors = self._captured(last.state) if checkpoint else ({}, {})
        await record.save(last.round, {**last.as_line(), **notes}, facts, tensors, checkpoint=checkpoint)

    async def failed(self, number: int, error: PlanrtError) -> None:
        """Notes that round `number` ended with an error."""
        await self.record.failed(number, error)

    async def close(self) -> None:
        """Makes a checkpoint of the last round, if it has none, and lets go of the folder.

        Raises:
            RunFolderError: it cannot be written; the checkpoint before is as it was.
        """
        record = self.record
        self._asking.changed = lambda: None
        if self._showing is not None:
            self._showing.cancel()
        try:
            await self.save({})
            await record.settled()
            last = self.last
            if last is not None and record.unsaved and await self._read_optimizers(last.round):
                await record.save(last.round, {}, *self._captured(last.state), checkpoint=True)
        finally:
            await record.close()

    def _show_soon(self) -> None:
        """Shows `planrt status` who is waited for, as it is in a moment: most answers come within it."""
        if self._showing is None:
            self._showing = asyncio.get_running_loop().call_later(SHOWN_AFTER, self._show)

    def _show(self) -> None:
        self._showing = None
        since = self._since
        until = None if self._round_timeout is None else since + self._round_timeout
        self.record.show(self.record.next_round, list(self._asking.waiting), since, until)

    def _captured(self, state: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        facts, tensors = captured(self._config.plans, state, self._exchange)
        more, kept = self.optimizers.captured()
        return facts | more, tensors | kept

    async def _read_optimizers(self, number: int) -> bool:
        """Whether all is there that a checkpoint of round `number` has of the workers' optimizers. Those of workers
        that have not answered an earlier round yet are as they were before it."""
        if not self.optimizers.on:
            return True
        if self.optimizers.trained_since:  # the rounds since the last checkpoint are made again
            log.warning("no_checkpoint", round=number, why="optimizers were stepped after it")
            return False
        attendance = self._asking.attendance
        there = [worker for worker in self._asking.workers if not attendance.is_owing(worker.id)]

        def late(id: str, task: asyncio.Task[Any]) -> None:
            log.warning(
                "no_checkpoint", round=number, worker=id, why="what its optimizer keeps did not come in time"
            )
            attendance.owes(id, number, task)

        return await self.optimizers.read(there, Deadline(self._round_timeout), late)
