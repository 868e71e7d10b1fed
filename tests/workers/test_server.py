"""The websocket server against clients of every kind: many, hostile, slow, gone."""

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
import threading

import msgpack
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from planrt.errors import (
    ConnectError,
    HandshakeError,
    MessageTooLargeError,
    OptionError,
    RemoteError,
    WorkerLostError,
)
from planrt.fl import TrainConfig
from planrt.plans import func2plan
from planrt.serde.frames import FrameAssembler, Limits, encode
from planrt.workers import BaseDataset, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.serving import host
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions
from tests.models import classification_data


@func2plan(args_shape=[(-1,)])
def double(x):
    return x + x


@func2plan(args_shape=[(-1, -1)])
def long_work(x):
    for _ in range(60):
        x = torch.tanh(x @ x)
    return x


@pytest.fixture
def server():
    server = WebsocketServerWorker(
        "bob", threads=1, limits=Limits(message=64 << 20, keepalive=0.2, patience=20.0)
    )
    server.add_dataset(classification_data(0), "flowers")
    return server


def frame(message, tensors=()) -> bytes:
    return b"".join(encode(message, tensors).fragments())


HELLO = frame(m.to_wire(m.Envelope(1, m.Hello("s" * 32, own_versions()))))


async def exchange(uri, *payloads):
    """Sends raw messages and returns the bodies of all replies until the server closes."""
    replies = []
    async with connect(uri, compression=None, max_size=None) as connection:
        with contextlib.suppress(ConnectionClosed):
            for payload in payloads:
                await connection.send(payload)
            while True:
                data = await asyncio.wait_for(connection.recv(), 30)
                assembler = FrameAssembler(m.from_wire)
                assembler.feed(data)
                replies.append(assembler.finish().message.body)
    return replies


BOMB = msgpack.packb([None, [["float32", [2**40]]]])
HOSTILE = {
    "text": "hello",
    "empty": b"",
    "garbage": b"\x00" * 100,
    "cut": HELLO[:-4],
    "too long": HELLO + b"more",
    "not a message": frame({"id": 1, "body": {"type": "exec", "code": "1"}}),
    "negative id": frame({"id": -1, "body": {"type": "done"}}),
    "deep nesting": struct.pack("<4sI", b"PRT1", 5000) + b"\x91" * 5000,
    "header bomb": struct.pack("<4sI", b"PRT1", 2**32 - 1),
    "tensor bomb": struct.pack("<4sI", b"PRT1", len(BOMB)) + BOMB,
    "request before hello": frame(m.to_wire(m.Envelope(1, m.RunPlan("0" * 64, 0)))),
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes_get_one_clear_answer_and_harm_nobody(server, payload):
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri) as good:
        replies = asyncio.run(exchange(uri, payload))
        assert len(replies) == 1
        assert isinstance(replies[0], m.Failure)
        assert replies[0].message
        assert torch.equal(good.run(double, torch.ones(2)), torch.full((2,), 2.0))


def test_hostile_bytes_inside_a_session_end_it_and_nothing_else(server):
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri) as good:
        welcome, complaint = asyncio.run(exchange(uri, HELLO, b"garbage"))
        assert isinstance(welcome, m.Welcome)
        assert complaint.kind == "WireError"
        assert torch.equal(good.run(double, torch.ones(2)), torch.full((2,), 2.0))


def test_a_message_over_the_limit_is_refused_by_name_before_it_is_sent(server):
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri) as worker:
        with pytest.raises(MessageTooLargeError, match="80,000,000 bytes is over the limit of 67,108,864"):
            worker.run(double, torch.ones(20_000_000))
        assert torch.equal(worker.run(double, torch.ones(2)), torch.full((2,), 2.0))


def test_many_clients_each_get_their_own_answers(server):
    async def client(uri, number):
        worker = await WebsocketClientWorker.connect("bob", uri)
        values = [await worker.async_run(double, torch.full((3,), float(number + i))) for i in range(5)]
        await worker.async_close()
        return [value[0].item() for value in values]

    async def main(uri):
        return await asyncio.gather(*(client(uri, 100 * number) for number in range(12)))

    with server.running() as uri:
        results = asyncio.run(main(uri))
    assert results == [[2.0 * (100 * number + i) for i in range(5)] for number in range(12)]


def test_pings_are_answered_while_torch_computes(server, monkeypatch):
    """A loop that waited for the computation could answer one ping at its end, but not several on the way."""
    monkeypatch.setattr(host, "OPENING_SECONDS", 600.0)  # the one that pings has no session
    limits = Limits(keepalive=0.1, patience=60.0)

    async def main(uri):
        async with connect(uri) as other:
            work = asyncio.ensure_future(worker.async_run(long_work, torch.full((700, 700), 1e-3)))
            answered = 0
            while not work.done():
                await asyncio.wait_for(await other.ping(), 60.0)
                answered += 1
                await asyncio.sleep(0.02)
            await work
            return answered

    with server.running() as uri, WebsocketClientWorker("bob", uri=uri, limits=limits) as worker:
        assert asyncio.run(main(uri)) >= 3


def test_a_client_that_vanishes_mid_request_leaves_the_worker_well(server):
    async def vanish(uri):
        connection = await connect(uri, compression=None)
        await connection.send(HELLO)
        await connection.recv()
        fit = m.Fit("0" * 64, "flowers", 8, 1, -1, True, "SGD", {}, False, 1)
        await connection.send([frame(m.to_wire(m.Envelope(2, fit)), [torch.ones(1000)])[:500], b""])
        connection.transport.abort()

    with server.running() as uri:
        for _ in range(5):
            asyncio.run(vanish(uri))
        with WebsocketClientWorker("bob", uri=uri) as worker:
            assert torch.equal(worker.run(double, torch.ones(2)), torch.full((2,), 2.0))


