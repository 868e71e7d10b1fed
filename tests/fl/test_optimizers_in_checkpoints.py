"""What workers' optimizers keep is in checkpoints: a run that goes on ends with the bits of one that was not broken."""

import asyncio
import contextlib
import json

import pytest
import torch
import torch.nn.functional as F

from planrt.errors import GetNotPermittedError, OptionError, RunFolderError
from planrt.fl import RoundScheduler, TrainConfig
from planrt.plans import optimizer_states
from planrt.plans.policy.rules import Policy
from planrt.plans.training import OPTIMIZERS, check_optimizer
from planrt.serde.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from planrt.serde.disk import Disk
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.wire import messages as m
from tests.models import classification_data, seeded_classifier
from tests.watching import whole_lines

IDS = ["alice", "bob"]
ROUNDS = 4
DATA = [classification_data(n) for n in range(len(IDS))]


def config(optimizer="Adam", **options):
    options = {"batch_size": 8, "max_nr_batches": 2, "optimizer_args": {"lr": 0.05}, **options}
    return TrainConfig(
        seeded_classifier(), F.nll_loss, optimizer=optimizer, keep_optimizer_state=True, **options
    )


@contextlib.contextmanager
def virtual(**options):
    """New workers, as a process that was started again has them."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(VirtualWorker(id, datasets={"d": data}, auto_add=False, **options))
            for id, data in zip(IDS, DATA, strict=True)
        ]


def fresh(workers, folder=None, job=None, **options):
    return RoundScheduler(workers, job or config(), dataset_key="d", seed=7, run_dir=folder, **options)


async def go(scheduler, until=ROUNDS, *, close=True):
    await scheduler.prepare()
    state = scheduler.state
    for number in range(scheduler.next_round, until + 1):
        state = (await scheduler.run_round(number, state)).state
    if close:
        await scheduler.close()
    return state


def whole(job=None, until=ROUNDS, **options):
    with virtual() as workers:
        return asyncio.run(go(fresh(workers, None, job, **options), until))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def killed(scheduler):
    scheduler._written.record.folder.close()


def keeping():
    """Optimizers that keep anything, and can train this model."""
    for name in sorted(OPTIMIZERS.keys() - {"SparseAdam", "Muon"}):
        args = {"lr": 0.05}
        yield pytest.param(name, {**args, "momentum": 0.9} if name == "SGD" else args, id=name)


@pytest.mark.parametrize(("optimizer", "args"), list(keeping()))
def test_a_run_in_two_parts_ends_as_one_in_one_whatever_the_optimizer(optimizer, args, tmp_path):
    check_optimizer(optimizer, args)

    def job():
        return config(optimizer, optimizer_args=args)

    unbroken = whole(job())
    with virtual() as workers:
        asyncio.run(go(fresh(workers, tmp_path, job()), 2))
    with virtual() as workers:  # both sides are new processes
        again = RoundScheduler.resume(tmp_path, workers, job())
        assert again.next_round == 3
        assert same(asyncio.run(go(again)), unbroken)


def test_on_both_transports_and_in_the_same_session(make_worker, tmp_path):
    unbroken = whole()
    workers = [make_worker(id, {"d": data}) for id, data in zip(IDS, DATA, strict=True)]

    async def three():
        first = fresh(workers, tmp_path)
        await go(first, 2, close=False)
        await first.settled()
        killed(first)
        again = RoundScheduler.resume(tmp_path, workers, config())
        await go(again, 3)
        return await go(RoundScheduler.resume(tmp_path, workers, config()))

    assert same(asyncio.run(three()), unbroken)


@pytest.mark.parametrize(("every", "next_round"), [(1, 4), (2, 3), (3, 4), (0, 1)])
def test_with_fewer_checkpoints_more_rounds_are_made_again(tmp_path, every, next_round):
    async def three(first):
        await go(first, 3, close=False)
        await first.settled()  # a checkpoint is written while the run goes on

    with virtual() as workers:
        first = fresh(workers, tmp_path, checkpoint_every=every)
        asyncio.run(three(first))
        killed(first)
    with virtual() as workers:
        again = RoundScheduler.resume(tmp_path, workers, config())
        assert again.next_round == next_round
        assert same(asyncio.run(go(again)), whole())


def test_no_checkpoint_is_made_of_optimizers_that_have_gone_on(tmp_path):
    """A round that fails has stepped them: closing must not write that down as the round before."""

    class FailsAtThree:
        rounds = 0

        def init(self):
            self.rounds += 1
            return []

        def add(self, states, entries, weight):
            return [*states, entries]

        def result(self, states):
            if self.rounds == 3:
                raise OptionError("not this time")
            return {name: (one + states[1][name]).div(2).to(one.dtype) for name, one in states[0].items()}

        def __repr__(self):
            return "mean"

    async def fails(workers):
        scheduler = fresh(workers, tmp_path, aggregation=FailsAtThree(), checkpoint_every=5)
        with pytest.raises(OptionError, match="not this time"):
            await go(scheduler, close=False)
        await scheduler.close()

    with virtual() as workers:
        asyncio.run(fails(workers))
    with virtual() as workers:
        mean = FailsAtThree()
        mean.rounds = 10
        again = RoundScheduler.resume(tmp_path, workers, config(), aggregation=mean)
        assert again.next_round == 1
        ended = asyncio.run(go(again))
    with virtual() as workers:
        mean = FailsAtThree()
        mean.rounds = 10
        assert same(asyncio.run(go(fresh(workers, aggregation=mean))), ended)


class Remote:
    """Workers behind sockets, which can be restarted: their sessions are gone then."""

    def __init__(self, stack):
        self._stack = stack
        self._serving = {}
        self.workers = []
        for id, data in zip(IDS, DATA, strict=True):
            uri = self._serve(id, data, 0)
            self.workers.append(stack.enter_context(WebsocketClientWorker(id, uri=uri)))

    def _serve(self, id, data, port):
        server = WebsocketServerWorker(id, threads=1, port=port)
        server.add_dataset(data, "d")
        self._serving[id] = self._stack.enter_context(contextlib.ExitStack())
        return self._serving[id].enter_context(server.running())

    def restart(self, worker):
        number = self.workers.index(worker)
        self._serving[worker.id].close()
        self._serve(worker.id, DATA[number], int(worker.address.rpartition(":")[2]))


@pytest.fixture
def make_remote():
    with contextlib.ExitStack() as stack:
        yield lambda: Remote(stack)


def steps(folder, number):
    """How many steps each worker's optimizer has made, as the checkpoint says."""
    found = read_checkpoint(folder / f"checkpoint-{number:06d}.run")
    made = {}
    for place, (id, values, _) in enumerate(found.facts["optimizers"]):
        names = [name for _, name, _ in values or []]
        made[id] = int(found.tensors[f"optimizer/{place}/{names.index('step')}"]) if values else 0
    return made


