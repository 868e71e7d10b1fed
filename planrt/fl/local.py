"""`local_workers`: workers in processes of their own on this machine, for as long as a block runs.

A process each, as on machines far apart: they compute at the same time, and an error in one takes nothing
else along. They run in sessions of their own, so that Ctrl-C in a terminal and "interrupt kernel" in a
notebook reach the program alone, and end with it, however it ends (`planrt.fl.runs.children`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from planrt.command_line import available_cores
from planrt.errors import DataError, OptionError
from planrt.fl.options import whole
from planrt.fl.runs.children import READY_TIMEOUT, ChildOptions, WorkerProcesses
from planrt.loop import refuse_to_block
from planrt.types import plain
from planrt.workers.base import check_device
from planrt.workers.machine.rounds.batches import as_batches, sample_specs
from planrt.workers.websocket_client import WebsocketClientWorker


class local_workers:  # noqa: N801 - it is used as a function
    """Starts worker processes on this machine and connects to them, for a block::

        with planrt.local_workers("alice", "bob", datasets={"alice": {"digits": some}}) as (alice, bob):
            ...

    The block gets a `WebsocketClientWorker` for each id, in order; ``async with`` does the same in a
    coroutine. Leaving it, or the end of this process, ends the workers.

    Args:
        ids: the workers' names, all different.
        datasets: worker id -> key -> map-style data set of (data, target) pairs. Its items are read here,
            once, and kept in a file that only this user can read until the worker has it. A data set that
            gives other items each time, as random transforms do, therefore stays as it was first read.
        threads: torch threads of each worker. None: the cores of this machine, shared out, at least 1 each.
        device: where they compute.
        timeout: seconds until all must serve.
        verbose: they log what happens to stderr.

    Raises:
        OptionError: an argument that cannot be used. DataError: a data set that cannot be read.
        ConnectError: a worker that does not start, or not within `timeout`. The last two at the block's
            begin.
    """

    def __init__(
        self,
        *ids: str,
        datasets: Mapping[str, Mapping[str, Any]] | None = None,
        threads: int | None = None,
        device: str | torch.device = "cpu",
        timeout: float = READY_TIMEOUT,
        verbose: bool = False,
    ) -> None:
        self._ids = _checked_ids(ids)
        self._datasets = _checked_datasets(datasets, self._ids)
        check_device(device)
        share = max(1, available_cores() // len(self._ids))
        self._options = ["--empty", "--device", str(device)]
        self._options += [
            "--threads",
            str(share if threads is None else whole("threads", threads, at_least=1)),
        ]
        self._options += ["--verbose"] if verbose else []
        self._timeout = _seconds(timeout)
        self._open: contextlib.ExitStack | None = None
        self._processes: WorkerProcesses | None = None

    def __enter__(self) -> list[WebsocketClientWorker]:
        refuse_to_block("async with planrt.local_workers(...)")
        if self._open is not None:
            raise OptionError("these workers run already: write local_workers(...) for others")
        with contextlib.ExitStack() as stack:
            with tempfile.TemporaryDirectory(prefix="planrt-") as folder:
                children = [
                    ChildOptions(id, options=(*self._options, *self._saved(id, Path(folder, str(number)))))
                    for number, id in enumerate(self._ids)
                ]
                self._processes = WorkerProcesses(children, ready_timeout=self._timeout)
                ready = stack.enter_context(self._processes).wait_ready()
            workers = [
                stack.enter_context(WebsocketClientWorker(id, uri=ready[id].uri, timeout=self._timeout))
                for id in self._ids
            ]
            self._open = stack.pop_all()
        return workers

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            opened, self._open = self._open, None
            opened.close()

    def _saved(self, id: str, folder: Path) -> list[str]:
        return _saved(self._datasets.get(id, {}), folder)

    async def __aenter__(self) -> list[WebsocketClientWorker]:
        entering = asyncio.ensure_future(asyncio.to_thread(self.__enter__))
        try:
            return await asyncio.shield(entering)
        except asyncio.CancelledError:
            if self._processes is not None:
                self._processes.stop()  # what waits for them hears of it
            with contextlib.suppress(Exception):
                await entering
            self.__exit__(None, None, None)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    def __iter__(self) -> Self:
        raise OptionError(
            'workers are there within a block: write `with planrt.local_workers("bob") as (bob,):`'
        )

    def __repr__(self) -> str:
        pids = self.pids
        workers = ", ".join(f"{id} (pid {pids[id]})" if id in pids else id for id in self._ids)
        ended = "ended" if self._processes is not None else "not started: use it in a with block"
        return f"<local_workers {workers}{'' if pids else f': {ended}'}>"

    @property
    def pids(self) -> dict[str, int]:
        """Worker id -> process id, while they run."""
        return {} if self._open is None or self._processes is None else self._processes.pids


def _checked_ids(ids: Sequence[Any]) -> list[str]:
    if not ids:
        raise OptionError('local_workers needs names: write local_workers("alice", "bob")')
    for id in ids:
        if isinstance(id, list | tuple):
            raise OptionError(
                f"local_workers takes the names one by one: write local_workers(*{list(id)!r:.80})"
            )
        if not isinstance(id, str) or not id or not id.isprintable() or len(id) > 200:
            raise OptionError(f"a worker's name is a short text, not {id!r:.80}")
    twice = sorted({id for id in ids if ids.count(id) > 1})
    if twice:
        raise OptionError(f"two workers are called {twice[0]!r}: give each a name of its own")
    return list(ids)


def _checked_datasets(given: Any, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    wanted = 'datasets is a dict such as {"alice": {"key": dataset}}'
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise OptionError(f"{wanted}, not {type(given).__name__}")
    for id, sets in given.items():
        if id not in ids:
            raise OptionError(f"datasets names {id!r:.80}, and the workers are {', '.join(ids)}")
        if not isinstance(sets, Mapping) or not all(isinstance(key, str) and key for key in sets):
            raise OptionError(f"{wanted}: of {id!r} it is {type(sets).__name__}")
    return {id: dict(sets) for id, sets in given.items()}


def _seconds(value: Any) -> float:
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < float("inf"):
        raise OptionError(f"timeout is a number of seconds above 0, not {value!r:.80}")
    return float(number)


def _saved(datasets: Mapping[str, Any], folder: Path) -> list[str]:
    """Options of `planrt.fl.serve` for data sets that are put into files of `folder`."""
    options = []
    for number, (key, dataset) in enumerate(datasets.items()):
        source = as_batches(dataset, key=key)
        sample_specs(source, key=key)
        data, targets = source.fetch(torch.arange(len(source)))
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"{number}.safetensors"
        # Two names for one memory are no file: each gets its own.
        tensors = {"data": data.detach().clone(), "targets": targets.detach().clone()}
        try:
            save_file({name: one.contiguous() for name, one in tensors.items()}, path, metadata={"key": key})
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            raise DataError(f"data set {key!r} cannot be handed to a worker's process: {error}") from error
        os.chmod(path, 0o600)
        options.append(f"--saved={path}")
    return options
