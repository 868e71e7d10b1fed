"""The messages between clients and workers: a closed, tagged union of frozen types.

Each message says which tensors travel with it. `to_wire` and `from_wire` turn an `Envelope` into MessagePack
builtins and back; `from_wire` validates every field (types, bounds, lengths) before anything acts on it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta

from planrt.errors import WireError
from planrt.plans.ir import ops
from planrt.serde.frames import HEADER_BYTES, MESSAGE_BYTES, Limits
from planrt.version import VERSION
from planrt.workers.wire.fields import Count as Count
from planrt.workers.wire.fields import Hash as Hash
from planrt.workers.wire.fields import Id as Id
from planrt.workers.wire.fields import Message as Message
from planrt.workers.wire.fields import Number as Number
from planrt.workers.wire.fields import Options as Options
from planrt.workers.wire.fields import PeerAddress as PeerAddress
from planrt.workers.wire.fields import Purpose as Purpose
from planrt.workers.wire.fields import Text as Text
from planrt.workers.wire.fields import Token as Token
from planrt.workers.wire.joint import EndJoint as EndJoint
from planrt.workers.wire.joint import FailJoint as FailJoint
from planrt.workers.wire.joint import JoinJoint as JoinJoint
from planrt.workers.wire.joint import JointDone as JointDone
from planrt.workers.wire.joint import LinearTerms as LinearTerms
from planrt.workers.wire.joint import OpenJoint as OpenJoint
from planrt.workers.wire.joint import Parcel as Parcel
from planrt.workers.wire.joint import ReadTable as ReadTable
from planrt.workers.wire.joint import SplitTerms as SplitTerms
from planrt.workers.wire.joint import TableColumns as TableColumns
from planrt.workers.wire.joint import WorkJoint as WorkJoint

PROTOCOL_VERSION = 3

CountOrAll = Annotated[int, Meta(ge=-1)]
"""A count, or -1 for all."""
ObjectId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""The number of an object on a worker, chosen at random by whoever makes it."""
Tags = Annotated[list[Annotated[str, Meta(min_length=1, max_length=200)]], Meta(max_length=64)]
Users = Annotated[list[Id], Meta(max_length=1000)]
PublicKey = Annotated[bytes, Meta(min_length=32, max_length=32)]
"""Of X25519; see `planrt.sharing.secure_sum.keys`."""
AtLeast = Annotated[int, Meta(ge=0, le=2**31)]
SealedShares = Annotated[dict[Id, Annotated[bytes, Meta(max_length=200)]], Meta(max_length=1000)]
"""Worker -> what it sealed for one other, or what one sealed for it."""
Shares = Annotated[dict[Id, Annotated[bytes, Meta(max_length=100)]], Meta(max_length=1000)]
"""Worker -> a share of a secret of its."""
Proof = Annotated[str, Meta(max_length=1000)]
"""A message of SCRAM; see `planrt.workers.wire.proofs`."""
Secret = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
"""32 random bytes."""


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


class DatasetInfo(msgspec.Struct, frozen=True):
    """The facts that a worker tells of a data set: its length and the specs of a batch, never values."""

    length: Count
    data: tuple[str, list[CountOrAll]]
    """(dtype name, sizes) of a batch, -1 for the batch dimension."""
    target: tuple[str, list[CountOrAll]]
    tags: list[Id] = []
    description: Text = ""


class ObjectSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The facts of an object that are known without its values."""

    shape: Annotated[list[Count], Meta(max_length=64)]
    stride: Annotated[list[Count], Meta(max_length=64)]
    dtype: Id
    requires_grad: bool = False
    leaf: bool = True


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


Places = Annotated[dict[Id, PeerAddress], Meta(max_length=10_000)]
"""The workers of a protocol: place -> worker."""


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


# ------------------------------------------------------------------------------- client -> worker


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


class Prove(Message, frozen=True, tag="prove"):
    """Answers a Challenge. No tensors. Answered by Welcome."""

    proof: Proof


class Ack(Message, frozen=True, tag="ack"):
    """Says nothing but `Envelope.seen`. From either side, under the number 0. No tensors."""


class Bye(Message, frozen=True, tag="bye", omit_defaults=True):
    """Ends the session, not only the connection. From either side, under the number 0. No tensors."""

    comes_back: bool = False
    """Of a client that may come back: the session is kept as after a cut, and ends where its user needs the room."""


class PutPlan(Message, frozen=True, tag="put_plan", omit_defaults=True):
    """Hands over a plan. One uint8 tensor: its canonical bytes, or a record of it alone, which has names for its owner
    to read. Answered by Done."""

    plan: Hash
    purpose: Purpose = ""
    """What it is for, in the asker's words, for the worker's owner to read; left out where there are none."""


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
    drop_last: bool = False
    """Whether the short last batch of each pass is left out."""
    objects: Annotated[list[ObjectId], Meta(max_length=100_000)] = []
    """If not empty: objects of the session that are the state instead of tensors. They are trained where they are, and
    no tensors come back."""


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


class PutOptimizer(Message, frozen=True, tag="put_optimizer"):
    """Has the next `Fit` of a plan on a data set go on from this. Tensors: as of OptimizerState. Answered by Done."""

    plan: Hash
    dataset: Id
    optimizer: Id
    values: OptimizerValues


class JoinSum(Message, frozen=True, tag="join_sum"):
    """Begins this worker's part in a secure aggregation (`planrt.sharing.secure_sum`). Answered by SumKeys."""

    sum: Token
    """The name of the aggregation, which no other of the session's has."""


