"""Robust averages, held against their definitions, and against workers that attack the digits."""

import asyncio
import contextlib
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from planrt.errors import OptionError
from planrt.fl import (
    CoordinateMedian,
    Krum,
    MultiKrum,
    RoundScheduler,
    TrainConfig,
    TrimmedMean,
    federated_avg,
)
from planrt.fl.robust import (
    aggregation_called,
    coordinate_median,
    krum,
    krum_scores,
    multi_krum,
    trimmed_mean,
)
from planrt.workers import BaseDataset, VirtualWorker
from tests.fl.lying import flipped, lie
from tests.models import classification_data, seeded_classifier


def states(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "w": torch.randn(3, 4, generator=generator),
            "half": torch.randn(5, generator=generator).half(),
            "z": torch.randn(2, 2, generator=generator, dtype=torch.complex64),
            "steps": torch.tensor(number),
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
def test_the_median_is_that_of_every_coordinate(count):
    given = states(count)
    found = coordinate_median(given)
    values = torch.stack([state["w"] for state in given]).double()
    assert torch.allclose(found["w"].double(), values.quantile(0.5, dim=0))
    real = torch.stack([state["z"].real for state in given]).double()
    assert torch.allclose(found["z"].real.double(), real.quantile(0.5, dim=0))
    assert found["half"].dtype == torch.float16
    assert found["steps"].item() == 0


def test_the_trimmed_mean_leaves_out_the_ends():
    given = states(7)
    ordered = torch.stack([state["w"] for state in given]).sort(dim=0).values
    assert torch.allclose(trimmed_mean(given, 2)["w"], ordered[2:5].mean(dim=0))
    assert torch.allclose(trimmed_mean(given, 0)["w"], ordered.mean(dim=0))
    assert torch.equal(trimmed_mean(given, 3)["w"], coordinate_median(given)["w"])


def test_krum_takes_the_state_that_is_nearest_to_the_others():
    given = states(9)
    flat = [
        torch.cat([s["w"].flatten(), s["half"].float(), torch.view_as_real(s["z"]).flatten()]).double()
        for s in given
    ]
    for bad in (0, 1, 2, 3):
        scores = [
            sum(
                sorted(float((one - other).square().sum()) for other in flat if other is not one)[
                    : 9 - bad - 2
                ]
            )
            for one in flat
        ]
        assert krum_scores(given, bad) == pytest.approx(scores)
        best = min(range(9), key=scores.__getitem__)
        assert all(torch.equal(krum(given, bad)[name], value) for name, value in given[best].items())
        chosen = sorted(sorted(range(9), key=scores.__getitem__)[:3])
        wanted = federated_avg([given[index] for index in chosen])
        assert all(torch.equal(multi_krum(given, bad, 3)[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(
    "make",
    [coordinate_median, lambda s: trimmed_mean(s, 2), lambda s: krum(s, 2), lambda s: multi_krum(s, 2)],
    ids=["median", "trimmed", "krum", "multi-krum"],
)
@pytest.mark.parametrize("wild", [1e30, -torch.inf, torch.nan])
def test_two_wild_states_of_seven_stay_without_effect_and_nothing_given_is_changed(make, wild):
    honest = [{"w": state["w"]} for state in states(5)]
    values = torch.stack([state["w"] for state in honest])
    for places in itertools.combinations(range(7), 2):
        given = list(honest)
        for place in places:
            given.insert(place, {"w": torch.full((3, 4), wild)})
        before = [state["w"].clone() for state in given]
        found = make(given)["w"]
        assert bool(((found >= values.amin(0)) & (found <= values.amax(0))).all())
        for state, old in zip(given, before, strict=True):
            assert torch.equal(state["w"].nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize(
    ("make", "count", "words"),
    [
        (coordinate_median, 0, "the coordinate median needs at least 1 workers that count, and there are 0"),
        (lambda given: trimmed_mean(given, 2), 4, "trim=2 needs at least 5 workers"),
        (lambda given: krum(given, 2), 6, "byzantine=2 needs at least 7 workers"),
        (lambda given: multi_krum(given, 1, 5), 7, "keeps 1 to 4, not 5"),
    ],
)
def test_too_few_states_are_refused(make, count, words):
    with pytest.raises(OptionError, match=words):
        make(states(count))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("median", CoordinateMedian),
        ("trimmed-mean:2", TrimmedMean),
        ("krum:1", Krum),
        ("multi-krum:0", MultiKrum),
    ],
)
def test_names_on_the_command_line(text, kind):
    assert type(aggregation_called(text)) is kind
    assert aggregation_called("mean") is None


@pytest.mark.parametrize("text", ["", "Median", "krum", "krum:", "krum:-1", "krum:x", "krum:1:2", "median:1"])
def test_other_names_are_refused(text):
    with pytest.raises(OptionError, match="use mean, median, trimmed-mean:N"):
        aggregation_called(text)


def test_a_scheduler_says_at_once_that_there_are_too_few_workers_for_it():
    job = TrainConfig(seeded_classifier(), F.nll_loss)
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(VirtualWorker(f"w{n}", datasets={"d": classification_data(n)}))
            for n in range(5)
        ]
        for options, words in [
            (
                {"aggregation": Krum(2)},
                "Krum(byzantine=2) needs at least 7 workers in a round, and there are 5",
            ),
            (
                {"aggregation": TrimmedMean(2), "min_workers": 4},
                "TrimmedMean(trim=2) needs at least 5 workers in a round, and min_workers=4 would let fewer count",
            ),
        ]:
            with pytest.raises(OptionError, match=re.escape(words)):
                RoundScheduler(workers, job, dataset_key="d", seed=1, **options)
        weighted = RoundScheduler(
            workers, job, dataset_key="d", seed=1, weighted=True, aggregation=CoordinateMedian()
        )
        asyncio.run(weighted.prepare())
        with pytest.raises(OptionError, match="counts every worker the same"):
            asyncio.run(weighted.run_round(1, job.state))


# --------------------------------------------------------------------- an attack on the digits

ATTACKERS = ("w3", "w8")


@pytest.fixture(scope="module")
def digits():
    """Ten workers with a tenth of the training digits each; the test images."""
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    data = torch.tensor(raw.data, dtype=torch.float32)[order] / 16
    target = torch.tensor(raw.target)[order]
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                VirtualWorker(
                    f"w{n}", datasets={"d": BaseDataset(data[n:1500:10], target[n:1500:10])}, auto_add=False
                )
            )
            for n in range(10)
        ]
        yield workers, data[1500:], target[1500:]


def accuracy(digits, aggregation=None):
    workers, data, target = digits
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    job = TrainConfig(model, F.cross_entropy, batch_size=15, epochs=2, optimizer_args={"lr": 0.2})

    async def main():
        scheduler = RoundScheduler(workers, job, dataset_key="d", seed=1, aggregation=aggregation)
        await scheduler.prepare()
        state = job.state
        for number in range(1, 13):
            state = (await scheduler.run_round(number, state)).state
        return state

    model.load_state_dict(asyncio.run(main()))
    return 100 * float((model(data).argmax(1) == target).float().mean())


def test_two_of_ten_workers_with_sign_flipped_tenfold_updates(digits, monkeypatch):
    honest = accuracy(digits)
    assert honest > 90
    lie(monkeypatch, **dict.fromkeys(ATTACKERS, flipped(10.0)))
    assert accuracy(digits) < 50  # the plain average collapses
    for robust in (CoordinateMedian(), TrimmedMean(2), Krum(2), MultiKrum(2)):
        assert accuracy(digits, robust) >= honest - 2, robust
