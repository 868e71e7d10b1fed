"""Clients that do not read: what waits for them is bounded, and nobody else waits for them."""

import asyncio
import contextlib

import pytest
import torch

from planrt.errors import MessageTooLargeError
from planrt.serde.frames import Limits, encode
from planrt.workers.client.connection import Connection
from planrt.workers.client.handshaking import shake_hands
from planrt.workers.client.session import ClientSession
from planrt.workers.machine.events import PeerFailed, ToPeer
from planrt.workers.machine.state import WorkerState
from planrt.workers.serving import arriving, links, outgoing
from planrt.workers.serving.compute import ComputeThread
from planrt.workers.serving.host import WorkerHost
from planrt.workers.transport import memory, websocket
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions

PATIENCE = 30
LARGE = 64 << 20
"""More bytes than the buffers of a connection hold."""
TOKENS = {name: f"the long token of {name}, no. 1" for name in ("ann", "ben", "eve")}
ELSEWHERE = [m.PeerAddress(name, f"memory://{name}") for name in ("there", "bob", "dealer")]


class Raw:
    """A client that sends what it is told to, and reads what it is told to read."""

    def __init__(self, pipe, limits):
        self.pipe, self.session = pipe, ClientSession("bob", address=pipe.address, limits=limits)

    async def post(self, body, tensors=()):
        await self._sent(self.session.posted(body), tensors)

    async def ask(self, body):
        """Sends a request whose answer nobody reads."""
        await self._sent(self.session.request(body), ())

    async def _sent(self, envelope, tensors):
        await self.pipe.send(encode(m.to_wire(envelope), tensors))

    async def answer(self):
        """Reads the next answer; None where the connection has ended."""
        while (received := await self.pipe.receive()) is not None:
            if received.message.id:
                return received.message.body
        return None

    async def asked(self, body):
        await self.ask(body)
        return await asyncio.wait_for(self.answer(), PATIENCE)

    async def keeps_one_waiting(self):
        """Is sent more than it reads."""
        within_process = self.pipe.address.startswith("memory")  # where nothing is between the two
        value = torch.zeros(8 if within_process else LARGE, dtype=torch.uint8)
        await self.post(m.Put([m.PutItem(1)]), [value])
        await self.ask(m.Fetch(1, False))


@contextlib.asynccontextmanager
async def served(transport, limits=None, **options):
    """A host, and ``await client(token)``, a connection with a session."""
    limits = limits or Limits()
    compute = ComputeThread("test")
    host = WorkerHost(WorkerState("bob", limits=limits, **options), compute, limits=limits)
    pipes = []
    async with contextlib.AsyncExitStack() as stack:
        if transport == "websocket":
            port = await stack.enter_async_context(
                websocket.listen("127.0.0.1", 0, limits=limits, serve_pipe=host.serve)
            )

        async def client(token=""):
            if transport == "websocket":
                pipe = await websocket.dial(f"ws://127.0.0.1:{port}", timeout=PATIENCE, limits=Limits())
            else:
                pipe = memory.connect("memory://bob", host, Limits())[0]
            pipes.append(pipe)
            made = Raw(pipe, Limits())
            await shake_hands(pipe, made.session, token, for_others=False)
            return made

        try:
            yield host, client
        finally:
            for pipe in pipes:
                await pipe.close()
            host.stop()
            compute.close()


async def dealt(client, dealer, groups):
    """Makes groups of `client`, of which `dealer` asks what they need: requests that wait until `client` says more."""
    for name in groups:
        told = await client.asked(m.MakeGroup(name, "t" * 32, 1, ELSEWHERE[:2], ELSEWHERE[2], 1000, 60.0))
        assert isinstance(told, m.Done)
        told = await dealer.asked(m.GiveSeed(name, "t" * 32, name.encode() * 16))
        assert isinstance(told, m.Failure)  # the other party is nowhere
        await dealer.ask(m.AskNeeds(name))


async def until(condition):
    """Waits for what happens soon."""
    for _ in range(100 * PATIENCE):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nothing happened")


async def stuck(host):
    """Waits until a connection is being sent what its client does not read."""

    def sends(pipe):
        if isinstance(pipe, memory.MemoryPipe):
            return not pipe._other._incoming.empty()
        return pipe._connection.stream._full

    await until(lambda: any(map(sends, host._pipes.values())))


async def alone(host):
    """Waits until there is one connection."""
    await until(lambda: len(host._pipes) == 1)


def run(work):
    return asyncio.run(asyncio.wait_for(work, 2 * PATIENCE))


