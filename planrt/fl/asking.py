"""All workers are asked at once, and the round goes on with those that answer in time: `Asking`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from planrt.errors import WorkerLostError
from planrt.fl.attendance import WORKERS_OWN, Attendance, Missing, below_quorum, cancelled, why_missing
from planrt.fl.waiting import Answers, Deadline, LateError
from planrt.logs import get_logger
from planrt.workers.base import BaseWorker

log = get_logger("planrt.fl")

T = TypeVar("T")
A = TypeVar("A")


class Asking:
    """Asks the workers of a scheduler, and knows how many of them it takes.

    Attributes:
        workers: all of them, in the order of their ids.
        min_workers: how many must answer; None for all, and then one that cannot ends it with its own error.
        attendance: who can be asked.
        waiting: the workers that have not answered yet, and since when (seconds, as of `time.time`).
        changed: called when `waiting` has changed.
    """

    def __init__(self, workers: Sequence[BaseWorker], min_workers: int | None, dataset_key: str) -> None:
        self.workers = list(workers)
        self.min_workers = min_workers
        self.attendance = Attendance(workers, dataset_key)
        self.waiting: dict[str, float] = {}
        self.changed: Callable[[], None] = lambda: None

    @property
    def needed(self) -> int:
        """The number of workers that must count."""
        return len(self.workers) if self.min_workers is None else self.min_workers

    async def present(self, what: str, deadline: Deadline) -> tuple[list[BaseWorker], dict[str, Missing]]:
        """Returns the workers that can be asked, and why the others cannot.

        Raises:
            QuorumError: too few can. WorkerLostError: one is gone, where all are needed by default.
        """
        present, missing = await self.attendance.roll_call(needed=self.needed, deadline=deadline)
        for worker in self.workers:
            if self.min_workers is None and worker.id in missing and missing[worker.id].kind == "lost":
                raise WorkerLostError(
                    f"worker {worker.id!r} is gone: {missing[worker.id].why}",
                    address=worker.address,
                    worker_id=worker.id,
                )
        if len(present) < self.needed:
            raise below_quorum(what, missing, [worker.id for worker in present], self.needed)
        return present, missing

    async def ask_all(
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
            if len(self.workers) - len(missing) < self.needed:
                left = {worker.id for worker in present} - missing.keys() - set(counting)
                missing.update(
                    {id: Missing("left", "too many were missing before its answer") for id in left}
                )
                raise below_quorum(what, missing, counting, self.needed)

        answers = Answers(
            {worker.id: self.watched(worker.id, ask(worker)) for worker in present}, deadline, failed
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
                    self.attendance.owes(worker.id, number, error.task)
                except WORKERS_OWN as error:
                    failed(worker.id, error)
                over(worker, late)
                if worker.id in missing:
                    log.warning("worker_missing", worker=worker.id, round=number, why=str(missing[worker.id]))
        finally:
            await cancelled(answers.rest())
        if len(counting) < self.needed:
            raise below_quorum(what, missing, counting, self.needed)

    def watched(self, id: str, asked: Coroutine[Any, Any, A]) -> asyncio.Task[A]:
        """Begins to ask the worker `id`, which is among those that are `waiting` until the task ends."""

        def over(_: object) -> None:
            self.waiting.pop(id, None)
            self.changed()

        task = asyncio.create_task(asked)
        self.waiting[id] = time.time()
        task.add_done_callback(over)
        self.changed()
        return task
