"""What a client and its worker keep for a connection that is cut, once they rest: counted in bytes, after real work."""

import asyncio
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import planrt
from planrt.fl import RoundScheduler, TrainConfig
from planrt.workers import BaseDataset
from tests.processes import eventually

WORKERS = 12


@pytest.fixture(autouse=True, scope="module")
def hook():
    """Tensors have `send` from here on."""
    return planrt.TorchHook(torch)


def living():
    """Bytes of all tensors of this process, each memory once."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if type(one) is torch.Tensor or type(one) is nn.Parameter:
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_after_a_round_nothing_is_left_of_what_each_worker_answered(make_worker):
    # 1 MB of parameters: an answer that the client did not say at once to have, so that every worker kept its last one
    model = nn.Sequential(nn.Linear(8, 500), nn.Tanh(), nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 2))
    nbytes = sum(one.nbytes for one in model.parameters())
    generator = torch.Generator().manual_seed(1)
    data = [
        BaseDataset(torch.randn(16, 8, generator=generator), torch.randint(2, (16,), generator=generator))
        for _ in range(WORKERS)
    ]
    workers = [make_worker(f"worker{number}", {"points": one}) for number, one in enumerate(data)]
    config = TrainConfig(model, F.cross_entropy, batch_size=8, max_nr_batches=1)
    scheduler = RoundScheduler(workers, config, dataset_key="points", seed=1)

    async def rounds():
        await scheduler.prepare()
        state = config.state
        for number in range(2):
            state = (await scheduler.run_round(number, state)).state
        return state

    before = living()
    state = asyncio.run(rounds())
    assert eventually(lambda: living() - before < 4 * nbytes)
    assert {one.shape for one in state.values()} == {one.shape for one in model.state_dict().values()}


def test_what_was_sent_is_the_senders_no_more(make_worker):
    worker = make_worker("bob")
    arrays = [np.full(100_000, number, dtype=np.float32) for number in range(9)]  # 0.4 MB each
    there = [weakref.ref(one) for one in arrays]
    pointers = [torch.from_numpy(one).send(worker) for one in arrays]
    arrays.clear()
    assert eventually(lambda: gc.collect() >= 0 and sum(one() is not None for one in there) <= 3)  # 1 MiB
    assert [one.get()[0].item() for one in pointers] == list(range(9))


@pytest.mark.parametrize("size", [10, 100_000, 3_000_000])
def test_a_session_goes_on_after_answers_that_nobody_keeps(make_worker, size):
    worker = make_worker("bob")
    x = torch.arange(float(size)).send(worker)
    for turn in range(1, 4):
        answers = [(x + turn).get() for _ in range(3)]
        x.add_(1)
        worker.close()
        worker.connect()
        assert all(torch.equal(one, torch.arange(float(size)) + 2 * turn - 1) for one in answers)
        assert torch.equal((x * 1).get(), torch.arange(float(size)) + turn)
