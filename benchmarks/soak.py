"""``python -m benchmarks.soak --minutes 15 --seed 1``: rounds and pointers while workers and links fail.

Three worker processes train, a fourth holds tensors of a pointer client; between each and its client is a proxy.
Meanwhile, from the seed, processes are killed and started again or stopped and continued, links are cut, at once or in
the middle of a message, and slowed down, and strangers send garbage. What must hold is looked at all the time:

* the state after a round is, bit for bit, the average of what those who count in it make of the state before it, each
  alone and undisturbed: so no update is lost, counted twice, or counted in another round;
* a tensor to which ones are added in place is what was added, or the session is lost *and* its worker was killed;
* large tensors come back as they were sent.

Memory, file descriptors and asyncio tasks of this process, and memory and descriptors of the workers, are sampled once
a second: the report has their medians in the second and in the last fifth of the run.

Exit codes: 0 all held, 1 something did not, 2 wrong options.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from torch import nn

from planrt.errors import (
    GonePointerError,
    PlanrtError,
    QuorumError,
    SessionLostError,
    WorkerLostError,
    WorkerTimeoutError,
)
from planrt.fl import RoundScheduler, TrainConfig, federated_avg
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.loop import background_loop
from planrt.placing import send
from planrt.plans.model_state import ModelState
from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker
from tests.proxy import CuttingProxy

TRAINING: Final = ("alice", "bob", "charlie")
HOLDING: Final = "dora"
ROUND_TIMEOUT: Final = 8.0
FAULTS: Final = ("kill", "stop", "cut", "cut in a message", "slow", "garbage")
_STEPS: Final = 50
"""Most additions between two looks at what was added."""


def _data(number: int) -> BaseDataset:
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(96, 12, generator=generator)
    return BaseDataset(values, (values[:, 0] > values[:, 1]).long())


def alice() -> BaseDataset:
    """Returns the data of a worker process: ``--dataset benchmarks.soak:alice``."""
    return _data(0)


def bob() -> BaseDataset:
    """Returns the data of a worker process."""
    return _data(1)


def charlie() -> BaseDataset:
    """Returns the data of a worker process."""
    return _data(2)


def _job() -> TrainConfig:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    return TrainConfig(
        model, nn.functional.cross_entropy, batch_size=16, max_nr_batches=3, optimizer_args={"lr": 0.05}
    )


def _child(name: str, port: int = 0) -> ChildOptions:
    data = ("--empty",) if name == HOLDING else ("--dataset", f"benchmarks.soak:{name}", "--key", "d")
    return ChildOptions(name, port, (*data, "--threads", "1"))


@dataclass
class Found:
    """All that a run has seen."""

    rounds: int = 0
    """Rounds that made an average."""
    below: int = 0
    """Rounds in which nobody answered in time."""
    updates: int = 0
    """Updates that counted, of all workers."""
    missing: Counter[str] = field(default_factory=Counter)
    """Why workers did not count."""
    additions: int = 0
    looks: int = 0
    lost_sessions: int = 0
    """Sessions that ended because their worker was killed."""
    late: int = 0
    """Calls that ran into their time-out."""
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What did not hold; nothing is the goal."""
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Name of a figure -> (seconds since the start, value)."""

    def flat(self) -> dict[str, tuple[float, float]]:
        """Returns each figure's median in the second fifth and in the last fifth of the run."""
        found = {}
        for name, samples in self.samples.items():
            values = [value for _, value in samples]
            part = max(1, len(values) // 5)
            early = values[part : 2 * part] or values
            found[name] = (statistics.median(early), statistics.median(values[-part:]))
        return found


class Worker:
    """A worker process behind a proxy, which is started again on its port after it was killed."""

    def __init__(self, name: str, port: int, processes: WorkerProcesses, proxy: CuttingProxy) -> None:
        self.name, self.port, self.proxy = name, port, proxy
        self._processes = processes
        self.kills = 0

    @property
    def pid(self) -> int:
        """Returns the id of the process that serves it now."""
        return self._processes.pids[self.name]

    def kill(self, pause: float) -> None:
        """Kills it; returns once another one serves."""
        self.kills += 1
        os.kill(self.pid, signal.SIGKILL)
        time.sleep(pause)
        self._processes.stop()
        self._processes = WorkerProcesses([_child(self.name, self.port)])
        self._processes.start()
        self._processes.wait_ready()

    def stop(self, pause: float) -> None:
        """Stops it for so many seconds."""
        os.kill(self.pid, signal.SIGSTOP)
        time.sleep(pause)
        os.kill(self.pid, signal.SIGCONT)

    def slow(self, rate: float, pause: float) -> None:
        """Lets so many bytes a second through, for so many seconds."""
        self.proxy.rate = rate
        time.sleep(pause)
        self.proxy.rate = 0.0

    def garbage(self, data: bytes) -> None:
        """Sends what is no message, past the proxy."""
        opening = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nUpgrade: websocket\r\n"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 2) as stranger:
            stranger.sendall(data if data[0] % 2 else opening.encode() + data)
            stranger.settimeout(0.2)
            stranger.recv(1000)

    def end(self) -> None:
        """Ends its process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
        self._processes.stop()


@contextlib.contextmanager
def _workers() -> Iterator[dict[str, Worker]]:
    with contextlib.ExitStack() as stack:
        names = (*TRAINING, HOLDING)
        all_processes = {name: WorkerProcesses([_child(name)]) for name in names}
        for processes in all_processes.values():
            processes.start()
            stack.callback(processes.stop)
        workers = {}
        for name, processes in all_processes.items():
            ready = processes.wait_ready()[name]
            workers[name] = worker = Worker(name, ready.port, processes, CuttingProxy(ready.uri))
            stack.callback(worker.end)
        yield workers


class Soak:
    """One run: four threads that end when its time is over."""

    def __init__(self, workers: dict[str, Worker], seconds: float, seed: int, faults: int = 0) -> None:
        self._workers, self._seconds, self._seed = workers, seconds, seed
        self._least, self._made = faults, 0
        """How many faults are made, whatever time that takes, and how many were."""
        self._began = time.monotonic()
        self._over = threading.Event()
        self._connected = threading.Barrier(3)
        """Rounds, pointers and failures begin together: a first connection that is cut is an error by right."""
        self.found = Found()

    def run(self) -> Found:
        """Runs until the time is over; raises nothing of what it finds."""
        with contextlib.ExitStack() as stack:
            uris = {
                name: stack.enter_context(worker.proxy.running()) for name, worker in self._workers.items()
            }
            parts = (
                lambda: self._train(uris), lambda: self._point(uris[HOLDING]), self._fail, self._sample,
            )  # fmt: skip
            threads = [threading.Thread(target=self._guarded, args=(part,), daemon=True) for part in parts]
            for thread in threads:
                thread.start()
            self._over.wait(self._seconds)
            while self._made < self._least and not self._over.wait(0.1):
                pass
            self._over.set()
            for thread in threads:
                thread.join(120)
                if thread.is_alive():
                    self.found.wrong.append(f"{thread.name} did not end: something hangs")
        return self.found

    def _guarded(self, part: Any) -> None:
        try:
            part()
        except Exception as error:
            self.found.wrong.append(f"{type(error).__name__}: {error}")
            self._over.set()
            self._connected.abort()

    # ------------------------------------------------------------------------------------------------- rounds

    def _train(self, uris: dict[str, str]) -> None:
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(WebsocketClientWorker(name, uri=uris[name], auto_add=False, reconnect=3))
                for name in TRAINING
            ]
            self._connected.wait(60)
            job = _job()
            scheduler = RoundScheduler(
                clients, job, dataset_key="d", seed=self._seed, min_workers=1, round_timeout=ROUND_TIMEOUT
            )
            asyncio.run(scheduler.prepare())
            alone = {name: stack.enter_context(_undisturbed(name)) for name in TRAINING}
            plain = {
                name: RoundScheduler([worker], job, dataset_key="d", seed=self._seed)
                for name, worker in alone.items()
            }
            for one in plain.values():
                asyncio.run(one.prepare())
            state, number = job.state, 0
            while not self._over.is_set():
                number += 1
                try:
                    result = asyncio.run(scheduler.run_round(number, state))
                except QuorumError:
                    self.found.below += 1
                    continue
                counted = [name for name in TRAINING if name not in result.missing]
                self.found.missing.update(why.kind for why in result.missing.values())
                expected = federated_avg(
                    {name: asyncio.run(plain[name].run_round(number, state)).state for name in counted}
                )
                if not _same(result.state, expected):
                    self.found.wrong.append(f"round {number} is not the average of {', '.join(counted)}")
                self.found.rounds += 1
                self.found.updates += len(counted)
                state = result.state

    # ----------------------------------------------------------------------------------------------- pointers

    def _point(self, uri: str) -> None:
        chance = random.Random(f"{self._seed} pointers")
        with WebsocketClientWorker(HOLDING, uri=uri, auto_add=False, reconnect=60, call_timeout=60) as client:
            self._connected.wait(60)
            tensor, added, kills = None, 0, 0
            while not self._over.is_set():
                try:
                    if tensor is None:
                        kills = self._workers[HOLDING].kills
                        tensor, added = send(torch.zeros(4), client), 0
                    for _ in range(chance.randint(1, _STEPS)):
                        tensor.add_(1)
                        added += 1
                        self.found.additions += 1
                    if chance.random() < 0.1:
                        values = torch.randn(chance.randint(1, 200_000))
                        if not torch.equal(send(values, client).get(), values):
                            self.found.wrong.append("a tensor came back with other values")
                    told = (tensor + 0).get()
                    self.found.looks += 1
                    if told.tolist() != [added] * 4:
                        self.found.wrong.append(f"{added} additions were made, and {told.tolist()} arrived")
                        tensor = None
                except WorkerTimeoutError:
                    self.found.late += 1
                except (SessionLostError, GonePointerError, WorkerLostError) as error:
                    if self._workers[HOLDING].kills == kills:
                        self.found.wrong.append(f"objects were lost with no restart: {error}")
                    self.found.lost_sessions += 1
                    tensor = None
                    # What is cut before it has connected is an error by right.
                    while not self._over.wait(0.2):
                        with contextlib.suppress(PlanrtError):
                            client.connect()
                            break

    # ----------------------------------------------------------------------------------------------- failures

    def _fail(self) -> None:
        chance = random.Random(f"{self._seed} faults")
        self._connected.wait(60)
        while not self._over.wait(chance.uniform(0.2, 2.0)):
            worker = self._workers[chance.choice((*TRAINING, HOLDING))]
            kind = chance.choices(FAULTS, weights=(1, 2, 4, 4, 2, 4))[0]
            self.found.faults[kind] += 1
            if kind == "kill":
                worker.kill(chance.uniform(0, 2))
            elif kind == "stop":
                worker.stop(chance.uniform(0.2, 5))
            elif kind == "cut":
                worker.proxy.cut()
            elif kind == "cut in a message":
                worker.proxy.cut_at(chance.choice(("up", "down")), chance.randint(0, 50_000))
            elif kind == "slow":
                worker.slow(chance.uniform(20_000, 500_000), chance.uniform(0.5, 3))
            else:
                worker.garbage(chance.randbytes(chance.randint(1, 5_000)))
            self._made += 1

    # ------------------------------------------------------------------------------------------------ figures

    def _sample(self) -> None:
        own = psutil.Process()
        while not self._over.wait(1.0):
            since = time.monotonic() - self._began
            figures = {
                "here: memory, MB": own.memory_info().rss / 1e6,
                "here: descriptors": float(own.num_fds()),
                "here: tasks": float(len(asyncio.all_tasks(background_loop()))),
                "here: threads": float(own.num_threads()),
            }
            for name, worker in self._workers.items():
                with contextlib.suppress(psutil.Error, KeyError):
                    process = psutil.Process(worker.pid)
                    if process.create_time() < time.time() - 20:  # what is imported late is there
                        figures[f"{name}: memory, MB"] = process.memory_info().rss / 1e6
                        figures[f"{name}: descriptors"] = float(process.num_fds())
            for key, value in figures.items():
                self.found.samples.setdefault(key, []).append((since, value))


@contextlib.contextmanager
def _undisturbed(name: str) -> Iterator[VirtualWorker]:
    data = {"alice": alice, "bob": bob, "charlie": charlie}[name]()
    with VirtualWorker(name, datasets={"d": data}, auto_add=False) as worker:
        yield worker


def _same(one: ModelState, other: ModelState) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def report(found: Found) -> str:
    """Returns what a run has found, for people."""
    missing = ", ".join(f"{count} {kind}" for kind, count in sorted(found.missing.items())) or "none"
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(found.faults.items()))
    lines = [
        f"faults:    {faults or 'none'}",
        f"rounds:    {found.rounds} made an average of {found.updates} updates; {found.below} without anybody",
        f"missing:   {missing}",
        f"pointers:  {found.additions} additions, looked at {found.looks} times; {found.lost_sessions} sessions "
        f"lost with their worker, {found.late} calls late",
        *(f"  {name}: {early:.0f} -> {late:.0f}" for name, (early, late) in sorted(found.flat().items())),
        f"wrong:     {len(found.wrong)}",
        *(f"  {one}" for one in found.wrong[:20]),
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Returns what reads the command line."""
    made = argparse.ArgumentParser(
        prog="benchmarks.soak", description="Rounds and pointers while workers and links fail."
    )
    made.add_argument("--minutes", type=float, default=2.0, help="how long faults are made (2)")
    made.add_argument("--faults", type=int, default=0, help="go on until so many were made (0)")
    made.add_argument("--seed", type=int, default=1, help="what the faults are drawn from (1)")
    made.add_argument("--json", type=Path, help="write all figures there")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; returns the exit code."""
    options = parser().parse_args(arguments)
    if not 0 < options.minutes <= 24 * 60:
        parser().error("--minutes must be above 0, and a day at most")
    logging.getLogger("planrt").setLevel(logging.ERROR)  # that workers are lost is what this is about
    with _workers() as workers:
        found = Soak(workers, options.minutes * 60, options.seed, options.faults).run()
    print(report(found))
    if options.json:
        told = {**found.__dict__, "flat": found.flat()}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
