"""A program as users write it, for mypy --strict and to be run; `test_typing.py` compares the comments."""

from __future__ import annotations

import asyncio
from typing import reveal_type

import torch
from torch import nn
from torch.nn import functional as F

import planrt
from planrt.fl import FitResult, ModelEvaluator, RoundResult, RoundScheduler, TrainConfig, federated_avg
from planrt.plans.training import EvaluationResult

hook = planrt.TorchHook(torch)
bob, alice = planrt.VirtualWorker(hook, id="bob"), planrt.VirtualWorker("alice")
reveal_type(bob)  # reveals: planrt.workers.virtual.VirtualWorker


def pointers() -> None:
    x = planrt.send(torch.ones(3), bob)
    reveal_type(x)  # reveals: planrt.workers.pointers.tensor.PointerTensor
    reveal_type(x.location)  # reveals: planrt.workers.base.BaseWorker
    reveal_type(planrt.get(x + x))  # reveals: torch._tensor.Tensor
    y = planrt.send(torch.ones(3), bob, private=True).tag("#y")
    reveal_type(y)  # reveals: planrt.workers.pointers.tensor.PointerTensor
    reveal_type(planrt.move(x, alice))  # reveals: planrt.workers.pointers.tensor.PointerTensor
    both = planrt.send(torch.ones(3), alice, bob)
    reveal_type(both)  # reveals: planrt.workers.pointers.multi.MultiPointerTensor
    reveal_type(planrt.get(both))  # reveals: list[torch._tensor.Tensor]


def modules() -> None:
    net = planrt.send(nn.Linear(3, 2), bob)
    reveal_type(net)  # reveals: torch.nn.modules.linear.Linear
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = net(planrt.send(torch.ones(4, 3), bob)).sum()
    loss.backward()
    optimizer.step()
    reveal_type(planrt.get(net))  # reveals: torch.nn.modules.linear.Linear


def shares() -> None:
    fixed = planrt.fix_precision(torch.ones(3))
    reveal_type(fixed)  # reveals: planrt.sharing.tensors.fixed.FixedPrecisionTensor
    x = planrt.share(fixed, bob, alice, crypto_provider=planrt.local_worker)
    reveal_type(x)  # reveals: planrt.sharing.tensors.shared.SharedTensor
    reveal_type(planrt.get(x * x))  # reveals: torch._tensor.Tensor
    there = planrt.share(planrt.fix_precision(planrt.send(torch.ones(3), bob)), bob, alice)
    reveal_type(there)  # reveals: planrt.workers.shares.surface.SharedPointer
    reveal_type(planrt.get(there))  # reveals: planrt.sharing.tensors.shared.SharedTensor
    assert torch.equal(planrt.get(planrt.get(there) + x), torch.full((3,), 2.0))
    net = planrt.share(planrt.fix_precision(nn.Linear(3, 2)), bob, alice, requires_grad=True)
    reveal_type(net)  # reveals: torch.nn.modules.linear.Linear
    net(x).sum().backward()
    reveal_type(planrt.float_precision(planrt.get(net)))  # reveals: torch.nn.modules.linear.Linear


@planrt.func2plan(args_shape=[(-1, 3), (3, 2)])
def scores(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x @ w, dim=1)


@planrt.func2plan()
def both_ends(x: torch.Tensor, *, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    return x.amin(), x.amax() * scale


@planrt.func2plan(args_shape=[(1,)], state=(torch.ones(1),))
def kept(x: torch.Tensor, state: planrt.plans.plan.PlanState) -> torch.Tensor:
    return x + state.read()[0]


class Net(planrt.Plan):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(x)
        return out


def plans() -> None:
    x, w = torch.ones(4, 3), torch.ones(3, 2)
    reveal_type(
        scores
    )  # reveals: planrt.plans.plan.Plan[[x: torch._tensor.Tensor, w: torch._tensor.Tensor], torch._tensor.Tensor]
    reveal_type(scores(x, w))  # reveals: torch._tensor.Tensor
    reveal_type(bob.run(scores, x, w))  # reveals: torch._tensor.Tensor
    reveal_type(bob.run(scores, x, w, seed=3))  # reveals: torch._tensor.Tensor
    reveal_type(
        both_ends.build(x)(x, scale=2.0)
    )  # reveals: tuple[torch._tensor.Tensor, torch._tensor.Tensor]
    reveal_type(kept(torch.ones(1)))  # reveals: torch._tensor.Tensor
    there = planrt.send(scores, bob, purpose="a try")
    reveal_type(there)  # reveals: planrt.workers.pointers.plan.PointerPlan
    reveal_type(planrt.get(there).hash)  # reveals: str
    net = Net().build(x)
    reveal_type(net)  # reveals: tests.typing.user_program.Net
    reveal_type(planrt.send(net, bob))  # reveals: planrt.workers.pointers.plan.PointerPlan
    reveal_type(
        planrt.func2plan(abs_of)
    )  # reveals: planrt.plans.plan.Plan[[x: torch._tensor.Tensor], torch._tensor.Tensor]
    protocol = planrt.Protocol([("bob", scores)])
    reveal_type(planrt.send(protocol, alice))  # reveals: planrt.protocols.pointer.PointerProtocol


def abs_of(x: torch.Tensor) -> torch.Tensor:
    return x.abs()


async def rounds() -> RoundResult:
    x = torch.randn(20, 3)
    data = planrt.BaseDataset(x, (x.sum(1) > 0).long())
    async with planrt.local_workers("carol", datasets={"carol": {"points": data}}, threads=1) as workers:
        reveal_type(workers)  # reveals: list[planrt.workers.websocket_client.WebsocketClientWorker]
        config = TrainConfig(nn.Linear(3, 2), F.cross_entropy, batch_size=10, optimizer=torch.optim.AdamW)
        scheduler = RoundScheduler(workers, config, dataset_key="points", seed=1)
        await scheduler.prepare()
        result = await scheduler.run_round(1, config.state, lr=0.1)
        reveal_type(result)  # reveals: planrt.fl.round_result.RoundResult
        evaluator = ModelEvaluator(workers[0], config, dataset_key="points", batch_size=10, bins=2)
        figures = await evaluator.evaluate(result.state)
        reveal_type(figures)  # reveals: planrt.plans.training.EvaluationResult
        again = await planrt.WebsocketClientWorker.connect("carol", workers[0].address)
        reveal_type(again)  # reveals: planrt.workers.websocket_client.WebsocketClientWorker
        await again.async_close()
        await config.async_send(workers[0])
        fitted = await workers[0].async_fit("points")
        reveal_type(fitted)  # reveals: planrt.workers.results.FitResult
    return result


def jobs() -> tuple[FitResult, EvaluationResult]:
    data = planrt.BaseDataset(torch.randn(20, 3), torch.arange(20) % 2)
    worker = planrt.VirtualWorker("dora", datasets={"points": data})
    config = TrainConfig(nn.Linear(3, 2), F.cross_entropy).send(worker)
    reveal_type(config)  # reveals: planrt.fl.config.TrainConfig
    fitted, loss = worker.fit("points"), worker.fit("points", return_ids=[0])
    reveal_type(loss)  # reveals: torch._tensor.Tensor
    reveal_type(
        federated_avg({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    )  # reveals: torch.nn.modules.linear.Linear
    return fitted, worker.evaluate("points")


if __name__ == "__main__":
    pointers()
    modules()
    shares()
    plans()
    asyncio.run(rounds())
    jobs()
    print("all of it ran")
