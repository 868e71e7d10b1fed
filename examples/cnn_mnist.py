"""A convolutional network on MNIST, half of the images on bob and half on alice.

`federate` sends each worker its half, `FederatedDataLoader` gives batches that stay there, and the model goes to
the worker whose batches come next. It is tested here, on images of this machine's own.

    python examples/cnn_mnist.py [--websocket] [--epochs 2] [--train-items 60000] [--data DIR]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from _workers import options_of, workers
from torch import nn, optim

import planrt as sy
from planrt.command_line import positive_number, run_command, whole_number
from planrt.fl.data import digits as mnist


class Net(nn.Module):
    """Two convolutions, a pooling and two linear layers: images [B, 1, 28, 28] to log-probabilities [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU())
        self.fc = nn.Sequential(nn.Linear(64 * 12 * 12, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the ten digits."""
        features = F.max_pool2d(self.conv(images), 2).view(-1, 64 * 12 * 12)
        return F.log_softmax(self.fc(features), dim=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("cnn_mnist", __doc__)
    count = whole_number(at_least=1)
    add = parser.add_argument
    add("--epochs", type=count, default=2, help="passes over all images (%(default)s)")
    add("--batch-size", type=count, default=64, help="images of a batch (%(default)s)")
    add("--lr", type=positive_number, default=0.1, help="learning rate (%(default)s)")
    add("--train-items", type=count, help="train on the first so many images only")
    add("--data", metavar="DIR", help="folder that holds MNIST/raw")
    add("--seed", type=whole_number(at_least=0), default=1, help="of models and data (%(default)s)")
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """Trains epoch by epoch and tests after each."""
    torch.manual_seed(options.seed)
    loaded = mnist.load("auto", options.data)
    if loaded.notice:
        print(f"Notice: {loaded.notice}")
    images = torch.from_numpy(loaded.train_images[: options.train_items].copy())
    labels = torch.from_numpy(loaded.train_labels[: options.train_items].copy()).long()
    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=options.lr)
    with workers("bob", "alice", websocket=options.websocket, in_turn=True) as (bob, alice):
        federated = sy.BaseDataset(images, labels, batch_transform=mnist.normalize).federate((bob, alice))
        loader = sy.FederatedDataLoader(federated, batch_size=options.batch_size, shuffle=True)
        print(federated)
        for epoch in range(1, options.epochs + 1):
            started = time.monotonic()
            train(model, optimizer, loader, epoch)
            correct, loss = test(model, loaded)
            items = len(loaded.test_labels)
            print(
                f"Epoch {epoch}: test loss {loss:.4f}, accuracy {correct}/{items} ({correct / items:.2%}), "
                f"{time.monotonic() - started:.1f} s"
            )


def train(model: Net, optimizer: optim.Optimizer, loader: sy.FederatedDataLoader, epoch: int) -> None:
    """One pass. The model is sent on only when the next batch is on another worker, and is back in the end."""
    model.train()
    for number, (data, target) in enumerate(loader):
        if model.location is None:
            model.send(data.location)
        elif model.location is not data.location:
            model.move(data.location)
        optimizer.zero_grad()
        loss = F.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
        if number % 100 == 0:
            print(
                f"Epoch {epoch}, batch {number}/{len(loader)} on {data.location.id}: loss {loss.get().item():.4f}"
            )
    model.get()


def test(model: Net, loaded: mnist.LoadedData) -> tuple[int, float]:
    """How many test images are recognised, and the mean loss."""
    model.eval()
    dataset = sy.BaseDataset(
        torch.from_numpy(loaded.test_images.copy()),
        torch.from_numpy(loaded.test_labels.copy()).long(),
        batch_transform=mnist.normalize,
    )
    correct, loss = 0, 0.0
    with torch.no_grad():
        for indices in torch.arange(len(dataset)).split(1000):
            images, labels = dataset.fetch(indices)
            scores = model(images)
            loss += F.nll_loss(scores, labels, reduction="sum").item()
            correct += int((scores.argmax(1) == labels).sum())
    return correct, loss / len(dataset)


if __name__ == "__main__":
    sys.exit(main())
