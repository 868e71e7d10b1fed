"""Plans: functions and modules recorded once, sent to workers, and run there with one message.

A function, a plan with sizes that stay free, a plan with state, a class of plans; printed, sent to several workers,
found by a tag and brought back; and in the end a whole training step as one plan.

    python examples/plans.py [--websocket] [--epochs 10]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from _workers import options_of, workers
from torch import nn

import planrt as sy
from planrt.command_line import run_command, whole_number
from planrt.plans.plan import PlanState
from planrt.workers import BaseWorker


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("plans", __doc__)
    count = whole_number(at_least=1)
    parser.add_argument("--epochs", type=count, default=10, help="steps of the training plan (%(default)s)")
    parser.add_argument(
        "--seed", type=whole_number(at_least=0), default=1, help="of models and data (%(default)s)"
    )
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """The tutorial, part by part."""
    torch.manual_seed(options.seed)
    with workers("bob", "alice", websocket=options.websocket) as (bob, alice):
        a_function(bob)
        sizes_and_state(bob)
        a_network(bob, alice)
        published(bob)
        a_training_step(bob, steps=options.epochs)


def a_function(bob: BaseWorker) -> None:
    """A function becomes a plan when it is built on an example."""
    print("--- A function")

    @sy.func2plan()
    def double_abs(x: torch.Tensor) -> torch.Tensor:
        """Twice the absolute value."""
        return torch.abs(x + x)

    print(f"Built: {double_abs.is_built}")
    double_abs.build(torch.tensor([1.0, -2.0]))
    print(double_abs)
    pointer = double_abs.send(bob)
    print(pointer)
    x = torch.tensor([-1.0, 2.0, 3.0]).send(bob)
    before = bob.traffic.copy()
    result = pointer(x).get()
    print(f"{result.tolist()}, in {bob.traffic.since(before).messages_received} answer")


def sizes_and_state(bob: BaseWorker) -> None:
    """With the shapes of its arguments a plan is built at once; -1 stays free. State belongs to the plan."""
    print("--- Sizes and state")

    @sy.func2plan(args_shape=[(-1, 1)], state=(torch.tensor([1.0]),))
    def add_bias(x: torch.Tensor, state: PlanState) -> torch.Tensor:
        """Adds what the plan keeps."""
        (bias,) = state.read()
        return x + bias

    pointer = add_bias.send(bob)
    for rows in (1, 3):
        print(pointer(torch.zeros(rows, 1).send(bob)).get().flatten().tolist())


class Net(sy.Plan):
    """A network that is a plan: its parameters are the state."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, 3)
        self.fc2 = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of two classes."""
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


def a_network(bob: BaseWorker, alice: BaseWorker) -> None:
    """One plan on two workers, without building it again."""
    print("--- A network on two workers")
    net = Net()
    net.build(torch.zeros(4, 2))
    print(net.code)
    pointers = net.send(bob, alice)
    x = torch.tensor([[1.0, 2.0]])
    there = pointers(x.send(bob, alice)).get()
    print(f"As here: {[torch.equal(one.detach(), net(x).detach()) for one in there]}")


def published(bob: BaseWorker) -> None:
    """A tagged plan is found by others, who may run it, copy it, or bring it back."""
    print("--- Found by a tag")

    @sy.func2plan(args_shape=[(-1,)])
    def square(x: torch.Tensor) -> torch.Tensor:
        """Every entry times itself."""
        return x * x

    square.tag("#square").describe("squares every entry").send(bob)
    (found,) = bob.search("#square")
    print(found)
    print(found(torch.tensor([3.0]).send(bob)).get().tolist(), found.get().code.splitlines())


def a_training_step(bob: BaseWorker, *, steps: int) -> None:
    """Forward, loss, backward and update in one plan: a step is one message, whatever the model.

    The model goes to bob and is an argument of the plan, which changes its parameters where they are.
    """
    print("--- A training step")
    points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    wanted = points[:, :1]
    model = nn.Linear(2, 1)

    def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        loss = ((model(x) - y) ** 2).sum()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
        return loss.detach()

    pointer = sy.func2plan(step).build(model, points, wanted).send(bob)
    model.send(bob)
    x, y = points.send(bob), wanted.send(bob)
    losses = [pointer(model, x, y) for _ in range(steps)]
    model.get()
    print(f"Losses {', '.join(f'{loss.get().item():.3f}' for loss in losses)}")
    with torch.no_grad():
        print(f"Final loss {((model(points) - wanted) ** 2).sum():.4f}")


if __name__ == "__main__":
    sys.exit(main())
