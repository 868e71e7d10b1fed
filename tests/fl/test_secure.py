"""Rounds in which the server learns the sum of the models only: exact, with workers that drop out at every step."""

import asyncio
import contextlib
import json
import math
import os
import signal
import threading

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planrt.cli import main
from planrt.errors import (
    AggregationError,
    OptionError,
    PolicyRefusedError,
    QuorumError,
    RemoteError,
    RunFolderError,
    UpdateRefusedError,
    WorkerLostError,
)
from planrt.fl import RoundScheduler, SecureAggregation, TrainConfig
from planrt.fl.exchange import PlainExchange
from planrt.fl.round_result import parts_in
from planrt.loop import run as run_on_loop
from planrt.plans.policy.rules import Policy
from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.rounds.secure_sums import MOST_SUMS
from planrt.workers.wire import messages as m
from tests import warm
from tests.fl.clocks import late_once_answered, standing_clock
from tests.fl.models import MODELS, make
from tests.fl.served import IDS, worker_processes
from tests.models import classification_data, seeded_classifier

pytestmark = pytest.mark.usefixtures("warm_workers")


BOUND = 2.0**-33
"""What the default scale may add to the average, beyond one rounding to the entry's dtype."""


def config(**options):
    options = {"batch_size": 8, "max_nr_batches": 4, "optimizer_args": {"lr": 0.1}, **options}
    return TrainConfig(seeded_classifier(), F.nll_loss, **options)


def data_of(id):
    return classification_data(IDS.index(id), samples=40 + 8 * IDS.index(id))


@pytest.fixture
def workers(make_worker):
    return [make_worker(id, {"d": data_of(id)}) for id in IDS]


def scheduler_of(workers, job=None, *, secure=True, **options):
    made = RoundScheduler(
        workers, job or config(), dataset_key="d", seed=7, secure_aggregation=secure, **options
    )
    asyncio.run(made.prepare())
    return made


def run(scheduler, number, state, **options):
    return asyncio.run(scheduler.run_round(number, state, **options))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def exact_average(plain, ids, *, weighted=False):
    """The average of the states that the workers `ids` returned in a plain round, in float64."""
    weights = {id: plain.workers[id].samples if weighted else 1 for id in ids}
    total = sum(weights.values())
    return {
        name: sum(plain.worker_states[id][name].double() * weights[id] for id in ids) / total
        for name in plain.state
    }


def assert_is_average(state, exact):
    for name, value in state.items():
        if not value.is_floating_point():
            assert torch.equal(value.double(), exact[name].round()), name
            continue
        spacing = torch.finfo(value.dtype).eps * exact[name].abs()
        assert ((value.double() - exact[name]).abs() <= BOUND + spacing).all(), name


# --------------------------------------------------------------------------------------- what a round makes


@pytest.mark.parametrize("weighted", [False, True])
def test_the_average_is_that_of_the_plain_round(workers, weighted):
    job = config(max_nr_batches=-1)
    plain_rounds = scheduler_of(workers, job, secure=False, weighted=weighted)
    secure_rounds = scheduler_of(workers, job, weighted=weighted)
    state = job.state
    for number in (1, 2):
        plain = run(plain_rounds, number, state, keep_worker_states=True)
        secure = run(secure_rounds, number, state)
        assert_is_average(secure.state, exact_average(plain, IDS, weighted=weighted))
        assert secure.loss == pytest.approx(plain.loss, abs=1e-6)
        state = secure.state
    assert secure.missing == {}


def test_no_figures_of_a_single_worker_come_back(workers):
    scheduler = scheduler_of(workers)
    result = run(scheduler, 1, scheduler.config.state)
    assert [part.samples for part in result.workers.values()] == [0, 0, 0]
    assert all(np.isnan(part.loss) for part in result.workers.values())
    assert np.isfinite(result.loss)
    assert "alice, bob, charlie" in repr(result)
    assert "nan" not in repr(result)


def test_virtual_and_websocket_workers_give_the_same_bits():
    states = []
    for kind in ("memory", "websocket"):
        with contextlib.ExitStack() as stack:
            workers = []
            for id in IDS:
                if kind == "memory":
                    worker = VirtualWorker(id, datasets={"d": data_of(id)}, auto_add=False)
                else:
                    server = WebsocketServerWorker(id, threads=1)
                    server.add_dataset(data_of(id), "d")
                    worker = WebsocketClientWorker(
                        id, uri=stack.enter_context(server.running()), auto_add=False
                    )
                workers.append(stack.enter_context(worker))
            scheduler = scheduler_of(workers)
            state = scheduler.config.state
            for number in (1, 2, 3):
                state = run(scheduler, number, state).state
            states.append(state)
    assert same(*states)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure"])
