"""`ModelEvaluator`: figures of a model on one worker's data set."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from planrt.fl.config import TrainConfig
from planrt.fl.options import whole
from planrt.loop import on_loop
from planrt.plans.training import EvaluationResult
from planrt.shown import shown
from planrt.workers.base import BaseWorker


class ModelEvaluator:
    """Evaluates states of `config`'s model on one worker's data set.

    `bins` is the number of classes to count predictions in (0 for outputs that are no class scores).
    """

    def __init__(
        self, worker: BaseWorker, config: TrainConfig, *, dataset_key: str, batch_size: int, bins: int = 10
    ) -> None:
        self.worker = worker
        self.config = config
        self.dataset_key = dataset_key
        self.batch_size = whole("the test batch size", batch_size, at_least=1)
        self.bins = whole("bins", bins, at_least=0)

    def __repr__(self) -> str:
        return (
            f"<ModelEvaluator of {self.config!r} on {shown(self.worker.id)}: data set {self.dataset_key!r}>"
        )

    @on_loop
    async def prepare(self) -> None:
        """Traces the plan if it is not yet, and sends it to the worker, once."""
        plan = self.config.trace_for(self.worker, self.dataset_key).evaluation
        await self.worker.workplace.put_plan(plan, purpose=self.config.purpose)

    @on_loop
    async def evaluate(self, state: Mapping[str, torch.Tensor]) -> EvaluationResult:
        """Evaluates `state` by one request and one reply, and returns the figures."""
        return await self.config.evaluate(
            self.worker, state, dataset_key=self.dataset_key, batch_size=self.batch_size, bins=self.bins
        )
