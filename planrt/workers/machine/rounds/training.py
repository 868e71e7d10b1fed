"""What a worker does with its data sets: trains and evaluates plans on them. No sockets, no loop.

The requests of rounds. Apart from `planrt.workers.machine.state`, since they are a world of their own: they need no
other worker, the state comes with each message or is held as objects of the session, and plans are known by their
hashes to all sessions.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from planrt.errors import DataError, LocalError, OptionError, PlanError, PolicyError
from planrt.logs import get_logger
from planrt.plans import optimizer_states, training
from planrt.plans.ir.constants import Constant
from planrt.plans.ir.graph import Graph
from planrt.plans.ir.record import alone
from planrt.plans.optimizer_options import work_of
from planrt.plans.policy.quotas import PLAN_BYTES, Account
from planrt.plans.running import interpreter
from planrt.plans.training import Batch
from planrt.seeding import derive_seed, seeded
from planrt.serde.dtypes import DTYPE_NAMES, DTYPES
from planrt.serde.frames import Limits
from planrt.serde.tensors import payload_bytes
from planrt.sharing.columns.table import Table
from planrt.sharing.secure_sum import encoding
from planrt.types import Ref, TensorSpec, as_text, leaves
from planrt.workers.machine.access import Access
from planrt.workers.machine.admission import check_failures, failed_on_data
from planrt.workers.machine.events import Answer
from planrt.workers.machine.failures import OpFailedError, failure_on_data
from planrt.workers.machine.gate import Gate
from planrt.workers.machine.objects import KeptObjects
from planrt.workers.machine.rounds.batches import (
    BatchSource,
    as_batches,
    iterate,
    number_of_batches,
    sample_specs,
    smallest_batch,
)
from planrt.workers.machine.rounds.secure_sums import SecureSums
from planrt.workers.machine.rounds.sent_plans import SentPlans, check_size
from planrt.workers.machine.sessions import KeptOptimizer, Session
from planrt.workers.wire import masked_fits
from planrt.workers.wire import messages as m
from planrt.workers.wire.refusals import GetNotPermitted, UnknownDataset

MAX_OPTIMIZERS = 1_000
"""Optimizers whose state a session keeps."""

log = get_logger("planrt.worker")

_NONE: tuple[Constant, ...] = ()
_Draw = Callable[[Iterator[Batch]], Iterator[Batch]]


@dataclass(slots=True)
class _Dataset:
    source: BatchSource
    info: m.DatasetInfo


class TrainingOps:
    """The data sets of one worker, and the plans that run on them."""

    def __init__(
        self,
        worker_id: str,
        device: torch.device,
        gate: Gate | None,
        objects: KeptObjects,
        access: Access,
        sums: SecureSums,
        limits: Limits,
    ) -> None:
        self._sums = sums
        self._access = access
        self._worker_id = worker_id
        self._device = device
        self._gate = gate
        self._objects = objects
        self._datasets: dict[str, _Dataset] = {}
        self._plans, self._limits = SentPlans(limits), limits

    def add_dataset(
        self, dataset: Any, key: str, *, tags: Sequence[str] = (), description: str = ""
    ) -> m.DatasetInfo:
        """Serves a map-style data set of (data, target) pairs under `key`.

        Where the owner has release rules or access tables, and none is about this data set, the log says so: tags and
        keys are easily mistyped.

        Raises:
            DataError: no map-style data set, or its items are no pairs of tensors or numbers.
            OptionError: the key is no string, empty, or taken.
        """
        key, tags, description = as_text(key, "key"), _tags(tags), as_text(description, "description")
        if not key:
            raise OptionError("a data set needs a key that clients ask for it by, and this one is empty")
        if key in self._datasets:
            raise OptionError(f"worker {self._worker_id!r} already has a data set under the key {key!r}")
        source = as_batches(dataset, key=key)
        data, target = (_spec_to_wire(spec) for spec in sample_specs(source, key=key))
        info = m.DatasetInfo(len(source), data, target, list(tags), description)
        self._datasets[key] = _Dataset(source, info)
        if self._gate is not None and (told := self._gate.without_rule(tags)):
            log.warning("no_release_rule", worker=self._worker_id, data=key, **told)
        if told := self._access.without_table(key):
            log.warning("no_access_table", worker=self._worker_id, data=key, **told)
        return info

    def read_items(self) -> None:
        """Reads an item of each data set again.

        Raises:
            DataError: it cannot be read.
        """
        for key, dataset in self._datasets.items():
            sample_specs(dataset.source, key=key)

    def remove_dataset(self, key: str) -> None:
        """Serves the data set `key` no longer.

        Raises:
            OptionError: there is none under that key.
        """
        if self._datasets.pop(key, None) is None:
            keys = ", ".join(sorted(self._datasets)) or "none"
            raise OptionError(
                f"worker {self._worker_id!r} has no data set under the key {key!r}; it has: {keys}"
            )

    @property
    def datasets(self) -> Mapping[str, m.DatasetInfo]:
        """key -> what clients are told about the data set."""
        return {key: dataset.info for key, dataset in self._datasets.items()}

    def seen_by(self, user: str | None) -> dict[str, m.DatasetInfo]:
        """key -> what a client of that user is told about the data set."""
        return {key: info for key, info in self.datasets.items() if self._access.sees(user, key)}

    def put_plan(self, session: Session, body: m.PutPlan, tensors: list[torch.Tensor]) -> Answer:
        """Keeps a plan that a client sends.

        Raises:
            PlanError: it is too long, or another one than its hash says. PolicyError: its user may keep no more.
        """
        if len(tensors) != 1 or tensors[0].dtype != torch.uint8:
            raise PlanError("a plan travels as one uint8 tensor: its canonical bytes, or a record of it")
        check_size(tensors[0], self._plans.longest)
        account = self._objects.store.account_of(session.id)
        data = tensors[0].numpy().tobytes()
        if account is not None:
            account.check(beside=len(data) * PLAN_BYTES)  # before its ops take so much
        plan = _decoded(data)
        if plan.hash != body.plan:
            raise PlanError(f"the plan's bytes have the hash {plan.hash}, not {body.plan} as announced")
        if self._gate is not None:
            session.asks_for(self._gate.approving.arrived([plan], data, None, session.user, body.purpose))
            session.purposes[plan.hash] = body.purpose
            while len(session.purposes) > self._limits.round_plans:
                del session.purposes[next(iter(session.purposes))]
        self._plans.add(plan, len(data), account)
        return m.Done(), ()

    def give_way(self, account: Account) -> bool:
        """Lets a plan go that a user's rounds have sent, the one used longest ago; returns whether there was one."""
        return self._plans.give_way(account)

    def run_plan(self, session: Session, body: m.RunPlan, tensors: list[torch.Tensor]) -> Answer:
        """Runs a plan once, on tensors that came with the message."""
        plan, constants = self._plans.find(body.plan), _NONE
        inputs, state = tensors[: len(plan.inputs)], tensors[len(plan.inputs) :]
        deadline = math.inf
        if self._gate is not None:
            interpreter.check_inputs(plan, inputs)
            constants = self._asked(self._gate, session, plan, state)
            report = self._gate.admit(plan, [TensorSpec.of(tensor) for tensor in inputs], constants=constants)
            self._objects.store.spend(session.id, f"plan {plan.name!r}", report.totals.flops)
            deadline = self._gate.deadline()
        with seeded(body.seed, self._device):
            outputs = interpreter.execute(plan, inputs, state, device=self._device, deadline=deadline)
        self._objects.audit.ran(session, "run", plan, constants)
        wanted = leaves(plan.outputs)
        values = [value for value, leaf in zip(leaves(outputs), wanted, strict=True) if isinstance(leaf, Ref)]
        numbers = [None if isinstance(value, torch.Tensor) else value for value in values]
        return m.Values(numbers), [value.detach() for value in values if isinstance(value, torch.Tensor)]

    def fit(self, session: Session, body: m.Fit, tensors: list[torch.Tensor]) -> Answer:
        """Trains a model on a data set: one worker's part of a round, or what a client left here."""
        self._sums.check_plain()
        plan = self._plans.find(body.plan)
        result = self._trained(session, plan, body, self._state(session, body, tensors))
        answer = m.Fitted(result.loss, result.samples, result.batches, list(result.changed))
        if not body.objects:
            return answer, result.state
        for index, value in zip(result.changed, result.state, strict=True):
            self._objects.replace_state(session, body.objects[index], value)
        return answer, ()

    def fit_masked(self, session: Session, body: m.FitMasked, tensors: list[torch.Tensor]) -> Answer:
        """Trains as `fit` does, for a secure aggregation: the result is masked before it leaves."""
        member = self._sums.begin(session, body)
        plan = self._plans.find(body.fit.plan)
        context = masked_fits.context(body, tensors)
        constant = [
            encoding.constant(value)
            for entry, value in zip(plan.state, tensors, strict=False)
            if entry.can_change
        ]
        result = self._trained(session, plan, body.fit, tensors, masked=True, workers=1 + len(body.sealed))
        return self._sums.masked(session, member, body, context, plan, result, constant)

    def _trained(
        self, session: Session, plan: Graph, body: m.Fit, state: list[torch.Tensor], *,
        masked: bool = False, **told: Any,
    ) -> training.TrainResult:  # fmt: skip
        """Trains `state`, if the owner lets it, and tells the owner, with the facts `told`. `masked`: nobody sees the
        result."""
        constants, deadline = _NONE, math.inf
        source = self._dataset(session, body.dataset)
        if self._gate is not None:
            constants = self._asked(self._gate, session, plan, state, body.dataset)
            check_failures(self._gate, session)
            flops = self._admit_training(plan, constants, body, len(source))
            self._objects.store.spend(session.id, "training", flops)
            deadline = self._gate.deadline()
        if body.objects:  # what fails half-way leaves them as they were
            state = [
                value.clone() if entry.can_change else value
                for entry, value in zip(plan.state, state, strict=False)
            ]
        batches = iterate(
            source,
            batch_size=body.batch_size,
            max_nr_batches=body.max_nr_batches,
            epochs=body.epochs,
            shuffle=body.shuffle,
            seed=derive_seed(body.seed, "order"),  # not the stream that dropout draws from
            drop_last=body.drop_last,
        )
        key = (body.plan, body.dataset, body.optimizer, body.objects[0] if body.objects else 0)
        kept = session.optimizer_states.get(key) if body.keep_optimizer_state else None
        with self._unseen(session, body) as drawing:
            result = training.train(
                plan,
                state,
                drawing(batches),
                optimizer=body.optimizer,
                optimizer_args=body.optimizer_args,
                optimizer_state=None if kept is None else optimizer_states.copied(kept.state),
                device=self._device,
                seed=body.seed,
                deadline=deadline,
            )
        if body.keep_optimizer_state:
            leaves = not masked and (kept is None or kept.leaves)
            self._keep_optimizer(session, key, KeptOptimizer(result.optimizer_state, leaves))
        self._told(session, "fit", plan, constants, body.dataset, result.samples, result.state, **told)
        return result

    def _keep_optimizer(self, session: Session, key: tuple[str, str, str, int], kept: KeptOptimizer) -> None:
        self._objects.forget_optimizers(session)
        if key not in session.optimizer_states and len(session.optimizer_states) >= MAX_OPTIMIZERS:
            raise LocalError(
                f"the session keeps {MAX_OPTIMIZERS:,} optimizers' states, as many as it may: train without "
                "keep_optimizer_state=True, or in another session"
            )
        self._objects.store.keep(session.id, optimizer_states.tensors_in(kept.state))
        session.optimizer_states[key] = kept

    def read_optimizer(self, session: Session, body: m.ReadOptimizer) -> Answer:
        """Gives away what an optimizer keeps. It is made of the gradients that updates are made of, so it leaves where
        these left, and nowhere else."""
        self._sums.check_plain()
        self._dataset(session, body.dataset)
        kept = session.optimizer_states.get((body.plan, body.dataset, body.optimizer, 0))
        if kept is None or kept.state is None:
            return m.OptimizerState(None), ()
        if not kept.leaves:
            raise GetNotPermitted(
                f"what the optimizer keeps on worker {self._worker_id!r} comes from updates that were masked, and "
                "would uncover them"
            )
        values, tensors = optimizer_states.packed(kept.state)
        self._told(session, "read_optimizer", self._plans.find(body.plan), _NONE, body.dataset, None, tensors)
        return m.OptimizerState([m.OptimizerValue(*one) for one in values]), tensors

    def put_optimizer(self, session: Session, body: m.PutOptimizer, tensors: list[torch.Tensor]) -> Answer:
        """Keeps what an optimizer kept in an earlier session."""
        plan = self._plans.find(body.plan)
        self._dataset(session, body.dataset)
        values = [(one.parameter, one.name, one.value) for one in body.values]
        state = optimizer_states.unpacked(
            values, tensors, parameters=sum(entry.trainable for entry in plan.state)
        )
        key = (body.plan, body.dataset, body.optimizer, 0)
        self._keep_optimizer(session, key, KeptOptimizer(state, leaves=True))
        return m.Done(), ()

    def _asked(
        self, gate: Gate, session: Session, plan: Graph, state: Sequence[torch.Tensor], *data: str
    ) -> tuple[Constant, ...]:
        """The plan's constants, once its owner has been asked for it."""
        interpreter.check_state(plan, state)
        constants = gate.approving.constants(plan, state)
        session.asks_for(
            [gate.approving.asked(plan, constants, session.user, data, session.purposes.get(plan.hash, ""))]
        )
        return constants

    def _admit_training(self, plan: Graph, constants: Sequence[Constant], body: m.Fit, items: int) -> float:
        assert self._gate is not None  # noqa: S101 - the caller has looked
        smallest = smallest_batch(
            items, body.batch_size, body.max_nr_batches, body.epochs, drop_last=body.drop_last
        )
        specs = self._batch_specs(body.dataset, min(body.batch_size, items))
        try:
            tags = self._datasets[body.dataset].info.tags
            batches = number_of_batches(
                items, body.batch_size, body.max_nr_batches, body.epochs, drop_last=body.drop_last
            )
            passes, kept = work_of(body.optimizer, body.optimizer_args, batches)
            return self._gate.admit_training(
                plan, specs, tags, smallest, constants=constants, passes=passes, kept=kept
            )
        except PolicyError as error:
            if error.rule != "release" or not 0 < smallest < min(body.batch_size, items):
                raise
            raise PolicyError(
                f"{error}: TrainConfig(drop_last=True) leaves short last batches out", rule=error.rule, op=error.op,
                index=error.index, line=error.line,
            ) from None  # fmt: skip

    def _state(
        self, session: Session, body: m.Fit | m.Evaluate, tensors: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        if body.objects and tensors:
            raise LocalError("the state of a plan comes as tensors or as objects, not as both")
        return self._objects.state(session, body.objects) if body.objects else tensors

    def evaluate(self, session: Session, body: m.Evaluate, tensors: list[torch.Tensor]) -> Answer:
        """Evaluates a model on a data set."""
        plan, constants = self._plans.find(body.plan), _NONE
        source, deadline = self._dataset(session, body.dataset), math.inf
        state = self._state(session, body, tensors)
        if self._gate is not None:
            constants = self._asked(self._gate, session, plan, state, body.dataset)
            check_failures(self._gate, session)
            smallest = smallest_batch(len(source), body.batch_size)
            specs = self._batch_specs(body.dataset, min(body.batch_size, len(source)))
            tags = self._datasets[body.dataset].info.tags
            flops = self._gate.admit_evaluation(
                plan, specs, tags, smallest, len(source), bins=body.bins, constants=constants,
                passes=number_of_batches(len(source), body.batch_size),
            )  # fmt: skip
            self._objects.store.spend(session.id, "evaluating", flops)
            deadline = self._gate.deadline()
        batches = iterate(source, batch_size=body.batch_size, shuffle=False, seed=0)
        with self._unseen(session, body) as drawing:
            result = training.evaluate(
                plan, state, drawing(batches), bins=body.bins, device=self._device, deadline=deadline
            )
        self._told(session, "evaluate", plan, constants, body.dataset, result.samples)
        if result.correct is None or self._counts_leave(body.dataset, result):
            return m.Evaluated(
                result.loss, result.samples, result.correct, result.histogram, result.target_histogram
            ), ()
        return m.Evaluated(result.loss, result.samples, None, None, None), ()

    def _told(
        self, session: Session, event: str, plan: Graph, constants: Sequence[Constant], key: str, rows: int | None,
        state: Sequence[torch.Tensor] = (), **more: Any,
    ) -> None:  # fmt: skip
        """The owner's log has a run on a data set."""
        released = self._gate is not None and self._gate.covers(self._datasets[key].info.tags)
        self._objects.audit.ran(
            session, event, plan, constants, data=[key], rows=rows, released=released,
            bytes=payload_bytes(state), **more,
        )  # fmt: skip

    def _counts_leave(self, key: str, result: training.EvaluationResult) -> bool:
        """Whether the owner's rules let all counts of an evaluation out; together, as one is the rest of the others."""
        if self._gate is None:
            return True
        correct, samples = result.correct or 0, result.samples
        counts = [correct, samples - correct]
        for histogram in (result.histogram or [], result.target_histogram or []):
            counts += [*histogram, samples - sum(histogram)]
        return self._gate.counts_leave(self._datasets[key].info.tags, counts)

    @contextmanager
    def _unseen(self, session: Session, body: m.Fit | m.Evaluate) -> Iterator[_Draw]:
        """For a run on a data set; returns what its batches are to be drawn through.

        Where there is a policy, a client is not told why the run failed once data has been asked for: neither torch's
        words nor those of the owner's data set. What fails before, as unknown options do, is about the request alone.
        """
        drawn = False

        def drawing(batches: Iterator[Batch]) -> Iterator[Batch]:
            nonlocal drawn
            drawn = True
            yield from batches

        try:
            yield drawing
        except Exception as error:
            if self._gate is None or not drawn:
                raise
            failed_on_data(self._gate, session, error, plan=body.plan, dataset=body.dataset)
            raise OpFailedError(failure_on_data(error)) from error

    def table(self, session: Session, key: str) -> Table:
        """Returns the table that a session may run joint computations on.

        Raises:
            UnknownDataset: there is none that it sees. DataError: that data set is no table.
        """
        source = self._dataset(session, key)
        if not isinstance(source, Table):
            raise DataError(
                f"{self._worker_id}: data set {key!r} is no table: its owner serves planrt.vertical.Table(...), or a "
                "file with --dataset table.csv --id-column"
            )
        return source

    def tags(self, key: str) -> Sequence[str]:
        """Returns the tags of a data set."""
        return self._datasets[key].info.tags

    def plan(self, hash: str) -> Graph:
        """Returns a plan that was sent.

        Raises:
            UnknownPlan: it is not here.
        """
        return self._plans.find(hash)

    def _batch_specs(self, key: str, rows: int) -> list[TensorSpec]:
        info = self._datasets[key].info
        return [TensorSpec((rows, *sizes[1:]), DTYPES[dtype]) for dtype, sizes in (info.data, info.target)]

    def _dataset(self, session: Session, key: str) -> BatchSource:
        """The data set that a session's run is on. One that it may not see is not there for it."""
        seen = self.seen_by(session.user)
        if key not in seen:
            raise UnknownDataset(
                f"no data set under the key {key!r}; it has: {', '.join(sorted(seen)) or 'none'}"
            )
        self._access.check_run(session.user, key)
        return self._datasets[key].source


def _tags(tags: Sequence[str]) -> list[str]:
    if isinstance(tags, str):
        raise OptionError(f"tags is a list of strings: write tags=[{tags!r}]")
    return [as_text(tag, "a tag") for tag in tags]


_plans_by_hash: weakref.WeakValueDictionary[str, Graph] = weakref.WeakValueDictionary()
"""Plans that some worker of this process holds. Plans are immutable: a thousand virtual workers share one."""


def _decoded(data: bytes) -> Graph:
    key = hashlib.sha256(data).hexdigest()
    plan = _plans_by_hash.get(key)
    if plan is None:
        plan = _plans_by_hash[key] = alone(data)
    return plan


def _spec_to_wire(spec: TensorSpec) -> tuple[str, list[int]]:
    return DTYPE_NAMES[spec.dtype], list(spec.shape)
