"""Which transport an address means; and that a transport is one module that nobody else names."""

import asyncio
import contextlib
import itertools
import subprocess
import sys

import pytest
import torch

import planrt
from planrt import Protocol, VirtualWorker
from planrt.errors import ConnectError, OptionError, RemoteError
from planrt.serde.frames import Limits
from planrt.workers import WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.transport import addresses
from planrt.workers.transport.pipes import memory_pipes

# ------------------------------------------------------------- a whole transport, as its module would be


class LoopbackTransport:
    """``loopback://name``: servers of this process under names, without a socket."""

    within_process = False
    encrypted = False

    def __init__(self):
        self.served = {}
        self.dialled = []
        self.under_way = set()

    async def dial(self, address, options):
        if address not in self.served:
            raise ConnectError(f"nobody listens at {address}", address=address)
        self.dialled.append((address, options))
        near, far = memory_pipes(address, options.limits)
        serving = asyncio.create_task(self.served[address](far))
        self.under_way.add(serving)
        serving.add_done_callback(self.under_way.discard)
        return near

    @contextlib.asynccontextmanager
    async def listen(self, address, serve, options):
        self.served[address] = serve
        try:
            yield address
        finally:
            del self.served[address]


LOOPBACK = LoopbackTransport()
addresses.register("loopback", LOOPBACK)


@pytest.fixture(autouse=True, scope="module")
def hook():
    """Tensors have `send` from here on."""
    return planrt.TorchHook(torch)


# ---------------------------------------------------------------------------------------- what users do with it

_numbers = itertools.count(1)


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:

        def start(id):
            server = WebsocketServerWorker(id, threads=1, uri=f"loopback://{id}{next(_numbers)}")
            uri = stack.enter_context(server.running())
            return stack.enter_context(WebsocketClientWorker(id, uri=uri))

        LOOPBACK.dialled.clear()
        yield start


def dialled():
    return [address.rstrip("0123456789") for address, _ in LOOPBACK.dialled]


def test_an_op_a_plan_and_a_move_over_a_transport_of_ones_own(serve):
    alice, bob = serve("alice"), serve("bob")
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    there = x.send(alice)
    (there * 3).sum().backward()
    assert there.grad.get().tolist() == [3, 3]

    @planrt.func2plan(args_shape=[(2,)])
    def double(value):
        return value * 2

    assert double.send(alice)(there).get().tolist() == [2, 4]
    y = (there + 1).move(bob)
    assert y.location is bob
    assert (y * 10).get().tolist() == [20, 30]
    assert dialled() == ["loopback://alice", "loopback://bob", "loopback://bob"]  # the last by alice


def test_pointers_to_pointers_and_protocols_over_it(serve):
    alice, bob = serve("alice"), serve("bob")
    chained = torch.tensor([1.0]).send(bob).send(alice)
    assert (chained + 1).get().get().tolist() == [2]

    @planrt.func2plan(args_shape=[(1,)])
    def inc(value):
        return value + 1

    deployed = Protocol([("first", inc), ("second", inc)]).deploy(alice, bob)
    assert deployed.run(torch.tensor([1.0])).get().tolist() == [3]


def test_objects_go_between_it_and_virtual_workers(serve):
    """A worker that others may be elsewhere for does not dial into this process: values go through here."""
    alice = serve("alice")
    with VirtualWorker("carol") as carol:
        x = torch.tensor([5.0]).send(alice).move(carol)
        assert (x + 1).get().tolist() == [6]
        x = torch.tensor([5.0]).send(carol).move(alice)
        assert (x + 1).get().tolist() == [6]

        @planrt.func2plan(args_shape=[(1,)])
        def inc(value):
            return value + 1

        there = inc.send(alice)
        there.move(carol)
        assert there.location is carol
        assert there(torch.tensor([1.0]).send(carol)).get().tolist() == [2]


