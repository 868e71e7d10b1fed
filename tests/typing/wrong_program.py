"""Mistakes that mypy --strict finds, each with its code; never run."""

from __future__ import annotations

import torch

import planrt
from planrt.fl import RoundScheduler, TrainConfig

bob = planrt.VirtualWorker("bob")


@planrt.func2plan()
def scale(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
    return x * by


scale("text")  # error: arg-type
scale(torch.ones(1), 2.0, 3)  # error: call-arg
scale(torch.ones(1), factor=2.0)  # error: call-arg
number: int = scale(torch.ones(1))  # error: assignment
bob.run(scale, "text")  # error: call-overload
bob.run("scale", torch.ones(1))  # error: call-overload
planrt.send(torch.ones(1), "bob")  # error: call-overload
planrt.send(3, bob)  # error: call-overload
planrt.get(3)  # error: call-overload
planrt.share(torch.ones(1), "bob", bob)  # error: call-overload
planrt.share(bob, bob)  # error: call-overload
planrt.fix_precision(torch.ones(1), precision_fractional="3")  # error: call-overload
planrt.func2plan(args_shape=3)  # error: call-overload
TrainConfig(torch.nn.Linear(1, 1), batch_sise=3)  # error: call-arg
RoundScheduler([bob], TrainConfig(), dataset_key=3, seed=0)  # error: arg-type
result: int = bob.fit("points")  # error: assignment
