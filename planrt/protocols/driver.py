"""A `ChainRun` driven from here, over this process's connections to the workers of its places."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import cast

import torch

from planrt.errors import (
    LocalError,
    PlanFormatError,
    PlanrtError,
    RemoteError,
    TransportError,
    WorkerLostError,
    WorkerTimeoutError,
)
from planrt.workers.base import BaseWorker
from planrt.workers.client.outbox import Response
from planrt.workers.wire import messages as m
from planrt.workers.wire.chain_runs import ChainRun, Failed, Send

_endings: set[asyncio.Task[None]] = set()
"""Runs that were cancelled and wait for what was under way; the loop itself keeps weak references only."""

Answer = tuple[str, Response | Exception]


class Driver:
    """Sends what a run wants sent, and hands it the answers. All of it on planrt's loop."""

    def __init__(
        self, run: ChainRun, workers: Mapping[str, BaseWorker], tell: Callable[[], None] = lambda: None
    ) -> None:
        self._run = run
        self._workers = workers
        self._tell = tell
        """Called when something may have happened; an error in it ends the run."""
        self._answers: asyncio.Queue[Answer] = asyncio.Queue()
        self._waiting: set[asyncio.Task[None]] = set()

    async def to_the_end(self) -> None:
        """Carries the run out; after a failure, or cancelled, until nothing of it is left on any worker.

        Raises:
            RemoteError, WorkerLostError, WorkerTimeoutError, LocalError: a step failed; names it.
        """
        try:
            self._carry_out(self._run.start())
            self._tell()
            await self._finish(self._tell)
        except BaseException:
            self._carry_out(self._run.cancel())
            if self._run.outstanding:
                ending = asyncio.create_task(self._finish(lambda: None))
                _endings.add(ending)
                ending.add_done_callback(_endings.discard)
            raise
        if self._run.failure is not None:
            raise self._error(self._run.failure) from self._run.failure.error

    async def _finish(self, tell: Callable[[], None]) -> None:
        while self._run.outstanding:
            key, answer = await self._answers.get()
            if isinstance(answer, RemoteError):
                sends = self._run.failed(key, answer, answer.kind)
            elif isinstance(answer, Exception):
                sends = self._run.failed(key, answer)
            else:
                sends = self._run.answered(key, *answer)
            self._carry_out(sends)
            tell()

    def _carry_out(self, sends: Sequence[Send]) -> None:
        for one in sends:
            try:
                self._send(one)
            except PlanrtError as error:  # the worker is gone: so is what it should drop
                if one.key:
                    self._answers.put_nowait((one.key, error))

    def _send(self, one: Send) -> None:
        place = self._workers[one.place].workplace
        if one.key:
            task = asyncio.create_task(self._wait(one.key, place.ask(m.Message, one.body, one.tensors)))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)
        elif isinstance(one.body, m.Post) and one.body.ops:
            for op in one.body.ops:
                place.post_op(op)  # which counts ops, as the worker does
        else:
            place.post(one.body, one.tensors)

    async def _wait(self, key: str, asked: Awaitable[tuple[m.Message, list[torch.Tensor]]]) -> None:
        answer: Response | Exception
        try:
            answer = cast(Response, await asked)
        except PlanrtError as error:
            answer = error
        self._answers.put_nowait((key, answer))

    def _error(self, failed: Failed) -> Exception:
        error = failed.error
        if isinstance(error, RemoteError):
            return type(error)(
                f"{failed.where(worker=error.worker_id != failed.worker)}: {error.reason}",
                worker_id=error.worker_id,
                kind=error.kind,
                op=error.op,
                line=error.line,
                index=error.index,
                remote_traceback=error.remote_traceback,
                cause=error.cause,
                step=failed.name,
            )
        text = f"{failed.where(worker=True)}: {error}"
        if isinstance(error, WorkerLostError):
            return type(error)(text, address=error.address, worker_id=error.worker_id, step=failed.name)
        if isinstance(error, WorkerTimeoutError):
            return WorkerTimeoutError(
                text,
                address=error.address,
                worker_id=error.worker_id,
                seconds=error.seconds,
                step=failed.name,
            )
        if isinstance(error, TransportError):
            return type(error)(text, address=error.address)
        return type(error)(text) if type(error) in (PlanFormatError, LocalError) else PlanrtError(text)
