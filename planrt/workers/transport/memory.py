"""``memory://``: workers of this process, reached without a socket."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

from planrt.errors import ConnectError, OptionError
from planrt.serde.frames import Limits
from planrt.workers.transport.addresses import DialOptions, ListenOptions, ServePipe, register
from planrt.workers.transport.pipes import MemoryPipe, Pipe, memory_pipes

Serve = Callable[[Pipe], Coroutine[Any, Any, None]]
"""A bound method of what serves a virtual worker."""

_served: dict[str, weakref.WeakMethod[Serve]] = {}
"""Address -> who serves it. Whoever made a worker keeps it alive, and nobody else."""
_numbers = itertools.count(1)

_under_way: set[asyncio.Task[None]] = set()
"""Connections being served; the loop itself keeps weak references only."""


def new_address(worker_id: str, serve: Serve) -> str:
    """An address of its own for the virtual worker of that id, which goes with the object that `serve` is a method of.

    It holds for this process; connections to it are served on planrt's loop.
    """
    address = f"memory://{worker_id}/{next(_numbers)}"
    _served[address] = weakref.WeakMethod(serve, lambda gone: _served.pop(address, None))
    return address


def connect(address: str, serve: Serve, limits: Limits) -> tuple[MemoryPipe, asyncio.Task[None]]:
    """A pipe to `serve`, and the task that serves it; on planrt's loop. `address` is what errors call it."""
    near, far = memory_pipes(address, limits)
    serving = asyncio.create_task(serve(far))
    _under_way.add(serving)
    serving.add_done_callback(_under_way.discard)
    return near, serving


class MemoryTransport:
    """See `planrt.workers.transport.addresses.Transport`."""

    within_process = True
    encrypted = False

    async def dial(self, address: str, options: DialOptions) -> Pipe:
        """Connects to the virtual worker at `address`.

        Raises:
            ConnectError: there is none in this process. OptionError: `ca`, which is for TLS.
        """
        if options.ca is not None:
            raise OptionError(f"ca= is for TLS, and {address} is without")
        found = _served.get(address)
        serve = None if found is None else found()
        if serve is None:
            raise ConnectError(
                f"no worker is at {address} in this process: virtual workers are reached from their own process only",
                address=address,
            )
        return connect(address, serve, options.limits)[0]

    def listen(
        self, address: str, serve: ServePipe, options: ListenOptions
    ) -> AbstractAsyncContextManager[str]:
        """Virtual workers have their addresses from `new_address`, and no server.

        Raises:
            OptionError: always.
        """
        raise OptionError(f"no server listens at {address}: make a VirtualWorker, which is there without one")


register("memory", MemoryTransport())
