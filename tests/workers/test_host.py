"""The loop around a worker, where something ends early."""

import asyncio
import gc
import random
import threading
import time
import weakref

import msgpack
import pytest
import torch

from planrt.errors import ConnectError
from planrt.plans.policy.quotas import Quota
from planrt.serde import frames
from planrt.serde.frames import Limits, in_memory
from planrt.workers.client.connection import Connection
from planrt.workers.machine.events import PeerFailed, Received, Reply, ToPeer
from planrt.workers.machine.failures import as_sent
from planrt.workers.machine.state import WorkerState
from planrt.workers.serving.compute import ComputeThread
from planrt.workers.serving.host import WorkerHost
from planrt.workers.transport.pipes import Traffic, memory_pipes
from planrt.workers.wire import messages as m
from planrt.workers.wire.channel import Channel
from planrt.workers.wire.messages import own_versions


@pytest.mark.parametrize("ends", ["client", "process"])
def test_a_worker_whose_compute_thread_is_gone_ends_quietly(ends, caplog):
    """As at the end of a process: Python closes every thread pool before it lets go of the loop."""
    unhandled = []

    async def go():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        compute = ComputeThread("test")
        host = WorkerHost(WorkerState("bob"), compute)
        near, far = memory_pipes("memory://bob", Limits())
        serving = asyncio.create_task(host.serve(far))
        connection = await Connection.open(near, "bob", timeout=60, limits=Limits())
        compute.close()
        if ends == "client":
            await connection.close()
        else:
            host.stop()
        await asyncio.wait([serving], timeout=60)
        ended = serving.done() and (serving.cancelled() or serving.exception() is None)
        await connection.close()
        return ended

    assert asyncio.run(go())
    assert (unhandled, caplog.records) == ([], [])


async def settled():
    """What is ready to run has run, and what that has begun."""
    for _ in range(100):
        await asyncio.sleep(0)


class Stalled:
    """A connection from which little comes."""

    hands_over = False

    def __init__(self):
        self.channel, self.address, self.traffic, self.opened = Channel(), "client", Traffic(), False

    async def gone(self):
        await asyncio.Event().wait()

    async def close(self):
        pass


def test_jobs_run_in_order_however_long_the_thread_had_nothing_to_do(monkeypatch):
    monkeypatch.setattr("planrt.workers.serving.compute._LIFE", 0.01)
    ran = []

    async def go():
        compute = ComputeThread("test")
        for pause in (0, 0, 0.001, 0.003, 0, 0.02, 0):
            await asyncio.sleep(pause)
            answers = [compute.run(ran.append, (len(ran), number)) for number in range(3)]
            await asyncio.gather(*answers)
        compute.close()

    asyncio.run(go())
    assert ran == [(start, number) for start in range(0, 21, 3) for number in range(3)]


def test_what_waits_for_the_compute_thread_is_dropped_when_nobody_wants_it():
    began, go_on, ran = threading.Event(), threading.Event(), []

    def first():
        began.set()
        assert go_on.wait(60)
        return "first"

    async def go():
        compute = ComputeThread("test")
        answer = asyncio.create_task(compute.run(first))
        await asyncio.to_thread(began.wait, 10)
        given_up = asyncio.create_task(compute.run(ran.append, "given up"))
        kept = asyncio.create_task(compute.run(ran.append, "kept"))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        go_on.set()
        assert (await answer, await kept) == ("first", None)
        go_on.clear()
        began.clear()
        answer = asyncio.create_task(compute.run(first))
        await asyncio.to_thread(began.wait, 10)
        dropped = asyncio.create_task(compute.run(ran.append, "dropped"))
        await asyncio.sleep(0)
        compute.close()
        go_on.set()
        assert await answer == "first"  # what runs is done
        await asyncio.wait([dropped], timeout=60)
        assert dropped.cancelled()
        with pytest.raises(asyncio.CancelledError):
            await compute.run(ran.append, "too late")

    asyncio.run(go())
    assert ran == ["kept"]


def test_what_a_job_raises_keeps_nothing():
    async def go():
        compute = ComputeThread("test")
        value = torch.zeros(3)
        there = weakref.ref(value)

        def fails(given):
            raise ValueError("no")

        failed = False
        try:
            await compute.run(fails, value)
        except ValueError:  # not pytest's way, which keeps the traceback
            failed = True
        assert failed
        del value
        for _ in range(1_000):  # the thread may be about to let go of it
            if there() is None:
                break
            await asyncio.sleep(0.01)
        assert there() is None
        compute.close()

    gc.disable()
    try:
        asyncio.run(go())
    finally:
        gc.enable()


def test_an_answer_to_who_is_gone_costs_nobody_else_theirs(caplog):
    """One event can have answers for several connections, and a client can leave while it is handled."""

    class Ended:
        channel, address, traffic = Channel(), "client", Traffic()

        async def send(self, frame, *, message=True):
            raise ConnectionResetError("the connection has ended")

        def send_now(self, frame):
            return False

        async def close(self):
            pass

    class State(WorkerState):
        def handle(self, event, over=lambda: False, deliver=None):
            return [Reply(number, m.Envelope(5, m.Done())) for number in (1, 2)]

    async def go():
        host = WorkerHost(State("bob"), ComputeThread("test"))
        near, far = memory_pipes("memory://bob", Limits())
        host._pipes = {1: Ended(), 2: far}
        reading = asyncio.create_task(near.receive())
        await host._handle(PeerFailed("key", "it is gone"))  # nobody to raise it at
        assert (await reading).message.id == 5
        reading = asyncio.create_task(near.receive())
        with pytest.raises(ConnectionResetError):
            await host._handle(Received(1, m.Envelope(5, m.CountObjects()), []))
        assert (await reading).message.id == 5

    asyncio.run(go())