def test_nobody_waits_for_who_does_not_read(transport):
    async def go():
        async with served(transport) as (host, connect):
            client, dealer = await connect(), await connect()
            await dealt(client, dealer, ["g"])
            await dealer.keeps_one_waiting()
            await stuck(host)
            await client.post(m.EndGroup("g"))  # which answers what the dealer has asked
            told = await client.asked(m.CountObjects())
            assert told == m.Counted(0)
            answers = [await dealer.answer(), await dealer.answer()]  # it reads at last, and has everything
            assert [type(one) for one in answers] == [m.Fetched, m.Failure]

    run(go())


def test_so_much_waits_for_who_does_not_read(transport, monkeypatch, caplog):
    monkeypatch.setattr(outgoing, "CLOSING_SECONDS", 0.2)

    async def go():
        async with served(transport, Limits(unread_answers=3)) as (host, connect):
            client, dealer = await connect(), await connect()
            await dealt(client, dealer, "abcdef")
            await dealer.keeps_one_waiting()
            await stuck(host)
            for name in "abcdef":
                await client.post(m.EndGroup(name))
            assert await client.asked(m.CountObjects()) == m.Counted(0)
            await alone(host)
            assert list(host._outgoing) == list(host._pipes)
            assert await client.asked(m.CountObjects()) == m.Counted(0)

    run(go())
    assert [one.message for one in caplog.records].count("does_not_read") == 1


def test_an_answer_that_waits_comes_after_those_before_it(transport):
    """What comes of another's message, and what is asked meanwhile, keep their order."""

    async def go():
        async with served(transport) as (host, connect):
            client, dealer = await connect(), await connect()
            await dealt(client, dealer, "ab")
            await dealer.keeps_one_waiting()
            await stuck(host)
            for name in "ab":
                await client.post(m.EndGroup(name))
            assert await client.asked(m.CountObjects()) == m.Counted(0)
            asking = asyncio.create_task(dealer.ask(m.CountObjects()))
            answers = [await dealer.answer() for _ in range(4)]
            await asking
            assert [type(one) for one in answers] == [m.Fetched, m.Failure, m.Failure, m.Counted]

    run(go())


def test_who_is_taken_out_and_does_not_read_keeps_nobody_in(transport):
    """The owner's new users end the sessions of all who are none of them any more."""

    async def go():
        async with served(transport, users=TOKENS) as (host, connect):
            ann, ben, eve = [await connect(TOKENS[name]) for name in ("ann", "ben", "eve")]
            await ann.keeps_one_waiting()
            await asyncio.wait_for(host.change_users({"eve": TOKENS["eve"]}), PATIENCE)
            failure = (await asyncio.wait_for(ben.pipe.receive(), PATIENCE)).message.body
            assert "no longer" in failure.message
            await alone(host)
            assert await eve.asked(m.CountObjects()) == m.Counted(0)

    run(go())


def test_so_much_waits_for_another_worker_that_does_not_read(transport, caplog):
    """What a worker passes on to others is bounded, too, and who waits for an answer is told."""
    told = []

    async def go():
        async with served(transport) as (_, connect):

            class Dialling:
                async def connect(self, *args):
                    silent = (await connect()).pipe
                    silent.send = lambda frame, **options: asyncio.Event().wait()
                    silent.send_now = lambda frame: False
                    session = ClientSession("bob", address=silent.address, limits=Limits())
                    session.versions = own_versions()
                    return Connection(silent, session, limits=Limits())

            async def handle(event):
                told.append(event)

            between = links.Links("alice", handle, Limits(unsent_messages=20), Dialling())
            peer = m.PeerAddress("bob", "ws://bob:1")
            between.send(ToPeer(peer, m.CountObjects(), (), "first"))
            await until(lambda: between._links[peer].connection is not None)
            for number in range(40):
                between.send(ToPeer(peer, m.FailGroup(f"{number}", "over"), ()))
                await asyncio.sleep(0)
            await until(lambda: told)
            between.close()

    run(go())
    assert [type(one) for one in told] == [PeerFailed]
    assert "peer_does_not_read" in [one.message for one in caplog.records]


def test_what_arrives_is_bounded_without_a_quota_and_for_all_together():
    room = arriving.Arriving(10 << 20, 25 << 20)
    at = "nobody at 10.0.0"
    users = {1: f"{at}.1", 2: f"{at}.1", 3: f"{at}.2", 4: "user ann", 5: "user ben"}.__getitem__
    room.room(1, users, "", None, 8 << 20)
    with pytest.raises(MessageTooLargeError, match="others arrive for the same user"):
        room.room(2, users, "", None, 8 << 20)
    room.room(3, users, "", None, 8 << 20)
    room.room(4, users, "", None, 8 << 20)
    with pytest.raises(MessageTooLargeError, match="others arrive at this worker"):
        room.room(5, users, "", None, 8 << 20)
    room.over(1)
    assert len(room.room(5, users, "", None, 8 << 20).room()) > 0
    assert arriving.MOST == 16 << 30
