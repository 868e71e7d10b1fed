"""The messages of secure aggregation: a worker trains, and only the sum of several workers' models is seen.

See `planrt.sharing.secure_sum`.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from planrt.workers.wire.messages.fields import Id, Message, Token
from planrt.workers.wire.messages.training import Fit

PublicKey = Annotated[bytes, Meta(min_length=32, max_length=32)]
"""Of X25519; see `planrt.sharing.secure_sum.keys`."""
Signature = Annotated[bytes, Meta(max_length=64)]
"""Of Ed25519; see `planrt.sharing.secure_sum.signing`. Empty: it is not signed."""
Signatures = Annotated[dict[Id, Signature], Meta(max_length=1000)]
"""Worker -> its signature."""
AtLeast = Annotated[int, Meta(ge=0, le=2**31)]
SealedShares = Annotated[dict[Id, Annotated[bytes, Meta(max_length=200)]], Meta(max_length=1000)]
"""Worker -> what it sealed for one other, or what one sealed for it."""
Shares = Annotated[dict[Id, Annotated[bytes, Meta(max_length=100)]], Meta(max_length=1000)]
"""Worker -> a share of a secret of its."""


class JoinSum(Message, frozen=True, tag="join_sum"):
    """Begins this worker's part in a secure aggregation (`planrt.sharing.secure_sum`). Answered by SumKeys."""

    sum: Token
    """The name of the aggregation, which no other of the session's has."""


class SumKeys(Message, frozen=True, tag="sum_keys", omit_defaults=True):
    """The keys of this worker in one aggregation: what others seal for it with, and what masks are made of."""

    seal: PublicKey
    mask: PublicKey
    least: AtLeast
    """The fewest workers that its owner wants in a sum."""
    signature: Signature = b""
    """By which the worker says that the keys are its own."""


class ShareSecrets(Message, frozen=True, tag="share_secrets", omit_defaults=True):
    """Says who takes part in an aggregation, with the keys that each advertised. Answered by SecretsShared."""

    sum: Token
    threshold: Annotated[int, Meta(ge=1, le=1000)]
    keys: Annotated[dict[Id, tuple[PublicKey, PublicKey, AtLeast]], Meta(max_length=1000)]
    """Worker -> the fields of its SumKeys."""
    signatures: Signatures = {}
    """Worker -> the signature of its SumKeys, where it has one."""


class SecretsShared(Message, frozen=True, tag="secrets_shared"):
    """The shares of this worker's secrets, sealed for each other worker."""

    sealed: SealedShares


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


class Masked(Message, frozen=True, tag="masked"):
    """Tensors: one of int64, which says what a Fitted does (`planrt.sharing.secure_sum.encoding`), masked."""


class SignSurvivors(Message, frozen=True, tag="sign_survivors"):
    """Asks a worker that signs to sign whose masked values arrived, where all of an aggregation sign. Answered by
    SurvivorsSigned."""

    sum: Token
    survivors: Annotated[list[Id], Meta(max_length=1000)]


class SurvivorsSigned(Message, frozen=True, tag="survivors_signed"):
    """The signature of that list, of this aggregation."""

    signature: Signature


class RevealShares(Message, frozen=True, tag="reveal_shares", omit_defaults=True):
    """Asks for the shares that uncover a sum. Answered by Revealed; once, then the aggregation is over."""

    sum: Token
    survivors: Annotated[list[Id], Meta(max_length=1000)]
    """The workers whose masked values arrived."""
    signatures: Signatures = {}
    """Those of this list, where all sign."""


class Revealed(Message, frozen=True, tag="revealed"):
    """The shares that this worker holds: of the survivors' own masks, and of the mask keys of those who dropped out."""

    seeds: Shares
    keys: Shares
