"""What is done where its message arrives: programs on shares whose steps are known to be short, and nothing else."""

import asyncio
import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

import planrt
from planrt.sharing.tensors.shared import share
from planrt.types import Ref
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.sharing import pace as paces
from planrt.workers.machine.sharing.pace import Pace, known_again
from planrt.workers.serving.compute import ComputeThread
from planrt.workers.shares.session import sharing_session
from planrt.workers.wire import messages as m
from planrt.workers.wire.posted import PROGRAM, PostedOp
from planrt.workers.wire.shared_plan import CALL

planrt.TorchHook(torch)
NAMES = ("bob", "alice", "james")


@pytest.fixture
def session(transport):
    with contextlib.ExitStack() as stack:
        if transport == "memory":
            workers = [stack.enter_context(VirtualWorker(name, auto_add=False)) for name in NAMES]
        else:
            uris = [stack.enter_context(WebsocketServerWorker(name, threads=1).running()) for name in NAMES]
            workers = [
                stack.enter_context(WebsocketClientWorker(name, uri=uri, auto_add=False))
                for name, uri in zip(NAMES, uris, strict=True)
            ]
        yield sharing_session(workers[:2], workers[2])


@pytest.fixture
def done(monkeypatch):
    """What was done on the loop (`here`) and on a thread (`there`), by the names of the messages."""
    seen = {"here": [], "there": []}
    run, run_here = ComputeThread.run, ComputeThread.run_here

    def name(args):
        event = args[0] if args else None
        body = getattr(getattr(event, "envelope", event), "body", event)
        return "Drop" if isinstance(body, m.Post) and not body.ops else type(body).__name__

    async def counted(self, function, *args):
        seen["there"].append(name(args))
        return await run(self, function, *args)

    def counted_here(self, function, *args):
        found = run_here(self, function, *args)
        if found is not None:
            seen["here"].append(name(args))
        return found

    monkeypatch.setattr(ComputeThread, "run", counted)
    monkeypatch.setattr(ComputeThread, "run_here", counted_here)
    return seen


@pytest.fixture
def quick(monkeypatch):
    """All that has run before took no time, on however slow a machine."""
    still = SimpleNamespace(thread_time=lambda: 0.0, perf_counter=lambda: 0.0)
    monkeypatch.setattr(paces, "time", still)


def test_a_program_that_has_run_before_runs_where_its_messages_arrive(quick, session, done):
    values = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]])
    x = share(session, values)
    for _ in range(4):
        assert torch.equal(x.amax(1).get(), values.amax(1))
    first = {kind: list(names) for kind, names in done.items()}
    for names in done.values():
        names.clear()
    for _ in range(6):
        assert torch.equal(x.amax(1).get(), values.amax(1))
    assert {"Opening", "Corrections"} <= {*first["there"]}, "nobody knew how long it takes"
    assert {"Opening", "Post", "Fetch", "Needs"} <= {*done["here"]}
    assert done["there"].count("Opening") < done["here"].count("Opening")


def test_another_shape_is_not_known(session, done):
    for size in (3, 3, 3, 3):
        share(session, torch.ones(2, size)).amax(1).get()
    done["here"].clear()
    done["there"].clear()
    assert torch.equal(share(session, torch.ones(2, 9)).amax(1).get(), torch.ones(2))
    assert "Post" in done["there"]
    assert "Post" not in done["here"]


def test_parts_are_taken_where_their_messages_arrive(quick, session, done):
    for _ in range(8):
        x = torch.randn(3, 2)
        assert torch.allclose(share(session, x).relu().get(), x.relu(), atol=1e-4)
        assert session.traffic()["bob"].rounds
    for name in ("PutShare", "ReadTraffic"):
        assert done["here"].count(name) > done["there"].count(name)
    assert "TimePassed" in done["here"], "the dealer works ahead"


def test_large_parts_and_long_work_ahead_go_to_the_thread(session, done, monkeypatch):
    monkeypatch.setattr("planrt.workers.machine.sharing.parties._FETCHED", 40)
    monkeypatch.setattr("planrt.workers.machine.sharing.dealers.SHORT", 0.0)
    for _ in range(8):
        x = torch.randn(3, 2)
        assert torch.allclose(share(session, x).relu().get(), x.relu(), atol=1e-4)
    assert not {"PutShare", "TimePassed"} & {*done["here"]}
    assert {"PutShare", "TimePassed"} <= {*done["there"]}


def test_what_takes_longer_goes_to_the_thread(session, done, monkeypatch):
    monkeypatch.setattr("planrt.workers.machine.sharing.parties.SHORT", 0.0)
    x = share(session, torch.tensor([1.0, -1.0]))
    for _ in range(4):
        assert torch.equal(x.relu().get(), torch.tensor([1.0, 0.0]))
    assert not {"Post"} & {*done["here"]}
    while_waited = [one for one in done["here"] if one == "Opening"]
    assert len(while_waited) < done["there"].count("Opening")


def test_nothing_else_is_done_on_the_loop(done, transport):
    with contextlib.ExitStack() as stack:
        if transport == "memory":
            bob = stack.enter_context(VirtualWorker("bob", auto_add=False))
        else:
            uri = stack.enter_context(WebsocketServerWorker("bob", threads=1).running())
            bob = stack.enter_context(WebsocketClientWorker("bob", uri=uri, auto_add=False))
        x = torch.ones(3).send(bob)
        for _ in range(3):
            assert torch.equal((x + x).get(), torch.full((3,), 2.0))
            x = torch.ones(3).send(bob)
    assert done["here"] == []


