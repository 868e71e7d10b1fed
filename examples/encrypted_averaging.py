"""House prices on two workers whose models are averaged encrypted: nobody sees the parameters of one worker alone.

After each pair of batches every worker shares its parameters with bob and alice itself; what is opened is the sum.

    python examples/encrypted_averaging.py [--websocket] [--epochs 3] [--data DIR]
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _workers import options_of, workers
from torch import nn, optim

from planrt.command_line import positive_number, run_command, whole_number
from planrt.errors import OptionError
from planrt.fl.data import boston


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("encrypted_averaging", __doc__)
    count = whole_number(at_least=1)
    add = parser.add_argument
    add("--epochs", type=count, default=3, help="passes over all items (%(default)s)")
    add("--batch-size", type=count, default=8, help="items of a batch (%(default)s)")
    add("--train-items", type=count, default=404, help="train on the first so many houses (%(default)s)")
    add("--lr", type=positive_number, default=0.001, help="learning rate (%(default)s)")
    add("--data", metavar="DIR", help=f"folder that holds {boston.FILE}")
    add("--seed", type=whole_number(at_least=0), default=1, help="of models and data (%(default)s)")
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """Trains, with an encrypted average after each pair of batches."""
    torch.manual_seed(options.seed)
    houses = boston.load(options.data).standardized()
    x, y = houses.train_data[: options.train_items], houses.train_targets[: options.train_items]
    if len(x) <= options.batch_size:
        raise OptionError(
            f"{len(x)} houses are one batch of {options.batch_size}, and each of the two workers needs one: write a "
            "smaller --batch-size, or more --train-items"
        )
    model = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 1))
    with workers("bob", "alice", "james", websocket=options.websocket) as (bob, alice, james):
        places = (bob, alice)
        batches: list[list[Any]] = [[], []]
        for number, pair in enumerate(
            zip(x.split(options.batch_size), y.split(options.batch_size), strict=True)
        ):
            batches[number % 2].append([one.send(places[number % 2]) for one in pair])
        models: list[Any] = [copy.deepcopy(model) for _ in places]
        optimizers = [optim.SGD(one.parameters(), lr=options.lr) for one in models]
        for epoch in range(1, options.epochs + 1):
            for pairs in zip(*batches, strict=False):
                for one, optimizer, worker, (data, target) in zip(
                    models, optimizers, places, pairs, strict=True
                ):
                    one.send(worker)
                    update(one, optimizer, data, target)
                average(models, bob, alice, james)
            with torch.no_grad():
                loss = F.mse_loss(models[0](houses.test_data).view(-1), houses.test_targets)
            print(f"Epoch {epoch}: test MSE {loss.item():.2f}")


def update(model: nn.Module, optimizer: optim.Optimizer, data: torch.Tensor, target: torch.Tensor) -> None:
    """A step, where the data are."""
    optimizer.zero_grad()
    loss = F.mse_loss(model(data).view(-1), target.view(-1))
    loss.backward()
    optimizer.step()


def average(models: list[Any], bob: Any, alice: Any, james: Any) -> None:
    """Brings the average of the parameters back into all models; of one model nothing is opened."""
    new: list[torch.Tensor] = []
    for parameters in zip(*(one.parameters() for one in models), strict=True):
        shared = [
            one.detach()
            .copy()
            .fix_precision(precision_fractional=5)
            .share(bob, alice, crypto_provider=james)
            .get()
            for one in parameters
        ]
        new.append((shared[0] + shared[1]).get().float_precision() / 2)
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter *= 0  # what is brought back is nobody's
            model.get()
            for parameter, value in zip(model.parameters(), new, strict=True):
                parameter.set_(value.view(parameter.shape))


if __name__ == "__main__":
    sys.exit(main())
