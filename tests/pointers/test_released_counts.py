"""Counts under release rules: none that is of a few rows leaves, and no rule takes one row for an aggregate."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planrt
from planrt.errors import PolicyRefusedError
from planrt.fl import TrainConfig
from planrt.plans.policy.rules import Policy, ReleaseRule
from planrt.workers import BaseDataset
from tests.pointers.conftest import OWNER

ROWS, CLASSES = 64, 3
OPEN = Policy(approval="open", release=(ReleaseRule("#patients", min_rows=20),))


class ByValue(nn.Module):
    """Predicts the class that is the row's first number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x):
        return F.one_hot(x[:, 0].long().clamp(0, CLASSES - 1), CLASSES) * self.weight


class Spelled(ByValue):
    """Each row's prediction is a digit of the first row."""

    def forward(self, x):
        digits = (x[:1, :1].long() // (2 ** torch.arange(x.shape[0]))) % 2
        return F.one_hot(digits[0], CLASSES) * self.weight


def patients(counts):
    """As many rows of each class as `counts` says."""
    classes = torch.cat([torch.full((count,), place) for place, count in enumerate(counts)])
    return BaseDataset(classes[:, None].float(), classes)


def evaluated(worker, model, rows=ROWS, **options):
    TrainConfig(model=model, loss_fn=F.cross_entropy, batch_size=rows).send(worker)
    return worker.evaluate("patients", **{"return_histograms": True, "nr_bins": CLASSES, **options})


def test_counts_of_enough_rows_leave(hospital):
    worker = hospital(OPEN, datasets={"patients": patients([24, 20, 20])}, tags=["#patients"])()
    result = evaluated(worker, ByValue())
    assert (result.histogram, result.target_histogram, result.correct) == ([24, 20, 20], [24, 20, 20], 64)


@pytest.mark.parametrize("counts", [(63, 1), (44, 19, 1), (45, 19)])
def test_counts_of_few_rows_stay_and_the_client_is_told(hospital, counts):
    worker = hospital(OPEN, datasets={"patients": patients(counts)}, tags=["#patients"])()
    with pytest.warns(UserWarning, match="lets counts out only where each is of enough rows"):
        result = evaluated(worker, ByValue())
    assert (result.histogram, result.target_histogram, result.correct) == (None, None, None)
    assert result.samples == ROWS


def test_a_class_outside_the_bins_is_a_count_too(hospital):
    worker = hospital(OPEN, datasets={"patients": patients([30, 33, 1])}, tags=["#patients"])()
    with pytest.warns(UserWarning, match="lets counts out"):
        assert evaluated(worker, ByValue(), nr_bins=2).histogram is None


def test_without_a_rule_counts_leave(hospital):
    worker = hospital(Policy(approval="open"), datasets={"patients": patients([63, 1])})()
    assert evaluated(worker, ByValue()).target_histogram == [63, 1, 0]


def test_a_rule_that_does_not_name_counts_lets_none_out(hospital):
    rule = ReleaseRule("#patients", min_rows=20, aggregates=("loss", "sum", "mean"))
    policy = Policy(approval="open", release=(rule,))
    worker = hospital(policy, datasets={"patients": patients([24, 20, 20])}, tags=["#patients"])()
    with pytest.warns(UserWarning, match="lets counts out"):
        assert evaluated(worker, ByValue()).histogram is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluated(worker, ByValue(), return_histograms=False, nr_bins=-1).samples == ROWS


def test_predictions_that_spell_a_row_are_refused(hospital):
    worker = hospital(OPEN, datasets={"patients": patients([24, 20, 20])}, tags=["#patients"])()
    with pytest.raises(PolicyRefusedError, match=r"\[release\]"):
        evaluated(worker, Spelled())


def test_what_has_no_classes_is_said_before_data_is_read(hospital):
    data = BaseDataset(torch.randn(ROWS, 3), torch.randn(ROWS, 1))
    worker = hospital(OPEN, datasets={"patients": data}, tags=["#patients"])()
    TrainConfig(model=nn.Linear(3, 1), loss_fn=F.mse_loss, batch_size=ROWS).send(worker)
    with pytest.raises(planrt.errors.RemoteError, match="no classes to count"):
        worker.evaluate("patients", return_histograms=True, nr_bins=2)
    assert worker.evaluate("patients").samples == ROWS


@planrt.func2plan(args_shape=[(-1, 3)])
def scattered(x):
    return torch.zeros_like(x).scatter(1, torch.zeros(1, 1, dtype=torch.int64), x).sum()


@planrt.func2plan(args_shape=[(-1, 3)])
def scatter_added(x):
    return torch.zeros_like(x).scatter_add(1, torch.zeros(1, 1, dtype=torch.int64), x).sum()


@planrt.func2plan(args_shape=[(-1, 3)])
def scatter_reduced(x):
    return torch.zeros_like(x).scatter_reduce(1, torch.zeros(1, 1, dtype=torch.int64), x, "sum").sum()


@planrt.func2plan(args_shape=[(-1, 3)])
def weighted(x):
    return torch.bincount(torch.arange(x.shape[0]), weights=x[:, 0], minlength=4)


@planrt.func2plan(args_shape=[(-1, 3)])
def by_id(x):
    return torch.bincount(x[:, 0].abs().long())


@planrt.func2plan(args_shape=[(-1, 3)])
def histogram(x):
    return torch.histc(x, 1000, 0, 1000)


@planrt.func2plan(args_shape=[(-1, 3)])
def scattered_whole(x):
    index = torch.zeros(x.shape, dtype=torch.int64)
    return torch.zeros_like(x).scatter_add(1, index, x).sum()


@pytest.fixture
def researcher(hospital):
    limits = dict.fromkeys(["max_flops", "max_memory", "max_output_bytes"])
    connect = hospital(Policy(approval="open", release=OPEN.release, **limits))
    owner = connect(OWNER)
    torch.manual_seed(0)
    torch.randn(ROWS, 3).tag("#patients").send(owner, allowed_users=["owner"])
    owner.objects_count()
    yield connect()
    owner.objects_count()


@pytest.mark.parametrize("attack", [scattered, scatter_added, scatter_reduced, weighted, by_id, histogram])
def test_a_row_does_not_pass_for_an_aggregate(researcher, attack):
    (x,) = researcher.search("#patients")
    with pytest.raises(PolicyRefusedError, match=r"\[release\]"):
        attack.send(researcher)(x).get()


def test_a_scatter_of_all_rows_is_followed(researcher):
    (x,) = researcher.search("#patients")
    torch.manual_seed(0)
    assert torch.allclose(scattered_whole.send(researcher)(x).get(), torch.randn(ROWS, 3).sum(), atol=1e-4)
