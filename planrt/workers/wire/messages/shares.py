"""The messages of sharing groups: workers who compute on shares of secrets together.

See `planrt.workers.machine.sharing`.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from planrt.workers.wire.messages.fields import Count, Id, Message, ObjectId, PeerAddress, Text, Token, Users


class MakeGroup(Message, frozen=True, tag="make_group", omit_defaults=True):
    """Makes the worker a party of a sharing group, whose parties compute on secrets together. Answered by Done."""

    group: Id
    token: Token
    """What the other parties and the dealer show."""
    number: Count
    """The worker's own place among the parties."""
    parties: Annotated[list[PeerAddress], Meta(max_length=64)]
    dealer: PeerAddress
    scale: Annotated[int, Meta(ge=1, le=2**31)]
    timeout: Annotated[float, Meta(gt=0, le=86_400)]
    """Seconds that a party waits for another one, or for the dealer."""
    tells_waits: bool = False
    """Whether all parties answer `AskGroup`."""


class MakeDealer(Message, frozen=True, tag="make_dealer"):
    """Makes the worker the dealer of a group: it gives each party a seed. Answered by Done when all parties know each
    other."""

    group: Id
    token: Token
    parties: Annotated[list[PeerAddress], Meta(min_length=2, max_length=64)]


class Deal(Message, frozen=True, tag="deal"):
    """Has the dealer of a group make what the parties need, until the group ends. Not answered."""

    group: Id


class GiveSeed(Message, frozen=True, tag="give_seed"):
    """Gives a party the seed of its correlated randomness: dealer to party. Answered by Done."""

    group: Id
    token: Token
    seed: Annotated[bytes, Meta(max_length=64)]


class JoinGroup(Message, frozen=True, tag="join_group"):
    """Says that party `number` speaks from this session: party to party. Answered by Done."""

    group: Id
    token: Token
    number: Count


class Opening(Message, frozen=True, tag="opening"):
    """A party's parts of what all parties are to learn: party to party. Tensors: the parts. Not answered."""

    group: Id
    number: Count
    """Which opening of the group it is."""


class AskNeeds(Message, frozen=True, tag="ask_needs"):
    """Asks the last party what it needs: dealer to party. Answered by Needs, as soon as there is something."""

    group: Id


class AskGroup(Message, frozen=True, tag="ask_group"):
    """Asks a party for whom it waits: party to party, as `AskJoint`. Answered by Waits."""

    group: Id


class Needs(Message, frozen=True, tag="needs"):
    """The requests of a party, as `planrt.sharing.programs.asking.Telling` writes them. No tensors."""

    requests: list[Any]


class Corrections(Message, frozen=True, tag="corrections"):
    """Correlated randomness for the last party: dealer to party. Tensors: those of each number, in order. Not
    answered."""

    group: Id
    numbers: Annotated[list[Count], Meta(max_length=100_000)]


class FailGroup(Message, frozen=True, tag="fail_group"):
    """Says that a group cannot go on: between its members. Not answered."""

    group: Id
    reason: Text


class EndGroup(Message, frozen=True, tag="end_group"):
    """Frees a group: its client needs it no more. Not answered."""

    group: Id


class PutShare(Message, frozen=True, tag="put_share"):
    """Stores a part of a secret. Tensors: the part, int64; none if it comes of a seed. Answered by Done if numbered."""

    id: ObjectId
    group: Id
    scale: Annotated[int, Meta(ge=1)]
    shape: Annotated[list[Count], Meta(max_length=64)]
    seed: Annotated[bytes, Meta(max_length=64)] = b""
    allowed: Users | None = None
    """As of a `PutItem`."""
    handover: Token = ""
    """As of a `Put`."""


class FetchedShare(Message, frozen=True, tag="fetched_share"):
    """A part of a secret. Tensor: the part."""

    scale: Annotated[int, Meta(ge=1)]


class ShareOut(Message, frozen=True, tag="share_out"):
    """Shares a tensor that the worker holds: each party gets a part, to be claimed by `token`. Answered by Done."""

    id: ObjectId
    group: Id
    scale: Annotated[int, Meta(ge=1)]
    parties: Annotated[list[PeerAddress], Meta(min_length=2, max_length=64)]
    targets: Annotated[list[ObjectId], Meta(min_length=2, max_length=64)]
    token: Token


class ReadTraffic(Message, frozen=True, tag="read_traffic"):
    """Asks a party how much it has sent and received. Answered by GroupTraffic."""

    group: Id


class GroupTraffic(Message, frozen=True, tag="group_traffic"):
    """The traffic of one party of a group so far. No tensors."""

    rounds: Count = 0
    """Openings."""
    sent: Count = 0
    """Bytes of parts that it sent to the other parties, all together."""
    received: Count = 0
    dealt: Count = 0
    """Bytes of correlated randomness that the dealer sent it."""
