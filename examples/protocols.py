"""Protocols: plans chained over workers, deployed, run, sent, searched for, and brought back.

First a line of three plans, run from here, then by a worker that the protocol was sent to, then by somebody who found
it there. After that a protocol that is no line: all workers train the same model on their own points at the same
time, and one of them averages.

    python examples/protocols.py [--websocket] [--epochs 10]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from _workers import options_of, workers

import planrt as sy
from planrt.command_line import run_command, whole_number
from planrt.workers import BaseWorker


@sy.func2plan(args_shape=[(1,)])
def inc1(x: torch.Tensor) -> torch.Tensor:
    """One more."""
    return x + 1


@sy.func2plan(args_shape=[(1,)])
def inc2(x: torch.Tensor) -> torch.Tensor:
    """One more."""
    return x + 1


@sy.func2plan(args_shape=[(1,)])
def inc3(x: torch.Tensor) -> torch.Tensor:
    """One more."""
    return x + 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("protocols", __doc__)
    count = whole_number(at_least=1)
    parser.add_argument("--epochs", type=count, default=10, help="rounds of the last part (%(default)s)")
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """The tutorial, part by part."""
    with workers("alice", "bob", "charlie", "james", websocket=options.websocket) as (*three, james):
        protocol = in_a_line(*three)
        from_another_worker(protocol, james)
        found_and_deployed(james, *three)
        average_of_many(*three, rounds=options.epochs)


def in_a_line(*three: BaseWorker) -> sy.Protocol:
    """Describes a protocol with names for its workers, puts workers in their places, and runs it."""
    print("--- A line of plans")
    protocol = sy.Protocol([("worker1", inc1), ("worker2", inc2), ("worker3", inc3)], verbose=True)
    protocol.deploy(*three)
    print(protocol)
    pointer = protocol.run(torch.tensor([1.0]))
    print(pointer)
    print(pointer.get())
    return protocol


def from_another_worker(protocol: sy.Protocol, james: BaseWorker) -> None:
    """Sends the protocol to james: he runs it on what he has. The result is a pointer to him, which points on."""
    print("--- Run by james")
    protocol.send(james)
    x = torch.tensor([1.0]).send(james)
    pointer = protocol.run(x)
    print(pointer)
    pointer = pointer.get()
    print(pointer)
    print(pointer.get())


def found_and_deployed(james: BaseWorker, *three: BaseWorker) -> None:
    """Publishes a protocol on james, finds it there, brings it back and deploys it."""
    print("--- Found on james")
    protocol = sy.Protocol([("worker1", inc1), ("worker2", inc2), ("worker3", inc3)])
    protocol.tag("my_protocol").send(james)
    me = sy.hook.local_worker
    responses = me.request_search(["my_protocol"], location=james)
    print(responses)
    found = responses[0].get()
    print(found)
    print(found.deploy(*three).run(torch.tensor([1.0])).get())


def average_of_many(*three: BaseWorker, rounds: int) -> None:
    """One plan on three workers at once, and the mean of what they gave: rounds of federated averaging.

    The model that a round gives is on alice, where the next one starts. Points of y = 2 x - 1 stay on their workers.
    """
    print("--- The same plan on many workers, and their average")
    places = ["alice", "bob", "charlie"]
    protocol = sy.Protocol(
        [
            *(sy.Step(place, local_update, ["model", f"points of {place}"], name=place) for place in places),
            sy.Step("alice", average, [places], name="average"),
        ],
        inputs=["model", *(f"points of {place}" for place in places)],
    ).deploy(*three)
    print(protocol)
    points = []
    for number, worker in enumerate(three):
        x = torch.linspace(number - 1.5, number - 0.5, 20)
        points.append(torch.stack([x, 2 * x - 1]).send(worker))
    model = torch.zeros(2).send(three[0])
    for number in range(1, rounds + 1):
        seen = []
        model = protocol.run(model, *points, on_progress=lambda *what, seen=seen: seen.append(what))
        if number == 1:
            print(", ".join(f"{step} {state}" for step, _, state in seen if state in ("running", "done")))
    slope, offset = model.get().tolist()
    print(f"After {rounds} rounds: y = {slope:.3f} x + {offset:.3f}")


@sy.func2plan(args_shape=[(2,), (2, -1)])
def local_update(model: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Five steps of gradient descent on (slope, offset), at points [2, N] of x and y."""
    model = model.detach().requires_grad_()
    for _ in range(5):
        loss = ((model[0] * points[0] + model[1] - points[1]) ** 2).mean()
        (gradient,) = torch.autograd.grad(loss, model)
        model = (model - 0.2 * gradient).detach().requires_grad_()
    return model.detach()


@sy.func2plan()
def average(models: list[torch.Tensor]) -> torch.Tensor:
    """The mean of several models."""
    return torch.stack(models).mean(0)


average.build([torch.zeros(2)] * 3)

if __name__ == "__main__":
    sys.exit(main())
