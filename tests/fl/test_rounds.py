"""Rounds: messages, bytes, bits, memory, failures."""

import asyncio
import contextlib
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planrt.errors import OptionError, RemoteError, UnknownDatasetError, WorkerLostError
from planrt.fl import (
    ModelEvaluator,
    RoundScheduler,
    TrainConfig,
    evaluate_model_on_worker,
    federated_avg,
    fit_model_on_worker,
)
from planrt.serde.frames import Limits
from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from tests.models import classification_data, seeded_classifier
from tests.proxy import CountingProxy

IDS = ["alice", "bob", "charlie"]


def config(**options):
    options = {"batch_size": 8, "max_nr_batches": 4, "optimizer_args": {"lr": 0.1}, **options}
    return TrainConfig(seeded_classifier(), F.nll_loss, **options)


def datasets():
    return {id: classification_data(number) for number, id in enumerate(IDS)}


@pytest.fixture
def workers(make_worker):
    return [make_worker(id, {"d": data}) for id, data in datasets().items()]


async def rounds(workers, job, count=3, *, seed=7, **options):
    scheduler = RoundScheduler(workers, job, dataset_key="d", seed=seed, **options)
    await scheduler.prepare()
    state, results = job.state, []
    for number in range(1, count + 1):
        results.append(await scheduler.run_round(number, state))
        state = results[-1].state
    return results


def run(workers, job, count=3, **options):
    return asyncio.run(rounds(workers, job, count, **options))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_rounds_learn(workers):
    results = run(workers, config(), 20)
    assert results[-1].loss < 0.6 * results[0].loss
    assert [result.round for result in results] == list(range(1, 21))
    assert results[0].workers["bob"].samples == 32


def test_the_same_seed_gives_the_same_bits_again_and_another_seed_others(workers):
    one, again, other = (run(workers, config(), seed=seed)[-1].state for seed in (7, 7, 8))
    assert same(one, again)
    assert not same(one, other)


def test_virtual_and_websocket_workers_give_the_same_bits():
    with contextlib.ExitStack() as stack:
        virtual = [
            stack.enter_context(VirtualWorker(id, datasets={"d": data})) for id, data in datasets().items()
        ]
        remote = []
        for id, data in datasets().items():
            server = WebsocketServerWorker(id, threads=1)
            server.add_dataset(data, "d")
            remote.append(
                stack.enter_context(WebsocketClientWorker(id, uri=stack.enter_context(server.running())))
            )
        here, there = run(virtual, config()), run(remote, config())
    assert same(here[-1].state, there[-1].state)
    assert [result.loss for result in here] == [result.loss for result in there]


def test_a_round_is_the_average_of_what_each_worker_trains(workers):
    job = config()
    result = run(workers, job, 1)[0]
    separate = {worker.id: run([worker], job, 1)[0].state for worker in workers}
    assert same(result.state, federated_avg(separate))


def test_weighted_rounds_count_samples(make_worker):
    big, small = classification_data(0, samples=32), classification_data(1, samples=8)
    workers = [make_worker("big", {"d": big}), make_worker("small", {"d": small})]
    job = config()

    def round_of(chosen, **options):
        return run(chosen, job, 1, **options)[0]

    both = round_of(workers, weighted=True)
    assert (both.workers["big"].samples, both.workers["small"].samples) == (32, 8)
    separate = {worker.id: round_of([worker]).state for worker in workers}
    assert same(both.state, federated_avg(separate, {"big": 32, "small": 8}))


def test_buffers_follow_the_rules(workers):
    state = run(workers, config(), 2)[-1].state
    assert state["norm.num_batches_tracked"].item() == 8
    assert state["norm.num_batches_tracked"].dtype == torch.int64
    assert state["norm.running_mean"].abs().sum() > 0


def test_a_state_with_several_dtypes_can_be_saved_by_torch(workers):
    file = io.BytesIO()
    state = run(workers, config(), 1)[-1].state
    torch.save(dict(state), file)
    file.seek(0)
    assert same(torch.load(file), state)


def test_zero_batches_bring_the_state_back_unchanged(workers):
    job = config(max_nr_batches=0)
    result = run(workers, job, 1)[0]
    for name, value in job.state.items():
        torch.testing.assert_close(result.state[name], value, rtol=1e-6, atol=1e-7)
    assert result.loss != result.loss  # nan: no samples
    assert run(workers, job, 1, weighted=True)[0].state.keys() == job.state.keys()


def test_kept_optimizer_state_changes_later_rounds_only(workers):
    fresh = run(workers, config(optimizer="Adam", optimizer_args={"lr": 0.01}), 2)
    kept = run(workers, config(optimizer="Adam", optimizer_args={"lr": 0.01}, keep_optimizer_state=True), 2)
    assert same(fresh[0].state, kept[0].state)
    assert not same(fresh[1].state, kept[1].state)


