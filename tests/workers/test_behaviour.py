"""What every worker does, whatever carries its messages: each test runs over memory and over a websocket."""

import asyncio
import threading
import time
import weakref

import pytest
import torch
import torch.nn.functional as F

from planrt.errors import (
    BlockingCallError,
    LocalError,
    OptionError,
    PlanArgumentError,
    RemoteError,
    TraceError,
    UnknownDatasetError,
    WorkerLostError,
)
from planrt.fl import TrainConfig
from planrt.loop import background_loop
from planrt.plans import Plan, func2plan
from planrt.workers import BaseDataset
from tests.models import classification_data, seeded_classifier


@pytest.fixture
def bob(make_worker):
    return make_worker("bob", {"flowers": classification_data(0), "weeds": classification_data(1)})


@func2plan(args_shape=[(-1, 3), (3, 2)])
def project(x, y):
    return {"product": x @ y, "input": x}


def config(**options):
    return TrainConfig(seeded_classifier(), F.nll_loss, batch_size=8, **options)


def test_the_worker_says_what_it_has(bob):
    assert set(bob.datasets) == {"flowers", "weeds"}
    assert bob.datasets["flowers"].length == 60
    assert bob.id == "bob"
    assert "bob" in repr(bob)


def test_a_plan_runs_on_the_worker_in_one_message_each_way(bob):
    x, y = torch.randn(5, 3), torch.randn(3, 2)
    bob.run(project, x, y)
    before = bob.traffic.copy()
    result = bob.run(project, x, y)
    assert torch.equal(result["product"], x @ y)
    assert torch.equal(result["input"], x)
    used = bob.traffic.since(before)
    assert (used.messages_sent, used.messages_received) == (1, 1)


def test_outputs_keep_their_structure_sizes_and_constants(bob):
    @func2plan(args_shape=[(-1, 3)])
    def many(x):
        return {"sum": x.sum(), "rows": x.shape[0], "half": x.shape[0] / 2, "parts": [x[:1], (2, None, x)]}

    x = torch.randn(5, 3)
    result = bob.run(many, x)
    assert (result["rows"], result["half"]) == (5, 2.5)
    assert torch.equal(result["sum"], x.sum())
    assert torch.equal(result["parts"][0], x[:1])
    assert result["parts"][1][:2] == (2, None)
    assert torch.equal(result["parts"][1][2], x)


def test_wrong_arguments_are_refused_here(bob):
    before = bob.traffic.copy()
    with pytest.raises(PlanArgumentError, match=r"project takes \(x, y\), got 1: missing"):
        bob.run(project, torch.ones(2, 3))
    assert bob.traffic.since(before).messages_sent == 0


def test_a_failing_op_is_named(bob):
    @func2plan(args_shape=[(-1, 2)])
    def pick(x):
        return F.one_hot(x.to(torch.int64)[:, 0], 3)

    assert torch.equal(bob.run(pick, torch.ones(1, 2)), torch.tensor([[0, 1, 0]]))
    with pytest.raises(RemoteError, match="one_hot") as caught:
        bob.run(pick, torch.full((1, 2), 7.0))
    assert caught.value.worker_id == "bob"
    assert caught.value.op == "nn.functional.one_hot"
    assert "Traceback" in caught.value.remote_traceback
    assert torch.equal(bob.run(pick, torch.ones(1, 2)), torch.tensor([[0, 1, 0]]))


def test_fit_gives_the_numbers_of_a_plain_loop(bob):
    """The worker's batches and arithmetic, done by hand with the same derived seed."""
    from planrt.seeding import derive_seed
    from planrt.workers.machine.rounds.batches import as_batches, iterate

    job = config(max_nr_batches=5, optimizer="SGD", optimizer_args={"lr": 0.1, "momentum": 0.9})
    job.send(bob)
    result = bob.fit("flowers", seed=3)

    model = seeded_classifier().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seed = derive_seed(3, 1, "bob")
    losses, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    source = as_batches(classification_data(0))
    order = derive_seed(seed, "order")
    for data, target in iterate(source, batch_size=8, max_nr_batches=5, epochs=1, shuffle=True, seed=order):
        optimizer.zero_grad()
        loss = F.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.set_num_threads(threads)

    assert result.samples == 40
    assert result.batches == 5
    assert result.changed == {}
    trained = job.model_ptr.get().obj
    assert result.loss == pytest.approx(sum(losses) / 5, rel=1e-6)
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name


def test_evaluate_gives_the_numbers_of_a_plain_loop(bob):
    job = config()
    job.send(bob)
    figures = bob.evaluate("weeds", bins=3)
    model = seeded_classifier().eval()
    dataset = classification_data(1)
    with torch.no_grad():
        scores = model(dataset.data)
    assert figures.correct == int((scores.argmax(1) == dataset.targets).sum())
    assert figures.histogram == torch.bincount(scores.argmax(1), minlength=3).tolist()
    assert figures.target_histogram == torch.bincount(dataset.targets, minlength=3).tolist()
    assert figures.loss == pytest.approx(F.nll_loss(scores, dataset.targets).item(), rel=1e-5)


def test_fit_needs_a_job(bob):
    with pytest.raises(LocalError, match="TrainConfig"):
        bob.fit("flowers")


