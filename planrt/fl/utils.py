"""The functions that scripts of the 0.2 era call round by round: fit, evaluate and average models on
workers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from planrt.deadlines import bounded
from planrt.errors import OptionError
from planrt.extras import needed
from planrt.fl.averaging import copied, federated_avg
from planrt.fl.config import Loss, TrainConfig
from planrt.fl.data.federated import FederatedDataLoader
from planrt.fl.options import whole
from planrt.logs import get_logger
from planrt.loop import on_loop, run
from planrt.plans.training import EvaluationResult
from planrt.seeding import derive_seed
from planrt.workers.base import BaseWorker, check_device

__all__ = [
    "accuracy",
    "add_model",
    "async_evaluate_model_on_worker",
    "create_gaussian_mixture_toy_data",
    "evaluate_model_on_worker",
    "extract_batches_per_worker",
    "federated_avg",
    "fit_model_on_worker",
    "iris_data_partial",
    "scale_model",
]

log = get_logger("planrt.fl")


@bounded
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
    optimizer: str | type[torch.optim.Optimizer] = "SGD",
    seed: int = 1,
    timeout: float | None = None,
) -> tuple[str, nn.Module, float]:
    """Trains a copy of `traced_model` on `worker`'s data; awaitable from any loop.

    `traced_model` is a `torch.jit.trace`d module or any nn.Module that planrt can record; it stays as it is.
    At most `max_nr_batches` batches (-1: the whole data set, once) of `batch_size`, with a fresh `optimizer`
    of learning rate `lr`. Order and random ops derive from (`seed`, `curr_round`, worker id).

    Returns:
        (worker id, trained model, mean loss over the samples).

    Raises:
        OptionError, TraceError, RemoteError, WorkerLostError.
    """
    curr_round = whole("curr_round", curr_round, at_least=0)
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


@bounded
@on_loop
async def async_evaluate_model_on_worker(
    model_identifier: str,
    worker: BaseWorker,
    dataset_key: str,
    model: nn.Module,
    nr_bins: int,
    batch_size: int,
    device: str | torch.device | None = None,
    print_target_hist: bool = False,
    *,
    loss_fn: Loss = F.nll_loss,
    timeout: float | None = None,
) -> EvaluationResult:
    """Evaluates `model` on `worker`'s data and logs what came out, under the name `model_identifier`.

    `nr_bins` classes are counted (10 for digits); their shares are logged in thirds as in the digits'
    tutorials when there are ten. `print_target_hist` logs the data's own counts first. `device` is taken as
    scripts of the 0.2 era give it: a worker computes on its own. Lines go to the logger ``planrt.fl``;
    without handlers of its own Python shows warnings only, so call `logging.basicConfig(level=logging.INFO)`
    to see them.

    Raises:
        TraceError, RemoteError, WorkerLostError.
    """
    check_device(device)
    config = TrainConfig(model, loss_fn)
    state = config.trace_for(worker, dataset_key).names.of(model)
    result = await config.evaluate(
        worker, state, dataset_key=dataset_key, batch_size=batch_size, bins=nr_bins
    )
    if print_target_hist and result.target_histogram is not None:
        log.info(f"Target histogram: {result.target_histogram}")
    if result.histogram is not None:
        log.info(f"{model_identifier}: {shares(result.histogram)}")
    accuracy = (
        f", Accuracy: {result.correct}/{result.samples} ({result.correct / max(1, result.samples):.2%})"
        if result.correct is not None
        else ""
    )
    log.info(f"{model_identifier}: Average loss: {result.loss:.4f}{accuracy}")
    return result


@bounded
def evaluate_model_on_worker(
    model_identifier: str,
    worker: BaseWorker,
    dataset_key: str,
    model: nn.Module,
    nr_bins: int,
    batch_size: int,
    device: str | torch.device | None = None,
    print_target_hist: bool = False,
    *,
    loss_fn: Loss = F.nll_loss,
    timeout: float | None = None,
) -> EvaluationResult:
    """Evaluates a model as `async_evaluate_model_on_worker` does, and waits for that."""
    evaluation = async_evaluate_model_on_worker(
        model_identifier,
        worker,
        dataset_key,
        model,
        nr_bins,
        batch_size,
        device,
        print_target_hist,
        loss_fn=loss_fn,
    )
    return run(evaluation, instead="await async_evaluate_model_on_worker(...)")


def shares(histogram: list[int]) -> str:
    """Returns the shares of predictions in 0-3, 4-6 and 7-9, for ten classes; else the counts."""
    if len(histogram) != 10:
        return f"Predictions per class: {histogram}"
    total = max(1, sum(histogram))
    groups = (("0-3", histogram[:4]), ("4-6", histogram[4:7]), ("7-9", histogram[7:]))
    return "Percentage numbers " + ", ".join(f"{name}: {sum(part) / total:.0%}" for name, part in groups)


# ------------------------------------------------------------------- parts of rounds that scripts put together


def add_model(dst_model: nn.Module, src_model: nn.Module) -> nn.Module:
    """Adds the parameters of `src_model` to those of `dst_model`, by name and in place; returns `dst_model`.

    Raises:
        OptionError: they have parameters of other shapes.
    """
    others = dict(src_model.named_parameters())
    with torch.no_grad():
        for name, parameter in dst_model.named_parameters():
            if name in others:
                if others[name].shape != parameter.shape:
                    shapes = (
                        f"{tuple(parameter.shape)} in one model and {tuple(others[name].shape)} in the other"
                    )
                    raise OptionError(f"add_model: {name} is {shapes}")
                parameter.add_(others[name])
    return dst_model


def scale_model(model: nn.Module, scale: float) -> nn.Module:
    """Multiplies the parameters of `model` by `scale`, in place; returns `model`."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def accuracy(pred_softmax: torch.Tensor, target: torch.Tensor) -> float:
    """Returns the share of rows of `pred_softmax` [N, classes] whose largest entry is at `target` [N] or [N,
    1].

    Raises:
        OptionError: other shapes.
    """
    if pred_softmax.dim() != 2 or target.numel() != len(pred_softmax):
        raise OptionError(
            f"accuracy takes scores [N, classes] and N targets, not {tuple(pred_softmax.shape)} and "
            f"{tuple(target.shape)}"
        )
    right = pred_softmax.argmax(dim=1) == target.reshape(-1)
    return float(right.sum().item()) / max(1, len(pred_softmax))


