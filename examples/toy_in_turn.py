"""Four points on two workers: one linear model visits them in turn and learns from both.

The points stay where they are. The model goes to the worker, takes its step there and comes back; the optimizer
was made before it ever left.

    python examples/toy_in_turn.py [--websocket] [--epochs 10]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from _workers import options_of, workers
from torch import nn, optim

from planrt.command_line import run_command, whole_number
from planrt.workers import BaseWorker

POINTS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
WANTED = torch.tensor([[0.0], [0.0], [1.0], [1.0]])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("toy_in_turn", __doc__)
    parser.add_argument("--epochs", type=whole_number(at_least=1), default=10, help="passes (%(default)s)")
    parser.add_argument(
        "--seed", type=whole_number(at_least=0), default=1, help="of models and data (%(default)s)"
    )
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """Trains, and says how far the model is off in the end."""
    torch.manual_seed(options.seed)
    model = nn.Linear(2, 1)
    with workers("bob", "alice", websocket=options.websocket, in_turn=True) as (bob, alice):
        train(model, bob, alice, epochs=options.epochs)
    with torch.no_grad():
        print(f"Final loss {((model(POINTS) - WANTED) ** 2).sum():.4f}")


def train(model: nn.Module, bob: BaseWorker, alice: BaseWorker, *, epochs: int) -> None:
    """`epochs` passes: one step at bob's two points, one at alice's."""
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    parts = [(POINTS[:2].send(bob), WANTED[:2].send(bob)), (POINTS[2:].send(alice), WANTED[2:].send(alice))]
    for epoch in range(1, epochs + 1):
        losses = {}
        for data, target in parts:
            model.send(data.location)
            optimizer.zero_grad()
            loss = ((model(data) - target) ** 2).sum()
            loss.backward()
            optimizer.step()
            model.get()
            losses[data.location.id] = loss.get().item()
        print(f"Pass {epoch}: " + ", ".join(f"{id} {loss:.4f}" for id, loss in losses.items()))


if __name__ == "__main__":
    sys.exit(main())
