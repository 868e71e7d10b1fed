"""House prices on two workers: both train a copy of the model at the same time, and the average goes back to both.

Every round is a whole pass over each worker's items. The prices are the Boston Housing data
(`boston_housing.npz`, see `planrt.fl.data.boston`).

    python examples/boston_two_workers.py [--websocket] [--epochs 30] [--data DIR]
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from _workers import options_of, workers
from torch import nn, optim
from torch.utils.data import TensorDataset

import planrt as sy
from planrt.command_line import positive_number, run_command, whole_number
from planrt.fl.data import boston

LR_DECAY = 0.95
"""What the learning rate is multiplied by after each pass: with steps of one size the loss would not settle."""


def network() -> nn.Module:
    """Prices [B, 1] from the thirteen columns [B, 13]."""
    return nn.Sequential(
        nn.Linear(13, 32),
        nn.ReLU(),
        nn.Linear(32, 24),
        nn.ReLU(),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Linear(16, 1),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("boston_two_workers", __doc__)
    count = whole_number(at_least=1)
    add = parser.add_argument
    add("--epochs", type=count, default=30, help="passes, with an average after each (%(default)s)")
    add("--batch-size", type=count, default=8, help="items of a batch (%(default)s)")
    add("--lr", type=positive_number, default=0.001, help="learning rate at first (%(default)s)")
    add("--data", metavar="DIR", help=f"folder that holds {boston.FILE}")
    add("--seed", type=whole_number(at_least=0), default=1, help="of models and data (%(default)s)")
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """Trains round by round and tests the average after each."""
    torch.manual_seed(options.seed)
    houses = boston.load(options.data).standardized()
    model = network()
    with workers("bob", "alice", websocket=options.websocket) as both:
        federated = TensorDataset(houses.train_data, houses.train_targets).federate(both)
        loader = sy.FederatedDataLoader(
            federated, batch_size=options.batch_size, shuffle=True, num_iterators=len(both)
        )
        print(federated)
        for epoch in range(1, options.epochs + 1):
            model = train(model, loader, lr=options.lr * LR_DECAY ** (epoch - 1))
            with torch.no_grad():
                loss = F.mse_loss(model(houses.test_data).view(-1), houses.test_targets)
            print(f"Epoch {epoch}: test MSE {loss:.2f}")
    print(f"Final test MSE {loss:.2f}")


def train(model: nn.Module, loader: sy.FederatedDataLoader, *, lr: float) -> nn.Module:
    """One pass on each worker, from `model` on; the average of what came out.

    Steps are posted to the workers in turn without waiting for either, so both compute at the same time.
    """
    models = {id: copy.deepcopy(model) for id in loader.workers}
    optimizers = {id: optim.SGD(one.parameters(), lr=lr) for id, one in models.items()}
    for batches in loader:
        for worker, (data, target) in batches.items():
            one, optimizer = models[worker.id], optimizers[worker.id]
            if one.location is None:
                one.send(worker)
            optimizer.zero_grad()
            F.mse_loss(one(data).view(-1), target).backward()
            optimizer.step()
    return sy.federated_avg({id: one.get() for id, one in models.items()})


if __name__ == "__main__":
    sys.exit(main())
