"""House prices on three workers whose models nobody sees: only their sum reaches this process.

Each round every worker trains a copy of the model on its own houses and masks it; the masks cancel in the sum
(`docs/secure_aggregation.md`). The same rounds without masks follow, for comparison. The prices are the Boston
Housing data (`boston_housing.npz`, see `planrt.fl.data.boston`).

    python examples/boston_secure.py [--websocket] [--epochs 30] [--data DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from _workers import options_of
from torch import nn

import planrt as sy
from planrt.command_line import positive_number, run_command, whole_number
from planrt.fl import RoundScheduler, TrainConfig
from planrt.fl.data import boston
from planrt.workers import BaseWorker

NAMES = ("bob", "alice", "carol")
KEY = "houses"
LR_DECAY = 0.95
"""What the learning rate is multiplied by after each round: with steps of one size the loss would not settle."""


def network() -> nn.Module:
    """Prices [B, 1] from the thirteen columns [B, 13]."""
    return nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 1))


def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared error over a batch of prices."""
    return F.mse_loss(prediction.view(-1), target)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("boston_secure", __doc__)
    count = whole_number(at_least=1)
    add = parser.add_argument
    add("--epochs", type=count, default=30, help="rounds, each a pass over all houses (%(default)s)")
    add("--batch-size", type=count, default=8, help="items of a batch (%(default)s)")
    add("--lr", type=positive_number, default=0.002, help="learning rate at first (%(default)s)")
    add("--data", metavar="DIR", help=f"folder that holds {boston.FILE}")
    add("--seed", type=whole_number(at_least=0), default=1, help="of models and data (%(default)s)")
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


@contextlib.contextmanager
def owners(datasets: Mapping[str, sy.BaseDataset], *, websocket: bool) -> Iterator[list[BaseWorker]]:
    """One worker for each data set, here or in a process of its own, for the block."""
    with contextlib.ExitStack() as stack:
        served = {name: {KEY: data} for name, data in datasets.items()}
        if websocket:
            started = stack.enter_context(sy.local_workers(*datasets, datasets=served))
            print(f"Worker processes: {', '.join(f'{one.id} at {one.address}' for one in started)}")
            yield list(started)
        else:
            yield [stack.enter_context(sy.VirtualWorker(name, datasets=served[name])) for name in datasets]


def run(options: argparse.Namespace) -> None:
    """Trains with secure aggregation and without, and says how far apart the two are."""
    torch.manual_seed(options.seed)
    houses = boston.load(options.data).standardized()
    datasets = {
        name: sy.BaseDataset(
            houses.train_data[place :: len(NAMES)], houses.train_targets[place :: len(NAMES)]
        )
        for place, name in enumerate(NAMES)
    }
    model = network()
    config = TrainConfig(
        model,
        squared_error,
        batch_size=options.batch_size,
        optimizer="SGD",
        optimizer_args={"lr": options.lr},
    )
    with owners(datasets, websocket=options.websocket) as workers:
        secure = asyncio.run(train(workers, config, options, secure=True))
        plain = asyncio.run(train(workers, config, options, secure=False))
    difference = max(float((secure[name] - plain[name]).abs().max()) for name in secure)
    print(f"Largest difference of a parameter to rounds without secure aggregation: {difference:.1e}")
    print(f"Final test MSE {error_of(model, secure, houses):.2f}")


async def train(
    workers: list[BaseWorker], config: TrainConfig, options: argparse.Namespace, *, secure: bool
) -> Mapping[str, torch.Tensor]:
    """Returns the state after so many rounds."""
    scheduler = RoundScheduler(workers, config, dataset_key=KEY, seed=options.seed, secure_aggregation=secure)
    await scheduler.prepare()
    state: Mapping[str, torch.Tensor] = config.state
    for number in range(1, options.epochs + 1):
        result = await scheduler.run_round(number, state, lr=options.lr * LR_DECAY ** (number - 1))
        state = result.state
        if secure:
            print(f"Round {number}: mean loss {result.loss:.2f} over all workers")
    return state


def error_of(model: nn.Module, state: Mapping[str, torch.Tensor], houses: boston.BostonHousing) -> float:
    """Returns the mean squared error of the model with that state on the houses that nobody trained on."""
    with torch.no_grad():
        prediction = torch.func.functional_call(model, dict(state), (houses.test_data,))
        return float(squared_error(prediction, houses.test_targets))


if __name__ == "__main__":
    sys.exit(main())
