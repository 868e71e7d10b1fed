"""Memory stays flat over 100 rounds of every public loop: live models and tensors are counted, on all sides."""

import asyncio
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planrt.fl import (
    RoundScheduler,
    TrainConfig,
    evaluate_model_on_worker,
    federated_avg,
    fit_model_on_worker,
)
from planrt.torch_hook import TorchHook
from planrt.workers import BaseDataset
from tests.processes import eventually

ROUNDS, SETTLED = 100, 20


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x)


def alive():
    """How many models and tensors there are. Here, and on the workers, which are in this process."""
    gc.collect()
    found = gc.get_objects()
    kinds = [type(one) for one in found]  # isinstance would wake proxies
    return sum(issubclass(kind, Net) for kind in kinds), sum(issubclass(kind, torch.Tensor) for kind in kinds)


def check_flat(do_round):
    counts = []
    for number in range(ROUNDS):
        do_round(number)
        if number in (SETTLED, ROUNDS - 1):
            counts.append(alive())
    early, late = counts
    # The thread of planrt's loop may hold the last round's results for a moment after they have been handed over.
    assert eventually(lambda: alive()[0] <= early[0]), "models pile up"
    assert late[1] <= early[1] + 30, (
        f"tensors pile up: {early[1]} after {SETTLED} rounds, {late[1]} at the end"
    )


@pytest.fixture
def workers(make_worker):
    TorchHook(torch)
    torch.manual_seed(0)
    return [
        make_worker(id, {"d": BaseDataset(torch.randn(4, 4), torch.randint(0, 3, (4,)))})
        for id in ("alice", "bob")
    ]


def test_run_round(workers):
    config = TrainConfig(Net(), F.cross_entropy, batch_size=4)
    scheduler = RoundScheduler(workers, config, dataset_key="d", seed=0)
    asyncio.run(scheduler.prepare())
    held = {"state": config.state}

    def do_round(number):
        held["state"] = asyncio.run(scheduler.run_round(number, held["state"], keep_worker_states=True)).state

    check_flat(do_round)


def test_the_tutorials_loop(workers):
    held = {"model": Net()}

    async def do_round(number):
        fits = [
            fit_model_on_worker(
                worker, held["model"], 4, number, 1, 0.1, dataset_key="d", loss_fn=F.cross_entropy
            )
            for worker in workers
        ]
        held["model"] = federated_avg({id: model for id, model, _ in await asyncio.gather(*fits)})

    check_flat(lambda number: asyncio.run(do_round(number)))


def test_fits_and_evaluations_of_one_config(workers):
    config = TrainConfig(Net(), F.cross_entropy, batch_size=4)
    config.trace_for(workers[0], "d")

    async def do_round(number):
        for worker in workers:
            await config.fit(worker, config.state, dataset_key="d", seed=number)
            await config.evaluate(worker, config.state, dataset_key="d", batch_size=4, bins=3)

    check_flat(lambda number: asyncio.run(do_round(number)))


def test_a_config_that_is_sent_every_round(workers):
    def do_round(number):
        config = TrainConfig(Net(), F.cross_entropy, batch_size=4, optimizer="Adam")
        for worker in workers:
            config.send(worker)
            worker.fit("d")
            worker.evaluate("d")

    check_flat(do_round)


def test_evaluations_of_new_models(workers):
    check_flat(
        lambda number: evaluate_model_on_worker("m", workers[0], "d", Net(), 3, 4, loss_fn=F.cross_entropy)
    )


def test_a_loop_over_pointers(workers):
    held = {"model": Net()}
    data = [(torch.randn(4, 4).send(worker), torch.randint(0, 3, (4,)).send(worker)) for worker in workers]

    def do_round(number):
        models = {}
        for worker, (x, y) in zip(workers, data, strict=True):
            model = copy.deepcopy(held["model"])
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model.send(worker)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            models[worker.id] = model.get()
        held["model"] = federated_avg(models)

    check_flat(do_round)
    assert [worker.objects_count() for worker in workers] == [2, 2]
