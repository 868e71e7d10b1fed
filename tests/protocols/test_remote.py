"""Protocols that were sent: run by the worker that has them, searched, brought back."""

import os
import signal
import subprocess
import sys

import pytest
import torch

import planrt
from planrt import PointerProtocol, Protocol, Step
from planrt.errors import (
    GonePointerError,
    MixedLocationsError,
    ProtocolError,
    RemoteError,
    UnknownObjectError,
)
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.workers import WebsocketClientWorker, WebsocketServerWorker

THREE = ("worker1", "worker2", "worker3")


@pytest.fixture
def three(inc):
    return [inc, inc.copy(), inc.copy()]


def described(three):
    return Protocol(list(zip(THREE, three, strict=True)))


def test_a_worker_runs_what_was_sent_to_it(three, alice, bob, charlie, james, capsys):
    protocol = described(three).deploy(alice, bob, charlie)
    protocol.verbose = True
    pointer = protocol.send(james)
    assert isinstance(pointer, PointerProtocol)
    assert repr(pointer) == f"[PointerProtocol | me:{pointer.id} -> james:{pointer.id_at_location}]"
    assert protocol.location is james
    x = torch.tensor([1.0]).send(james)
    before = [worker.traffic.copy() for worker in (alice, bob, charlie)]
    result = protocol.run(x)
    since = [worker.traffic.since(then) for worker, then in zip((alice, bob, charlie), before, strict=True)]
    assert [one.messages_sent for one in since] == [0, 0, 0]
    assert capsys.readouterr().out == "send remote run request to james\n"
    assert result.location is james
    assert repr(result).endswith(" -> charlie]")
    there = result.get()
    assert there.location is charlie
    assert there.get().tolist() == [4]
    assert x.get().tolist() == [1]


def test_pointers_to_protocols_run_as_well(three, alice, bob, charlie, james, count):
    pointer = described(three).deploy(alice, bob, charlie).send(james)
    assert pointer.run(torch.tensor([1.0])).get().get().tolist() == [4]
    assert pointer.run(x=torch.tensor([2.0])).get().get().tolist() == [5]
    assert count(james) == [1]
    pointer.deploy(charlie, alice, bob)
    assert pointer.run(torch.tensor([1.0])).get().location is bob


def test_the_worker_of_the_protocol_may_have_steps_itself(inc, double, bob, james):
    protocol = Protocol([("first", inc), ("bob", double), ("first", inc)]).deploy(james, bob)
    protocol.send(james)
    result = protocol.run(torch.tensor([1.0]).send(james))
    assert result.location is james
    assert result.get().get().tolist() == [5]


def test_a_chain_of_pointers_is_an_input_where_it_ends(inc, alice, bob, james):
    protocol = Protocol([("a", inc), ("b", inc)]).deploy(alice, bob)
    protocol.send(james)
    x = torch.tensor([1.0]).send(alice).send(james)
    assert protocol.run(x).get().get().tolist() == [3]
    elsewhere = torch.tensor([1.0]).send(bob).send(james)
    with pytest.raises(RemoteError, match="input 'x' is on worker 'bob', and taken on 'a'"):
        protocol.run(elsewhere)


def test_inputs_on_the_wrong_worker_name_both(inc, alice, james):
    protocol = Protocol([("a", inc)]).deploy(alice)
    protocol.send(james)
    with pytest.raises(
        MixedLocationsError, match="input 'x' is on worker 'alice', and the protocol on 'james'"
    ):
        protocol.run(torch.tensor([1.0]).send(alice))


def test_get_ends_remote_runs(inc, alice, bob, james, count):
    protocol = Protocol([("a", inc), ("b", inc)]).deploy(alice, bob)
    with pytest.raises(ProtocolError, match="is here already"):
        protocol.get()
    sent = protocol.send(james)
    protocol.run(torch.tensor([1.0])).get().get()
    assert protocol.get() is protocol
    assert protocol.location is None
    assert protocol.run(torch.tensor([1.0])).location is bob
    assert count(james, alice, bob) == [0, 1, 1]
    with pytest.raises(GonePointerError):
        sent.run(torch.tensor([1.0]))


