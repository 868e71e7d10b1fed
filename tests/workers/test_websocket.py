"""Pipes over real websockets: what goes in comes out, whatever the loop, the pace and the other side's manners."""

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import random
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
import trustme
import uvloop
from torch import nn
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame as TheirFrame
from websockets.frames import Opcode

from planrt.errors import MessageTooLargeError, WireError, WorkerLostError
from planrt.fl import TrainConfig
from planrt.plans import func2plan
from planrt.serde.frames import FRAGMENT_BYTES, FrameAssembler, Limits, encode
from planrt.workers import BaseDataset, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.transport.websocket import dial, listen
from planrt.workers.transport.websocket_stream import FrameStream
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions
from tests.models import classification_data


@func2plan(args_shape=[(-1,)])
def double(x):
    return x + x


LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
FAST = Limits(keepalive=0.1, patience=1.5)
PATIENCE = 60
"""Seconds after which a test gives up."""


@pytest.fixture(params=LOOPS.values(), ids=LOOPS)
def run(request):
    """Runs a coroutine on a loop of each kind."""

    def run(coroutine):
        async def bounded():
            async with asyncio.timeout(PATIENCE):
                return await coroutine

        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(bounded())

    return run


def put(number: int, *tensors: torch.Tensor):
    """A message of the protocol that carries any tensors."""
    return encode(m.to_wire(m.Envelope(number, m.Post([]))), tensors)


@contextlib.asynccontextmanager
async def pair(limits=None, dial_limits=None):
    """A client's pipe and the server's, joined; the block's end closes both."""
    limits = limits or Limits()
    accepted = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def serve_pipe(pipe):
        accepted.set_result(pipe)
        await over.wait()
        await pipe.close()

    async with listen("127.0.0.1", 0, limits=limits, serve_pipe=serve_pipe) as port:
        client = await dial(f"ws://127.0.0.1:{port}", timeout=10, limits=dial_limits or limits)
        server = await accepted
        try:
            yield client, server
        finally:
            over.set()
            await client.close()


SIZES = [0, 1, 5, 1000, 16_383, 16_384, 65_530, 65_536, 262_144, 262_145, 1_000_003, 3_300_001]


def test_messages_of_every_size_both_ways_at_once(run):
    tensors = [torch.arange(size, dtype=torch.uint8) for size in SIZES]

    async def send(pipe):
        for number, tensor in enumerate(tensors):
            await pipe.send(put(number, tensor, tensor[:7], tensor))

    async def receive(pipe):
        return [await pipe.receive() for _ in tensors]

    async def main():
        async with pair() as (client, server):
            _, _, up, down = await asyncio.gather(
                send(client), send(server), receive(server), receive(client)
            )
            assert client.traffic == server.traffic
            assert client.traffic.messages_sent == len(tensors)
            return up, down

    for received in run(main()):
        assert [one.message.id for one in received] == list(range(len(tensors)))
        for one, tensor in zip(received, tensors, strict=True):
            assert [got.tolist() for got in one.tensors] == [
                sent.tolist() for sent in (tensor, tensor[:7], tensor)
            ]


def test_what_leaves_at_once_is_as_it_was_then_and_in_its_order(run):
    sizes = [size for size in SIZES if size < 400_000]

    async def main():
        async with pair() as (client, server):
            assert not server.send_now(put(0, torch.zeros(20_000)))  # large frames of its are no copies
            assert server.send_now(put(7, torch.arange(5)))
            answer = await client.receive()
            assert (answer.message.id, answer.tensors[0].tolist()) == (7, [0, 1, 2, 3, 4])
            sent, waited = [], 0
            reading = asyncio.ensure_future(receive(server, len(sizes)))
            for number, size in enumerate(sizes):
                tensors = [torch.randint(256, (one,), dtype=torch.uint8) for one in (size, 7, size, 20_000)]
                frame = put(number, *tensors)
                sent.append([one.tolist() for one in tensors])
                if client.send_now(frame):
                    for one in tensors:
                        one.zero_()
                else:
                    waited += 1
                    await client.send(frame)
            assert waited < len(sizes)
            assert not client.send_now(put(0, torch.zeros(FRAGMENT_BYTES + 1, dtype=torch.uint8)))
            assert [[one.tolist() for one in got.tensors] for got in await reading] == sent
            up, down = client.traffic, server.traffic
            assert (up.messages_sent, up.bytes_sent) == (down.messages_received, down.bytes_received)
            await server.close()
            await asyncio.wait_for(client.gone(), 10)
            assert not client.send_now(put(0))

    async def receive(pipe, count):
        return [await pipe.receive() for _ in range(count)]

    run(main())


