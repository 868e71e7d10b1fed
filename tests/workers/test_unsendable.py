"""Every public call with arguments that cannot be sent: a typed error at the caller's line, and the session goes on."""

import asyncio
import enum
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planrt
from planrt.errors import (
    LocalError,
    MessageTooLargeError,
    OptionError,
    PlanrtError,
    RemoteError,
    ReplyTooLargeError,
)
from planrt.fl import RoundScheduler, TrainConfig
from planrt.plans import func2plan
from planrt.serde.frames import Limits
from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.pointers.plan import PointerPlan

TOO_LONG = 30
"""Seconds after which a call counts as hanging."""


class Colour(enum.Enum):
    RED = "red"


def endless():
    value: list = []
    value.append(value)
    return value


BAD = {
    "object": object(), "lambda": lambda: 1, "beyond 64 bits": 2**70, "negative": -(2**70), "nan": float("nan"),
    "fraction": 1.5, "huge": "x" * 2_000_000, "surrogate": "\udc80", "int keys": {1: 2}, "endless": endless(),
    "bytes": b"mnist", "array": np.ones(3), "tensor": torch.ones(2), "set": {object()}, "none": None, "enum": Colour,
    "complex": 1j,
}  # fmt: skip


@func2plan(args_shape=[(2,)])
def double(x):
    return x * 2


@func2plan(args_shape=[(2,)])
def noisy(x):
    return F.dropout(x, 0.5, training=True)


class Bed:
    """A worker with a data set, a model that was sent for training, a plan and a tensor."""

    def __init__(self, worker, other):
        planrt.TorchHook(torch)
        self.worker, self.other = worker, other
        self.x = torch.ones(2).send(worker)
        self.plan = noisy.send(worker)
        TrainConfig(nn.Linear(2, 2), F.cross_entropy, batch_size=2).send(worker)

    def check(self):
        assert (self.x + 1).get().tolist() == [2, 2]
        assert self.worker.run(double, torch.ones(2)).tolist() == [2, 2]
        assert self.worker.datasets["d"].length == 4


async def one_round(bed, **options):
    arguments = {"batch_size": 2, **{key: options.pop(key) for key in list(options) if key != "lr"}}
    config = TrainConfig(nn.Linear(2, 2), F.cross_entropy, **arguments)
    scheduler = RoundScheduler([bed.worker], config, dataset_key="d", seed=0)
    await scheduler.prepare()
    return await scheduler.run_round(1, config.state, **options)