def extract_batches_per_worker(
    federated_train_loader: FederatedDataLoader,
) -> dict[BaseWorker, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Returns all batches of one pass over `federated_train_loader`, by the worker they are on."""
    datasets = federated_train_loader.federated_dataset.datasets
    batches: dict[Any, list[Any]] = {dataset.location: [] for dataset in datasets.values()}
    for step in federated_train_loader:
        for data, target in step.values() if isinstance(step, dict) else (step,):
            batches[data.location].append((data, target))
    return batches


def create_gaussian_mixture_toy_data(nr_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [N, 2] around (-5, -5) and (5, 5), as many of each, and their classes 0 and 1 (int64): N is
    `nr_samples`, rounded down to an even number."""
    half = whole("nr_samples", nr_samples, at_least=0) // 2
    points = torch.cat([torch.randn(half, 2) - 5, torch.randn(half, 2) + 5])
    return points, torch.arange(2).repeat_interleave(half)


def iris_data_partial() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the first ten flowers of each of the three classes of the iris data: float32 [30, 4] and int64
    [30].

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    iris = needed("sklearn.datasets", by="the iris data").load_iris()
    some = [row for start in (0, 50, 100) for row in range(start, start + 10)]
    return torch.tensor(iris.data[some], dtype=torch.float32), torch.tensor(iris.target[some])
