"""The messages about plans and protocols that are objects of a worker."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from planrt.workers.wire.messages.fields import (
    Count,
    Id,
    Message,
    ObjectId,
    PeerAddress,
    Purpose,
    Tags,
    Text,
    Token,
    Users,
)


class StorePlan(Message, frozen=True, tag="store_plan", omit_defaults=True):
    """Stores a plan as an object. Tensors: its record as bytes (uint8), then its state, in the plan's order.

    Answered by Done if numbered.
    """

    id: ObjectId
    training: bool
    """The mode it is in."""
    tags: Tags = []
    description: Text = ""
    allowed: Users | None = None
    """As of a `PutItem`."""
    handover: Token = ""
    """As of a `Put`."""
    purpose: Purpose = ""
    """As of a `PutPlan`."""
    bare: bool = False
    """Whether it comes without its state, which is given with every call: for runs on shares."""


class ReadPlan(Message, frozen=True, tag="read_plan"):
    """Asks what a plan or a protocol does, without its state. Answered by FetchedPlan with the record alone, or by
    FetchedProtocol with the chain alone."""

    id: ObjectId


class FetchedPlan(Message, frozen=True, tag="fetched_plan"):
    """A plan. Tensors as of `StorePlan`."""

    training: bool
    allowed: list[str] | None = None
    """Who may read its state."""


Places = Annotated[dict[Id, PeerAddress], Meta(max_length=10_000)]
"""The workers of a protocol: place -> worker."""


class StoreProtocol(Message, frozen=True, tag="store_protocol"):
    """Stores a protocol as an object. Tensors: its chain as bytes (uint8), then the state of its plans, in order.

    Answered by Done if numbered.
    """

    id: ObjectId
    tags: Tags = []
    description: Text = ""
    allowed: Users | None = None
    """As of a `PutItem`; for the state of all plans."""


class FetchedProtocol(Message, frozen=True, tag="fetched_protocol"):
    """A protocol. Tensors as of `StoreProtocol`."""


class DeployProtocol(Message, frozen=True, tag="deploy_protocol"):
    """Says which worker stands at each place of a protocol. Answered by Done if numbered."""

    id: ObjectId
    places: Places


class RunProtocol(Message, frozen=True, tag="run_protocol"):
    """Runs a protocol, on objects of this worker. Answered by Made; the objects are pointers to where they are."""

    id: ObjectId
    run: ObjectId
    """A number of the run, to name it by later."""
    inputs: Annotated[list[ObjectId], Meta(max_length=10_000)]
    results: Annotated[list[ObjectId], Meta(max_length=100_000)]
    """Ids for what comes out, one for each reference in the chain's outputs; for numbers they stay unused."""
    grad: bool
    seed: Count


class CancelRun(Message, frozen=True, tag="cancel_run"):
    """Ends a run of this session; what it made is dropped everywhere. Not answered; the run's request fails."""

    run: ObjectId


class ReadRun(Message, frozen=True, tag="read_run"):
    """Asks where a run of this session stands. Answered by RunStates."""

    run: ObjectId


class RunStates(Message, frozen=True, tag="run_states"):
    """The progress of a run: (step, state) of each step, in order; empty if there is no such run now. No tensors."""

    steps: list[tuple[str, Literal["waiting", "running", "done", "failed"]]]
