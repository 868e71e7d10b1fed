"""What a process for clients' work asks of the worker's own one: lines of the log, decisions, connections to others.

It may have been taken over by a client: what it says is held against what it may say, and it speaks for its user only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from planrt.errors import (
    ApprovalError,
    ConnectError,
    IsolationError,
    JointError,
    LocalError,
    OptionError,
    PlanrtError,
)
from planrt.logs import get_logger
from planrt.plans.policy.approvals import Approvals, Asking, QueueFullError
from planrt.plans.policy.budgets import Budgets, CountsFailures, Failures
from planrt.plans.policy.quotas import Quota
from planrt.serde.frames import Limits
from planrt.workers.machine.access import Access
from planrt.workers.machine.sessions import Session
from planrt.workers.serving.audit_file import AuditError, AuditFile
from planrt.workers.serving.counts import Figures
from planrt.workers.serving.dialling import Dialling
from planrt.workers.serving.isolation.board import Board
from planrt.workers.serving.isolation.grants import Grants
from planrt.workers.serving.isolation.messages import give
from planrt.workers.serving.isolation.watching import Slot
from planrt.workers.serving.joint_folder import JointFolder
from planrt.workers.serving.summing import EVENTS
from planrt.workers.transport.passing import Passed
from planrt.workers.wire import messages as m
from planrt.workers.wire.proofs import ProofError, Prover, Verifier, proving

log = get_logger("planrt.worker")

_TICKETS: Final = 4096
"""Tickets that the sessions of one process may have."""
_DIALS: Final = 16
"""Connections that one process may have under way to other workers."""
_PROOFS: Final = 64
"""Proofs of the worker's token that one process may have under way."""
_EVENT_BYTES: Final = 64 << 10
"""Bytes of one event of the log: what the machine tells has texts and lists of bounded length."""
_ENDING_SECONDS: Final = 5.0
"""Seconds that others wait for the end of a process that gives way."""
_EPOCHS: Final = range(10_000_000)
"""After which a joint run may be kept."""


@dataclass(eq=False)
class Process:
    """One process for clients' work. `user` is whose it is, None for a session of nobody's."""

    number: int
    key: str
    user: str | None
    host: str
    """Where its first client is."""
    slot: Slot
    index: int
    gifts: socket.socket
    made: asyncio.Future[int]
    connections: dict[int, asyncio.Future[str | None]] = field(default_factory=dict)
    """Number -> done when it has ended: with why the process did, in words, if it was that."""
    address: str = field(default_factory=lambda: f"process:{secrets.token_hex(16)}")
    """By which other processes reach it, once they were told."""
    told: set[str] = field(default_factory=set)
    """Addresses of others that it was told."""
    names: set[str] = field(default_factory=set)
    """Of its sessions that may go on over another connection."""
    dials: set[asyncio.Task[None]] = field(default_factory=set)
    end: int = -1
    """A file that stands for the process, so that no other one is ever meant."""
    killed_for: str = ""
    tokens: set[str] = field(default_factory=set)
    """Ids of the tokens that opened its sessions."""
    revoked: bool = False
    """Whether it ends because one of these counts no longer."""
    gives_way: bool = False
    """Whether its client has closed its session, which may come back if nobody needs the room."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Is set once it has ended."""
    leaving: bool = False
    """Whether it ends because it was told to."""
    hearing: asyncio.Task[None] | None = None
    figures: Figures = field(default_factory=Figures)
    """What it has counted, and holds, as it said last."""
    bindings: deque[bytes | None] = field(default_factory=lambda: deque(maxlen=_PROOFS))
    """Of the connections to other workers that it was given: on each of them the worker's token is proved once."""
    proofs: dict[int, Prover] = field(default_factory=dict)
    giver: Session = field(init=False)
    """Who has given the tickets of all its sessions, for who is shown them."""

    def __post_init__(self) -> None:
        self.giver = Session(f"process {self.number}", self.user)


class Tickets(Protocol):
    """The list of the tickets that processes give: a `WorkerState` has it."""

    def note_ticket(self, client: Session, id: str, verifier: Verifier, asked: m.Delegate) -> None:
        """Takes note of one, that a process gave in whose place `client` stands."""

    def tickets_of(self, client: Session) -> int:
        """Returns how many it gave."""

    def forget_tickets(self, client: Session, id: str = "") -> None:
        """Forgets one of them, or all."""