def test_a_worker_that_comes_later_gets_its_state_before_it_trains(tmp_path, make_remote):
    """With `min_workers`, bob is not there when the run goes on, nor in the round after."""
    remote = make_remote().workers

    async def later():
        await go(fresh(remote, tmp_path, min_workers=1), 2)
        assert steps(tmp_path, 2) == {"alice": 4, "bob": 4}
        remote[1].close()
        again = RoundScheduler.resume(tmp_path, remote, config())
        state = await go(again, 3, close=False)
        await again.settled()
        assert steps(tmp_path, 3) == {"alice": 6, "bob": 4}
        remote[1].connect()
        result = await again.run_round(4, state)
        assert not result.missing
        await again.close()
        assert steps(tmp_path, 4) == {"alice": 8, "bob": 6}

    asyncio.run(later())


@pytest.mark.parametrize("lost", ["restarted", "cut"])
def test_a_worker_whose_session_was_lost_gets_back_what_was_read_of_it(tmp_path, make_remote, lost):
    """It is restarted, or its connection cut, after round 2; the run, and one that goes on, are as if it was not."""

    async def loses(remote, folder, stop):
        scheduler = fresh(remote.workers, folder)
        state = await go(scheduler, 2, close=False)
        await scheduler.settled()
        bob = remote.workers[1]
        if lost == "restarted":
            await asyncio.to_thread(remote.restart, bob)
        else:
            bob.close()
            bob.connect()
        if stop:
            return killed(scheduler)
        for number in (3, 4):
            state = (await scheduler.run_round(number, state)).state
        await scheduler.close()
        return state

    unbroken, remote = whole(), make_remote()
    asyncio.run(loses(remote, tmp_path / "part", True))
    again = RoundScheduler.resume(tmp_path / "part", remote.workers, config())
    assert same(asyncio.run(go(again)), unbroken)
    assert same(asyncio.run(loses(make_remote(), tmp_path / "whole", False)), unbroken)
    assert steps(tmp_path / "whole", 4) == steps(tmp_path / "part", 4) == {"alice": 8, "bob": 8}


