"""Who takes part in a round: workers that are there, or come back, and owe nothing from an earlier round.

A worker that did not answer in time is not asked again before its late answer has come, which is dropped. So a frozen
worker, or one that hangs in its data set, costs one round its time-out and holds up none after it; and it takes part
again in the round after it woke up. One whose connection was lost is connected to again at the start of the next round.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from planrt.errors import (
    PlanrtError,
    QuorumError,
    RemoteError,
    TransportError,
    UpdateRefusedError,
    WorkerLostError,
)
from planrt.fl.recording_cache import dataset_of
from planrt.fl.waiting import Deadline
from planrt.logs import get_logger
from planrt.shown import shown
from planrt.workers.base import BaseWorker
from planrt.workers.websocket_client import WebsocketClientWorker
from planrt.workers.wire import messages as m

log = get_logger("planrt.fl")

RECONNECTING: Final = 3.0
"""Seconds that a round waits for a worker that is being connected to again, at its start. An attempt that takes longer
goes on, and the worker takes part in a later round."""

Kind = Literal["lost", "late", "busy", "failed", "refused", "left"]


@dataclass(frozen=True, slots=True)
class Missing:
    """A reason why a worker does not count in a round: `why` in words, and its `kind`.

    "lost" (its connection ended, and none could be made), "late" (no answer within the time-out), "busy" (it has not
    answered an earlier round yet, and was not asked), "failed" (it could not train), "refused" (what it returned cannot
    count) or "left" (the round ended before it answered).
    """

    kind: Kind
    why: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}"


class Attendance:
    """Knows of each worker whether it can be asked, from one round to the next."""

    def __init__(self, workers: Sequence[BaseWorker], dataset_key: str) -> None:
        self.workers = list(workers)
        self._dataset_key = dataset_key
        self._owed: dict[str, tuple[int, asyncio.Task[Any]]] = {}
        self._attempts: dict[str, asyncio.Task[None]] = {}
        self._hung: set[str] = set()
        """Workers whose last connection attempt took too long: the next ones are not waited for."""
        self.like: tuple[object, object] | None = None
        """What a batch of the data set looks like, once that is known."""

    def owes(self, worker_id: str, number: int, answer: asyncio.Task[Any]) -> None:
        """Notes that the worker was asked in round `number`, and that `answer` is too late for it."""

        def arrived(task: asyncio.Task[Any]) -> None:
            if not task.cancelled():
                task.exception()  # nobody waits for it: it is dropped, and so is the answer
            if self._owed.get(worker_id, (0, None))[1] is task:
                del self._owed[worker_id]
            log.info("late_answer_dropped", worker=worker_id, round=number)

        self._owed[worker_id] = number, answer
        answer.add_done_callback(arrived)

    def is_owing(self, worker_id: str) -> bool:
        """Returns whether the worker has not answered what it was asked in an earlier round."""
        return worker_id in self._owed

    async def roll_call(
        self, *, needed: int, deadline: Deadline
    ) -> tuple[list[BaseWorker], dict[str, Missing]]:
        """Returns the workers that can be asked, in the order of their ids, and why the others cannot.

        Workers whose connection was lost are connected to again first. It waits for those that owe an answer only
        where there are fewer than `needed` without them, until the deadline.
        """
        for worker in self.workers:
            if worker.workplace.closed and worker.id not in self._attempts:
                self._attempts[worker.id] = asyncio.create_task(self._connect(worker))
        if quick := [task for id, task in self._attempts.items() if id not in self._hung]:
            await asyncio.wait(quick, timeout=deadline.left(at_most=RECONNECTING))
        while True:
            failed = self._finished_attempts()
            missing = {worker.id: why for worker in self.workers if (why := self._why(worker, failed))}
            waiting = [task for _, task in self._owed.values()] + list(self._attempts.values())
            left = deadline.left()
            if len(self.workers) - len(missing) >= needed or not waiting or left == 0:
                break
            await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        return [worker for worker in self.workers if worker.id not in missing], missing

    def _why(self, worker: BaseWorker, failed: dict[str, str]) -> Missing | None:
        if worker.id in self._owed:
            return Missing("busy", f"it has not answered round {self._owed[worker.id][0]} yet")
        if worker.id in self._attempts:
            return Missing("lost", f"{self._gone(worker)}; connecting again takes long")
        if worker.workplace.closed:
            return Missing("lost", failed.get(worker.id) or self._gone(worker))
        return self._other_data(worker)

    def _gone(self, worker: BaseWorker) -> str:
        return f"the connection to {worker.address} ended ({worker.workplace.why_ended})"

    def _finished_attempts(self) -> dict[str, str]:
        failed = {}
        for id, task in list(self._attempts.items()):
            if not task.done():
                self._hung.add(id)
                continue
            del self._attempts[id]
            error = None if task.cancelled() else task.exception()
            if error is None:
                self._hung.discard(id)
            else:
                failed[id] = shown(str(error), 300)
        return failed

    async def _connect(self, worker: BaseWorker) -> None:
        if worker.workplace.why_ended == CLOSED_HERE or not isinstance(worker, WebsocketClientWorker):
            raise WorkerLostError(
                f"worker {worker.id!r} at {worker.address} was closed here: connect() it",
                address=worker.address,
                worker_id=worker.id,
            )
        await worker.async_reconnect()
        log.info("worker_is_back", worker=worker.id)

    def _other_data(self, worker: BaseWorker) -> Missing | None:
        """Why a worker cannot take part that serves other data than those which the plan was made for."""
        if self.like is None:
            return None
        try:
            info = dataset_of(worker, self._dataset_key)
        except PlanrtError as error:
            return Missing("failed", shown(str(error), 300))
        if looks(info) == self.like:
            return None
        return Missing(
            "failed", f"its data set {self._dataset_key!r} has another shape or dtype now: {looks(info)}"
        )


CLOSED_HERE: Final = "closed by this side"
"""What a connection says that this process closed itself."""


def looks(info: m.DatasetInfo) -> tuple[object, object]:
    """Returns what two data sets have in common that one plan can train on: the dtypes and sizes of a batch."""
    return (info.data[0], tuple(info.data[1])), (info.target[0], tuple(info.target[1]))


def why_missing(error: Exception) -> Missing:
    """Returns why the worker does not count whose part in a round ended with `error`, one of `WORKERS_OWN`."""
    if isinstance(error, UpdateRefusedError):
        return Missing("refused", shown(error.reason, 300))
    if isinstance(error, RemoteError):
        return Missing("failed", shown(error.reason, 300))
    return Missing("lost", shown(str(error), 300))


WORKERS_OWN: Final = (TransportError, RemoteError, UpdateRefusedError)
"""Errors that are one worker's, so that a round can go on without it."""


def below_quorum(
    what: str, missing: Mapping[str, Missing], answered: Sequence[str], needed: int
) -> QuorumError:
    """Returns the error of a round that has fewer workers than are `needed`; it names all that are missing."""
    named = "; ".join(f"{shown(id)} is {why}" for id, why in sorted(missing.items()))
    return QuorumError(
        f"{what} needs {needed} worker{'s' * (needed != 1)}, and {len(answered)} count{'s' * (len(answered) == 1)}: "
        f"{named}",
        missing={id: str(why) for id, why in missing.items()},
        answered=answered,
        needed=needed,
    )


async def cancelled(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancels `tasks`, and waits until they have ended."""
    for task in tasks:
        task.cancel()
    if tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
