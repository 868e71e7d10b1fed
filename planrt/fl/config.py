"""`TrainConfig`: what to train, and how, on a worker's data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from planrt.errors import LocalError, OptionError, UnknownDatasetError
from planrt.fl.recorded import recorded
from planrt.plans.model_state import ModelState
from planrt.plans.training import OPTIMIZERS, EvaluationResult, ModelPlans
from planrt.seeding import derive_seed
from planrt.serde.dtypes import DTYPES
from planrt.serde.frames import Allocate, in_memory
from planrt.workers import messages as m
from planrt.workers.clients import BaseWorker, expect
from planrt.workers.loop import on_loop, run

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(prediction, target) -> 0-d loss, the mean over the batch."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a worker sent back: the trained entries of the state, and how training went.

    `loss` is the mean over the samples seen (nan if there were none). `changed` has the entries by the names of the
    model's `state_dict`, `entries` the same tensors by the names of the plan, each once.
    """

    worker_id: str
    loss: float
    samples: int
    batches: int
    changed: ModelState
    entries: dict[str, torch.Tensor] = field(repr=False)


class TrainConfig:
    """A model, its loss and how to train it.

    `model` is an nn.Module or a `torch.jit.trace`d module; `loss_fn` takes (prediction, target) and gives the
    mean over the batch. `batch_size`, `epochs`, `max_nr_batches` (in all; -1: no bound) and `shuffle` say which
    batches; `optimizer` names a class of torch.optim and `optimizer_args` its arguments. Each round starts a
    fresh optimizer unless `keep_optimizer_state`, which keeps its state on the worker between rounds.

    The plans are traced on `example`, a (data, target) batch, or else on zeros of the shapes that the worker
    announces for its data set; `plans` are used as they are.

    Raises:
        OptionError: a number out of range or an unknown optimizer.
        TraceError: with `example`, a model that cannot be recorded or whose output does not fit the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        *,
        batch_size: int = 32,
        epochs: int = 1,
        optimizer: str = "SGD",
        optimizer_args: Mapping[str, Any] | None = None,
        max_nr_batches: int = -1,
        shuffle: bool = True,
        keep_optimizer_state: bool = False,
        example: tuple[torch.Tensor, torch.Tensor] | None = None,
        plans: ModelPlans | None = None,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("epochs", epochs, 1),
            ("max_nr_batches", max_nr_batches, -1),
        ):
            if value < least:
                raise OptionError(f"{name} must be at least {least}, not {value}")
        if optimizer not in OPTIMIZERS:
            raise OptionError(
                f"unknown optimizer {optimizer!r}: choose one of {', '.join(sorted(OPTIMIZERS))}"
            )
        self.model = model
        self.loss_fn = loss_fn
        self.batch_size = batch_size
        self.epochs = epochs
        self.optimizer = optimizer
        self.optimizer_args = dict(optimizer_args if optimizer_args is not None else {"lr": 0.1})
        self.max_nr_batches = max_nr_batches
        self.shuffle = shuffle
        self.keep_optimizer_state = keep_optimizer_state
        self._given = plans
        self._example = example
        if example is not None:
            _ = self.plans

    @property
    def plans(self) -> ModelPlans:
        """The training and the evaluation plan of the model as it is now.

        Raises:
            LocalError: nothing was traced yet. TraceError: the model was changed, and cannot be recorded any more.
        """
        if self._given is not None:
            return self._given
        if self._example is None:
            raise LocalError(
                "nothing is traced yet: call prepare() of the scheduler or evaluator first, or give TrainConfig an "
                "example=(data, target) batch"
            )
        return recorded(self.model, self.loss_fn, *self._example)

    @property
    def state(self) -> ModelState:
        """The model's state as it is now, as ``model.load_state_dict`` takes it."""
        return self.plans.state

    def trace_for(self, worker: BaseWorker, dataset_key: str) -> ModelPlans:
        """The plans, traced if they are not yet, for the batches of a worker's data set.

        Raises:
            UnknownDatasetError: the worker has none under that key. TraceError: see the class.
        """
        info = dataset_of(worker, dataset_key)
        if self._example is None:
            self._example = example_batch(info)
        return self.plans

    # ------------------------------------------------------------------------------- on a worker

    @on_loop
    async def async_send(self, worker: BaseWorker) -> None:
        """Leaves this job with `worker`, for its `fit` and `evaluate`; sends the plans that are traced."""
        if self._given is not None or self._example is not None:
            await worker.put_plan(self.plans.training)
        worker.train_job = self

    def send(self, worker: BaseWorker) -> None:
        """The blocking form of `async_send`."""
        run(self.async_send(worker), instead="await config.async_send(worker)")

    async def fit_on(self, worker: BaseWorker, dataset_key: str, *, seed: int) -> FitResult:
        """Trains the state as it was traced on `worker`'s data, once."""
        self.trace_for(worker, dataset_key)
        return await self.fit(
            worker, self.state, dataset_key=dataset_key, seed=derive_seed(seed, 1, worker.id)
        )

    async def evaluate_on(self, worker: BaseWorker, dataset_key: str, *, bins: int) -> EvaluationResult:
        """Evaluates the state as it was traced on `worker`'s data."""
        self.trace_for(worker, dataset_key)
        return await self.evaluate(
            worker, self.state, dataset_key=dataset_key, batch_size=self.batch_size, bins=bins
        )

    @on_loop
    async def fit(
        self,
        worker: BaseWorker,
        state: Mapping[str, torch.Tensor],
        *,
        dataset_key: str,
        seed: int,
        lr: float | None = None,
        allocate: Allocate[m.Envelope] = in_memory,
        plans: ModelPlans | None = None,
    ) -> FitResult:
        """One request and one reply: `state` there, training, the trained entries back.

        `plans` are `self.plans`, for callers that looked at the model already.
        """
        plans = plans or self.plans
        plan = plans.training
        await worker.put_plan(plan)
        body = m.Fit(
            plan=plan.hash,
            dataset=dataset_key,
            batch_size=self.batch_size,
            epochs=self.epochs,
            max_nr_batches=self.max_nr_batches,
            shuffle=self.shuffle,
            optimizer=self.optimizer,
            optimizer_args=self.optimizer_args if lr is None else {**self.optimizer_args, "lr": lr},
            keep_optimizer_state=self.keep_optimizer_state,
            seed=seed,
        )
        tensors = list(plans.names.by_entry(state).values())
        reply = await worker.request(body, tensors, plan=plan, allocate=allocate)
        fitted, values = expect(m.Fitted, reply, worker)
        names = [plan.state[index].name for index in fitted.changed]
        entries = dict(zip(names, values, strict=True))
        changed = plans.names.keyed(entries)
        return FitResult(worker.id, fitted.loss, fitted.samples, fitted.batches, changed, entries)

    @on_loop
    async def evaluate(
        self,
        worker: BaseWorker,
        state: Mapping[str, torch.Tensor],
        *,
        dataset_key: str,
        batch_size: int,
        bins: int,
    ) -> EvaluationResult:
        """One request and one reply: `state` there, the figures back."""
        plans = self.plans
        plan = plans.evaluation
        await worker.put_plan(plan)
        body = m.Evaluate(plan.hash, dataset_key, batch_size, bins)
        reply = await worker.request(body, list(plans.names.by_entry(state).values()), plan=plan)
        figures, _ = expect(m.Evaluated, reply, worker)
        return EvaluationResult(
            loss=figures.loss,
            correct=figures.correct,
            samples=figures.samples,
            histogram=figures.histogram,
            target_histogram=figures.target_histogram,
        )


def dataset_of(worker: BaseWorker, key: str) -> m.DatasetInfo:
    """What `worker` says about its data set `key`.

    Raises:
        UnknownDatasetError: it has none under that key.
    """
    info = worker.datasets.get(key)
    if info is None:
        keys = ", ".join(sorted(worker.datasets)) or "none"
        raise UnknownDatasetError(
            f"no data set under the key {key!r}; it has: {keys}",
            worker_id=worker.id,
            kind="UnknownDatasetError",
        )
    return info


def example_batch(info: m.DatasetInfo, size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of `size` zeros with the shapes and dtypes a worker announces: enough to trace on."""
    data, target = (
        torch.zeros([size if extent == -1 else extent for extent in shape], dtype=DTYPES[dtype])
        for dtype, shape in (info.data, info.target)
    )
    return data, target