def test_a_checkpoint_has_them_as_data(tmp_path):
    with virtual() as workers:
        asyncio.run(go(fresh(workers, tmp_path), 1))
    found = read_checkpoint(tmp_path / "checkpoint-000001.run")
    assert [(id, count) for id, _, count in found.facts["optimizers"]] == [("alice", 18), ("bob", 18)]
    assert {name for _, name, _ in found.facts["optimizers"][0][1]} == {"step", "exp_avg", "exp_avg_sq"}
    before = read_checkpoint(tmp_path / "checkpoint-000000.run")
    assert before.facts["optimizers"] == [["alice", None, 0], ["bob", None, 0]]


def test_a_checkpoint_without_them_is_refused(tmp_path):
    with virtual() as workers:
        asyncio.run(go(fresh(workers, tmp_path), 1))
        for path in tmp_path.glob("*.run"):
            found = read_checkpoint(path)
            facts = {name: value for name, value in found.facts.items() if name != "optimizers"}
            write_checkpoint(Disk(), path, Checkpoint(facts, found.tensors))
        again = RoundScheduler.resume(tmp_path, workers, config())
        with pytest.raises(RunFolderError, match="no states of the workers' optimizers"):
            asyncio.run(again.prepare())
        killed(again)
        other = RoundScheduler.resume(tmp_path, workers, config(optimizer_args={"lr": 0.1}))
        with pytest.raises(RunFolderError, match="its optimizer_args is"):
            asyncio.run(other.prepare())


# ------------------------------------------------------------------------- what leaves, and what does not


def test_secure_aggregation_keeps_them_on_the_workers(tmp_path):
    with virtual() as workers:
        with pytest.raises(OptionError, match="would uncover its updates.*leave run_dir= out"):
            fresh(workers, tmp_path, secure_aggregation=True)
        asyncio.run(go(fresh(workers, secure_aggregation=True), 1))
        plan = config()
        plan.trace_for(workers[0], "d")
        for worker in workers:
            with pytest.raises(GetNotPermittedError, match="comes from updates that were masked"):
                asyncio.run(read(worker, plan))
        asyncio.run(go(fresh(workers), 1))  # in the clear, from what was masked
        with pytest.raises(GetNotPermittedError):
            asyncio.run(read(workers[0], plan))


async def read(worker, job, optimizer="Adam"):
    plan = job.plans.training
    return await worker.ask(m.OptimizerState, m.ReadOptimizer(plan.hash, "d", optimizer), plan=plan)


def test_an_owner_who_wants_secure_aggregation_gives_none(tmp_path):
    with virtual(policy=Policy(approval="open", require_secure_aggregation=2)) as workers:
        scheduler = fresh(workers, tmp_path)
        with pytest.raises(
            RunFolderError,
            match="'alice' does not give what its optimizer keeps.*secure aggregations only.*leave run_dir= out",
        ):
            asyncio.run(scheduler.prepare())
        asyncio.run(scheduler.close())


def test_under_a_policy_they_leave_where_updates_do_and_the_owner_is_told(tmp_path):
    unbroken = whole()
    policy, log = Policy(approval="open"), tmp_path / "audit.jsonl"
    with (
        virtual(policy=policy) as (_, bob),
        VirtualWorker("alice", datasets={"d": DATA[0]}, auto_add=False, policy=policy, audit=log) as alice,
    ):
        asyncio.run(go(fresh([alice, bob], tmp_path / "run"), 2))
    told = [json.loads(line) for line in whole_lines(log)]
    assert [one["event"] for one in told if one["event"] in ("fit", "read_optimizer")] == [
        "fit", "read_optimizer", "fit", "read_optimizer",
    ]  # fmt: skip
    assert [one["data"] for one in told if one["event"] == "read_optimizer"] == [["d"], ["d"]]
    with virtual(policy=policy) as workers:
        assert same(asyncio.run(go(RoundScheduler.resume(tmp_path / "run", workers, config()))), unbroken)


