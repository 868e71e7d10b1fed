"""``/health`` and ``/metrics`` over HTTP, for whoever watches a worker or a run: `MetricsServer`.

It listens on this machine only, unless its owner writes otherwise, and answers no web page: the rules of
`planrt.workers.transport.callers` hold, and what a browser says of a page's request (``Sec-Fetch-Site``). Whoever
reaches it reads figures, and no name but those of workers. The format is that of `prometheus_client`, which the extra
``metrics`` brings; websockets reads the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers, MultipleValuesError
from websockets.http11 import Request, Response

from planrt.errors import ConnectError, OptionError
from planrt.extras import check_installed, needed
from planrt.logs import get_logger
from planrt.loop import run
from planrt.metrics import Distribution, Family, Watched, merged
from planrt.types import as_text, as_whole
from planrt.workers.serving.metrics_options import MetricsOptions, check_consent
from planrt.workers.transport.callers import Callers
from planrt.workers.transport.places import Places, placed
from planrt.workers.transport.websocket import why_not_listening

_PATIENCE: Final = 5.0
"""Seconds that a request may take to come."""
_CONNECTIONS: Final = 64, 256
"""Connections of an address, and of all: few of the process's files."""

log = get_logger("planrt.worker")

_quiet = logging.getLogger("planrt.metrics")
"""What websockets logs of requests that are no websocket's is no news here."""
_quiet.setLevel(logging.CRITICAL)


