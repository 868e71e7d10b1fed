"""The worker's own process, as the one that has the others: it makes, feeds, watches and ends them.

Nothing of a client is computed here. What touches the outside stays here: sockets that listen, TLS and its keys, who
clients are, the audit log, the owner's decisions, and which other workers may be dialled.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple
from typing import Any, Final, Protocol

from planrt.errors import HandshakeError, IsolationError
from planrt.logs import get_logger
from planrt.metrics import Family, counted, gauge
from planrt.plans.policy.approvals import Approvals
from planrt.plans.policy.budgets import CountsFailures
from planrt.plans.policy.quotas import Quota
from planrt.serde.frames import Limits, encode
from planrt.workers.machine.access import Access
from planrt.workers.machine.events import HandOn
from planrt.workers.machine.handshakes import REVOKED
from planrt.workers.serving.audit_file import AuditFile
from planrt.workers.serving.counts import Figures, added_up
from planrt.workers.serving.dialling import Dialling
from planrt.workers.serving.isolation.answering import Answers, Process, Tickets
from planrt.workers.serving.isolation.messages import gift_sockets, give, hear, take
from planrt.workers.serving.isolation.watching import SLOTS, Slot
from planrt.workers.serving.joint_folder import JointFolder
from planrt.workers.transport.passing import Passed
from planrt.workers.transport.pipes import Pipe
from planrt.workers.wire import messages as m
from planrt.workers.wire.channel import caller
from planrt.workers.wire.refusals import SESSION_ENDED

log = get_logger("planrt.worker")

START_SECONDS: Final = 120.0
"""Seconds that the zygote may take to import what it needs, on a busy machine."""
STOP_SECONDS: Final = 3.0
"""Seconds that processes have to end by themselves when the worker stops."""
OF_ONE_ADDRESS: Final = 32
"""Processes for nobody's sessions from one address: of more, one that has no connection goes."""
FOR_NOBODY: Final = SLOTS - 64
"""Processes for nobody's sessions: the rest are for users."""
LINGERS: Final = 30.0
"""Seconds that the process of a user waits for another session, with the plans that it was sent."""
_GIVING_SECONDS: Final = 5.0
_LONGEST_NAME: Final = 200


class Passing(Protocol):
    """A pipe that another process can go on with."""

    async def let_go(self) -> Passed:
        """Lets go of it between two messages."""