class Answers:
    """Answers the calls of all processes of one worker. `opened` and `idle` are told what is for who has the processes:
    the name of a session that may go on over another connection, and that a process has nothing to do."""

    def __init__(
        self,
        worker_id: str,
        limits: Limits,
        dialling: Dialling,
        audit: AuditFile | None,
        approvals: Approvals | None,
        tickets: Tickets,
        opened: Callable[[Process, str], None],
        idle: Callable[[Process], None],
        *,
        others: Callable[[], Mapping[int, Process]] = dict,
        access: Access | None = None,
        joint_runs: JointFolder | None = None,
        quota: Quota | None = None,
        failures: CountsFailures | None = None,
        max_pending: int | None = None,
    ) -> None:
        self._max_pending = max_pending
        self._failures = failures or Failures(None)
        self._joint_runs = joint_runs
        self._quota = quota or Quota()
        self.grants = Grants(self._quota)
        self._at_addresses: dict[str, Grants] = {}
        """Clients without a user, by address -> what their processes were granted."""
        self._budgets = Budgets(*(None, None) if quota is None else (quota.session_flops, quota.worker_flops))
        self._worker_id, self._limits, self._dialling = worker_id, limits, dialling
        self.audit, self._approvals, self._tickets = audit, approvals, tickets
        self._opened, self._idle = opened, idle
        self._others, self._access = others, access or Access()
        self.board = Board()
        self._joined, self._numbers = itertools.count(1), itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._kept: set[Passed] = set()
        """Encrypted connections that processes made to other workers."""

    async def close(self) -> None:
        """Lets go of connections to other workers."""
        for task in list(self._tasks):
            task.cancel()
        for passed in list(self._kept):
            await passed.close()

    async def answer(self, process: Process, call: list[Any]) -> tuple[bool, Any] | None:
        """Does what a process asks for; returns whether that was done, and the answer; None where there is none."""
        try:
            match call:
                case ["audit", list(events)]:
                    return await self._write_events(process, events)
                case ["status", str(plan)]:
                    return await self._decided(lambda of: of.status(plan))
                case ["submit", str(plan), bytes(data), dict(said)]:
                    asking = msgspec.convert(said, Asking)
                    if asking.user != (process.user or ""):
                        return False, "a plan of another user"
                    if len(msgspec.msgpack.encode(said)) > _EVENT_BYTES:
                        return False, "so much is not said of a plan"
                    return await self._decided(
                        lambda of: of.submit(plan, data, asking=asking, most=self._max_pending)
                    )
                case ["ticket", str(id), str(checks), said] if process.user is not None:
                    if self._tickets.tickets_of(process.giver) >= _TICKETS:
                        return (
                            False,
                            f"a user has {_TICKETS} tickets at the most: close sessions that gave some",
                        )
                    asked = msgspec.convert(said, m.Delegate)
                    self._tickets.note_ticket(process.giver, id, Verifier.parse(checks), asked)
                    return True, None
                case ["ticket_over", str(id)]:
                    self._tickets.forget_tickets(process.giver, id)
                case ["dial", int(key), str(worker), str(address)]:
                    if address in process.told:
                        self._join(process, key, address)
                    else:
                        self._dial_soon(process, key, worker, address)
                case ["keeps", int(id), list(tags), str(description), str(token)]:
                    self.board.keeps(process.number, id, _texts(tags), description, token)
                    return True, None
                case ["computes", list(names)]:
                    self.board.computes(process.number, _texts(names))
                    return True, None
                case ["find", list(terms)]:
                    found = self.board.find(
                        process.number, _texts(terms), lambda tags: self._access.finds(process.user, tags)
                    )
                    there = [(self._told(process, number), ids) for number, ids in found.items()]
                    return True, [[address, ids] for address, ids in there if address]
                case ["holder", list(ids), str(token)]:
                    return True, self._told(process, self.board.holder(_numbers(ids), token))
                case ["computing", str(name)]:
                    return True, self._told(process, self.board.computing(name))
                case ["room", int(objects), int(memory)]:
                    return True, self.grants.ask(process.number, objects, memory)
                case ["room_at_address", int(objects), int(memory)] if process.user is None:
                    return True, await self._room_at_address(process, objects, memory)
                case ["spend", int(flops), int(most)] if flops >= 0:
                    return True, self._budgets.draw(_whose(process), flops, most)
                case ["may_fail"]:
                    return True, self._failures.seconds(_whose(process), nobody=process.user is None)
                case ["run_failed"]:
                    return True, self.run_failed(process)
                case ["prove", bytes() | None as binding]:
                    process.bindings.remove(binding)  # raises ValueError where there is none
                    return True, self._prove(process, binding)
                case ["prove_answer", int(number), str(challenge)]:
                    return True, await asyncio.to_thread(process.proofs[number].answer, challenge)
                case ["prove_check", int(number), str(final)]:
                    process.proofs.pop(number).check(final)
                    return True, None
                case ["joint", str(what), str(name), *about]:
                    return await self._keep_joint(process, what, name, about)
                case ["figures", said]:
                    process.figures = Figures.told(said, process.figures)
                case ["opened", int(), str(name)]:
                    self._opened(process, name)
                case ["closed", int(number), bool(gives_way)]:
                    process.gives_way = gives_way
                    ended = process.connections.get(number)
                    if ended is not None and not ended.done():
                        ended.set_result(None)
                case ["idle"] if not process.connections:
                    self._idle(process)
        except (LocalError, ProofError) as error:
            return False, str(error)
        except (TypeError, ValueError, KeyError, OptionError, msgspec.ValidationError) as error:
            log.error("process_said_nonsense", worker=self._worker_id, whose=process.key, error=str(error))
            return False, "no such call"
        return None

    async def _room_at_address(self, process: Process, objects: int, memory: int) -> str:
        """Grants a process what clients without a user may keep at its client's address; see `Grants.ask`. Those who
        have closed their session there give way."""
        whose = _whose(process)
        while True:
            grants = self._at_addresses.setdefault(whose, Grants(self._quota, at_address=True))
            if not (rule := grants.ask(process.number, objects, memory)):
                return ""
            unused = next((one for one in self._others().values() if self._gives_way(one, process)), None)
            if unused is None or process.over.is_set():
                return rule
            self._idle(unused)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(unused.over.wait(), _ENDING_SECONDS)

    def _gives_way(self, other: Process, process: Process) -> bool:
        """Whether nobody uses the `other` process, which may end for the sake of `process`."""
        return (
            other.gives_way
            and not (other.connections or other.leaving or other is process)
            and other.user is None
            and _whose(other) == _whose(process)
            and not self.board.publishes(other.number)
        )

    def run_failed(self, process: Process) -> float:
        """Counts a run of that process' user that failed on data, or ended the process; see `Failures.add`."""
        return self._failures.add(_whose(process), nobody=process.user is None)

    def _prove(self, process: Process, binding: bytes | None) -> list[Any]:
        """Begins a proof of the token that the worker has at others; returns its number, and the first message."""
        if len(process.proofs) >= _PROOFS:
            del process.proofs[next(iter(process.proofs))]  # of a connection that came to nothing
        number = next(self._numbers)
        process.proofs[number] = begun = proving(self._dialling.token, binding)
        return [number, begun.first]

    async def _keep_joint(self, process: Process, what: str, name: str, about: list[Any]) -> tuple[bool, Any]:
        """What the owner's folder has of joint runs of that process's user, or is to have."""
        folder, user = self._joint_runs, process.user or ""
        if folder is None:
            return False, "no joint runs are kept"
        match what, about:
            case "epochs", []:
                work: Callable[[], Any] = lambda: list(folder.epochs(user, name))  # noqa: E731
            case "read", [int(epoch)] if epoch in _EPOCHS:
                work = lambda: folder.read_bytes(user, name, epoch)  # noqa: E731
            case "write", [int(epoch), bytes(data)] if epoch in _EPOCHS:
                work = lambda: folder.write_bytes(user, name, epoch, data)  # noqa: E731
            case "room", []:
                work = lambda: folder.check_room(user, name)  # noqa: E731
            case "forget", []:
                work = lambda: folder.forget(user, name)  # noqa: E731
            case _:
                return False, "no such call"
        try:
            return True, ["said", await asyncio.to_thread(work)]
        except JointError as error:
            return True, ["failed", str(error)]

    def _told(self, process: Process, number: int | None) -> str:
        """The address of another process, which this one may dial from now on."""
        other = None if number is None or number == process.number else self._others().get(number)
        if other is None or other.leaving or other.killed_for:
            return ""
        process.told.add(other.address)
        return other.address

    def _join(self, process: Process, key: int, address: str) -> None:
        """Connects a process with another one, to which it is a client: that of its user."""
        other = next((one for one in self._others().values() if one.address == address), None)
        if other is None or other.leaving or other.killed_for:
            self._answer_dial(process, key, "that process has ended", None)
            return
        near, far = socket.socketpair()
        with near, far:
            gift = ["joined", -next(self._joined), process.user]
            try:
                give(other.gifts, gift, [far.fileno()])
                give(process.gifts, ["dialled", key, "", "", None, b""], [near.fileno()])
            except (OSError, IsolationError):
                self._answer_dial(process, key, "that process takes no more connections", None)

    def over(self, process: Process) -> None:
        """Forgets what a process that has ended has given."""
        self._tickets.forget_tickets(process.giver)
        self.board.over(process.number)
        self.grants.over(process.number)
        if process.user is None and (grants := self._at_addresses.get(_whose(process))) is not None:
            grants.over(process.number)
            if not grants:
                del self._at_addresses[_whose(process)]
        process.over.set()

    async def _write_events(self, process: Process, events: list[Any]) -> tuple[bool, Any]:
        user = process.user or ""
        if self.audit is None:
            return True, ""
        if why := self.audit.full(user):
            return False, why
        for event in events:
            if not isinstance(event, dict) or event.get("user", "") not in ("", user):
                return False, "an event of another user"
            if event.get("event") not in EVENTS or len(msgspec.msgpack.encode(event)) > _EVENT_BYTES:
                return False, "no event of the log"
        for event in events:
            self.audit.record(event)
        try:
            await asyncio.to_thread(self.audit.write)
        except AuditError as error:
            return False, str(error)
        return True, self.audit.full(user)

    async def write_audit(self) -> None:
        """Has the log written, where there is one."""
        if self.audit is not None:
            with contextlib.suppress(AuditError):  # it says so itself, and keeps the line
                await asyncio.to_thread(self.audit.write)

    async def _decided(self, ask: Callable[[Approvals], Any]) -> tuple[bool, Any]:
        if self._approvals is None:
            return False, "there is no record of decisions"
        try:
            return True, ["said", list(await asyncio.to_thread(ask, self._approvals))]
        except QueueFullError as error:
            return True, ["full", str(error)]
        except ApprovalError as error:
            return True, ["failed", str(error)]

    def _dial_soon(self, process: Process, key: int, worker: str, address: str) -> None:
        if len(process.dials) >= _DIALS:
            self._answer_dial(process, key, "too many connections to other workers are under way", None)
            return
        task = asyncio.create_task(self._dial(process, key, m.PeerAddress(worker, address)))
        process.dials.add(task)
        task.add_done_callback(process.dials.discard)

    async def _dial(self, process: Process, key: int, peer: m.PeerAddress) -> None:
        try:
            pipe: Any = await self._dialling.open(self._worker_id, peer, self._limits)
            if not hasattr(pipe, "let_go"):
                await pipe.close()
                raise ConnectError("this transport cannot be used with isolation", address=peer.address)
            passed = await pipe.let_go()
        except (PlanrtError, OSError) as error:
            self._answer_dial(process, key, str(error), None)
            return
        self._answer_dial(process, key, "", passed, pipe)
        passed.given()
        if passed.copies:
            self._kept.add(passed)
            copying = asyncio.create_task(self._until_copied(passed))
            self._tasks.add(copying)
            copying.add_done_callback(self._tasks.discard)
        else:
            passed.give.close()

    async def _until_copied(self, passed: Passed) -> None:
        await passed.over()
        self._kept.discard(passed)

    def _answer_dial(
        self, process: Process, key: int, why: str, passed: Passed | None, pipe: Any = None
    ) -> None:
        gift = ["dialled", key, why, "", None, b""]
        if passed is not None:
            gift = ["dialled", key, why, pipe.channel.host, pipe.channel.binding, passed.read]
            process.bindings.append(pipe.channel.binding)
        with contextlib.suppress(OSError, IsolationError):
            give(process.gifts, gift, [] if passed is None else [passed.give.fileno()])


def _whose(process: Process) -> str:
    """For whom it counts."""
    return process.giver.whose(process.host)


def _texts(given: list[Any]) -> list[str]:
    if not all(isinstance(one, str) for one in given):
        raise TypeError("these are texts")
    return given


def _numbers(given: list[Any]) -> list[int]:
    if not all(isinstance(one, int) for one in given):
        raise TypeError("these are numbers")
    return given
