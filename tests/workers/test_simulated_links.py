"""Sessions over links that are cut at any moment: nothing is lost, nothing is done twice, and nothing waits for ever.

Random programs of posts and requests run against a worker under a simulated network (`tests.workers.simulation`), and
beside it on plain tensors here. What the program is told must equal what these hold, or it must be told, by a typed
error, that the worker has lost the session.
"""

import asyncio
import contextlib

import pytest
import torch

from planrt.errors import PlanrtError, SessionLostError, WorkerLostError, WorkerTimeoutError
from planrt.types import Ref
from planrt.workers.client import connection as connections
from planrt.workers.client import outbox, telling, unarrived
from planrt.workers.machine.keeping import answers as keeping
from planrt.workers.wire import delivery
from planrt.workers.wire import messages as m
from planrt.workers.wire.posted import PostedOp
from tests.workers.simulation import Network, simulate


@pytest.fixture(autouse=True)
def _small_bounds(monkeypatch):
    """So that small programs get to where large messages and many of them do."""
    assert connections.COPIED_TO_SEND > delivery.LARGE  # what is waited for is acknowledged at once
    monkeypatch.setattr(connections, "COPIED_TO_SEND", 300)
    monkeypatch.setattr(telling, "LARGE_ANSWER", 200)
    monkeypatch.setattr(telling, "MESSAGES", 3)
    monkeypatch.setattr(unarrived, "_MOST_MESSAGES", 8)
    monkeypatch.setattr(outbox, "_OPS_PER_MESSAGE", 5)
    monkeypatch.setattr(keeping, "LARGE", 200)
    monkeypatch.setattr(keeping, "MESSAGES", 3)


class Program:
    """A client that does random things, and holds beside it what they should come to."""

    def __init__(self, network, connection):
        self.network, self.draw = network, network.draw
        self.connection = connection
        self.twins = {}
        self.asked = []
        self.next_id = 1
        self.checked = 0

    def op(self, name, *args, result=None):
        packed = PostedOp(name, args, {}, result, True).pack()
        self.connection.post_op(packed)

    async def step(self):
        kind = self.draw.choice(
            ("put", "send", "change", "change", "change", "make", "fetch", "fetch", "drop", "rest")
        )
        id = self.draw.choice(sorted(self.twins)) if self.twins else None
        if kind in ("put", "send") or id is None:
            await self.put(large=kind == "send")
        elif kind == "change":
            amount = float(self.draw.randint(-3, 3))
            name = self.draw.choice(("Tensor.add_", "Tensor.mul_"))
            self.op(name, Ref(id), amount)
            getattr(self.twins[id], name.removeprefix("Tensor."))(amount)
        elif kind == "make":
            other, new = self.draw.choice(sorted(self.twins)), self.new_id()
            self.op("Tensor.add", Ref(id), Ref(other), result=Ref(new))
            if self.twins[id].shape == self.twins[other].shape:
                self.twins[new] = self.twins[id] + self.twins[other]
            else:  # it failed, and so do fetches of it
                self.asked.append((None, self.connection.enqueue(m.Fetch(new, False))))
        elif kind == "fetch":
            asked = self.connection.enqueue(m.Fetch(id, False))
            self.asked.append((self.twins[id].clone(), asked))
            if self.draw.random() < 0.5:
                await self.check()
        elif kind == "drop":
            del self.twins[id]
            self.connection.drop(id)
            if self.draw.random() < 0.3:
                self.connection.flush_drops()
        else:
            await asyncio.sleep(self.draw.choice((0.01, 0.5, 3.0)))

    def new_id(self):
        self.next_id += 1
        return self.next_id

    async def put(self, *, large):
        new = self.new_id()
        value = torch.arange(float(self.draw.choice((3, 3, 3, 40))), dtype=torch.float64) * self.draw.randint(
            1, 5
        )
        self.twins[new] = value.clone()
        body = m.Put([m.PutItem(new)])
        if large:
            await self.connection.send(body, [value])
            value.zero_()  # it may change now
        else:
            self.connection.post(body, [value])

    async def check(self):
        asked, self.asked = self.asked, []
        for wanted, one in asked:
            try:
                body, tensors = await self.connection.finish(one)
            except PlanrtError as error:
                if isinstance(error, WorkerLostError | WorkerTimeoutError):
                    raise
                assert wanted is None, error
                continue
            assert wanted is not None
            assert isinstance(body, m.Fetched)
            assert torch.equal(tensors[0], wanted), (tensors[0], wanted)
            self.checked += 1


