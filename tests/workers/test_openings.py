"""Connections that have no session: they get little time, no room for tensors, and so many places for each address."""

import contextlib
import socket
import subprocess
import sys
import threading
from urllib.parse import urlsplit

import pytest
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from planrt.errors import TransportError
from planrt.serde.frames import Limits, encode
from planrt.workers import WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.sessions import Session
from planrt.workers.serving import host as serving
from planrt.workers.serving.openings import Openings
from planrt.workers.transport.places import Places
from planrt.workers.wire import messages as m
from planrt.workers.wire.channel import caller
from planrt.workers.wire.messages import own_versions
from planrt.workers.wire.proofs import Proving
from tests.processes import eventually


def client(uri, **options):
    return WebsocketClientWorker("bob", uri=uri, auto_add=False, **options)


def said_until_closed(opened):
    """Everything that a worker sends on a connection, until it closes it."""
    said = b""
    try:
        while True:
            said += opened.recv(timeout=30)
    except ConnectionClosed:
        return said


def message(body, tensors=(), number=1):
    return b"".join(bytes(part) for part in encode(m.to_wire(m.Envelope(number, body)), tensors).fragments())


def test_an_address_has_so_many_places():
    server = WebsocketServerWorker("bob", threads=1, limits=Limits(connections=2))
    with server.running() as uri:
        first, second = client(uri), client(uri)
        with pytest.raises(TransportError, match="2 connections from your address are open"):
            client(uri)
        first.close()
        assert eventually(lambda: opens(uri))  # the worker's end is over a moment later
        assert second.objects_count() == 0
        second.close()


def test_an_address_has_so_many_places_before_any_handshake():
    """Each takes a file of the process, of which there are about a thousand."""
    server = WebsocketServerWorker("bob", threads=1, limits=Limits(connections=2))
    with server.running() as uri, contextlib.ExitStack() as stack, client(uri) as honest:
        place = urlsplit(uri).hostname, urlsplit(uri).port
        silent = [stack.enter_context(socket.create_connection(place, timeout=5)) for _ in range(65)]
        late = stack.enter_context(socket.create_connection(place, timeout=5))
        assert was_cut(late)
        assert not any(was_cut(one, seconds=0) for one in silent)
        assert honest.objects_count() == 0
        for one in silent:
            one.close()
        assert eventually(lambda: opens(uri))


def test_all_addresses_of_a_machine_have_the_places_of_one():
    """Loopback has sixteen million, and of IPv6 one machine is given 2 ** 64."""
    server = WebsocketServerWorker("bob", threads=1, limits=Limits(connections=2))
    with server.running() as uri, contextlib.ExitStack() as stack:
        place = urlsplit(uri).hostname, urlsplit(uri).port

        def reach(number):
            mine = (f"127.0.0.{number}", 0)
            return stack.enter_context(socket.create_connection(place, timeout=5, source_address=mine))

        silent = [reach(number) for number in range(1, 67)]
        assert was_cut(reach(100))
        assert not any(was_cut(one, seconds=0) for one in silent)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("127.0.0.1", "127.99.3.2", True),
        ("::1", "127.0.0.1", True),
        ("::ffff:127.0.0.9", "127.0.0.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("fe80::1%eth0", "fe80::2", True),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("no address", "no other", False),
    ],
)
def test_who_counts_as_one_caller(one, other, same):
    assert (caller(one) == caller(other)) is same
    nobody = Session("s", None)
    assert (nobody.whose(one) == nobody.whose(other)) is same  # quotas, and what arrives


def test_all_addresses_together_have_so_many_places():
    openings, places = Openings(2, of_all=3), Places(2, of_all=3)
    with contextlib.ExitStack() as stack:
        for host in ["10.0.0.1", "10.0.0.1", "10.0.0.2"]:
            stack.enter_context(openings.place(host))
            assert places.take(host)
        for host, reason in [("10.0.0.1", "2 connections from your"), ("10.0.0.3", "3 connections are open")]:
            with pytest.raises(TransportError, match=reason):
                stack.enter_context(openings.place(host))
            assert not places.take(host)
    places.leave("10.0.0.2")
    assert places.take("10.0.0.3")
    with openings.place("10.0.0.3"):
        pass


def test_a_worker_takes_the_files_that_the_system_gives():
    """Of which a part is not for connections: the log, decisions, processes and connections of its own."""
    program = (
        "import resource; from planrt.workers.transport import places\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "hard = min(hard, 4000) if hard != resource.RLIM_INFINITY else 4000\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))\n"
        "before = places.most_of_all(); places.take_files(); print(before, places.most_of_all() / hard)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["75", "0.75"]


def test_who_is_cut_off_at_once_is_told_so():
    """A full worker says nothing: whatever a client was about to do then, the error is planrt's own."""
    with socket.create_server(("127.0.0.1", 0)) as full:

        def cut():
            with contextlib.suppress(OSError):
                while True:
                    full.accept()[0].close()

        threading.Thread(target=cut, daemon=True).start()
        for _ in range(30):
            with pytest.raises(TransportError):
                client(f"ws://127.0.0.1:{full.getsockname()[1]}")
        full.shutdown(socket.SHUT_RDWR)


def was_cut(opened, seconds=60):
    opened.settimeout(seconds)
    try:
        return opened.recv(1) == b""
    except ConnectionResetError:
        return True
    except (TimeoutError, BlockingIOError):
        return False


def opens(uri, **options):
    with contextlib.suppress(TransportError), client(uri, **options) as worker:
        return worker.objects_count() == 0
    return False


def test_a_connection_that_says_nothing_is_closed(monkeypatch):
    with WebsocketServerWorker("bob", threads=1).running() as uri, client(uri) as honest:
        monkeypatch.setattr(serving, "OPENING_SECONDS", 0.5)  # now: who is honest may be slow
        with connect(uri) as silent:
            assert b"no handshake in 0.5 s" in said_until_closed(silent)
        with connect(uri) as slow:
            with contextlib.suppress(ConnectionClosed):  # where it took half a second to come here
                slow.send([b"half of a message"])  # and nothing more
            assert said_until_closed(slow) is not None
        assert honest.objects_count() == 0


def test_there_is_no_room_for_tensors_before_a_session():
    item = m.PutItem(1, requires_grad=False, has_grad=False, tags=[], description="", allowed=None)
    large = message(m.Put([item]), [torch.zeros(1 << 20)])
    with WebsocketServerWorker("bob", threads=1).running() as uri, client(uri) as honest:
        with connect(uri) as rude:
            rude.send(large[: 1 << 12])  # its beginning says how large it is
            assert b"a handshake has no tensors, and these are 4,194,304 bytes" in said_until_closed(rude)
        assert honest.objects_count() == 0


def test_a_challenge_is_given_once():
    """A challenge cannot be asked for again and again."""
    token = "0123456789abcdef0123456789abcdef"
    with (
        WebsocketServerWorker("bob", threads=1, users={"ann": token}).running() as uri,
        client(uri) as honest,
    ):
        with connect(uri) as endless:
            for number in range(1, 20):
                hello = m.Hello("s" * 32, own_versions(), proof=Proving(token).first)
                with contextlib.suppress(ConnectionClosed):  # from the second one on that may come first
                    endless.send(message(hello, number=number))
            said = said_until_closed(endless)
        assert said.count(b"challenge") == 1
        assert b"being asked for a proof" in said
        assert honest.objects_count() == 0
