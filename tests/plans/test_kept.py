"""What Python code keeps between calls, and random numbers that are not torch's: never frozen in silence."""

from __future__ import annotations

import asyncio
import collections
import copy
import itertools
import random
import re
import time
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import line_of
from torch import nn

import planrt
from planrt.errors import PlanWarning, TraceError
from planrt.fl import RoundScheduler, TrainConfig

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.start()

    def start(self):
        """What the module begins with."""


class Counts(Base):
    def start(self):
        self.calls = 0

    def forward(self, x):
        self.calls += 1  # here
        return self.fc(x) * self.calls


class Hidden(Base):
    def start(self):
        self.hidden = None

    def forward(self, x):
        h = self.fc(x) if self.hidden is None else self.fc(x) + self.hidden
        self.hidden = h.detach()  # here
        return h


class RunningMean(Base):
    def start(self):
        self.mean = torch.zeros(3)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()  # here
        return self.fc(x - self.mean)


class History(Base):
    def start(self):
        self.history = []

    def forward(self, x):
        self.history.append(1)  # here
        return self.fc(x) / len(self.history)


class Table(Base):
    def start(self):
        self.seen = {"n": 0}

    def forward(self, x):
        self.seen["n"] = self.seen["n"] + 1
        return self.fc(x) + self.seen["n"]


class Queue(Base):
    def start(self):
        self.queue = collections.deque([1.0, 2.0, 3.0])

    def forward(self, x):
        self.queue.rotate(1)
        return self.fc(x) * self.queue[0]


class Meter:
    def __init__(self):
        self.count = 0

    def update(self):
        self.count += 1
        return self.count


class Metered(Base):
    def start(self):
        self.meter = Meter()

    def forward(self, x):
        return self.fc(x) * self.meter.update()


class Inside(Base):
    def start(self):
        self.inner = Counts()

    def forward(self, x):
        return self.inner(x)


class Alternates(Base):
    def start(self):
        self.flip = False

    def forward(self, x):
        self.flip = not self.flip
        return self.fc(x) if self.flip else x


CALLS = 0
LOG = []


class Global(Base):
    def forward(self, x):
        global CALLS
        CALLS += 1
        return self.fc(x) * CALLS


KEEPING = {
    Counts: "self.calls of Counts",
    Hidden: "self.hidden of Hidden",
    RunningMean: "self.mean of RunningMean",
    History: "self.history[...] of History",
    Table: "self.seen['n'] of Table",
    Queue: "self.queue[...] of Queue",
    Metered: "self.meter.count of Metered",
    Inside: "self.calls of inner (Counts)",
    Alternates: "self.flip of Alternates",
    Global: "global CALLS",
}


def ways(model):
    """Everything that records a model."""
    yield lambda: planrt.Plan(model).build(X)
    yield lambda: planrt.func2plan()(lambda x: model(x)).build(X)
    yield lambda: TrainConfig(model, F.mse_loss, example=(X, X))
    yield lambda: planrt.func2plan()(lambda model, x: model(x)).build(model, X)


@pytest.mark.filterwarnings("ignore:plan .* captured")
@pytest.mark.parametrize("kind", KEEPING, ids=lambda kind: kind.__name__)
def test_what_a_call_keeps_for_the_next_is_refused_by_name(kind):
    model = kind()
    before = {
        key: copy.copy(value)
        for key, value in vars(model).items()
        if not isinstance(value, torch.Tensor | Meter)
    }
    for record in ways(model):
        with pytest.raises(TraceError, match="keeps something from call to call.*register_buffer") as caught:
            record()
        assert KEEPING[kind].split(" of ")[0].split("[")[0] in str(caught.value)
    with pytest.raises(TraceError, match=re.escape(KEEPING[kind])):
        planrt.Plan(model).build(X)
    assert {key: vars(model)[key] for key in before} == before, "recording left something"


@pytest.mark.parametrize("kind", [Counts, Hidden, RunningMean, History])
def test_the_line_is_where_it_is_kept(kind):
    with pytest.raises(TraceError) as caught:
        planrt.Plan(kind()).build(X)
    assert caught.value.line == line_of(kind.forward)


class NotesShape(Base):
    def forward(self, x):
        self.last_shape, self.last = x.shape, x
        self.weights = self.fc(x).softmax(-1)
        return self.weights


class CachedMask(Base):
    """As in torch's own tutorials: made anew where the size is another."""

    def start(self):
        self.mask = None

    def forward(self, x):
        if self.mask is None or self.mask.size(0) != x.size(0):
            self.mask = torch.triu(torch.full((x.size(0), x.size(0)), float("-inf")), 1)
        return (x @ x.T + self.mask).softmax(-1) @ self.fc(x)


class CachedTable(Base):
    def start(self):
        self.tables = {}

    def forward(self, x):
        if 3 not in self.tables:
            self.tables[3] = torch.arange(3.0)
        return self.fc(x) + self.tables[3]


class Buffered(Base):
    def start(self):
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.fc(x) * self.calls


@pytest.mark.parametrize("kind", [NotesShape, CachedMask, CachedTable, Buffered])
def test_what_is_only_noted_or_cached_is_no_matter(kind):
    model = kind()
    plan = planrt.Plan(copy.deepcopy(model)).build(X)
    for x in (X, X * 2, X[:3]):
        torch.testing.assert_close(plan(x), model(x), rtol=0, atol=0)


