"""The functions that scripts of the 0.2 era call round by round: fit, evaluate and average models on workers."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from planrt.fl.averaging import copied, federated_avg
from planrt.fl.config import Loss, TrainConfig
from planrt.logs import get_logger
from planrt.plans.training import EvaluationResult
from planrt.seeding import derive_seed
from planrt.workers.clients import BaseWorker
from planrt.workers.loop import on_loop, run

__all__ = [
    "async_evaluate_model_on_worker",
    "evaluate_model_on_worker",
    "federated_avg",
    "fit_model_on_worker",
]

log = get_logger("planrt.fl")


@on_loop
async def fit_model_on_worker(
    worker: BaseWorker,
    traced_model: nn.Module,
    batch_size: int,
    curr_round: int,
    max_nr_batches: int,
    lr: float,
    *,
    dataset_key: str = "mnist",
    loss_fn: Loss = F.nll_loss,
    optimizer: str = "SGD",
    seed: int = 1,
) -> tuple[str, nn.Module, float]:
    """Trains a copy of `traced_model` on `worker`'s data; awaitable from any loop.

    `traced_model` is a `torch.jit.trace`d module or any nn.Module that planrt can record; it stays as it is.
    At most `max_nr_batches` batches (-1: the whole data set, once) of `batch_size`, with a fresh `optimizer` of
    learning rate `lr`. Order and random ops derive from (`seed`, `curr_round`, worker id).

    Returns:
        (worker id, trained model, mean loss over the samples).

    Raises:
        OptionError, TraceError, RemoteError, WorkerLostError.
    """
    config = TrainConfig(
        traced_model,
        loss_fn,
        batch_size=batch_size,
        optimizer=optimizer,
        optimizer_args={"lr": lr},
        max_nr_batches=max_nr_batches,
    )
    names = config.trace_for(worker, dataset_key).names
    state = names.of(traced_model)
    result = await config.fit(
        worker, state, dataset_key=dataset_key, seed=derive_seed(seed, curr_round, worker.id)
    )
    model = copied(traced_model)
    names.write(model, names.changed(state, result.entries))
    return worker.id, model, result.loss


@on_loop
async def async_evaluate_model_on_worker(
    model_identifier: str,
    worker: BaseWorker,
    dataset_key: str,
    model: nn.Module,
    nr_bins: int,
    batch_size: int,
    *,
    loss_fn: Loss = F.nll_loss,
    print_target_hist: bool = False,
) -> EvaluationResult:
    """Evaluates `model` on `worker`'s data and logs what came out, under the name `model_identifier`.

    `nr_bins` classes are counted (10 for digits); shares are logged in thirds as in the digits' tutorials when
    there are ten. `print_target_hist` logs the data's own shares first.

    Raises:
        TraceError, RemoteError, WorkerLostError.
    """
    config = TrainConfig(model, loss_fn)
    state = config.trace_for(worker, dataset_key).names.of(model)
    result = await config.evaluate(
        worker, state, dataset_key=dataset_key, batch_size=batch_size, bins=nr_bins
    )
    if print_target_hist and result.target_histogram is not None:
        log.info(f"Target histogram: {shares(result.target_histogram)}")
    if result.histogram is not None:
        log.info(f"{model_identifier}: {shares(result.histogram)}")
    accuracy = (
        f", accuracy: {result.correct}/{result.samples} ({result.correct / max(1, result.samples):.2%})"
        if result.correct is not None
        else ""
    )
    log.info(f"{model_identifier}: average loss: {result.loss:.4f}{accuracy}")
    return result


def evaluate_model_on_worker(
    model_identifier: str,
    worker: BaseWorker,
    dataset_key: str,
    model: nn.Module,
    nr_bins: int,
    batch_size: int,
    *,
    loss_fn: Loss = F.nll_loss,
    print_target_hist: bool = False,
) -> EvaluationResult:
    """The blocking form of `async_evaluate_model_on_worker`."""
    evaluation = async_evaluate_model_on_worker(
        model_identifier,
        worker,
        dataset_key,
        model,
        nr_bins,
        batch_size,
        loss_fn=loss_fn,
        print_target_hist=print_target_hist,
    )
    return run(evaluation, instead="await async_evaluate_model_on_worker(...)")


def shares(histogram: list[int]) -> str:
    """The shares of predictions in 0-3, 4-6 and 7-9, for ten classes; else the counts."""
    if len(histogram) != 10:
        return f"predictions per class: {histogram}"
    total = max(1, sum(histogram))
    groups = (("0-3", histogram[:4]), ("4-6", histogram[4:7]), ("7-9", histogram[7:]))
    return "predictions in " + ", ".join(f"{name}: {sum(part) / total:.0%}" for name, part in groups)
