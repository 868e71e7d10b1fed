"""A client's connection to one worker: a pipe, a session, what is to be sent and what is awaited.

Everything leaves through one queue, in the order in which it was handed over. Ops are *posted* from any thread
and leave together, as many as have gathered while the message before them was being sent; requests are made on
planrt's loop and wait for their replies.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from planrt.deadlines import in_time
from planrt.errors import (
    LocalError,
    PlanrtError,
    RemoteError,
    TransportError,
    WorkerLostError,
    WorkerTimeoutError,
)
from planrt.logs import get_logger
from planrt.loop import keep_unless_heard, unheard
from planrt.serde.frames import Allocate, Frame, Limits, Received, Store, encode, in_memory
from planrt.shown import shown
from planrt.workers.client.handshaking import no_answer, shake_hands
from planrt.workers.client.outbox import DROPS_WAITING, MAX_WAITING, Outbox, QueuedMessage, Response
from planrt.workers.client.redialling import Redialling, try_again
from planrt.workers.client.session import ByeError, ClientSession, EndedError
from planrt.workers.client.telling import Telling
from planrt.workers.client.unanswered import described, failed, keeper, late, lost
from planrt.workers.client.unarrived import Sent, Unarrived
from planrt.workers.transport.pipes import Pipe, Traffic
from planrt.workers.wire import messages as m
from planrt.workers.wire.posted import MAX_OP_BYTES, Line
from planrt.workers.wire.proofs import TicketProof, Token
from planrt.workers.wire.sendable import sendable

log = get_logger("planrt.client")

B = TypeVar("B", bound=m.Body)

_HEADER_REST = 4096
"""Bytes of a header beside its ops."""
_DROP_AFTER = 0.5
"""Seconds after which a freed pointer's object is dropped by a message of its own, if no op took that along."""

COPIED_TO_SEND = 8 << 20
"""Of a message that may have to be sent again up to so many bytes are copied, so that its tensors may change once it
has left. With more, `Connection.send` waits until the worker has it."""