def test_a_result_that_does_not_fit_a_message_is_an_error_of_that_request():
    @func2plan(args_shape=[(-1,)])
    def many(x):
        return [x + number for number in range(400)]

    server = WebsocketServerWorker("bob", threads=1)
    limits = Limits(header=3000)
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri, limits=limits) as worker:
        with pytest.raises(RemoteError, match="header takes"):
            worker.run(many, torch.ones(2))
        assert torch.equal(worker.run(double, torch.ones(2)), torch.full((2,), 2.0))


# ------------------------------------------------------------------------------------ connecting wrongly


def test_nobody_listening():
    with socket.socket() as kept:  # so that nobody else is given the port meanwhile
        kept.bind(("127.0.0.1", 0))
        port = kept.getsockname()[1]
        with pytest.raises(
            ConnectError, match=rf"nobody answers at ws://127\.0\.0\.1:{port}.*started"
        ) as caught:
            WebsocketClientWorker("bob", "127.0.0.1", port)
    assert caught.value.address == f"ws://127.0.0.1:{port}"


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:1", "ws://", "ws://127.0.0.1", "127.0.0.1:8777", "ws://h:99999"]
)
def test_malformed_addresses(uri):
    with pytest.raises(ConnectError, match="no worker address: write ws://HOST:PORT"):
        WebsocketClientWorker("bob", uri=uri)


def test_an_unknown_host():
    with pytest.raises(ConnectError, match=r"no\.such\.host\.invalid"):
        WebsocketClientWorker("bob", "no.such.host.invalid", 1)


@contextlib.contextmanager
def plain_tcp(answer: bytes):
    """A server that is no websocket server: sends `answer` to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run():
            with contextlib.suppress(OSError):
                peer, _ = listener.accept()
                with peer:
                    peer.recv(4096)
                    peer.sendall(answer)

        thread = threading.Thread(target=run)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def test_something_else_listens_there():
    refused = pytest.raises(HandshakeError, match="does not speak websocket")
    with plain_tcp(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as port, refused:
        WebsocketClientWorker("bob", "127.0.0.1", port)
    with plain_tcp(b"220 mail ready\r\n") as port, refused:
        WebsocketClientWorker("bob", "127.0.0.1", port)


def test_a_server_that_never_answers():
    refused = pytest.raises(ConnectError, match=r"no answer.*within 0\.3 s")
    with socket.create_server(("127.0.0.1", 0)) as silent, refused:
        WebsocketClientWorker("bob", "127.0.0.1", silent.getsockname()[1], timeout=0.3)


def test_another_worker_answers(server):
    with server.running() as uri, pytest.raises(HandshakeError, match="is 'bob', not 'alice'"):
        WebsocketClientWorker("alice", uri=uri)


def test_a_taken_port(server):
    with server.running():
        other = WebsocketServerWorker("alice", port=server.port)
        with pytest.raises(ConnectError, match=f"port {server.port} is taken"), other.running():
            pass


def test_a_host_that_is_not_this_machine():
    with (
        pytest.raises(ConnectError, match="no address of this machine"),
        WebsocketServerWorker("bob", "203.0.113.1", insecure=True).running(),
    ):
        pass


@pytest.mark.parametrize("options", [{"port": 70_000}, {"port": -1}, {"threads": 0}, {"id": ""}])
def test_bad_server_options(options):
    with pytest.raises(OptionError):
        WebsocketServerWorker(**{"id": "bob", **options})


def test_the_server_stops_with_clients_connected(server):
    with server.running() as uri:
        worker = WebsocketClientWorker("bob", uri=uri)
    with pytest.raises(WorkerLostError, match="'bob'"):
        worker.run(double, torch.ones(2))
    worker.close()


def test_a_process_ends_quietly_though_its_server_still_runs():
    """In a notebook nobody leaves the block."""
    code = (
        "import torch, planrt\n"
        "planrt.TorchHook(torch)\n"
        "running = planrt.WebsocketServerWorker('bob', threads=1).running()\n"
        "bob = planrt.WebsocketClientWorker('bob', uri=running.__enter__())\n"
        "x = torch.ones(3).send(bob)\n"
        "for _ in range(100):\n"
        "    y = x + 1\n"
        "print(y.get().tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[2.0, 2.0, 2.0]\n", "")


def test_the_server_stops_at_once_while_it_computes(server):
    """The computation goes on until it is let go; stopping does not wait for it, and the client is told."""
    computing, let_go = threading.Event(), threading.Event()

    class Endless(BaseDataset):
        def fetch(self, indices):
            if serving:
                computing.set()
                let_go.wait(60)
            return super().fetch(indices)

    serving = False  # its items are looked at before
    flowers = classification_data(0)
    server.add_dataset(Endless(flowers.data, flowers.targets), "endless")
    serving = True
    failures = []

    def work(worker):
        try:
            worker.fit("endless")
        except WorkerLostError as error:
            failures.append(error)

    try:
        with server.running() as uri:
            worker = WebsocketClientWorker("bob", uri=uri)
            TrainConfig(nn.Linear(6, 3), F.cross_entropy, batch_size=8).send(worker)
            thread = threading.Thread(target=work, args=(worker,))
            thread.start()
            assert computing.wait(60)
        thread.join()
        assert len(failures) == 1
        assert server.computing
        worker.close()
    finally:
        let_go.set()