def test_the_learning_rate_of_a_round_overrides(workers):
    job = config(example=(torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64)))

    async def with_lr(lr):
        scheduler = RoundScheduler(workers, job, dataset_key="d", seed=1)
        await scheduler.prepare()
        return (await scheduler.run_round(1, job.state, lr=lr)).state

    assert same(asyncio.run(with_lr(0.1)), asyncio.run(with_lr(None)))
    assert not same(asyncio.run(with_lr(0.2)), asyncio.run(with_lr(None)))


def test_the_given_state_stays_as_it_is_and_workers_states_can_be_kept(workers):
    job = config(example=(torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64)))
    before = {name: value.clone() for name, value in job.state.items()}

    async def main():
        scheduler = RoundScheduler(workers, job, dataset_key="d", seed=1)
        await scheduler.prepare()
        return await scheduler.run_round(1, job.state, keep_worker_states=True)

    result = asyncio.run(main())
    assert same(job.state, before)
    assert list(result.worker_states) == IDS
    assert same(federated_avg(result.worker_states), result.state)


def test_in_place_rounds_write_the_average_into_the_given_state(workers):
    job = config(example=(torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64)))
    expected = run(workers, job, 1, seed=1)[0].state

    async def main():
        scheduler = RoundScheduler(workers, job, dataset_key="d", seed=1)
        await scheduler.prepare()
        return await scheduler.run_round(1, job.state, in_place=True)

    result = asyncio.run(main())
    assert same(result.state, expected)
    assert same(job.state, expected)
    assert same({name: job.model.state_dict()[name] for name in expected}, expected)


