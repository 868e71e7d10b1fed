"""The messages by which a client lets one worker act in its name at another: see the tickets of a worker's
machine (`keeping/tickets.py`)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from planrt.workers.wire.messages.fields import Id, Message, PeerAddress
from planrt.workers.wire.messages.sessions import Secret

TicketId = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
For = Literal["put", "compute", "share", "joint"]
"""What a ticket permits: to put objects there; to compute, too, with what the client has handed over there; to be a
party or the dealer of the client's computations on shares; to be a party of its joint runs."""


class Delegate(Message, frozen=True, tag="delegate", omit_defaults=True):
    """Asks for a ticket: with it another worker acts in the name of this session. No tensors. Answered by Ticket."""

    worker: Id
    """The other worker."""
    permits: For
    user: Annotated[str, Meta(max_length=200)] = ""
    """As whom that one proves a token here, if it has one to prove."""
    certificate: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""
    """The SHA-256 of the certificate that it shows, if it shows one."""


class Ticket(Message, frozen=True, tag="ticket"):
    """A ticket, for the one worker that it was asked for: it opens one session, soon. No tensors."""

    id: TicketId
    secret: Secret
    """Which that worker proves, and does not show."""
    seconds: float
    """For how long it opens anything."""

    def __repr__(self) -> str:
        return f"Ticket(id={self.id!r}, seconds={self.seconds!r})"


class ActFor(Message, frozen=True, tag="act_for"):
    """Gives a worker the ticket for acting at `peer` in the name of this session's client. Posted, or answered by Done.
    No tensors."""

    peer: PeerAddress
    permits: For
    ticket: TicketId
    secret: Secret

    def __repr__(self) -> str:
        return f"ActFor({self.peer!r}, {self.permits!r}, ticket={self.ticket!r})"