def test_a_sent_tensor_may_change_though_the_other_side_has_not_read_it(run):
    tensor = torch.arange(6_000_000, dtype=torch.int32)

    async def one_way(source, target):
        sent = tensor.clone()
        sending = asyncio.ensure_future(source.send(put(1, sent)))
        reading = asyncio.ensure_future(target.receive())
        await sending
        sent.zero_()
        received = await reading
        assert torch.equal(received.tensors[0], tensor)

    async def main():
        async with pair() as (client, server):
            await one_way(client, server)
            await one_way(server, client)

    run(main())


def test_who_does_not_read_makes_the_other_side_wait_and_is_not_taken_for_lost(run):
    """More than socket buffers hold: nothing is read ahead, and pings stay unanswered behind the data."""
    tensor = torch.ones(16_000_000)

    async def one_way(source, target):
        sending = asyncio.ensure_future(source.send(put(1, tensor)))
        waiting = asyncio.ensure_future(source.receive())
        await asyncio.sleep(FAST.keepalive + FAST.patience + 1.0)
        assert not sending.done()
        assert not waiting.done()
        received = await target.receive()
        await sending
        assert torch.equal(received.tensors[0], tensor)
        await target.send(put(2))
        assert (await waiting).message.id == 2

    async def main():
        async with pair(FAST) as (client, server):
            await one_way(client, server)
            await one_way(server, client)

    run(main())


def test_closing_does_not_wait_for_what_nobody_read(run):
    async def main(closes, other):
        async with pair() as pipes:
            sending = asyncio.ensure_future(pipes[other].send(put(1, torch.ones(16_000_000))))
            await asyncio.sleep(0.1)
            await pipes[closes].close()
            with contextlib.suppress(ConnectionError):
                await sending
            assert await pipes[other].receive() is None
            assert await pipes[closes].receive() is None
            for pipe in pipes:
                with pytest.raises(ConnectionError):
                    await pipe.send(put(2))

    run(main(0, 1))
    run(main(1, 0))


def test_what_was_sent_before_closing_arrives(run):
    async def main():
        async with pair() as (client, server):
            for number in range(5):
                await client.send(put(number, torch.ones(2000)))
            closing = asyncio.ensure_future(client.close())
            numbers = [(await server.receive()).message.id for _ in range(5)]
            assert await server.receive() is None
            await closing
            return numbers

    assert run(main()) == [0, 1, 2, 3, 4]


def test_a_message_that_was_given_up_half_way_ends_the_connection(run):
    async def main():
        async with pair() as (client, server):
            sending = asyncio.ensure_future(client.send(put(1, torch.ones(16_000_000))))
            await asyncio.sleep(0.1)
            sending.cancel()
            assert await server.receive() is None
            with pytest.raises(ConnectionError):
                await client.send(put(2))

    run(main())


def test_receiving_can_be_given_up_and_taken_up_again(run):
    async def main():
        async with pair() as (client, server):
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(server.receive(), 0.02)
            await client.send(put(7, torch.ones(3)))
            return (await server.receive()).message.id

    assert run(main()) == 7


def test_who_failed_to_make_room_is_told_and_nobody_else(run):
    def no_room(message, nbytes):
        raise OSError("no space left")

    async def main():
        async with pair() as (client, server):
            await client.send(put(1, torch.ones(3)))
            with pytest.raises(OSError, match="no space left"):
                await server.receive(no_room)
            await server.send(put(2))
            return (await client.receive()).message.id

    assert run(main()) == 2


