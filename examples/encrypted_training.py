"""A network trains on encrypted MNIST: images, labels and weights are in shares of two workers, start to end.

784-128-64-10, on the first 640 images, tested on 640 others. Only losses and the number of hits are opened.

    python examples/encrypted_training.py [--websocket] [--epochs 10] [--train-items 640] [--data DIR]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _workers import options_of, workers
from torch import nn, optim

from planrt.command_line import positive_number, run_command, whole_number
from planrt.fl.data import digits as mnist

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Net(nn.Module):
    """Images [B, 1, 28, 28] to scores [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 128), nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of the ten digits."""
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(images.view(-1, 784))))))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("encrypted_training", __doc__)
    count = whole_number(at_least=1)
    add = parser.add_argument
    add("--epochs", type=count, default=10, help="passes over all images (%(default)s)")
    add("--batch-size", type=count, default=64, help="images of a batch (%(default)s)")
    add("--lr", type=positive_number, default=0.05, help="learning rate (%(default)s)")
    add("--train-items", type=count, default=640, help="train on the first so many images (%(default)s)")
    add("--test-items", type=count, default=640, help="test on the first so many images (%(default)s)")
    add("--precision", type=count, default=4, help="decimal places (%(default)s)")
    add("--data", metavar="DIR", help="folder that holds MNIST/raw")
    add("--seed", type=whole_number(at_least=0), default=1, help="of models and data (%(default)s)")
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """Trains and tests, encrypted."""
    torch.manual_seed(options.seed)
    loaded = mnist.load("auto", options.data)
    if loaded.notice:
        print(f"Notice: {loaded.notice}")
    names = ("worker1", "worker2", "crypto_provider")
    with workers(*names, websocket=options.websocket) as (first, second, provider):

        def encrypted(tensor: Any) -> Any:
            fixed = tensor.fix_precision(precision_fractional=options.precision)
            return fixed.share(first, second, crypto_provider=provider, requires_grad=True)

        def batches(images: Any, labels: Any, count: int, *, one_hot: bool) -> Batches:
            x = mnist.normalize(torch.from_numpy(images[:count].copy()))
            y = torch.from_numpy(labels[:count].copy()).long()
            wanted = F.one_hot(y, 10).float() if one_hot else y.float()
            pairs = zip(x.split(options.batch_size), wanted.split(options.batch_size), strict=True)
            return [(encrypted(one), encrypted(other)) for one, other in pairs]

        training = batches(loaded.train_images, loaded.train_labels, options.train_items, one_hot=True)
        testing = batches(loaded.test_images, loaded.test_labels, options.test_items, one_hot=False)
        model = encrypted(Net())
        optimizer: Any = optim.SGD(model.parameters(), lr=options.lr)
        optimizer = optimizer.fix_precision()
        for epoch in range(1, options.epochs + 1):
            started = time.monotonic()
            loss = train(model, training, optimizer)
            spent = (time.monotonic() - started) / len(training)
            print(f"Epoch {epoch}: loss {loss:.4f}, {1000 * spent:.0f} ms an iteration")
        correct, items = test(model, testing)
        print(f"Test: {correct}/{items} ({correct / items:.1%}) right")


def train(model: nn.Module, batches: Batches, optimizer: optim.Optimizer) -> float:
    """One pass; the loss of the last batch, opened."""
    loss: Any = None
    for data, target in batches:
        optimizer.zero_grad()
        output = model(data)
        loss = ((output - target) ** 2).sum().refresh() / output.shape[0]  # type: ignore[attr-defined]
        loss.backward()
        optimizer.step()
    return float(loss.get().float_precision())


def test(model: nn.Module, batches: Batches) -> tuple[int, int]:
    """How many are right, which is all that is opened, of how many."""
    correct: Any = 0
    with torch.no_grad():
        for data, target in batches:
            pred = model(data).argmax(dim=1)
            correct += pred.eq(target.view_as(pred)).sum()
    return int(correct.get().float_precision()), sum(len(target) for _, target in batches)


if __name__ == "__main__":
    sys.exit(main())
