"""The messages between clients and workers: a closed, tagged union of frozen types.

Each message says which tensors travel with it. `to_wire` and `from_wire` turn an `Envelope` into MessagePack
builtins and back; `from_wire` validates every field (types, bounds, lengths) before anything acts on it.
The modules beside this one have the messages by subject, each request before its answer; all stand here too.
"""

from __future__ import annotations

from typing import Any

import msgspec

from planrt.errors import WireError
from planrt.workers.wire.messages.delegation import ActFor as ActFor
from planrt.workers.wire.messages.delegation import Delegate as Delegate
from planrt.workers.wire.messages.delegation import For as For
from planrt.workers.wire.messages.delegation import Ticket as Ticket
from planrt.workers.wire.messages.fields import Count as Count
from planrt.workers.wire.messages.fields import CountOrAll as CountOrAll
from planrt.workers.wire.messages.fields import Hash as Hash
from planrt.workers.wire.messages.fields import Id as Id
from planrt.workers.wire.messages.fields import Message as Message
from planrt.workers.wire.messages.fields import Number as Number
from planrt.workers.wire.messages.fields import ObjectId as ObjectId
from planrt.workers.wire.messages.fields import ObjectSpec as ObjectSpec
from planrt.workers.wire.messages.fields import Options as Options
from planrt.workers.wire.messages.fields import PeerAddress as PeerAddress
from planrt.workers.wire.messages.fields import Purpose as Purpose
from planrt.workers.wire.messages.fields import Tags as Tags
from planrt.workers.wire.messages.fields import Text as Text
from planrt.workers.wire.messages.fields import Token as Token
from planrt.workers.wire.messages.fields import Users as Users
from planrt.workers.wire.messages.joint import AskJoint as AskJoint
from planrt.workers.wire.messages.joint import EndJoint as EndJoint
from planrt.workers.wire.messages.joint import FailJoint as FailJoint
from planrt.workers.wire.messages.joint import JoinJoint as JoinJoint
from planrt.workers.wire.messages.joint import JointDone as JointDone
from planrt.workers.wire.messages.joint import LinearTerms as LinearTerms
from planrt.workers.wire.messages.joint import OpenJoint as OpenJoint
from planrt.workers.wire.messages.joint import Parcel as Parcel
from planrt.workers.wire.messages.joint import ReadTable as ReadTable
from planrt.workers.wire.messages.joint import SharedTerms as SharedTerms
from planrt.workers.wire.messages.joint import SplitTerms as SplitTerms
from planrt.workers.wire.messages.joint import TableColumns as TableColumns
from planrt.workers.wire.messages.joint import Waits as Waits
from planrt.workers.wire.messages.joint import WorkJoint as WorkJoint
from planrt.workers.wire.messages.lending import Lend as Lend
from planrt.workers.wire.messages.lending import Lent as Lent
from planrt.workers.wire.messages.lending import LentItem as LentItem
from planrt.workers.wire.messages.moving import Claim as Claim
from planrt.workers.wire.messages.moving import FetchedPointer as FetchedPointer
from planrt.workers.wire.messages.moving import HandOver as HandOver
from planrt.workers.wire.messages.moving import Move as Move
from planrt.workers.wire.messages.moving import PutPointer as PutPointer
from planrt.workers.wire.messages.objects import Backward as Backward
from planrt.workers.wire.messages.objects import Call as Call
from planrt.workers.wire.messages.objects import Clear as Clear
from planrt.workers.wire.messages.objects import Counted as Counted
from planrt.workers.wire.messages.objects import CountObjects as CountObjects
from planrt.workers.wire.messages.objects import Describe as Describe
from planrt.workers.wire.messages.objects import Fetch as Fetch
from planrt.workers.wire.messages.objects import Fetched as Fetched
from planrt.workers.wire.messages.objects import Found as Found
from planrt.workers.wire.messages.objects import FoundItem as FoundItem
from planrt.workers.wire.messages.objects import Gradients as Gradients
from planrt.workers.wire.messages.objects import Listed as Listed
from planrt.workers.wire.messages.objects import ListedItem as ListedItem
from planrt.workers.wire.messages.objects import ListObjects as ListObjects
from planrt.workers.wire.messages.objects import Made as Made
from planrt.workers.wire.messages.objects import Post as Post
from planrt.workers.wire.messages.objects import Put as Put
from planrt.workers.wire.messages.objects import PutItem as PutItem
from planrt.workers.wire.messages.objects import Remove as Remove
from planrt.workers.wire.messages.objects import Resume as Resume
from planrt.workers.wire.messages.objects import Search as Search
from planrt.workers.wire.messages.programs import CancelRun as CancelRun
from planrt.workers.wire.messages.programs import DeployProtocol as DeployProtocol
from planrt.workers.wire.messages.programs import FetchedPlan as FetchedPlan
from planrt.workers.wire.messages.programs import FetchedProtocol as FetchedProtocol
from planrt.workers.wire.messages.programs import Places as Places
from planrt.workers.wire.messages.programs import ReadPlan as ReadPlan
from planrt.workers.wire.messages.programs import ReadRun as ReadRun
from planrt.workers.wire.messages.programs import RunProtocol as RunProtocol
from planrt.workers.wire.messages.programs import RunStates as RunStates
from planrt.workers.wire.messages.programs import StorePlan as StorePlan
from planrt.workers.wire.messages.programs import StoreProtocol as StoreProtocol
from planrt.workers.wire.messages.secure_sums import AtLeast as AtLeast
from planrt.workers.wire.messages.secure_sums import FitMasked as FitMasked
from planrt.workers.wire.messages.secure_sums import JoinSum as JoinSum
from planrt.workers.wire.messages.secure_sums import Masked as Masked
from planrt.workers.wire.messages.secure_sums import PublicKey as PublicKey
from planrt.workers.wire.messages.secure_sums import Revealed as Revealed
from planrt.workers.wire.messages.secure_sums import RevealShares as RevealShares
from planrt.workers.wire.messages.secure_sums import SealedShares as SealedShares
from planrt.workers.wire.messages.secure_sums import SecretsShared as SecretsShared
from planrt.workers.wire.messages.secure_sums import Shares as Shares
from planrt.workers.wire.messages.secure_sums import ShareSecrets as ShareSecrets
from planrt.workers.wire.messages.secure_sums import SignSurvivors as SignSurvivors
from planrt.workers.wire.messages.secure_sums import SumKeys as SumKeys
from planrt.workers.wire.messages.secure_sums import SurvivorsSigned as SurvivorsSigned
from planrt.workers.wire.messages.sessions import PROTOCOL_VERSION as PROTOCOL_VERSION
from planrt.workers.wire.messages.sessions import Ack as Ack
from planrt.workers.wire.messages.sessions import AskStatus as AskStatus
from planrt.workers.wire.messages.sessions import Bye as Bye
from planrt.workers.wire.messages.sessions import Challenge as Challenge
from planrt.workers.wire.messages.sessions import DatasetInfo as DatasetInfo
from planrt.workers.wire.messages.sessions import Dials as Dials
from planrt.workers.wire.messages.sessions import Done as Done
from planrt.workers.wire.messages.sessions import Failure as Failure
from planrt.workers.wire.messages.sessions import Hello as Hello
from planrt.workers.wire.messages.sessions import Kept as Kept
from planrt.workers.wire.messages.sessions import Proof as Proof
from planrt.workers.wire.messages.sessions import Prove as Prove
from planrt.workers.wire.messages.sessions import Resumption as Resumption
from planrt.workers.wire.messages.sessions import Secret as Secret
from planrt.workers.wire.messages.sessions import Versions as Versions
from planrt.workers.wire.messages.sessions import Welcome as Welcome
from planrt.workers.wire.messages.sessions import WorkerStatus as WorkerStatus
from planrt.workers.wire.messages.sessions import own_versions as own_versions
from planrt.workers.wire.messages.shares import AskGroup as AskGroup
from planrt.workers.wire.messages.shares import AskNeeds as AskNeeds
from planrt.workers.wire.messages.shares import Corrections as Corrections
from planrt.workers.wire.messages.shares import Deal as Deal
from planrt.workers.wire.messages.shares import EndGroup as EndGroup
from planrt.workers.wire.messages.shares import FailGroup as FailGroup
from planrt.workers.wire.messages.shares import FetchedShare as FetchedShare
from planrt.workers.wire.messages.shares import GiveSeed as GiveSeed
from planrt.workers.wire.messages.shares import GroupTraffic as GroupTraffic
from planrt.workers.wire.messages.shares import JoinGroup as JoinGroup
from planrt.workers.wire.messages.shares import MakeDealer as MakeDealer
from planrt.workers.wire.messages.shares import MakeGroup as MakeGroup
from planrt.workers.wire.messages.shares import Needs as Needs
from planrt.workers.wire.messages.shares import Opening as Opening
from planrt.workers.wire.messages.shares import PutShare as PutShare
from planrt.workers.wire.messages.shares import ReadTraffic as ReadTraffic
from planrt.workers.wire.messages.shares import ShareOut as ShareOut
from planrt.workers.wire.messages.training import Approval as Approval
from planrt.workers.wire.messages.training import AskApproval as AskApproval
from planrt.workers.wire.messages.training import Evaluate as Evaluate
from planrt.workers.wire.messages.training import Evaluated as Evaluated
from planrt.workers.wire.messages.training import Fit as Fit
from planrt.workers.wire.messages.training import Fitted as Fitted
from planrt.workers.wire.messages.training import OptimizerState as OptimizerState
from planrt.workers.wire.messages.training import OptimizerValue as OptimizerValue
from planrt.workers.wire.messages.training import OptimizerValues as OptimizerValues
from planrt.workers.wire.messages.training import PutOptimizer as PutOptimizer
from planrt.workers.wire.messages.training import PutPlan as PutPlan
from planrt.workers.wire.messages.training import ReadOptimizer as ReadOptimizer
from planrt.workers.wire.messages.training import RunPlan as RunPlan
from planrt.workers.wire.messages.training import Values as Values