def test_over_tls(run, monkeypatch, tmp_path):
    """wss, ended by a proxy in front of the worker, as the README says."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    tensor = torch.arange(2_000_000)

    async def serve_pipe(pipe):
        while (received := await pipe.receive()) is not None:
            await pipe.send(put(received.message.id + 1, *received.tensors))

    async def main():
        async def forward(reader, writer):
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while data := await reader.read(1 << 16):
                    writer.write(data)
                    await writer.drain()
            writer.close()

        async def proxy(reader, writer):
            inner = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(forward(reader, inner[1]), forward(inner[0], writer))

        async with (
            listen("127.0.0.1", 0, limits=FAST, serve_pipe=serve_pipe) as port,
            await asyncio.start_server(proxy, "127.0.0.1", 0, ssl=context) as front,
        ):
            outside = front.sockets[0].getsockname()[1]
            pipe = await dial(f"wss://localhost:{outside}", timeout=10, limits=FAST)
            for number in range(3):
                await pipe.send(put(number, tensor))
                received = await pipe.receive()
                assert received.message.id == number + 1
                assert torch.equal(received.tensors[0], tensor)
            await pipe.close()

    run(main())


# ------------------------------------------------------------------- others who speak websocket their way


@pytest.mark.parametrize("missing", [-8, 0, 8, 1 << 19])
def test_a_clients_tensors_share_frames_of_a_megabyte(run, missing):
    """Many tensors, of two megabytes less what is `missing`: what arrives is as few frames as can be."""
    sizes = [40_000, 3, 0, 30_000, 2_000, 1] * 2
    tensors = [torch.arange(size) for size in sizes]
    rest = (2 * FRAGMENT_BYTES - missing - put(7, *tensors, torch.arange(1)).nbytes) // 8
    tensors.append(torch.arange(rest + 1))
    frame = put(7, *tensors)
    found = []

    async def serve_one(connection):
        found.extend([fragment async for fragment in connection.recv_streaming(decode=False)])

    async def main():
        async with serve(serve_one, "127.0.0.1", 0, max_size=None, compression=None) as server:
            port = server.sockets[0].getsockname()[1]
            pipe = await dial(f"ws://127.0.0.1:{port}", timeout=10, limits=Limits())
            await pipe.send(frame)
            await pipe.close()

    run(main())
    assert b"".join(found) == b"".join(frame.pieces)
    assert len(found) == -(-frame.nbytes // FRAGMENT_BYTES)


def test_fragments_cut_anywhere_with_pings_between_them(run):
    data = b"".join(put(5, torch.arange(40_000)).fragments())
    cuts = [0, 1, 2, 9, 30, 31, 31, 90, 16_474, 16_475, 200_000, 200_000, len(data), len(data)]

    async def serve_pipe(pipe):
        received = await pipe.receive()
        await pipe.send(put(received.message.id, received.tensors[0] + 1))
        await pipe.receive()

    async def main():
        async with listen("127.0.0.1", 0, limits=Limits(), serve_pipe=serve_pipe) as port:
            uri = f"ws://127.0.0.1:{port}"
            async with connect(uri, compression=None, max_size=None) as other:

                async def pieces():
                    for start, end in itertools.pairwise(cuts):
                        await (await other.ping())
                        yield data[start:end]

                await other.send(pieces())
                assembler = FrameAssembler(m.from_wire)
                assembler.feed(await other.recv())
                return assembler.finish()

    received = run(main())
    assert received.message.id == 5
    assert torch.equal(received.tensors[0], torch.arange(40_000) + 1)


def test_a_server_of_another_kind(run):
    tensor = torch.arange(1_000_000)

    async def echo(connection):
        async for message in connection:
            await connection.ping()
            await connection.send(message[start : start + 99_999] for start in range(0, len(message), 99_999))

    async def main():
        async with serve(echo, "127.0.0.1", 0, compression=None, max_size=None) as server:
            port = server.sockets[0].getsockname()[1]
            pipe = await dial(f"ws://127.0.0.1:{port}", timeout=10, limits=Limits())
            await pipe.send(put(3, tensor))
            received = await pipe.receive()
            await pipe.close()
            return received

    assert torch.equal(run(main()).tensors[0], tensor)


HELLO = b"".join(encode(m.to_wire(m.Envelope(1, m.Hello("s" * 32, own_versions())))).fragments())


def masked(opcode: Opcode, data: bytes, *, fin: bool = True) -> bytes:
    return TheirFrame(opcode, data, fin).serialize(mask=True)


MALFORMED = {
    "unmasked": (TheirFrame(Opcode.BINARY, HELLO).serialize(mask=False), "clients mask"),
    "reserved bits": (b"\xc2\x80\0\0\0\0", "reserved bits"),
    "unknown opcode": (b"\x83\x80\0\0\0\0", "unknown opcode 3"),
    "long ping": (b"\x89\xfe\x01\x00\0\0\0\0" + bytes(256), "long or in pieces"),
    "ping in pieces": (b"\x09\x80\0\0\0\0", "long or in pieces"),
    "a continuation of nothing": (masked(Opcode.CONT, HELLO), "out of order"),
    "a message inside a message": (
        masked(Opcode.BINARY, HELLO[:9], fin=False) + masked(Opcode.BINARY, HELLO),
        "out of order",
    ),
}


@contextlib.contextmanager
def raw(uri):
    """A plain socket after the opening handshake."""
    port = int(uri.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(
            f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(1)
        yield connection


PING = b"\x89\x00"


def until_closed(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(4096):
            data += piece
    return data


@pytest.fixture
def server():
    server = WebsocketServerWorker("bob", threads=1, limits=FAST)
    server.add_dataset(classification_data(0), "flowers")
    return server


@pytest.mark.parametrize(("data", "says"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_frames_end_their_connection_and_nothing_else(data, says):
    server = WebsocketServerWorker("bob", threads=1, limits=Limits(keepalive=0.1, patience=60.0))
    server.add_dataset(classification_data(0), "flowers")
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri) as good:
        for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
            with raw(uri) as connection:
                for piece in pieces:
                    with contextlib.suppress(ConnectionError):
                        connection.sendall(piece)
                answer = until_closed(connection)
            while answer.startswith(PING):  # for whoever is slow
                answer = answer.removeprefix(PING)
            assert answer[0] == 0x88  # a close frame and nothing before it
            assert struct.unpack_from("!H", answer, 2) == (1002,)  # protocol error
            assert says in answer[4:].decode()
        assert "flowers" in good.datasets
        assert good.objects_count() == 0


def random_stream(rng: random.Random) -> bytes:
    """Frames of a client, most of them well-formed; a bit here and there is another one, or the end is missing."""
    post = b"".join(put(0, torch.arange(30_000)).fragments())
    stream = bytearray()
    for _ in range(rng.randint(1, 6)):
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                stream += masked(Opcode.BINARY, HELLO)
            case 4 | 5 | 6:
                cuts = [0, *sorted(rng.randrange(len(post)) for _ in range(rng.randint(0, 4))), len(post)]
                for start, end in itertools.pairwise(cuts):
                    opcode = Opcode.CONT if start else Opcode.BINARY
                    stream += masked(opcode, post[start:end], fin=end == len(post))
                    stream += masked(Opcode.PING, bytes(rng.randrange(126)))
            case 7:
                stream += masked(Opcode.CLOSE, b"\x03\xe8")
            case 8:
                stream += masked(Opcode.TEXT, b"text")
            case _:
                stream += rng.randbytes(rng.randint(1, 200))
    for _ in range(rng.choice([0, 0, 1, 2, 4])):
        stream[rng.randrange(min(len(stream), rng.choice([300, len(stream)])))] ^= 1 << rng.randrange(8)
    return bytes(stream[: rng.choice([len(stream), len(stream), rng.randrange(len(stream))])])


def test_random_bytes_never_harm_a_worker(server, caplog):
    rng = random.Random(1)
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri) as good:
        for _ in range(80):
            data = random_stream(rng)
            with contextlib.suppress(ConnectionError, TimeoutError), raw(uri) as connection:
                connection.settimeout(0.05)
                while data:
                    size = rng.choice([1, 7, 100, 5000, len(data)])
                    connection.sendall(data[:size])
                    data = data[size:]
                while connection.recv(1 << 16):
                    pass
        assert good.objects_count() == 0
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_connections_that_failed_keep_no_buffer_until_garbage_is_looked_for():
    gc.disable()
    try:
        with WebsocketServerWorker("bob", threads=1).running() as uri:
            for _ in range(12):
                with raw(uri) as connection:
                    connection.sendall(masked(Opcode.BINARY, HELLO) + masked(Opcode.BINARY, b"no frame"))
                    while b"not a planrt frame" not in connection.recv(4096):
                        pass
            with WebsocketClientWorker("bob", uri=uri) as good:
                assert good.objects_count() == 0
        streams = [one for one in gc.get_objects() if type(one) is FrameStream and one._discards]
        assert all(len(one._buffer) == 0 for one in streams)
    finally:
        gc.enable()


def test_a_longer_frame_than_agreed_is_refused_by_name(server):
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri) as good:
        with raw(uri) as connection:
            connection.sendall(struct.pack("!BBQ", 0x82, 0x80 | 127, FRAGMENT_BYTES + 1) + bytes(4 + 5000))
            answer = until_closed(connection)
        assert b"MessageTooLargeError" in answer
        assert b"1,048,577 bytes is over the limit of 1,048,576" in answer
        assert good.objects_count() == 0


def test_who_floods_with_pings_and_never_reads_is_cut_off(server):
    pings = masked(Opcode.PING, bytes(125)) * 1000
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri) as good:
        with raw(uri) as connection, pytest.raises(ConnectionError):
            connection.sendall(pings * 1000)  # 131 MB: more than all buffers hold
        assert good.objects_count() == 0


def test_a_client_hears_why_it_cannot_follow(run):
    async def unmannered(connection):
        connection.transport.write(b"\x83\x00")
        with contextlib.suppress(ConnectionClosed):
            await connection.recv()

    async def too_long(connection):
        with contextlib.suppress(ConnectionClosed):
            await connection.send(bytes(FRAGMENT_BYTES + 1))
            await connection.recv()

    async def main(handler):
        async with serve(handler, "127.0.0.1", 0, compression=None) as server:
            port = server.sockets[0].getsockname()[1]
            pipe = await dial(f"ws://127.0.0.1:{port}", timeout=10, limits=Limits())
            try:
                await pipe.receive()
            finally:
                await pipe.close()

    with pytest.raises(WireError, match="unknown opcode 3"):
        run(main(unmannered))
    with pytest.raises(MessageTooLargeError, match="send longer messages in fragments"):
        run(main(too_long))


# --------------------------------------------------------------------------------------- signs of life


def test_a_worker_that_computes_long_keeps_clients_that_have_sent_more(server):
    """Its pings then wait behind data that the worker does not read before it is done."""
    let_go = threading.Event()

    class Slow(BaseDataset):
        def fetch(self, indices):
            if serving:
                let_go.wait(PATIENCE)
            return super().fetch(indices)

    serving = False  # its items are looked at before
    flowers = classification_data(0)
    server.add_dataset(Slow(flowers.data, flowers.targets), "slow")
    serving = True

    async def main(uri):
        worker = await WebsocketClientWorker.connect("bob", uri, limits=FAST)
        await worker.async_run(double, torch.ones(2))
        await TrainConfig(nn.Linear(6, 3), F.cross_entropy, batch_size=8).async_send(worker)
        working = asyncio.ensure_future(worker.async_fit("slow"))
        more = [asyncio.ensure_future(worker.async_run(double, torch.ones(1_000_000))) for _ in range(8)]
        await asyncio.sleep(FAST.keepalive + FAST.patience + 1.5)
        assert not working.done()
        let_go.set()
        await asyncio.gather(working, *more)
        await worker.async_close()

    try:
        with server.running() as uri:
            asyncio.run(main(uri))
    finally:
        let_go.set()


def test_who_could_not_listen_has_not_heard_silence(run):
    """A loop that stood still for long, say because its process did, finds the other side's bytes later."""

    async def main():
        async with pair(FAST) as (client, server):
            await asyncio.sleep(0.3)
            time.sleep(FAST.keepalive + FAST.patience + 0.5)  # noqa: ASYNC251 - on purpose
            await asyncio.sleep(0.3)
            await client.send(put(1, torch.ones(3)))
            return (await server.receive()).message.id

    assert run(main()) == 1


