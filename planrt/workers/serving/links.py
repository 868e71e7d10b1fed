"""A worker's connections to other workers: made when first needed, with the address that a client gave.

Towards the other worker this one is a client like any other. Where its own client gave it a ticket
(`planrt.workers.machine.keeping.tickets`) it acts in that client's name, over a connection for that ticket alone.
Without one it is a nobody: what it shows there (`dialling.py`) lets it in, and gives it no rights, so it can do nothing
with private data there. All clients without a ticket share one connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol
from weakref import WeakValueDictionary

from planrt.errors import ConnectError, PlanrtError, RemoteError
from planrt.logs import get_logger
from planrt.serde.frames import Limits
from planrt.workers.client.connection import Connection
from planrt.workers.client.outbox import Response
from planrt.workers.client.session import TicketRefusedError
from planrt.workers.machine.events import Event, PeerAnswered, PeerFailed, PeerFor, ToPeer
from planrt.workers.serving.dialling import Dialling
from planrt.workers.wire import messages as m
from planrt.workers.wire.proofs import TicketProof
from planrt.workers.wire.refusals import TICKET_REFUSED

log = get_logger("planrt.worker")

MAX_LINKS = 64
"""Other workers that one worker is connected to at a time, in nobody's name."""
MAX_TICKETS = 1024
"""Connections that it has in its clients' names."""
MAX_OF_USER = 256
"""Those of them in one user's name."""
MAX_OF_USER_THERE = 64
"""And those of these to one worker, which takes so many of an address only: they are all this worker's there."""
AT_ONCE = 16
"""Connections that are being opened in one user's name; others wait for their turn."""


class Reaching(Protocol):
    """The way in which a worker reaches others: `Dialling`, or what stands before it."""

    async def connect(
        self, worker_id: str, peer: m.PeerAddress, limits: Limits, ticket: TicketProof | None = None
    ) -> Connection:
        """Connects the worker `worker_id` to another one.

        Raises:
            ConnectError, HandshakeError: as `Dialling.connect`.
        """


class _Link:
    def __init__(self) -> None:
        self.order = asyncio.Lock()
        self.connection: Connection | None = None
        self.before = 0
        """Messages that have not been handed over to the connection: others come after them."""
        self.bytes_before = 0
        self.dialling = False
        """Whether the connection is being opened."""

    @property
    def open(self) -> Connection | None:
        """The connection, where a message may be handed over to it at once."""
        if self.connection is None or self.before or self.order.locked() or self.connection.closed:
            return None
        return self.connection

    def is_full(self, limits: Limits) -> bool:
        """Whether so much waits that nothing more may."""
        number, nbytes = (0, 0) if self.connection is None else self.connection.waiting
        return (
            number + self.before >= limits.unsent_messages
            or nbytes + self.bytes_before > limits.unsent_memory
        )

    def renewed(self, connection: Connection) -> None:
        """The other worker had lost the session, and this one's has begun."""
        self.connection = connection


