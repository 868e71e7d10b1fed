"""Whatever model people bring: each public way to train and use it gives what a plain PyTorch loop gives."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import planrt
from planrt.fl import ModelEvaluator, RoundScheduler, TrainConfig
from planrt.fl.utils import evaluate_model_on_worker, fit_model_on_worker
from planrt.seeding import derive_seed
from planrt.workers.machine.rounds.batches import as_batches, iterate
from tests.fl.models import MODELS, make

pytestmark = pytest.mark.filterwarnings("ignore::planrt.errors.PlanWarning")  # plain attributes, on purpose

SIZE, LR, SEED = 5, 0.05, 3


@pytest.fixture(autouse=True)
def one_thread():
    """Workers compute with one torch thread; with more, last bits can differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batches_of(dataset, *, shuffle=False, seed=0):
    return iterate(
        as_batches(dataset, key="d"), batch_size=SIZE, shuffle=shuffle, seed=derive_seed(seed, "order")
    )


def trained_here(model, loss_fn, batches, seed, **options):
    """The loop that everybody writes."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for data, target in batches:
            optimizer.zero_grad()
            loss_fn(model(data), target).backward()
            optimizer.step()
    return model


def everything(model):
    """Parameters, buffers (saved or not) and tensors that are plain attributes."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    for path, part in model.named_modules():
        named |= {
            f"{path}.{key}": value for key, value in vars(part).items() if isinstance(value, torch.Tensor)
        }
    return named


def assert_same(got, want):
    got, want = everything(got), everything(want)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), (name, (got[name] - tensor).abs().max())


def without_chance(model):
    """Dropout of pointers draws from other seeds than a local loop."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.RNNBase | nn.MultiheadAttention):
            part.dropout = 0.0
    return model


@pytest.mark.parametrize("name", MODELS)
def test_rounds_equal_a_plain_loop(make_worker, name):
    model, loss_fn, data, target = make(name)
    dataset = TensorDataset(data, target)
    worker = make_worker("bob", {"d": dataset})
    want = copy.deepcopy(model)

    async def go():
        config = TrainConfig(
            model, loss_fn, batch_size=SIZE, shuffle=False, optimizer_args={"lr": LR, "momentum": 0.9}
        )
        scheduler = RoundScheduler([worker], config, dataset_key="d", seed=SEED)
        await scheduler.prepare()
        state = config.state
        for number in (1, 2):
            state = (await scheduler.run_round(number, state)).state
        evaluator = ModelEvaluator(worker, config, dataset_key="d", batch_size=SIZE, bins=0)
        await evaluator.prepare()
        return state, (await evaluator.evaluate(state)).loss

    before = copy.deepcopy(model)
    state, loss = asyncio.run(go())
    assert_same(model, before)  # the user's own model stays as it is
    for number in (1, 2):
        trained_here(want, loss_fn, batches_of(dataset), derive_seed(SEED, number, "bob"), momentum=0.9)
    assert state.keys() == want.state_dict().keys()
    after = copy.deepcopy(model)
    after.load_state_dict(state)
    for key, value in want.state_dict().items():
        assert torch.equal(after.state_dict()[key], value), key
    want.eval()
    with torch.no_grad():
        parts = [(loss_fn(want(x), y).item(), len(x)) for x, y in batches_of(dataset)]
    assert loss == pytest.approx(sum(part * size for part, size in parts) / len(data), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_fit_and_evaluate_on_a_worker_equal_a_plain_loop(make_worker, name):
    model, loss_fn, data, target = make(name)
    dataset = TensorDataset(data, target)
    worker = make_worker("bob", {"d": dataset})
    want = copy.deepcopy(model)
    got = model
    for number in (1, 2):
        seed = derive_seed(SEED, number, "bob")
        trained_here(want, loss_fn, batches_of(dataset, shuffle=True, seed=seed), seed)
        _, got, _ = asyncio.run(
            fit_model_on_worker(
                worker, got, SIZE, number, -1, LR, dataset_key="d", loss_fn=loss_fn, seed=SEED
            )
        )
        assert_same(got, want)
    result = evaluate_model_on_worker("m", worker, "d", got, 0, SIZE, loss_fn=loss_fn)
    want.eval()
    with torch.no_grad():
        parts = [(loss_fn(want(x), y).item(), len(x)) for x, y in batches_of(dataset)]
    assert result.loss == pytest.approx(sum(part * size for part, size in parts) / len(data), rel=1e-5)


# A causal mask is looked at by torch, and packing needs lengths: values that pointers do not have here. A tensor
# that is a plain attribute stays here, as `model.to(device)` leaves it.
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("packed", "masked", "counts")])
def test_a_model_that_was_sent_equals_one_that_was_not(make_worker, name):
    planrt.TorchHook(torch)
    model, loss_fn, data, target = make(name)
    without_chance(model)
    worker = make_worker("bob")
    want = copy.deepcopy(model)
    here, loss_fn = loss_fn, copy.deepcopy(loss_fn)
    if isinstance(loss_fn, nn.Module):
        loss_fn.send(worker)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model.train()
    model.send(worker)
    x, y = data.send(worker), target.send(worker)
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    model.get()
    trained_here(want, here, [(data, target)] * 2, 0)
    assert_same(model, want)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_that_was_sent_equals_its_model(make_worker, name):
    planrt.TorchHook(torch)
    model, _, data, _ = make(name)
    model.eval()
    worker = make_worker("bob")
    plan = planrt.func2plan(model)
    plan.build(data)
    there = plan.send(worker)
    got = there(data.send(worker))
    want = model(data)
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        got, want = list(got.values()), list(want.values())
    else:
        got, want = [got], [want]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.get(), other, rtol=1e-6, atol=1e-6)
