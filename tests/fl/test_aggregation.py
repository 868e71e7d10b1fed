"""`RoundScheduler(aggregation=...)`: what makes one state of those that the workers return."""

import asyncio
import inspect
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F

from planrt.errors import OptionError
from planrt.fl import Aggregation, RoundScheduler, TrainConfig
from tests.models import classification_data, seeded_classifier

IDS = ["alice", "bob", "charlie"]


def config():
    return TrainConfig(seeded_classifier(), F.nll_loss, batch_size=8, optimizer_args={"lr": 0.1})


@pytest.fixture
def workers(make_worker):
    return [make_worker(id, {"d": classification_data(number)}) for number, id in enumerate(IDS)]


def run_round(workers, job=None, *, keep=False, **options):
    async def one():
        scheduler = RoundScheduler(workers, job or config(), dataset_key="d", seed=7, **options)
        await scheduler.prepare()
        return await scheduler.run_round(1, scheduler.config.state, keep_worker_states=keep)

    return asyncio.run(one())


def documented_median():
    """The class that the docstring of `Aggregation` shows, as it stands there."""
    found = re.search(r"::\n\n(    class .*?)\n\n    scheduler =", inspect.getdoc(Aggregation), re.DOTALL)
    names = {"torch": torch}
    exec(textwrap.dedent(found[1]), names)
    return names["CoordinateMedian"]()


class Collecting:
    """Keeps everything, and returns the first state."""

    def __init__(self):
        self.weights = []

    def init(self):
        return []

    def add(self, states, entries, weight):
        self.weights.append(weight)
        return [*states, entries]

    def result(self, states):
        return states[0]


def test_the_median_of_the_documentation_is_the_median_of_what_the_workers_returned(workers):
    result = run_round(workers, aggregation=documented_median(), keep=True)
    for name, value in result.state.items():
        states = torch.stack([result.worker_states[id][name] for id in IDS])
        assert torch.equal(value, states.median(dim=0).values)
    assert not torch.equal(result.state["first.weight"], run_round(workers).state["first.weight"])


def test_one_worker_with_a_wild_state_does_not_move_the_median(workers, make_worker):
    wild = classification_data(2)
    wild.data.mul_(1e6)
    attacker = make_worker("mallory", {"d": wild})
    honest = run_round(workers[:2], aggregation=documented_median(), keep=True)
    attacked = run_round([*workers[:2], attacker], aggregation=documented_median())
    for name, value in attacked.state.items():
        both = torch.stack([honest.worker_states[id][name] for id in IDS[:2]])
        assert bool(((value >= both.amin(0)) & (value <= both.amax(0))).all())


def test_states_come_in_the_order_of_the_ids_with_their_weights(workers):
    kept = Collecting()
    first = run_round(workers[::-1], aggregation=kept, keep=True, weighted=True)
    assert kept.weights == [60.0, 60.0, 60.0]
    alices = first.worker_states["alice"]
    assert all(torch.equal(first.state[name], alices[name]) for name in alices)


def test_the_default_is_the_mean_and_one_object_serves_many_rounds(workers):
    class Mean:
        def init(self):
            return []

        def add(self, states, entries, weight):
            states.append(entries)
            return states

        def result(self, states):
            return {
                name: value if value.dtype == torch.int64 else sum(one[name] for one in states) / len(states)
                for name, value in states[0].items()
            }

    mean = Mean()
    own, again = (run_round(workers, aggregation=mean).state for _ in range(2))
    for name, value in run_round(workers).state.items():
        assert torch.allclose(value.double(), own[name].double())
        assert torch.equal(own[name], again[name])


def test_what_it_overwrites_is_not_what_is_kept_for_the_caller(workers):
    class Spoiling(Collecting):
        def add(self, states, entries, weight):
            for value in entries.values():
                value.fill_(0.0)
            return [*states, entries]

    result = run_round(workers, aggregation=Spoiling(), keep=True)
    plain = run_round(workers, keep=True)
    assert all(not value.any() for value in result.state.values())
    for id, state in plain.worker_states.items():
        assert all(torch.equal(result.worker_states[id][name], value) for name, value in state.items())


class Changing(Collecting):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def result(self, states):
        return self.change(dict(states[0]))


def without_one(entries):
    entries.pop("first.weight")
    return entries


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_one, "differ: first.weight"),
        (lambda entries: {**entries, "more": torch.zeros(1)}, "differ: more"),
        (
            lambda entries: {**entries, "first.weight": entries["first.weight"].double()},
            "'first.weight' must be float32",
        ),
        (
            lambda entries: {**entries, "first.weight": entries["first.weight"][:1]},
            "'first.weight' must be float32",
        ),
        (lambda entries: {**entries, "first.weight": 3.0}, "not float"),
        (lambda entries: list(entries.values()), "tensors by name, not a list"),
        (lambda entries: None, "tensors by name, not a NoneType"),
    ],
)
def test_a_result_that_is_no_state_is_refused_by_name(workers, change, words):
    with pytest.raises(OptionError, match=re.escape(words)):
        run_round(workers, aggregation=Changing(change))


def test_an_add_that_returns_nothing_is_told_so_and_the_workers_go_on(workers):
    class Forgetful(Collecting):
        def add(self, states, entries, weight):
            states.append(entries)

    with pytest.raises(OptionError, match="add of Forgetful returned None"):
        run_round(workers, aggregation=Forgetful())
    assert run_round(workers).loss > 0


def test_an_error_of_its_own_comes_out_as_it_is(workers):
    class Broken(Collecting):
        def add(self, states, entries, weight):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        run_round(workers, aggregation=Broken())


class Waiting(Collecting):
    async def add(self, states, entries, weight):
        return states


class Wide(torch.nn.Module):
    """More than 8 MB: such states are added up in a thread."""

    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Linear(6, 400_000)
        self.last = torch.nn.Linear(6, 3)

    def forward(self, x):
        return F.log_softmax(self.last(x) + self.wide(x)[:, :3], dim=1)


def test_large_states_are_added_in_the_same_order_and_in_place(workers):
    async def rounds():
        torch.manual_seed(0)
        job = TrainConfig(Wide(), F.nll_loss, batch_size=30, optimizer_args={"lr": 0.1})
        scheduler = RoundScheduler(
            workers, job, dataset_key="d", seed=7, aggregation=documented_median(), hold=0
        )
        await scheduler.prepare()
        before = {name: value.clone() for name, value in job.state.items()}
        result = await scheduler.run_round(1, before, keep_worker_states=True, in_place=True)
        for name, value in before.items():
            states = torch.stack([result.worker_states[id][name] for id in IDS])
            assert torch.equal(value, states.median(dim=0).values)
            assert torch.equal(value, result.state[name])

    asyncio.run(rounds())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Waiting(), "write def, not async def"),
        (Collecting, "not a class: write Collecting()"),
        (torch.mean, "lacks init, add, result"),
        ("mean", "a str lacks init, add, result"),
    ],
)
def test_what_is_no_aggregation_is_refused_at_once(workers, given, words):
    with pytest.raises(OptionError, match=re.escape(words)):
        RoundScheduler(workers, config(), dataset_key="d", seed=1, aggregation=given)
