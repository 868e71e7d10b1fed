"""`WebsocketClientWorker`: a worker behind a websocket, as its client sees it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, overload

import torch

from planrt.deadlines import seconds_of
from planrt.errors import OptionError
from planrt.loop import on_loop, run
from planrt.serde.frames import Limits
from planrt.types import as_text, as_whole
from planrt.workers.base import DEFAULT_TIMEOUT, BaseWorker, worker_id
from planrt.workers.client.connection import Connection
from planrt.workers.client.redialling import RECONNECT_SECONDS, Redialling
from planrt.workers.transport.addresses import DialOptions, dial, transport_of


class Reconnecting:
    """`connect`, which is two things: of the class, it connects to a worker, to be awaited; of a worker, which it
    returns, it connects again.
    """

    def __init__(self, first: Any) -> None:
        self._first = first

    @overload
    def __get__(
        self, worker: None, kind: type[WebsocketClientWorker]
    ) -> Callable[..., Coroutine[Any, Any, WebsocketClientWorker]]: ...

    @overload
    def __get__(
        self, worker: WebsocketClientWorker, kind: type[WebsocketClientWorker]
    ) -> Callable[[], WebsocketClientWorker]: ...

    def __get__(self, worker: WebsocketClientWorker | None, kind: type[WebsocketClientWorker]) -> Any:
        if worker is None:
            return self._first.__get__(None, kind)
        again: WebsocketClientWorker = worker

        def connect() -> WebsocketClientWorker:
            """Connects again after `close`, or after the worker was given up; see `async_reconnect`."""
            return run(again.async_reconnect(), instead="await worker.async_reconnect()")

        return connect


class WebsocketClientWorker(BaseWorker):
    """A worker behind a websocket: ``WebsocketClientWorker("alice", "127.0.0.1", 8777)``, or as in PySyft 0.2
    ``WebsocketClientWorker(hook, "127.0.0.1", 8777, id="alice")``.

    Connects and shakes hands at once; ``await WebsocketClientWorker.connect(id, uri)`` is the form for event loops.
    With `reconnect`, a connection that is cut is opened again by itself, and everything goes on: pointers, plans, what
    is under way. The worker keeps the session for some time (two minutes, unless its owner says otherwise), so
    ``worker.connect()`` after `close`, or after a cut, finds its objects. Where it has them no longer, their pointers
    say so at their next use.

    Args:
        hook: the `TorchHook`, as the tutorials pass it, or the id.
        host, port: where it listens; or `uri`, ``ws://host:port`` or ``wss://host:port``, or an address of another
            transport that this process knows (`planrt.workers.transport.addresses`).
        secure: over TLS, ``wss://``. The server's certificate is checked against the system's authorities, or against
            those in the file `ca`; `cert` and `key` are files of what this client shows of itself, to a worker that
            asks for it, all in PEM.
        id: the worker's name, which it must answer with.
        is_client_worker: kept as an attribute; objects are freed with their pointers either way.
        log_msgs: keep what is sent to the worker in `msg_history`.
        verbose: taken, and without effect: planrt logs to the logger "planrt".
        message_pending_time: seconds that every message waits before it leaves, to try a slow network.
        data: not taken: a server holds its own data.
        timeout: seconds to wait for the connection and its handshake. limits: the sizes of messages that it takes.
        call_timeout: seconds that each call may wait for the worker, unless `planrt.waiting` says less; None for as
            long as it takes. reconnect: seconds for which a connection that was lost is tried again; 0, the default,
            for not at all.
        token: proves to the worker which of its users this is. It does not travel.
        auto_add: whether `get_worker` finds it.

    Raises:
        ConnectError: nobody answers there. HandshakeError: not a planrt worker called `id`, or an unknown token.
        OptionError: an argument that cannot be used.
    """

    def __init__(
        self,
        hook: object = None,
        host: str = "127.0.0.1",
        port: int = 8777,
        secure: bool = False,
        id: str | None = None,
        is_client_worker: bool = False,
        log_msgs: bool = False,
        verbose: bool = False,
        data: Sequence[torch.Tensor] | None = None,
        timeout: float | None = None,
        *,
        uri: str | None = None,
        token: str = "",
        limits: Limits | None = None,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        auto_add: bool = True,
        message_pending_time: float = 0.0,
        call_timeout: float | None = None,
        reconnect: float = RECONNECT_SECONDS,
    ) -> None:
        id = worker_id(hook, id, 'WebsocketClientWorker(hook, host, port, id="alice")')
        if data:
            raise OptionError(
                "data= is for the worker that holds it: give it to WebsocketServerWorker(data=...), or send() tensors"
            )
        if uri is None:
            uri = f"{'wss' if secure else 'ws'}://{as_text(host, 'host')}:{as_whole(port, 'port')}"
        elif secure and not transport_of(uri).encrypted:
            raise OptionError(f"secure=True means wss://, and uri is {uri!r}: write wss:// there")
        waits = seconds_of(timeout) or DEFAULT_TIMEOUT
        self._opening = Opening(
            uri, DialOptions(waits, limits or Limits(), ca, cert, key), token, _seconds(reconnect)
        )
        opened = run(self._opening.open(id), instead="await WebsocketClientWorker.connect(id, uri)")
        super().__init__(
            id, opened, is_client_worker=is_client_worker, auto_add=auto_add, log_msgs=log_msgs,
            message_pending_time=message_pending_time, call_timeout=call_timeout,
        )  # fmt: skip

    @classmethod
    async def _connect(
        cls,
        id: str,
        uri: str,
        *,
        token: str = "",
        timeout: float = DEFAULT_TIMEOUT,
        limits: Limits | None = None,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        call_timeout: float | None = None,
        reconnect: float = RECONNECT_SECONDS,
    ) -> Self:
        """Connects to the worker `id` at `uri` within `timeout` seconds; awaitable from any loop."""
        worker = cls.__new__(cls)
        options = DialOptions(seconds_of(timeout) or DEFAULT_TIMEOUT, limits or Limits(), ca, cert, key)
        worker._opening = Opening(uri, options, token, _seconds(reconnect))
        BaseWorker.__init__(worker, id, await worker._opening.open(id), call_timeout=call_timeout)
        return worker

    connect = Reconnecting(_connect)

    @on_loop
    async def async_reconnect(self) -> Self:
        """Connects again, if the connection has ended. The objects of the session are there still, if the worker has
        kept it; else it is a new one.

        Raises:
            ConnectError, HandshakeError: as when it was made.
        """
        if self._connection.closed:
            self._reconnected(await self._connection.reopen())
        return self


@dataclass(frozen=True, slots=True)
class Opening:
    """The way in which the connection to a worker is opened, every time."""

    uri: str
    options: DialOptions
    token: str = field(repr=False)
    reconnect: float = RECONNECT_SECONDS

    @on_loop
    async def open(self, id: str) -> Connection:
        """Opens a new connection with a new session."""
        redialling = Redialling(
            lambda: dial(self.uri, self.options), token=self.token, seconds=self.reconnect
        )
        return await Connection.open(
            await redialling.dial(),
            id,
            timeout=self.options.timeout,
            limits=self.options.limits,
            token=self.token,
            redialling=redialling,
        )


def _seconds(reconnect: object) -> float:
    """For how long a connection is tried again."""
    if reconnect == 0 and not isinstance(reconnect, bool):
        return 0.0
    seconds = seconds_of(reconnect, "reconnect")
    if seconds is None:
        raise OptionError("reconnect is a number of seconds, 0 for not at all")
    return seconds
