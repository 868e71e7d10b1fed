"""The messages by which objects go from worker to worker, and pointers point to objects elsewhere."""

from __future__ import annotations

from planrt.workers.wire.messages.fields import Message, ObjectId, PeerAddress, Token


class PutPointer(Message, frozen=True, tag="put_pointer"):
    """Stores a pointer to an object on another worker, which `token` lets this worker claim. Answered by Done if
    numbered, once that is claimed."""

    id: ObjectId
    peer: PeerAddress
    object: ObjectId
    token: Token


class FetchedPointer(Message, frozen=True, tag="fetched_pointer"):
    """The fetched object is a pointer to one on another worker, which `token` lets the client claim. No tensors."""

    peer: PeerAddress
    object: ObjectId
    token: Token


class Move(Message, frozen=True, tag="move"):
    """Hands an object over to another worker, under the number `target`. Answered by Done."""

    id: ObjectId
    peer: PeerAddress
    target: ObjectId
    token: Token
    copy: bool = False
    """Whether the object stays here. Then its values go alone: without gradient, tags and description."""
    keep: bool = False
    """Whether the object stays until its client removes it, which it does when it has claimed what arrived."""


class HandOver(Message, frozen=True, tag="hand_over"):
    """Lets whoever shows `token` claim these objects. Answered by Done if numbered."""

    ids: list[ObjectId]
    token: Token


class Claim(Message, frozen=True, tag="claim"):
    """Takes over objects that were handed over under `token`. Answered by Done if numbered."""

    ids: list[ObjectId]
    token: Token