def test_rounds_that_are_started_at_once_run_in_turn(workers, secure):
    scheduler = scheduler_of(workers, secure=secure)
    state = scheduler.config.state
    in_turn = [run(scheduler, number, state) for number in (1, 2)]

    async def at_once():
        return await asyncio.gather(*(scheduler.run_round(number, state) for number in (1, 2)))

    for one, other in zip(asyncio.run(at_once()), in_turn, strict=True):
        assert same(one.state, other.state)
        assert one.loss == other.loss


def test_the_state_is_changed_in_place_where_that_is_asked_for(workers):
    scheduler = scheduler_of(workers)
    state = {name: value.clone() for name, value in scheduler.config.state.items()}
    expected = run(scheduler, 1, state).state
    run(scheduler, 1, state, in_place=True)
    assert same(state, expected)


@pytest.mark.filterwarnings("ignore::planrt.errors.PlanWarning")
@pytest.mark.parametrize(
    "name", sorted(MODELS.keys() - {"resnet18", "mobilenet"})
)  # of batch norm there is enough
def test_models_that_people_bring(name):
    model, loss, data, target = make(name)
    job = TrainConfig(
        model,
        loss,
        batch_size=4,
        optimizer="SGD",
        optimizer_args={"lr": 0.01},
        example=(data[:4], target[:4]),
    )
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                VirtualWorker(id, datasets={"d": BaseDataset(data[place:], target[place:])}, auto_add=False)
            )
            for place, id in enumerate(("alice", "bob"))
        ]
        plain = run(scheduler_of(workers, job, secure=False), 1, job.state)
        secure = run(scheduler_of(workers, job), 1, job.state)
    for key, value in secure.state.items():
        assert value.dtype == plain.state[key].dtype
        if value.is_floating_point():
            assert torch.allclose(value, plain.state[key], rtol=1e-5, atol=1e-6), key
    assert secure.state.rest.keys() == plain.state.rest.keys()
    for key, value in secure.state.rest.items():
        assert torch.allclose(value, plain.state.rest[key], rtol=1e-5, atol=1e-6), key


def test_integers_are_the_mean_rounded(make_worker):
    """The plain round takes the first worker's, which is one worker's value."""
    sizes = {"alice": 8, "bob": 16, "charlie": 40}
    workers = [make_worker(id, {"d": classification_data(1, samples=size)}) for id, size in sizes.items()]
    job = config(max_nr_batches=-1)
    result = run(scheduler_of(workers, job), 1, job.state)
    assert result.state["norm.num_batches_tracked"].item() == round((1 + 2 + 5) / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    model = nn.Linear(4, 2).to(dtype)
    data = torch.randn(16, 4).to(dtype), torch.randint(0, 2, (16,))
    job = TrainConfig(
        model, F.cross_entropy, batch_size=8, optimizer_args={"lr": 0.1}, example=(data[0][:8], data[1][:8])
    )
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(VirtualWorker(id, datasets={"d": BaseDataset(*data)}, auto_add=False))
            for id in IDS
        ]
        plain = run(scheduler_of(workers, job, secure=False), 1, job.state, keep_worker_states=True)
        secure = run(scheduler_of(workers, job), 1, job.state)
    assert_is_average(secure.state, exact_average(plain, IDS))


NOTHING = BaseDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("why", ["empty", "drop_last"])
def test_a_worker_that_trains_on_nothing_is_no_member_of_a_sum(make_worker, why, weighted):
    """It would add nothing, and so hide nobody."""
    options = {"batch_size": 44, "drop_last": True} if why == "drop_last" else {}  # alice has 40 items
    without = "alice" if why == "drop_last" else "bob"
    workers = [
        make_worker(id, {"d": NOTHING if why == "empty" and id == without else data_of(id)}) for id in IDS
    ]
    job = config(**options)
    plain = run(
        scheduler_of(workers, job, secure=False, weighted=weighted), 1, job.state, keep_worker_states=True
    )
    secure = run(scheduler_of(workers, job, weighted=weighted, min_workers=2), 1, job.state)
    assert secure.missing.keys() == {without}
    assert "nothing to train on" in secure.missing[without].why
    left = [id for id in IDS if id != without]
    assert_is_average(secure.state, exact_average(plain, left, weighted=weighted))
    assert secure.loss == pytest.approx(plain.loss, abs=1e-6)
    with pytest.raises(
        RemoteError, match=f"worker '{without}': there is nothing to train on in data set 'd'"
    ):
        run(scheduler_of(workers, job, weighted=weighted), 1, job.state)


