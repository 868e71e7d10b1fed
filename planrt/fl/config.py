"""`TrainConfig`: what to train, and how, on a worker's data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from planrt.deadlines import bounded
from planrt.errors import LocalError, OptionError, UpdateRefusedError
from planrt.fl.jobs import LossPointer, ModelPointer, SentJob, evaluated
from planrt.fl.options import flag, learning_rate, optimizer_name, optimizer_options, whole
from planrt.fl.recording_cache import casting_hint, dataset_of, example_batch, recorded
from planrt.loop import on_loop, run
from planrt.plans.forms.torchscript import class_name
from planrt.plans.ir.graph import Graph
from planrt.plans.model_plans import ModelPlans
from planrt.plans.model_state import ModelState
from planrt.plans.training import EvaluationResult
from planrt.serde.frames import Allocate, in_memory
from planrt.workers.base import BaseWorker
from planrt.workers.client.plans import purpose_text
from planrt.workers.results import FitResult
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import new_id

Loss = Callable[..., torch.Tensor]
"""(prediction, target) -> 0-d loss, the mean over the batch; or with parameters called ``pred`` and
``target``."""


class TrainConfig:
    """A model, its loss and how to train it.

    For example, on workers that hold a data set under the key "digits"::

        config = TrainConfig(
            model, F.cross_entropy, batch_size=8, epochs=2, optimizer="SGD", optimizer_args={"lr": 0.05}
        )
        config.send(alice)
        result = alice.fit("digits")                # trains the model there
        model = config.model_ptr.get().obj          # and brings it back

    `RoundScheduler` trains one such config on many workers.

    `model` is an nn.Module, or one from `torch.jit.trace` or `torch.jit.script`. `loss_fn` takes (prediction,
    target) and returns the mean over the batch; if its parameters are named ``pred`` and ``target``, it is
    called by name, in whatever order they stand. `batch_size`, `epochs`, `max_nr_batches` (in all; -1: no
    bound), `shuffle` and `drop_last` (whether to leave out the short last batch of each pass) say which
    batches. `optimizer` is a class of torch.optim or its name, and `optimizer_args` its arguments.

    Each round starts a fresh optimizer unless `keep_optimizer_state`, which keeps its state on the worker
    between rounds. `worker.fit`, which goes on with a model that was sent, keeps it unless that is False.

    The model is followed: after a layer was frozen or added, the next round trains it as it is then. The
    plans are traced on `example`, a (data, target) batch, or else on zeros of the shapes that the worker
    announces for its data set; `plans` are used as they are. `id` and `owner` are what scripts of the 0.2 era
    give, for show. `purpose` says what the training is for, to owners who have to approve its plans.

    Raises:
        OptionError: a number out of range, an unknown optimizer, or arguments it does not accept.
        TraceError: with `example`, a model that cannot be recorded or whose output does not fit the loss.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        loss_fn: Loss | None = None,
        *,
        batch_size: int = 32,
        epochs: int = 1,
        optimizer: str | type[torch.optim.Optimizer] = "SGD",
        optimizer_args: Mapping[str, Any] | None = None,
        max_nr_batches: int = -1,
        shuffle: bool = True,
        drop_last: bool = False,
        keep_optimizer_state: bool | None = None,
        example: tuple[torch.Tensor, torch.Tensor] | None = None,
        plans: ModelPlans | None = None,
        id: int | str | None = None,
        owner: object = None,
        purpose: str = "",
        model_id: object = None,
        loss_fn_id: object = None,
    ) -> None:
        if model_id is not None or loss_fn_id is not None:
            raise OptionError(
                "model_id= and loss_fn_id= are not taken: give the model and the loss, TrainConfig(model=..., "
                "loss_fn=...); send() puts them on the worker"
            )
        if not isinstance(model, nn.Module | None):
            raise OptionError(_no_module(model))
        if loss_fn is not None and not callable(loss_fn):
            raise OptionError(
                f"loss_fn must be a function of (prediction, target), not {type(loss_fn).__name__}"
            )
        self.model = model
        self.loss_fn = loss_fn
        self.batch_size = whole("batch_size", batch_size, at_least=1)
        self.epochs = whole("epochs", epochs, at_least=1)
        self.optimizer = optimizer_name(optimizer)
        self.optimizer_args = optimizer_options(self.optimizer, optimizer_args)
        self.max_nr_batches = whole("max_nr_batches", max_nr_batches, at_least=-1)
        self.shuffle = flag("shuffle", shuffle)
        self.drop_last = flag("drop_last", drop_last)
        self.keep_optimizer_state = (
            None if keep_optimizer_state is None else flag("keep_optimizer_state", keep_optimizer_state)
        )
        self.id = new_id() if id is None else id
        self._owner = owner
        self.purpose = purpose_text(purpose)
        self.model_ptr: ModelPointer | None = None
        """The model on the worker that this was last sent to."""
        self.loss_fn_ptr: LossPointer | None = None
        self._given = plans
        self._example = example
        if example is not None:
            if not isinstance(example, tuple | list) or len(example) != 2:
                raise OptionError(
                    f"example must be a batch (data, target), not a {type(example).__name__}: write example=(x, y)"
                )
            _ = self.plans

    @property
    def owner(self) -> Any:
        """As given, or the worker that stands for this process, once there is a `TorchHook`."""
        return self._owner if self._owner is not None else getattr(torch.empty(0), "owner", None)

    def __repr__(self) -> str:
        parts = [f"id:{self.id}", f"owner:{getattr(self.owner, 'id', 'me')}"]
        if self.model is not None:
            parts.append(f"model: {class_name(self.model)}")
        if self.loss_fn is not None:
            parts.append(f"loss_fn: {getattr(self.loss_fn, '__name__', class_name(self.loss_fn))}")
        if self.optimizer != "SGD":
            parts.append(f"optimizer: {self.optimizer}")
        parts += [f"epochs: {self.epochs}", f"batch_size: {self.batch_size}"]
        return f"<TrainConfig {' '.join(parts)} optimizer_args: {self.optimizer_args}>"

    @property
    def is_traced(self) -> bool:
        """Tells whether the shape of batches is known, so that there are plans."""
        return self._given is not None or self._example is not None

    @property
    def plans(self) -> ModelPlans:
        """The training and the evaluation plan of the model as it is now.

        Raises:
            LocalError: nothing was traced yet. TraceError: the model was changed, and cannot be recorded any
                more.
        """
        if self._given is not None:
            return self._given
        if self._example is None:
            raise LocalError(
                "nothing is traced yet, as it is not known what a batch looks like: await scheduler.prepare() first, "
                "or give TrainConfig an example=(data, target) batch"
            )
        if self.model is None or self.loss_fn is None:
            raise LocalError("this TrainConfig has no model or no loss: TrainConfig(model=..., loss_fn=...)")
        return recorded(self.model, self.loss_fn, *self._example)

    @property
    def state(self) -> ModelState:
        """The model's state as it is now, as ``model.load_state_dict`` takes it.

        Raises:
            LocalError: nothing was traced yet: see `plans`.
        """
        return self.plans.state

    def trace_for(self, worker: BaseWorker, dataset_key: str) -> ModelPlans:
        """Returns the plans, traced if they are not yet, for the batches of a worker's data set.

        Raises:
            UnknownDatasetError: the worker has none under that key. TraceError: see the class.
        """
        info = dataset_of(worker, dataset_key)
        if self._example is None:
            example = example_batch(info)
            with casting_hint(self.model, example[0], dataset_key):
                self._example = example
                try:
                    return self.plans
                except BaseException:
                    self._example = None  # another data set may fit
                    raise
        return self.plans

    def _plans_for(self, worker: BaseWorker, dataset_key: str) -> ModelPlans:
        return self.plans if self.is_traced else self.trace_for(worker, dataset_key)

    def fit_options(self, lr: float | None = None) -> dict[str, Any]:
        """Returns the fields of a `Fit` message that are this config's, with another learning rate if
        given."""
        return {
            "batch_size": self.batch_size,
            "epochs": self.epochs,
            "max_nr_batches": self.max_nr_batches,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "optimizer": self.optimizer,
            "optimizer_args": self.optimizer_args if lr is None else {**self.optimizer_args, "lr": lr},
        }

    def fit_message(self, plan: Graph, *, dataset_key: str, seed: int, lr: float | None) -> m.Fit:
        """Returns the message that has a worker train `plan` as this config says."""
        return m.Fit(
            plan=plan.hash,
            dataset=dataset_key,
            keep_optimizer_state=bool(self.keep_optimizer_state),
            seed=whole("seed", seed, at_least=0),
            **self.fit_options(None if lr is None else learning_rate(lr)),
        )

    # ------------------------------------------------------------------------------- on a worker

    @bounded
    @on_loop
    async def async_send(self, worker: BaseWorker, *, timeout: float | None = None) -> TrainConfig:
        """Puts the model on `worker`, for its `fit` and `evaluate`; `model_ptr` brings it back from there.

        What is there is the config and the model as they are now: later changes here do not reach it.

        Returns:
            This config.

        Raises:
            LocalError: the model is on a worker itself. WorkerLostError.
        """
        if not isinstance(worker, BaseWorker):
            raise LocalError(f"send takes a worker, not {type(worker).__name__}")
        job = SentJob(self)
        await job.put(worker)
        worker.leave_job(job)
        self.model_ptr = None if self.model is None else ModelPointer(job, worker)
        self.loss_fn_ptr = None if self.loss_fn is None else LossPointer(self.loss_fn, worker)
        return self

    @bounded
    def send(self, worker: BaseWorker, *, timeout: float | None = None) -> TrainConfig:
        """Sends the config as `async_send` does, and waits for that."""
        return run(self.async_send(worker), instead="await config.async_send(worker)")

    @bounded
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
        timeout: float | None = None,
    ) -> FitResult:
        """Trains `state` on `worker` by one request and one reply: the state goes there, the trained entries
        come back.

        `plans` are `self.plans`, for callers that looked at the model already.
        """
        plans = plans or self._plans_for(worker, dataset_key)
        plan = plans.training
        await worker.workplace.put_plan(plan, purpose=self.purpose)
        body = self.fit_message(plan, dataset_key=dataset_key, seed=seed, lr=lr)
        tensors = list(plans.names.by_entry(state).values())
        fitted, values = await worker.ask(m.Fitted, body, tensors, plan=plan, allocate=allocate)
        entries = _entries(worker, plan, fitted, values)
        changed = plans.names.keyed(entries)
        return FitResult(worker.id, fitted.loss, fitted.samples, fitted.batches, changed, entries)

    @bounded
    @on_loop
    async def evaluate(
        self,
        worker: BaseWorker,
        state: Mapping[str, torch.Tensor],
        *,
        dataset_key: str,
        batch_size: int,
        bins: int,
        timeout: float | None = None,
    ) -> EvaluationResult:
        """Evaluates `state` on `worker` by one request and one reply: the state goes there, the figures come
        back."""
        plans = self._plans_for(worker, dataset_key)
        plan = plans.evaluation
        await worker.workplace.put_plan(plan, purpose=self.purpose)
        body = m.Evaluate(
            plan.hash,
            dataset_key,
            whole("batch_size", batch_size, at_least=1),
            whole("bins", bins, at_least=0),
        )
        tensors = list(plans.names.by_entry(state).values())
        answer, _ = await worker.ask(m.Evaluated, body, tensors, plan=plan)
        return evaluated(answer, bins=bins)


def _entries(
    worker: BaseWorker, plan: Graph, fitted: m.Fitted, values: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a worker returned, by the names of the plan's state."""
    changed = fitted.changed
    if (
        len(changed) != len(values)
        or len(set(changed)) < len(changed)
        or max(changed, default=0) >= len(plan.state)
    ):
        raise UpdateRefusedError(
            f"its update has {len(values)} tensors for {len(changed)} entries, of {len(plan.state)} that there are",
            worker_id=worker.id,
        )
    return {plan.state[index].name: value for index, value in zip(changed, values, strict=True)}


def _no_module(given: Any) -> str:
    if isinstance(given, type):
        return f"model must be an nn.Module, not the class {given.__name__}: write {given.__name__}()"
    return f"model must be an nn.Module, not {type(given).__name__}"
