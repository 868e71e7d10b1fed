"""Letting other workers act in this session's name on its worker: a ticket for each, got when it is first needed.

What tickets are, and what they permit, is in `planrt.workers.machine.keeping.tickets`. A worker that gives this session
none, since its client is nobody there or it knows of none, is dialled by the others in nobody's name.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

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
        self._given: weakref.WeakKeyDictionary[RemoteWorkplace, dict[m.For, m.ActFor]]
        self._given = weakref.WeakKeyDictionary()
        """The session of this client on the other worker -> what that one was told of its tickets."""
        self._latest: dict[tuple[m.PeerAddress, m.For], str] = {}
        """Of the tickets that this session's worker has, for other workers: the one that it goes by. Several sessions
        of this program at one worker, of several users perhaps, have each their own."""
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
                self.forget(other, permits)
                await self.give(other, permits)
            else:
                raise
        return await ask()

    async def give(self, other: RemoteWorkplace, permits: m.For, *, confirm: bool = False) -> None:
        """Gives the `other` worker a ticket, if it takes one, there is one to be had, and it has none yet; and sees to
        it that it goes by this one."""
        dials = other.connection.session.versions.dials
        if dials is None or not self._place.connection.session.versions.tickets:
            return
        async with self._one_by_one:
            given = self._given.setdefault(other, {})
            if permits in given:
                await self._told(other, given[permits], confirm=confirm)
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
            acting = m.ActFor(address, permits, ticket.id, ticket.secret)
            await self._told(other, acting, confirm=confirm)
            given[permits] = acting

    async def _told(self, other: RemoteWorkplace, acting: m.ActFor, *, confirm: bool) -> None:
        """Tells the `other` worker which ticket it is to go by, unless it does already."""
        latest, key = other.acting._latest, (acting.peer, acting.permits)
        if latest.get(key) == acting.ticket:
            return
        latest[key] = acting.ticket
        if confirm:
            await other.ask(m.Done, acting)
        else:
            other.post(acting)

    def forget(self, other: RemoteWorkplace, permits: m.For) -> None:
        """Notes that the ticket is over which the `other` worker has."""
        self._given.get(other, {}).pop(permits, None)


Acts: TypeAlias = tuple["RemoteWorkplace", "RemoteWorkplace"]
"""(whose worker acts, at whose): sessions of this client's."""


async def let_all(acting: Sequence[Acts], permits: m.For, *, confirm: bool = False) -> None:
    """Gives all of them tickets, that have none yet; with `confirm` they have them when this returns, and not only when
    what is asked of them later is done.

    Raises:
        RemoteError: a worker could not do it. WorkerLostError: a connection ended first.
    """
    giving = [there.acting.give(who, permits, confirm=confirm) for who, there in acting]
    await asyncio.gather(*giving)


def forget_all(acting: Sequence[Acts], permits: m.For) -> None:
    """Notes that these tickets are over: others are got when they are needed next."""
    for who, there in acting:
        there.acting.forget(who, permits)


def among(places: Sequence[RemoteWorkplace]) -> list[Acts]:
    """Returns each of several with each other one."""
    return [(who, there) for who in places for there in places if who is not there]


def is_over(error: BaseException) -> bool:
    """Returns whether something failed since a ticket was over, before anything was done with it."""
    kinds = (error.kind, error.cause) if isinstance(error, RemoteError) else ()
    return TICKET_REFUSED in kinds
