"""The messages between clients and workers: a closed, tagged union of frozen types.

Each message says which tensors travel with it. `to_wire` and `from_wire` turn an `Envelope` into MessagePack
builtins and back; `from_wire` validates every field (types, bounds, lengths) before anything acts on it.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from planrt.errors import WireError

PROTOCOL_VERSION = 1

Id = Annotated[str, Meta(min_length=1, max_length=200)]
Hash = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, Meta(max_length=64_000)]
Count = Annotated[int, Meta(ge=0)]
CountOrAll = Annotated[int, Meta(ge=-1)]
"""A count, or -1 for all."""
Number = bool | int | float | None
Options = dict[Annotated[str, Meta(max_length=64)], Number | Annotated[list[Number], Meta(max_length=8)]]
"""Keyword arguments of an optimizer."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every message."""


class Versions(msgspec.Struct, frozen=True):
    """What each side runs; exchanged in the handshake."""

    protocol: int
    planrt: Id
    torch: Id
    ops: Hash
    """Hash of the op table (`planrt.plans.ops.TABLE_HASH`)."""


class DatasetInfo(msgspec.Struct, frozen=True):
    """What a worker says about one of its data sets: length and the specs of a batch, never values."""

    length: Count
    data: tuple[str, list[CountOrAll]]
    """(dtype name, sizes) of a batch, -1 for the batch dimension."""
    target: tuple[str, list[CountOrAll]]
    tags: list[Id] = []
    description: Text = ""


# ------------------------------------------------------------------------------- client -> worker


class Hello(Message, frozen=True, tag="hello"):
    """Opens a session. No tensors. Answered by Welcome."""

    session: Id
    versions: Versions


class PutPlan(Message, frozen=True, tag="put_plan"):
    """Hands over a plan. One uint8 tensor: its canonical bytes. Answered by Done."""

    plan: Hash


class RunPlan(Message, frozen=True, tag="run_plan"):
    """Runs a plan on the inputs and state that travel along (inputs first). Answered by Values."""

    plan: Hash
    seed: Count


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


class Evaluate(Message, frozen=True, tag="evaluate"):
    """Evaluates a plan's state on a data set. Tensors: the state, in plan order. Answered by Evaluated."""

    plan: Hash
    dataset: Id
    batch_size: Annotated[int, Meta(ge=1)]
    bins: Annotated[int, Meta(ge=0, le=100_000)]
    """Number of classes to count predictions in; 0 for outputs that are no class scores."""


# ------------------------------------------------------------------------------- worker -> client


class Welcome(Message, frozen=True, tag="welcome"):
    """The session is open. No tensors."""

    worker: Id
    versions: Versions
    datasets: dict[Id, DatasetInfo]


class Done(Message, frozen=True, tag="done"):
    """Done as asked. No tensors."""


class Values(Message, frozen=True, tag="values"):
    """What a plan's outputs refer to, in their order: a number for a size, None for the next tensor."""

    numbers: list[int | float | None]


class Fitted(Message, frozen=True, tag="fitted"):
    """Tensors: the state entries that training can change, at the positions in `changed`."""

    loss: float
    """Mean over the samples seen; nan if there were none."""
    samples: Count
    batches: Count
    changed: list[Count]


class Evaluated(Message, frozen=True, tag="evaluated"):
    """Figures of an evaluation. No tensors."""

    loss: float
    samples: Count
    correct: Count | None
    histogram: list[Count] | None
    target_histogram: list[Count] | None


class Failure(Message, frozen=True, tag="failure"):
    """The request failed on the worker; nothing it held was changed. No tensors."""

    kind: Id
    message: Text
    op: Text | None = None
    line: Text | None = None
    traceback: Text = ""


Body = (
    Hello | PutPlan | RunPlan | Fit | Evaluate | Welcome | Done | Values | Fitted | Evaluated | Failure
)  # fmt: skip


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message and the number that ties a reply to its request (0: to none)."""

    id: Count
    body: Body


def to_wire(envelope: Envelope) -> Any:
    """`envelope` as MessagePack builtins."""
    return msgspec.to_builtins(envelope)


def from_wire(builtins: object, *, address: str = "") -> Envelope:
    """The inverse of `to_wire`.

    Raises:
        WireError: anything that is not exactly one of the messages above.
    """
    try:
        return msgspec.convert(builtins, Envelope)
    except (msgspec.ValidationError, RecursionError) as error:
        raise WireError(f"malformed message: {error}", address=address) from error