Body = (
    Hello | Prove | Challenge | Welcome | Ack | Bye | Done | Failure | AskStatus | WorkerStatus
    | PutPlan | AskApproval | Approval | RunPlan | Values | Fit | Fitted | Evaluate | Evaluated
    | ReadOptimizer | OptimizerState | PutOptimizer
    | JoinSum | SumKeys | ShareSecrets | SecretsShared | FitMasked | Masked
    | SignSurvivors | SurvivorsSigned | RevealShares | Revealed
    | Put | Post | Call | Made | Fetch | Fetched | Backward | Resume | Gradients | Describe | Search | Found
    | Remove | ListObjects | Listed | Clear | CountObjects | Counted
    | PutPointer | FetchedPointer | Move | HandOver | Claim | Lend | Lent
    | Delegate | Ticket | ActFor
    | StorePlan | ReadPlan | FetchedPlan
    | StoreProtocol | FetchedProtocol | DeployProtocol | RunProtocol | CancelRun | ReadRun | RunStates
    | MakeGroup | MakeDealer | Deal | GiveSeed | JoinGroup | Opening | AskNeeds | AskGroup | Needs | Corrections
    | FailGroup | EndGroup | PutShare | FetchedShare | ShareOut | ReadTraffic | GroupTraffic
    | ReadTable | TableColumns | OpenJoint | JoinJoint | WorkJoint | JointDone | Parcel | AskJoint | Waits | FailJoint
    | EndJoint
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
