"""An error inside a model says where: worker, batch, module and the user's line, whatever way the model was run."""

from __future__ import annotations

import asyncio

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import planrt
from planrt.errors import PlanrtError, RemoteError
from planrt.fl import RoundScheduler, TrainConfig
from planrt.fl.utils import evaluate_model_on_worker, fit_model_on_worker
from tests.plans.nets import line_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.words = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.stem(x)
        return self.head(hidden + self.words(x[:, 0].long()))  # here


def dataset(rows=5, *, word=0.0):
    x = torch.rand(rows, 3) / 2
    x[:, 0] = word
    return TensorDataset(x, torch.zeros(rows, dtype=torch.int64))


def failing(make_worker, data, **options):
    worker = make_worker("bob", {"d": data})
    with pytest.raises(RemoteError) as caught:
        asyncio.run(
            fit_model_on_worker(
                worker, Net(), 4, 1, -1, 0.1, dataset_key="d", loss_fn=F.cross_entropy, **options
            )
        )
    return str(caught.value)


def test_a_last_batch_of_one(make_worker):
    said = failing(make_worker, dataset(5))
    assert "worker 'bob'" in said
    assert "Expected more than 1 value per channel" in said
    assert "in batch 1, of 1 sample" in said
    assert "module stem.1 (BatchNorm1d)" in said


def test_a_round_names_module_and_line(make_worker):
    workers = [make_worker("ann", {"d": dataset(4)}), make_worker("bob", {"d": dataset(4, word=9.0)})]

    async def go():
        config = TrainConfig(Net(), F.cross_entropy, batch_size=4)
        scheduler = RoundScheduler(workers, config, dataset_key="d", seed=1)
        await scheduler.prepare()
        await scheduler.run_round(1, config.state)

    with pytest.raises(RemoteError) as caught:
        asyncio.run(go())
    assert caught.value.worker_id == "bob"
    assert "module words (Embedding)" in str(caught.value)
    assert line_of(Net.forward) in str(caught.value)


def test_evaluation_names_them_too(make_worker):
    worker = make_worker("bob", {"d": dataset(4, word=9.0)})
    with pytest.raises(RemoteError) as caught:
        evaluate_model_on_worker("m", worker, "d", Net(), 2, 4, loss_fn=F.cross_entropy)
    assert "module words (Embedding)" in str(caught.value)
    assert "in batch 0, of 4 samples" in str(caught.value)
    assert line_of(Net.forward) in str(caught.value)


WAYS = {
    "run": lambda plan, x, worker: worker.run(plan, x),
    "a pointer": lambda plan, x, worker: plan.send(worker)(x.send(worker)).get(),
    "here": lambda plan, x, worker: plan(x),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_names_them_too(make_worker, way):
    planrt.TorchHook(torch)
    worker = make_worker("bob")
    net = Net()
    net.eval()
    plan = planrt.func2plan(net)
    plan.build(torch.zeros(2, 3))
    with pytest.raises(PlanrtError) as caught:
        WAYS[way](plan, torch.full((2, 3), 9.0), worker)
    assert "module words (Embedding)" in str(caught.value)
    assert line_of(Net.forward) in str(caught.value)