class ShareSecrets(Message, frozen=True, tag="share_secrets"):
    """Says who takes part in an aggregation, with the keys that each advertised. Answered by SecretsShared."""

    sum: Token
    threshold: Annotated[int, Meta(ge=1, le=1000)]
    keys: Annotated[dict[Id, tuple[PublicKey, PublicKey, AtLeast]], Meta(max_length=1000)]
    """Worker -> the fields of its SumKeys."""


class FitMasked(Message, frozen=True, tag="fit_masked"):
    """Trains as `fit` says. What comes back is a vector that shows only in a sum with those of others. Tensors: as of a
    Fit. Answered by Masked."""

    sum: Token
    fit: Fit
    sealed: SealedShares
    """Shares that others sealed for this worker."""
    weighted: bool
    """Whether a worker counts by its samples."""
    scale_bits: Annotated[int, Meta(ge=0, le=48)]
    """Fractions are multiples of 2**-scale_bits."""


class RevealShares(Message, frozen=True, tag="reveal_shares"):
    """Asks for the shares that uncover a sum. Answered by Revealed; once, then the aggregation is over."""

    sum: Token
    survivors: Annotated[list[Id], Meta(max_length=1000)]
    """The workers whose masked values arrived."""


class Evaluate(Message, frozen=True, tag="evaluate"):
    """Evaluates a plan's state on a data set. Tensors: the state, in plan order. Answered by Evaluated."""

    plan: Hash
    dataset: Id
    batch_size: Annotated[int, Meta(ge=1)]
    bins: Annotated[int, Meta(ge=0, le=100_000)]
    """Number of classes to count predictions in; 0 for outputs that are no class scores."""
    objects: Annotated[list[ObjectId], Meta(max_length=100_000)] = []
    """As of a `Fit`."""


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


class Put(Message, frozen=True, tag="put"):
    """Stores tensors: for each item its value, and its gradient where it has one. Answered by Done if numbered."""

    items: list[PutItem]
    handover: Token = ""
    """If not empty: whoever shows this token in a Claim becomes the objects' owner."""


class AskApproval(Message, frozen=True, tag="ask_approval"):
    """Asks how it stands with a plan. Answered by Approval."""

    plan: Hash


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


class StoreProtocol(Message, frozen=True, tag="store_protocol"):
    """Stores a protocol as an object. Tensors: its chain as bytes (uint8), then the state of its plans, in order.

    Answered by Done if numbered.
    """

    id: ObjectId
    tags: Tags = []
    description: Text = ""
    allowed: Users | None = None
    """As of a `PutItem`; for the state of all plans."""


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


class PutPointer(Message, frozen=True, tag="put_pointer"):
    """Stores a pointer to an object on another worker, which `token` lets this worker claim. Answered by Done if
    numbered, once that is claimed."""

    id: ObjectId
    peer: PeerAddress
    object: ObjectId
    token: Token


class Fetch(Message, frozen=True, tag="fetch"):
    """Brings an object back, and removes it if `delete`. Answered by Fetched, FetchedPointer or FetchedPlan."""

    id: ObjectId
    delete: bool


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


class Describe(Message, frozen=True, tag="describe"):
    """Gives an object tags and a description; a tagged object is published. Not answered."""

    id: ObjectId
    tags: Tags
    description: Text


class Search(Message, frozen=True, tag="search"):
    """Looks for published objects, and for the session's own, that match every term. Answered by Found."""

    query: Annotated[list[Annotated[str, Meta(max_length=1000)]], Meta(max_length=64)]