CALLS = {
    "run(seed=)": lambda bed, bad: bed.worker.run(noisy, torch.ones(2), seed=bad),
    "async_run(seed=)": lambda bed, bad: bed.worker.async_run(noisy, torch.ones(2), seed=bad),
    "run(argument)": lambda bed, bad: bed.worker.run(double, bad),
    "run(plan)": lambda bed, bad: bed.worker.run(bad, torch.ones(2)),
    "plan(seed=)": lambda bed, bad: bed.plan(bed.x, seed=bad).get(),
    "fit(key)": lambda bed, bad: bed.worker.fit(bad),
    "async_fit(key)": lambda bed, bad: bed.worker.async_fit(bad),
    "fit(seed=)": lambda bed, bad: bed.worker.fit("d", seed=bad),
    "evaluate(key)": lambda bed, bad: bed.worker.evaluate(bad),
    "async_evaluate(bins=)": lambda bed, bad: bed.worker.async_evaluate("d", bins=bad),
    "search": lambda bed, bad: bed.worker.search(bad),
    "search([])": lambda bed, bad: bed.worker.search([bad]),
    "async_search": lambda bed, bad: bed.worker.async_search("#a", bad),
    "tag here": lambda bed, bad: torch.ones(1).tag(bad).send(bed.worker),
    "tag": lambda bed, bad: (bed.x + 1).tag(bad),
    "describe": lambda bed, bad: (bed.x + 1).describe(bad),
    "describe here": lambda bed, bad: torch.ones(1).describe(bad).send(bed.worker),
    "describe here, async": lambda bed, bad: torch.ones(1).describe(bad).async_send(bed.worker),
    "send(allowed_users=)": lambda bed, bad: torch.ones(1).send(bed.worker, allowed_users=bad),
    "send(allowed_users=[])": lambda bed, bad: torch.ones(1).send(bed.worker, allowed_users=[bad]),
    "async_send(allowed_users=[])": lambda bed, bad: torch.ones(1).async_send(bed.worker, allowed_users=[bad]),
    "send(to)": lambda bed, bad: torch.ones(1).send(bad),
    "pointer.send(to)": lambda bed, bad: (bed.x + 1).send(bad),
    "move(to)": lambda bed, bad: (bed.x + 1).move(bad),
    "async_move(to)": lambda bed, bad: (bed.x + 1).async_move(bad),
    "module.send(to)": lambda bed, bad: nn.Linear(1, 1).send(bad),
    "plan.send(to)": lambda bed, bad: double.send(bad),
    "plan.send(allowed_users=[])": lambda bed, bad: double.send(bed.worker, allowed_users=[bad]),
    "plan.tag": lambda bed, bad: double.copy().tag(bad).send(bed.worker),
    "pointer plan.tag": lambda bed, bad: bed.plan.copy().tag(bad),
    "approval": lambda bed, bad: bed.worker.approval(bad),
    "op argument": lambda bed, bad: (bed.x + bad).get(),
    "index": lambda bed, bad: bed.x[bad].get(),
    "op keyword": lambda bed, bad: bed.x.sum(dim=bad).get(),
    "dataset.tag": lambda bed, bad: BaseDataset(torch.ones(2, 1), torch.ones(2)).tag(bad).send(bed.worker),
    "batch_size": lambda bed, bad: one_round(bed, batch_size=bad),
    "epochs": lambda bed, bad: one_round(bed, epochs=bad),
    "max_nr_batches": lambda bed, bad: one_round(bed, max_nr_batches=bad),
    "optimizer": lambda bed, bad: one_round(bed, optimizer=bad),
    "optimizer_args": lambda bed, bad: one_round(bed, optimizer_args=bad),
    "lr in optimizer_args": lambda bed, bad: one_round(bed, optimizer_args={"lr": bad}),
    "lr": lambda bed, bad: one_round(bed, lr=bad),
    "async_fetch_plan(id)": lambda bed, bad: bed.other.async_fetch_plan(bad, bed.worker),
    "fetch_plan(from)": lambda bed, bad: bed.other.fetch_plan(bed.plan.id_at_location, bad),
    "PointerPlan(id)": lambda bed, bad: PointerPlan(location=bed.worker, id_at_location=bad)(bed.x).get(),
    "PointerPlan(location)": lambda bed, bad: PointerPlan(location=bad, id_at_location=1)(bed.x).get(),
    "request_search": lambda bed, bad: bed.worker.request_search([bad], location=bed.worker),
}  # fmt: skip


def outcome(call, bed, bad):
    """What a call gives or raises, within time."""

    def do():
        done = call(bed, bad)
        return asyncio.run(_awaited(done)) if inspect.isawaitable(done) else done

    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(do).result(timeout=TOO_LONG)
        except Exception as error:
            return error


async def _awaited(done):
    return await done


@pytest.fixture
def bed(make_worker):
    data = BaseDataset(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
    return Bed(make_worker("bob", {"d": data}), make_worker("alice"))


PLAIN = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, OverflowError)
"""What torch and Python raise for such arguments, locally, too."""


@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_sent_fails_its_own_call_and_no_other(bed, name):
    for what, bad in BAD.items():
        got = outcome(CALLS[name], bed, bad)
        assert not isinstance(got, TimeoutError), f"{name} hangs on {what}"
        if isinstance(got, Exception):
            assert isinstance(got, (PlanrtError, *PLAIN)), f"{name}, {what}: {got!r}"
            assert str(got), f"{name}, {what}: {type(got)}"
        bed.check()


NEVER = ("object", "lambda", "endless", "surrogate", "set", "array")
"""What no argument of these takes."""
STRICT = [name for name in CALLS if not name.startswith(("op ", "index", "run(argument)", "optimizer"))]


@pytest.mark.parametrize("name", STRICT)
def test_nothing_takes_what_is_no_number_and_no_text(bed, name):
    for what in NEVER:
        assert isinstance(outcome(CALLS[name], bed, BAD[what]), Exception), f"{name} takes {what}"


