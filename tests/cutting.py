"""A proxy of bytes between a client and a worker, which tests cut where they like."""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import urlsplit

from planrt.loop import background_loop


class CuttingProxy:
    """Forwards bytes. `cut_at` says after how many more bytes in which direction all connections end.

    `up` is client to worker. While `closed`, new connections end at once. All of it may be set from any thread.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = parts.hostname, parts.port
        self._left: dict[str, int] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self.closed = False
        self.connections = 0

    def cut_at(self, direction: str, nbytes: int) -> None:
        """Cuts all connections once `nbytes` more bytes went that way; 0: with the next ones."""
        self._left[direction] = nbytes

    def cut(self) -> None:
        """Cuts all connections now."""
        background_loop().call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        self._left.clear()
        for writer in self._writers:
            writer.transport.abort()

    async def _forward(self, direction, reader, writer):
        with contextlib.suppress(ConnectionError, OSError):
            while data := await reader.read(1 << 14):
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
        with contextlib.suppress(ConnectionError, OSError):
            writer.close()

    async def _handle(self, reader, writer):
        if self.closed:
            writer.transport.abort()
            return
        self.connections += 1
        there_reader, there_writer = await asyncio.open_connection(*self._upstream)
        mine = {writer, there_writer}
        self._writers |= mine
        await asyncio.gather(
            self._forward("up", reader, there_writer), self._forward("down", there_reader, writer)
        )
        self._writers -= mine

    @contextlib.contextmanager
    def running(self):
        """Runs on planrt's background loop for the block; yields the address to connect to."""
        loop = background_loop()

        async def listen():
            return await asyncio.start_server(self._handle, "127.0.0.1", 0)

        server = asyncio.run_coroutine_threadsafe(listen(), loop).result()

        async def close():
            server.close()
            self._cut()

        try:
            yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            asyncio.run_coroutine_threadsafe(close(), loop).result()