def test_rounds_of_no_batches_have_no_sum(workers):
    with pytest.raises(RemoteError, match="there is nothing to train on .* max_nr_batches is 0"):
        run(scheduler_of(workers, job := config(max_nr_batches=0)), 1, job.state)


def test_a_server_that_lets_the_others_train_on_nothing_gets_no_model(workers):
    """It asks bob and charlie for batches that they have not, and is left with alice alone."""

    def lies(worker, ask):
        async def asked(kind, body, *args, **options):
            if isinstance(body, m.FitMasked):
                fit = msgspec.structs.replace(body.fit, batch_size=1000, drop_last=True)
                body = msgspec.structs.replace(body, fit=fit)
            return await ask(kind, body, *args, **options)

        return asked

    job = config()
    scheduler = scheduler_of(workers, job, min_workers=2)
    for worker in workers[1:]:
        worker.ask = lies(worker, worker.ask)
    try:
        with listening(workers) as heard, pytest.raises(QuorumError, match="nothing to train on"):
            run(scheduler, 1, job.state)
    finally:
        for worker in workers[1:]:
            worker.__dict__.pop("ask", None)
    assert not any(isinstance(body, m.Revealed) for answers in heard.values() for body, _ in answers)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_data", [[], ["bob"]], ids=["nobody", "one"])
def test_no_sum_is_that_of_one_worker_with_data(make_worker, with_data, weighted):
    workers = [make_worker(id, {"d": data_of(id) if id in with_data else NOTHING}) for id in IDS]
    job = config()
    scheduler = scheduler_of(workers, job, weighted=weighted, min_workers=2)
    before = {name: value.clone() for name, value in job.state.items()}
    with (
        listening(workers) as heard,
        pytest.raises(QuorumError, match="alice .*nothing to train on") as caught,
    ):
        run(scheduler, 1, job.state, in_place=True)
    assert caught.value.missing.keys() & {"alice", "charlie"}
    assert not any(isinstance(body, m.Revealed) for answers in heard.values() for body, _ in answers)
    assert same(job.state, before)


def test_a_run_goes_on_where_it_was(workers, tmp_path):
    async def rounds(scheduler, until):
        await scheduler.prepare()
        state = scheduler.state
        for number in range(scheduler.next_round, until + 1):
            state = (await scheduler.run_round(number, state)).state
        await scheduler.close()
        return state

    options = {"dataset_key": "d", "seed": 7, "secure_aggregation": True}
    whole = asyncio.run(rounds(RoundScheduler(workers, config(), run_dir=tmp_path / "whole", **options), 3))
    asyncio.run(rounds(RoundScheduler(workers, config(), run_dir=tmp_path / "part", **options), 2))
    other = RoundScheduler.resume(tmp_path / "part", workers, config())
    with pytest.raises(RunFolderError, match="its combining is 'SecureExchange of threshold 3, 32 bits'"):
        asyncio.run(rounds(other, 3))
    asyncio.run(other.close())
    again = RoundScheduler.resume(tmp_path / "part", workers, config(), secure_aggregation=True)
    assert same(asyncio.run(rounds(again, 3)), whole)