class Logs(Base):
    def start(self):
        self.calls, self.outputs = 0, []

    def forward(self, x):
        self.calls += 1
        self.outputs.append(x.mean())
        LOG.append(1)
        return self.fc(x)


def test_what_goes_on_changing_is_warned_of_once():
    model = Logs()
    with pytest.warns(
        PlanWarning,
        match=r"changes global LOG.*, self.calls of Logs, self.outputs\[...\] of Logs at every call",
    ) as caught:
        plan = planrt.Plan(model).build(X)
    assert len({str(one.message) for one in caught}) == 1
    assert {one.filename for one in caught} == {__file__}
    assert (model.calls, model.outputs, LOG) == (0, [], [])
    torch.testing.assert_close(plan(X), model.fc(X))


def test_a_counter_in_a_closure_is_seen():
    count = 0

    def f(x):
        nonlocal count
        count += 1
        return x * count

    with pytest.raises(TraceError, match="variable count"):
        planrt.func2plan()(f).build(X)
    assert count == 0


class Slotted:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0

    def __next__(self):
        self.count += 1
        return self.count


def numbers():
    yield from range(1, 100)


@pytest.mark.parametrize("make", [itertools.count, numbers, Slotted])
@pytest.mark.parametrize("free", [[(0,)], [()]])
def test_what_cannot_be_looked_into_is_found_by_what_it_does(make, free):
    kept = make()

    def f(x):
        return x * next(kept)  # here

    with pytest.raises(TraceError, match="something else each time it is called") as caught:
        planrt.func2plan()(f).build(X, free_dims=free)
    assert caught.value.line == line_of(f)


def test_a_clock_is_no_matter_of_sizes():
    with pytest.raises(TraceError, match="a clock, a counter"):
        planrt.func2plan()(lambda x: x * time.perf_counter()).build(X)


# -------------------------------------------------------------------------------------------- random numbers


class Drops(Base):
    def start(self):
        self.python, self.numpy, self.old = (
            random.Random(1),
            np.random.default_rng(1),
            np.random.RandomState(1),
        )


def drawing(draw):
    class Net(Drops):
        def forward(self, x):
            for _ in range(2):
                if draw(self) < 0.1:
                    continue
                x = torch.relu(self.fc(x))
            return self.fc(x)

    return Net()


DRAWS = {
    "random.random": (lambda net: random.random(), "Python's random numbers"),
    "random.choice": (lambda net: random.choice([0.0, 1.0]), "Python's random numbers"),
    "random.shuffle": (
        lambda net: (lambda x: (random.shuffle(x), x[0])[1])([0.0, 0.5, 1.0]),
        "Python's random numbers",
    ),
    "np.random.rand": (lambda net: np.random.rand(), "NumPy's random numbers"),
    "np.random.binomial": (lambda net: np.random.binomial(1, 0.5), "NumPy's random numbers"),
    "random.Random": (lambda net: net.python.random(), "self.python of Net"),
    "Generator": (lambda net: net.numpy.random(), "self.numpy of Net"),
    "RandomState": (lambda net: net.old.rand(), "self.old of Net"),
}


@pytest.mark.filterwarnings("ignore:plan .* captured")
@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_that_are_not_torchs_are_refused(name):
    draw, whose = DRAWS[name]
    model = drawing(draw)
    for seed in range(4):
        random.seed(seed), np.random.seed(seed)
        for record in ways(model):
            with pytest.raises(TraceError, match=rf"draws .*{re.escape(whose.split(' of')[0])}.*torch\.rand"):
                record()


def test_the_line_of_a_draw_is_told():
    def f(x):
        noise = random.random()
        return x * noise  # here

    with pytest.raises(TraceError) as caught:
        planrt.func2plan()(f).build(X)
    assert caught.value.line == line_of(f)


def test_a_draw_that_nothing_follows_is_refused_too():
    def f(x):
        y = x + 1
        random.random()
        return y

    with pytest.raises(TraceError, match="Python's random numbers"):
        planrt.func2plan()(f).build(X)


def test_what_is_written_instead_draws_anew_at_every_run():
    class LayerDrop(Base):
        def forward(self, x):
            if not self.training:
                return self.fc(x)
            return torch.where(torch.rand(()) < 0.5, x, self.fc(x))

    model = LayerDrop()
    plan = planrt.Plan(model).build(X)
    torch.manual_seed(0)
    kept = [torch.equal(plan(X), X) for _ in range(20)]
    assert 0 < sum(kept) < 20


def test_a_model_that_keeps_something_is_refused_before_a_round(make_worker):
    worker = make_worker("bob", {"d": planrt.BaseDataset(X, X)})
    config = TrainConfig(Counts(), F.mse_loss)
    scheduler = RoundScheduler([worker], config, dataset_key="d", seed=1)
    with pytest.raises(TraceError, match=r"self\.calls of Counts"):
        asyncio.run(scheduler.prepare())


def test_recording_leaves_a_counting_model_as_it_was():
    model = Logs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planrt.Plan(model).build(X)
        model(X)
        planrt.Plan(model).build(X)
    assert model.calls == 1
    assert len(model.outputs) == 1
    LOG.clear()