def test_what_is_found_is_brought_back_and_deployed(three, alice, bob, charlie, james):
    protocol = described(three).tag("my_protocol").describe("counts to three")
    protocol.send(james)
    me = planrt.hook.local_worker
    (found,) = me.request_search(["my_protocol"], location=james)
    assert isinstance(found, PointerProtocol)
    assert repr(found).startswith("[PointerProtocol | me:")
    assert (found.tags, found.description) == ({"my_protocol"}, "counts to three")
    assert james.search("three", "my_protocol")[0].id_at_location == found.id_at_location
    assert james.search("four") == []
    back = found.get()
    assert not back.is_resolved
    assert str(back).count("owner:me built") == 3
    assert back.tags == {"my_protocol"}
    back.deploy(alice, bob, charlie)
    assert back.run(torch.tensor([1.0])).get().tolist() == [4]


def test_an_undeployed_one_says_so(inc, alice, james):
    pointer = Protocol([("a", inc)]).send(james)
    with pytest.raises(ProtocolError, match=r"deploy the protocol first, .* deploy\(a\)"):
        pointer.run(torch.tensor([1.0]))
    assert pointer.deploy(alice).run(torch.tensor([1.0])).get().get().tolist() == [2]
    with pytest.raises(ProtocolError, match="too many"):
        pointer.deploy(alice, james)


def test_deploying_a_protocol_that_was_sent_moves_it(inc, alice, bob, james, count):
    protocol = Protocol([("a", inc)]).deploy(alice)
    protocol.send(james)
    assert protocol.run(torch.tensor([1.0])).get().location is alice
    protocol.deploy(bob)
    assert protocol.run(torch.tensor([1.0])).get().location is bob


def test_state_travels_and_structure_survives(add, alice, bob, james):
    class Net(planrt.Plan):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2, 1)

        def forward(self, x):
            return {"out": self.fc(x), "size": x.shape[0]}

    net = Net().build(torch.ones(3, 2))
    reshape = planrt.func2plan(lambda x: x.flatten(), args_shape=[(-1, 1)])
    protocol = Protocol(
        [
            Step("a", net, ["x"], name="net"),
            Step("b", reshape, ["net.out"], name="flat"),
            Step("a", add, ["flat", "flat"], name="twice"),
        ],
        inputs=["x"],
        outputs={"twice": "twice", "net": "net"},
    )
    want = (2 * net.fc(torch.ones(4, 2)).flatten()).detach()
    pointer = protocol.tag("#net").send(james)
    found = james.search("#net")[0].deploy(alice, bob)
    for run in (found.run, pointer.deploy(alice, bob).run):
        result = run(torch.ones(4, 2))
        assert torch.equal(result["twice"].get().get().detach(), want)
        assert result["net"]["size"] == 4
    back = found.get()
    again = back.deploy(alice, bob).run(torch.ones(4, 2))
    assert torch.equal(again["twice"].get().detach(), want)
    assert "net on alice (x)" in str(back)
    assert "gives twice, net" in str(back)


def test_plans_on_workers_go_along(inc, double, alice, bob, james):
    """What is on a worker already is brought here for it, and stays there."""
    pointer = double.send(bob)
    protocol = Protocol([("a", inc), ("b", pointer)]).deploy(alice, bob)
    protocol.send(james)
    assert protocol.run(torch.tensor([1.0])).get().get().tolist() == [4]
    assert pointer(torch.tensor([1.0]).send(bob)).get().tolist() == [2]


def test_held_objects_cannot_go_along(add, alice, james):
    held = torch.tensor([1.0]).send(alice)
    protocol = Protocol([Step("a", add, ["x", held])], inputs=["x"]).deploy(alice)
    assert protocol.run(torch.tensor([2.0])).get().tolist() == [3]
    with pytest.raises(ProtocolError, match="objects that belong to this process"):
        protocol.send(james)


