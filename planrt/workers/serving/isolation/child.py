"""A process for the sessions of one user: an ordinary `WorkerHost` with an ordinary `WorkerState`.

It gets connections whose clients have proved who they are, and talks to these clients itself. What it may not do itself
it asks of the worker's own process: lines of the audit log, the owner's decisions about plans, connections to other
workers. It ends when that process does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from planrt.errors import ConnectError, LocalError
from planrt.logs import get_logger
from planrt.loop import new_event_loop
from planrt.plans.running import progress
from planrt.serde.frames import Limits
from planrt.workers.client.connection import Connection
from planrt.workers.machine.events import Event, Instruction, Received, Reply, ToPeer
from planrt.workers.machine.state import WorkerState
from planrt.workers.serving.compute import ComputeThread
from planrt.workers.serving.counts import Figures
from planrt.workers.serving.dialling import LINK_TIMEOUT, Dialling
from planrt.workers.serving.host import WorkerHost
from planrt.workers.serving.isolation.asking import (
    RelayedApprovals,
    RelayedAudit,
    RelayedBoard,
    RelayedBudget,
    RelayedFailures,
    RelayedJointRuns,
    RelayedRoom,
    RelayedTickets,
    RelayedToken,
)
from planrt.workers.serving.isolation.confining import (
    close_rings,
    confine,
    ends_with_its_parent,
    reopen_files,
)
from planrt.workers.serving.isolation.mappings import make_private
from planrt.workers.serving.isolation.messages import Calls, take
from planrt.workers.serving.isolation.watching import Slot
from planrt.workers.transport.pipes import Pipe
from planrt.workers.transport.taken import taken_up
from planrt.workers.wire import messages as m
from planrt.workers.wire.channel import Channel, Shown
from planrt.workers.wire.proofs import TicketProof

log = get_logger("planrt.worker")

PROCESS: Final = "process:"
"""How addresses of processes of the same worker begin. Only who was told one can use it."""
_REST: Final = 20
"""Times as long as it took to look what is still kept, it is not looked again."""
STOP_SECONDS = 1.0
"""Seconds that clients have to hear that the worker stops."""


@dataclass(frozen=True)
class Work:
    """Holds what every process for clients' work begins with, as it was when the worker started."""

    state: WorkerState
    limits: Limits
    dialling: Dialling
    threads: int | None
    audited: bool
    asks: bool
    """Whether there is a record of the owner's decisions."""
    memory: int | None
    """Bytes that one process may take beside what all share."""
    readable: tuple[Path, ...]
    counted: bool = False
    """Whether somebody watches what the worker counts."""
    keeps_joint_runs: bool = False


def run(
    work: Work, parent: int, gifts: socket.socket, calls: socket.socket, slot: Slot, lingers: float
) -> NoReturn:
    """Serves what is given through `gifts`, until the worker ends; the process of `parent` has just made this one.
    `lingers`: for how long it waits for another session after the last one, in seconds.
    """
    code = 1
    try:
        ends_with_its_parent(parent)
        ignore_signals()
        close_rings()
        reopen_files()
        make_private(slot.memory)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            loop = runner.get_loop()  # has its own sockets before there are no more
            confine(memory=work.memory, readable=work.readable)
            runner.run(_Serving(work, gifts, Calls(calls), slot, lingers, loop).serve())
        code = 0
    except BaseException as error:  # there is nobody above to hear of it
        log.critical("process_failed", worker=work.state.id, error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)  # what the worker's own process would do at its end is not for this one