def no_json(constant):
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize("how", ["secure", "nobody has data"])
def test_what_is_written_of_losses_that_nobody_knows_is_json(make_worker, tmp_path, capsys, how):
    """Parsers other than Python's read a journal too."""
    secure = how == "secure"
    workers = [make_worker(id, {"d": data_of(id) if secure else NOTHING}) for id in IDS]
    scheduler = RoundScheduler(
        workers, config(), dataset_key="d", seed=7, secure_aggregation=secure, run_dir=tmp_path / "run"
    )

    async def two_rounds():
        await scheduler.prepare()
        for number in (1, 2):
            await scheduler.run_round(number, scheduler.state)
        await scheduler.close()

    asyncio.run(two_rounds())
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    rounds = [one for line in lines if (one := json.loads(line, parse_constant=no_json))["what"] == "round"]
    assert [one["workers"]["bob"]["loss"] for one in rounds] == [None, None]
    assert all((one["loss"] is not None) == secure for one in rounds)
    json.loads((tmp_path / "run" / "now.json").read_text(), parse_constant=no_json)
    assert main(["status", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert (", loss nan" in said) != secure
    assert main(["status", "--json", str(tmp_path / "run")]) == 0
    json.loads(capsys.readouterr().out, parse_constant=no_json)
    parts, missing = parts_in(rounds[0])
    assert np.isnan(parts["bob"].loss)
    assert missing == {}


# --------------------------------------------------------------------------------------- what the server sees


@contextlib.contextmanager
def listening(workers):
    """What each worker answers, as the client takes it: worker -> [(message, tensors)]."""
    heard = {worker.id: [] for worker in workers}
    asks = [worker.ask for worker in workers]

    def of(worker, ask):
        async def asked(*args, **options):
            answer = await ask(*args, **options)
            heard[worker.id].append((answer[0], [value.clone() for value in answer[1]]))
            return answer

        return asked

    for worker, ask in zip(workers, asks, strict=True):
        worker.ask = of(worker, ask)
    try:
        yield heard
    finally:
        for worker in workers:
            del worker.ask


def test_single_answers_look_like_noise_and_differ_from_run_to_run(workers):
    job = TrainConfig(nn.Sequential(nn.Linear(6, 2000), nn.Linear(2000, 3)), F.cross_entropy, batch_size=8,
                      optimizer_args={"lr": 0.0})  # fmt: skip
    scheduler = scheduler_of(workers, job)
    vectors = []
    for _ in range(2):
        with listening(workers) as heard:
            run(scheduler, 1, job.state)
        for answers in heard.values():
            assert [type(body).__name__ for body, _ in answers] == [
                "SumKeys",
                "SecretsShared",
                "Masked",
                "Revealed",
            ]
            [vector] = answers[2][1]
            counts = np.bincount(vector.numpy().view(np.uint8), minlength=256)
            expected = counts.sum() / 256
            assert ((counts - expected) ** 2 / expected).sum() < 400
            vectors.append(vector)
    assert all(not (one == other).any() for i, one in enumerate(vectors) for other in vectors[:i])


# ---------------------------------------------------------------------------------- updates that cannot count


def nan_data(id):
    data = data_of(id)
    return BaseDataset(torch.full_like(data.data, float("nan")), data.targets)


def test_a_worker_whose_update_is_not_finite_is_named(make_worker):
    workers = [make_worker(id, {"d": nan_data(id) if id == "bob" else data_of(id)}) for id in IDS]
    job = config()
    with pytest.raises(
        RemoteError, match="worker 'bob': first.weight has .* infinite or not numbers"
    ) as caught:
        run(scheduler_of(workers, job), 1, job.state)
    assert caught.value.kind == "ValueRangeError"
    plain = run(
        scheduler_of([workers[0], workers[2]], job, secure=False), 1, job.state, keep_worker_states=True
    )
    secure = run(scheduler_of(workers, job, min_workers=2), 1, job.state)
    assert secure.missing["bob"].kind == "failed"
    assert "first.weight" in secure.missing["bob"].why
    assert_is_average(secure.state, exact_average(plain, ["alice", "charlie"]))


def test_a_worker_whose_update_is_too_large_is_named(make_worker):
    data = {id: data_of(id) for id in IDS}
    data["charlie"] = BaseDataset(data["charlie"].data * 1e7, data["charlie"].targets)
    workers = [make_worker(id, {"d": one}) for id, one in data.items()]
    job = TrainConfig(
        nn.Linear(6, 3), F.cross_entropy, batch_size=8, max_nr_batches=1, optimizer_args={"lr": 1000.0}
    )
    fine = scheduler_of(workers, job)
    with pytest.raises(
        RemoteError, match="worker 'charlie': weight has values .* too large.* smaller scale_bits"
    ):
        run(fine, 1, job.state)
    coarse = scheduler_of(workers, job, secure=SecureAggregation(scale_bits=4))
    assert np.isfinite(run(coarse, 1, job.state).loss)


class Masked(nn.Module):
    """A model with a buffer of `values`, which training multiplies by nothing, or puts `instead` in place of."""

    def __init__(self, values, instead):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.register_buffer("mask", torch.tensor(values))
        self.instead = instead

    def forward(self, x):
        if self.instead is None:
            self.mask.copy_(self.mask + 0)
        else:
            self.mask.copy_(torch.full_like(self.mask, self.instead))
        return F.log_softmax(self.fc(x), 1)


@pytest.mark.parametrize(
    ("value", "instead"),
    [("-inf", torch.finfo(torch.float32).min), ("inf", 0.0), ("nan", 0.5), ("nan", 0.0), ("inf", -math.inf)],
)
def test_what_was_not_finite_stays_or_the_worker_is_named(workers, value, instead):
    for given in (None, instead):
        job = TrainConfig(Masked([float(value), 2.0], given), F.nll_loss, batch_size=8)
        scheduler = scheduler_of(workers, job)
        if given is None:
            mask = run(scheduler, 1, job.state).state["mask"]
            assert torch.equal(mask.isnan(), job.state["mask"].isnan())
            assert torch.equal(mask.nan_to_num(), job.state["mask"].nan_to_num())
        else:
            with pytest.raises(RemoteError, match="worker '.*': mask had values that are not finite, and tr"):
                run(scheduler, 1, job.state)


def test_where_data_are_under_a_policy_the_entry_is_not_told():
    data = {id: data_of(id) for id in IDS}
    data["bob"] = nan_data("bob")
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                VirtualWorker(id, datasets={"d": one}, policy=Policy(approval="open"), auto_add=False)
            )
            for id, one in data.items()
        ]
        job = config()
        with pytest.raises(RemoteError, match="worker 'bob': the update or its loss has values") as caught:
            run(scheduler_of(workers, job), 1, job.state)
    assert "first.weight" not in str(caught.value)
    assert caught.value.remote_traceback == ""


