"""The messages between the processes of one worker, each of which has the work of one user."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from planrt.workers.wire.messages.fields import Count, Message, ObjectId, PeerAddress, Token
from planrt.workers.wire.messages.sessions import Failure


class Lend(Message, frozen=True, tag="lend"):
    """Asks for objects of another process of the same worker: copies of published ones, or, with a `token`, what was
    handed over under it, which is the asker's then. Between these processes alone. Answered by Lent."""

    ids: Annotated[list[ObjectId], Meta(max_length=100_000)]
    token: Token = ""


class LentItem(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One object of a `Lent`: what its worker keeps of it beside its tensors."""

    id: ObjectId
    kind: Literal["tensor", "plan", "protocol"]
    count: Count
    """How many of the tensors are its own. Of a tensor: the value, and its gradient if there are two. Of a plan or
    protocol: its bytes, and its state."""
    allowed: list[str] | None = None
    """Who may read it."""
    gradient_allowed: list[str] | None = None
    """Who may read its gradient."""
    requires_grad: bool = False
    training: bool = False
    tags: list[str] = []
    description: str = ""
    source: list[str] | None = None
    original: bool = False
    """As of the object (`planrt.workers.machine.kinds.base.StoredObject`)."""
    hidden: Failure | None = None
    """Why its value only stands in for another, as the worker keeps it for those who may hear of it."""
    places: dict[str, PeerAddress] = {}
    """Of a protocol: its places and their workers."""


class Lent(Message, frozen=True, tag="lent"):
    """Objects of another process of the same worker: as many of those asked for as there were. Tensors: of each in
    turn."""

    objects: list[LentItem]
