"""Updates are looked at before they count: what a worker returns that cannot, leaves it out and names it."""

import asyncio
import logging
import re

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planrt.errors import QuorumError, UpdateRefusedError
from planrt.fl import RoundScheduler, TrainConfig, federated_avg
from planrt.fl.updates import check_update, most_samples, update_norm
from planrt.workers import BaseDataset
from planrt.workers.machine.rounds.batches import as_batches, iterate
from planrt.workers.results import FitResult
from tests.fl.lying import flipped, lie, saying, with_first
from tests.models import classification_data, seeded_classifier

IDS = ["alice", "bob", "charlie"]


@pytest.fixture
def workers(make_worker):
    return [make_worker(id, {"d": classification_data(number)}) for number, id in enumerate(IDS)]


def config(**options):
    return TrainConfig(seeded_classifier(), F.nll_loss, batch_size=8, optimizer_args={"lr": 0.1}, **options)


def run_round(workers, job=None, **options):
    async def one():
        made = RoundScheduler(workers, job or config(), dataset_key="d", seed=7, **options)
        await made.prepare()
        return await made.run_round(1, made.config.state, keep_worker_states=True)

    return asyncio.run(one())


def infinite(tensor):
    tensor.view(-1)[0] = torch.inf
    return tensor


def no_number(tensor):
    tensor.view(-1)[-1] = torch.nan
    return tensor


LIES = {
    "nan": (with_first(no_number), "refused", r"'first.weight' of its update has 1 values that are infinite"),
    "inf": (with_first(infinite), "refused", r"'first.weight' of its update has 1 values that are infinite"),
    "shape": (with_first(lambda one: one[:1]), "refused", r"'first.weight' of its update is float32\[1, 6\]"),
    "dtype": (with_first(lambda one: one.double()), "refused", r"is float64\[16, 6\], not float32\[16, 6\]"),
    "samples": (saying(samples=10**9), "refused", r"1,000,000,000 samples.* gives 60 in 8"),
    "batches": (saying(batches=9), "refused", r"in 9 batches.* gives 60 in 8"),
    "fewer entries": (
        lambda fitted, sent, trained: (
            msgspec.structs.replace(fitted, changed=fitted.changed[1:]),
            trained[1:],
        ),
        "refused",
        r"these differ: first.weight",
    ),
    "no tensors": (lambda fitted, sent, trained: (fitted, []), "refused", r"0 tensors for \d+ entries"),
    "entries that are not there": (
        lambda fitted, sent, trained: (
            msgspec.structs.replace(fitted, changed=[10**6, *fitted.changed[1:]]),
            trained,
        ),
        "refused",
        r"tensors for \d+ entries, of",
    ),
    "one entry twice": (
        lambda fitted, sent, trained: (
            msgspec.structs.replace(fitted, changed=[fitted.changed[1], *fitted.changed[1:]]),
            trained,
        ),
        "refused",
        r"tensors for \d+ entries, of",
    ),
}


@pytest.mark.parametrize("lie_of", LIES)
def test_what_cannot_count_leaves_its_worker_out_by_name(workers, monkeypatch, caplog, lie_of):
    change, kind, says = LIES[lie_of]
    honest = run_round(workers)
    lie(monkeypatch, bob=change)
    with caplog.at_level(logging.WARNING, "planrt.fl"):
        result = run_round(workers, min_workers=2, weighted=True)
    assert result.workers.keys() == {"alice", "charlie"}
    assert result.missing["bob"].kind == kind

    assert re.search(says, result.missing["bob"].why), result.missing["bob"].why
    wanted = federated_avg(
        {id: honest.worker_states[id] for id in ("alice", "charlie")}, {"alice": 60, "charlie": 60}
    )
    assert all(torch.equal(result.state[name], value) for name, value in wanted.items())
    told = [record for record in caplog.records if record.getMessage() == "worker_missing"]
    assert [(record.worker, record.round) for record in told] == [("bob", 1)]
    with pytest.raises(QuorumError, match="bob is refused"):
        run_round(workers, min_workers=3)
    with pytest.raises(UpdateRefusedError, match=says) as caught:
        run_round(workers)
    assert caught.value.worker_id == "bob"


def test_an_update_that_is_too_long_is_left_out(workers, monkeypatch):
    lie(monkeypatch, charlie=flipped(100.0))
    longest = max_norm(run_round(workers, min_workers=3))
    result = run_round(workers, min_workers=2, max_update_norm=longest / 10)
    assert "over max_update_norm" in result.missing["charlie"].why
    assert result.workers.keys() == {"alice", "bob"}
    assert run_round(workers, max_update_norm=2 * longest).missing == {}


def max_norm(result):
    job = config(example=(torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64)))
    return max(update_norm(dict(state), dict(job.state)) for state in result.worker_states.values())


class Masked(nn.Module):
    """A buffer of infinities, which comes back from every worker."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0]))

    def forward(self, x):
        return F.log_softmax(self.layer(x), 1) + torch.where(torch.isinf(self.mask), 0.0, self.mask)


def test_infinities_that_were_sent_may_come_back(workers):
    torch.manual_seed(0)
    result = run_round(workers, TrainConfig(Masked(), F.nll_loss, batch_size=8))
    assert result.missing == {}
    assert torch.isinf(result.state["mask"]).tolist() == [False, True, False]


def test_large_finite_values_whose_sum_overflows_count():
    big = torch.full((4,), 3e38)
    result = FitResult("bob", 0.0, 1, 1, {}, {"w": big})
    check_update(result, before={"w": big}, wanted={"w": big}, most=(1, 1))
    half = torch.full((4,), 6e4, dtype=torch.float16)
    check_update(
        FitResult("bob", 0.0, 1, 1, {}, {"w": half}), before={"w": half}, wanted={"w": half}, most=(1, 1)
    )


@pytest.mark.parametrize("length", [0, 1, 7, 8, 17])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("most", [-1, 0, 1, 2, 5])
@pytest.mark.parametrize("epochs", [1, 3])
def test_as_many_samples_may_come_as_training_gives(length, drop_last, most, epochs):
    source = as_batches(BaseDataset(torch.zeros(length, 1), torch.zeros(length)))
    options = {"batch_size": 8, "epochs": epochs, "max_nr_batches": most, "drop_last": drop_last}
    sizes = [len(data) for data, _ in iterate(source, shuffle=True, seed=1, **options)]
    assert most_samples(length, **options) == (sum(sizes), len(sizes))
