"""The models, data and configurations that several benchmarks share."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from planrt.fl.config import TrainConfig
from planrt.fl.runs.children import ChildOptions
from planrt.fl.runs.networks import seeded_net
from planrt.workers.datasets import BaseDataset
from planrt.workers.machine.rounds.batches import Batch

SEED = 1
LR = 0.1
BATCH_SIZE = 32
BATCHES = 10
"""The seeds' round: ten batches of 32 per worker."""

MODEL_BYTES = 4 * 431_080
"""The MNIST network's parameters."""


@dataclass(frozen=True)
class Size:
    """How much to measure. `quick` is for seeing that everything runs; its figures mean nothing."""

    repeats: int
    quick: bool
    ids: int = 100_000
    """Of either table, where it is found who is in both."""


def mnist_config(batches: int = BATCHES) -> TrainConfig:
    """The seeds' network and training, `batches` batches a round."""
    return TrainConfig(
        seeded_net(SEED),
        F.nll_loss,
        batch_size=BATCH_SIZE,
        max_nr_batches=batches,
        optimizer="SGD",
        optimizer_args={"lr": LR},
    )


# A wide layer for throughput and memory: nothing to compute, much to carry.

_WIDTH = "PLANRT_BENCH_WIDTH"
"""Environment variable that tells worker processes the width: their data set factories take no arguments."""

_SLOW_SECONDS = 3.0


def set_width(width: int) -> None:
    """The wide layer's width from now on, in this process and those it starts. 5,000: 25 million parameters."""
    os.environ[_WIDTH] = str(width)


def wide_model() -> nn.Linear:
    """A linear layer of the width that was set."""
    width = int(os.environ[_WIDTH])
    return nn.Linear(width, width)


def wide_data() -> BaseDataset:
    """Data for `wide_model`, served by worker processes."""
    width = int(os.environ[_WIDTH])
    return BaseDataset(torch.zeros(2, width), torch.zeros(2, width))


class _SlowData(BaseDataset):
    def fetch(self, indices: torch.Tensor) -> Batch:
        time.sleep(_SLOW_SECONDS)
        return super().fetch(indices)


def slow_wide_data() -> BaseDataset:
    """As `wide_data`, but every batch takes seconds: the worker that has it answers last."""
    data = wide_data()
    return _SlowData(data.data, data.targets)


def wide_children(count: int, *, first_slow: bool = False) -> list[ChildOptions]:
    """Worker processes that serve `wide_data`; with `first_slow` the first in order answers last."""
    factories = ["slow_wide_data" if first_slow and number == 0 else "wide_data" for number in range(count)]
    return [
        ChildOptions(
            f"worker{number}",
            options=("--dataset", f"benchmarks.workloads:{factory}", "--key", "wide", "--threads", "1"),
        )
        for number, factory in enumerate(factories)
    ]


def model_bytes(model: nn.Module) -> int:
    """Bytes of its parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def wide_config(model: nn.Module, *, batches: int = 0) -> TrainConfig:
    """A round of `model` on `wide_data`."""
    return TrainConfig(
        model, F.mse_loss, batch_size=1, max_nr_batches=batches, optimizer="SGD", optimizer_args={"lr": LR}
    )
