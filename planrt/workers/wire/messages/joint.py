"""The messages of joint runs: workers who hold different columns about the same people compute together.

A client opens a run at each party (`OpenJoint`), has them make themselves known to each other, and asks for one step
after another (`WorkJoint`). What the parties tell each other is a `Parcel`. See `planrt.workers.machine.joint`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from planrt.workers.wire.messages.fields import (
    Count,
    Hash,
    Id,
    Message,
    Options,
    PeerAddress,
    Purpose,
    Text,
    Token,
)

Names = Annotated[list[Id], Meta(max_length=10_000)]
HashOrNone = Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")]
Finite = Annotated[float, Meta(ge=0, le=1e9)]
PartyNumber = Annotated[int, Meta(ge=0, le=64)]


class LinearTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="linear"):
    """Regression on encrypted residuals (`planrt.sharing.columns.linear`); the last party holds the key."""

    model: Literal["linear", "logistic"]
    batch_size: Annotated[int, Meta(ge=1)]
    epochs: Annotated[int, Meta(ge=1, le=1_000_000)]
    """Epochs at most."""
    lr: Finite
    l2: Finite
    key_bits: Annotated[int, Meta(ge=1024, le=8192)]
    precision: Annotated[int, Meta(ge=8, le=40)]
    allow_short_key: bool = False
    allow_small_batches: bool = False


class SharedTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="shared"):
    """Regression on secret shares (`planrt.sharing.columns.shared`); the last party is the crypto provider."""

    loss: Literal["squares", "second order", "exact"]
    batch_size: Annotated[int, Meta(ge=1)]
    epochs: Annotated[int, Meta(ge=1, le=1_000_000)]
    """Epochs at most."""
    lr: Finite
    l2: Finite
    precision: Annotated[int, Meta(ge=8, le=20)]
    allow_small_batches: bool = False


class SplitTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="split"):
    """A network in parts: below, each owner's on its columns; above, one on what these give, with the labels."""

    bottom: HashOrNone
    """Training plan of this party's part; "" for one that has no columns."""
    bottom_evaluation: HashOrNone
    top: HashOrNone
    """Training plan of the part above, at the owner of the labels; "" elsewhere."""
    top_evaluation: HashOrNone
    widths: Annotated[list[Count], Meta(max_length=64)]
    """How many numbers each owner's part gives for a row; 0 for none."""
    classes: bool
    """Whether labels are classes (int64 [rows]) or numbers (float32 [rows, 1])."""
    batch_size: Annotated[int, Meta(ge=1)]
    epochs: Annotated[int, Meta(ge=1, le=1_000_000)]
    optimizer: Id
    optimizer_args: Options
    noise: Finite
    """Standard deviation of the Gaussian noise that owners add to what leaves them."""
    class_count: Count = 0
    """How many classes there are, where that is known; else 0."""


class OpenJoint(Message, frozen=True, tag="open_joint", omit_defaults=True):
    """Makes the worker a party of a joint run, if its owner lets it. Answered by Done."""

    joint: Id
    token: Token
    """What the other parties show."""
    number: PartyNumber
    """This party's place."""
    parties: Annotated[list[PeerAddress], Meta(min_length=2, max_length=64)]
    """Owners of tables first, then who holds a key or hands out randomness, if anybody does."""
    owners: Annotated[int, Meta(ge=2, le=64)]
    dataset: Annotated[str, Meta(max_length=200)]
    """This party's table; "" for who has none."""
    ids: Names
    """Its id columns, in the order in which they are compared with those of others."""
    normalise: Id
    size_only: bool
    features: Names
    label: Annotated[str, Meta(max_length=200)]
    """Its label column; "" for all but one owner."""
    label_owner: PartyNumber
    columns: Annotated[list[Count], Meta(max_length=64)]
    """How many columns each owner gives."""
    model: LinearTerms | SharedTerms | SplitTerms | None
    """What is trained; None to look who is in both tables, and nothing else."""
    standardise: bool
    """Whether each owner takes the mean from its columns and divides them by their standard deviation."""
    holdout: Annotated[float, Meta(ge=0, le=0.999)]
    """The share of people who are kept for evaluations."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    predictions_to: Id
    """Who gets predictions: "client", or an owner's worker."""
    weights_to_client: bool
    timeout: Annotated[float, Meta(gt=0, le=86_400)]
    """Seconds that a party waits for another one."""
    purpose: Purpose = ""
    keep: Annotated[str, Meta(max_length=200)] = ""
    """The name that each party keeps its own part of the run under, after every epoch; "" for not at all."""
    resume: bool = False
    """Whether it goes on from what was kept under that name."""
    as_is: Names = []
    """Those of this party's columns that are not standardised."""
    tells_waits: bool = False
    """Whether all parties answer `AskJoint`."""


class JoinJoint(Message, frozen=True, tag="join_joint"):
    """Says that party `number` speaks from this session: party to party. Answered by Done."""

    joint: Id
    token: Token
    number: PartyNumber
    terms: Hash
    """Of what all parties must have been told alike."""


class WorkJoint(Message, frozen=True, tag="work_joint"):
    """Has a party do its part of a step; all parties are asked at once. Tensors: with "load", the state of the party's
    plans. Answered by JointDone."""

    joint: Id
    step: Literal[
        "join", "align", "resume", "load", "epoch", "evaluate", "predict", "release", "weights", "forget"
    ]
    epoch: Count = 0
    """The next epoch: to be trained, or with "resume" to go on with."""
    people: Annotated[list[Annotated[list[Text], Meta(max_length=64)]], Meta(max_length=100_000)] = []
    """Whom to predict for: for each the values of the id columns, as in every table."""


class Parcel(Message, frozen=True, tag="parcel"):
    """Values that a party sends another one within a step: party to party. Tensors: what `kind` says. Not answered."""

    joint: Id
    number: Count
    """How many parcels it has sent the other one before."""
    kind: Id


class AskJoint(Message, frozen=True, tag="ask_joint"):
    """Asks a party of a joint run for whom it waits: party to party, before one is named that has not answered.
    Answered by Waits."""

    joint: Id


class Waits(Message, frozen=True, tag="waits"):
    """The parties that a party waits for now. No tensors."""

    whom: Annotated[list[PartyNumber], Meta(max_length=65)]
    """Their numbers; the dealer of a sharing group has the one after those of the parties."""


class FailJoint(Message, frozen=True, tag="fail_joint"):
    """Says that a joint run cannot go on: between its parties. Not answered."""

    joint: Id
    reason: Text
    kind: Id = "JointError"
    """Of the failure, as answers to clients have it."""


class EndJoint(Message, frozen=True, tag="end_joint"):
    """Frees a joint run: its client needs it no more. Not answered."""

    joint: Id


class ReadTable(Message, frozen=True, tag="read_table"):
    """Asks which columns a table has. Answered by TableColumns."""

    dataset: Id


class TableColumns(Message, frozen=True, tag="table_columns"):
    """The facts that a worker tells of a table; never values. No tensors."""

    rows: Count
    ids: list[str]
    columns: list[str]
    label: str = ""


class JointDone(Message, frozen=True, tag="joint_done"):
    """A step is done. Tensors: what the client may have of it."""

    figures: dict[Id, float] = {}