class Isolation:
    """The processes for clients' work of one worker.

    Args:
        zygote: the socket to it (`zygote.start`).
        page: the memory that processes say in what they are at.
        kernel_timeout: seconds that one op may take, inf for as long as it likes.
        audit, approvals, dialling: the owner's log, the owner's decisions, and how other workers are reached.
        access: which user may do what. knows: whether the token of that id is still a user's.
        tickets: takes note of tickets, which are proved to this process.
        joint_runs: the owner's folder for joint runs. quota: what users may keep, each and all together.
        failures: counts runs that failed on data, over all processes. max_pending: plans of one user that may wait.
    """

    def __init__(
        self,
        worker_id: str,
        zygote: socket.socket,
        page: mmap.mmap,
        *,
        kernel_timeout: float,
        limits: Limits,
        dialling: Dialling,
        audit: AuditFile | None,
        approvals: Approvals | None,
        tickets: Tickets,
        access: Access | None = None,
        knows: Callable[[str], bool] = lambda token: True,
        joint_runs: JointFolder | None = None,
        quota: Quota | None = None,
        failures: CountsFailures | None = None,
        max_pending: int | None = None,
    ) -> None:
        self._knows = knows
        self._worker_id, self._zygote, self._page = worker_id, zygote, page
        self._kernel_timeout, self._audit = kernel_timeout, audit
        self._processes: dict[int, Process] = {}
        self._answers = Answers(
            worker_id, limits, dialling, audit, approvals, tickets, self._opened, self._dismiss,
            others=lambda: self._processes, access=access, joint_runs=joint_runs, quota=quota, failures=failures,
            max_pending=max_pending,
        )  # fmt: skip
        self._numbers = 0
        self._lost = 0
        self._ended = Figures()
        """What processes have counted that have ended."""
        self._counting = threading.Lock()
        """Held while a process goes from those that there are to those that have ended."""
        self._by_key: dict[str, Process] = {}
        self._by_session: dict[str, Process] = {}
        self._free = list(range(SLOTS))
        self._ready = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.failed = asyncio.Event()
        """Is set once there can be no more processes."""
        self._stopping = False
        self._none_left = asyncio.Event()
        """Is set once the last process has ended, while the worker stops."""

    async def start(self) -> None:
        """Waits until there can be processes.

        Raises:
            IsolationError: there cannot.
        """
        asyncio.get_running_loop().add_reader(self._zygote.fileno(), self._from_zygote)
        waits = [asyncio.create_task(one.wait()) for one in (self._ready, self.failed)]
        await asyncio.wait(waits, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for one in waits:
            one.cancel()
        if self.failed.is_set() or not self._ready.is_set():
            raise IsolationError("the process that others are copies of did not start: see its log")
        self._run(self._watch())

    async def hand_on(self, pipe: Pipe, asked: HandOn) -> None:
        """Lets the process for that client's sessions go on with a connection; returns when it has ended.

        Raises:
            HandshakeError: there is no process for it.
        """
        process = await self._process_for(pipe, asked)
        if not self._knows(asked.token):  # it was taken away meanwhile
            raise HandshakeError(REVOKED, address=pipe.address)
        process.tokens.add(asked.token)
        passing: Any = pipe
        process.gives_way = False
        passed = await passing.let_go()
        ended = process.connections[asked.connection] = asyncio.get_running_loop().create_future()
        try:
            hello = m.to_wire(m.Envelope(asked.id, asked.hello))
            gift = [
                "connection", asked.connection, asked.id, pipe.address, pipe.channel.host, asked.user, asked.proof,
                hello, passed.read, None if asked.shown is None else list(astuple(asked.shown)),
            ]  # fmt: skip
            why: str | None = "the process for its user's work takes no more connections"
            if await self._give(process, gift, passed.give.fileno()):
                passed.given()
                why = await ended
            if why is not None and not process.slot.read().sending:
                kind, why = ("HandshakeError", REVOKED) if process.revoked else (SESSION_ENDED, why)
                failure = m.Failure(kind, why)
                await passed.say(encode(m.to_wire(m.Envelope(0, failure))))
        finally:
            process.connections.pop(asked.connection, None)
            await passed.close()

    def processes(self) -> dict[str, int]:
        """Returns whose processes there are, and their numbers in the system."""
        return {
            one.key: one.made.result()
            for one in self._processes.values()
            if one.made.done() and not one.made.cancelled()
        }

    def figures(self) -> Figures:
        """See `Elsewhere` of `planrt.workers.serving.counts`."""
        with self._counting:
            all = [self._ended, *(one.figures for one in list(self._processes.values()))]
        return added_up(all)

    def families(self) -> Iterable[Family]:
        """See `Elsewhere`."""
        yield gauge("planrt_worker_processes", "Processes for clients' work that there are.", self.number())
        yield counted(
            "planrt_worker_processes_lost", "Those that have crashed, or took too long.", self._lost
        )

    def number(self) -> int:
        """See `Elsewhere`."""
        return len(self._processes)

    def computing(self) -> bool:
        """See `Elsewhere`."""
        return any(one.slot.read().since for one in list(self._processes.values()))

    def end_revoked(self) -> None:
        """Ends the processes with sessions whose token counts no longer: the owner has changed the users."""
        for one in list(self._processes.values()):
            if not all(map(self._knows, one.tokens)):
                one.revoked = True
                self._kill(one, "the token of its user counts no longer")

    def abandon(self) -> None:
        """Ends it before it has started."""
        self._zygote.close()

    async def stop(self) -> None:
        """Ends all processes: their clients are told, where that takes no longer than a moment. Twice is fine."""
        if self._stopping:
            return
        self._stopping = True
        for one in list(self._processes.values()):
            self._dismiss(one)
        if self._processes and not self.failed.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._none_left.wait(), STOP_SECONDS)
        for one in list(self._processes.values()):
            self._kill(one, "")
        for task in list(self._tasks):
            task.cancel()
        await self._answers.close()
        with contextlib.suppress(OSError, ValueError):
            asyncio.get_running_loop().remove_reader(self._zygote.fileno())
        self._zygote.close()  # which ends the zygote, and with it whatever is left

    # ------------------------------------------------------------------------------- making and ending

    async def _process_for(self, pipe: Pipe, asked: HandOn) -> Process:
        resume = asked.hello.resume
        key = f"user {asked.user}" if asked.user is not None else f"nobody, connection {asked.connection}"
        process = self._by_key.get(key)
        if asked.user is None and resume is not None:
            process = self._by_session.get(resume.session)
        if process is None or process.leaving or process.killed_for or _has_ended(process):
            process = self._make(key, asked.user, pipe)
        try:
            await asyncio.shield(process.made)
        except IsolationError as error:
            raise HandshakeError(str(error), address=pipe.address) from None
        return process

    def _check_room(self, user: str | None, pipe: Pipe) -> None:
        """Raises HandshakeError unless there is room for one more process, or makes some."""
        address = pipe.address
        if self._stopping or self.failed.is_set():
            raise HandshakeError("this worker stops", address=address)
        if user is None:
            of_nobody = [one for one in self._processes.values() if one.user is None]
            same = [
                one for one in of_nobody if caller(one.host) == caller(pipe.channel.host) and not one.leaving
            ]
            if len(same) >= OF_ONE_ADDRESS:
                keeps = self._answers.board.publishes
                unused = (
                    one for one in same if one.made.done() and not one.connections and not keeps(one.number)
                )
                if (gone := next(unused, None)) is None:
                    raise HandshakeError(
                        f"{OF_ONE_ADDRESS} processes work for your address, or keep what it published, as many as "
                        "it may have: close a session, or take back what was published",
                        address=address,
                    )
                self._dismiss(gone)
            if len(of_nobody) >= FOR_NOBODY:
                raise HandshakeError(
                    f"{FOR_NOBODY} processes work for clients without a user, as many as may: try again later",
                    address=address,
                )
        if not self._free:
            raise HandshakeError(
                f"this worker has {SLOTS} processes for its clients' work, as many as it may: try again later",
                address=address,
            )

    def _make(self, key: str, user: str | None, pipe: Pipe) -> Process:
        self._check_room(user, pipe)
        index = self._free.pop()
        slot = Slot(self._page, index)
        slot.clear()
        gifts, its_gifts = gift_sockets()
        calls, its_calls = socket.socketpair()
        self._numbers += 1
        gifts.setblocking(False)
        made: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        process = Process(self._numbers, key, user, pipe.channel.host, slot, index, gifts, made)
        self._processes[process.number] = self._by_key[key] = process
        try:
            lingers = LINGERS if user is not None else 0.0
            give(
                self._zygote,
                ["make", process.number, index, lingers],
                [its_gifts.fileno(), its_calls.fileno()],
            )
        except OSError as error:
            calls.close()
            self._over(process, f"it could not be made: {error.strerror}")
            raise HandshakeError("no process can be made for your work now", address=pipe.address) from None
        finally:
            its_gifts.close()
            its_calls.close()
        process.hearing = self._run(hear(calls, lambda call: self._answers.answer(process, call)))
        return process

    def _run(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _from_zygote(self) -> None:
        try:
            taken = take(self._zygote)
        except BlockingIOError:
            return
        if taken is None:
            asyncio.get_running_loop().remove_reader(self._zygote.fileno())
            if not self._stopping:
                log.critical("zygote_lost", worker=self._worker_id)
                self.failed.set()
                for one in list(self._processes.values()):
                    self._over(one, "the worker lost the process that makes others")
            return
        message = taken[0]
        process = self._processes.get(message[1]) if len(message) > 1 else None
        match message[0]:
            case "ready":
                self._ready.set()
            case "made" if process is not None:
                with contextlib.suppress(OSError):  # it has ended already, which is told next
                    process.end = os.pidfd_open(message[2])
                if not process.made.done():
                    process.made.set_result(message[2])
                if process.killed_for:
                    self._kill(process, process.killed_for)
            case "died" if process is not None:
                self._over(process, self._why(process, message[2]))

    def _why(self, process: Process, status: int) -> str | None:
        """Why a process has ended, in words for its clients; None if it was told to."""
        if process.leaving and os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return None
        seen = process.slot.read()
        by = f"ended with code {os.waitstatus_to_exitcode(status)}"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            with contextlib.suppress(ValueError):
                by = f"was ended by {signal.Signals(number).name}"
        what = seen.what[:_LONGEST_NAME] if seen.since else ""
        if process.killed_for:
            by = f"was ended, since {process.killed_for}"
        elif what:
            by += f" while {what} ran"
        return f"the process for its user's work {by}: its objects are gone ({seen.objects:,})"

    def _over(self, process: Process, why: str | None) -> None:
        """A process is there no longer."""
        with self._counting:
            if self._processes.pop(process.number, None) is None:
                return
            self._ended = added_up([self._ended, process.slot.counted(process.figures).ended()])
        if self._stopping and not self._processes:
            self._none_left.set()
        self._answers.over(process)
        if self._by_key.get(process.key) is process:
            del self._by_key[process.key]
        for name in process.names:
            self._by_session.pop(name, None)
        if why is not None and not self._stopping and not process.revoked:
            self._lost += 1
            seen = process.slot.read()
            if seen.since:  # when it ends can depend on the data, as whether a run fails
                self._answers.run_failed(process)
            log.error("process_lost", worker=self._worker_id, whose=process.key, why=why)
            if self._audit is not None:
                user = process.user or ""
                op = seen.what if seen.since else None
                event = {"event": "process_lost", "user": user, "outcome": "failed", "op": op}
                self._audit.record({key: value for key, value in event.items() if value is not None})
                self._run(self._answers.write_audit())
        for ended in process.connections.values():
            if not ended.done():
                ended.set_result(why)
        if not process.made.done():
            process.made.set_exception(IsolationError("no process can be made for your work now"))
            process.made.exception()  # whoever waits for it hears of it; often nobody does
        for task in process.dials:
            task.cancel()
        process.gifts.close()
        if process.end >= 0:
            os.close(process.end)
            process.end = -1
        if process.hearing is not None:
            process.hearing.cancel()
        self._run(self._free_later(process.index))

    async def _free_later(self, index: int) -> None:
        await asyncio.sleep(1.0)  # connections of the process before still look there
        self._free.append(index)

    def _opened(self, process: Process, session: str) -> None:
        process.names.add(session)
        self._by_session.setdefault(session, process)

    def _dismiss(self, process: Process) -> None:
        process.leaving = True
        if self._by_key.get(process.key) is process:
            del self._by_key[process.key]
        with contextlib.suppress(OSError):
            give(process.gifts, ["stop"])

    def _kill(self, process: Process, why: str) -> None:
        process.killed_for = why
        with contextlib.suppress(OSError):
            if process.end >= 0:
                signal.pidfd_send_signal(process.end, signal.SIGKILL)

    async def _watch(self) -> None:
        """Ends processes whose op takes too long."""
        while True:
            await asyncio.sleep(min(0.25, self._kernel_timeout / 4))
            for one in list(self._processes.values()):
                seen = one.slot.read()
                if seen.since and time.monotonic() - seen.since > self._kernel_timeout and not one.killed_for:
                    what = seen.what[:_LONGEST_NAME]
                    self._kill(
                        one, f"{what} ran for more than the {self._kernel_timeout:g} s that one op may take"
                    )

    async def _give(self, process: Process, gift: list[Any], file: int) -> bool:
        until = time.monotonic() + _GIVING_SECONDS
        while time.monotonic() < until:
            try:
                give(process.gifts, gift, [file])
                return True
            except BlockingIOError:
                await asyncio.sleep(0.05)
            except (OSError, IsolationError):
                return False
        return False


def _has_ended(process: Process) -> bool:
    """Whether it has, though the zygote has not told yet."""
    if process.end < 0:
        return False
    looked = select.poll()  # unlike `select.select` it takes files above 1,023
    looked.register(process.end, select.POLLIN)
    return bool(looked.poll(0))