class Links:
    """Carries out `ToPeer` for one worker; answers come back to it as events through `handle`."""

    def __init__(
        self,
        worker_id: str,
        handle: Callable[[Event], Awaitable[None]],
        limits: Limits,
        dialling: Reaching | None = None,
    ) -> None:
        self._worker_id = worker_id
        self._dialling: Reaching = dialling or Dialling()
        self._handle = handle
        self._limits = limits
        self._links: dict[m.PeerAddress, _Link] = {}
        self._secrets: dict[PeerFor, str] = {}
        """What proves the tickets that it was given."""
        self._begun: dict[PeerFor, asyncio.Task[None]] = {}
        """What opens the sessions of tickets that came just now."""
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        """For whom connections are being opened, or wait to be."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def send(self, instruction: ToPeer) -> None:
        """Sends to another worker, in the order of the calls, without waiting; nothing any more once it is closed."""
        if self._closed:
            return
        link = self._links.get(instruction.peer)
        if link is None:
            link = self._links[instruction.peer] = _Link()
        if link.is_full(self._limits):
            self._cut_off(instruction, link)
            return
        connection = link.open
        if connection is not None and not instruction.key:
            try:
                connection.post_own(instruction.body, instruction.tensors)
            except PlanrtError as error:
                self._note(connection, instruction.peer, error)
            return
        link.before += 1
        link.bytes_before += sum(tensor.nbytes for tensor in instruction.tensors)
        self._soon(self._deliver(instruction, link))

    def _cut_off(self, instruction: ToPeer, link: _Link) -> None:
        """Ends the connection to a worker that does not read: what waits for it is lost, and so is this message. Who
        waits for answers is told."""
        worker = instruction.peer.worker
        log.warning("peer_does_not_read", worker=self._worker_id, peer=worker)
        if link.connection is not None:
            self._close_soon(link.connection)
        if self._links.get(instruction.peer) is link:
            del self._links[instruction.peer]
        if instruction.key:
            reason = f"too much waits to be sent to worker {worker!r}, which does not read"
            self._soon(self._handle_soon(PeerFailed(instruction.key, reason)))

    async def _handle_soon(self, event: Event) -> None:
        await self._handle(event)

    def introduce(self, peer: PeerFor, secret: str) -> None:
        """Takes what proves the ticket for `peer`, and opens its session there."""
        self._secrets[peer] = secret
        if self._closed:
            return
        link = self._links.setdefault(peer, _Link())
        self._begun[peer] = task = self._soon(self._begin(peer, link))
        task.add_done_callback(lambda _: self._begun.pop(peer, None))

    async def _begin(self, peer: PeerFor, link: _Link) -> None:
        try:
            async with link.order:
                if link.connection is None and peer in self._secrets:
                    await self._connect(link, peer)
        except (PlanrtError, OSError) as error:  # the first to send something there tries again, and is told
            log.info("not_introduced", worker=self._worker_id, peer=peer.worker, error=str(error))

    def part(self, peers: Sequence[PeerFor]) -> None:
        """Ends the sessions that these tickets opened, after what was sent there before."""
        for peer in peers:
            # Whoever gives ticket after ticket has few connections opened. One that is under way is let be: given up
            # here, it would still take a place there until that worker has noticed.
            link = self._links.get(peer)
            if link is not None and peer in self._begun and not link.dialling:
                self._begun[peer].cancel()
            self._soon(self._part(peer))

    async def _part(self, peer: PeerFor) -> None:
        link = self._links.get(peer)
        if link is not None:
            async with link.order:
                if link.connection is not None:
                    await link.connection.close(forget=True)
        self._links.pop(peer, None)
        self._secrets.pop(peer, None)

    def close(self) -> None:
        """Closes every link."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for link in self._links.values():
            if link.connection is not None:
                self._close_soon(link.connection)
        self._links.clear()

    def _close_soon(self, connection: Connection) -> None:
        self._soon(connection.close(forget=True))

    def _soon(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _deliver(self, instruction: ToPeer, link: _Link) -> None:
        try:
            request = await self._hand_over(instruction, link)
            if request is None:
                return
            body, tensors = await request
        except TicketRefusedError as error:
            log.warning(
                "ticket_refused", worker=self._worker_id, peer=instruction.peer.worker, why=str(error)
            )
            if instruction.key:
                failure = m.Failure(TICKET_REFUSED, str(error))
                await self._handle(PeerAnswered(instruction.key, failure, []))
        except RemoteError as error:
            failure = m.Failure(
                error.kind,
                error.reason,
                error.op,
                error.line,
                error.remote_traceback,
                error.index,
                error.cause,
                step=error.step,
            )
            await self._handle(PeerAnswered(instruction.key, failure, []))
        except (PlanrtError, OSError) as error:
            self._note(link.connection, instruction.peer, error)
            if instruction.key:
                await self._handle(PeerFailed(instruction.key, str(error)))
        else:
            await self._handle(PeerAnswered(instruction.key, body, tensors))

    async def _hand_over(self, instruction: ToPeer, link: _Link) -> asyncio.Future[Response] | None:
        """Gives a message to the connection in its turn; returns what its answer is to be awaited by, if it has one."""
        try:
            async with link.order:
                if link.connection is None:
                    await self._connect(link, instruction.peer)
                elif link.connection.closed:
                    link.connection = await link.connection.reopen()
                assert link.connection is not None  # noqa: S101 - just connected
                if not instruction.key:
                    link.connection.post(instruction.body, instruction.tensors)
                    return None
                request = asyncio.ensure_future(
                    link.connection.request(instruction.body, instruction.tensors)
                )
                await asyncio.sleep(0)  # the request takes its place in the queue
                return request
        finally:
            link.before -= 1
            link.bytes_before -= sum(tensor.nbytes for tensor in instruction.tensors)

    def _note(self, connection: Connection | None, peer: m.PeerAddress, error: Exception) -> None:
        in_order = connection is not None and connection.stopped
        note = log.info if in_order else log.warning  # who waits for an answer is told either way
        note("peer_failed", worker=self._worker_id, peer=peer.worker, error=str(error))

    async def _connect(self, link: _Link, peer: m.PeerAddress) -> None:
        self._make_room()
        if isinstance(peer, PeerFor):
            turns = self._turns.setdefault(peer.whose, asyncio.Semaphore(AT_ONCE))
            async with turns:
                await self._dial(link, peer, self._ticket(peer))
        else:
            await self._dial(link, peer)

    async def _dial(self, link: _Link, peer: m.PeerAddress, ticket: TicketProof | None = None) -> None:
        link.dialling = True
        try:
            link.connection = await self._dialling.connect(self._worker_id, peer, self._limits, ticket)
        finally:
            link.dialling = False
        link.connection.on_renewed = link.renewed

    def _ticket(self, peer: PeerFor) -> TicketProof:
        """Returns what opens a session in a client's name.

        Raises:
            TicketRefusedError: there is nothing that does, any more. ConnectError: there are as many as may be.
        """
        if peer not in self._secrets:
            raise TicketRefusedError(
                f"worker {self._worker_id!r} acts at worker {peer.worker!r} for that client no longer",
                address=peer.address,
            )
        taken = [
            one
            for one, link in self._links.items()
            if isinstance(one, PeerFor) and (link.connection is not None or link.dialling)
        ]
        of_user = [one for one in taken if one.whose == peer.whose]
        there = [one for one in of_user if one.address == peer.address]
        for whose, have, most in (
            ("its clients' names", taken, MAX_TICKETS),
            ("that user's name", of_user, MAX_OF_USER),
            (f"that user's name to worker {peer.worker!r}", there, MAX_OF_USER_THERE),
        ):
            if len(have) >= most:
                raise ConnectError(
                    f"worker {self._worker_id!r} has {most:,} connections in {whose}, its limit: close some of the "
                    "sessions that they are for",
                    address=peer.address,
                )
        return TicketProof(peer.ticket, self._secrets[peer])

    def _make_room(self) -> None:
        """Closes the oldest links in nobody's name when there are too many; what they made elsewhere is freed there.
        Those in a client's name end with its session."""
        while len(plain := [one for one in self._links if not isinstance(one, PeerFor)]) > MAX_LINKS:
            oldest = plain[0]
            connection = self._links.pop(oldest).connection
            if connection is not None:
                self._close_soon(connection)