class Connection:
    """Sends posts and requests to one worker and matches its replies.

    `open` makes one. From any thread then: `post_op` and `post` for what is not answered, `enqueue` for a request.
    On the loop: `finish` waits for the answer to what `enqueue` returned, `request` does both. `close` at the
    end. All leave in the order of the calls.

    `turns` bounds how many computing requests are under way over all connections that share it: virtual workers
    compute one after the other, so that more would only fill memory with copies of parameters.

    A connection that is lost is opened again, where `redialling` says how, and the session goes on over it: whoever
    waits goes on waiting, and what the worker has not taken is sent again. If the worker has that session no longer,
    this connection has ended, and `on_renewed` is given the one with the session that there is now. If nobody answers
    for so long, or the worker says that it stops, this connection has ended; `reopen` tries once more.
    """

    def __init__(
        self,
        pipe: Pipe,
        session: ClientSession[Sent],
        *,
        limits: Limits,
        turns: asyncio.Semaphore | None = None,
        redialling: Redialling | None = None,
        handshake_timeout: float = 10.0,
    ) -> None:
        self.session = session
        self.loop = asyncio.get_running_loop()
        self._pipe = pipe
        self._traffic = pipe.traffic
        self._redialling = redialling
        self._handshake_timeout = handshake_timeout
        self._away: PlanrtError | None = None
        """Why there is no connection now, while another one is tried."""
        self._reconnecting: asyncio.Task[None] | None = None
        self._telling = Telling(session, self.loop, self._wake)
        self._unarrived = Unarrived(session)
        self._session_lost = False
        self.on_renewed: Callable[[Connection], None] | None = None
        """Called on the loop with the connection that there is now, when the worker had lost the session."""
        self.timeout: float | None = None
        """Seconds that calls wait for an answer, unless they say so themselves; None for as long as it takes."""
        self.limits = limits
        self.history: list[m.Body] | None = None
        """Where what is handed over is written down, if somebody wants to see it: without tensors."""
        self.latency = 0.0
        """Seconds that each message waits before it leaves, to try a slow network."""
        self._turns = turns
        self._woken = False
        self._sender: asyncio.Task[None] | None = None
        self._drained: asyncio.Event = asyncio.Event()
        self._pending: dict[int, QueuedMessage] = {}
        self._ended: PlanrtError | None = None
        self._untold: PlanrtError | None = None
        """What went wrong with something that was posted, and nobody has heard of: shows at the next request."""
        self._flush = False  # whether drops are to leave by themselves
        self._flush_due = False
        accepts = session.versions
        # Of a header, three quarters are for ops: they travel as base64, with a few bytes around each.
        rest = min(_HEADER_REST, accepts.header_limit // 4)
        self._outbox = Outbox(min(MAX_OP_BYTES, accepts.header_limit * 3 // 4 - rest))
        self._header_limit = accepts.header_limit
        self._reader = asyncio.create_task(self._read(pipe))
        session.line_of = self._outbox.lines.line
        session.place_of = self._outbox.lines.place_in_plan

    @classmethod
    async def open(
        cls,
        pipe: Pipe,
        worker_id: str,
        *,
        timeout: float,
        limits: Limits,
        turns: asyncio.Semaphore | None = None,
        token: Token = "",
        for_others: bool = False,
        ticket: TicketProof | None = None,
        redialling: Redialling | None = None,
    ) -> Connection:
        """Shakes hands with the worker at the other end of `pipe` within `timeout` seconds.

        Raises:
            HandshakeError: it does not answer as worker `worker_id` of a planrt that fits this one, or does not
                know `token`.
        """
        session = ClientSession[Sent](worker_id, address=pipe.address, limits=limits)
        try:
            async with asyncio.timeout(timeout):
                await shake_hands(pipe, session, token, for_others=for_others, ticket=ticket)
        except (TimeoutError, ConnectionError) as error:
            await pipe.close()
            raise no_answer(pipe) from error
        except TransportError:
            await pipe.close()
            raise
        for what, here, there in session.differences():
            log.warning("versions_differ", worker=worker_id, what=what, here=here, there=there)
        return cls(
            pipe, session, limits=limits, turns=turns, redialling=redialling, handshake_timeout=timeout
        )

    @property
    def traffic(self) -> Traffic:
        """The messages and bytes that went through the connection so far."""
        return self._traffic

    @property
    def certificate(self) -> str:
        """The SHA-256 of the certificate that the worker shows, in hexadecimal digits; ``""`` without TLS."""
        return (self._pipe.channel.binding or b"").hex()

    @property
    def why_ended(self) -> str:
        """The reason why the connection has ended, safe to show; ``""`` while it has not."""
        return "" if self._ended is None else shown(str(self._ended), 200)

    @property
    def op_bytes(self) -> int:
        """The longest op that may be posted, in bytes."""
        return self._outbox.op_bytes

    @property
    def waiting(self) -> tuple[int, int]:
        """The number of messages and ops that wait to be sent, and the bytes of their tensors."""
        return len(self._outbox), self._outbox.nbytes

    @property
    def posted(self) -> int:
        """Ops posted so far."""
        return self._outbox.lines.posted

    @property
    def closed(self) -> bool:
        """True once the connection has ended, and is not tried again."""
        return self._ended is not None

    @property
    def stopped(self) -> bool:
        """True if the connection has ended because the worker has stopped in order."""
        return isinstance(self._ended, ByeError)

    @property
    def away(self) -> str:
        """The reason why there is no connection now, while another one is tried; else ``""``."""
        return "" if self._away is None else shown(str(self._away), 200)

    @property
    def _keeps(self) -> bool:
        """Whether what is sent may have to be sent again."""
        return self.session.kept is not None

    # --------------------------------------------------------------------------- from any thread

    def post_op(self, packed: bytes, line: Line | None = None) -> bool:
        """Hands over a packed op; `line` made it. False: too many wait, call `drained` before the next one.

        Raises:
            WorkerLostError: the connection has ended.
        """
        if self._ended is not None:
            raise self._lost("a posted op") from self._ended
        if self.history is not None:
            self.history.append(m.Post([packed]))
        few = self._outbox.add_op(packed, line)
        self._wake_soon()
        return few

    def post(self, body: m.Body, tensors: Sequence[torch.Tensor] = ()) -> None:
        """Hands over a message that is not answered; its tensors must not change from here on.

        Raises:
            WorkerLostError: the connection has ended.
        """
        if self._ended is not None:
            raise self._lost(type(body).__name__) from self._ended
        checked = self._checked(body, tensors)
        if isinstance(body, m.Put | m.StorePlan):  # what takes room there comes after what gives some back
            self.post_drops()
        self._outbox.add(QueuedMessage(checked, tensors, None, None))
        self._wake_soon()

    def post_own(self, body: m.Body, tensors: Sequence[torch.Tensor]) -> None:
        """`post`, on the loop, of a message whose fields no user gave: they are what they are said to be. It leaves
        before this returns, where nothing waits to be sent.

        Raises:
            WorkerLostError: the connection has ended. LocalError: it is over a limit of the worker's.
        """
        # What waits has woken who sends it, or will be sent over the next connection: else there is nothing.
        idle = self._sender is None and not self._woken and self._away is None and self._ended is None
        if not idle or self.latency or self._unarrived.full:
            self.post(body, tensors)
            return
        frame = self._encoded(self.session.posted(body), tensors)
        if frame.nbytes > self.session.versions.message_limit or not self._pipe.send_now(frame):
            self.post(body, tensors)
            return
        if self.history is not None:
            self.history.append(body)
        if self.session.kept is not None:
            self._unarrived.add(Sent(frame))

    def _checked(self, body: B, tensors: Sequence[torch.Tensor]) -> B:
        session = self.session
        checked = sendable(
            body, tensors, to=session.versions, worker=session.worker_id, address=self._pipe.address
        )
        if self.history is not None:
            self.history.append(checked)
        return checked

    def enqueue(
        self,
        body: m.Body,
        tensors: Sequence[torch.Tensor] = (),
        *,
        allocate: Allocate[m.Envelope] = in_memory,
        drops: bool = False,
    ) -> QueuedMessage:
        """Queues a request; `finish` waits for its reply. With `drops`, what nobody points at is freed first.

        Raises:
            WorkerLostError: the connection has ended. OptionError, LocalError, MessageTooLargeError: the request
            cannot be sent, and was not.
        """
        if self._ended is not None:
            raise self._lost(type(body).__name__) from self._ended
        body = self._checked(body, tensors)
        if self._untold is not None and not isinstance(body, m.Resume):  # which nobody sees the answer of
            untold, self._untold = self._untold, None
            raise untold
        if drops:
            self.post_drops()
        reply: asyncio.Future[Response] = asyncio.Future(loop=self.loop)
        reply.add_done_callback(
            lambda done: done.cancelled() or done.exception()
        )  # it may be read never, or late
        outgoing = QueuedMessage(body, tensors, reply, None, allocate)
        self._outbox.add(outgoing)
        self._wake_soon()
        return outgoing

    def drop(self, id: int) -> None:
        """Nobody points at object `id` any more. Called by finalizers: in any thread, at any time."""
        self._outbox.drop(id)
        if self._ended is not None:
            return
        if self._outbox.drops > DROPS_WAITING:
            self._wake_soon()
        elif not self._flush_due:
            self._flush_due = True
            with contextlib.suppress(RuntimeError):  # the loop is gone at the end of the process
                self.loop.call_soon_threadsafe(self.loop.call_later, _DROP_AFTER, self._flush_drops)

    def post_drops(self) -> None:
        """Frees what nobody points at before whatever is handed over next."""
        while drops := self.take_drops():
            self._outbox.add(QueuedMessage(m.Post([], list(drops)), (), None, None))
            self._wake_soon()

    def check_open(self) -> None:
        """Raises WorkerLostError if the connection has ended."""
        if self._ended is not None:
            raise self._lost("what comes next") from self._ended

    def take_drops(self) -> tuple[int, ...]:
        """Objects to free before the next op, which takes them along."""
        return self._outbox.take_drops()

    def post_drop_of(self, id: int) -> bool:
        """Frees object `id`, if it waits to be freed, before whatever is handed over next; says whether it did."""
        found = self._outbox.drops_of(id)
        if found:
            self.post_drops()
        return found

    @property
    def drops_wait(self) -> bool:
        """True where objects are to be freed, and the worker has not been told."""
        return self._outbox.drops > 0

    def flush_drops(self) -> None:
        """Frees what nobody points at without waiting for the next op."""
        self._flush = True
        self._wake_soon()

    def _flush_drops(self) -> None:
        """Drops that no op took along leave by themselves."""
        self._flush_due = False
        if self._outbox.drops and self._ended is None:
            self._flush = True
            self._wake()

    def forget_soon(self, outgoing: Sequence[QueuedMessage]) -> None:
        """`forget` of several requests, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is gone at the end of the process
            self.loop.call_soon_threadsafe(lambda: deque(map(self.forget, outgoing), maxlen=0))

    def _wake_soon(self) -> None:
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is gone at the end of the process
                self.loop.call_soon_threadsafe(self._wake)

    # ------------------------------------------------------------------------------- on the loop

    async def request(
        self,
        body: m.Body,
        tensors: Sequence[torch.Tensor] = (),
        *,
        allocate: Allocate[m.Envelope] = in_memory,
        in_turn: bool = False,
    ) -> Response:
        """Sends `body` after everything posted before, and waits for its reply.

        `allocate` says where the reply's tensors go. The tensors must not change before the request has left.
        `in_turn` is for requests that compute much.

        Raises:
            RemoteError: the worker could not do it.
            WorkerLostError: the connection ended first.
            OptionError, LocalError, MessageTooLargeError: it cannot be sent, and was not.
        """
        async with self._turns if in_turn and self._turns else contextlib.nullcontext():
            outgoing = self.enqueue(body, tensors, allocate=allocate)
            del tensors
            return await self.finish(outgoing)

    async def finish(self, outgoing: QueuedMessage) -> Response:
        """Waits for the reply to a request that was queued, and returns it.

        Raises:
            RemoteError: the worker could not do it. WorkerLostError: the connection ended first. WorkerTimeoutError: it
            did not answer in time.
        """
        reply = outgoing.reply
        assert reply is not None  # noqa: S101 - it is a request, and nobody finished it before
        try:
            return await in_time(reply, self.timeout, lambda s: self.late(outgoing.body, s))
        except BaseException as error:
            if error is failed(reply):
                outgoing.reply = None  # its caller hears of it
            if isinstance(error, ConnectionError):
                raise self._lost(described(outgoing.body)) from error
            raise
        finally:
            self.forget(outgoing)

    def forget(self, outgoing: QueuedMessage) -> None:
        """Nobody waits for the reply to a request any more. To be called on planrt's loop."""
        outgoing.given_up = True
        reply, outgoing.reply = outgoing.reply, None
        if (error := failed(reply)) is not None:
            unheard(error)
        self._pending.pop(outgoing.id, None)
        self.session.forget(outgoing.id)

    async def answers(self, seconds: float) -> bool:
        """Asks the worker for a sign of life, and returns whether one came within `seconds`. One that computes gives
        them; one that is stopped, or that the network has lost, does not.
        """
        return self._away is None and self._ended is None and await self._pipe.answers(seconds)

    async def send(self, body: m.Body, tensors: Sequence[torch.Tensor]) -> None:
        """Posts a message and waits until it has left: the tensors may change then.

        Raises:
            WorkerLostError: the connection ended first.
            OptionError, LocalError, MessageTooLargeError: the message cannot be sent, and was not.
        """
        if self._ended is not None:
            raise self._lost(type(body).__name__) from self._ended
        body = self._checked(body, tensors)
        if self._again and sum(tensor.nbytes for tensor in tensors) <= COPIED_TO_SEND:
            tensors = [tensor.clone() for tensor in tensors]
        left: asyncio.Future[None] = self.loop.create_future()
        outgoing = QueuedMessage(body, tensors, None, left)
        self._outbox.add(outgoing)
        self._wake()
        try:
            await in_time(asyncio.shield(left), self.timeout, lambda s: self.late(body, s))
        except ConnectionError as error:
            raise self._lost(type(body).__name__) from error

    @property
    def _again(self) -> bool:
        """Whether the connection may be cut, and messages be sent again."""
        return self._redialling is not None and self._redialling.seconds > 0 and self._keeps

    async def drained(self) -> None:
        """Returns when few posted ops wait to be sent.

        Raises:
            WorkerTimeoutError: that takes longer than calls may wait.
        """
        while len(self._outbox) > MAX_WAITING // 2 and self._ended is None:
            self._drained.clear()
            drained = asyncio.ensure_future(self._drained.wait())
            await in_time(drained, self.timeout, lambda s: self.late(m.Post([]), s))

    async def close(self, *, forget: bool = False) -> None:
        """Closes the connection once what was posted has left; requests under way fail. Closing twice is fine.

        With `forget` the session is over as well; else the worker keeps it for some time, for `reopen`.
        """
        if self._sender is not None and self._ended is None and self._away is None:
            with contextlib.suppress(TimeoutError, PlanrtError, ConnectionError):
                await asyncio.wait_for(asyncio.shield(self._sender), timeout=2)
        was_open = self._ended is None and self._away is None
        self._ended = self._ended or PlanrtError("closed by this side")
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        if was_open and self._keeps:
            with contextlib.suppress(TimeoutError, ConnectionError):
                bye = encode(m.to_wire(self.session.posted(m.Bye(comes_back=not forget))))
                await asyncio.wait_for(self._pipe.send(bye), timeout=1)
        if forget:
            self.session.kept = None
        await self._pipe.close()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._end(self._ended)

    async def reopen(self) -> Connection:
        """Opens the connection again after it has ended; returns the one that there is now: this one if its session
        goes on, or another one with a new session.

        Raises:
            ConnectError, HandshakeError: as when it was opened for the first time.
        """
        if self._redialling is None:
            raise LocalError("nobody said how this connection is opened again")
        if self._ended is None:
            return self
        await self._pipe.close()  # or the worker would find that it answers still
        pipe = await self._redialling.dial()
        try:
            async with asyncio.timeout(self._handshake_timeout):
                return await self._go_on(pipe)
        except (TimeoutError, ConnectionError) as error:
            await pipe.close()
            raise no_answer(pipe) from error
        except BaseException:
            await pipe.close()
            raise

    def _wake(self) -> None:
        self._woken = False
        if self._ended is not None:
            self._end(self._ended)  # whoever has queued something meanwhile hears so, too
        elif self._sender is None and self._away is None:
            self._sender = asyncio.create_task(self._send_all(self._pipe))

    async def _send_all(self, pipe: Pipe, again: Sequence[Sent] = ()) -> None:
        """Sends what is to be sent `again`, and then what waits, until nothing does."""
        outgoing: QueuedMessage | None = None
        try:
            for one in again:
                await pipe.send(one.frame)
            del again
            while self._waits():
                outgoing = None
                if self.latency:
                    await asyncio.sleep(self.latency)
                while self._unarrived.full and pipe is self._pipe and self._away is None:
                    self._unarrived.room.clear()
                    await self._unarrived.room.wait()
                if self._away is not None or self._ended is not None:
                    return
                outgoing = self._outbox.next_message()
                if outgoing is not None:
                    await self._send_one(pipe, outgoing)
                elif self._outbox or not self._telling.due:
                    self._flush = False
                    await self._send_kept(pipe, self._encoded(self.session.posted(self._outbox.gathered())))
                else:
                    await pipe.send(self._encoded(self.session.posted(m.Ack())), message=False)
                self._drained.set()
        except (ConnectionError, OSError) as error:
            await asyncio.wait([self._reader], timeout=2)  # the worker may have said why it hung up
            self._cut(pipe, PlanrtError(str(error)))
            if outgoing is not None and not self._again:
                outgoing.fail(ConnectionResetError(str(self._ended)))
        except Exception as error:  # a mistake of ours: whoever waits must hear of it
            log.exception("sending_failed", worker=self.session.worker_id)
            self._end(PlanrtError(f"sending failed: {type(error).__name__}: {error}"))
            if outgoing is not None:
                outgoing.fail(ConnectionResetError(str(self._ended)))
        finally:
            self._sender = None
            self._drained.set()

    def _waits(self) -> bool:
        """Whether there is anything to send."""
        drops = self._outbox.drops
        return (
            len(self._outbox) > 0 or drops > DROPS_WAITING or (self._flush and drops > 0) or self._telling.due
        )

    def _encoded(self, envelope: m.Envelope, tensors: Sequence[torch.Tensor] = ()) -> Frame:
        frame = encode(m.to_wire(envelope), tensors, max_header=self._header_limit)
        self._telling.told()
        return frame

    async def _send_kept(
        self, pipe: Pipe, frame: Frame, arrived: asyncio.Future[None] | None = None, id: int = 0
    ) -> None:
        """Sends a message that the worker counts; it is kept until the worker has it."""
        if self._keeps:
            self._unarrived.add(Sent(frame, arrived, id))
        await pipe.send(frame)
        if self._keeps and pipe.hands_over:  # it has all before it, too
            self._unarrived.acknowledged(self.session.sent.sent)

    async def _send_one(self, pipe: Pipe, outgoing: QueuedMessage) -> None:
        if outgoing.given_up:
            return
        try:
            if outgoing.reply is not None:
                envelope = self.session.request(outgoing.body)
                outgoing.id = envelope.id
                self._pending[envelope.id] = outgoing
            else:
                envelope = self.session.posted(outgoing.body)
            frame = self._encoded(envelope, outgoing.tensors)
        except Exception as error:  # it was checked, but a device may fail to give its tensors' bytes
            self._pending.pop(outgoing.id, None)
            self.session.forget(outgoing.id)
            known = error if isinstance(error, PlanrtError) else LocalError(f"it cannot be sent: {error}")
            if outgoing.reply is None and outgoing.sent is None:
                self._untold = self._untold or known
            outgoing.fail(known)
            return
        nbytes = sum(tensor.nbytes for tensor in outgoing.tensors)
        outgoing.tensors = ()
        again = self._again
        waits = again and nbytes > COPIED_TO_SEND  # it was not copied
        sent = False
        try:
            await self._send_kept(pipe, frame, outgoing.sent if waits else None, outgoing.id)
            sent = True
        finally:
            if outgoing.sent is not None and not waits and (sent or again) and not outgoing.sent.done():
                outgoing.sent.set_result(None)  # if it did not arrive, it is sent again, from its copy

    async def _read(self, pipe: Pipe) -> None:
        try:
            while (received := await pipe.receive(self._allocate)) is not None:
                self._deliver(received)
                del received  # a reply belongs to who asked, not to a loop that waits for the next one
            cut = PlanrtError("the worker closed the connection")
        except (ConnectionError, OSError) as error:
            cut = PlanrtError(str(error))
        except ByeError as error:
            self.session.kept = None
            self._end(error)
            return
        except EndedError as error:
            self.session.kept = None
            self._session_lost = True
            self._end(error)
            await pipe.close()
            return
        except PlanrtError as error:
            await pipe.close()
            self._end(error)
            return
        except Exception as error:  # such as no memory for an answer: whoever waits must hear of it
            log.exception("receiving_failed", worker=self.session.worker_id)
            await pipe.close()
            self._end(PlanrtError(f"receiving failed: {type(error).__name__}: {error}"))
            return
        self._cut(pipe, cut)

    def _cut(self, pipe: Pipe, why: PlanrtError) -> None:
        """`pipe` carries nothing any more."""
        if self._ended is not None or not self._again:
            self._end(why)
        elif pipe is self._pipe and self._away is None:
            self._away = why
            self._unarrived.room.set()
            log.info("connection_cut", worker=self.session.worker_id, why=str(why))
            self._reconnecting = asyncio.create_task(self._reconnect(why))

    async def _reconnect(self, why: PlanrtError) -> None:
        """Tries to go on over another connection, for as long as that was asked for."""
        assert self._redialling is not None  # noqa: S101 - `_again` has seen it
        await self._pipe.close()
        failed = await try_again(self._redialling, self._go_on, why, over=lambda: self._ended is not None)
        if failed is not None:
            self._end(failed)

    async def _go_on(self, pipe: Pipe) -> Connection:
        """Goes on over `pipe`; returns what there is to use from now on: this, or a connection with a new session.

        Raises:
            TransportError, ConnectionError: that did not come about.
        """
        redialling = self._redialling
        assert redialling is not None  # noqa: S101 - its callers have seen it
        resumed = await shake_hands(
            pipe, self.session, redialling.token, for_others=redialling.for_others, ticket=redialling.ticket
        )
        session = self.session
        if self._sender is not None:  # its pipe is closed
            await asyncio.wait([self._sender])
        if resumed and session.kept is not None and session.kept.resumed:
            self._unarrived.acknowledged(session.kept.seen)
            self._ended = self._away = None
            self._traffic.add(pipe.traffic)
            pipe.traffic = self._traffic
            self._pipe = pipe
            self._reader = asyncio.create_task(self._read(pipe))
            self._sender = asyncio.create_task(self._send_all(pipe, list(session.sent)))
            log.info("session_goes_on", worker=session.worker_id)
            return self
        if resumed:  # it had none that could go on
            renewed, reason = session, "the session before was not kept"
            self.session = ClientSession(session.worker_id, address=session.address, limits=self.limits)
        else:
            renewed, reason = session.renewed()
        self._session_lost = True
        log.warning("session_lost", worker=session.worker_id, why=reason)
        self._end(PlanrtError(reason))
        fresh = Connection(
            pipe, renewed, limits=self.limits, turns=self._turns, redialling=redialling,
            handshake_timeout=self._handshake_timeout,
        )  # fmt: skip
        fresh.history, fresh.latency, fresh.timeout = self.history, self.latency, self.timeout
        fresh.on_renewed = self.on_renewed
        if self.on_renewed is not None:
            self.on_renewed(fresh)
        return fresh

    def _end(self, why: PlanrtError) -> None:
        """The connection has ended: whoever waits for it hears so.

        What was posted stays, where the session may go on (`reopen`): it is sent before anything new.
        """
        self._ended = self._ended or why
        self._away = None
        error = ConnectionResetError(str(self._ended))
        for outgoing in [*self._pending.values(), *self._outbox.messages()]:
            outgoing.fail(error)
        self._unarrived.fail(error, self._pending)
        for id in list(self._pending):
            self.session.forget(id)
        self._pending.clear()
        self._outbox.clear(failed_only=self._keeps and not self._session_lost)
        self._drained.set()

    def _deliver(self, received: Received[m.Envelope]) -> None:
        answered = self.session.reply(received.message)
        if self._keeps:
            self._unarrived.acknowledged(received.message.seen)
            self._telling.came(received.nbytes, knows=self._pipe.hands_over)
        if answered is None:
            return
        pending = self._pending.get(answered.id)
        if answered.once:
            assert isinstance(answered.result, RemoteError)  # noqa: S101 - only failures are told once
            keep_unless_heard(answered.result, keeper(self))
        if pending is None or pending.reply is None or pending.reply.done():
            if isinstance(answered.result, RemoteError):
                unheard(answered.result)
            return
        if isinstance(answered.result, RemoteError):
            pending.reply.set_exception(answered.result)
        else:
            pending.reply.set_result((answered.result, received.tensors))

    def keep(self, error: PlanrtError) -> None:
        """Has the next request raise `error`, which nobody has heard of. From any thread."""
        self._untold = self._untold or error

    def _allocate(self, envelope: m.Envelope, nbytes: int) -> Store:
        pending = self._pending.get(envelope.id)
        return (pending.allocate if pending else in_memory)(envelope, nbytes)

    def _lost(self, what: str) -> WorkerLostError:
        why = str(self._ended or "connection lost")
        return lost(self.session.worker_id, self.session.address, what, why, session_lost=self._session_lost)

    def late(self, body: m.Body, seconds: float) -> WorkerTimeoutError:
        """Returns the error for an answer to `body` that did not come within so many seconds."""
        away = "" if self._away is None else str(self._away)
        return late(self.session.worker_id, self.session.address, described(body), seconds, away)