class Frozen(nn.Module):
    """A large frozen part and a small trained one, so that what comes back is told from what went."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(6, 4000)
        self.features.requires_grad_(False)
        self.head = nn.Linear(4000, 3)

    def forward(self, x):
        return F.log_softmax(self.head(torch.relu(self.features(x))), dim=1)


@pytest.mark.parametrize("network", [nn.Linear(6, 30_000), Frozen()], ids=["all trained", "part frozen"])
def test_messages_and_bytes_on_the_wire(network):
    """Counted by a proxy: the plan once, then one message each way per round and worker, and few bytes over."""
    data = {id: classification_data(number, classes=3) for number, id in enumerate(IDS)}
    job = TrainConfig(network, F.cross_entropy, batch_size=8, max_nr_batches=1)
    with contextlib.ExitStack() as stack:
        proxies, workers = {}, []
        for id in IDS:
            server = WebsocketServerWorker(id, threads=1)
            server.add_dataset(data[id], "d")
            proxies[id] = CountingProxy(stack.enter_context(server.running()))
            uri = stack.enter_context(proxies[id].running())
            workers.append(stack.enter_context(WebsocketClientWorker(id, uri=uri)))
        result = run(workers, job, 1)[0]
        before = {id: (proxy.counts.copy(), proxy.sizes.copy()) for id, proxy in proxies.items()}
        rounds_run = run_more(workers, job, result.state, 5)
        after = {id: (proxy.counts.copy(), proxy.sizes.copy()) for id, proxy in proxies.items()}
    down = sum(value.nbytes for value in job.state.values())
    up = sum(value.nbytes for name, value in job.state.items() if not name.startswith("features"))
    for id, (counted, sized) in after.items():
        counts, sizes = before[id]
        assert counts == {"up": 3, "down": 3}  # hello, plan, first round
        assert counted - counts == {"up": 5, "down": 5}
        assert (sized - sizes).total() <= 1.01 * 5 * (down + up)
        part = rounds_run[-1].workers[id]
        assert (part.requests, part.replies) == (1, 1)
        assert 5 * part.bytes_sent == pytest.approx((sized - sizes)["up"], rel=1e-3)
        assert 5 * part.bytes_received == pytest.approx((sized - sizes)["down"], rel=1e-3)


def run_more(workers, job, state, count):
    async def main():
        scheduler = RoundScheduler(workers, job, dataset_key="d", seed=1)
        await scheduler.prepare()  # knows that the plan is there
        results = []
        for number in range(2, 2 + count):
            results.append(await scheduler.run_round(number, results[-1].state if results else state))
        return results

    return asyncio.run(main())


@pytest.mark.parametrize("hold", [0, 1, 2])
def test_replies_out_of_order_are_spooled_without_changing_a_bit(hold):
    """alice, first in order, answers last; the other replies (1.2 MB each) wait in memory or in files."""
    data = {id: classification_data(number) for number, id in enumerate([*IDS, "dora", "eve"])}
    job = TrainConfig(nn.Linear(6, 43_000), F.cross_entropy, batch_size=8, max_nr_batches=1)
    with contextlib.ExitStack() as stack:
        workers, expected = [], []
        for id, dataset in data.items():
            server = WebsocketServerWorker(id, threads=1)
            server.add_dataset(dataset, "d")
            uri = stack.enter_context(server.running())
            if id == "alice":
                uri = stack.enter_context(CountingProxy(uri, delay=0.3).running())
            workers.append(stack.enter_context(WebsocketClientWorker(id, uri=uri)))
            expected.append(stack.enter_context(VirtualWorker(id, datasets={"d": dataset})))
        assert same(run(workers, job, 2, hold=hold)[-1].state, run(expected, job, 2)[-1].state)


def test_a_worker_that_dies_mid_round_is_named_and_the_others_go_on():
    data = datasets()
    with contextlib.ExitStack() as stack:
        workers = []
        for id in IDS:
            server = WebsocketServerWorker(id, threads=1)
            server.add_dataset(data[id], "d")
            uri = stack.enter_context(server.running())
            if id == "bob":  # welcome and the plan's receipt get through, the first round's reply does not
                uri = stack.enter_context(CountingProxy(uri, kill_after=2).running())
            workers.append(stack.enter_context(WebsocketClientWorker(id, uri=uri, reconnect=0)))
        with pytest.raises(WorkerLostError, match="worker 'bob'.*is gone") as caught:
            run(workers, config(), 1)
        assert caught.value.worker_id == "bob"
        others = [worker for worker in workers if worker.id != "bob"]
        assert run(others, config(), 1)[0].workers.keys() == {"alice", "charlie"}


def test_a_plan_that_the_worker_has_dropped_is_sent_again(make_worker):
    workers = [make_worker(id, {"d": data}, limits=Limits(round_plans=1)) for id, data in datasets().items()]
    first, second = config(), config(batch_size=4)
    second = TrainConfig(nn.Linear(6, 3), F.cross_entropy, batch_size=4, max_nr_batches=1)
    run(workers, first, 1)
    run(workers, second, 1)
    again = run(workers, first, 1)[0]
    assert again.workers["bob"].requests == 3  # refused, plan, request


def test_data_sets_that_differ_between_workers_are_refused(make_worker):
    workers = [
        make_worker("a", {"d": classification_data(0)}),
        make_worker("b", {"d": classification_data(0, features=7)}),
    ]
    with pytest.raises(OptionError, match="different shapes"):
        run(workers, config(), 1)


def test_a_missing_data_set_is_named(workers):
    async def main():
        await RoundScheduler(workers, config(), dataset_key="mnist", seed=1).prepare()

    with pytest.raises(UnknownDatasetError, match="'alice'.*'mnist'.*it has: d"):
        asyncio.run(main())


def test_bad_schedules(workers):
    for chosen, options, says in [
        ([], {}, "at least one worker"),
        ([workers[0], workers[0]], {}, "must differ"),
        (workers, {"hold": -1}, "hold"),
    ]:
        with pytest.raises(OptionError, match=says):
            RoundScheduler(chosen, config(), dataset_key="d", seed=1, **options)
    with pytest.raises(OptionError, match="batch size"):
        ModelEvaluator(workers[0], config(), dataset_key="d", batch_size=0)


def test_a_worker_that_cannot_do_it_names_itself(make_worker):
    good = classification_data(0)
    bad = BaseDataset(good.data, good.targets + 5)  # labels that the network has no score for
    workers = [make_worker("alice", {"d": good}), make_worker("bob", {"d": bad})]
    with pytest.raises(RemoteError, match="'bob'.*out of bounds") as caught:
        run(workers, config(), 1)
    assert caught.value.worker_id == "bob"
    assert caught.value.op == "nn.functional.nll_loss"


def test_evaluation_on_a_worker(workers):
    job = config()

    async def main():
        evaluator = ModelEvaluator(workers[0], job, dataset_key="d", batch_size=16, bins=3)
        await evaluator.prepare()
        return await evaluator.evaluate(job.state)

    figures = asyncio.run(main())
    assert (figures.samples, sum(figures.histogram)) == (60, 60)


# ------------------------------------------------------------------- the functions of the 0.2 tutorials


def test_the_tutorials_loop_with_a_traced_module(workers):
    """Their loop as they write it: trace, gather fits, federated_avg, evaluate; the model learns."""
    model = torch.jit.trace(seeded_classifier(p=0.0).eval(), torch.zeros(1, 6))

    async def main(traced):
        for current in range(1, 9):
            results = await asyncio.gather(
                *[
                    fit_model_on_worker(
                        worker=worker, traced_model=traced, batch_size=8, curr_round=current, max_nr_batches=4,
                        lr=0.1, dataset_key="d",
                    )
                    for worker in workers
                ]
            )  # fmt: skip
            traced = federated_avg({id: trained for id, trained, _ in results})
        return traced, [loss for _, _, loss in results]

    before = evaluate_model_on_worker("before", workers[0], "d", model, 3, 16)
    trained, losses = asyncio.run(main(model))
    after = evaluate_model_on_worker("after", workers[0], "d", trained, 3, 16, print_target_hist=True)
    assert after.loss < before.loss
    assert after.correct > before.correct
    assert len(losses) == 3
    assert isinstance(trained, torch.jit.ScriptModule)
    assert trained(torch.zeros(4, 6)).shape == (4, 3)


def test_the_tutorials_fit_leaves_the_given_model_alone(workers):
    model = seeded_classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    id, trained, loss = asyncio.run(fit_model_on_worker(workers[1], model, 8, 1, 3, 0.1, dataset_key="d"))
    assert id == "bob"
    assert loss > 0
    assert same(model.state_dict(), before)
    assert not same(trained.state_dict(), before)
