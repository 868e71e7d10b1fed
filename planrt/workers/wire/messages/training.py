"""The messages that run plans, and train and evaluate them on data sets of a worker."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from planrt.workers.wire.messages.fields import (
    Count,
    CountOrAll,
    Hash,
    Id,
    Message,
    Number,
    ObjectId,
    Options,
    Purpose,
    Text,
)


class PutPlan(Message, frozen=True, tag="put_plan", omit_defaults=True):
    """Hands over a plan. One uint8 tensor: its canonical bytes, or a record of it alone, which has names for its owner
    to read. Answered by Done."""

    plan: Hash
    purpose: Purpose = ""
    """What it is for, in the asker's words, for the worker's owner to read; left out where there are none."""


class AskApproval(Message, frozen=True, tag="ask_approval"):
    """Asks how it stands with a plan. Answered by Approval."""

    plan: Hash


class Approval(Message, frozen=True, tag="approval"):
    """The owner's decision about a plan. No tensors."""

    status: Literal["approved", "denied", "pending", "unknown"]
    why: Text = ""


class RunPlan(Message, frozen=True, tag="run_plan"):
    """Runs a plan on the inputs and state that travel along (inputs first). Answered by Values."""

    plan: Hash
    seed: Count


class Values(Message, frozen=True, tag="values"):
    """The values that a plan's outputs refer to, in their order: a number for a size, None for the next tensor."""

    numbers: list[int | float | None]


class Fit(Message, frozen=True, tag="fit"):
    """Trains a training plan's state on a data set. Tensors: the state, in plan order. Answered by Fitted."""

    plan: Hash
    dataset: Id
    batch_size: Annotated[int, Meta(ge=1)]
    epochs: Annotated[int, Meta(ge=1)]
    max_nr_batches: CountOrAll
    shuffle: bool
    optimizer: Id
    optimizer_args: Options
    keep_optimizer_state: bool
    seed: Count
    drop_last: bool = False
    """Whether the short last batch of each pass is left out."""
    objects: Annotated[list[ObjectId], Meta(max_length=100_000)] = []
    """If not empty: objects of the session that are the state instead of tensors. They are trained where they are, and
    no tensors come back."""


class Fitted(Message, frozen=True, tag="fitted"):
    """Tensors: the state entries that training can change, at the positions in `changed`."""

    loss: float
    """Mean over the samples seen; nan if there were none."""
    samples: Count
    batches: Count
    changed: list[Count]


class Evaluate(Message, frozen=True, tag="evaluate"):
    """Evaluates a plan's state on a data set. Tensors: the state, in plan order. Answered by Evaluated."""

    plan: Hash
    dataset: Id
    batch_size: Annotated[int, Meta(ge=1)]
    bins: Annotated[int, Meta(ge=0, le=100_000)]
    """Number of classes to count predictions in; 0 for outputs that are no class scores."""
    objects: Annotated[list[ObjectId], Meta(max_length=100_000)] = []
    """As of a `Fit`."""


class Evaluated(Message, frozen=True, tag="evaluated"):
    """Figures of an evaluation. No tensors."""

    loss: float
    samples: Count
    correct: Count | None
    histogram: list[Count] | None
    target_histogram: list[Count] | None


class OptimizerValue(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One value that an optimizer keeps for a parameter; "tensor" stands for the next tensor of the message."""

    parameter: Count
    """The parameter's position among those that are trained."""
    name: Annotated[str, Meta(max_length=64)]
    value: Number | Literal["tensor"] | Annotated[list[Number | Literal["tensor"]], Meta(max_length=10_000)]


OptimizerValues = Annotated[list[OptimizerValue], Meta(max_length=1_000_000)]


class ReadOptimizer(Message, frozen=True, tag="read_optimizer"):
    """Asks for what the session's optimizer keeps from the last `Fit` of a plan on a data set. No tensors. Answered by
    OptimizerState."""

    plan: Hash
    dataset: Id
    optimizer: Id


class OptimizerState(Message, frozen=True, tag="optimizer_state"):
    """The values that an optimizer keeps; None where there has been no training. Tensors: in their order."""

    values: OptimizerValues | None


class PutOptimizer(Message, frozen=True, tag="put_optimizer"):
    """Has the next `Fit` of a plan on a data set go on from this. Tensors: as of OptimizerState. Answered by Done."""

    plan: Hash
    dataset: Id
    optimizer: Id
    values: OptimizerValues
