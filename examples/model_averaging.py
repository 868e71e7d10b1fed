"""Two copies of a model, trained on two workers and averaged by a third, which never sees the data.

The trained copies go from bob and alice straight to the third worker (`move`); only their average comes here.

    python examples/model_averaging.py [--websocket] [--rounds 10] [--steps 5]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from _workers import options_of, workers
from torch import nn, optim
from toy_in_turn import POINTS, WANTED

from planrt.command_line import run_command, whole_number
from planrt.workers import BaseWorker


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("model_averaging", __doc__)
    count = whole_number(at_least=1)
    parser.add_argument("--rounds", "--epochs", type=count, default=10, help="averages made (%(default)s)")
    parser.add_argument("--steps", type=count, default=5, help="steps before each average (%(default)s)")
    parser.add_argument(
        "--seed", type=whole_number(at_least=0), default=1, help="of models and data (%(default)s)"
    )
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """Trains round by round, and says how far the averaged model is off after each."""
    torch.manual_seed(options.seed)
    model = nn.Linear(2, 1)
    with workers("bob", "alice", "secure_worker", websocket=options.websocket) as (bob, alice, secure_worker):
        bobs = (POINTS[:2].send(bob), WANTED[:2].send(bob))
        alices = (POINTS[2:].send(alice), WANTED[2:].send(alice))
        for number in range(1, options.rounds + 1):
            trained = [train_copy(model, *part, steps=options.steps) for part in (bobs, alices)]
            average_into(model, trained, secure_worker)
            with torch.no_grad():
                print(f"Round {number}: loss {((model(POINTS) - WANTED) ** 2).sum():.4f}")
    with torch.no_grad():
        print(f"Final loss {((model(POINTS) - WANTED) ** 2).sum():.4f}")


def train_copy(model: nn.Module, data: torch.Tensor, target: torch.Tensor, *, steps: int) -> nn.Module:
    """A copy of `model`, trained where `data` is, and left there. Returns without waiting for the training."""
    trained = model.copy().send(data.location)
    optimizer = optim.SGD(trained.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        ((trained(data) - target) ** 2).sum().backward()
        optimizer.step()
    return trained


def average_into(model: nn.Module, trained: Sequence[nn.Module], third: BaseWorker) -> None:
    """Moves the trained models to `third`, averages them there and puts the average into `model`, here."""
    for one in trained:
        one.move(third)
    with torch.no_grad():
        for parameter, *parts in zip(model.parameters(), *(one.parameters() for one in trained), strict=True):
            parameter.set_((sum(part.data for part in parts) / len(parts)).get())


if __name__ == "__main__":
    sys.exit(main())
