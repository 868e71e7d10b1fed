"""The thread that a worker computes on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")

STACK = 1 << 30
"""Bytes of stack of a compute thread: address space, of which what is used takes memory. torch 2.14 frees a chain of
autograd nodes that Python has looked at by a call for each, 140 bytes deep: in 8 MiB one of 60,000 ends the process."""

_LIMITED_STACK = 64 << 20
"""Where the process may have so much address space only, as that of one user may."""


def _stack() -> int:
    try:
        import resource
    except ImportError:  # Windows has none, nor such limits
        return _LIMITED_STACK
    unlimited = resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    return STACK if unlimited else _LIMITED_STACK


_computing = threading.Lock()
"""Held while a worker computes. torch's random generators and its number of threads belong to the process (MKL
knows one number only), so the workers of a process compute one at a time, or they would change each other's bits."""


_LINGER = 0.002
"""Seconds that the thread waits for more where it stands: within a computation among workers the next message comes
sooner, and to wake it by its executor takes three times as long."""
_LIFE = 1.0
"""Seconds after which it asks its executor anew: that is how it hears that Python ends."""


class _Job(NamedTuple):
    answer: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    function: Callable[..., Any]
    args: tuple[object, ...]


class ComputeThread:
    """One thread for torch work, with `threads` torch threads (None: as many as torch takes by itself)."""

    def __init__(self, name: str, *, threads: int | None = None) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        before = threading.stack_size(_stack())
        try:
            self._executor.submit(int)  # the thread is made now
        finally:
            threading.stack_size(before)
        self._threads = threads
        self._threads_elsewhere = torch.get_num_threads()
        self._jobs: deque[_Job] = deque()
        self._lock = threading.Lock()
        self._told = threading.Lock()
        """Free where there may be jobs that the thread has not seen. (Not a `queue.SimpleQueue`, whose `get` with a
        timeout can wait for ever, which kept Python from ending: it takes what is left of its time as a time to wait,
        also where that is negative.)"""
        self._told.acquire()
        self._awake = self._closed = False
        """Whether the thread looks for jobs, or will; whether it takes no more. Both change under the lock."""
        self.asked = 0
        """How much was asked of `run` and is not over, for whoever asked, as well."""
        self.busy = False
        """Whether something is computed."""

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Runs ``function(*args)`` on the thread, after everything asked for before. What has not begun when its caller
        is cancelled does not run.

        Raises:
            asyncio.CancelledError: the thread takes nothing more: it was closed, or this process ends.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        with self._lock:
            if self._closed:
                raise asyncio.CancelledError
            self._jobs.append(_Job(answer, loop, function, args))
            self._tell()
            wake = not self._awake
            self._awake = True
            self.asked += 1
        try:
            if wake:
                self._wake()
            return await answer
        finally:
            with self._lock:
                self.asked -= 1
            del answer, args  # or an error's traceback would show the error, and all of it stay

    def run_here(self, function: Callable[..., T], *args: object) -> T | None:
        """Runs ``function(*args)`` on the thread that calls this, at once; returns None where that cannot be, since
        something else runs or waits to, or has not been heard of by who asked for it. To hand over to the thread and
        back takes as long as a short function does, and whoever calls this waits for it: it must be short.
        """
        if self._closed or self.asked or not _computing.acquire(blocking=False):
            return None
        try:
            return self._compute_alone(function, *args)
        finally:
            _computing.release()

    def _wake(self) -> None:
        try:
            self._executor.submit(self._work)
        except RuntimeError:  # Python closes every executor at its end, before it lets go of our loop
            self.close()

    def _tell(self) -> None:
        if self._told.locked():  # only this frees it, and only under the lock
            self._told.release()

    def _work(self) -> None:
        end = time.monotonic() + _LIFE
        while time.monotonic() < end:
            told = self._told.acquire(timeout=_LINGER)
            with self._lock:
                job = self._jobs.popleft() if self._jobs else None
                if self._jobs:
                    self._tell()
                elif job is None and not told:
                    self._awake = False
                    return
            if job is not None:
                self._do(job)
                del job
        self._wake()

    def _do(self, job: _Job) -> None:
        answer, loop, function, args = job
        if answer.cancelled():
            return
        result, error = None, None
        try:
            result = self._compute(function, *args)
        except BaseException as raised:
            error = raised
        try:
            with contextlib.suppress(RuntimeError):  # the loop is gone, and who waits with it
                loop.call_soon_threadsafe(_settle, answer, result, error)
        finally:
            del (
                error,
                result,
                job,
                answer,
                args,
            )  # or the error's traceback would show the error, and all of it stay

    def _compute(self, function: Callable[..., T], *args: object) -> T:
        with _computing:
            return self._compute_alone(function, *args)

    def _compute_alone(self, function: Callable[..., T], *args: object) -> T:
        self.busy = True
        try:
            if self._threads is not None:
                torch.set_num_threads(self._threads)
            return function(*args)
        finally:
            if self._threads is not None:
                torch.set_num_threads(self._threads_elsewhere)
            self.busy = False

    def close(self) -> None:
        """Lets the thread go once what runs is done; what waits is dropped."""
        with self._lock:
            self._closed = True
            dropped = list(self._jobs)
            self._jobs.clear()
        for job in dropped:
            with contextlib.suppress(RuntimeError):  # its loop is gone
                job.loop.call_soon_threadsafe(job.answer.cancel)
        self._executor.shutdown(wait=False, cancel_futures=True)


def _settle(answer: asyncio.Future[T], result: T, error: BaseException | None) -> None:
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(result)
