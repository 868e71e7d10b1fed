"""``memory://``: workers of this process, reached without a socket."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from planrt.errors import ConnectError, OptionError
from planrt.serde.frames import Limits
from planrt.workers.transport.addresses import DialOptions, ListenOptions, ServePipe, register
from planrt.workers.transport.pipes import MemoryPipe, Pipe, memory_pipes


class Host(Protocol):
    """Whatever serves a virtual worker."""

    async def serve(self, pipe: Pipe) -> None:
        """Serves one connection until it ends."""


_hosts: weakref.WeakValueDictionary[str, Host] = weakref.WeakValueDictionary()
"""Address -> who serves it. Whoever made a worker keeps it alive, and nobody else."""
_numbers = itertools.count(1)

_under_way: set[asyncio.Task[None]] = set()
"""Connections being served; the loop itself keeps weak references only."""


def new_address(worker_id: str, host: Host) -> str:
    """Returns an address for the virtual worker of that id, which this process reaches it at as long as `host` exists.

    Connections to it are served on planrt's loop.
    """
    address = f"memory://{worker_id}/{next(_numbers)}"
    _hosts[address] = host
    return address


def connect(address: str, host: Host, limits: Limits) -> tuple[MemoryPipe, asyncio.Task[None]]:
    """Returns a pipe to `host`, and the task that serves it; on planrt's loop. `address` is what errors call it."""
    near, far = memory_pipes(address, limits)
    serving = asyncio.create_task(host.serve(far))
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
            ConnectError: there is none in this process. OptionError: `ca`, `cert` or `key`, which are for TLS.
        """
        options.refuse_tls(f"{address} is without")
        host = _hosts.get(address)
        if host is None:
            raise ConnectError(
                f"no worker is at {address} in this process: virtual workers are reached from their own process only",
                address=address,
            )
        return connect(address, host, options.limits)[0]

    def listen(
        self, address: str, serve: ServePipe, options: ListenOptions
    ) -> AbstractAsyncContextManager[str]:
        """Virtual workers have their addresses from `new_address`, and no server.

        Raises:
            OptionError: always.
        """
        raise OptionError(f"no server listens at {address}: make a VirtualWorker, which is there without one")


register("memory", MemoryTransport())