def test_lost_plans_are_sent_again(inc, alice, bob, james):
    """james's session at a peer may end, and with it the plans that he has sent there."""
    protocol = Protocol([("a", inc), ("b", inc)]).deploy(alice, bob)
    protocol.send(james)
    assert protocol.run(torch.tensor([1.0])).get().get().tolist() == [3]
    links = _links_of(james)
    if links is None:
        return
    for link in links:
        link.connection.loop.call_soon_threadsafe(link.connection._end, planrt.errors.PlanrtError("cut"))
    assert protocol.run(torch.tensor([1.0])).get().get().tolist() == [3]


def _links_of(worker):
    host = getattr(worker, "_host", None)
    return None if host is None else list(host._links._links.values())


def _another_client(worker):
    if hasattr(worker, "connect_as"):
        return worker.connect_as()
    return WebsocketClientWorker(worker.id, uri=worker.link_address)


def test_a_session_that_ends_takes_everything_along(inc, alice, bob, transport, settles, james):
    """What a client's protocol made elsewhere goes with the client."""
    with _another_client(james) as other:
        protocol = Protocol([("a", inc), ("b", inc)]).deploy(alice, bob)
        pointer = protocol.send(other)
        result = pointer.run(torch.tensor([1.0]))
        assert result.location is other
    assert settles([0], james)
    if transport == "memory":
        assert settles([1, 1], alice, bob)  # this client's own plans


def test_tagged_protocols_stay(inc, james, transport):
    other = (
        james.connect_as()
        if transport == "memory"
        else WebsocketClientWorker("james", uri=james.link_address)
    )
    Protocol([("a", inc)]).tag("#stays").send(other)
    Protocol([("a", inc)]).send(other)
    other.close()
    assert len(james.search("#stays")) == 1


def test_malformed_ids_are_refused(inc, alice, james):
    pointer = Protocol([("a", inc)]).deploy(alice).send(james)
    x = torch.tensor([1.0]).send(james)
    pointer._handle.id += 12345
    with pytest.raises(UnknownObjectError):
        pointer.run(x)


def test_between_processes(inc, pick):
    """Workers in processes of their own, which talk to each other."""
    ids = ("alice", "bob", "james")
    children = [ChildOptions(id, options=("--empty", "--threads", "1")) for id in ids]
    with WorkerProcesses(children) as processes:
        ready = processes.wait_ready()
        alice, bob, james = (WebsocketClientWorker(id, uri=ready[id].uri) for id in ids)
        protocol = Protocol([("a", inc), Step("b", pick, name="choose"), ("a", inc)]).deploy(alice, bob)
        assert protocol.run(torch.tensor([0.0, -1.0])).get().tolist() == [1, 2]
        protocol.send(james)
        x = torch.tensor([0.0, -1.0]).send(james)
        assert protocol.run(x).get().get().tolist() == [1, 2]
        os.kill(processes.pids["bob"], signal.SIGKILL)
        with pytest.raises(RemoteError, match="step '(choose|inc)'.* worker 'bob'"):
            protocol.run(x)
        assert (x + 1).get().tolist() == [1, 0]
        for worker in (alice, bob, james):
            worker.close()


def test_a_process_that_did_nothing_else_finds_protocols():
    """Nobody imported protocols there before."""
    server = WebsocketServerWorker(id="bob", threads=1)
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri) as worker:
        plan = planrt.func2plan(args_shape=[(1,)])(lambda x: x + 1)
        protocol = planrt.Protocol([("one", plan)])
        protocol.tag("#p")
        kept = protocol.send(worker)
        worker.objects_count()
        code = (
            f"import planrt\nwith planrt.WebsocketClientWorker('bob', uri={uri!r}) as bob:\n"
            "    (found,) = bob.search('#p')\n    print(type(found).__name__, [*bob._objects])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stdout.startswith("PointerProtocol ["), done.stderr
        del kept
