"""A small network trains on shares: the data, the labels and the model are encrypted, and only the loss is opened.

The finer the precision, the closer the losses are to those of the same training in the clear.

    python examples/encrypted_toy.py [--websocket] [--epochs 20]
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence

import torch
from _workers import options_of, workers
from torch import nn, optim

from planrt.command_line import run_command, whole_number

DATA = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
TARGET = torch.tensor([[0.0], [0.0], [1.0], [1.0]])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("encrypted_toy", __doc__)
    parser.add_argument("--epochs", type=whole_number(at_least=1), default=20, help="steps (%(default)s)")
    parser.add_argument(
        "--seed", type=whole_number(at_least=0), default=2, help="of models and data (%(default)s)"
    )
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """Trains in the clear, and encrypted with 2, 3 and 4 digits."""
    torch.manual_seed(options.seed)
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with workers("bob", "alice", "james", websocket=options.websocket) as (bob, alice, james):
        plain = train(copy.deepcopy(model), DATA, TARGET, options.epochs)
        print(f"In the clear: loss {plain[-1]:.4f}")
        for digits in (2, 3, 4):
            data, target, net = (
                one.fix_precision(precision_fractional=digits).share(
                    bob, alice, crypto_provider=james, requires_grad=True
                )
                for one in (DATA, TARGET, copy.deepcopy(model))
            )
            losses = train(net, data, target, options.epochs)
            off = max(abs(one - other) for one, other in zip(losses, plain, strict=True))
            print(f"Encrypted, {digits} digits: loss {losses[-1]:.4f}, at most {off:.4f} off")


def train(model: nn.Module, data: torch.Tensor, target: torch.Tensor, epochs: int) -> list[float]:
    """Steps down the gradient; the losses, opened."""
    opt = optim.SGD(model.parameters(), lr=0.1).fix_precision()  # type: ignore[operator]  # TorchHook adds it
    losses = []
    for _ in range(epochs):
        opt.zero_grad()
        loss = ((model(data) - target) ** 2).sum()
        loss.backward()
        opt.step()
        shown = loss.detach()
        losses.append(float(shown.get().float_precision() if hasattr(shown, "session") else shown))  # type: ignore[operator]
    return losses


if __name__ == "__main__":
    sys.exit(main())
