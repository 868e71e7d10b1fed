"""One client's session on a worker, and what is asked of other workers for it. No I/O."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from planrt.serde.tensors import payload_bytes
from planrt.workers.machine.events import ToPeer, Wait
from planrt.workers.machine.failures import OpFailedError, replace_message
from planrt.workers.machine.labels import Label, both
from planrt.workers.wire import messages as m
from planrt.workers.wire.refusals import ReplyTooLarge


@dataclass(slots=True, eq=False)
class Graphs:
    """What is known of the autograd graphs of sessions that handed objects to one another.

    A label says who may read what an op computed from the values of its time. A graph computes once more, later,
    with tensors that it has kept. Autograd refuses where it sees that one of them was written to meanwhile, but
    writes past its version counters it does not see: from such a write of private values on, gradients count as
    computed from them.
    """

    members: list[Session] = field(default_factory=list)
    unseen_writes: bool = False
    """Whether there may be tensors that share memory without sharing a version counter."""
    label: Label = None


@dataclass(slots=True, eq=False)
class Session:
    """One client's session on this worker. `user` is None for a client that showed no token."""

    id: str
    user: str | None = None
    client: m.Versions | None = None
    """What the client runs and accepts."""
    posted: int = 0
    """Ops taken so far."""
    failure: m.Failure | None = None
    """Of an op or message that left no result; shows at the next request."""
    failures: int = 0
    """Runs that failed on data which it may not see: each tells it something of that data."""
    halted: m.Failure | None = None
    """Of a backward pass whose client has not heard of it yet: ops are not run (see `Backward` of the messages)."""
    over: bool = False
    """Whether those were as many as the owner allows: it gets no more than the answer that is under way."""
    leaves: dict[int, None] = field(default_factory=dict)
    """Objects that a backward pass may give a gradient to."""
    optimizer_states: dict[tuple[str, str, str, int], Any] = field(default_factory=dict)
    """(plan, data set, optimizer, first object of the state or 0) -> what the optimizer keeps."""
    purposes: dict[str, str] = field(default_factory=dict)
    """Hash of a plan that was sent -> what its client says it is for."""
    graphs: Graphs = field(init=False)

    def __post_init__(self) -> None:
        self.graphs = Graphs([self])

    def share_graphs(self, other: Session) -> None:
        """An object went from one session to the other, and with it the graphs that have kept it."""
        mine, theirs = self.graphs, other.graphs
        if mine is theirs:
            return
        mine.members += theirs.members
        mine.unseen_writes |= theirs.unseen_writes
        mine.label = both(mine.label, theirs.label)
        for member in theirs.members:
            member.graphs = mine

    def may_read(self, label: Label) -> bool:
        """Whether this session's user may read what has that label."""
        return label is None or (self.user is not None and self.user in label)


def check_fits(client: m.Versions | None, tensors: Sequence[torch.Tensor]) -> None:
    """Raises ReplyTooLarge if `client` does not take an answer with `tensors`; called before anything is removed
    that the answer brings.
    """
    nbytes = payload_bytes(tensors)
    if client is not None and nbytes > client.message_limit:
        raise ReplyTooLarge(
            f"the answer takes {nbytes:,} bytes, over the limit of {client.message_limit:,} bytes that the client "
            "takes, and was not sent; nothing was removed here: fetch it in parts, or connect with "
            "limits=Limits(message=...)"
        )


def ask(peer: m.PeerAddress, body: m.Body, tensors: Sequence[torch.Tensor] = ()) -> Any:
    """Sends `body` to another worker and waits for its answer: to be used with ``yield from``.

    Raises:
        LocalError: the other worker could not do it.
    """
    key = secrets.token_hex(8)
    yield ToPeer(peer, body, tensors, key)
    answered = yield Wait(key)
    if isinstance(answered.body, m.Failure):
        raise OpFailedError(
            replace_message(answered.body, f"worker {peer.worker!r}: {answered.body.message}")
        )
    return answered.body


def allowed_list(label: Label) -> list[str] | None:
    """A label as messages have it."""
    return None if label is None else sorted(label)


def users_of(label: Label) -> str:
    """Who may read what has that label, in words."""
    return ", ".join(sorted(label)) if label else "nobody"