class Move(Message, frozen=True, tag="move"):
    """Hands an object over to another worker, under the number `target`. Answered by Done."""

    id: ObjectId
    peer: PeerAddress
    target: ObjectId
    token: Token
    copy: bool = False
    """Whether the object stays here. Then its values go alone: without gradient, tags and description."""
    keep: bool = False
    """Whether the object stays until its client removes it, which it does when it has claimed what arrived."""


class HandOver(Message, frozen=True, tag="hand_over"):
    """Lets whoever shows `token` claim these objects. Answered by Done if numbered."""

    ids: list[ObjectId]
    token: Token


class Claim(Message, frozen=True, tag="claim"):
    """Takes over objects that were handed over under `token`. Answered by Done if numbered."""

    ids: list[ObjectId]
    token: Token


class Remove(Message, frozen=True, tag="remove"):
    """Removes objects of the session, published or not: they have arrived elsewhere. Answered by Done if numbered."""

    ids: Annotated[list[ObjectId], Meta(max_length=100_000)]


class ListObjects(Message, frozen=True, tag="list_objects"):
    """Asks what the worker holds for this session, without values. Answered by Listed."""


class Clear(Message, frozen=True, tag="clear"):
    """Removes every object of the session, published ones too. Answered by Done."""


class AskStatus(Message, frozen=True, tag="ask_status"):
    """Asks how the worker is, as far as it is the session's user's own. Answered by WorkerStatus."""


class CountObjects(Message, frozen=True, tag="count_objects"):
    """Asks how many objects the worker holds for this session. Answered by Counted."""


# ------------------------------------------------------------------------ computing on shares


class MakeGroup(Message, frozen=True, tag="make_group"):
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


# ------------------------------------------------------------------------------- worker -> client


class Challenge(Message, frozen=True, tag="challenge"):
    """The session opens when this is answered with a Prove. No tensors."""

    proof: Proof


class Welcome(Message, frozen=True, tag="welcome", omit_defaults=True):
    """The session is open. No tensors."""

    worker: Id
    versions: Versions
    datasets: dict[Id, DatasetInfo]
    proof: Proof = ""
    """The worker's own proof, where its client gave one."""
    kept: Kept | None = None
    """None where the session ends with its connection."""


class Done(Message, frozen=True, tag="done"):
    """Done as asked. No tensors."""


class Values(Message, frozen=True, tag="values"):
    """The values that a plan's outputs refer to, in their order: a number for a size, None for the next tensor."""

    numbers: list[int | float | None]


class Fitted(Message, frozen=True, tag="fitted"):
    """Tensors: the state entries that training can change, at the positions in `changed`."""

    loss: float
    """Mean over the samples seen; nan if there were none."""
    samples: Count
    batches: Count
    changed: list[Count]


class OptimizerState(Message, frozen=True, tag="optimizer_state"):
    """The values that an optimizer keeps; None where there has been no training. Tensors: in their order."""

    values: OptimizerValues | None


class SumKeys(Message, frozen=True, tag="sum_keys"):
    """The keys of this worker in one aggregation: what others seal for it with, and what masks are made of."""

    seal: PublicKey
    mask: PublicKey
    least: AtLeast
    """The fewest workers that its owner wants in a sum."""


class SecretsShared(Message, frozen=True, tag="secrets_shared"):
    """The shares of this worker's secrets, sealed for each other worker."""

    sealed: SealedShares


class Masked(Message, frozen=True, tag="masked"):
    """Tensors: one of int64, which says what a Fitted does (`planrt.sharing.secure_sum.encoding`), masked."""


class Revealed(Message, frozen=True, tag="revealed"):
    """The shares that this worker holds: of the survivors' own masks, and of the mask keys of those who dropped out."""

    seeds: Shares
    keys: Shares


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
    index: Count | None = None
    """Which op of a plan it was."""
    cause: Text = ""
    """What torch said, where that is known and may be told."""
    number: Count | None = None
    """Which of the session's posted ops it was, counted from 0: the client knows the line that posted it."""
    step: Text | None = None
    """Which step of a protocol it was."""


class Made(Message, frozen=True, tag="made"):
    """The results of a Call: nested, each tensor a reference into `objects`. No tensors."""

    results: Any
    objects: list[tuple[ObjectId, ObjectSpec]]


class Fetched(Message, frozen=True, tag="fetched"):
    """An object: its tensor, and its gradient where it has one."""

    requires_grad: bool
    has_grad: bool
    tags: list[str] = []
    description: str = ""
    allowed: list[str] | None = None
    """Who may read it: who was told the value, and moves it on, hands this on as well."""


