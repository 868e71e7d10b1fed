"""A websocket proxy that stands between a client and a worker, counts messages, and can break the connection."""

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
