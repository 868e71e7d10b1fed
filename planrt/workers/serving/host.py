"""Runs a `WorkerState`: serves pipes on the event loop and does the torch work on a compute thread.

One compute thread per worker keeps requests in order, and keeps the loop free to answer pings while torch
computes; what is known to take no time is done on the loop itself (`WorkerState.is_short`).
Virtual workers of a process share one compute thread with one torch thread: their results then do
not depend on how many there are, and equal those of websocket workers with one thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from planrt.errors import HandshakeError, LocalError, TransportError, WireError
from planrt.logs import get_logger
from planrt.serde import frames
from planrt.serde.frames import Frame, Limits, encode
from planrt.workers.machine import devices
from planrt.workers.machine.devices import deterministic_kernels
from planrt.workers.machine.events import (
    Again,
    Alarm,
    Arrived,
    Close,
    Connected,
    Cut,
    Disconnected,
    Distrust,
    Event,
    Expired,
    HandOn,
    Hold,
    Instruction,
    Introduce,
    Keep,
    Part,
    Probe,
    Probed,
    Received,
    Release,
    Reply,
    TimePassed,
    ToPeer,
    UsersChanged,
    Wait,
)
from planrt.workers.machine.failures import as_sent, failure_of
from planrt.workers.machine.sessions import check_fits
from planrt.workers.machine.state import WorkerState
from planrt.workers.serving import arriving
from planrt.workers.serving.arriving import Arriving
from planrt.workers.serving.audit_file import AuditError
from planrt.workers.serving.compute import ComputeThread
from planrt.workers.serving.counts import Elsewhere as Counted
from planrt.workers.serving.counts import HostCounts, WatchedWorker
from planrt.workers.serving.guesses import Guesses
from planrt.workers.serving.links import Links, Reaching
from planrt.workers.serving.openings import OPENING_SECONDS, Openings, no_tensors
from planrt.workers.serving.outgoing import Outgoing
from planrt.workers.transport.pipes import Pipe
from planrt.workers.transport.places import most_of_all
from planrt.workers.wire import messages as m
from planrt.workers.wire.channel import Channel

T = TypeVar("T")

log = get_logger("planrt.worker")


PROBE_SECONDS = 3.0
"""Seconds within which a connection must give a sign of life, when another one shows the secret of its session."""

_OF_FILES = 1 / 3
"""Part of the files of the process that connections may be: with TLS and isolation each takes three."""

TURN = 0.05
"""Seconds that the ops of one message may run while others wait; an op that runs is not interrupted."""

_all_serving: set[asyncio.Task[Any]] = set()
"""Connections being served, of all hosts. Workers of a process refer to each other in circles: without this, Python
would collect such a circle with its connections under way, and end their coroutines where they stand."""


class AuditLog(Protocol):
    """The owner's log: `AuditFile`, or who has it written."""

    @property
    def waiting(self) -> bool:
        """True where there are events to write."""

    def write(self) -> None:
        """Writes them. Raises AuditError where that does not work."""

    def finish(self) -> None:
        """Writes what waits for more of its kind, as far as that works: the worker stops."""


class Elsewhere(Counted, Protocol):
    """Other processes, which serve the sessions of a worker; see `planrt.workers.serving.isolation`."""

    async def hand_on(self, pipe: Pipe, asked: HandOn) -> None:
        """Lets one of them go on with a connection; returns when that has ended.

        Raises:
            HandshakeError: none can.
        """


