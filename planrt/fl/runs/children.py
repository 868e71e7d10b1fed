"""Worker processes that this process starts, watches and always takes with it.

No child outlives its parent: leaving the `with` block stops them all, and a child ends by itself when its
stdin reaches end of file, which happens however the parent goes (see `planrt.fl.serve`). Children run in
sessions of their own, so that Ctrl-C in the terminal reaches the parent alone, which stops them in order.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

from planrt.command_line import available_cores
from planrt.errors import ConnectError
from planrt.fl.data.digits import PARTITIONS, TESTING, DataSource

READY_TIMEOUT = 120.0
"""Seconds that all children together may take until they serve; a loaded machine imports torch slowly."""

STOP_GRACE = 1.0
"""Seconds between asking children to stop and killing those that did not."""


@dataclass(frozen=True)
class ChildOptions:
    """One worker process: its id, its port (0: a free one) and further options of `planrt.fl.serve`."""

    id: str
    port: int = 0
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadyWorker:
    """The report of a child that began to serve; `digits` is the number of images per digit."""

    id: str
    host: str
    port: int
    key: str
    description: str
    images: int
    digits: dict[int, int]
    secure: bool = False
    """Whether it is reached over TLS."""
    metrics: str = ""
    """Where it serves its metrics, if it does."""
    isolation: str = ""
    """A line about its isolation, where it has users or a policy and its owner said nothing of that."""

    @property
    def uri(self) -> str:
        """The address at which clients find it."""
        return f"{'wss' if self.secure else 'ws'}://{self.host}:{self.port}"


class WorkerProcesses:
    """Starts worker processes on `with`, stops them when it ends.

    `start` returns at once, so that the caller can import torch while the children do the same; `wait_ready`
    returns their addresses.

    Args:
        children: what to start, ids all different.
        host: the address they listen on.
        ready_timeout: seconds until all must serve.
        die_with_us: on Linux, have the system kill them when the main thread of this process has ended, even those
            that are stopped. `start` is called on that thread.
    """

    def __init__(
        self,
        children: Sequence[ChildOptions],
        *,
        host: str = "127.0.0.1",
        ready_timeout: float = READY_TIMEOUT,
        die_with_us: bool = False,
    ) -> None:
        self._children = list(children)
        self._host = host
        self._ready_timeout = ready_timeout
        self._tied = ["--parent", str(os.getpid())] if die_with_us else []
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._status_lines: queue.Queue[tuple[str, str]] = queue.Queue()

    def __enter__(self) -> WorkerProcesses:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by worker id."""
        return {worker_id: process.pid for worker_id, process in self._processes.items()}

    def start(self) -> None:
        """Starts all processes; returns before they serve."""
        self._deadline = time.monotonic() + self._ready_timeout
        try:
            for child in self._children:
                self._start_one(child)
        except BaseException:
            self.stop()
            raise

    def _start_one(self, child: ChildOptions) -> None:
        command = [sys.executable, "-m", "planrt.fl.serve", "--supervised", f"--id={child.id}"]
        command += ["--host", self._host, "--port", str(child.port), *self._tied, *child.options]
        # OpenMP threads that wait must not burn the cores that other workers compute on.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._processes[child.id] = process
        # A thread each, because pipes of several processes cannot be waited for together on every platform.
        threading.Thread(target=self._read_status, args=(child.id, process.stdout), daemon=True).start()

    def _read_status(self, worker_id: str, stdout: IO[str]) -> None:
        self._status_lines.put((worker_id, stdout.readline()))

    def wait_ready(self) -> dict[str, ReadyWorker]:
        """Waits until all serve; workers in the order they were given.

        Raises:
            ConnectError: one failed, with its own words, or they took longer than `ready_timeout`.
        """
        ready: dict[str, ReadyWorker] = {}
        while len(ready) < len(self._children):
            try:
                worker_id, line = self._status_lines.get(timeout=max(0.0, self._deadline - time.monotonic()))
            except queue.Empty:
                late = ", ".join(sorted(self._processes.keys() - ready.keys()))
                raise ConnectError(
                    f"workers not ready after {self._ready_timeout:g} s: {late}; --verbose shows logs",
                    address=self._host,
                ) from None
            ready[worker_id] = self._parse(worker_id, line)
        return {child.id: ready[child.id] for child in self._children}

    def _parse(self, worker_id: str, line: str) -> ReadyWorker:
        if not line:
            try:
                code = self._processes[worker_id].wait(STOP_GRACE)
                how = f"ended with exit code {code}"
            except subprocess.TimeoutExpired:  # what is left of its end takes long on a busy machine
                how = "ended its output"
            raise ConnectError(f"worker {worker_id!r} {how} before it served", address=self._host)
        status: dict[str, Any] = json.loads(line)
        if "error" in status:
            raise ConnectError(f"worker {worker_id!r}: {status['error']}", address=self._host)
        digits = {int(digit): count for digit, count in status.pop("digits").items()}
        return ReadyWorker(id=worker_id, host=self._host, digits=digits, **status)

    def wait(self) -> None:
        """Blocks until a child ends.

        Raises:
            ConnectError: always, naming the child that ended.
        """
        while True:
            for worker_id, process in self._processes.items():
                if process.poll() is not None:
                    raise ConnectError(
                        f"worker {worker_id!r} ended with exit code {process.returncode}", address=self._host
                    )
            time.sleep(0.2)

    def stop(self) -> None:
        """Asks all to stop, kills those that have not after a grace, and waits for all. Harmless twice."""
        for process in self._processes.values():
            process.terminate()
        deadline = time.monotonic() + STOP_GRACE
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def mnist_children(
    source: DataSource,
    *,
    first_port: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    fast_kernels: bool = False,
    verbose: bool = False,
    first_metrics_port: int | None = None,
    more: Sequence[str] = (),
) -> list[ChildOptions]:
    """Alice, bob, charlie and testing with their parts of `source`.

    Args:
        source: what `planrt.fl.data.digits.find` found.
        first_port: alice's port, the others follow; None for free ports.
        threads: torch threads of each. None: the training workers, which compute at the same time, get
            ``max(1, cores // 3)`` each; the testing worker, which computes while they wait, gets all cores.
        device: where they compute.
        fast_kernels: on a GPU, whether they may take kernels that do not repeat their bits.
        verbose: they log what happens.
        first_metrics_port: where alice serves its metrics, the others follow (0: free ports); None for none.
        more: further options of all of them.
    """
    cores = available_cores()
    children = []
    for number, worker_id in enumerate((*PARTITIONS, TESTING)):
        share = cores if worker_id == TESTING else max(1, cores // len(PARTITIONS))
        options = ["--dataset", source.name, "--threads", str(threads or share), "--device", device]
        options += ["--data", str(source.folder)] if source.folder is not None else []
        options += ["--testing"] if worker_id == TESTING else []
        options += ["--fast-kernels"] if fast_kernels else []
        options += ["--verbose"] if verbose else []
        if first_metrics_port is not None:
            options += ["--metrics-port", str(first_metrics_port + number if first_metrics_port else 0)]
        options += more
        port = 0 if first_port is None else first_port + number
        children.append(ChildOptions(worker_id, port, tuple(options)))
    return children
