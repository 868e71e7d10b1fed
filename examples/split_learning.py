"""Split learning: one network over two workers, and over three. Bob has the images, alice the labels.

The front layers are on bob and the back layers on alice, with three workers a middle part on charlie. In every step
activations go one way and gradients back, from worker to worker; images, labels and layers stay where they are. One
protocol describes the step, one call runs it. The same network trained whole, here, has the same losses.

    python examples/split_learning.py [--websocket] [--epochs 2] [--train-items 6000] [--data DIR]
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from _workers import options_of, workers
from torch import nn, optim

import planrt as sy
from planrt.command_line import positive_number, run_command, whole_number
from planrt.fl.data import digits as mnist
from planrt.workers import BaseWorker


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("split_learning", __doc__)
    count = whole_number(at_least=1)
    add = parser.add_argument
    add("--epochs", type=count, default=2, help="passes over all images (%(default)s)")
    add("--batch-size", type=count, default=64, help="images of a batch (%(default)s)")
    add("--lr", type=positive_number, default=0.1, help="learning rate (%(default)s)")
    add("--train-items", type=count, default=6000, help="train on the first so many images (%(default)s)")
    add("--data", metavar="DIR", help="folder that holds MNIST/raw")
    add("--seed", type=whole_number(at_least=0), default=1, help="of models and data (%(default)s)")
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """Trains the network whole, over two and over three workers, and shows the losses side by side."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # as virtual workers have it: their losses are then the same to the last bit
    loaded = mnist.load("auto", options.data)
    if loaded.notice:
        print(f"Notice: {loaded.notice}")
    images = mnist.normalize(torch.from_numpy(loaded.train_images[: options.train_items].copy()))
    labels = torch.from_numpy(loaded.train_labels[: options.train_items].copy()).long()
    parts = [
        nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 128), nn.ReLU()),
        nn.Sequential(nn.Linear(128, 64), nn.ReLU()),
        nn.Linear(64, 10),
    ]
    with workers("bob", "alice", "charlie", websocket=options.websocket) as (bob, alice, charlie):
        front, middle, back = copy.deepcopy(parts)
        over_two = over_two_workers(front, nn.Sequential(middle, back), images, bob, alice, options.lr)
        over_three = over_three_workers(*copy.deepcopy(parts), images, bob, charlie, alice, options.lr)
        here = whole(nn.Sequential(*copy.deepcopy(parts)), options.lr)
        ways = {"whole": (here, images, labels)}
        remote = (images.send(bob), labels.send(alice))
        ways |= {"two workers": (over_two, *remote), "three workers": (over_three, *remote)}
        for epoch in range(1, options.epochs + 1):
            losses = {name: mean_loss(*way, batch_size=options.batch_size) for name, way in ways.items()}
            print(f"Epoch {epoch}: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    difference = max(abs(loss - losses["whole"]) for loss in losses.values())
    print(f"Largest difference to the whole network: {difference:.1e}")


Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""One training step on a batch of images and labels, here or pointers; gives the loss, here or a pointer."""


def mean_loss(step: Step, images: torch.Tensor, labels: torch.Tensor, *, batch_size: int) -> float:
    """One pass over all batches; the mean of their losses."""
    losses = [step(*batch) for batch in batches(images, labels, batch_size)]
    values = [loss.get() if isinstance(loss, sy.PointerTensor) else loss for loss in losses]
    return torch.stack(values).mean().item()


def batches(
    images: torch.Tensor, labels: torch.Tensor, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches in order, the same rows of both, wherever these are."""
    for start in range(0, len(images), size):
        yield images[start : start + size], labels[start : start + size]


def whole(network: nn.Module, lr: float) -> Step:
    """A step of the network here."""
    optimizer = optim.SGD(network.parameters(), lr=lr)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


# ------------------------------------------------------------------------------------------- what the plans do


def forward(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a part of the network gives for `x`."""
    with torch.no_grad():
        return part(x)


def update(part: nn.Module, lr: float) -> None:
    """Plain SGD, in place."""
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(parameter.grad, alpha=-lr)


def last_part(lr: float) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The part that has the labels: gives the loss and the gradient for the part before, and learns."""

    def loss_and_gradient(
        part: nn.Module, x: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        part.zero_grad()
        loss = F.cross_entropy(part(x), labels)
        loss.backward()
        update(part, lr)
        return loss.detach(), x.grad

    return loss_and_gradient


def inner_part(lr: float) -> Callable[..., torch.Tensor]:
    """A part between others: gives the gradient for the part before, and learns. It computes its forward again,
    because no graph stays on a worker from one plan to the next.
    """

    def gradient(part: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        part.zero_grad()
        part(x).backward(grad)
        update(part, lr)
        return x.grad

    return gradient


def first_part(lr: float) -> Callable[..., None]:
    """The part that has the images: it only learns."""

    def learn(part: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
        part.zero_grad()
        part(x).backward(grad)
        update(part, lr)

    return learn


# ------------------------------------------------------------------------------------------------ the protocols


def over_two_workers(
    front: nn.Module, back: nn.Module, images: torch.Tensor, bob: BaseWorker, alice: BaseWorker, lr: float
) -> Step:
    """A step with the front on bob and the back on alice."""
    x, y = images[:2], torch.zeros(2, dtype=torch.int64)
    hidden = front(x).detach()
    give = sy.func2plan(forward).build(front, x)
    judge = sy.func2plan(last_part(lr)).build(back, hidden, y)
    learn = sy.func2plan(first_part(lr)).build(front, x, hidden)
    front.send(bob)
    back.send(alice)
    protocol = sy.Protocol(
        [
            sy.Step(bob, give, [front, "images"], name="forward"),
            sy.Step(alice, judge, [back, "forward", "labels"], name="loss"),
            sy.Step(bob, learn, [front, "images", "loss.1"], name="learn"),
        ],
        inputs=["images", "labels"],
        outputs="loss.0",
    )
    print(protocol.deploy())
    return protocol.run


def over_three_workers(
    front: nn.Module,
    middle: nn.Module,
    back: nn.Module,
    images: torch.Tensor,
    bob: BaseWorker,
    charlie: BaseWorker,
    alice: BaseWorker,
    lr: float,
) -> Step:
    """A step with the front on bob, the middle on charlie and the back on alice."""
    x, y = images[:2], torch.zeros(2, dtype=torch.int64)
    first = front(x).detach()
    second = middle(first).detach()
    give = sy.func2plan(forward).build(front, x)
    pass_on = sy.func2plan(forward).build(middle, first)
    judge = sy.func2plan(last_part(lr)).build(back, second, y)
    pass_back = sy.func2plan(inner_part(lr)).build(middle, first, second)
    learn = sy.func2plan(first_part(lr)).build(front, x, first)
    for part, worker in ((front, bob), (middle, charlie), (back, alice)):
        part.send(worker)
    protocol = sy.Protocol(
        [
            sy.Step(bob, give, [front, "images"], name="forward"),
            sy.Step(charlie, pass_on, [middle, "forward"], name="middle"),
            sy.Step(alice, judge, [back, "middle", "labels"], name="loss"),
            sy.Step(charlie, pass_back, [middle, "forward", "loss.1"], name="back"),
            sy.Step(bob, learn, [front, "images", "back"], name="learn"),
        ],
        inputs=["images", "labels"],
        outputs="loss.0",
    )
    print(protocol.deploy())
    return protocol.run


if __name__ == "__main__":
    sys.exit(main())