class WorkerHost:
    """Serves one worker to any number of pipes, on one event loop."""

    def __init__(
        self,
        state: WorkerState,
        compute: ComputeThread,
        *,
        limits: Limits | None = None,
        dialling: Reaching | None = None,
        audit: AuditLog | None = None,
        isolation: Elsewhere | None = None,
    ) -> None:
        self.state = state
        self._isolation = isolation
        self._handed_on: dict[int, HandOn] = {}
        """Connections that others go on with from here on."""
        self._audit = audit
        self._writing = asyncio.Lock()
        """Held while that is written: what comes of events leaves in their order."""
        self._unwritten = 0
        """Events of which nothing leaves before that is written: what comes of later ones leaves after them. (The lock
        does not tell: it is free for a moment when it goes from one to the next.)"""
        self._compute = compute
        self._limits = limits or Limits()
        self._numbers = itertools.count(1)
        self._pipes: dict[int, Pipe] = {}
        self._outgoing: dict[int, Outgoing] = {}
        """What is sent to each of them."""
        self._closing: set[asyncio.Task[None]] = set()
        """What closes connections for which nobody waits."""
        self._telling: set[asyncio.Task[None]] = set()
        """What tells the state machine of answers that have arrived."""
        self._serving: set[asyncio.Task[Any]] = set()
        self._ended: dict[int, asyncio.Event] = {}
        """Connection -> set once its end has been handled."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        """Session -> when it is over, unless its client comes back."""
        self._expiring: set[asyncio.Task[None]] = set()
        self._guesses = Guesses()
        self._openings = Openings(self._limits.connections, most_of_all(_OF_FILES))
        quota = state.accounts.quota.memory
        most = max(arriving.MOST if quota is None else quota, self._limits.message)
        most = self._limits.arriving_memory or most
        of_all = self._limits.worker_arriving_memory or max(most, arriving.MOST_OF_ALL)
        self._arriving = Arriving(most, of_all)
        self._links = Links(state.id, self._handle, self._limits, dialling)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self.device_lost = asyncio.Event()
        """Is set once the worker's device computes no more."""
        self._holds: dict[int, asyncio.Event] = {}
        """Connections that are held, or were released just before -> set when they go on."""
        self._gone: set[int] = set()
        """Connections that have ended, and whose `Disconnected` is to come."""
        self._alarms: set[asyncio.Task[None]] = set()
        self.counts = HostCounts()
        """Of what clients said, and were told."""
        self._between = HostCounts()
        """The same of other processes of the worker, which nobody is told."""
        self.watched = WatchedWorker(
            state.id,
            state.overview,
            self.counts,
            busy=lambda: compute.busy,
            trouble=self._trouble,
            elsewhere=isolation,
        )
        """The worker as monitoring sees it."""

    def _trouble(self) -> str:
        return "device lost" if self.device_lost.is_set() else "stopping" if self._stopping else ""

    def stop(self) -> None:
        """Stops serving every connection, without waiting for what is being computed."""
        self._stopping = True
        for task in self._serving:
            task.cancel()
        for task in self._alarms:
            task.cancel()
        for task in self._closing | self._telling:
            task.cancel()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._links.close()
        if self._audit is not None:
            self._audit.finish()

    async def change_users(self, users: Mapping[str, str]) -> None:
        """Serves these users from now on; sessions of a token that is nobody's any more end."""
        await self._handle(UsersChanged(users))

    async def serve(self, pipe: Pipe, number: int | None = None) -> None:
        """Serves one connection until it ends. Bytes that are no message end it; nothing ends the worker.

        `number` is what the process calls it that has accepted it.
        """
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"  # noqa: S101 - for the type checker
        self._serving.add(task)
        _all_serving.add(task)
        try:
            await self._serve(pipe, next(self._numbers) if number is None else number)
        except asyncio.CancelledError:
            if self._stopping:
                await self._say(pipe, m.Bye())  # or its client would try to go on with its session
            await pipe.close()
            if not self._stopping:
                raise
        finally:
            self._serving.discard(task)
            _all_serving.discard(task)

    async def _serve(self, pipe: Pipe, number: int) -> None:
        self._pipes[number] = pipe
        self._ended[number] = asyncio.Event()
        counts = self._between if pipe.channel.sibling else self.counts
        counts.opened(pipe.traffic)
        log.debug("connected", worker=self.state.id, client=pipe.address)
        if pipe.channel != Channel():
            await self._handle(Connected(number, pipe.channel))
        watching = asyncio.create_task(self._watch(number, pipe))
        try:
            with self._openings.place(pipe.channel.host):
                await self._take_messages(number, pipe)
        except TransportError as error:
            log.warning("bad_message", worker=self.state.id, client=pipe.address, error=str(error))
            await self._complain(pipe, error)
        except ConnectionError as error:
            log.info("connection_lost", worker=self.state.id, client=pipe.address, error=str(error))
        except Exception as error:  # a mistake of ours: this client is told, the others go on
            log.exception("serving_failed", worker=self.state.id, client=pipe.address)
            await self._complain(pipe, WireError(f"the worker failed: {error}", address=pipe.address))
        finally:
            if number in self._gone:
                await asyncio.wait([watching])  # others may be told of its end still
                self._gone.discard(number)
            watching.cancel()
            self._drop(number)
            del self._pipes[number]
            self._arriving.over(number)
            counts.closed(pipe.traffic)
            self._holds.pop(number, None)
            log.debug("disconnected", worker=self.state.id, client=pipe.address)
        try:
            await self._handle(Disconnected(number))
        finally:
            self._ended.pop(number).set()
        await pipe.close()

    async def _watch(self, number: int, pipe: Pipe) -> None:
        """Notices the end of a connection from which nothing is read, since it is held."""
        await pipe.gone()
        self._gone.add(number)
        if number in self._holds:
            await self._handle(Cut(number))

    async def _take_messages(self, number: int, pipe: Pipe) -> None:
        """Handles what arrives, one message after the other, until the pipe ends."""
        opening = bool(pipe.channel.host)  # within a process nobody has to be held off
        room = partial(self._arriving.room, number, self.state.whose, pipe.address)
        while True:
            if number in self._arriving.begun:
                self._arriving.over(number)
            outgoing = self._outgoing.get(number)
            # Who does not take its answers is given no more of them.
            if outgoing is not None and outgoing.sender is not None:
                await outgoing.empty()
            opening = opening and not self.state.is_open(number)
            received = await (self._opening_message(pipe) if opening else pipe.receive(room))
            if received is None:
                return
            event = Received(number, received.message, received.tensors)
            # Neither request nor reply may outlive its turn: they can be as large as a model.
            del received
            if type(event.envelope.body) is m.Prove and pipe.channel.host:
                async with self._guesses.turn(pipe.channel.host):
                    await self._handle(event)
            else:
                await self._handle(event)
            del event
            if number in self._handed_on and self._isolation is not None:
                await self._isolation.hand_on(pipe, self._handed_on.pop(number))
                return

    async def _opening_message(self, pipe: Pipe) -> frames.Received[m.Envelope] | None:
        """Takes a message of the handshake, for which nobody has much time or room."""
        try:
            async with asyncio.timeout(OPENING_SECONDS):
                return await pipe.receive(no_tensors)
        except TimeoutError:
            reason = f"no handshake in {OPENING_SECONDS:g} s"
            raise HandshakeError(reason, address=pipe.address) from None

    def _work(self, event: Event, deliver: Callable[[ToPeer | Reply], None]) -> list[Instruction]:
        """Handles an event, on the compute thread as a rule. What is for others is given to `deliver`, and leaves
        meanwhile, unless the owner's log is to be written before."""
        end = time.monotonic() + TURN
        at_once = None if self._audit is not None else deliver
        if not self.state.deterministic:
            return self.state.handle(event, lambda: time.monotonic() >= end, at_once)
        with deterministic_kernels(True):
            return self.state.handle(event, lambda: time.monotonic() >= end, at_once)

    def _deliver(self, message: ToPeer | Reply) -> None:
        assert self._loop is not None  # noqa: S101 - an event has been handed in on it
        with contextlib.suppress(RuntimeError):  # it is gone: this process ends
            self._loop.call_soon_threadsafe(self._deliver_now, message)

    def _deliver_now(self, message: ToPeer | Reply) -> None:
        if isinstance(message, ToPeer):
            self._links.send(message)
        else:
            self._send_soon(message.connection, message.envelope, message.tensors)

    async def _handle(self, event: Event) -> None:
        left = [event]
        own = event.connection if isinstance(event, Received) else None
        lost: ConnectionError | None = None
        while left:  # to the end, though nobody may hear of it: a message is done whole
            event = left.pop()
            instructions = None
            # What came before it has left, and it takes no time: it is done on the loop.
            if not (self._writes or self._compute.asked) and self.state.is_short(event):
                instructions = self._compute.run_here(self._work, event, self._deliver_now)
            if instructions is None:
                self._loop = asyncio.get_running_loop()
                instructions = await self._compute.run(self._work, event, self._deliver)
            if self._writes:
                instructions = await self._written(event, instructions)
            # Before anything that waits, or what comes of other events overtakes it.
            self._send_to_others(instructions)
            for instruction in instructions:
                match instruction:
                    case ToPeer() | Introduce() | Part():
                        pass  # these have left
                    case Wait():
                        pass  # the state machine remembers the request; PeerAnswered or PeerFailed wakes it
                    case Reply(connection, envelope, tensors) if connection == own:
                        lost = await self._send(connection, envelope, tensors) or lost
                    case Reply(connection, envelope, tensors):
                        self._send_soon(connection, envelope, tensors)
                    case Close(connection) if connection == own:
                        if connection in self._pipes:
                            await self._out(connection).close()
                    case Close(connection):
                        self._close_soon(connection)
                    case Distrust(connection):
                        self._distrust(connection)
                    case Again(rest):  # the compute thread first takes what has waited meanwhile
                        left.append(rest)
                    case Alarm(seconds, key):
                        self._set_alarm(seconds, key)
                    case Hold(connection, rest_of_it):
                        released = self._holds.setdefault(connection, asyncio.Event())
                        if connection in self._gone and not released.is_set():
                            await self._handle(Cut(connection))
                        await released.wait()
                        del self._holds[connection]
                        if rest_of_it is not None:
                            left.append(rest_of_it)
                    case Release(connection):
                        if connection in self._pipes:
                            self._holds.setdefault(connection, asyncio.Event()).set()
                    case HandOn(connection):
                        self._handed_on[connection] = instruction
                    case Probe(connection, held_by):
                        left.append(Probed(connection, await self._answers(held_by)))
                    case Keep():
                        self._keep(instruction)
            if self.state.device.type != "cpu" and any(map(_failed, instructions)):
                await self._try_device()
        if lost is not None:
            raise lost

    def _send_to_others(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case ToPeer():
                    self._links.send(instruction)
                case Introduce(peer, secret):
                    self._links.introduce(peer, secret)
                case Part(peers):
                    self._links.part(peers)

    async def _try_device(self) -> None:
        """Looks whether what failed has brought down the device: a text that says so could be a client's."""
        if not await self._compute.run(devices.answers, self.state.device):
            log.critical("device_lost", worker=self.state.id, device=str(self.state.device))
            self.device_lost.set()

    def _set_alarm(self, seconds: float, key: str) -> None:
        async def ring() -> None:
            await asyncio.sleep(seconds)
            await self._handle(TimePassed(key))

        task = asyncio.create_task(ring())
        self._alarms.add(task)
        task.add_done_callback(self._alarms.discard)

    def _out(self, connection: int) -> Outgoing:
        found = self._outgoing.get(connection)
        if found is None:
            pipe = self._pipes[connection]
            arrived = partial(self._arrived, connection)
            found = self._outgoing[connection] = Outgoing(pipe, self._limits, arrived)
        return found

    def _arrived(self, connection: int, id: int) -> None:
        """A client has an answer: the state machine, which others may have at work, keeps it no longer."""
        task = asyncio.create_task(self._handle(Arrived(connection, id)))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _send(
        self, connection: int, envelope: m.Envelope, tensors: Sequence[torch.Tensor]
    ) -> ConnectionError | None:
        """Sends the answer to what `connection` brought; returns why it does not carry it, which is for who reads from
        it to see."""
        if connection in self._pipes:
            try:
                frame = self._encode(connection, envelope, tensors)
                await self._out(connection).send(frame, envelope.id)
            except ConnectionError as error:
                return error
        return None

    def _send_soon(self, connection: int, envelope: m.Envelope, tensors: Sequence[torch.Tensor]) -> None:
        """Has an answer sent that comes of something else than a message of `connection`: nobody waits for its client,
        which is cut off where it leaves too many."""
        pipe = self._pipes.get(connection)
        if pipe is None:
            return
        if self._out(connection).add(self._encode(connection, envelope, tensors), envelope.id):
            return
        log.warning("does_not_read", worker=self.state.id, client=pipe.address)
        self._drop(connection)
        self._close_soon(connection)

    def _close_soon(self, connection: int) -> None:
        if connection in self._pipes:
            task = asyncio.create_task(self._out(connection).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _drop(self, connection: int) -> None:
        """Forgets what waits to be sent on a connection."""
        if (outgoing := self._outgoing.pop(connection, None)) is not None:
            outgoing.drop()

    async def _answers(self, connection: int) -> bool:
        """Returns whether a connection gives a sign of life. If it does not, it has ended when this returns."""
        pipe, ended = self._pipes.get(connection), self._ended.get(connection)
        if pipe is not None and await pipe.answers(PROBE_SECONDS):
            return True
        if pipe is not None:
            await pipe.close()
        if ended is not None:
            await ended.wait()  # what it brought is done first
        return False

    def _keep(self, keep: Keep) -> None:
        """Sets the time at which a session is over."""

        def expire() -> None:
            self._timers.pop(keep.session, None)
            task = asyncio.create_task(self._handle(Expired(keep.session, keep.absence)))
            self._expiring.add(task)
            task.add_done_callback(self._expiring.discard)

        if (before := self._timers.pop(keep.session, None)) is not None:
            before.cancel()
        self._timers[keep.session] = asyncio.get_running_loop().call_later(keep.seconds, expire)

    @property
    def _writes(self) -> bool:
        """Whether the owner's log is to be written before anything else leaves."""
        return self._audit is not None and (self._unwritten > 0 or self._audit.waiting)

    async def _written(self, event: Event, instructions: list[Instruction]) -> list[Instruction]:
        """`instructions`, once the owner's log has what they come of. Where that cannot be written nobody is sent
        anything, and who asked loses the connection: an owner who keeps a log wants nothing to leave beside it.
        """
        assert self._audit is not None  # noqa: S101 - there is something to write
        self._unwritten += 1
        try:
            async with self._writing:
                await asyncio.to_thread(self._audit.write)
        except RuntimeError:  # this process ends: as in ComputeThread.run
            raise asyncio.CancelledError from None
        except AuditError as error:
            refused: list[Instruction] = []
            for one in instructions:
                if isinstance(one, Reply):
                    self.state.keep_no_longer(one.connection)  # or it could be had over the next connection
                    failure = m.Failure("AuditError", str(error))
                    refused += [
                        Reply(one.connection, m.Envelope(one.envelope.id, failure)),
                        Close(one.connection),
                    ]
                elif not (isinstance(one, ToPeer | Again) and isinstance(event, Received)):
                    refused.append(one)
            if isinstance(event, Received):
                self.state.keep_no_longer(event.connection)
            if isinstance(event, Received) and not any(isinstance(one, Close) for one in refused):
                refused.append(Close(event.connection))
            return refused
        finally:
            self._unwritten -= 1
        return instructions

    def _distrust(self, connection: int) -> None:
        pipe = self._pipes.get(connection)
        if pipe is not None:
            wait = self._guesses.wrong(pipe.channel.host) if pipe.channel.host else 0.0
            log.warning("wrong_proof", worker=self.state.id, client=pipe.address, next_one_waits=wait)

    def _encode(self, connection: int, envelope: m.Envelope, tensors: Sequence[torch.Tensor]) -> Frame:
        """An answer as it is sent; where the client does not take it, or it has no byte form, that is the answer."""
        pipe = self._pipes.get(connection)
        counts = self._between if pipe is not None and pipe.channel.sibling else self.counts
        counts.told(envelope.body)
        if isinstance(envelope.body, m.Failure):
            told = as_sent(envelope.body)
            log.info("refused", worker=self.state.id, kind=told.kind, why=told.message)
            envelope = m.Envelope(envelope.id, told, envelope.seen)
        client = self.state.accepted_by(connection)
        try:
            check_fits(client, tensors)
            return encode(m.to_wire(envelope), tensors, max_header=client.header_limit)
        except Exception as error:  # a result that does not travel: it fails its own request, and no other
            failure = failure_of(error)
        counts.told(failure)
        try:
            return encode(
                m.to_wire(m.Envelope(envelope.id, failure, envelope.seen)), max_header=client.header_limit
            )
        except LocalError:  # a client that takes next to nothing
            return encode(
                m.to_wire(
                    m.Envelope(envelope.id, m.Failure(failure.kind, failure.message[:200]), envelope.seen)
                )
            )

    async def _complain(self, pipe: Pipe, error: TransportError) -> None:
        """Tells the client what was wrong with its bytes, as far as the connection still carries it."""
        self.counts.bad_messages.add(type(error).__name__)
        await self._say(pipe, as_sent(m.Failure(type(error).__name__, str(error))))

    async def _say(self, pipe: Pipe, body: m.Body) -> None:
        """Sends what answers nothing, as far as the connection still carries it."""
        try:
            await asyncio.wait_for(pipe.send(encode(m.to_wire(m.Envelope(0, body)))), timeout=2)
        except (ConnectionError, TimeoutError):
            log.debug("undelivered", worker=self.state.id, client=pipe.address, what=type(body).__name__)


def _failed(instruction: Instruction) -> bool:
    return isinstance(instruction, Reply) and isinstance(instruction.envelope.body, m.Failure)


_virtual_lock = threading.Lock()
_virtual_thread: ComputeThread | None = None


def virtual_compute() -> ComputeThread:
    """Returns the compute thread that all virtual workers of this process share, with one torch thread on any
    machine.
    """
    global _virtual_thread
    with _virtual_lock:
        if _virtual_thread is None:
            _virtual_thread = ComputeThread("planrt-virtual", threads=1)
        return _virtual_thread
