"""Connections that have no session: they get little time, no room for tensors, and so many places for each address."""

import contextlib
import socket
from urllib.parse import urlsplit

import pytest
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from planrt.errors import TransportError
from planrt.serde.frames import Limits, encode
from planrt.workers import WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.serving import host as serving
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions
from planrt.workers.wire.proofs import Proving
from tests.processes import eventually


def client(uri):
    return WebsocketClientWorker("bob", uri=uri, auto_add=False)


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


def was_cut(opened, seconds=5):
    opened.settimeout(seconds)
    try:
        return opened.recv(1) == b""
    except ConnectionResetError:
        return True
    except (TimeoutError, BlockingIOError):
        return False


def opens(uri):
    with contextlib.suppress(TransportError), client(uri) as worker:
        return worker.objects_count() == 0
    return False


def test_a_connection_that_says_nothing_is_closed(monkeypatch):
    monkeypatch.setattr(serving, "OPENING_SECONDS", 0.5)
    with WebsocketServerWorker("bob", threads=1).running() as uri, client(uri) as honest:
        with connect(uri) as silent:
            assert b"no handshake in 0.5 s" in said_until_closed(silent)
        with connect(uri) as slow:
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