# -------------------------------------------------------------------------------------- hostile requests


def put(worker, job, values, tensors, optimizer="Adam"):
    plan = job.plans.training
    values = [m.OptimizerValue(*one) for one in values]
    body = m.PutOptimizer(plan.hash, "d", optimizer, values)
    asyncio.run(worker.ask(m.Done, body, tensors, plan=plan))


ODD = {
    "no such parameter": ([(99, "exp_avg", "tensor")], [torch.zeros(1)], "is of parameter 99"),
    "fewer tensors": ([(0, "exp_avg", ["tensor", "tensor"])], [torch.zeros(1)], "fewer tensors"),
    "more tensors": ([], [torch.zeros(1)], "more tensors"),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_state_that_is_none_is_refused(odd):
    values, tensors, words = ODD[odd]
    with virtual() as (worker, _):
        job = config()
        job.trace_for(worker, "d")
        with pytest.raises(Exception, match=words):
            put(worker, job, values, tensors)


UNFIT = {
    "names missing": [(0, "step", "tensor")],
    "numbers for tensors": [(0, "exp_avg", 1), (0, "exp_avg_sq", None), (0, "step", True)],
    "lists for tensors": [(0, "exp_avg", [1, 2]), (0, "exp_avg_sq", []), (0, "step", [None])],
    "another shape": [(0, "exp_avg", "tensor"), (0, "exp_avg_sq", "tensor"), (0, "step", "tensor")],
}


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "LBFGS", "Adafactor"])
@pytest.mark.parametrize("unfit", UNFIT)
def test_a_state_of_something_else_ends_the_training_with_one_error(unfit, optimizer):
    """And nothing else of the worker: it trains afterwards."""
    with virtual() as (worker, _):
        job = config(optimizer)
        job.trace_for(worker, "d")
        values = UNFIT[unfit]
        tensors = [torch.zeros(3) for _, _, value in values if value == "tensor"]
        put(worker, job, values, tensors, optimizer)
        with contextlib.suppress(OptionError):
            try:
                asyncio.run(job.fit(worker, job.state, dataset_key="d", seed=1))
            except Exception as error:
                assert "optimizer" in str(error), error
        plain = TrainConfig(seeded_classifier(), F.nll_loss, batch_size=8, max_nr_batches=1)
        assert asyncio.run(go(RoundScheduler([worker], plain, dataset_key="d", seed=1), 1))


def test_training_that_fails_half_way_leaves_what_is_kept_as_it_was():
    class Fails(torch.utils.data.Dataset):
        broken = False

        def __len__(self):
            return 32

        def __getitem__(self, index):
            if self.broken and self.read > 8:
                raise ValueError("no more")
            self.read += 1
            return torch.ones(8) * index, index % 3

    torch.manual_seed(0)
    data = Fails()
    data.read = 0
    job = TrainConfig(
        torch.nn.Linear(8, 3), F.cross_entropy, batch_size=8, max_nr_batches=2, optimizer="Adam",
        optimizer_args={"lr": 0.1}, keep_optimizer_state=True, shuffle=False,
    )  # fmt: skip
    with VirtualWorker("alice", datasets={"d": data}, auto_add=False) as worker:
        job.trace_for(worker, "d")
        asyncio.run(job.fit(worker, job.state, dataset_key="d", seed=1))
        before = asyncio.run(read(worker, job))
        data.broken, data.read = True, 0
        with pytest.raises(Exception, match="no more"):
            asyncio.run(job.fit(worker, job.state, dataset_key="d", seed=1))
        after = asyncio.run(read(worker, job))
    assert before[0] == after[0]
    assert all(torch.equal(one, other) for one, other in zip(before[1], after[1], strict=True))


def test_packing_is_an_exact_inverse():
    state = {
        0: {"step": torch.tensor(3.0), "n": 4, "none": None, "flag": True, "t": 0.1},
        2: {"dirs": [torch.ones(2), torch.zeros(3)], "al": [None, torch.ones(1)], "empty": []},
    }
    back = optimizer_states.unpacked(*optimizer_states.packed(state), parameters=3)
    assert str(back) == str(state)
    assert back[2]["dirs"][0] is not state[2]["dirs"][0]
    with pytest.raises(OptionError, match="keeps a str as 'x'"):
        optimizer_states.packed({0: {"x": "tensor"}})
