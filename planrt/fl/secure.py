"""Rounds in which the server learns the sum of the workers' models, and no single one.

`RoundScheduler(secure_aggregation=True)` asks its workers in this way instead of that of
`planrt.fl.exchange.PlainExchange`. The protocol, and whom it protects from whom, is `planrt.sharing.secure_sum`'s; here
are its messages. With workers alice, bob and charlie, in each round:

    JoinSum        -> all       SumKeys        <- each     fresh public keys
    ShareSecrets   -> all       SecretsShared  <- each     everybody's keys; shares, sealed for the others
    FitMasked      -> all       Masked         <- each     what a Fit says, and the shares; the trained model, masked
    SignSurvivors  -> all       SurvivorsSigned <- each    who answered, where the workers sign their keys
    RevealShares   -> all       Revealed       <- each     who answered; shares of what uncovers the sum over these

A worker may be lost between any two of these. The sum is that of those whose masked models came, bit for bit.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch

from planrt.errors import OptionError, SharingError, UpdateRefusedError
from planrt.fl.attendance import WORKERS_OWN, Missing, below_quorum, cancelled, why_missing
from planrt.fl.exchange import Outcome, RoundOrder
from planrt.fl.options import whole
from planrt.fl.waiting import Deadline
from planrt.plans.model_state import ModelState
from planrt.serde.frames import Allocate
from planrt.sharing.secure_sum import encoding
from planrt.sharing.secure_sum.coordinator import Coordinator
from planrt.sharing.secure_sum.group import check_threshold, default_threshold
from planrt.sharing.secure_sum.keys import PublicKeys
from planrt.sharing.secure_sum.member import Revealed
from planrt.types import TensorSpec
from planrt.workers.base import BaseWorker
from planrt.workers.results import FitResult
from planrt.workers.wire import masked_fits
from planrt.workers.wire import messages as m

A = TypeVar("A", bound=m.Message)

STEP_SHARE: Final = 4
"""Each of the short steps (keys, shares, signatures, and what uncovers the sum) may take the round's time-out over
this. The last ones may take so long after the time-out: workers that were late have used it up."""

MASKED: Final = "masked"
"""The name under which the `FitResult` of such a round has its one entry."""


@dataclass(frozen=True, slots=True)
class SecureAggregation:
    """Options of secure rounds: ``RoundScheduler(..., secure_aggregation=SecureAggregation(threshold=2))``.

    Attributes:
        threshold: workers that must stay from the beginning of a round to its end. It is more than half of all, or a
            server that tells two halves different things could uncover single models. By default it is the scheduler's
            `min_workers`, and without these two thirds of the workers and one more, which holds even where up to a
            third of the workers help the server.
        scale_bits: fractions travel as multiples of 2**-scale_bits, so the average is off by at most half of that.
            More bits are finer, and leave less room: values times samples times workers stay under 2**(63 -
            scale_bits).

    Raises:
        OptionError: a threshold under 2, or `scale_bits` outside of 0 to 48.
    """

    threshold: int | None = None
    scale_bits: int = encoding.DEFAULT_SCALE_BITS

    def __post_init__(self) -> None:
        if self.threshold is not None:
            whole("threshold", self.threshold, at_least=2)
        encoding.check_scale_bits(self.scale_bits)


def secure_options(given: Any) -> SecureAggregation | None:
    """Returns what `secure_aggregation` of a scheduler says; None for rounds that are not secure.

    Raises:
        OptionError: it is neither True nor False nor a `SecureAggregation`.
    """
    if given is None or given is False:
        return None
    if given is True:
        return SecureAggregation()
    if not isinstance(given, SecureAggregation):
        raise OptionError(
            "secure_aggregation is True, or SecureAggregation(threshold=...), not "
            f"{type(given).__name__}: {str(given)[:80]}"
        )
    return given


class SecureExchange:
    """The exchange of secure rounds: workers are asked for masked models, and for what uncovers their sum.

    `workers` is how many the scheduler has. With `min_workers` of None, all must take part to the end; else at least so
    many.

    Raises:
        OptionError: too few or too many workers, or a threshold that is not more than half of them.
    """

    def __init__(self, options: SecureAggregation, *, workers: int, min_workers: int | None) -> None:
        self.scale_bits = options.scale_bits
        self.threshold = options.threshold or min_workers or default_threshold(workers)
        check_threshold(workers, self.threshold)
        if min_workers is not None and min_workers < self.threshold:
            raise OptionError(
                f"min_workers={min_workers} is under the threshold of the secure aggregation, {self.threshold}: rounds "
                "with fewer have no result"
            )
        self._all_needed = min_workers is None
        self._coordinator: Coordinator | None = None
        self._workers: dict[str, BaseWorker] = {}
        self._owed: dict[str, asyncio.Task[Any]] = {}
        """Workers that have not answered a short step of an earlier round."""

    def __repr__(self) -> str:
        return f"SecureExchange of threshold {self.threshold}, {self.scale_bits} bits"

    # -------------------------------------------------------------------------------------- the exchange

    async def begin(self, order: RoundOrder, workers: Sequence[BaseWorker]) -> Mapping[str, Missing]:
        """Has the workers exchange keys, and shares of what their masks come from.

        Raises:
            OptionError: single states were asked for. QuorumError: fewer workers than the threshold answer.
            AggregationError: an owner wants more workers in a sum than there are.
        """
        if order.copies:
            raise OptionError("keep_worker_states=True: in a secure aggregation nobody sees single states")
        missing = {
            worker.id: Missing("busy", "it has not answered in an earlier round yet")
            for worker in workers
            if worker.id in self._owed
        }
        ids = [worker.id for worker in workers if worker.id not in missing]
        if len(ids) < self.threshold:
            raise below_quorum(f"round {order.number}", missing, ids, self.threshold)
        self._workers = {worker.id: worker for worker in workers}
        coordinator = self._coordinator = Coordinator(secrets.token_hex(16), ids, threshold=self.threshold)

        def joined(id: str, keys: m.SumKeys) -> None:
            coordinator.joined(id, PublicKeys(keys.seal, keys.mask, keys.least, keys.signature))

        def shared(id: str, answer: m.SecretsShared) -> None:
            coordinator.shared(id, answer.sealed)

        join, strict = m.JoinSum(coordinator.id), self._all_needed
        await self._step(order, m.SumKeys, join, ids, missing, joined, strict=strict)
        group = coordinator.group()
        keys = {name: (one.seal, one.mask, one.least) for name, one in group.keys.items()}
        signatures = {name: one.signature for name, one in group.keys.items() if one.signature}
        told = m.ShareSecrets(coordinator.id, self.threshold, keys, signatures)
        await self._step(order, m.SecretsShared, told, group.names, missing, shared, strict=strict)
        coordinator.sharers()
        return missing

    async def ask(self, worker: BaseWorker, order: RoundOrder, allocate: Allocate[m.Envelope]) -> FitResult:
        """Has `worker` train. What it answers has one entry, its masked model, and no figures of its own."""
        plan = order.plans.training
        await worker.workplace.put_plan(plan, purpose=order.config.purpose)
        sealed = self._now.sealed_for(worker.id)
        body = self._request(order, seed=order.seed_of(worker), sealed=sealed)
        _, tensors = await worker.ask(
            m.Masked, body, list(order.before.values()), plan=plan, allocate=allocate
        )
        if len(tensors) != 1:
            raise UpdateRefusedError(
                f"it answered with {len(tensors)} tensors, not with one masked model", worker_id=worker.id
            )
        return FitResult(worker.id, math.nan, 0, 0, ModelState({}, rest={}), {MASKED: tensors[0]})

    async def add(self, worker: BaseWorker, order: RoundOrder, result: FitResult) -> None:
        """Adds a masked model to the sum.

        Raises:
            UpdateRefusedError: it is no vector of the right length.
        """
        vector, length = result.entries[MASKED], encoding.length(_specs(order))
        if vector.dtype != torch.int64 or vector.shape != (length,):
            raise UpdateRefusedError(
                f"its masked model is {TensorSpec.of(vector)}, not int64[{length}]", worker_id=worker.id
            )
        if order.large:
            await asyncio.to_thread(self._now.masked, worker.id, vector)
        else:
            self._now.masked(worker.id, vector)

    async def end(self, order: RoundOrder, answered: Sequence[str]) -> Outcome:
        """Asks those who answered for what uncovers the sum, and returns the mean of their models and losses.

        Raises:
            QuorumError: fewer workers than the threshold are left. AggregationError: what came out is no sum, or an
            owner wants more workers in it.
        """
        coordinator = self._now
        survivors = coordinator.survivors()

        def signed(id: str, answer: m.SurvivorsSigned) -> None:
            coordinator.signed(id, answer.signature)

        missing: dict[str, Missing] = {}
        if coordinator.signs:
            list_of_all = m.SignSurvivors(coordinator.id, survivors)
            await self._step(order, m.SurvivorsSigned, list_of_all, survivors, missing, signed, strict=False)
        asked = m.RevealShares(coordinator.id, survivors, coordinator.signatures())

        def revealed(id: str, answer: m.Revealed) -> None:
            coordinator.revealed(id, Revealed(answer.seeds, answer.keys))

        await self._step(
            order, m.Revealed, asked, coordinator.revealers(), missing, revealed, strict=False,
            enough=lambda: coordinator.enough,
        )  # fmt: skip
        sums = await asyncio.to_thread(self._uncovered, order) if order.large else self._uncovered(order)
        self._coordinator = None
        changed = dict(zip(order.wanted, sums.entries, strict=True)) if sums.weight else {}
        for name, value in changed.items():
            if (places := encoding.constant(order.before[name])) is not None:
                value[places.places] = places.values
        return Outcome(changed, sums.loss)

    # --------------------------------------------------------------------------------------------- parts

    @property
    def _now(self) -> Coordinator:
        assert self._coordinator is not None  # noqa: S101 - a round has begun
        return self._coordinator

    def _request(self, order: RoundOrder, *, seed: int, sealed: dict[str, bytes]) -> m.FitMasked:
        fit = order.config.fit_message(
            order.plans.training, dataset_key=order.dataset_key, seed=seed, lr=order.lr
        )
        return m.FitMasked(self._now.id, fit, sealed, order.weighted, self.scale_bits)

    def _uncovered(self, order: RoundOrder) -> encoding.Sums:
        asked = self._request(order, seed=0, sealed={})
        total = self._now.total(masked_fits.context(asked, list(order.before.values())))
        members = len(self._now.survivors())
        return encoding.decode(total, _specs(order), members=members, scale_bits=self.scale_bits)

    async def _step(
        self,
        order: RoundOrder,
        kind: type[A],
        body: m.Body,
        ids: Sequence[str],
        missing: dict[str, Missing],
        take: Callable[[str, A], None],
        *,
        strict: bool,
        enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Asks the workers `ids` at once, until there are `enough` or time is over, and hands answers to `take`.

        Adds those who do not answer to `missing`; where it is `strict`, raises what the first of them failed with.

        Raises:
            QuorumError: fewer than the threshold answer.
        """
        seconds = order.deadline.seconds
        seconds = None if seconds is None else seconds / STEP_SHARE
        limit = Deadline(seconds)
        waiting = {id: order.asks(id, self._workers[id].ask(kind, body)) for id in ids}

        def took(id: str, task: asyncio.Task[tuple[A, list[torch.Tensor]]]) -> None:
            try:
                take(id, task.result()[0])
            except (SharingError, *WORKERS_OWN) as error:
                own = (
                    UpdateRefusedError(str(error), worker_id=id) if isinstance(error, SharingError) else error
                )
                if strict:
                    raise own from error
                missing[id] = why_missing(own)

        try:
            while waiting and not enough():
                done, _ = await asyncio.wait(
                    waiting.values(), timeout=limit.left(), return_when=asyncio.FIRST_COMPLETED
                )
                if not done and limit.left() == 0:
                    break
                for id in [id for id, task in waiting.items() if task in done]:
                    took(id, waiting.pop(id))
        except BaseException:
            await cancelled(list(waiting.values()))
            raise
        if enough():  # what the others answer, nobody needs
            await cancelled(list(waiting.values()))
            return
        for id, task in waiting.items():
            missing[id] = Missing("late", f"no answer within {limit.seconds or 0:g} s")
            self._owe(id, task)
        left = [id for id in ids if id not in missing]
        if len(left) < self.threshold:
            raise below_quorum(f"round {order.number}", missing, left, self.threshold)

    def _owe(self, id: str, task: asyncio.Task[Any]) -> None:
        """Notes that a worker has not answered: it is not asked for another aggregation before it has."""

        def arrived(task: asyncio.Task[Any]) -> None:
            if not task.cancelled():
                task.exception()
            if self._owed.get(id) is task:
                del self._owed[id]

        self._owed[id] = task
        task.add_done_callback(arrived)


def _specs(order: RoundOrder) -> list[TensorSpec]:
    return [TensorSpec.of(value) for value in order.wanted.values()]
