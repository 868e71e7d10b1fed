"""Computations on shares whose client, or one of whose parties, is gone: nobody waits for the time-out to end them.

The time-outs here are a day: what would wait for one would hang.
"""

import contextlib
import os
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch

import planrt
from planrt.errors import SharingError
from planrt.sharing.tensors.shared import share
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.events import Wait
from planrt.workers.machine.sharing.dealers import DealerOps
from planrt.workers.shares.session import sharing_session
from tests.processes import eventually
from tests.workers.test_sharing_workers import _pids

pytestmark = pytest.mark.usefixtures("warm_workers")

planrt.TorchHook(torch)
A_DAY = 86_400.0
NAMES = ("bob", "alice", "james")


def idle(*workers):
    """Whether nothing waits at these workers, as they say themselves."""
    return eventually(lambda: all(one.status().waiting == 0 for one in workers))


@pytest.fixture
def waiting(transport, monkeypatch):
    """A computation in which bob and alice wait for a dealer that gives nothing: `parties` and `dealer`, as the client
    that began it has them, and `seen`, the same workers as another client has them."""
    with contextlib.ExitStack() as stack:
        mine, seen = [], []
        for name in NAMES:
            if transport == "memory":
                mine.append(stack.enter_context(VirtualWorker(name, auto_add=False)))
                seen.append(stack.enter_context(mine[-1].connect_as()))
            else:
                uri = stack.enter_context(WebsocketServerWorker(name, threads=1).running())
                for clients in (mine, seen):
                    clients.append(stack.enter_context(WebsocketClientWorker(name, uri=uri, auto_add=False)))
        *parties, dealer = mine
        session = sharing_session(parties, dealer, timeout=A_DAY)
        x = share(session, torch.ones(3))
        assert torch.equal((x + 1).get(), torch.full((3,), 2.0))

        def nothing(self, group, last, requests):
            yield Wait("never")

        monkeypatch.setattr(DealerOps, "_make", nothing)
        y = (x * x).relu() * x
        session.flush()
        held = [one.status().waiting for one in seen[:2]]
        assert eventually(lambda: all(one.status().waiting > 0 for one in seen[:2])), held
        yield SimpleNamespace(
            parties=parties, dealer=dealer, seen=seen[:2], session=session, value=y, stack=stack
        )


@pytest.mark.parametrize("whom", [0, 1])
def test_a_client_that_hangs_up_ends_what_it_began_at_all_parties(waiting, whom):
    """The parties read nothing from that client: it has posted a program that waits."""
    waiting.parties[whom].close()
    assert idle(*waiting.seen)
    with pytest.raises(SharingError, match=f"party '{waiting.parties[whom].id}' is gone|session at party"):
        waiting.value.get()


def test_a_client_that_comes_back_finds_its_session_and_not_the_computation(waiting):
    bob = waiting.parties[0]
    kept = torch.arange(4.0).send(bob)
    bob.close()
    bob.connect()  # which would wait for the connection before, which would wait for the dealer
    assert torch.equal(kept.get(), torch.arange(4.0))
    with pytest.raises(SharingError):
        waiting.value.get()
    assert idle(*waiting.seen)


def test_messages_that_wait_behind_are_done_when_the_client_comes_back(waiting):
    bob = waiting.parties[0]
    behind = torch.arange(3.0).send(bob) * 2  # bob has not read this yet
    bob.close()
    bob.connect()
    assert torch.equal(behind.get(), torch.arange(0.0, 6.0, 2.0))


def test_a_dealer_that_hangs_up_is_named(waiting):
    waiting.dealer.close()
    with pytest.raises(SharingError, match="dealer"):
        waiting.value.get()
    assert idle(*waiting.seen)


# ------------------------------------------------------------------------------------------ real processes

CLIENT = """
import sys, torch, planrt
from planrt.sharing.tensors.shared import share
from planrt.workers.shares.session import sharing_session

planrt.TorchHook(torch)
workers = [planrt.WebsocketClientWorker(name, uri=uri) for name, uri in (one.split("=") for one in sys.argv[1:])]
*parties, dealer = workers
session = sharing_session(parties, dealer, timeout=86_400.0)
x = share(session, torch.ones(200))
x.get()
print("ready", flush=True)
sys.stdin.readline()
((x * x).relu() * x).get()  # never: the dealer stands still
print("done", flush=True)
"""


def test_a_client_that_is_killed_is_noticed_by_parties_that_wait(warm_python, tmp_path):
    program = tmp_path / "client.py"
    program.write_text(CLIENT)
    with planrt.local_workers(*NAMES, threads=1) as (bob, alice, james):
        where = [f"{one.id}={one.address}" for one in (bob, alice, james)]
        (pid,) = _pids(james)
        with subprocess.Popen(
            [warm_python, str(program), *where], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as client:
            try:
                assert client.stdout.readline() == "ready\n"
                os.kill(pid, signal.SIGSTOP)
                client.stdin.write("go\n")
                client.stdin.flush()
                assert eventually(lambda: bob.status().waiting > 0 and alice.status().waiting > 0)
                client.kill()
                assert idle(bob, alice)
            finally:
                client.kill()
                os.kill(pid, signal.SIGCONT)
        session = sharing_session([bob, alice], james)  # they are there for others
        assert torch.equal((share(session, torch.ones(3)) * 2).get(), torch.full((3,), 2.0))


@pytest.mark.parametrize("whom", ["bob", "james"])
def test_a_party_that_is_killed_while_others_wait_for_it_is_named(whom):
    with contextlib.ExitStack() as stack:
        workers = bob, alice, james = stack.enter_context(planrt.local_workers(*NAMES, threads=1))
        others = [  # seen by another client: what this one asks waits behind its program
            stack.enter_context(WebsocketClientWorker(one.id, uri=one.address, auto_add=False))
            for one in (bob, alice)
            if one.id != whom
        ]
        session = sharing_session([bob, alice], james, timeout=A_DAY)
        x = share(session, torch.ones(20))
        x.get()
        (pid,) = _pids(workers[NAMES.index(whom)])
        os.kill(pid, signal.SIGSTOP)
        y = (x * x).relu() * x
        session.flush()
        assert eventually(lambda: all(one.status().waiting > 0 for one in others))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(SharingError, match=whom):
            y.get()
        assert idle(*others)