# ----------------------------------------------------------------------------------------------- dropping out

ASKED = {"keys": m.JoinSum, "shares": m.ShareSecrets, "training": m.FitMasked, "uncovering": m.RevealShares}


@contextlib.contextmanager
def lost(worker, kind, *, before):
    """The connection to `worker` ends where it is sent a message of that kind: before it, or with its answer."""
    ask = worker.ask

    async def asked(expected, body, *args, **options):
        if not isinstance(body, kind):
            return await ask(expected, body, *args, **options)
        if before:
            await worker.async_close()
            return await ask(expected, body, *args, **options)
        await ask(expected, body, *args, **options)
        await worker.async_close()
        raise WorkerLostError("lost", address=worker.address, worker_id=worker.id)

    worker.ask = asked
    try:
        yield
    finally:
        del worker.ask
        worker.connect()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("step", ASKED)
def test_the_average_is_that_of_those_whose_models_came(workers, step, before):
    job = config()
    counting = IDS if step == "uncovering" else ["alice", "charlie"]
    plain = run(scheduler_of(workers, job, secure=False), 1, job.state, keep_worker_states=True)
    scheduler = scheduler_of(workers, job, min_workers=2)
    with lost(workers[1], ASKED[step], before=before):
        result = run(scheduler, 1, job.state)
    assert_is_average(result.state, exact_average(plain, counting))
    assert result.missing.keys() == set(IDS) - set(counting)
    assert result.workers.keys() == set(counting)
    again = run(scheduler, 1, job.state)
    assert again.missing == {}
    assert_is_average(again.state, exact_average(plain, IDS))


@pytest.mark.parametrize("step", ASKED)
def test_below_the_threshold_there_is_no_sum(workers, step):
    job = config()
    scheduler = scheduler_of(workers, job, min_workers=2)
    before = {name: value.clone() for name, value in job.state.items()}
    state = {name: value.clone() for name, value in job.state.items()}
    with (
        lost(workers[1], ASKED[step], before=True),
        lost(workers[2], ASKED[step], before=True),
        pytest.raises(QuorumError, match="round 1 needs 2 workers, and [01] count") as caught,
    ):
        run(scheduler, 1, state, in_place=True)
    assert caught.value.missing.keys() >= {"bob", "charlie"}
    assert same(state, before)
    assert run(scheduler, 1, state).missing == {}


@pytest.mark.parametrize("step", ["keys", "shares", "training"])
def test_where_all_are_needed_the_loss_of_one_is_raised(workers, step):
    scheduler = scheduler_of(workers)
    with lost(workers[1], ASKED[step], before=True), pytest.raises(WorkerLostError, match="bob"):
        run(scheduler, 1, scheduler.config.state)


def test_nobody_is_late_before_the_time_out_has_passed(workers):
    """By its own clock, which stands: a machine that stops for a moment makes nobody late."""
    job = config()
    plain = run(scheduler_of(workers, job, secure=False), 1, job.state, keep_worker_states=True)
    scheduler = scheduler_of(workers, job, min_workers=2)
    scheduler.round_timeout = 0.004
    with standing_clock():
        result = run(scheduler, 1, job.state)
    assert not result.missing
    assert_is_average(result.state, exact_average(plain, [worker.id for worker in workers]))


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hang")
    with worker_processes(folder) as (workers, running, _):
        yield workers, running, folder


