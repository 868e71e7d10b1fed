"""The border between a module and its plans' state is an exact inverse, both ways, for modules of any make."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from planrt.errors import OptionError, TraceError
from planrt.fl import RoundScheduler, TrainConfig, federated_avg
from planrt.fl.utils import fit_model_on_worker
from planrt.plans.training import trace_model
from planrt.seeding import derive_seed
from planrt.workers import VirtualWorker
from planrt.workers.machine.rounds.batches import as_batches, iterate

pytestmark = pytest.mark.filterwarnings("ignore::planrt.errors.PlanWarning")  # plain attributes, on purpose

WIDTH = 3
X = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, WIDTH, (6,), generator=torch.Generator().manual_seed(2))


class Part(nn.Module):
    """One step of a generated model. What it holds, and under which names, is drawn."""

    def __init__(self, kinds):
        super().__init__()
        self.kinds = kinds
        if "weight" in kinds:
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)
        if "frozen" in kinds:
            self.frozen = nn.Parameter(torch.rand(WIDTH) + 0.5, requires_grad=False)
        if "saved" in kinds:
            self.register_buffer("saved", torch.zeros(WIDTH))
        if "unsaved" in kinds:
            self.register_buffer("unsaved", torch.zeros(WIDTH), persistent=False)
        if "bound" in kinds:
            self.register_buffer("bound", torch.zeros((), dtype=torch.int64))
        if "unused" in kinds:
            self.unused = nn.Parameter(torch.randn(2))
        if "none" in kinds:
            self.register_parameter("nothing", None)
            self.register_buffer("nowhere", None)
        if "plain" in kinds:
            self.plain = torch.rand(WIDTH) + 0.5
        if "norm" in kinds:
            self.norm = nn.BatchNorm1d(WIDTH)
        if "extra" in kinds:
            self.version = 7

    def get_extra_state(self):
        return {"version": self.version} if "extra" in self.kinds else torch.tensor(3.0)

    def set_extra_state(self, state):
        if "extra" in self.kinds:
            self.version = state["version"]

    def forward(self, x):
        if "weight" in self.kinds:
            x = torch.tanh(x @ self.weight)
        if "frozen" in self.kinds:
            x = x * self.frozen
        if self.training and "saved" in self.kinds:
            with torch.no_grad():
                self.saved.mul_(0.5).add_(x.mean(0))
        if self.training and "unsaved" in self.kinds:
            with torch.no_grad():
                self.unsaved.lerp_(x.mean(0), 0.5)
        if self.training and "bound" in self.kinds:
            self.bound = self.bound + 1
        for name in ("saved", "unsaved", "plain"):
            if name in self.kinds:
                x = x + getattr(self, name)
        return self.norm(x) if "norm" in self.kinds else x


class Generated(nn.Module):
    """Parts in a row. `again` repeats a part under a second name, `tied` gives a part another's weight."""

    def __init__(self, parts, again, tied):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        made = [Part(kinds) for kinds in parts]
        for index, part in enumerate(made):
            setattr(self, f"part{index}", part)
        for number, index in enumerate(again):
            setattr(self, f"again{number}", made[index % len(made)])
        holders = [part for part in made if "weight" in part.kinds]
        if tied and len(holders) > 1:
            holders[-1].weight = holders[0].weight
        self.names = [f"part{index}" for index in range(len(made))] + [f"again{n}" for n in range(len(again))]

    def forward(self, x):
        x = self.first(x)
        for name in self.names:
            x = getattr(self, name)(x)
        return x


KINDS = ("weight", "frozen", "saved", "unsaved", "bound", "unused", "none", "plain", "norm", "extra")
models = st.builds(
    Generated,
    st.lists(st.frozensets(st.sampled_from(KINDS), max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), max_size=2),
    st.booleans(),
)
losses = st.sampled_from(
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 4.0, 0.5])),
        lambda prediction, target: F.cross_entropy(prediction, target, weight=torch.tensor([2.0, 1.0, 1.0])),
    ]
)


def everything(model):
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    for path, part in model.named_modules(remove_duplicate=False):
        named |= {
            f"{path}.{key}": value for key, value in vars(part).items() if isinstance(value, torch.Tensor)
        }
    return named


