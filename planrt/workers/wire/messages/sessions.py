"""The messages that open a session, keep it and end it; and those that answer requests of every kind."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch
from msgspec import Meta

from planrt.plans.ir import ops
from planrt.serde.frames import HEADER_BYTES, MESSAGE_BYTES, Limits
from planrt.version import VERSION
from planrt.workers.wire.messages.fields import Count, CountOrAll, Hash, Id, Message, Text, Token

PROTOCOL_VERSION = 4

Proof = Annotated[str, Meta(max_length=1000)]
"""A message of SCRAM; see `planrt.workers.wire.proofs`."""
Secret = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
"""32 random bytes."""


class Dials(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The proofs that a worker shows of itself when it dials another one for its clients."""

    token: bool = False
    certificate: bool = False


class Versions(msgspec.Struct, frozen=True):
    """The versions that each side runs and the limits that it accepts; exchanged in the handshake."""

    protocol: int
    planrt: Id
    torch: Id
    ops: Hash
    """Hash of the op table (`planrt.plans.ir.ops.TABLE_HASH`)."""
    message_limit: Count = MESSAGE_BYTES
    """Bytes of tensors that it takes in one message."""
    header_limit: Count = HEADER_BYTES
    """Bytes of a message's header that it takes."""
    halts: bool = False
    """Of a worker: whether it knows `Backward.halts`."""
    resumes: bool = False
    """Whether its sessions outlive their connections: see `Kept`."""
    tells_status: bool = False
    """Of a worker: whether it answers `AskStatus`."""
    tickets: bool = False
    """Of a worker: whether it gives this session tickets (`Delegate`), so that another worker can act in its name."""
    tells_waits: bool = False
    """Of a worker: whether it answers `AskJoint` and `AskGroup`."""
    takes_numbers: bool = False
    """Of a worker: whether numbers are operands of programs on shares."""
    dials: Dials | None = None
    """Of a worker: what it shows to others that it dials; None where it takes no tickets (`ActFor`)."""


class DatasetInfo(msgspec.Struct, frozen=True):
    """The facts that a worker tells of a data set: its length and the specs of a batch, never values."""

    length: Count
    data: tuple[str, list[CountOrAll]]
    """(dtype name, sizes) of a batch, -1 for the batch dimension."""
    target: tuple[str, list[CountOrAll]]
    tags: list[Id] = []
    description: Text = ""


class Resumption(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The session that is to go on over a new connection, as its client asks for it."""

    session: Id
    """As of `Kept`."""
    secret: Secret
    seen: Count
    """How many messages of the worker it has taken in that session."""


class Kept(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A session that outlives its connection: who shows its secret on a new one goes on with it."""

    session: Id
    """Its name, for `Resumption`."""
    seconds: float
    """How long it is kept without a connection."""
    epoch: Id
    """Drawn when the worker started: objects of another epoch are gone."""
    secret: Secret | None = None
    """Of a new session."""
    resumed: bool = False
    """Whether it is the one that was asked for; else it is a new one, since that one is over."""
    seen: Count = 0
    """How many messages of its client the worker has taken in it."""


class Hello(Message, frozen=True, tag="hello", omit_defaults=True):
    """Opens a session. No tensors. Answered by Welcome, or with a proof by Challenge."""

    session: Id
    versions: Versions
    token: Token = ""
    """A token in clear, as clients sent it before they proved it. Refused."""
    proof: Proof = ""
    """The first message of a proof; without one the session is nobody's, or that of its client's certificate."""
    for_others: bool = False
    """Of a worker that acts for clients of its own: it may come in, and has no more rights than nobody."""
    resume: Resumption | None = None
    """The session that is to go on; the proof must be that of its user."""
    ticket: Proof = ""
    """The first message of the proof of a ticket: the session is in the name of the client that it was given to."""


class Prove(Message, frozen=True, tag="prove", omit_defaults=True):
    """Answers a Challenge. No tensors. Answered by Welcome."""

    proof: Proof
    ticket: Proof = ""


class Challenge(Message, frozen=True, tag="challenge", omit_defaults=True):
    """The session opens when this is answered with a Prove. No tensors."""

    proof: Proof
    ticket: Proof = ""


class Welcome(Message, frozen=True, tag="welcome", omit_defaults=True):
    """The session is open. No tensors."""

    worker: Id
    versions: Versions
    datasets: dict[Id, DatasetInfo]
    proof: Proof = ""
    """The worker's own proof, where its client gave one."""
    kept: Kept | None = None
    """None where the session ends with its connection."""
    ticket: Proof = ""
    """The worker's proof that it knows the ticket, where one was shown."""


class Ack(Message, frozen=True, tag="ack"):
    """Says nothing but `Envelope.seen`. From either side, under the number 0. No tensors."""


class Bye(Message, frozen=True, tag="bye", omit_defaults=True):
    """Ends the session, not only the connection. From either side, under the number 0. No tensors."""

    comes_back: bool = False
    """Of a client that may come back: the session is kept as after a cut, and ends where its user needs the room."""


class Done(Message, frozen=True, tag="done"):
    """Done as asked. No tensors."""


class Failure(Message, frozen=True, tag="failure", omit_defaults=True):
    """The request failed on the worker; nothing it held was changed. No tensors."""

    kind: Id
    message: Text
    op: Text | None = None
    line: Text | None = None
    traceback: Text = ""
    index: Count | None = None
    """Which op of a plan it was."""
    cause: Text = ""
    """What torch said, where that is known and may be told; of a joint run that has ended before, the kind of failure
    that ended it."""
    number: Count | None = None
    """Which of the session's posted ops it was, counted from 0: the client knows the line that posted it."""
    step: Text | None = None
    """Which step of a protocol it was."""
    once: bool = False
    """Whether the worker keeps it no longer: a failure of something posted, told by the first request after it."""


class AskStatus(Message, frozen=True, tag="ask_status"):
    """Asks how the worker is, as far as it is the session's user's own. Answered by WorkerStatus."""


class WorkerStatus(Message, frozen=True, tag="worker_status"):
    """The figures of one user's sessions: see `planrt.workers.machine.store.Overview`. No tensors."""

    since: float
    """The time at which the worker began (seconds, as of `time.time`)."""
    device: Id
    user: Annotated[str, Meta(max_length=200)]
    """The user whom the worker knows the session by; ``""`` for nobody."""
    sessions: Count
    objects: Count
    bytes: Count
    waiting: Count
    """Requests under way, which wait for other workers or parties."""


def own_versions(
    limits: Limits | None = None, *, resumes: bool = False, dials: Dials | None = None
) -> Versions:
    """Returns the versions that this side runs, and the limits that it accepts."""
    accepted = limits or Limits()
    return Versions(
        PROTOCOL_VERSION,
        VERSION,
        str(torch.__version__),
        ops.TABLE_HASH,
        accepted.message,
        accepted.header,
        halts=True,
        resumes=resumes,
        tells_status=True,
        tells_waits=True,
        takes_numbers=True,
        dials=dials,
    )
