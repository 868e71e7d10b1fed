"""What the sessions of one user may keep on a worker, on either transport: all that they keep counts, and is freed."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import weakref

import pytest
import torch

import planrt
from planrt.errors import GonePointerError, OptionError, PolicyError, PolicyRefusedError, RemoteError
from planrt.fl import RoundScheduler, TrainConfig
from planrt.plans import Plan
from planrt.plans.policy import quotas
from planrt.plans.policy.quotas import Account, Quota
from planrt.plans.policy.rules import Policy
from planrt.serde.frames import Limits
from planrt.workers import BaseDataset, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.events import PeerAnswered, Received
from planrt.workers.machine.handling import answering
from planrt.workers.machine.keeping.answers import Keeping
from planrt.workers.machine.kinds import plan as plan_kind
from planrt.workers.machine.rounds import sent_plans
from planrt.workers.machine.rounds.training import MAX_OPTIMIZERS
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.state import WorkerState
from planrt.workers.machine.store import ObjectStore
from planrt.workers.wire import messages as m
from tests.pointers.conftest import OWNER

KIB = 1024


def small(memory=100 * KIB, objects=None):
    return Policy(
        approval="open", max_session_memory=memory, max_session_objects=objects, max_worker_memory=None
    )


def full(rule="max_session_memory"):
    return pytest.raises(
        PolicyRefusedError, match=rf"more than the .* that the owner lets a user keep: \[{rule}\]"
    )


def test_tensors_that_are_sent_count_and_are_freed(hospital):
    worker = hospital(small())()
    x = torch.ones(20 * KIB // 4).send(worker)
    with full():
        torch.ones(90 * KIB // 4).send(worker)
        worker.objects_count()
    assert x.sum().get().item() == 5 * KIB  # nothing was lost
    for _ in range(20):  # what is taken back, or dropped, counts no longer
        y = torch.ones(60 * KIB // 4).send(worker)
        assert y.shape == (15 * KIB,)
        del y
    assert x.get().shape == (5 * KIB,)


def test_results_of_ops_count_and_a_refused_one_is_there_later(hospital):
    worker = hospital(small())()
    x = torch.ones(10 * KIB).send(worker)  # 40 KiB
    y = x + 1
    z = y + 1  # would be 120
    with full():
        z.get()
    assert (y.get() - 2).abs().max() == 0
    assert (x + 2).sum().get().item() == 30 * KIB
    with full():  # all results of an op, or none
        torch.stack([x, x]).unbind()[0].contiguous()
        torch.topk(x, 10 * KIB)[0].get()
    assert x.sum().get().item() == 10 * KIB


def test_memory_that_objects_share_counts_once(hospital):
    worker = hospital(small())()
    x = torch.ones(20 * KIB).send(worker)  # 80 of 100 KiB
    views = [x.view(-1)[n:] for n in range(5)]
    x.add_(1)
    assert views[4].sum().get().item() == 2 * (20 * KIB - 4)


def test_objects_count_each(hospital):
    worker = hospital(small(memory=None, objects=10))()
    kept = [torch.ones(1).send(worker) for _ in range(10)]
    with full("max_session_objects"):
        torch.ones(1).send(worker)
        worker.objects_count()
    with full("max_session_objects"):
        (kept[0] + 1).get()
    del kept[5:]
    assert (kept[0] + 1).get().item() == 2.0


def test_small_objects_count_as_what_they_take(hospital):
    worker = hospital(small())()
    kept = []
    with full():
        for _ in range(200):
            kept.append(torch.ones(1).send(worker))
        worker.objects_count()


def test_texts_count(hospital):
    worker = hospital(small())()
    x = torch.ones(1).send(worker)
    with full():
        x.describe("x" * 60 * KIB)
        torch.ones(1).describe("y" * 60_000).send(worker)
        worker.objects_count()


def test_sessions_of_one_user_share_one_quota_and_others_have_theirs(hospital):
    connect = hospital(small())
    first, second, nobody = connect(OWNER), connect(OWNER), connect()
    x = torch.ones(20 * KIB).send(first)
    with full():
        torch.ones(20 * KIB).send(second)
        second.objects_count()
    assert torch.ones(20 * KIB).send(nobody).sum().get().item() == 20 * KIB
    first.close()  # with its objects
    assert torch.ones(20 * KIB).send(second).sum().get().item() == 20 * KIB
    assert x is not None


def test_a_closed_session_is_kept_until_another_one_of_its_user_needs_the_room(hospital):
    connect = hospital(small())
    first, second, third = connect(OWNER), connect(OWNER), connect(OWNER)
    x, y = (torch.ones(10 * KIB).send(one) for one in (first, second))  # 40 of 100 KiB each
    assert (x.sum().get().item(), y.sum().get().item()) == (10 * KIB, 10 * KIB)
    first.close()
    assert torch.ones(KIB).send(third).sum().get().item() == KIB  # there is room
    first.connect()
    assert x.sum().get().item() == 10 * KIB
    first.close()
    second.close()
    z = torch.ones(10 * KIB).send(third)  # the one that was closed first is enough
    assert z.sum().get().item() == 10 * KIB
    second.connect()
    assert y.sum().get().item() == 10 * KIB
    first.connect()
    with pytest.raises(GonePointerError, match="went with the earlier session"):
        x.sum()
    with full():  # what is connected gives way to nobody
        torch.ones(10 * KIB).send(first)
        first.objects_count()


def test_what_is_published_counts_on_when_its_session_has_ended(hospital):
    connect = hospital(small())
    first = connect(OWNER)
    torch.ones(20 * KIB).tag("#kept").send(first)
    first.objects_count()
    first.close()
    second = connect(OWNER)
    with full():
        torch.ones(20 * KIB).send(second)
        second.objects_count()
    with full():  # a snapshot is one's own
        second.search("#kept")
    assert connect().search("#kept")[0].sum().get().item() == 20 * KIB


def test_gradients_count_before_they_are_there(hospital):
    worker = hospital(small())()
    w = torch.ones(15 * KIB, requires_grad=True).send(worker)  # 60 KiB
    loss = w.sum()
    with full():
        loss.backward()
        w.grad.get()
    del loss
    small_one = torch.ones(KIB, requires_grad=True).send(worker)
    (small_one * 2).sum().backward()
    assert small_one.grad.get().tolist() == [2.0] * KIB


def test_what_a_graph_keeps_counts_when_its_pointers_are_gone(hospital):
    worker = hospital(small())()
    w = torch.ones(KIB, requires_grad=True).send(worker)  # 4 KiB
    y = w
    with full():
        for _ in range(100):
            y = y.exp()  # keeps its result for the pass
        y.sum().get()
    del y
    assert (w + 1).sum().get().item() == 2 * KIB  # the graph is gone, with its memory


def test_plans_and_their_copies_count(hospital):
    worker = hospital(small())()

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(12 * KIB))

        def forward(self, x):
            return x * self.weight.sum()

    there = Plan(Net()).build(torch.ones(1)).send(worker)
    with full():
        copies = [there.copy(), there.copy()]
        copies[1](torch.ones(1).send(worker)).get()
    del copies
    assert there(torch.ones(1).send(worker)).get().item() == 12 * KIB


def loss_fn(target, pred):
    return ((pred - target) ** 2).mean()


def fit_with(worker, optimizer, width, configs, **options):
    config = TrainConfig(
        model=torch.nn.Linear(width, 1), loss_fn=loss_fn, batch_size=8, optimizer=optimizer, **options
    )
    configs.append(config)  # its objects are there for as long as it is
    config.send(worker)
    return worker.fit("k")


def test_what_optimizers_keep_counts(hospital):
    data = BaseDataset(torch.ones(8, 3 * KIB), torch.ones(8, 1))
    worker = hospital(small(), datasets={"k": data})()
    kinds = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam")
    for optimizer in kinds:
        assert fit_with(worker, optimizer, 3 * KIB, []).loss >= 0
    configs = []
    with full():  # 24 KiB each
        for optimizer in kinds:
            fit_with(worker, optimizer, 3 * KIB, configs, keep_optimizer_state=True)


def test_the_number_of_optimizers_is_bounded(make_worker, monkeypatch):
    assert MAX_OPTIMIZERS == 1_000
    monkeypatch.setattr("planrt.workers.machine.rounds.training.MAX_OPTIMIZERS", 1)
    worker = make_worker("bob", {"k": BaseDataset(torch.ones(8, 2), torch.ones(8, 1))})
    configs = []
    assert fit_with(worker, "Adam", 2, configs, keep_optimizer_state=True).loss >= 0
    assert worker.fit("k").loss >= 0
    with pytest.raises(RemoteError, match="keeps 1 optimizers' states, as many as it may"):
        fit_with(worker, "SGD", 2, configs, keep_optimizer_state=True)


def test_a_worker_holds_so_many_objects(make_worker, monkeypatch):
    """`MAX_OBJECTS`, for all sessions together."""
    monkeypatch.setattr(ObjectStore.__init__, "__defaults__", (3, *ObjectStore.__init__.__defaults__[1:]))
    worker = make_worker("bob")
    kept = [torch.ones(1).send(worker) for _ in range(3)]
    kept.append(torch.ones(1).send(worker))
    with pytest.raises(RemoteError, match="holds 3 objects, its limit"):
        worker.objects_count()
    kept.clear()
    assert torch.ones(1).send(worker).get().item() == 1.0


def test_a_worker_without_a_policy_has_quotas_too():
    server = WebsocketServerWorker("bob", threads=1, max_session_memory=50 * KIB, max_session_objects=4)
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri) as worker:
        with full():
            torch.ones(20 * KIB).send(worker)
            worker.objects_count()
        kept = [torch.ones(1).send(worker) for _ in range(4)]
        with full("max_session_objects"):
            kept[0].neg().get()


def test_of_two_limits_the_stricter_counts():
    policy = Policy(
        max_session_memory=10,
        max_session_objects=None,
        max_worker_memory=100,
        max_worker_objects=None,
        max_session_flops=7,
    )
    assert Quota(20, 5, 200, 50).with_policy(policy) == Quota(10, 5, 100, 50, 7)
    assert Quota(5, None).with_policy(policy) == Quota(5, None, 100, None, 7)
    assert Quota().with_policy(None) == Quota()
    assert not Quota()


@pytest.mark.parametrize("limit", [0, -1, 2.5, True, "1 MiB"])
@pytest.mark.parametrize(
    "name", ["max_session_memory", "max_session_objects", "max_worker_memory", "max_worker_objects"]
)
def test_limits_that_cannot_be(limit, name):
    with pytest.raises(OptionError, match=f"{name} must be a whole number, at least 1"):
        Policy(**{name: limit})
    with pytest.raises(OptionError, match=f"{name} must be a whole number, at least 1"):
        WebsocketServerWorker("bob", **{name: limit})


def test_an_account_forgets_what_is_gone():
    account = Account(Quota(memory=10_000))
    for _ in range(5_000):
        account.take([torch.ones(100)])
    account.check([torch.ones(2_000)])
    assert len(account._storages) < 1_500


def test_what_was_handed_on_counts_for_who_has_it(make_worker):
    """A move to a worker with quotas: what arrives is its client's."""
    source = make_worker("alice")
    server = WebsocketServerWorker("bob", threads=1, max_session_memory=50 * KIB)
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri) as bob:
        x = torch.ones(5 * KIB).send(source)
        there = x.move(bob)
        assert there.sum().get().item() == 5 * KIB
        y = torch.ones(20 * KIB).send(source)
        with full():
            y.move(bob).get()
        assert y.sum().get().item() == 20 * KIB


