"""Proxies that stand between a client and a worker: one counts messages, one cuts connections and slows them down."""

import asyncio
import contextlib
from collections import Counter

from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

from planrt.loop import background_loop


class CountingProxy:
    """Forwards whole messages; `counts["up"]` and `counts["down"]` are messages, `sizes` their bytes.

    `up` is client to worker. `kill_after` breaks the connection after that many messages down.
    """

    def __init__(self, upstream: str, *, kill_after: int | None = None, delay: float = 0.0) -> None:
        self.upstream = upstream
        self.counts: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()
        self._kill_after = kill_after
        self._delay = delay

    async def _forward(self, direction, source, target):
        with contextlib.suppress(ConnectionClosed):
            async for message in source:
                self.counts[direction] += 1
                self.sizes[direction] += len(message)
                if (
                    direction == "down"
                    and self._kill_after is not None
                    and self.counts["down"] > self._kill_after
                ):
                    source.transport.abort()
                    target.transport.abort()
                    return
                if direction == "down" and self._delay:
                    await asyncio.sleep(self._delay)
                # In pieces, as it came: a receiver takes fragments of at most 1 MiB.
                pieces = [message[start : start + (1 << 20)] for start in range(0, len(message), 1 << 20)]
                await target.send(pieces[0] if len(pieces) == 1 else iter(pieces))
        await target.close()

    async def _handle(self, client):
        async with connect(self.upstream, compression=None, max_size=None) as worker:
            await asyncio.gather(self._forward("up", client, worker), self._forward("down", worker, client))

    @contextlib.contextmanager
    def running(self):
        """Runs on planrt's background loop for the block; yields the address to connect to."""
        ready: asyncio.Future = asyncio.run_coroutine_threadsafe(self._listen(), background_loop())
        server = ready.result()
        try:
            yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
        finally:
            asyncio.run_coroutine_threadsafe(self._close(server), background_loop()).result()

    async def _listen(self):
        return await serve(self._handle, "127.0.0.1", 0, compression=None, max_size=None)

    async def _close(self, server):
        server.close()
        await server.wait_closed()


class CuttingProxy:
    """Forwards bytes to ``host:port`` until it is told to cut, as a network does that fails.

    `up` is client to worker. `cut` breaks the connections that there are, and `cut_at` once so many bytes more went one
    way; while `refuses`, new ones are broken as well. `rate` is how many bytes pass in a second, each way, all
    connections together; 0 for as many as come. All of it may be set from any thread.
    """

    def __init__(self, upstream: str, *, rate: float = 0.0) -> None:
        self._host, _, port = upstream.partition("://")[2].rpartition(":")
        self._port = int(port)
        self.rate = rate
        self.refuses = False
        self.connections = 0
        self._left: dict[str, int] = {}
        self._open: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Breaks all connections now."""
        background_loop().call_soon_threadsafe(self._cut)

    def cut_at(self, direction: str, nbytes: int) -> None:
        """Breaks all connections once `nbytes` more bytes went that way; 0: with the next ones."""
        self._left[direction] = nbytes

    @property
    def cuts_later(self) -> bool:
        """Whether a `cut_at` is still to come."""
        return bool(self._left)

    def _cut(self) -> None:
        self._left.clear()
        for writer in list(self._open):
            writer.transport.abort()

    async def _forward(self, direction, reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 14):
                if self.rate:
                    await asyncio.sleep(len(data) / self.rate)
                left = self._left.get(direction)
                if left is not None and left <= len(data):
                    writer.write(data[:left])
                    await writer.drain()
                    self._cut()
                    return
                if left is not None:
                    self._left[direction] = left - len(data)
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            writer.close()  # behind what was written

    async def _handle(self, reader, writer):
        self.connections += 1
        if self.refuses:
            writer.transport.abort()
            return
        try:
            there, upstream = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, upstream}
        self._open |= both
        try:
            await asyncio.gather(self._forward("up", reader, upstream), self._forward("down", there, writer))
        finally:
            self._open -= both
            for one in both:
                one.close()

    @contextlib.contextmanager
    def running(self):
        """Runs on planrt's background loop for the block; yields the address to connect to."""
        loop = background_loop()
        server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._handle, "127.0.0.1", 0), loop
        ).result()

        async def close():
            self.refuses = True
            server.close()
            self._cut()

        try:
            yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            asyncio.run_coroutine_threadsafe(close(), loop).result()