def test_the_options_of_a_client_arrive_at_its_transport(serve):
    serve("alice")
    (address, _), *_ = LOOPBACK.dialled
    limits = Limits(message=1 << 20)
    WebsocketClientWorker("alice", uri=address, timeout=3, limits=limits, ca="authorities.pem").close()
    assert LOOPBACK.dialled[-1][1] == addresses.DialOptions(3, limits, "authorities.pem")


def test_a_client_connects_again_over_it(serve):
    alice = serve("alice")
    alice.close()
    alice.connect()
    assert torch.tensor([1.0]).send(alice).get().tolist() == [1]


# ---------------------------------------------------------------------------------------------------- wrong uses


@pytest.mark.parametrize("address", ["quic://h:1", "://h:1", "nothing", "", "WS://127.0.0.1:1"])
def test_an_unknown_scheme_is_refused_by_name(address):
    known = "planrt knows loopback://, memory://, ws://, wss:// here"
    with pytest.raises(ConnectError, match=known) as error:
        WebsocketClientWorker("bob", uri=address)
    assert repr(address) in str(error.value)
    with pytest.raises(ConnectError, match=known):
        WebsocketServerWorker("bob", uri=address)


def test_a_worker_names_the_scheme_that_it_does_not_know(make_worker):
    alice, bob = make_worker("alice"), make_worker("bob")
    x = torch.tensor([1.0]).send(alice)
    bob._connection.session.address = bob._link_address = "carrierpigeon://loft"
    with pytest.raises(
        RemoteError, match=r"'carrierpigeon://loft' is no worker address.*planrt knows .*ws://"
    ):
        x.move(bob)
    assert x.location is alice
    assert x.get().tolist() == [1]


@pytest.mark.parametrize("scheme", ["ws", "memory", "loopback", "", "Quic", "qu ic", "a://"])
def test_a_scheme_means_one_transport(scheme):
    with pytest.raises(OptionError, match="scheme|another word"):
        addresses.register(scheme, LoopbackTransport())


def test_nobody_at_a_memory_address():
    with pytest.raises(ConnectError, match="memory://nobody/7 in this process"):
        WebsocketClientWorker("nobody", uri="memory://nobody/7")
    with (
        pytest.raises(OptionError, match="VirtualWorker"),
        WebsocketServerWorker("x", uri="memory://x").running(),
    ):
        pass


def test_a_virtual_workers_address_goes_with_it():
    with VirtualWorker("dora", auto_add=False) as dora:
        address = dora.link_address
        with WebsocketClientWorker("dora", uri=address, auto_add=False) as other:
            assert torch.tensor([1.0]).send(other).get().tolist() == [1]
        with pytest.raises(OptionError, match="ca= is for TLS"):
            WebsocketClientWorker("dora", uri=address, ca="x.pem")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"uri": "ws://127.0.0.1:99999"}, OptionError), ({"uri": "wss://127.0.0.1:0"}, OptionError),
        ({"uri": "ws://127.0.0.1"}, ConnectError),
        ({"uri": "ws://no.such.host.invalid:0", "insecure": True}, ConnectError),
    ],
)  # fmt: skip
def test_a_server_at_an_address_that_it_cannot_have(options, error):
    with pytest.raises(error), WebsocketServerWorker("bob", **options).running():
        pass


def test_a_server_at_an_address_with_a_free_port():
    server = WebsocketServerWorker("bob", threads=1, uri="ws://127.0.0.1:0")
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri) as bob:
        assert uri == server.address == f"ws://127.0.0.1:{server.port}"
        assert server.port > 0
        assert torch.tensor([1.0]).send(bob).get().tolist() == [1]


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("memory://a/1", "memory://b/2", True), ("ws://a:1", "memory://b/2", False),
        ("memory://a/1", "wss://b:1", True), ("ws://a:1", "wss://b:1", True), ("loopback://a", "memory://b/2", False),
        ("ws://a:1", "carrierpigeon://b", True),
    ],
)  # fmt: skip
def test_who_reaches_whom(source, target, expected):
    assert addresses.reaches(source, target) is expected


def test_looking_at_addresses_needs_no_torch():
    code = "import sys; from planrt.workers.transport import addresses as a; a.schemes(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
