"""What `TrainConfig.send` leaves on a worker: the model, which `worker.fit` trains on and on, there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from planrt.errors import LocalError, OptionError, RemoteError
from planrt.fl.averaging import copied
from planrt.fl.options import flag, whole
from planrt.fl.recording_cache import casting_hint, check_here, dataset_of, example_batch, recorded
from planrt.plans.fingerprint import fingerprint
from planrt.plans.ir.graph import Graph
from planrt.plans.model_plans import ModelPlans
from planrt.plans.training import EvaluationResult
from planrt.seeding import derive_seed
from planrt.workers.base import BaseWorker
from planrt.workers.pointers.fetching import fetch_all, fetch_all_async
from planrt.workers.pointers.handle import alive
from planrt.workers.pointers.tensor import PointerTensor, make_pointer
from planrt.workers.results import FitResult
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import contiguous, new_id

if TYPE_CHECKING:
    from planrt.fl.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Sent:
    """A model or a loss, as `obj`, that a pointer of a `TrainConfig` brought back."""

    obj: Any
    id: int


class SentJob:
    """A `TrainConfig` on one worker, as it was sent: changes of the config or of the model here do not reach
    it.

    The worker holds the model's state, each tensor as an object of this session. `fit` trains these where
    they are; only figures come back.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.id = new_id()
        self.config = copy.copy(config)
        self._model = config.model
        self._loss_fn = config.loss_fn
        self._batch_size = config.batch_size
        self._options = config.fit_options()
        self._purpose = config.purpose
        self._fingerprint = None if self._model is None else fingerprint(self._model, self._loss_fn)
        self._plans: ModelPlans | None = (
            config.plans if config.is_traced and config.model is not None else None
        )
        self._there: dict[str, PointerTensor] = {}
        """By key of the model's state_dict at first, by entry of the plans once these are known."""
        self._keep_optimizer = config.keep_optimizer_state is not False
        self._counts_classes: bool | None = None
        self.fits = 0
        self.taken = False

    async def put(self, worker: BaseWorker) -> None:
        """Puts the model's state on the worker, each tensor once."""
        if self._model is None:
            return
        check_here(self._model)
        if self._plans is not None:
            await self._put(worker, dict(self._plans.names.entries))
            return
        saved = _saved(self._model)
        first = {id(tensor): key for key, tensor in reversed(saved.items())}
        await self._put(worker, {key: saved[key] for key in reversed(first.values())})

    async def _put(self, worker: BaseWorker, tensors: dict[str, torch.Tensor]) -> None:
        values = [tensor.detach() for tensor in tensors.values()]
        handles = await worker.workplace.objects.put_async(values)
        for name, value, handle in zip(tensors, values, handles, strict=True):
            self._there[name] = make_pointer(handle, contiguous(value))

    async def _ready(self, worker: BaseWorker, dataset_key: str) -> ModelPlans:
        """The plans, recorded at the first use, when it is known what the data looks like."""
        if self._model is None or self._loss_fn is None:
            raise LocalError("this TrainConfig has no model or no loss: TrainConfig(model=..., loss_fn=...)")
        if self.taken:
            raise LocalError(
                f"the model on worker {worker.id!r} was taken back by model_ptr.get(): send the TrainConfig again"
            )
        if self._plans is None:
            if fingerprint(self._model, self._loss_fn) != self._fingerprint:
                raise LocalError(
                    f"the model was changed after it was sent to worker {worker.id!r}: send the TrainConfig again"
                )
            example = example_batch(dataset_of(worker, dataset_key))
            with casting_hint(self._model, example[0], dataset_key):
                plans = recorded(self._model, self._loss_fn, *example)
            names, by_key = plans.names, dict(self._there)
            self._there = {name: by_key[key] for key, name in names.keys.items() if key in by_key}
            rest = {name: value for name, value in names.entries.items() if name not in self._there}
            await self._put(worker, rest)
            self._plans = plans
        return self._plans

    def _objects(self, plan: Graph) -> list[int]:
        return [alive(self._there[entry.name]).id for entry in plan.state]

    async def fit_on(self, worker: BaseWorker, dataset_key: str, *, seed: int) -> FitResult:
        """Trains the model on `worker`, from where the last fit left it."""
        plans = await self._ready(worker, dataset_key)
        await worker.workplace.put_plan(plans.training, purpose=self._purpose)
        body = m.Fit(
            plan=plans.training.hash,
            dataset=dataset_key,
            keep_optimizer_state=self._keep_optimizer,
            seed=derive_seed(seed, self.fits + 1, worker.id),
            objects=self._objects(plans.training),
            **self._options,
        )
        fitted, _ = await worker.ask(m.Fitted, body, plan=plans.training)
        self.fits += 1
        return FitResult(
            worker.id, fitted.loss, fitted.samples, fitted.batches, plans.names.keyed({}), entries={}
        )

    async def evaluate_on(self, worker: BaseWorker, dataset_key: str, **options: Any) -> EvaluationResult:
        """Evaluates the model as it is on `worker` now; `options` as of `BaseWorker.evaluate`."""
        return await self._evaluate(worker, dataset_key, **options)

    async def _evaluate(
        self,
        worker: BaseWorker,
        dataset_key: str,
        *,
        bins: int,
        return_histograms: bool,
        nr_bins: int,
        return_loss: bool,
        return_raw_accuracy: bool,
    ) -> EvaluationResult:
        plans = await self._ready(worker, dataset_key)
        bins, nr_bins = whole("bins", bins, at_least=0), whole("nr_bins", nr_bins, at_least=-1)
        return_histograms = flag("return_histograms", return_histograms)
        return_loss, return_raw_accuracy = (
            flag("return_loss", return_loss), flag("return_raw_accuracy", return_raw_accuracy),
        )  # fmt: skip
        if return_histograms and max(bins, nr_bins) < 1:
            raise OptionError("return_histograms needs the number of classes: nr_bins=10")
        counted = max(bins, nr_bins) if return_histograms or bins else 0
        await worker.workplace.put_plan(plans.evaluation, purpose=self._purpose)

        async def figures(classes: int) -> EvaluationResult:
            body = m.Evaluate(
                plans.evaluation.hash,
                dataset_key,
                self._batch_size,
                classes,
                objects=self._objects(plans.evaluation),
            )
            answer, _ = await worker.ask(m.Evaluated, body, plan=plans.evaluation)
            return evaluated(answer, bins=counted)

        if counted or not return_raw_accuracy or self._counts_classes is False:
            result = await figures(counted)
        else:  # right answers are counted if there are classes; which is seen by trying
            try:
                result, self._counts_classes = await figures(1), True
            except RemoteError as error:
                if error.kind != "PlanArgumentError" or "no classes to count" not in error.reason:
                    raise
                result, self._counts_classes = await figures(0), False
        if not counted:
            result = replace(result, histogram=None, target_histogram=None)
        hidden = set() if return_loss else {"loss"}
        if not return_raw_accuracy:
            hidden |= {"nr_correct_predictions", "nr_predictions"}
        return replace(result, hidden=frozenset(hidden))

    def model(self, values: list[torch.Tensor]) -> nn.Module:
        """Returns a copy of the model with what was fetched."""
        assert self._model is not None  # noqa: S101 - there is a pointer to it
        self.taken = True
        model = copied(self._model)
        found = dict(zip(self._there, values, strict=True))
        if self._plans is not None:
            names = self._plans.names
            names.write(model, names.named(found))
            return model
        saved = _saved(model)
        with torch.no_grad():
            for key, value in found.items():
                saved[key].copy_(value)
        return model

    @property
    def pointers(self) -> list[PointerTensor]:
        """To the tensors of the model's state."""
        return list(self._there.values())


