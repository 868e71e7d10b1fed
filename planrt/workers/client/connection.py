"""A client's connection to one worker: a pipe, a session, what is to be sent and what is awaited.

Everything leaves through one queue, in the order in which it was handed over. Ops are *posted* from any thread
and leave together, as many as have gathered while the message before them was being sent; requests are made on
planrt's loop and wait for their replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from planrt.errors import (
    HandshakeError,
    LocalError,
    PlanrtError,
    RemoteError,
    TransportError,
    WorkerLostError,
)
from planrt.logs import get_logger
from planrt.serde.frames import Allocate, Limits, Received, Store, encode, in_memory
from planrt.shown import shown
from planrt.workers.client.session import ClientSession
from planrt.workers.transport.pipes import Pipe, Traffic
from planrt.workers.wire import messages as m
from planrt.workers.wire.posted import MAX_OP_BYTES, Line
from planrt.workers.wire.sendable import sendable

log = get_logger("planrt.client")

B = TypeVar("B", bound=m.Body)

Response = tuple[m.Body, list[torch.Tensor]]
OPS_PER_MESSAGE = 1024
_HEADER_REST = 4096
"""Bytes of a header beside its ops."""
_DROP_AFTER = 0.5
"""Seconds after which a freed pointer's object is dropped by a message of its own, if no op took that along."""

MAX_WAITING = 20_000
"""Posted ops that may wait to be sent; who posts more waits until fewer do."""

_LINES_KEPT = 50_000
_DROPS_WAITING = 512
"""Freed pointers that may wait for an op to travel with before they get a message of their own."""


@dataclass(slots=True, eq=False)
class QueuedMessage:
    """A message to be sent: a request if somebody waits for a `reply`."""

    body: m.Body
    tensors: Sequence[torch.Tensor]
    reply: asyncio.Future[Response] | None
    sent: asyncio.Future[None] | None
    allocate: Allocate[m.Envelope] = in_memory
    id: int = 0
    given_up: bool = False