def test_a_stopped_worker_costs_its_part_of_the_time_out(processes):
    workers, running, _ = processes
    job = config()
    plain = run(scheduler_of(workers, job, secure=False), 1, job.state, keep_worker_states=True)
    scheduler = scheduler_of(workers, job, min_workers=2)
    warm.send_signal(running.pids["charlie"], signal.SIGSTOP)
    try:
        scheduler.round_timeout = 12.0
        with late_once_answered(workers[:2], m.JoinSum, 3.0):
            result = run(scheduler, 1, job.state)
        assert result.missing["charlie"].kind == "late"
        assert "no answer within 3 s" in result.missing["charlie"].why
        assert_is_average(result.state, exact_average(plain, ["alice", "bob"]))
        scheduler.round_timeout = 300.0
        assert run(scheduler, 1, job.state).missing["charlie"].kind == "busy"
    finally:
        warm.send_signal(running.pids["charlie"], signal.SIGCONT)
    while run(scheduler, 1, job.state).missing:  # until its late answer has come, and was dropped
        pass


def test_processes_that_hang_or_are_killed_while_they_train(processes):
    workers, running, folder = processes
    job = config()
    plain = run(scheduler_of(workers, job, secure=False), 1, job.state, keep_worker_states=True)
    scheduler = scheduler_of(workers, job, min_workers=2)
    hang = folder / "hang-alice"
    hang.touch()
    scheduler.round_timeout = 4.0
    try:
        with late_once_answered(workers[1:], m.FitMasked, 4.0):
            result = run(scheduler, 1, job.state)
    finally:
        hang.unlink()
    scheduler.round_timeout = 300.0
    assert result.missing["alice"].kind == "late"
    assert_is_average(result.state, exact_average(plain, ["bob", "charlie"]))
    while run(scheduler, 1, job.state).missing:  # until its late answer has come, and was dropped
        pass
    (folder / "hang-bob").touch()
    threading.Timer(0.5, os.kill, (running.pids["bob"], signal.SIGKILL)).start()
    result = run(scheduler, 1, job.state)
    assert result.missing["bob"].kind == "lost"
    assert_is_average(result.state, exact_average(plain, ["alice", "charlie"]))
    warm.send_signal(running.pids["alice"], signal.SIGKILL)
    with pytest.raises(QuorumError, match="needs 2 workers, and 1 counts"):
        run(scheduler, 2, job.state)


# ----------------------------------------------------------------------------------------- owners' policies


def owned(stack, transport, id, least, data=None):
    policy = Policy(approval="open", require_secure_aggregation=least)
    if transport == "memory":
        return stack.enter_context(
            VirtualWorker(id, datasets={"d": data or data_of(id)}, policy=policy, auto_add=False)
        )
    server = WebsocketServerWorker(id, threads=1, policy=policy)
    server.add_dataset(data or data_of(id), "d")
    uri = stack.enter_context(server.running())
    return stack.enter_context(WebsocketClientWorker(id, uri=uri, auto_add=False))


@pytest.fixture
def owners(transport):
    with contextlib.ExitStack() as stack:
        yield lambda **least: [owned(stack, transport, id, least.get(id)) for id in IDS]


def test_what_a_worker_has_learnt_leaves_in_sums_only(owners):
    workers = owners(bob=3)
    job = config()
    with pytest.raises(PolicyRefusedError, match="'bob' has learnt leaves in secure aggregations only"):
        run(scheduler_of(workers, job, secure=False), 1, job.state)
    with pytest.raises(PolicyRefusedError, match="over at least 3 workers"):
        job.send(workers[1]) and workers[1].fit("d")
    assert np.isfinite(run(scheduler_of(workers, job), 1, job.state).loss)
    with pytest.raises(PolicyRefusedError):  # also after that
        run(scheduler_of(workers, job, secure=False), 1, job.state)


def test_an_owner_who_wants_more_workers_is_named(owners):
    workers = owners(bob=4)
    job = config()
    with pytest.raises(AggregationError, match="owner of 'bob' wants at least 4 workers.*there are 3"):
        run(scheduler_of(workers, job), 1, job.state)


@pytest.mark.parametrize("step", ["keys", "shares", "training"])
def test_an_owners_minimum_holds_for_those_who_are_left(owners, step):
    workers = owners(alice=3)
    job = config()
    scheduler = scheduler_of(workers, job, min_workers=2)
    with (
        lost(workers[1], ASKED[step], before=True),
        pytest.raises(AggregationError, match="'alice' wants at"),
    ):
        run(scheduler, 1, job.state)


@pytest.mark.parametrize("least", [1, 0, -3, 2.5, "many", True])
def test_minimums_that_are_none(least):
    with pytest.raises(OptionError, match="require_secure_aggregation must be a whole number, at least 2"):
        Policy(require_secure_aggregation=least)