def _saved(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        key: value
        for key, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }


def evaluated(figures: m.Evaluated, *, bins: int = 0) -> EvaluationResult:
    """Makes a result of a worker's answer. With `bins`, counts were asked for, and it warns where there are
    none."""
    if bins and figures.correct is None:
        warnings.warn(
            "the worker's owner lets counts out only where each is of enough rows (min_rows), and here one is not: "
            "there is the loss, and no number of right predictions and no histogram",
            UserWarning,
            stacklevel=2,
        )
    return EvaluationResult(
        loss=figures.loss,
        samples=figures.samples,
        correct=figures.correct,
        histogram=figures.histogram,
        target_histogram=figures.target_histogram,
    )


class ModelPointer:
    """The model that `TrainConfig.send` put on a worker. ``get().obj`` is the model as it is there now."""

    def __init__(self, job: SentJob, location: BaseWorker) -> None:
        self._job = job
        self.location = location
        self.id_at_location = job.id

    def get(self) -> Sent:
        """Brings the model back, as `obj`: a copy of the one that was sent, with the state from the worker,
        which keeps nothing.

        Raises:
            LocalError: it was taken back already. WorkerLostError, RemoteError: see `PointerTensor.get`.
        """
        self._check()
        return Sent(self._job.model(fetch_all(self._job.pointers)), self.id_at_location)

    async def async_get(self) -> Sent:
        """`get`, to be awaited on any loop."""
        self._check()
        return Sent(self._job.model(await fetch_all_async(self._job.pointers)), self.id_at_location)

    def _check(self) -> None:
        if self._job.taken:
            raise LocalError(
                f"the model on worker {self.location.id!r} was taken back already: send the TrainConfig again"
            )

    def __repr__(self) -> str:
        return f"<ModelPointer me -> {self.location.id}:{self.id_at_location}>"


class LossPointer:
    """The loss of a job. It travels as part of the plan, and is nowhere else than here: `get` returns it."""

    def __init__(self, loss_fn: Callable[..., Any], location: BaseWorker) -> None:
        self._loss_fn = loss_fn
        self.location = location
        self.id_at_location = new_id()

    def get(self) -> Sent:
        """Returns the loss, as `obj`."""
        return Sent(self._loss_fn, self.id_at_location)

    def __repr__(self) -> str:
        return f"<LossPointer me -> {self.location.id}:{self.id_at_location}>"