def test_what_kernels_save_in_a_graph_counts_until_it_is_freed(hospital):
    """Of a cross entropy its pointer shows one number, and its graph keeps the logarithms of all probabilities."""
    worker = hospital(small())()
    x = torch.zeros(128, 40, requires_grad=True).send(worker)  # 20 KiB
    target = torch.zeros(128, dtype=torch.int64).send(worker)
    kept = []
    with full():
        for _ in range(10):
            kept.append(torch.nn.functional.cross_entropy(x, target))
            worker.objects_count()
        kept[-1].get()
    kept = kept[:1]
    for _ in range(20):  # freed with its pointer, or by a backward pass
        loss = torch.nn.functional.cross_entropy(x, target)
        loss.backward()
    assert x.grad.get().shape == (128, 40)
    assert len(kept) == 1


def test_nodes_of_a_graph_count(hospital):
    worker = hospital(small())()
    x = torch.zeros(1, requires_grad=True).send(worker)
    y = x
    with full():
        for _ in range(200):
            y = y + 1  # no value is kept by that, and no pointer but the last
        y.get()
    y = x
    for _ in range(50):
        y = y + 1
    assert y.get().item() == 50


def test_so_many_nodes_that_to_free_them_would_end_the_worker_are_refused(hospital, monkeypatch):
    monkeypatch.setattr(quotas, "MOST_NODES", 20)
    worker = hospital(small(memory=1 << 40))()
    x = torch.zeros(1, requires_grad=True).send(worker)
    y = x
    for _ in range(30):
        y = y + 1
    with pytest.raises(PolicyRefusedError, match="more than the 20 nodes of autograd graphs"):
        y.get()
    y = x
    for _ in range(15):  # what was dropped counts no longer
        y = y + 1
    assert y.get().item() == 15