@contextlib.asynccontextmanager
async def slow_link(port: int):
    """A proxy that lets about 6 MB a second through, either way; yields its port."""

    async def forward(reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.close()

    async def proxy(reader, writer):
        inner = socket.socket()
        inner.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        inner.connect(("127.0.0.1", port))
        inner_reader, inner_writer = await asyncio.open_connection(sock=inner)
        await asyncio.gather(forward(reader, inner_writer), forward(inner_reader, writer))

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    listener.bind(("127.0.0.1", 0))
    async with await asyncio.start_server(proxy, sock=listener):
        yield listener.getsockname()[1]


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_a_slow_link_is_no_lost_one(run, up):
    """Who sends for long hears nothing meanwhile: pings and pongs wait behind the data."""
    tensor = torch.ones(6_000_000)

    async def serve_pipe(pipe):
        if up:
            received.append(await pipe.receive())
            await pipe.send(put(2))
        else:
            await pipe.send(put(1, tensor))
        await pipe.receive()

    received = []

    async def main():
        async with (
            listen("127.0.0.1", 0, limits=FAST, serve_pipe=serve_pipe) as port,
            slow_link(port) as slow,
        ):
            pipe = await dial(f"ws://127.0.0.1:{slow}", timeout=10, limits=FAST)
            if up:
                await pipe.send(put(1, tensor))
                assert (await pipe.receive()).message.id == 2
            else:
                received.append(await pipe.receive())
            await pipe.close()

    run(main())
    assert torch.equal(received[0].tensors[0], tensor)


def test_a_worker_that_stands_still_is_taken_for_lost():
    code = (
        "from planrt.workers import WebsocketServerWorker\n"
        "WebsocketServerWorker('bob', threads=1).start(ready=lambda port: print(port, flush=True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            port = int(process.stdout.readline())
            with WebsocketClientWorker(
                "bob", "127.0.0.1", port, limits=Limits(keepalive=0.1, patience=15.0)
            ) as worker:
                assert worker.objects_count() == 0
                os.kill(process.pid, signal.SIGSTOP)
                with pytest.raises(WorkerLostError, match="'bob'.*no sign of life"):
                    worker.objects_count()
                with pytest.raises(WorkerLostError, match="no sign of life"):
                    worker.objects_count()
        finally:
            process.kill()