class Approval(Message, frozen=True, tag="approval"):
    """The owner's decision about a plan. No tensors."""

    status: Literal["approved", "denied", "pending", "unknown"]
    why: Text = ""


class FetchedPlan(Message, frozen=True, tag="fetched_plan"):
    """A plan. Tensors as of `StorePlan`."""

    training: bool
    allowed: list[str] | None = None
    """Who may read its state."""


class FetchedProtocol(Message, frozen=True, tag="fetched_protocol"):
    """A protocol. Tensors as of `StoreProtocol`."""


class RunStates(Message, frozen=True, tag="run_states"):
    """The progress of a run: (step, state) of each step, in order; empty if there is no such run now. No tensors."""

    steps: list[tuple[str, Literal["waiting", "running", "done", "failed"]]]


class FetchedPointer(Message, frozen=True, tag="fetched_pointer"):
    """The fetched object is a pointer to one on another worker, which `token` lets the client claim. No tensors."""

    peer: PeerAddress
    object: ObjectId
    token: Token


class Gradients(Message, frozen=True, tag="gradients"):
    """The gradients that the session's objects have now: their ids and specs. No tensors."""

    objects: list[tuple[ObjectId, ObjectSpec]]


class Found(Message, frozen=True, tag="found"):
    """The objects that a search found. No tensors."""

    objects: list[FoundItem]


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


class FetchedShare(Message, frozen=True, tag="fetched_share"):
    """A part of a secret. Tensor: the part."""

    scale: Annotated[int, Meta(ge=1)]


class Needs(Message, frozen=True, tag="needs"):
    """The requests of a party, as `planrt.sharing.programs.asking` writes them. No tensors."""

    requests: list[Any]


class GroupTraffic(Message, frozen=True, tag="group_traffic"):
    """The traffic of one party of a group so far. No tensors."""

    rounds: Count = 0
    """Openings."""
    sent: Count = 0
    """Bytes of parts that it sent to the other parties, all together."""
    received: Count = 0
    dealt: Count = 0
    """Bytes of correlated randomness that the dealer sent it."""


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


class Counted(Message, frozen=True, tag="counted"):
    """The number of objects that the worker holds for the session. No tensors."""

    objects: Count


Body = (
    Hello | Prove | Ack | Bye | PutPlan | RunPlan | Fit | Evaluate | JoinSum | ShareSecrets | FitMasked | RevealShares
    | Post | Call | Put | StorePlan | ReadPlan | PutPointer | Fetch | Backward | Resume | Describe | Search | Move
    | HandOver
    | Claim | Clear | CountObjects | AskApproval | StoreProtocol | DeployProtocol | RunProtocol | CancelRun | ReadRun
    | Challenge
    | SumKeys | SecretsShared | Masked | Revealed | ReadOptimizer | PutOptimizer | OptimizerState
    | Welcome | Done | Values | Fitted | Evaluated | Made | Fetched | FetchedPlan | FetchedPointer | Gradients | Found
    | MakeGroup | MakeDealer | Deal | GiveSeed | JoinGroup | Opening | AskNeeds | Corrections | FailGroup | EndGroup
    | PutShare | ShareOut | ReadTraffic | FetchedShare | Needs | GroupTraffic
    | AskStatus | WorkerStatus
    | ReadTable | TableColumns | OpenJoint | JoinJoint | WorkJoint | JointDone | Parcel | FailJoint | EndJoint
    | Counted | Remove | ListObjects | Listed | Approval | FetchedProtocol | RunStates | Failure
)  # fmt: skip


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A message and the number that ties a reply to its request (0: posted, to be answered by nothing)."""

    id: Count
    body: Body
    seen: Count = 0
    """How many messages of the other side its sender has taken; see `planrt.workers.wire.delivery`."""


def to_wire(envelope: Envelope) -> Any:
    """`envelope` as MessagePack builtins."""
    return msgspec.to_builtins(envelope)


def from_wire(builtins: object, *, address: str = "") -> Envelope:
    """Returns the envelope that `to_wire` was given.

    Raises:
        WireError: anything that is not exactly one of the messages above.
    """
    try:
        return msgspec.convert(builtins, Envelope)
    except (msgspec.ValidationError, RecursionError) as error:
        raise WireError(f"malformed message: {error}", address=address) from error


def own_versions(limits: Limits | None = None, *, resumes: bool = False) -> Versions:
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
    )