def ignore_signals() -> None:
    """Leaves it to the worker's own process what Ctrl-C, and a signal to all of them, mean."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Reaching:
    """How this process reaches other workers, and other processes of its own one."""

    def __init__(self, dialling: Dialling, dial: Callable[[str, m.PeerAddress], Awaitable[Pipe]]) -> None:
        self._dialling, self._dial = dialling, dial

    async def connect(
        self, worker_id: str, peer: m.PeerAddress, limits: Limits, ticket: TicketProof | None = None
    ) -> Connection:
        """See `Dialling.connect`."""
        if not peer.address.startswith(PROCESS):
            return await self._dialling.connect(worker_id, peer, limits, ticket)
        pipe = await self._dial(worker_id, peer)
        return await Connection.open(pipe, worker_id, timeout=LINK_TIMEOUT, limits=limits)


class _Host(WorkerHost):
    """One that says what it is at."""

    slot: Slot
    calls: Calls

    def _work(self, event: Event, deliver: Callable[[ToPeer | Reply], None]) -> list[Instruction]:
        body = event.envelope.body if isinstance(event, Received) else event
        self.slot.began(type(body).__name__.lower())
        try:
            return super()._work(event, deliver)
        finally:
            self.slot.idle(len(self.state.store.objects))

    async def _handle(self, event: Event) -> None:
        await super()._handle(event)
        self.counts.told_first()  # what this event has counted besides answers
        if isinstance(event, Received) and isinstance(event.envelope.body, m.Hello):
            self.calls.tell("opened", event.connection, self.state.kept_name(event.connection))

    def note_counts(self) -> None:
        """Has what was counted where it outlives this process."""
        self.slot.count(self.counts.figures())


class _Serving:
    """The loop of such a process."""

    def __init__(
        self, work: Work, gifts: socket.socket, calls: Calls, slot: Slot, lingers: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        self._loop, self._gifts, self._calls, self._slot, self._lingers = loop, gifts, calls, slot, lingers
        self._work = work
        state = work.state
        audit = RelayedAudit(calls) if work.audited else None
        state.serve_alone(
            audit,
            RelayedApprovals(calls) if work.asks else None,
            RelayedBoard(state.id, calls),
            RelayedTickets(calls),
            RelayedJointRuns(state.id, calls) if work.keeps_joint_runs else None,
            RelayedFailures(calls),
        )
        state.accounts.ask(RelayedRoom(calls), RelayedRoom(calls, at_address=True), RelayedBudget(calls))
        work.dialling.opened_by = self._dial
        if work.dialling.dials.token:
            work.dialling.token = RelayedToken(calls)
        self._compute = ComputeThread(f"planrt-{state.id}", threads=work.threads)
        reaching = _Reaching(work.dialling, self._dial)
        self._host = _Host(state, self._compute, limits=work.limits, dialling=reaching, audit=audit)
        self._host.slot, self._host.calls = slot, calls
        if work.counted:
            self._host.counts.told_first = self._host.note_counts
        self._owners = state.store.count("")
        self._owned = state.overview.held() if work.counted else None
        self._told = Figures()
        self._tasks: set[asyncio.Task[None]] = set()
        self._siblings: set[asyncio.Task[None]] = set()
        """Connections of other processes of the worker."""
        self._keys = itertools.count(1)
        self._dialled: dict[int, asyncio.Future[tuple[list[Any], list[int]]]] = {}
        self._stop = asyncio.Event()

    async def serve(self) -> None:
        """Serves until the worker's own process says that it stops, or is gone."""
        progress.watch(self._slot.began)
        self._gifts.setblocking(False)
        self._loop.add_reader(self._gifts.fileno(), self._take)
        watching = [asyncio.create_task(one) for one in (self._watch_for_idleness(), self._give_room_back())]
        await self._stop.wait()
        for one in watching:
            one.cancel()
        self._host.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_SECONDS)

    def _take(self) -> None:
        try:
            taken = take(self._gifts)
        except BlockingIOError:
            return
        if taken is None:
            os._exit(0)  # whatever is being computed: nobody is there for it
        gift, files = taken
        match gift[0]:
            case "connection":
                task = asyncio.create_task(self._serve_one(gift, files[0]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case "joined":
                _, number, user = gift
                joined = asyncio.create_task(self._serve_sibling(number, user, files[0]))
                self._siblings.add(joined)
                joined.add_done_callback(self._siblings.discard)
            case "dialled":
                waiter = self._dialled.pop(gift[1], None)
                if waiter is not None and not waiter.done():
                    waiter.set_result((gift, files))
                elif files:
                    os.close(files[0])
            case "stop":
                self._stop.set()

    async def _serve_one(self, gift: list[Any], file: int) -> None:
        _, number, id, address, host, user, proof, hello, read, shown = gift
        channel = Channel(host, None, user, proof=proof, shown=None if shown is None else Shown(*shown))
        given = socket.socket(fileno=file)
        try:
            first = m.Envelope(id, m.from_wire(hello).body)
            pipe = await taken_up(
                given, read, address=address, limits=self._work.limits, channel=channel,
                first=first, sending=self._slot.sending,
            )  # fmt: skip
            await self._host.serve(pipe, number)
        except OSError as error:
            log.info("connection_lost", worker=self._work.state.id, client=address, error=str(error))
        finally:
            await self._tell_figures()
            self._calls.tell("closed", number, self._work.state.gives_way)

    async def _serve_sibling(self, number: int, user: str | None, file: int) -> None:
        """Serves another process of the worker, whose user that is."""
        with contextlib.suppress(OSError):
            pipe = await taken_up(
                socket.socket(fileno=file), b"", address="another process of this worker", limits=self._work.limits,
                channel=Channel(user=user, sibling=True),
            )  # fmt: skip
            await self._host.serve(pipe, number)

    async def _dial(self, worker_id: str, peer: m.PeerAddress) -> Pipe:
        """Has a connection to another worker opened."""
        key, waiter = next(self._keys), self._loop.create_future()
        self._dialled[key] = waiter
        self._calls.tell("dial", key, peer.worker, peer.address)
        try:
            gift, files = await asyncio.wait_for(waiter, 2 * LINK_TIMEOUT)
        except TimeoutError:
            raise ConnectError(f"no connection to {peer.address} in time", address=peer.address) from None
        finally:
            self._dialled.pop(key, None)
        _, _, why, host, binding, read = gift
        if not files:
            raise ConnectError(why, address=peer.address)
        return await taken_up(
            socket.socket(fileno=files[0]), read, address=peer.address, limits=self._work.limits,
            channel=Channel(host, binding), dialled=True,
        )  # fmt: skip

    async def _watch_for_idleness(self) -> None:
        state, since = self._work.state, self._loop.time()
        while True:
            await asyncio.sleep(1.0)
            await self._tell_figures()
            if self._tasks or state.has_sessions or state.store.count("") > self._owners:
                since = self._loop.time()
            elif self._loop.time() - since >= self._lingers:
                self._calls.tell("idle")
                since = self._loop.time()

    async def _give_room_back(self) -> None:
        """Has others have what this process was granted, and does not use, a moment later."""
        took = 0.0
        while True:
            await asyncio.sleep(max(1.0, _REST * took))
            began = self._loop.time()
            with contextlib.suppress(LocalError):  # the worker ends
                await self._compute.run(self._work.state.accounts.tidy)
            took = self._loop.time() - began

    async def _tell_figures(self) -> None:
        """Tells what this process counts and holds, beside what is the owner's, where somebody watches."""
        if self._owned is None:
            return
        overview, owned = self._work.state.overview, self._owned
        held = await asyncio.to_thread(overview.held)  # adding up can take a while
        now = msgspec.structs.replace(
            self._host.counts.figures(),
            sessions=held.sessions,
            objects=max(0, held.objects - owned.objects),
            bytes=max(0, held.bytes - owned.bytes),
            waiting=overview.waiting(),
        )
        if now != self._told:
            self._told = now
            self._calls.tell("figures", msgspec.to_builtins(now))
