"""A client's connection to one worker: a pipe, a session and the requests under way. Lives on planrt's loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from planrt.errors import HandshakeError, PlanrtError, RemoteError, TransportError, WorkerLostError
from planrt.logs import get_logger
from planrt.serde.frames import Allocate, Limits, Received, Store, encode, in_memory
from planrt.workers import messages as m
from planrt.workers.pipes import Pipe, Traffic
from planrt.workers.session import ClientSession

log = get_logger("planrt.client")

Reply = tuple[m.Body, list[torch.Tensor]]


@dataclass(slots=True)
class _Pending:
    reply: asyncio.Future[Reply]
    allocate: Allocate[m.Envelope]


class Connection:
    """Sends requests to one worker and matches its replies.

    `turns` bounds how many requests are under way over all connections that share it: virtual workers compute
    one after the other, so that more would only fill memory with copies of parameters.
    """

    def __init__(
        self, pipe: Pipe, session: ClientSession, *, limits: Limits, turns: asyncio.Semaphore | None = None
    ) -> None:
        self.session = session
        self._pipe = pipe
        self._limits = limits
        self._turns = turns
        self._sending = asyncio.Lock()
        self._pending: dict[int, _Pending] = {}
        self._ended: PlanrtError | None = None
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(
        cls,
        pipe: Pipe,
        worker_id: str,
        *,
        timeout: float,
        limits: Limits,
        turns: asyncio.Semaphore | None = None,
    ) -> Connection:
        """Shakes hands with the worker at the other end of `pipe` within `timeout` seconds.

        Raises:
            HandshakeError: it does not answer as worker `worker_id` of a planrt that fits this one.
        """
        session = ClientSession(worker_id, address=pipe.address)
        try:
            async with asyncio.timeout(timeout):
                await pipe.send(encode(m.to_wire(session.hello())))
                received = await pipe.receive()
            if received is None:
                raise HandshakeError(
                    f"{pipe.address} closed the connection in the handshake", address=pipe.address
                )
            session.welcome(received.message)
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
        """What went through the connection so far."""
        return self._pipe.traffic

    async def request(
        self,
        body: m.Body,
        tensors: Sequence[torch.Tensor] = (),
        *,
        allocate: Allocate[m.Envelope] = in_memory,
    ) -> Reply:
        """Sends `body` and waits for its reply; `allocate` says where the reply's tensors go.

        The tensors must not change before the request has left.

        Raises:
            RemoteError: the worker could not do it.
            WorkerLostError: the connection ended first.
        """
        async with self._turns or contextlib.nullcontext():
            if self._ended is not None:
                raise self._lost(body) from self._ended
            envelope = self.session.request(body)
            frame = encode(m.to_wire(envelope), tensors, max_header=self._limits.header)
            pending = _Pending(asyncio.get_running_loop().create_future(), allocate)
            self._pending[envelope.id] = pending
            try:
                async with self._sending:
                    # A frame cut short would end the connection: who gives up waiting does not stop the sending.
                    sending = asyncio.ensure_future(self._pipe.send(frame))
                    sending.add_done_callback(lambda done: done.cancelled() or done.exception())
                    await asyncio.shield(sending)
                del frame
                return await pending.reply
            except ConnectionError as error:
                raise self._lost(body) from error
            finally:
                del self._pending[envelope.id]
                self.session.forget(envelope.id)

    async def close(self) -> None:
        """Closes the connection; requests under way fail. Closing twice is fine."""
        self._ended = self._ended or PlanrtError("closed by this side")
        await self._pipe.close()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

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
        self._ended = self._ended or ended
        for pending in self._pending.values():
            if not pending.reply.done():
                pending.reply.set_exception(ConnectionResetError(str(self._ended)))

    def _deliver(self, received: Received[m.Envelope]) -> None:
        answered = self.session.reply(received.message)
        pending = self._pending.get(answered.id) if answered else None
        if answered is None or pending is None or pending.reply.done():
            return
        if isinstance(answered.result, RemoteError):
            pending.reply.set_exception(answered.result)
        else:
            pending.reply.set_result((answered.result, received.tensors))

    def _allocate(self, envelope: m.Envelope, nbytes: int) -> Store:
        pending = self._pending.get(envelope.id)
        return (pending.allocate if pending else in_memory)(envelope, nbytes)

    def _lost(self, body: m.Body) -> WorkerLostError:
        return WorkerLostError(
            f"worker {self.session.worker_id!r} at {self._pipe.address} is gone "
            f"({self._ended or 'connection lost'}): no answer to {type(body).__name__}",
            address=self._pipe.address,
            worker_id=self.session.worker_id,
        )