def test_plans_on_shares_are_known_again(quick, session, done):
    @planrt.func2plan()
    def total(x, y):
        return (x * y).relu().sum()

    x, y = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    total.build(x, y)
    a, b = share(session, x), share(session, y)
    for _ in range(4):
        assert torch.equal(total(a, b).get(), total(x, y))
    done["here"].clear()
    for _ in range(4):
        assert torch.equal(total(a, b).get(), total(x, y))
    assert {"Post", "Opening"} <= {*done["here"]}


class Clock:
    def __init__(self, monkeypatch):
        self.now = self.others = 0.0
        monkeypatch.setattr(paces.time, "thread_time", lambda: self.now)
        monkeypatch.setattr(paces.time, "perf_counter", lambda: self.now + self.others)


def test_a_pace_counts_what_is_computed_and_no_waiting(monkeypatch):
    clock, pace = Clock(monkeypatch), Pace()
    for _ in range(2):
        pace.begin("a program")
        clock.now += 1
        pace.rest()
        clock.now += 100  # it waits, or another thread goes on
        pace.go_on()
        clock.now += 2
        pace.end_step()
        clock.now += 100
        pace.go_on()
        clock.now += 4
        pace.end_step()
    assert pace.first("a program") == 3
    pace.begin("a program")
    assert pace.next == 3
    pace.end_step()
    assert pace.next == 4
    assert pace.first("another one") == float("inf")


def test_what_was_short_stays_so_when_others_had_the_processor_meanwhile(monkeypatch):
    clock, pace = Clock(monkeypatch), Pace()

    def took(seconds, others=0.0):
        pace.begin("a program")
        clock.now, clock.others = clock.now + seconds, clock.others + others
        pace.end_step()
        return pace.first("a program")

    assert took(1 / 256, others=50.0) == 1 / 256
    assert took(1 / 128) == 1 / 128  # on the wall's clock from now on
    assert took(1 / 512, others=50.0) == paces.SHORT  # who knows: it is looked at once more
    assert took(1 / 512, others=50.0) == 1 / 512
    assert took(2.0) == paces.SHORT
    assert took(2.0) == 2
    assert took(1 / 512, others=50.0) == 1 / 512


def test_a_pace_remembers_so_many_programs_and_none_that_is_not_known_again():
    pace = Pace()
    for number in range(paces._MOST + 10):
        pace.begin(number)
        pace.end_step()
    assert pace.first(0) == float("inf")
    assert pace.first(paces._MOST + 9) < float("inf")
    pace.begin(None)
    pace.end_step()
    assert pace.first(None) == float("inf")


def test_what_tells_that_a_program_is_known_again():
    shapes = {1: (2, 3), 2: (2, 3), 3: (4, 3)}

    def op(name, *args):
        return PostedOp(name, args, {}, (), False)

    refs = (Ref(1),)
    told = known_again(op(PROGRAM, "g", "", refs, "hash"), shapes.get)
    assert told is not None
    assert told == known_again(op(PROGRAM, "g", "", (Ref(2),), "hash"), shapes.get)
    assert told != known_again(op(PROGRAM, "g", "", (Ref(3),), "hash"), shapes.get)
    assert told != known_again(op(PROGRAM, "g", "", refs, "other"), shapes.get)
    numbers = known_again(op(PROGRAM, "g", "", (Ref(1), 0.1, 2), "hash"), shapes.get)
    assert numbers not in (None, told)
    assert numbers == known_again(op(PROGRAM, "g", "", (Ref(2), 0.05, 7), "hash"), shapes.get)
    for strange in (
        op(PROGRAM, "g", "text", refs),
        op(PROGRAM, "g", "text", refs, "hash"),
        op(PROGRAM, "g", "", [1], "hash"),
        op(PROGRAM, "g", "", ("1",), "hash"),
        op(PROGRAM, "g", "", (None,), "hash"),
        op(PROGRAM, "g", "", (True,), "hash"),
        op(PROGRAM, "g", "", refs, ["hash"]),
        op(CALL, "g", Ref(9), True, "id", [None], refs),
        op("torch.add", Ref(1), Ref(1)),
        op(PROGRAM),
    ):
        assert known_again(strange, shapes.get) is None


async def _busy(thread):
    release, began = threading.Event(), threading.Event()

    def wait():
        began.set()
        release.wait(60)
        return "done"

    task = asyncio.create_task(thread.run(wait))
    await asyncio.to_thread(began.wait, 10)
    return task, release


def test_nothing_runs_beside_the_thread_or_before_what_it_did_was_heard_of():
    asyncio.run(_nothing_beside())


async def _nothing_beside():
    thread = ComputeThread("test")
    try:
        assert thread.run_here(lambda: "here") == "here"
        task, release = await _busy(thread)
        assert thread.run_here(lambda: "here") is None
        release.set()
        assert await task == "done"
        assert thread.run_here(lambda: "here") == "here"

        # Done, but who asked has not been given its turn: what comes of that is to leave first.
        order = []

        async def ask():
            await thread.run(lambda: None)
            order.append("asked")

        task = asyncio.create_task(ask())
        await asyncio.sleep(0)
        while thread.run_here(lambda: order.append("here") or True) is None:  # noqa: ASYNC110 - a turn of the loop each
            await asyncio.sleep(0)
        await task
        assert order == ["asked", "here"]
    finally:
        thread.close()
    assert thread.run_here(lambda: "here") is None


def test_what_fails_there_fails_here_and_leaves_the_thread_free():
    asyncio.run(_fails())


async def _fails():
    thread = ComputeThread("test")
    try:
        with pytest.raises(ValueError, match="no"):
            thread.run_here(lambda: int("no"))
        assert thread.run_here(lambda: 1) == 1
        assert await thread.run(lambda: 2) == 2
    finally:
        thread.close()
