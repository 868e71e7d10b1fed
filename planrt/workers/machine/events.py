"""What a worker's state machine takes (events) and gives (instructions); see `planrt.workers.machine.state`."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from msgspec import Struct

from planrt.workers.wire import messages as m
from planrt.workers.wire.channel import Channel, Shown

# -------------------------------------------------------------------------------------------- events


class Connected(Struct, frozen=True):
    """A connection was opened, with what is known of it. Left out for one of which nothing is."""

    connection: int
    channel: Channel


class Received(Struct, frozen=True):
    """A message arrived on a connection."""

    connection: int
    envelope: m.Envelope
    tensors: list[torch.Tensor]
    rest: bool = False
    """Whether it is the rest of one that was handed in before (`Again`)."""


class Arrived(Struct, frozen=True):
    """The client of a connection has the answer to its request `id`, and all before: the connection says so itself
    (`Pipe.hands_over`). May be left out: its next message says that it has them."""

    connection: int
    id: int


class Disconnected(Struct, frozen=True):
    """A connection ended, for whatever reason."""

    connection: int


class Cut(Struct, frozen=True):
    """A connection has ended that is held (`Hold`): its `Disconnected` follows when it goes on."""

    connection: int


class PeerAnswered(Struct, frozen=True):
    """Another worker answered what was asked under `key`."""

    key: str
    body: m.Body
    tensors: list[torch.Tensor]


class PeerFailed(Struct, frozen=True):
    """The exchange with another worker under `key` has failed."""

    key: str
    reason: str


class TimePassed(Struct, frozen=True):
    """The time of an `Alarm` under `key` is over."""

    key: str


class Probed(Struct, frozen=True):
    """A `Probe` was carried out: `held_by` gave a sign of life (`alive`), or its `Disconnected` was handed in."""

    connection: int
    alive: bool


class Expired(Struct, frozen=True):
    """The time of a `Keep` is over."""

    session: str
    absence: int


@dataclass(frozen=True, slots=True)
class UsersChanged:
    """The owner has other users now: name -> token, or what proves it."""

    users: Mapping[str, str] = field(repr=False)


Happening: TypeAlias = (
    TimePassed
    | Connected
    | Arrived
    | Disconnected
    | Cut
    | PeerAnswered
    | PeerFailed
    | Probed
    | Expired
    | UsersChanged
)
"""What is no message."""

Event: TypeAlias = Received | Happening

# -------------------------------------------------------------------------------------- instructions


class PeerFor(m.PeerAddress, frozen=True, array_like=True):
    """Another worker, as it is reached in one client's name: what is there belongs to a session of its own. It does not
    travel."""

    ticket: str
    session: str
    """The session of that client: another one that names the same ticket has to prove it, too."""
    whose: str = ""
    """For whom that session counts."""


class Reply(Struct, frozen=True):
    """Send `envelope` and `tensors` on `connection`."""

    connection: int
    envelope: m.Envelope
    tensors: Sequence[torch.Tensor] = ()


class ToPeer(Struct, frozen=True):
    """Send `body` and `tensors` to another worker.

    With a `key` its answer is wanted, as a `PeerAnswered` under that key; with an empty one the message is posted.
    """

    peer: m.PeerAddress
    body: m.Body
    tensors: Sequence[torch.Tensor] = ()
    key: str = ""


class Wait(Struct, frozen=True):
    """The request goes on when a peer has answered under `key`, or under one of `others`."""

    key: str
    others: tuple[str, ...] = ()


class Close(Struct, frozen=True):
    """Close `connection`."""

    connection: int


class Distrust(Struct, frozen=True):
    """Let the next proof from where `connection` comes from wait: this one did not hold."""

    connection: int


class Again(Struct, frozen=True):
    """The turn of this event is over, and this much of it is left: hand that in as an event of its own, after events
    of other connections that wait by now, and before others of its connection.
    """

    event: Received


class Alarm(Struct, frozen=True):
    """Hand in `TimePassed` with this key after so many seconds."""

    seconds: float
    key: str


class Hold(Struct, frozen=True):
    """Hand in nothing more of `connection` until there is a `Release` for it: what its client has posted last is under
    way. What is `left` of that comes then, first of all.
    """

    connection: int
    left: Received | None = None


class Release(Struct, frozen=True):
    """Go on with `connection`, which was held; there is one for each `Hold`."""

    connection: int


class Probe(Struct, frozen=True):
    """`connection` shows the secret of the session that `held_by` has: if that one gives no sign of life, close it, and
    hand in what is left of it. Then hand in `Probed`, before anything else of `connection`."""

    connection: int
    held_by: int


class Keep(Struct, frozen=True):
    """Hand in `Expired` with these after so many `seconds`."""

    session: str
    absence: int
    seconds: float


class HandOn(Struct, frozen=True):
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


class Part(Struct, frozen=True):
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


class Wake(Struct, frozen=True):
    """Within the machine: what waits under `key` goes on now, if anything does."""

    key: str


Answer: TypeAlias = tuple[m.Body, Sequence[torch.Tensor]]
Steps: TypeAlias = Generator[
    ToPeer | Wait | Alarm | Wake | Introduce | Part, PeerAnswered | TimePassed | None, Answer
]
"""A request being handled: yields what it needs of peers (a `Wait` gives it what they answered)."""