class MetricsServer:
    """Serves ``/health`` and ``/metrics`` of what is `watched`::

        with MetricsServer(scheduler.watched, port=9464) as server:
            print(server.address)

    `watched` are `scheduler.watched` of a `RoundScheduler`, and `worker.watched` of a `VirtualWorker`; a worker behind
    a websocket serves its own (`WebsocketServerWorker(metrics_port=...)`). ``/health`` answers 200 while all of them
    work, and 503 with the reason when one does not. `port` 0 takes a free one; `address` is where it listens. `hosts`
    are names by which it may be addressed besides IP addresses and those of this machine.

    Raises:
        OptionError: other machines reach `host`, and nobody wrote that they may (`insecure`): it asks nobody who they
            are. MissingPackageError: prometheus-client is not installed. ConnectError, when the block begins: the port
            is taken, or the host is none of this machine's.
    """

    def __init__(
        self,
        *watched: Watched,
        port: int = 0,
        host: str = "127.0.0.1",
        insecure: bool = False,
        hosts: Sequence[str] = (),
    ) -> None:
        for one in watched:
            if not (hasattr(one, "metrics") and hasattr(one, "health")):
                raise OptionError(
                    f"a {type(one).__name__} is not watched itself: pass scheduler.watched, or worker.watched"
                )
        self._host, self._port = as_text(host, "host"), as_whole(port, "port")
        if not 0 <= self._port <= 65_535:
            raise OptionError(f"a port is a number from 0 (any free one) to 65535, not {port}")
        check_consent(self._host, insecure=insecure)
        check_installed("prometheus_client", by="a MetricsServer", extra="metrics")
        self._watched = list(watched)
        self._callers = Callers(self._host, hosts=hosts)
        self._turn = asyncio.Lock()
        self._server: Server | None = None
        self.address = ""
        """``http://HOST:PORT``, while it serves."""

    async def __aenter__(self) -> Self:
        if self._server is not None:
            raise OptionError(f"it serves already, at {self.address}: make another MetricsServer")
        try:
            self._server = await serve(
                _no_websockets,
                self._host,
                self._port,
                create_connection=placed(ServerConnection, Places(*_CONNECTIONS)),
                process_request=self._answer,
                open_timeout=_PATIENCE,
                close_timeout=1,
                server_header=None,
                logger=_quiet,
            )
        except OSError as error:
            where = f"http://{self._host}:{self._port}"
            reason = why_not_listening(error, self._host, self._port)
            raise ConnectError(f"cannot serve metrics at {where}: {reason}", address=where) from error
        port = next(iter(self._server.sockets)).getsockname()[1]
        self.address = f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        server, self._server, self.address = self._server, None, ""
        if server is not None:
            server.close()
            await server.wait_closed()

    def __enter__(self) -> Self:
        return run(self.__aenter__(), instead="async with MetricsServer(...)")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        run(self.__aexit__(kind, error, trace), instead="async with MetricsServer(...)")

    # ------------------------------------------------------------------------------------- requests

    async def _answer(self, connection: ServerConnection, request: Request) -> Response:
        try:
            refusal = self._refusal(request)
        except MultipleValuesError:
            refusal = "one Host and one Origin at most"
        if refusal is not None:
            return _response(HTTPStatus.FORBIDDEN, "text/plain; charset=utf-8", f"{refusal}\n".encode())
        if getattr(request, "method", "GET") != "GET":  # websockets before 16 lets nothing else through
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain; charset=utf-8", b"GET only\n")
        path = urlsplit(request.path).path
        if path == "/health":
            return await self._in_turn(self._health)
        if path == "/metrics":
            accepts = ", ".join(request.headers.get_all("Accept"))
            return await self._in_turn(lambda: self._exposed(accepts))
        return _response(
            HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"there are /health and /metrics\n"
        )

    def _refusal(self, request: Request) -> str | None:
        if request.headers.get("Sec-Fetch-Site", "none") != "none":
            return "web pages may not read this"
        return self._callers.refusal(request.headers)

    async def _in_turn(self, answer: Callable[[], Response]) -> Response:
        """Adding up what a worker holds can take a while: beside the loop, and once at a time."""
        async with self._turn:
            try:
                return await asyncio.to_thread(answer)
            except Exception as error:  # one who watches must not be left without an answer
                log.exception("metrics_unread", address=self.address)
                told = f"this cannot be told now: {type(error).__name__}\n"
                return _response(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", told.encode())

    def _health(self) -> Response:
        found = [one.health() for one in self._watched]
        bad = [one for one in found if not one.ok]
        told: dict[str, Any] = {"status": (bad or found)[0].status if found else "idle", "ok": not bad}
        if len(found) == 1:
            told |= found[0].facts
        elif found:
            told["parts"] = [{"status": one.status, "ok": one.ok, **one.facts} for one in found]
        status = HTTPStatus.SERVICE_UNAVAILABLE if bad else HTTPStatus.OK
        return _response(status, "application/json", f"{json.dumps(told)}\n".encode())

    def _exposed(self, accepts: str) -> Response:
        exposition = needed("prometheus_client.exposition", by="a MetricsServer", extra="metrics")
        encode, content_type = exposition.choose_encoder(accepts)
        return _response(HTTPStatus.OK, content_type, encode(registry_of(self._watched)))


async def _no_websockets(connection: ServerConnection) -> None:
    """Every request has been answered before."""


def _response(status: HTTPStatus, content_type: str, body: bytes) -> Response:
    headers = Headers(
        {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Connection": "close",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
        }
    )
    return Response(status, status.phrase, headers, body)


def registry_of(watched: Iterable[Watched]) -> Any:
    """Returns a registry of `prometheus_client` that has the metrics of `watched`, and those of this process."""
    client = needed("prometheus_client", by="--metrics-port", extra="metrics")
    core = needed("prometheus_client.core", by="--metrics-port", extra="metrics")
    everything = list(watched)

    class Collector:
        """What `prometheus_client` asks."""

        def collect(self) -> Iterable[Any]:
            """Returns the metrics as it has them."""
            families = merged(family for one in everything for family in one.metrics())
            return [_as_theirs(family, core) for family in families]

        def describe(self) -> Iterable[Any]:
            """Returns nothing: so it does not collect in order to know names."""
            return []

    registry = client.CollectorRegistry()
    registry.register(Collector())
    client.ProcessCollector(registry=registry)
    return registry


def _as_theirs(family: Family, core: Any) -> Any:
    if family.kind == "histogram":
        made = core.HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for labels, sample in family.samples.items():
            assert isinstance(sample, Distribution)  # noqa: S101 - for the type checker
            names = [*map(str, sample.bounds), "+Inf"]
            made.add_metric(labels, list(zip(names, sample.counts, strict=True)), sample.total)
        return made
    kind = core.CounterMetricFamily if family.kind == "counter" else core.GaugeMetricFamily
    made = kind(family.name, family.help, labels=family.labels)
    for labels, sample in family.samples.items():
        made.add_metric(labels, sample)
    return made


@contextlib.asynccontextmanager
async def serving(options: MetricsOptions, *watched: Watched) -> AsyncIterator[str]:
    """Serves metrics for the block, where the options name a port; gives the address, or ``""``."""
    if options.port is None:
        yield ""
        return
    async with MetricsServer(
        *watched,
        port=options.port,
        host="127.0.0.1" if options.host is None else options.host,
        insecure=options.insecure,
        hosts=options.hosts,
    ) as server:
        yield server.address