def trained_here(model, loss_fn, batches, seed):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for data, target in batches:
            optimizer.zero_grad()
            loss_fn(model(data), target).backward()
            optimizer.step()


@settings(max_examples=60, deadline=None)
@given(models, losses)
def test_names_and_entries_are_each_others_inverse(model, loss_fn):
    plans = trace_model(model, loss_fn, X, Y)
    names, state = plans.names, plans.state
    other = copy.deepcopy(model)
    other.load_state_dict(state)  # strict: every key, and no other
    entries = names.by_entry(state)
    assert list(entries) == [entry.name for entry in plans.training.state]
    assert all(entries[name].data_ptr() == tensor.data_ptr() for name, tensor in names.entries.items())
    assert names.named(entries) == state
    # A plain state_dict, as one that was saved, is as good.
    again = names.by_entry(model.state_dict())
    assert all(torch.equal(again[name], tensor) for name, tensor in entries.items())
    # Any new values arrive in every name of theirs, in the module as in the state.
    values = {
        name: torch.full_like(tensor, number)
        for number, (name, tensor) in enumerate(entries.items(), start=2)
    }
    names.write(other, names.named(values))
    held = {**dict.fromkeys(names.keys.values()), **dict.fromkeys(names.unsaved)}  # the rest is the loss's
    found = names.by_entry(names.of(other))
    assert all(torch.equal(values[name], found[name]) for name in held)
    tied = everything(model)
    for key, tensor in everything(other).items():
        twins = [name for name, one in tied.items() if one is tied[key]]
        assert all(everything(other)[name] is tensor for name in twins)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(models, losses)
def test_generated_models_train_as_in_a_plain_loop(make_worker, model, loss_fn):
    dataset = TensorDataset(X, Y)
    worker = getattr(make_worker, "worker", None)
    if worker is None:
        worker = make_worker.worker = make_worker("bob", {"d": dataset})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        want, in_rounds = copy.deepcopy(model), copy.deepcopy(model)
        seed = derive_seed(3, 1, "bob")
        batches = list(
            iterate(as_batches(dataset, key="d"), batch_size=3, shuffle=True, seed=derive_seed(seed, "order"))
        )
        trained_here(want, loss_fn, batches, seed)

        async def go():
            _, fitted, _ = await fit_model_on_worker(
                worker, model, 3, 1, -1, 0.1, dataset_key="d", loss_fn=loss_fn, seed=3
            )
            config = TrainConfig(in_rounds, loss_fn, batch_size=3)
            scheduler = RoundScheduler([worker], config, dataset_key="d", seed=3)
            await scheduler.prepare()
            return fitted, (await scheduler.run_round(1, config.state, in_place=True)).state

        fitted, state = asyncio.run(go())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(everything(fitted)[name], tensor) for name, tensor in everything(want).items())
    in_rounds.load_state_dict(state)
    for key, value in want.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(in_rounds.state_dict()[key], value), key


# What the border refuses


