"""A worker's part in secure aggregations: what it answers, and which of its updates can be added up. No I/O.

The protocol is `planrt.sharing.secure_sum`'s. Its state, with the keys, is the session's and ends with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from planrt.errors import LocalError, PolicyError, SharingError, ValueRangeError
from planrt.plans.ir.graph import Graph
from planrt.plans.training import TrainResult
from planrt.sharing.secure_sum import encoding
from planrt.sharing.secure_sum.group import Group
from planrt.sharing.secure_sum.keys import PublicKeys
from planrt.sharing.secure_sum.member import Member
from planrt.sharing.secure_sum.signing import Identity
from planrt.workers.machine.admission import failed_on_data
from planrt.workers.machine.events import Answer
from planrt.workers.machine.failures import OpFailedError
from planrt.workers.machine.gate import Gate
from planrt.workers.machine.sessions import Session
from planrt.workers.wire import messages as m

MOST_SUMS: Final = 64
"""Aggregations of a session that have begun and not ended; the oldest goes first."""


class SecureSums:
    """The aggregations that the worker `worker_id` takes part in, under the rules of its `gate`; with an `identity` it
    signs its part in them."""

    def __init__(self, worker_id: str, gate: Gate | None, identity: Identity | None = None) -> None:
        self._worker_id = worker_id
        self._gate = gate
        self._identity = identity

    def join(self, session: Session, body: m.JoinSum) -> Answer:
        """Begins one, with fresh keys."""
        if body.sum in session.sums:
            raise SharingError(
                f"worker {self._worker_id!r} takes part in a secure aggregation of that name already"
            )
        member = session.sums[body.sum] = Member(
            self._worker_id, least=self._least or 2, identity=self._identity
        )
        while len(session.sums) > MOST_SUMS:
            del session.sums[next(iter(session.sums))]
        keys = member.join(body.sum)
        return m.SumKeys(keys.seal, keys.mask, keys.least, keys.signature), ()

    def share(self, session: Session, body: m.ShareSecrets) -> Answer:
        """Seals shares of this worker's secrets for the others."""
        keys = {name: PublicKeys(*given, body.signatures.get(name, b"")) for name, given in body.keys.items()}
        group = Group(body.sum, body.threshold, keys)
        return m.SecretsShared(self._member(session, body.sum).share(group)), ()

    def sign(self, session: Session, body: m.SignSurvivors) -> Answer:
        """Signs the list of those whose values are in the sum; one list for each aggregation."""
        return m.SurvivorsSigned(self._member(session, body.sum).sign(body.survivors)), ()

    def reveal(self, session: Session, body: m.RevealShares) -> Answer:
        """Gives away the shares that uncover the sum over `body.survivors`. Then it is over."""
        member = self._member(session, body.sum)
        revealed = member.reveal(body.survivors, body.signatures)
        del session.sums[body.sum]
        return m.Revealed(dict(revealed.seeds), dict(revealed.keys)), ()

    @property
    def _least(self) -> int | None:
        return None if self._gate is None else self._gate.policy.require_secure_aggregation

    def check_plain(self) -> None:
        """Raises PolicyError if what this worker has learnt leaves in secure aggregations only."""
        if self._least is not None:
            raise PolicyError(
                f"what worker {self._worker_id!r} has learnt leaves in secure aggregations only, over at least "
                f"{self._least} workers, as its owner wants: write RoundScheduler(..., secure_aggregation=True)",
                rule="require_secure_aggregation",
            )

    def begin(self, session: Session, body: m.FitMasked) -> Member:
        """Returns this worker's side of the aggregation, before it trains for it.

        Raises:
            SharingError, PolicyError: what it learnt could not be masked afterwards.
        """
        if body.fit.objects:
            raise LocalError(
                "what is trained in a secure aggregation comes with the message: objects stay here"
            )
        member = self._member(session, body.sum)
        member.check_sealed(body.sealed)
        return member

    def masked(
        self,
        session: Session,
        member: Member,
        body: m.FitMasked,
        context: bytes,
        plan: Graph,
        result: TrainResult,
        constant: Sequence[encoding.Constant | None],
    ) -> Answer:
        """Returns the result of training as a masked vector. `constant` are places that no sum can hold, as they were.

        Raises:
            SharingError: there was nothing to train on. A worker that added nothing would count among those whose
                sum this is, and hide nobody: the sum over it and one other is that one's model.
            ValueRangeError: the result cannot be added up; says which entry, unless the data are under a policy.
        """
        if not result.samples:
            raise SharingError(
                f"there is nothing to train on in data set {body.fit.dataset!r} (it is empty, drop_last=True leaves no "
                "batch, or max_nr_batches is 0): who adds nothing to a secure sum hides nobody in it, so leave this "
                "worker out, or write min_workers= for rounds without it"
            )
        names = [plan.state[index].name for index in result.changed]
        try:
            vector = encoding.encode(
                [encoding.without(*pair) for pair in zip(names, result.state, constant, strict=True)],
                names,
                weight=result.samples if body.weighted else 1,
                samples=result.samples,
                loss=result.loss,
                members=1 + len(body.sealed),
                scale_bits=body.scale_bits,
            )
        except ValueRangeError as error:
            if self._gate is None:
                raise
            failed_on_data(self._gate, session, error, plan=body.fit.plan, dataset=body.fit.dataset)
            raise OpFailedError(m.Failure("ValueRangeError", _UNSAID)) from error
        return m.Masked(), [member.mask(vector, body.sealed, context)]

    def _member(self, session: Session, sum: str) -> Member:
        try:
            return session.sums[sum]
        except KeyError:
            raise SharingError(
                f"worker {self._worker_id!r} takes part in no secure aggregation of that name: it was never joined, or "
                "is over"
            ) from None


_UNSAID: Final = (
    "the update or its loss has values that are infinite, no numbers, or too large for a sum; which can depend on the "
    "data, so it is for the worker's owner only"
)