def test_graphs_of_gradients_count(hospital):
    worker = hospital(small())()
    x = torch.ones(20 * KIB // 4, requires_grad=True).send(worker)
    kept = []
    with full():
        for _ in range(30):
            kept.append(torch.autograd.grad((x * x * x).sum(), x, create_graph=True)[0].sum())
        kept[-1].get()
    kept.clear()
    assert torch.autograd.grad((x * x).sum(), x)[0].sum().get().item() == 10 * KIB


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("way", ["backward", "retained", "set"])
def test_gradients_with_graphs_keep_nothing_that_nobody_can_ask_for(hospital, way):
    """PyTorch lets such a tensor and its gradient keep each other for ever; a worker frees both with the pointer."""
    connect = hospital(small())
    for session in range(3):
        worker = connect(OWNER)
        for _ in range(6):
            x = torch.full((KIB,), 2.0, requires_grad=True).send(
                worker
            )  # 4 KiB, and some five times that behind it
            match way:
                case "backward":
                    (x * x * x).sum().backward(create_graph=True)
                case "retained":
                    y = x * 1
                    y.retain_grad()
                    (y * y * y).sum().backward(create_graph=True)
                    assert y.grad[0].get().item() == 12.0
                    del y
                case _:
                    x.grad = 3 * x * x
            assert x.grad[0].get().item() == 12.0
            if session < 2:
                assert torch.autograd.grad(x.grad.sum(), x)[0][0].get().item() == 12.0  # of second order
            del x
        worker.objects_count()
        worker.close()


@pytest.mark.parametrize("op", ["dropout", "max_pool1d", "layer_norm", "gelu", "in_place", "chunks"])
def test_whatever_op_makes_the_graph_it_is_held_to_the_quota(hospital, op):
    """A loop that keeps one number each time, and whatever its graph keeps."""
    worker = hospital(small())()
    x = torch.rand(1, 64, 40, requires_grad=True).send(worker)  # 10 KiB
    kept = []

    def step():
        match op:
            case "dropout":
                return torch.nn.functional.dropout(x, 0.5, training=True).sum()
            case "max_pool1d":
                return torch.nn.functional.max_pool1d(x, 2).sum()
            case "layer_norm":
                return torch.nn.functional.layer_norm(x, (40,)).sum()
            case "gelu":
                return torch.nn.functional.gelu(x * 2).sum()
            case "in_place":
                return (x * 1).mul_(x).exp_().sum()
            case _:
                return sum(part.exp().sum() for part in x.chunk(4, 1))

    with full():
        for _ in range(120):
            kept.append(step())
        worker.objects_count()
        kept[-1].get()
    kept.clear()
    loss = step()
    loss.backward()
    assert x.grad.get().shape == (1, 64, 40)


def long_plan(ops, name):
    """A plan of some 34 bytes an op as a file, 1 KiB an op in memory."""

    def long(x):
        for n in range(ops):
            x = x + n
        return x

    plan = planrt.func2plan()(long).build(torch.ones(1))
    plan.name = name
    return plan


class Long(torch.nn.Module):
    """A model whose plan is as long, and of another hash for each width."""

    def __init__(self, width, ops=100):
        super().__init__()
        self.inner, self.ops = torch.nn.Linear(width, 1), ops

    def forward(self, x):
        for n in range(self.ops):
            x = x + n
        return self.inner(x)


def train(worker, model):
    config = TrainConfig(model=model, loss_fn=loss_fn, batch_size=8)
    return one_round(worker, config)


def one_round(worker, config):
    async def main():
        scheduler = RoundScheduler([worker], config, dataset_key="k", seed=1)
        await scheduler.prepare()
        return await scheduler.run_round(1, config.state)

    return asyncio.run(main())


def test_plans_that_rounds_send_count_and_give_way(hospital):
    data = BaseDataset(torch.ones(8, 4), torch.ones(8, 1))
    connect = hospital(small(400 * KIB), datasets={"k": data})
    worker = connect(OWNER)
    for ops in range(40, 60):  # of some 100 KiB each, which would be 2 MiB together
        assert train(worker, Long(4, ops)).loss >= 0
    x = torch.ones(85 * KIB).send(worker)  # 340 of 400 KiB: plans go, tensors do not
    assert x.sum().get().item() == 85 * KIB
    with full():  # where nothing else gives way there is no room for another one
        train(worker, Long(4, 61))
    assert train(connect(), Long(4, 61)).loss >= 0  # another user has its own
    del x
    worker.objects_count()  # so that it is gone there
    assert train(worker, Long(4, 62)).loss >= 0


def test_what_the_ops_of_a_plan_take_counts_however_it_comes(hospital):
    data = BaseDataset(torch.ones(8, 4), torch.ones(8, 1))
    worker = hospital(small(400 * KIB), datasets={"k": data})()
    with full():
        train(worker, Long(4, 1000))
    kept = []
    with full():
        for n in range(8):
            kept.append(long_plan(100 + n, f"p{n}").send(worker))
            worker.objects_count()
    kept = kept[:1]
    with full():
        copies = [kept[0].copy() for _ in range(8)]
        copies[-1](torch.ones(1).send(worker)).get()
    del copies
    assert kept[0](torch.ones(1).send(worker)).get().item() == 1 + sum(range(100))


def test_plans_are_bounded_by_bytes_without_a_quota(make_worker):
    datasets = {"k": BaseDataset(torch.ones(8, 4), torch.ones(8, 1))}
    config = TrainConfig(model=Long(4, 50), loss_fn=loss_fn, batch_size=8)
    other = TrainConfig(model=Long(4, 51), loss_fn=loss_fn, batch_size=8)

    def requests(worker, config):
        return one_round(worker, config).workers[worker.id].requests

    assert requests(make_worker("alice", datasets), config) == 1  # prepare() has sent the plan
    size = len(config.plans.training.to_bytes())
    worker = make_worker("bob", datasets, limits=Limits(round_plan_memory=size * 3 // 2))
    assert requests(worker, config) == 1
    assert requests(worker, other) == 1
    assert requests(worker, config) == 3  # it had gone: refused, plan, request
    small = make_worker("charlie", datasets, limits=Limits(round_plan_memory=1000))
    with pytest.raises(RemoteError, match="a plan of .* bytes is over the limit of 1,000"):
        requests(small, TrainConfig(model=Long(4, 52), loss_fn=loss_fn, batch_size=8))


def test_a_plan_has_so_many_bytes_however_it_comes(make_worker, monkeypatch):
    monkeypatch.setattr(sent_plans.check_size, "__defaults__", (1000,))
    worker = make_worker("bob")
    with pytest.raises(RemoteError, match="a plan of .* bytes is over the limit of 1,000"):
        long_plan(100, "p").send(worker)(torch.ones(1).send(worker)).get()


def test_no_cache_keeps_a_plan_that_is_gone(make_worker):
    """Caches of what plans do would count for nobody."""
    worker = make_worker("bob")
    plan = long_plan(60, "p")
    graph = weakref.ref(plan.record.graphs[0])
    there = plan.send(worker)
    x = torch.ones(1, requires_grad=True).send(worker)
    assert there(x).get().item() == 1 + sum(range(60))
    hash = hashlib.sha256(plan.record.to_bytes()).hexdigest()
    del plan, there
    worker.objects_count()  # the plan's object is gone there
    gc.collect()
    assert hash not in plan_kind._records
    assert graph() is None


def answer(nbytes):
    return m.Fetched(False, False), [torch.zeros(nbytes // 4)]


def test_answers_that_have_not_arrived_count():
    """A client that never says that they have keeps them at the worker, and what they copy of its objects."""
    account = Account(Quota(memory=100 * KIB))
    kept = Keeping("ann", Limits())
    for number in (1, 2, 3):
        kept.answered(number, *answer(30 * KIB), account)
    with pytest.raises(PolicyError, match="max_session_memory"):
        account.check(beside=20 * KIB)
    assert len(kept.answers) == 3
    kept.before_writing()  # the copies take as much once more for as long as both are there
    assert kept.broken
    assert not kept.answers
    account.check([torch.zeros(90 * KIB // 4)])  # all of it is free again
    other = Keeping("ann", Limits())
    other.answered(1, *answer(60 * KIB), account)
    other.answered(2, *answer(60 * KIB), account)
    assert other.broken  # it goes on over this connection, and ends with it


def test_what_is_known_of_graphs_keeps_no_session_that_is_over():
    first, second = Session("1"), Session("2")
    second.share_graphs(first)
    first.graphs.unseen_writes = True
    first.leave_graphs()
    assert first.graphs.members == [first]
    assert second.graphs.members == [second]
    assert second.graphs.unseen_writes


def test_so_many_requests_of_a_session_wait_for_other_workers(monkeypatch):
    monkeypatch.setattr(answering, "MOST_WAITING", 3)
    worker = WorkerState("bob")
    worker.handle(Received(1, m.Envelope(1, m.Hello("ann", worker.versions)), []))
    elsewhere = m.PeerAddress("alice", "ws://localhost:1")

    def ask(number):
        wanted = m.PutPointer(number, elsewhere, 7, "token")
        return worker.handle(Received(1, m.Envelope(number, wanted), []))

    keys = [ask(number)[0].key for number in (2, 3, 4)]
    (refused,) = ask(5)
    assert "3 requests of this session wait for other workers" in refused.envelope.body.message
    worker.handle(PeerAnswered(keys[0], m.Done(), []))
    assert len(ask(6)) == 2  # to the other worker, and Wait
