"""A trained network tells encrypted digits: neither the images, nor the weights, nor its answers are seen by anybody.

The network trains in the clear, then weights and images are shared by bob and alice. What is opened is the number of
hits, and here, to compare, the answers.

    python examples/encrypted_evaluation.py [--websocket] [--convolutional] [--test-items 100] [--data DIR]
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _workers import options_of, workers
from torch import nn, optim

from planrt.command_line import run_command, whole_number
from planrt.fl.data import digits as mnist


def network(*, convolutional: bool) -> nn.Module:
    """Images [B, 1, 28, 28] to log-probabilities [B, 10]."""
    if convolutional:
        features = [
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        ]
        return nn.Sequential(*features, nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10), nn.LogSoftmax(1))
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 10), nn.LogSoftmax(1))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("encrypted_evaluation", __doc__)
    count = whole_number(at_least=1)
    add = parser.add_argument
    add("--convolutional", action="store_true", help="two convolutions and a pooling, in place of 784-500-10")
    add("--epochs", type=count, default=1, help="passes over the training images, in the clear (%(default)s)")
    add("--batch-size", type=count, default=50, help="encrypted images at once (%(default)s)")
    add("--train-items", type=count, default=2000, help="train on the first so many images (%(default)s)")
    add("--test-items", type=count, default=100, help="encrypt the first so many images (%(default)s)")
    add("--data", metavar="DIR", help="folder that holds MNIST/raw")
    add("--seed", type=whole_number(at_least=0), default=1, help="of models and data (%(default)s)")
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """Trains in the clear, and evaluates encrypted."""
    torch.manual_seed(options.seed)
    loaded = mnist.load("auto", options.data)
    if loaded.notice:
        print(f"Notice: {loaded.notice}")
    items = slice(0, options.test_items)
    images = mnist.normalize(torch.from_numpy(loaded.test_images[items].copy()))
    labels = torch.from_numpy(loaded.test_labels[items].copy()).long()
    model: Any = network(convolutional=options.convolutional)
    train(model, loaded, options)
    plain = copy.deepcopy(model).eval()
    with workers("alice", "bob", "crypto_provider", websocket=options.websocket) as (alice, bob, provider):
        model.fix_precision(precision_fractional=4).share(alice, bob, crypto_provider=provider)
        started = time.monotonic()
        correct: Any = 0
        same = 0
        with torch.no_grad():
            pairs = zip(images.split(options.batch_size), labels.split(options.batch_size), strict=True)
            for data, target in pairs:
                private: Any = data
                wanted: Any = target
                private = private.fix_precision(precision_fractional=4).share(
                    alice, bob, crypto_provider=provider
                )
                wanted = wanted.fix_precision(precision_fractional=4).share(
                    alice, bob, crypto_provider=provider
                )
                pred: Any = model(private).argmax(dim=1)
                correct += pred.eq(wanted.view_as(pred)).sum()
                same += int((pred.get() == plain(data).argmax(1)).sum())
        right = int(correct.copy().get().float_precision().long().item())
        print(f"Encrypted: {right}/{len(labels)} right, in {time.monotonic() - started:.1f} s")
        print(f"The same answers as in the clear: {same}/{len(labels)}")


def train(model: nn.Module, loaded: mnist.LoadedData, options: argparse.Namespace) -> None:
    """Trains in the clear."""
    images = mnist.normalize(torch.from_numpy(loaded.train_images[: options.train_items].copy()))
    labels = torch.from_numpy(loaded.train_labels[: options.train_items].copy()).long()
    optimizer = optim.Adam(model.parameters(), lr=0.001)
    for _ in range(options.epochs):
        for data, target in zip(images.split(64), labels.split(64), strict=True):
            optimizer.zero_grad()
            F.nll_loss(model(data), target).backward()
            optimizer.step()


if __name__ == "__main__":
    sys.exit(main())
