"""The messages about tensors on a worker: put there, computed with, fetched, found and removed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from planrt.workers.wire.messages.fields import (
    Count,
    Message,
    ObjectId,
    ObjectSpec,
    PeerAddress,
    Tags,
    Text,
    Token,
    Users,
)


class PutItem(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One object of a `Put`: what goes with its tensor."""

    id: ObjectId
    requires_grad: bool = False
    has_grad: bool = False
    """Whether the next tensor is its gradient."""
    tags: Tags = []
    description: Text = ""
    allowed: Users | None = None
    """Users who may read it or what is computed from it; None for everyone, empty for nobody."""


class Put(Message, frozen=True, tag="put"):
    """Stores tensors: for each item its value, and its gradient where it has one. Answered by Done if numbered."""

    items: list[PutItem]
    handover: Token = ""
    """If not empty: whoever shows this token in a Claim becomes the objects' owner."""


class Post(Message, frozen=True, tag="post"):
    """Ops to run, in order. Never answered: a failure goes to the results, and shows when one is fetched.

    Each op is MessagePack of [drop, name, args, kwargs, results, grad mode, seed] (`planrt.workers.wire.posted`).
    """

    ops: Annotated[list[bytes], Meta(max_length=100_000)]
    drop: list[ObjectId] = []
    """Objects that nobody points at any more, once the ops have run."""


class Call(Message, frozen=True, tag="call"):
    """Runs one op whose results cannot be told beforehand. Answered by Made."""

    op: bytes


class Made(Message, frozen=True, tag="made"):
    """The results of a Call: nested, each tensor a reference into `objects`. No tensors."""

    results: Any
    objects: list[tuple[ObjectId, ObjectSpec]]


class Fetch(Message, frozen=True, tag="fetch"):
    """Brings an object back, and removes it if `delete`. Answered by Fetched, FetchedPointer or FetchedPlan."""

    id: ObjectId
    delete: bool


class Fetched(Message, frozen=True, tag="fetched"):
    """An object: its tensor, and its gradient where it has one."""

    requires_grad: bool
    has_grad: bool
    tags: list[str] = []
    description: str = ""
    allowed: list[str] | None = None
    """Who may read it: who was told the value, and moves it on, hands this on as well."""


class Backward(Message, frozen=True, tag="backward", omit_defaults=True):
    """`torch.autograd.backward` from `roots`. Answered by Gradients."""

    roots: list[ObjectId]
    gradients: list[ObjectId | None]
    retain_graph: bool
    create_graph: bool
    inputs: list[ObjectId] | None = None
    halts: bool = False
    """Its client does not wait for the answer. If the pass fails, ops that are posted after it are not run (their
    results fail as it did, and what they would change stays as it is), until the session has sent Resume."""


class Resume(Message, frozen=True, tag="resume"):
    """The client knows that a backward pass failed: ops run again. Answered by Gradients."""


class Gradients(Message, frozen=True, tag="gradients"):
    """The gradients that the session's objects have now: their ids and specs. No tensors."""

    objects: list[tuple[ObjectId, ObjectSpec]]


class Describe(Message, frozen=True, tag="describe"):
    """Gives an object tags and a description; a tagged object is published. Not answered."""

    id: ObjectId
    tags: Tags
    description: Text


class FoundItem(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One object that a search found."""

    id: ObjectId
    spec: ObjectSpec | None
    """Of a tensor; None for anything else."""
    tags: list[str]
    description: str
    private: bool
    snapshot: bool
    """Whether it is a copy, made for this session: it goes with its last pointer."""
    kind: Literal["tensor", "plan", "protocol"] = "tensor"
    name: str = ""
    """What a plan is called."""
    training: bool = False
    """The mode a plan is in."""


class Search(Message, frozen=True, tag="search"):
    """Looks for published objects, and for the session's own, that match every term. Answered by Found."""

    query: Annotated[list[Annotated[str, Meta(max_length=1000)]], Meta(max_length=64)]


class Found(Message, frozen=True, tag="found"):
    """The objects that a search found. No tensors."""

    objects: list[FoundItem]


class Remove(Message, frozen=True, tag="remove"):
    """Removes objects of the session, published or not: they have arrived elsewhere. Answered by Done if numbered."""

    ids: Annotated[list[ObjectId], Meta(max_length=100_000)]


class ListObjects(Message, frozen=True, tag="list_objects"):
    """Asks what the worker holds for this session, without values. Answered by Listed."""


class ListedItem(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One object of a session."""

    id: ObjectId
    kind: Literal["tensor", "plan", "protocol", "pointer", "share", "failed"]
    spec: ObjectSpec | None = None
    """Of a tensor; None for anything else."""
    tags: list[str] = []
    description: str = ""
    peer: PeerAddress | None = None
    """Where a pointer points to, under the id `object`."""
    object: ObjectId = 0


class Listed(Message, frozen=True, tag="listed"):
    """The objects that the worker holds for the session, oldest first. No tensors."""

    objects: list[ListedItem]


class Clear(Message, frozen=True, tag="clear"):
    """Removes every object of the session, published ones too. Answered by Done."""


class CountObjects(Message, frozen=True, tag="count_objects"):
    """Asks how many objects the worker holds for this session. Answered by Counted."""


class Counted(Message, frozen=True, tag="counted"):
    """The number of objects that the worker holds for the session. No tensors."""

    objects: Count