def test_an_unknown_data_set_is_named_with_what_there_is(bob):
    config().send(bob)
    with pytest.raises(UnknownDatasetError, match="'trees'.*flowers, weeds"):
        bob.fit("trees")


def test_a_bad_optimizer_argument_comes_back_from_the_worker(bob):
    job = config()
    job.optimizer_args = {"learning_rate": 0.1}  # what a client that checks nothing sends
    job.send(bob)
    with pytest.raises(RemoteError, match="learning_rate") as caught:
        bob.fit("flowers")
    assert caught.value.kind == "OptionError"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"epochs": 0}, "epochs"),
        ({"max_nr_batches": -2}, "max_nr_batches"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg'.*SGD"),
    ],
)
def test_bad_options_are_refused_here(options, says):
    with pytest.raises(OptionError, match=says):
        TrainConfig(seeded_classifier(), F.nll_loss, **options)


def test_an_output_that_does_not_fit_the_loss_is_said_before_anything_is_sent(bob):
    job = TrainConfig(torch.nn.Linear(6, 3), F.binary_cross_entropy)
    job.send(bob)
    before = bob.traffic.copy()
    with pytest.raises(TraceError, match="loss"):
        bob.fit("flowers")
    assert bob.traffic.since(before).messages_sent == 0


def test_await_forms_work_on_any_loop(bob):
    async def main():
        x, y = torch.ones(2, 3), torch.ones(3, 2)
        both = await asyncio.gather(bob.async_run(project, x, y), bob.async_run(project, 2 * x, y))
        return [result["product"][0, 0].item() for result in both]

    assert asyncio.run(main()) == [3.0, 6.0]
    on_own_loop = asyncio.run_coroutine_threadsafe(main(), background_loop())
    assert on_own_loop.result() == [3.0, 6.0]


def test_a_blocking_call_on_the_loop_thread_names_the_await_form(bob):
    async def wrong():
        bob.run(project, torch.ones(2, 3), torch.ones(3, 2))

    with pytest.raises(BlockingCallError, match=r"await worker\.async_run"):
        asyncio.run_coroutine_threadsafe(wrong(), background_loop()).result()


def test_threads_get_their_own_answers(bob):
    results = {}

    def work(number):
        results[number] = bob.run(project, torch.full((1, 3), float(number)), torch.ones(3, 1 + 1))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: result["product"][0, 0].item() for number, result in results.items()} == {
        number: 3.0 * number for number in range(8)
    }


def test_who_gives_up_waiting_disturbs_nobody(bob):
    async def main():
        x, y = torch.ones(2, 3), torch.ones(3, 2)
        await bob.async_run(project, x, y)
        impatient = asyncio.ensure_future(bob.async_run(project, x, y))
        await asyncio.sleep(0)
        impatient.cancel()
        return (await bob.async_run(project, 3 * x, y))["product"][0, 0].item()

    assert asyncio.run(main()) == 9.0


def test_a_closed_worker_says_so(bob):
    bob.close()
    bob.close()
    with pytest.raises(WorkerLostError, match="'bob'.*closed") as caught:
        bob.run(project, torch.ones(2, 3), torch.ones(3, 2))
    assert caught.value.worker_id == "bob"


def test_the_workers_data_stays_as_it_was(make_worker):
    data = torch.randn(20, 6)
    dataset = BaseDataset(data.clone(), torch.zeros(20, dtype=torch.int64))
    worker = make_worker("eve", {"d": dataset})
    config().send(worker)
    worker.fit("d")
    assert torch.equal(dataset.data, data)


def test_the_callers_random_numbers_and_threads_are_left_alone(bob):
    config(max_nr_batches=2).send(bob)
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    bob.fit("flowers")
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_a_result_is_held_by_who_asked_and_nobody_else(bob):
    result = bob.run(project, torch.ones(5, 3), torch.ones(3, 2))
    held = [weakref.ref(tensor) for tensor in result.values()]
    assert all(reference() is not None for reference in held)
    del result
    deadline = time.monotonic() + 60
    while any(reference() is not None for reference in held) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(reference() is None for reference in held)


class ClassifierPlan(Plan):
    """The same network as a plan."""

    def __init__(self):
        super().__init__()
        net = seeded_classifier()
        self.first, self.norm, self.drop, self.last = net.first, net.norm, net.drop, net.last

    def forward(self, x):
        return F.log_softmax(self.last(self.drop(F.relu(self.norm(self.first(x))))), dim=1)


@pytest.mark.parametrize("built", [False, True])
def test_a_plan_trains_in_rounds_as_the_module_that_it_is(bob, built):
    def fitted(model):
        job = TrainConfig(model, F.nll_loss, batch_size=8, max_nr_batches=5, optimizer_args={"lr": 0.1})
        job.send(bob)
        result = bob.fit("flowers", seed=3)
        return result.loss, job.model_ptr.get().obj.state_dict()

    plan = ClassifierPlan()
    if built:
        plan.build(torch.zeros(4, 6))
    (loss, state), (same, theirs) = fitted(plan), fitted(seeded_classifier())
    assert loss == same
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[name], theirs[name]) for name in state)