async def troubles(network, seconds, kinds):
    """Cuts, for so many seconds of the program's time."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while loop.time() < end:
        await asyncio.sleep(network.draw.choice((0.0005, 0.01, 0.1, 1.0)))
        kind = network.draw.choice(kinds)
        if kind == "cut":
            network.cut(
                late=network.draw.choice((0.0, 0.02, 2.0)), down=network.draw.choice((0.0, 0.0, 0.2, 5.0))
            )
        elif kind == "restart":
            network.start("bob")
        elif kind == "away":
            network.cut(down=40.0)


def run(seed, steps=40, *, kinds=("cut",), limits=None):
    async def go():
        network = Network(seed, limits=limits)
        network.start("bob")
        connection = await network.connect("bob")
        renewed = []
        connection.on_renewed = renewed.append
        program = Program(network, connection)
        trouble = asyncio.create_task(troubles(network, 30.0, kinds))
        lost = None
        try:
            for _ in range(steps):
                await program.step()
            await program.check()
        except (SessionLostError, WorkerLostError) as error:
            lost = error
        trouble.cancel()
        await asyncio.wait([trouble])
        if lost is None:
            connection.post_drops()
            counted, _ = await connection.request(m.CountObjects())
            # Ops on tensors of different sizes leave a failure under their id.
            assert counted.objects >= len(program.twins)
            (session,) = network.states["bob"]._parts.sessions.values()
            assert session.posted == connection.posted  # each op once
            assert session.kept.taken == connection.session.sent.sent
            assert len(connection.session.sent) <= 4
            assert len(session.kept.answers) <= 4
        await connection.close(forget=True)
        for other in renewed:  # it grows while the worker is started again
            try:
                counted, _ = await other.request(m.CountObjects())
                assert counted.objects == 0
            except SessionLostError:
                continue
            await other.close(forget=True)
        await asyncio.sleep(200)
        assert not network.states["bob"].store.objects  # nothing is left behind
        assert not len(network.states["bob"]._parts.kept)
        network.hosts["bob"].stop()
        return lost, program.checked

    return simulate(go())


@pytest.mark.parametrize("part", range(4))
def test_cuts_lose_nothing_and_double_nothing(part):
    checked = 0
    for seed in range(part, 400, 4):
        lost, done = run(seed)
        assert lost is None, (seed, lost)
        checked += done
    assert checked > 500


@pytest.mark.parametrize("kinds", [("cut", "restart"), ("cut", "away"), ("cut", "away", "restart")])
def test_what_is_lost_is_told_and_new_work_goes_on(kinds):
    """Workers that are started again, and cuts that last for longer than the client tries."""
    told = 0
    for seed in range(60):
        lost, _ = run(seed, kinds=kinds)
        told += lost is not None
        if kinds == ("cut", "restart"):
            assert lost is None or isinstance(lost, SessionLostError), (seed, lost)
    assert told > 20


def test_who_comes_back_by_hand_has_lost_nothing_but_answers():
    """`reopen` after the client gave up: posts arrived once, whatever became of requests."""
    back = 0

    async def go(seed):
        network = Network(seed)
        network.start("bob")
        connection = await network.connect("bob", seconds=0.5)
        program = Program(network, connection)
        for _ in range(4):
            with contextlib.suppress(WorkerLostError):
                for _ in range(8):
                    await program.step()
                await program.check()
            program.asked.clear()
            network.cut(late=network.draw.choice((0.0, 1.0)), down=network.draw.choice((0.0, 0.2, 5.0)))
            await asyncio.sleep(10)
            assert await connection.reopen() is connection
        for id, wanted in program.twins.items():
            body, tensors = await connection.request(m.Fetch(id, False))
            assert isinstance(body, m.Fetched)
            assert torch.equal(tensors[0], wanted)
        (session,) = network.states["bob"]._parts.sessions.values()
        assert session.posted == connection.posted
        await connection.close(forget=True)
        await asyncio.sleep(1)
        network.hosts["bob"].stop()
        return len(program.twins)

    for seed in range(60):
        back += simulate(go(seed))
    assert back > 60