@pytest.mark.parametrize("seed", range(3))
def test_what_events_send_leaves_in_their_order_while_the_owners_log_is_written(seed):
    """Of some there is a line to write, some are answered to a client that reads slowly, and some are neither."""
    draw = random.Random(seed)

    class Slow:
        channel, address, traffic, hands_over = Channel(), "client", Traffic(), False

        async def send(self, frame, *, message=True):
            await asyncio.sleep(0.001)

        def send_now(self, frame):
            return False

    class Audit:
        def __init__(self):
            self.lines = 0

        @property
        def waiting(self):
            return self.lines > 0

        def write(self):
            lines = self.lines
            time.sleep(draw.choice((0, 0.0002, 0.001)))
            self.lines -= lines

    class State(WorkerState):
        handled = 0

        def handle(self, event, over=lambda: False, deliver=None):
            number, self.handled = self.handled, self.handled + 1
            audit.lines += draw.random() < 0.5
            answers = [Reply(1, m.Envelope(1 + number, m.Done()))] if isinstance(event, Received) else []
            return [*answers, ToPeer(m.PeerAddress("alice", "memory://alice"), m.FailGroup("g", str(number)))]

    async def go():
        host = WorkerHost(State("bob"), ComputeThread("test"), audit=audit)
        host._pipes = {1: Slow()}
        host._links.send = lambda message: sent.append(int(message.body.reason))

        async def client():
            for _ in range(40):
                await host._handle(Received(1, m.Envelope(5, m.CountObjects()), []))

        async def peer():
            for _ in range(80):
                await host._handle(PeerFailed("key", "it is gone"))
                await asyncio.sleep(draw.choice((0, 0, 0.0003)))

        await asyncio.gather(client(), *(peer() for _ in range(4)))

    sent, audit = [], Audit()
    asyncio.run(go())
    assert sent == list(range(360))


def test_a_worker_that_has_stopped_dials_nobody():
    """What a computation posts may come to the loop when the worker has stopped meanwhile."""
    dialled = []

    class Dialling:
        async def connect(self, *args):
            dialled.append(args)
            raise ConnectError("nobody is there", address="memory://alice")

    async def go():
        host = WorkerHost(WorkerState("bob"), ComputeThread("test"), dialling=Dialling())
        message = ToPeer(m.PeerAddress("alice", "memory://alice"), m.FailGroup("g", "it is over"))
        host._links.send(message)
        await settled()
        assert len(dialled) == 1
        host.stop()
        host._links.send(message)
        await settled()
        assert len(dialled) == 1

    asyncio.run(go())


@pytest.mark.parametrize("text", ["x" * 70_000, "\udc80" * 20_000])
def test_a_failure_is_never_longer_than_clients_take(text):
    """Names and lines in it can be a client's own words."""
    failure = m.Failure("LocalError", text, op=text, line=text, traceback=text, cause=text, step=text)
    sent = m.to_wire(m.Envelope(1, as_sent(failure)))
    received = m.from_wire(msgpack.unpackb(msgpack.packb(sent))).body
    assert received.message[:7] in ("x" * 7, "\\udc80\\")
    assert all(len(getattr(received, name)) <= 60_000 for name in ("message", "op", "line", "traceback"))


def test_what_arrives_for_one_user_is_bounded_over_all_connections():
    """What is not whole is in no quota: many connections with a message each would fill the memory of a worker."""
    mebibyte = 1 << 20

    async def go():
        quota = Quota(memory=2 * mebibyte)
        host = WorkerHost(
            WorkerState("bob", quota=quota), ComputeThread("test"), limits=Limits(message=5 * mebibyte)
        )
        arriving, told = [], []

        class Slow(Stalled):
            """Brings the head of a message, and then nothing for long."""

            def __init__(self, nbytes):
                super().__init__()
                self.nbytes, self.over = nbytes, asyncio.Event()

            async def receive(self, allocate=in_memory):
                if not self.opened:
                    self.opened = True
                    return frames.Received(m.Envelope(1, m.Hello("c", own_versions())), [], 0)
                allocate(m.Envelope(0, m.Put([])), self.nbytes)
                arriving.append(self.nbytes)
                await self.over.wait()
                return None

            async def send(self, frame, *, message=True):
                told.append(b"".join(frame.fragments()))

        def refused():
            return [text for text in told if b"arrive for the same user" in text]

        async def until(condition):
            for _ in range(6000):
                if condition():
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("nothing happened")

        pipes = [Slow(size) for size in (3 * mebibyte, mebibyte, 2 * mebibyte, 2 * mebibyte + 1)]
        serving = []
        for pipe in pipes:
            serving.append(asyncio.create_task(host.serve(pipe)))
            await until(lambda: len(arriving) + len(refused()) == len(serving))
        assert arriving == [3 * mebibyte, mebibyte, 2 * mebibyte]  # small ones do not count
        assert len(refused()) == 1
        pipes[0].over.set()
        await asyncio.wait([serving[0]], timeout=60)
        pipes.append(Slow(3 * mebibyte))
        serving.append(asyncio.create_task(host.serve(pipes[-1])))
        await until(lambda: len(arriving) + len(refused()) == len(serving))
        assert arriving[3:] == [3 * mebibyte]
        for pipe in pipes:
            pipe.over.set()
        await asyncio.wait(serving, timeout=60)
        host.stop()

    asyncio.run(go())