def test_the_rule_is_read_from_a_file_and_shown(tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text("require_secure_aggregation = 5\n")
    policy = Policy.from_file(file)
    assert policy.require_secure_aggregation == 5
    assert "training: in secure aggregations only, over at least 5 workers" in str(policy)
    assert policy.version != Policy().version
    file.write_text('require_secure_aggregation = "none"\n')
    assert Policy.from_file(file).version == Policy().version


# ------------------------------------------------------------------------------- a server that does otherwise


def asking(worker, kind, body, tensors=(), **options):
    return run_on_loop(worker.ask(kind, body, tensors, **options), instead="")


def keys_of(worker, sum="one"):
    answer, _ = asking(worker, m.SumKeys, m.JoinSum(sum))
    return answer.seal, answer.mask, answer.least


def test_a_worker_answers_each_message_once_and_in_order(workers):
    alice, bob, charlie = workers
    job = config(example=(torch.zeros(8, 6), torch.zeros(8, dtype=torch.int64)))
    plan = job.plans.training
    run_on_loop(alice.workplace.put_plan(plan), instead="")
    keys = {worker.id: keys_of(worker) for worker in workers}
    with pytest.raises(RemoteError, match="takes part in a secure aggregation of that name already"):
        keys_of(alice)
    for kind, body in [
        (
            m.Masked,
            m.FitMasked("one", job.fit_message(plan, dataset_key="d", seed=1, lr=None), {}, False, 32),
        ),
        (m.Revealed, m.RevealShares("one", ["alice", "bob"])),
    ]:
        with pytest.raises(RemoteError, match="in order"):
            asking(
                alice,
                kind,
                body,
                list(job.plans.names.by_entry(job.state).values()) if kind is m.Masked else (),
            )
    group = m.ShareSecrets("one", 2, keys)
    sealed = {worker.id: asking(worker, m.SecretsShared, group)[0].sealed for worker in (bob, charlie)}
    with pytest.raises(
        RemoteError, match="in order"
    ):  # that it was asked to reveal uses nothing up, but is refused
        asking(alice, m.Revealed, m.RevealShares("one", ["alice", "bob"]))
    asking(alice, m.SecretsShared, group)
    with pytest.raises(RemoteError, match="each is done once"):
        asking(alice, m.SecretsShared, m.ShareSecrets("one", 3, keys))
    fit = m.FitMasked(
        "one", job.fit_message(plan, dataset_key="d", seed=1, lr=None), {id: sealed[id]["alice"] for id in sealed},
        False, 32,
    )  # fmt: skip
    state = list(job.plans.names.by_entry(job.state).values())
    asking(alice, m.Masked, fit, state, plan=plan)
    with pytest.raises(RemoteError, match="each is done once"):
        asking(alice, m.Masked, fit, state, plan=plan)
    revealed, _ = asking(alice, m.Revealed, m.RevealShares("one", ["alice", "bob"]))
    assert (revealed.seeds.keys(), revealed.keys.keys()) == ({"alice", "bob"}, {"charlie"})
    with pytest.raises(RemoteError, match="never joined, or is over"):
        asking(alice, m.Revealed, m.RevealShares("one", ["alice", "bob", "charlie"]))


def test_groups_that_a_worker_does_not_join(workers):
    alice, bob, _ = workers
    keys = {worker.id: keys_of(worker) for worker in (alice, bob)}
    with pytest.raises(RemoteError, match="the threshold of 2 workers"):
        asking(alice, m.SecretsShared, m.ShareSecrets("one", 1, keys))
    with pytest.raises(RemoteError, match="does not have the keys"):
        asking(
            alice,
            m.SecretsShared,
            m.ShareSecrets("one", 2, {**keys, "alice": keys["bob"], "bob": keys["alice"]}),
        )
    with pytest.raises(RemoteError, match="never joined"):
        asking(alice, m.SecretsShared, m.ShareSecrets("other", 2, keys))


def test_another_sessions_aggregation_is_not_there():
    server = WebsocketServerWorker("alice", threads=1)
    with server.running() as uri, WebsocketClientWorker("alice", uri=uri, auto_add=False) as one:
        keys = {"alice": keys_of(one), "bob": (bytes(32), bytes(range(32)), 2)}
        with (
            WebsocketClientWorker("alice", uri=uri, auto_add=False) as other,
            pytest.raises(RemoteError, match="never joined"),
        ):
            asking(other, m.SecretsShared, m.ShareSecrets("one", 2, keys))


def test_aggregations_that_begin_and_do_not_end_are_bounded(workers):
    alice = workers[0]
    for number in range(MOST_SUMS + 1):
        keys_of(alice, f"sum {number}")
    keys_of(alice, "sum 0")  # the oldest is gone
    with pytest.raises(RemoteError, match="already"):
        keys_of(alice, f"sum {MOST_SUMS}")


def test_a_worker_that_is_given_another_model_spoils_the_sum(workers):
    """Masks depend on what all are asked: a server that tells one something else sees noise."""
    job = config()
    scheduler = scheduler_of(workers, job)
    ask = workers[1].ask

    async def other_model(kind, body, tensors=(), **options):
        if isinstance(body, m.FitMasked):
            tensors = [value.clone() for value in tensors]
            tensors[0] += 1
        return await ask(kind, body, tensors, **options)

    workers[1].ask = other_model
    try:
        with pytest.raises(AggregationError, match="masks of the 3 workers did not cancel"):
            run(scheduler, 1, job.state)
    finally:
        del workers[1].ask


@pytest.mark.parametrize("answer", ["short", "float", "none", "two"])
def test_a_worker_that_answers_with_something_else_is_named(workers, answer):
    job = config()
    scheduler = scheduler_of(workers, job)
    ask = workers[1].ask

    async def other_answer(kind, body, tensors=(), **options):
        said, [*values] = await ask(kind, body, tensors, **options)
        if isinstance(body, m.FitMasked):
            [vector] = values
            values = {"short": [vector[:-1]], "float": [vector.double()], "none": [], "two": [vector] * 2}[
                answer
            ]
        return said, values

    workers[1].ask = other_answer
    try:
        with pytest.raises(UpdateRefusedError, match="worker 'bob'"):
            run(scheduler, 1, job.state)
    finally:
        del workers[1].ask


BODY = m.Fit("a" * 64, "d", 1, 1, -1, True, "SGD", {}, False, 1)


@pytest.mark.parametrize(
    "body",
    [
        m.JoinSum("x"), m.SumKeys(bytes(32), bytes(32), 2), m.ShareSecrets("x", 2, {"a": (bytes(32), bytes(32), 2)}),
        m.SumKeys(bytes(32), bytes(32), 2, bytes(64)), m.SignSurvivors("x", ["a"]), m.SurvivorsSigned(bytes(64)),
        m.ShareSecrets("x", 2, {"a": (bytes(32), bytes(32), 2)}, {"a": bytes(64)}),
        m.RevealShares("x", ["a"], {"a": b"1"}), m.SecretsShared({"a": b"s"}),
        m.FitMasked("x", BODY, {"b": b"s"}, True, 32), m.Masked(),
        m.RevealShares("x", ["a"]), m.Revealed({"a": b"1"}, {"b": b"2"}),
    ],
    ids=lambda body: type(body).__name__,
)  # fmt: skip
def test_messages_survive_the_wire(body):
    assert m.from_wire(m.to_wire(m.Envelope(7, body))) == m.Envelope(7, body)


# --------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"secure_aggregation": "yes"}, "secure_aggregation is True, or SecureAggregation"),
        (
            {"secure_aggregation": SecureAggregation(threshold=4)},
            "threshold of 3 workers is from 2 to 3, not 4",
        ),
        (
            {"secure_aggregation": SecureAggregation(threshold=3), "min_workers": 2},
            "min_workers=2 is under the thresh",
        ),
        ({"min_workers": 1}, "threshold of 3 workers is from 2 to 3, not 1"),
        ({"aggregation": object()}, "aggregation= needs the update of each worker"),
        ({"max_update_norm": 1.0}, "max_update_norm= needs the update of each worker"),
        ({"exchange": PlainExchange(None)}, "exchange= needs the update of each worker"),
    ],
)
def test_options_that_do_not_go_together(workers, options, words):
    with pytest.raises(OptionError, match=words):
        RoundScheduler(workers, config(), dataset_key="d", seed=1, **{"secure_aggregation": True, **options})


def test_a_sum_over_one_is_refused(workers):
    with pytest.raises(OptionError, match="from 2 to 1000 workers, not 1"):
        RoundScheduler(workers[:1], config(), dataset_key="d", seed=1, secure_aggregation=True)


@pytest.mark.parametrize(
    "options", [{"threshold": 1}, {"threshold": 2.5}, {"scale_bits": 49}, {"scale_bits": "32"}]
)
def test_options_out_of_range(options):
    with pytest.raises(OptionError):
        SecureAggregation(**options)


def test_single_states_cannot_be_kept(workers):
    scheduler = scheduler_of(workers)
    with pytest.raises(OptionError, match="keep_worker_states=True: in a secure aggregation nobody sees"):
        run(scheduler, 1, scheduler.config.state, keep_worker_states=True)