def tied():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("0.weight"), "lacks '0.weight'"),
        (lambda state: state.update(bias=torch.ones(3)), "the model has no 'bias'"),
        (
            lambda state: state.update({"2.weight": torch.ones(3, 3)}),
            "'0.weight' and '2.weight' are one tensor",
        ),
        (lambda state: state.update({"2.weight": 5}), "'2.weight' of the state must be a tensor, not int"),
        (
            lambda state: state.update({"2.weight": torch.ones(3)}),
            r"'2.weight' of the state is float32\[3\], and the",
        ),
        (lambda state: state.update({"0.weight": torch.ones(3, 3).double()}), "is float64"),
        (lambda state: state.update({"0.weight": torch.ones(3, 3).to_sparse()}), "torch.sparse_coo"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_it_is_sent(make_worker, change, says):
    worker = make_worker("bob", {"d": TensorDataset(X, Y)})
    config = TrainConfig(tied(), F.cross_entropy, example=(X, Y))
    state = config.state
    change(state)
    scheduler = RoundScheduler([worker], config, dataset_key="d", seed=1)
    with pytest.raises(OptionError, match=says):
        asyncio.run(scheduler.run_round(1, state))
    asyncio.run(scheduler.run_round(1, config.state))


@pytest.mark.parametrize("state", [None, 5, [torch.ones(3)], "state"])
def test_a_state_is_a_dict(state):
    with VirtualWorker("bob", datasets={"d": TensorDataset(X, Y)}) as worker:
        config = TrainConfig(tied(), F.cross_entropy, example=(X, Y))
        scheduler = RoundScheduler([worker], config, dataset_key="d", seed=1)
        with pytest.raises(OptionError, match="a state is a dict of tensors by name"):
            asyncio.run(scheduler.run_round(1, state))


def test_tied_weights_loaded_apart_are_written_in_place_under_both_names(make_worker):
    """As they come from a file: two tensors with the same values."""
    worker = make_worker("bob", {"d": TensorDataset(X, Y)})
    config = TrainConfig(tied(), F.cross_entropy, example=(X, Y))
    state = {name: tensor.clone() for name, tensor in config.state.items()}
    scheduler = RoundScheduler([worker], config, dataset_key="d", seed=1)
    result = asyncio.run(scheduler.run_round(1, state, in_place=True))
    assert torch.equal(state["0.weight"], state["2.weight"])
    assert torch.equal(state["0.weight"], result.state["2.weight"])
    assert not torch.equal(state["0.weight"], config.state["0.weight"])


def test_a_loss_with_parameters_of_its_own_is_refused():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self, prediction, target):
            return F.cross_entropy(prediction, target) * self.log_scale.exp() - self.log_scale

    loss = Weighted()
    with pytest.raises(TraceError, match="'log_scale'.*make the loss a part of the model"):
        TrainConfig(tied(), loss, example=(X, Y))
    loss.requires_grad_(False)
    TrainConfig(tied(), loss, example=(X, Y))


def test_a_trained_parameter_that_no_state_dict_holds_is_refused():
    class Hidden(nn.Linear):
        def state_dict(self, *args, **kwargs):
            return {key: value for key, value in super().state_dict(*args, **kwargs).items() if key != "bias"}

    with pytest.raises(
        TraceError, match="'bias' is trained, and state_dict\\(\\) of Hidden does not hold it"
    ):
        TrainConfig(Hidden(3, 3), F.cross_entropy, example=(X, Y))


def test_what_a_loss_takes_from_elsewhere_is_not_trained(make_worker):
    """A teacher's weights, and a tensor that requires gradients: no optimizer of the model would step them."""
    teacher = nn.Linear(3, 3)
    temperature = torch.tensor(2.0, requires_grad=True)

    def distil(prediction, target):
        return F.kl_div((prediction / temperature).log_softmax(1), teacher(prediction).softmax(1))

    worker = make_worker("bob", {"d": TensorDataset(X, Y)})
    model = nn.Linear(3, 3)
    want = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="reduction"):
        trained_here(want, distil, [(X, Y)], 0)

    async def go():
        config = TrainConfig(model, distil, batch_size=6, shuffle=False)
        scheduler = RoundScheduler([worker], config, dataset_key="d", seed=1)
        await scheduler.prepare()
        return (await scheduler.run_round(1, config.state)).state

    with pytest.warns(UserWarning, match="reduction"):
        state = asyncio.run(go())
    model.load_state_dict(state)
    torch.testing.assert_close(model.weight, want.weight)


def test_averages_keep_tied_weights_tied(make_worker):
    workers = [make_worker(name, {"d": TensorDataset(X + i, Y)}) for i, name in enumerate(("ann", "ben"))]
    model = tied()

    async def go():
        config = TrainConfig(model, F.cross_entropy, batch_size=3)
        scheduler = RoundScheduler(workers, config, dataset_key="d", seed=1)
        await scheduler.prepare()
        return await scheduler.run_round(1, config.state, keep_worker_states=True)

    result = asyncio.run(go())
    mean = federated_avg(dict(result.worker_states))
    assert torch.equal(mean["0.weight"], result.state["0.weight"])
    assert result.state["0.weight"] is result.state["2.weight"]