def test_every_public_coroutine_of_a_worker_is_walked():
    """A new one belongs into `CALLS`, or here with the reason."""
    apart = {
        "async_close", "async_objects_count", "async_clear_objects", "async_status",  # take nothing
        "async_list_objects", "async_reconnect",  # ... nor do these
        "async_wait_for_approval", "async_approval",  # see `run`: they take plans
        "ask",  # takes messages, as tests/workers/test_worker_names.py has it
        "connect",  # no argument of a user's
    }  # fmt: skip
    walked = {name.split("(")[0] for name in CALLS}
    found = {
        name
        for kind in (VirtualWorker, WebsocketClientWorker)
        for name, member in inspect.getmembers(kind)
        if not name.startswith("_") and (inspect.iscoroutinefunction(member) or name.startswith("async_"))
    }
    assert found <= walked | apart, found - walked - apart


NUMBERS = {
    "int64": np.int64(7), "uint8": np.uint8(7), "0-d tensor": torch.tensor(7), "0-d array": np.array(7),
    "IntEnum": enum.IntEnum("Number", {"SEVEN": 7}).SEVEN, "Enum": enum.Enum("Number", {"SEVEN": 7}).SEVEN,
}  # fmt: skip


@pytest.mark.parametrize("seven", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_other_libraries_are_numbers(bed, seven):
    want = bed.worker.run(noisy, torch.ones(2), seed=7)
    assert torch.equal(bed.worker.run(noisy, torch.ones(2), seed=seven), want)
    assert torch.equal(bed.plan(bed.x, seed=seven).get(), bed.plan(bed.x, seed=7).get())
    assert bed.worker.fit("d", seed=seven).samples == 4
    if isinstance(seven, enum.Enum) and not isinstance(seven, int):
        seven = seven.value  # what a configuration takes is its own affair
    asyncio.run(one_round(bed, batch_size=seven, epochs=seven, max_nr_batches=seven))
    bed.check()


@pytest.mark.parametrize("rate", [np.float32(0.125), np.float64(0.125), torch.tensor(0.125), np.array(0.125)])
def test_rates_of_other_libraries_are_numbers(bed, rate):
    for options in ({"lr": rate}, {"optimizer_args": {"lr": rate}}):
        torch.manual_seed(0)
        got = asyncio.run(one_round(bed, **options))
        torch.manual_seed(0)
        want = asyncio.run(one_round(bed, optimizer_args={"lr": 0.125}))
        assert all(torch.equal(got.state[key], want.state[key]) for key in want.state)


TEXTS = {
    "np.str_": np.str_("#seven"), "StrEnum": enum.StrEnum("Text", {"SEVEN": "#seven"}).SEVEN,
    "Enum": enum.Enum("Text", {"SEVEN": "#seven"}).SEVEN,
    "path": Path("#seven"),
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_of_other_libraries_are_texts(bed, text):
    x = torch.ones(2).tag(text).describe(text).send(bed.worker)
    (found,) = bed.worker.search(text)
    assert found.tags == {"#seven"}
    assert x.get().description == "#seven"
    y = (bed.x + 1).tag(text).describe(text)
    assert [one.description for one in bed.worker.search([text])] == ["#seven"]
    assert y.tags == {"#seven"}


def test_a_refusal_names_the_argument_and_its_type(bed):
    cases = [
        (lambda: bed.worker.run(noisy, torch.ones(2), seed=1.5), r"seed: 1\.5 \(float\) cannot be sent"),
        (lambda: bed.worker.run(noisy, torch.ones(2), seed=2**70), r"seed: .* 64 bits"),
        (lambda: bed.worker.run(noisy, torch.ones(2), seed=object()), r"seed: <object .*> \(object\) cannot be sent"),
        (lambda: torch.ones(1).describe("x" * 100_000).send(bed.worker), "description: .* length <= 64000"),
        (lambda: torch.ones(1).describe("\udc80").send(bed.worker), "description: .*no text"),
        (lambda: torch.ones(1).send(bed.worker, allowed_users=[1]), r"allowed_users is a string, not 1 \(int\)"),
        (lambda: bed.worker.search(object()), "a term of a search"),
        (lambda: asyncio.run(one_round(bed, optimizer_args={"lr": lambda: 1})), "lr .* function"),
    ]  # fmt: skip
    for call, says in cases:
        with pytest.raises(OptionError, match=says):
            call()
    bed.check()


# ------------------------------------------------------------------------------------------------- sizes


@pytest.fixture
def small(transport):
    """Connects a client to a worker of its own, each with limits."""
    planrt.TorchHook(torch)
    opened = []

    def connect(theirs, ours=None):
        if transport == "memory":
            worker = VirtualWorker("small", limits=theirs)
        else:
            running = WebsocketServerWorker("small", threads=1, limits=theirs).running()
            opened.append(lambda: running.__exit__(None, None, None))
            worker = WebsocketClientWorker("small", uri=running.__enter__(), limits=ours or theirs)
        opened.append(worker.close)
        return worker

    yield connect
    for close in reversed(opened):
        close()


def test_a_message_over_the_workers_limit_is_not_sent(small):
    worker = small(Limits(message=100_000))
    keep = torch.arange(3.0).send(worker)
    model = nn.Linear(200, 200)
    weight = model.weight.detach().clone()
    for send in (
        lambda: torch.ones(100_000).send(worker),
        lambda: torch.ones(100_000).send_(worker),
        lambda: asyncio.run(_awaited(torch.ones(100_000).async_send(worker))),
        lambda: model.send(worker),
        lambda: worker.run(wide, torch.ones(100_000)),
    ):
        with pytest.raises(
            MessageTooLargeError, match=r"over the limit of 100,000 bytes.*limits=Limits\(message="
        ):
            send()
        assert (keep + 1).get().tolist() == [1, 2, 3]
    assert torch.equal(model.weight, weight)
    assert worker.objects_count() == 1


@func2plan(args_shape=[(-1,)])
def wide(x):
    return x * 2


def test_an_answer_over_the_clients_limit_stays_where_it_is(small):
    worker = small(Limits(message=100_000), Limits(message=100_000))
    x = torch.arange(20_000.0).send(worker)
    big = torch.cat([x, x])
    for get in (big.get, lambda: asyncio.run(_awaited(big.async_get()))):
        with pytest.raises(
            ReplyTooLargeError, match=r"160,000 bytes, over the limit of 100,000.*Limits\(message="
        ):
            get()
    assert torch.equal(big[:20_000].get(), torch.arange(20_000.0))
    assert torch.equal(x.get(), torch.arange(20_000.0))


def test_a_model_that_does_not_fit_with_its_gradient_comes_without_it(small):
    worker = small(Limits(message=100_000))
    model = nn.Linear(100, 150)
    weight = model.weight.detach().clone()
    model.send(worker)
    model(torch.ones(1, 100).send(worker)).sum().backward()
    with pytest.raises(ReplyTooLargeError):
        model.get()
    assert model.location is worker
    for parameter in model.parameters():
        parameter.grad = None
    assert torch.equal(model.get().weight, weight)


def test_a_header_over_the_limit(small):
    worker = small(Limits(header=3_000))
    x = torch.ones(2).send(worker)
    with pytest.raises(MessageTooLargeError, match=r"header of .* over the limit of 3,000.*Limits\(header="):
        torch.ones(1).describe("x" * 10_000).send(worker)
    with pytest.raises(planrt.errors.RemoteOpError, match="an op of .* bytes, over the limit"):
        torch.cat([x] * 1_000)
    for _ in range(300):  # ops enough for several messages
        x = x + 1
    assert x.get().tolist() == [301, 301]


def test_moving_what_the_other_worker_does_not_take_loses_nothing(small, make_worker):
    big, worker = make_worker("big"), small(Limits(message=100_000))
    x = torch.arange(40_000.0, requires_grad=True).tag("#mine").send(big)
    with pytest.raises(
        (RemoteError, MessageTooLargeError), match="160,000 bytes is over the limit of 100,000"
    ):
        x.move(worker)
    assert x.location is big
    assert torch.equal(x.get(), torch.arange(40_000.0))


def test_what_cannot_be_encoded_on_the_worker_fails_its_own_request(bed):
    ids = torch.tensor([1]).send(bed.worker)
    weight = torch.ones(4, 2, requires_grad=True).send(bed.worker)
    F.embedding(ids, weight, sparse=True).sum().backward()
    with pytest.raises(RemoteError, match="sparse|dense"):
        weight.get()
    bed.check()
    assert (weight + 1).sum().get().item() == 16
    weight.grad = None
    assert torch.equal(weight.get(), torch.ones(4, 2))


def test_errors_with_words_that_have_no_byte_form_arrive(bed):
    class Odd(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise LocalError("no file \udc80")

    with pytest.raises(PlanrtError):
        VirtualWorker("odd", datasets={"d": Odd()})
    bed.check()
