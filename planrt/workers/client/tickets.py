"""Letting other workers act in this session's name on its worker: a ticket for each, got when it is first needed.

What tickets are, and what they permit, is in `planrt.workers.machine.keeping.tickets`. A worker that gives this session
none, since its client is nobody there or it knows of none, is dialled by the others in nobody's name.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from planrt.errors import RemoteError
from planrt.workers.wire import messages as m
from planrt.workers.wire.refusals import TICKET_REFUSED

if TYPE_CHECKING:
    from planrt.workers.client.workplace import RemoteWorkplace

T = TypeVar("T")


class ActingWorkers:
    """The other workers that may act in one session's name on its worker."""

    def __init__(self, place: RemoteWorkplace) -> None:
        self._place = place
        self._given: weakref.WeakKeyDictionary[RemoteWorkplace, set[m.For]] = weakref.WeakKeyDictionary()
        """The session of this client on the other worker -> for what that one has a ticket."""
        self._one_by_one = asyncio.Lock()

    async def let(self, other: RemoteWorkplace, permits: m.For, ask: Callable[[], Awaitable[T]]) -> T:
        """Returns what `ask` asks of the `other` worker, which dials this one for it, in the name of this session.

        A ticket that is over is asked for once more: who shows it is refused before anything else is done. Where there
        is no room here, what nobody points at is freed, and it is tried again.

        Raises:
            RemoteError: the worker could not do it. WorkerLostError: a connection ended first.
        """
        await self.give(other, permits)
        try:
            return await ask()
        except RemoteError as error:
            if error.kind == "PolicyError" and self._place.connection.drops_wait:
                await self._place.ask(m.Counted, m.CountObjects(), drops=True)
            elif error.kind == TICKET_REFUSED:
                self._given.get(other, set()).discard(permits)
                await self.give(other, permits)
            else:
                raise
        return await ask()

    async def give(self, other: RemoteWorkplace, permits: m.For) -> None:
        """Gives the `other` worker a ticket, if it takes one, there is one to be had, and it has none yet."""
        dials = other.connection.session.versions.dials
        if dials is None or other is self._place or not self._place.connection.session.versions.tickets:
            return
        async with self._one_by_one:
            given = self._given.setdefault(other, set())
            if permits in given:
                return
            worker, here = other.worker.id, self._place.worker
            asked = m.Delegate(
                worker,
                permits,
                worker if dials.token else "",
                other.connection.certificate if dials.certificate else "",
            )
            ticket, _ = await self._place.ask(m.Ticket, asked)
            address = m.PeerAddress(here.id, here.link_address)
            other.post(m.ActFor(address, permits, ticket.id, ticket.secret))
            given.add(permits)