class Connection:
    """Sends posts and requests to one worker and matches its replies.

    `open` makes one. From any thread then: `post_op` and `post` for what is not answered, `enqueue` for a request.
    On the loop: `finish` waits for the answer to what `enqueue` returned, `request` does both. `close` at the
    end. All leave in the order of the calls.

    `turns` bounds how many computing requests are under way over all connections that share it: virtual workers
    compute one after the other, so that more would only fill memory with copies of parameters.
    """

    def __init__(
        self, pipe: Pipe, session: ClientSession, *, limits: Limits, turns: asyncio.Semaphore | None = None
    ) -> None:
        self.session = session
        self.loop = asyncio.get_running_loop()
        self._pipe = pipe
        self.limits = limits
        self.history: list[m.Body] | None = None
        """Where what is handed over is written down, if somebody wants to see it: without tensors."""
        self.latency = 0.0
        """Seconds that each message waits before it leaves, to try a slow network."""
        self._turns = turns
        self._outbox: deque[bytes | QueuedMessage] = deque()
        self._posting = threading.Lock()
        self._woken = False
        self._posted = 0
        self._lines: dict[int, Line | None] = {}
        self._drops: deque[int] = deque()
        self._dropping = threading.Lock()  # held by who takes from them; finalizers only add
        self._sender: asyncio.Task[None] | None = None
        self._drained: asyncio.Event = asyncio.Event()
        self._pending: dict[int, QueuedMessage] = {}
        self._ended: PlanrtError | None = None
        self._unsent: PlanrtError | None = (
            None  # why something posted could not be sent; shows at the next request
        )
        self._flush = False  # whether drops are to leave by themselves
        self._flush_due = False
        accepts = session.versions
        # Of a header, three quarters are for ops: they travel as base64, with a few bytes around each.
        rest = min(_HEADER_REST, accepts.header_limit // 4)
        self.op_bytes = min(MAX_OP_BYTES, accepts.header_limit * 3 // 4 - rest)
        """Longest op that may be posted."""
        self._header_limit = accepts.header_limit
        self._reader = asyncio.create_task(self._read())
        session.line_of = self.line
        session.place_of = self.place_in_plan

    @classmethod
    async def open(
        cls,
        pipe: Pipe,
        worker_id: str,
        *,
        timeout: float,
        limits: Limits,
        turns: asyncio.Semaphore | None = None,
        token: str = "",
        for_others: bool = False,
    ) -> Connection:
        """Shakes hands with the worker at the other end of `pipe` within `timeout` seconds.

        Raises:
            HandshakeError: it does not answer as worker `worker_id` of a planrt that fits this one, or does not
                know `token`.
        """
        session = ClientSession(worker_id, address=pipe.address, limits=limits)
        try:
            async with asyncio.timeout(timeout):
                answer = await _exchange(
                    pipe, session.hello(token, pipe.channel.binding, for_others=for_others)
                )
                if (proof := session.challenged(answer)) is not None:
                    answer = await _exchange(pipe, proof)
            session.welcome(answer)
        except (TimeoutError, ConnectionError) as error:
            await pipe.close()
            raise HandshakeError(
                f"{pipe.address} accepts connections but gave no answer to the handshake: is it a planrt worker?",
                address=pipe.address,
            ) from error
        except TransportError:
            await pipe.close()
            raise
        for what, here, there in session.differences():
            log.warning("versions_differ", worker=worker_id, what=what, here=here, there=there)
        return cls(pipe, session, limits=limits, turns=turns)

    @property
    def traffic(self) -> Traffic:
        """The messages and bytes that went through the connection so far."""
        return self._pipe.traffic

    @property
    def why_ended(self) -> str:
        """The reason why the connection has ended, safe to show; ``""`` while it has not."""
        return "" if self._ended is None else shown(str(self._ended), 200)

    @property
    def closed(self) -> bool:
        """True once the connection has ended."""
        return self._ended is not None

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
        with self._posting:
            self._lines[self._posted] = line
            self._posted += 1
            self._outbox.append(packed)
        if len(self._lines) > _LINES_KEPT:
            self._forget_lines()
        self._wake_soon()
        return len(self._outbox) < MAX_WAITING

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
        self._outbox.append(QueuedMessage(checked, tensors, None, None))
        self._wake_soon()

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
        if self._unsent is not None:
            unsent, self._unsent = self._unsent, None
            raise unsent
        if drops:
            self.post_drops()
        reply: asyncio.Future[Response] = asyncio.Future(loop=self.loop)
        reply.add_done_callback(
            lambda done: done.cancelled() or done.exception()
        )  # it may be read never, or late
        outgoing = QueuedMessage(body, tensors, reply, None, allocate)
        self._outbox.append(outgoing)
        self._wake_soon()
        return outgoing

    def drop(self, id: int) -> None:
        """Nobody points at object `id` any more. Called by finalizers: in any thread, at any time."""
        self._drops.append(id)
        if self._ended is not None:
            return
        if len(self._drops) > _DROPS_WAITING:
            self._wake_soon()
        elif not self._flush_due:
            self._flush_due = True
            with contextlib.suppress(RuntimeError):  # the loop is gone at the end of the process
                self.loop.call_soon_threadsafe(self.loop.call_later, _DROP_AFTER, self._flush_drops)

    def post_drops(self) -> None:
        """Frees what nobody points at before whatever is handed over next."""
        while drops := self.take_drops():
            self._outbox.append(QueuedMessage(m.Post([], list(drops)), (), None, None))
            self._wake_soon()

    def check_open(self) -> None:
        """Raises WorkerLostError if the connection has ended."""
        if self._ended is not None:
            raise self._lost("what comes next") from self._ended

    def take_drops(self) -> tuple[int, ...]:
        """Objects to free before the next op, which takes them along."""
        if not self._drops:
            return ()
        with self._dropping:
            count = min(len(self._drops), OPS_PER_MESSAGE, max(1, self.op_bytes // 16))
            return tuple([self._drops.popleft() for _ in range(count)])

    def line(self, number: int | None) -> str | None:
        """``file:line`` that made the posted op of that number, where it is still known."""
        found = self._lines.get(number) if number is not None else None
        return f"{found[0].co_filename}:{found[1]}" if found else None

    def post_drop_of(self, id: int) -> bool:
        """Frees object `id`, if it waits to be freed, before whatever is handed over next; says whether it did."""
        found = id in self._drops
        if found:
            self.post_drops()
        return found

    def flush_drops(self) -> None:
        """Frees what nobody points at without waiting for the next op."""
        self._flush = True
        self._wake_soon()

    def _flush_drops(self) -> None:
        """Drops that no op took along leave by themselves."""
        self._flush_due = False
        if self._drops and self._ended is None:
            self._flush = True
            self._wake()

    def place_in_plan(self, number: int | None, index: int | None) -> str:
        """Returns the line of op `index` of the plan that the posted op of that number called; see `Graph.place`."""
        found = self._lines.get(number) if number is not None else None
        graph = found[2]() if found is not None and len(found) == 3 else None
        return graph.place(index) if graph is not None and index is not None else ""

    def forget_soon(self, outgoing: Sequence[QueuedMessage]) -> None:
        """`forget` of several requests, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is gone at the end of the process
            self.loop.call_soon_threadsafe(lambda: deque(map(self.forget, outgoing), maxlen=0))

    def _wake_soon(self) -> None:
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is gone at the end of the process
                self.loop.call_soon_threadsafe(self._wake)

    def _forget_lines(self) -> None:
        with self._posting:
            for number in list(self._lines)[: _LINES_KEPT // 2]:
                del self._lines[number]

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
            RemoteError: the worker could not do it. WorkerLostError: the connection ended first.
        """
        try:
            assert outgoing.reply is not None  # noqa: S101 - it is a request, and nobody finished it before
            return await outgoing.reply
        except ConnectionError as error:
            raise self._lost(type(outgoing.body).__name__) from error
        finally:
            self.forget(outgoing)

    def forget(self, outgoing: QueuedMessage) -> None:
        """Nobody waits for the reply to a request any more. To be called on planrt's loop."""
        outgoing.given_up = True
        outgoing.reply = None
        self._pending.pop(outgoing.id, None)
        self.session.forget(outgoing.id)

    async def send(self, body: m.Body, tensors: Sequence[torch.Tensor]) -> None:
        """Posts a message and waits until it has left: the tensors may change then.

        Raises:
            WorkerLostError: the connection ended first.
            OptionError, LocalError, MessageTooLargeError: the message cannot be sent, and was not.
        """
        if self._ended is not None:
            raise self._lost(type(body).__name__) from self._ended
        outgoing = QueuedMessage(self._checked(body, tensors), tensors, None, self.loop.create_future())
        self._outbox.append(outgoing)
        self._wake()
        try:
            await asyncio.shield(outgoing.sent)  # type: ignore[arg-type]
        except ConnectionError as error:
            raise self._lost(type(body).__name__) from error

    async def drained(self) -> None:
        """Returns when few posted ops wait to be sent."""
        while len(self._outbox) > MAX_WAITING // 2 and self._ended is None:
            self._drained.clear()
            await self._drained.wait()

    async def close(self) -> None:
        """Closes the connection once what was posted has left; requests under way fail. Closing twice is fine."""
        if self._sender is not None and self._ended is None:
            with contextlib.suppress(TimeoutError, PlanrtError, ConnectionError):
                await asyncio.wait_for(asyncio.shield(self._sender), timeout=2)
        self._ended = self._ended or PlanrtError("closed by this side")
        await self._pipe.close()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    def _wake(self) -> None:
        self._woken = False
        if self._ended is not None:
            self._end(self._ended)  # whoever has queued something meanwhile hears so, too
        elif self._sender is None:
            self._sender = asyncio.create_task(self._send_all())

    async def _send_all(self) -> None:
        """Sends what waits, until nothing does."""
        outgoing: QueuedMessage | None = None
        try:
            while self._outbox or len(self._drops) > _DROPS_WAITING or (self._flush and self._drops):
                outgoing = None
                if self.latency:
                    await asyncio.sleep(self.latency)
                if not self._outbox or isinstance(self._outbox[0], bytes):
                    self._flush = False
                    await self._pipe.send(
                        encode(m.to_wire(m.Envelope(0, self._gathered())), max_header=self._header_limit)
                    )
                else:
                    first = self._outbox.popleft()
                    assert isinstance(first, QueuedMessage)  # noqa: S101 - bytes were handled above
                    outgoing = first
                    del first
                    await self._send_one(outgoing)
                self._drained.set()
        except (ConnectionError, OSError) as error:
            await asyncio.wait([self._reader], timeout=2)  # the worker may have said why it hung up
            self._end(PlanrtError(str(error)))
            if outgoing is not None:
                _fail(outgoing, ConnectionResetError(str(self._ended)))
        except Exception as error:  # a mistake of ours: whoever waits must hear of it
            log.exception("sending_failed", worker=self.session.worker_id)
            self._end(PlanrtError(f"sending failed: {type(error).__name__}: {error}"))
            if outgoing is not None:
                _fail(outgoing, ConnectionResetError(str(self._ended)))
        finally:
            self._sender = None
            self._drained.set()

    def _gathered(self) -> m.Post:
        """A message of the ops at the head of the queue; when none are left, with what nobody points at."""
        with (
            self._dropping
        ):  # or others would take those that are counted now, and later ones would go in their place
            return self._gather(len(self._drops))

    def _gather(self, drops: int) -> m.Post:
        """`drops` is how many freed pointers there were before: whatever uses these is in the queue by now."""
        ops: list[bytes] = []
        room = self.op_bytes
        while self._outbox and len(ops) < OPS_PER_MESSAGE:
            head = self._outbox[0]
            if not isinstance(head, bytes) or (ops and len(head) > room):
                break
            ops.append(head)
            room -= len(head) + 5
            self._outbox.popleft()
        if self._outbox:
            return m.Post(ops)
        return m.Post(ops, [self._drops.popleft() for _ in range(min(drops, max(1, room // 16)))])

    async def _send_one(self, outgoing: QueuedMessage) -> None:
        if outgoing.given_up:
            return
        try:
            if outgoing.reply is not None:
                envelope = self.session.request(outgoing.body)
                outgoing.id = envelope.id
                self._pending[envelope.id] = outgoing
            else:
                envelope = m.Envelope(0, outgoing.body)
            frame = encode(m.to_wire(envelope), outgoing.tensors, max_header=self._header_limit)
        except Exception as error:  # it was checked, but a device may fail to give its tensors' bytes
            self._pending.pop(outgoing.id, None)
            self.session.forget(outgoing.id)
            known = error if isinstance(error, PlanrtError) else LocalError(f"it cannot be sent: {error}")
            if outgoing.reply is None and outgoing.sent is None:
                self._unsent = self._unsent or known
            _fail(outgoing, known)
            return
        await self._pipe.send(frame)
        outgoing.tensors = ()
        if outgoing.sent is not None and not outgoing.sent.done():
            outgoing.sent.set_result(None)

    async def _read(self) -> None:
        ended: PlanrtError
        try:
            while (received := await self._pipe.receive(self._allocate)) is not None:
                self._deliver(received)
                del received  # a reply belongs to who asked, not to a loop that waits for the next one
            ended = PlanrtError("the worker closed the connection")
        except PlanrtError as error:
            ended = error
            await self._pipe.close()
        except (ConnectionError, OSError) as error:
            ended = PlanrtError(str(error))
        except Exception as error:  # such as no memory for an answer: whoever waits must hear of it
            log.exception("receiving_failed", worker=self.session.worker_id)
            ended = PlanrtError(f"receiving failed: {type(error).__name__}: {error}")
            await self._pipe.close()
        self._end(ended)

    def _end(self, why: PlanrtError) -> None:
        """The connection has ended: whoever waits for it hears so."""
        self._ended = self._ended or why
        error = ConnectionResetError(str(self._ended))
        for outgoing in [*self._pending.values(), *self._outbox]:
            if isinstance(outgoing, QueuedMessage):
                _fail(outgoing, error)
        self._outbox.clear()
        self._drained.set()

    def _deliver(self, received: Received[m.Envelope]) -> None:
        answered = self.session.reply(received.message)
        pending = self._pending.get(answered.id) if answered else None
        if answered is None or pending is None or pending.reply is None or pending.reply.done():
            return
        if isinstance(answered.result, RemoteError):
            pending.reply.set_exception(answered.result)
        else:
            pending.reply.set_result((answered.result, received.tensors))

    def _allocate(self, envelope: m.Envelope, nbytes: int) -> Store:
        pending = self._pending.get(envelope.id)
        return (pending.allocate if pending else in_memory)(envelope, nbytes)

    def _lost(self, what: str) -> WorkerLostError:
        return WorkerLostError(
            f"worker {self.session.worker_id!r} at {self._pipe.address} is gone "
            f"({self._ended or 'connection lost'}): no answer to {what}",
            address=self._pipe.address,
            worker_id=self.session.worker_id,
        )


async def _exchange(pipe: Pipe, message: m.Envelope) -> m.Envelope:
    """Sends a message of the handshake; the answer."""
    await pipe.send(encode(m.to_wire(message)))
    received = await pipe.receive()
    if received is None:
        raise HandshakeError(f"{pipe.address} closed the connection in the handshake", address=pipe.address)
    return received.message


def _fail(outgoing: QueuedMessage, error: Exception) -> None:
    for future in (outgoing.reply, outgoing.sent):
        if future is not None and not future.done():
            future.set_exception(error)
