"""What a worker's state machine takes (events) and gives (instructions); see `planrt.workers.machine.state`."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from planrt.workers.wire import messages as m
from planrt.workers.wire.channel import Channel, Shown

# -------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection was opened, with what is known of it. Left out for one of which nothing is."""

    connection: int
    channel: Channel


@dataclass(frozen=True, slots=True)
class Received:
    """A message arrived on a connection."""

    connection: int
    envelope: m.Envelope
    tensors: list[torch.Tensor]
    rest: bool = False
    """Whether it is the rest of one that was handed in before (`Again`)."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """The client of a connection has the answer to its request `id`, and all before: the connection says so itself
    (`Pipe.hands_over`). May be left out: its next message says that it has them."""

    connection: int
    id: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A connection ended, for whatever reason."""

    connection: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A connection has ended that is held (`Hold`): its `Disconnected` follows when it goes on."""

    connection: int


@dataclass(frozen=True, slots=True)
class PeerAnswered:
    """Another worker answered what was asked under `key`."""

    key: str
    body: m.Body
    tensors: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class PeerFailed:
    """The exchange with another worker under `key` has failed."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The time of an `Alarm` under `key` is over."""

    key: str


@dataclass(frozen=True, slots=True)
class Probed:
    """A `Probe` was carried out: `held_by` gave a sign of life (`alive`), or its `Disconnected` was handed in."""

    connection: int
    alive: bool


@dataclass(frozen=True, slots=True)
class Expired:
    """The time of a `Keep` is over."""

    session: str
    absence: int


@dataclass(frozen=True, slots=True)
class UsersChanged:
    """The owner has other users now: name -> token, or what proves it."""

    users: Mapping[str, str] = field(repr=False)


Event: TypeAlias = (
    TimePassed
    | Connected
    | Received
    | Arrived
    | Disconnected
    | Cut
    | PeerAnswered
    | PeerFailed
    | Probed
    | Expired
    | UsersChanged
)

# -------------------------------------------------------------------------------------- instructions


class PeerFor(m.PeerAddress, frozen=True, array_like=True):
    """Another worker, as it is reached in one client's name: what is there belongs to a session of its own. It does not
    travel."""

    ticket: str
    session: str
    """The session of that client: another one that names the same ticket has to prove it, too."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Send `envelope` and `tensors` on `connection`."""

    connection: int
    envelope: m.Envelope
    tensors: Sequence[torch.Tensor] = ()


@dataclass(frozen=True, slots=True)
class ToPeer:
    """Send `body` and `tensors` to another worker.

    With a `key` its answer is wanted, as a `PeerAnswered` under that key; with an empty one the message is posted.
    """

    peer: m.PeerAddress
    body: m.Body
    tensors: Sequence[torch.Tensor] = ()
    key: str = ""


@dataclass(frozen=True, slots=True)
class Wait:
    """The request goes on when a peer has answered under `key`, or under one of `others`."""

    key: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Close:
    """Close `connection`."""

    connection: int


@dataclass(frozen=True, slots=True)
class Distrust:
    """Let the next proof from where `connection` comes from wait: this one did not hold."""

    connection: int


@dataclass(frozen=True, slots=True)
class Again:
    """The turn of this event is over, and this much of it is left: hand that in as an event of its own, after events
    of other connections that wait by now, and before others of its connection.
    """

    event: Received


@dataclass(frozen=True, slots=True)
class Alarm:
    """Hand in `TimePassed` with this key after so many seconds."""

    seconds: float
    key: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Hand in nothing more of `connection` until there is a `Release` for it: what its client has posted last is under
    way. What is `left` of that comes then, first of all.
    """

    connection: int
    left: Received | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """Go on with `connection`, which was held; there is one for each `Hold`."""

    connection: int


@dataclass(frozen=True, slots=True)
class Probe:
    """`connection` shows the secret of the session that `held_by` has: if that one gives no sign of life, close it, and
    hand in what is left of it. Then hand in `Probed`, before anything else of `connection`."""

    connection: int
    held_by: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Hand in `Expired` with these after so many `seconds`."""

    session: str
    absence: int
    seconds: float


@dataclass(frozen=True, slots=True)
class HandOn:
    """Let the process for this user's sessions go on with the connection: its client has proved to be `user`, with the
    message `id`, and `hello` is what it wants. Nothing more of it is handed in here but `Disconnected`."""

    connection: int
    id: int
    user: str | None
    proof: str
    """The worker's own, for the client."""
    hello: m.Hello
    token: str = ""
    """The id of the token that was proved; ``""`` where none was."""
    shown: Shown | None = None
    """The ticket that was proved, where one was."""


@dataclass(frozen=True, slots=True)
class Introduce:
    """Reach `peer` with its ticket, whose secret this is: now, since a ticket is good for seconds only, and what it is
    for may come later."""

    peer: PeerFor
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Part:
    """Nothing more is sent to these: end the sessions there, once what was sent before has left."""

    peers: Sequence[PeerFor]


Instruction: TypeAlias = (
    Introduce
    | Part
    | HandOn
    | Reply
    | ToPeer
    | Wait
    | Close
    | Distrust
    | Again
    | Alarm
    | Hold
    | Release
    | Probe
    | Keep
)


@dataclass(frozen=True, slots=True)
class Wake:
    """Within the machine: what waits under `key` goes on now, if anything does."""

    key: str


Answer: TypeAlias = tuple[m.Body, Sequence[torch.Tensor]]
Steps: TypeAlias = Generator[
    ToPeer | Wait | Alarm | Wake | Introduce | Part, PeerAnswered | TimePassed | None, Answer
]
"""A request being handled: yields what it needs of peers (a `Wait` gives it what they answered)."""
