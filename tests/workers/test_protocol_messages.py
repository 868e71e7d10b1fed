"""Protocols on a worker by its messages: the state machine, hostile requests, runs that end early. No loop."""

import re

import msgpack
import pytest
import torch

from planrt.plans import Plan, func2plan
from planrt.plans.ir.chain import Chain, ChainPlan, ChainStep
from planrt.serde.values import encode
from planrt.types import Ref
from planrt.workers.machine.events import (
    Disconnected,
    PeerAnswered,
    PeerFailed,
    Received,
    Reply,
    ToPeer,
    Wait,
)
from planrt.workers.machine.state import WorkerState
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions

SPEC = m.ObjectSpec([2], [1], "float32")
ALICE, BOB = m.PeerAddress("alice", "ws://alice"), m.PeerAddress("bob", "ws://bob")
PLACES = {"a": ALICE, "b": BOB}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight


def a_chain():
    net = ChainPlan(Plan(Net()).build(torch.ones(2)).record, True)
    inc = ChainPlan(func2plan(lambda x: x + 1, args_shape=[(-1,)]).record, True)
    steps = (ChainStep("first", "a", 0, (Ref(0),)), ChainStep("second", "b", 1, (Ref(1),)))
    return Chain(("x",), (net, inc), steps, Ref(2))


CHAIN = a_chain()


def bytes_of(chain):
    return torch.frombuffer(bytearray(chain.to_bytes()), dtype=torch.uint8)


@pytest.fixture
def james():
    state = WorkerState("james")
    state.handle(Received(1, m.Envelope(1, m.Hello("s" * 32, own_versions())), []))
    return state


def handle(state, body, tensors=(), *, number=5, connection=1):
    return state.handle(Received(connection, m.Envelope(number, body), list(tensors)))


def answer(state, body, tensors=(), **options):
    *others, reply = handle(state, body, tensors, **options)
    assert isinstance(reply, Reply)
    assert all(isinstance(one, ToPeer) for one in others)
    return reply.envelope.body


def failure(state, body, tensors=(), **options):
    found = answer(state, body, tensors, **options)
    assert isinstance(found, m.Failure), found
    return found.message


@pytest.fixture
def ready(james):
    """James with a deployed protocol 10 and an input 20."""
    assert answer(james, m.StoreProtocol(10), [bytes_of(CHAIN), torch.ones(1)]) == m.Done()
    assert answer(james, m.DeployProtocol(10, PLACES)) == m.Done()
    assert answer(james, m.Put([m.PutItem(20)]), [torch.ones(2)]) == m.Done()
    return james


RUN = m.RunProtocol(10, 99, [20], [30], True, 3)


def keys_of(instructions):
    *sends, wait = instructions
    assert isinstance(wait, Wait)
    assert sorted(one.key for one in sends if one.key) == sorted((wait.key, *wait.others))
    return sends, (wait.key, *wait.others)


def made(id):
    return m.Made(encode((Ref(0),)), [(id, SPEC)])


def test_a_run_step_by_step(ready):
    sends, (key,) = keys_of(handle(ready, RUN))
    assert [(one.peer, type(one.body)) for one in sends] == [
        (ALICE, m.Put), (ALICE, m.StorePlan), (ALICE, m.Call),
    ]  # fmt: skip
    assert answer(ready, m.ReadRun(99)) == m.RunStates([("first", "running"), ("second", "waiting")])
    sends, (key,) = keys_of(ready.handle(PeerAnswered(key, made(7), [])))
    assert [type(one.body) for one in sends] == [m.Move, m.Post]
    sends, (key,) = keys_of(ready.handle(PeerAnswered(key, m.Done(), [])))
    assert [(one.peer, type(one.body)) for one in sends] == [
        (BOB, m.Claim),
        (BOB, m.StorePlan),
        (BOB, m.Call),
    ]
    *sends, reply = ready.handle(PeerAnswered(key, made(8), []))
    assert reply.envelope == m.Envelope(5, m.Made(encode(Ref(0)), [(30, SPEC)]))
    assert ready.store.objects[30].value.peer == BOB
    assert answer(ready, m.ReadRun(99)) == m.RunStates([])
    sends, _ = keys_of(handle(ready, m.RunProtocol(10, 98, [20], [31], True, 3)))
    assert [type(one.body) for one in sends] == [m.Put, m.Call]  # the plan is there


def test_what_a_cancelled_run_has_made_is_dropped_and_its_results_never_are(ready):
    _, (key,) = keys_of(handle(ready, RUN))
    sends, (key,) = keys_of(ready.handle(PeerAnswered(key, made(7), [])))
    target = sends[0].body.target
    assert [type(one) for one in handle(ready, m.CancelRun(99), number=0)] == [Wait]
    *sends, reply = ready.handle(PeerAnswered(key, m.Done(), []))
    assert [(one.peer, type(one.body)) for one in sends] == [(BOB, m.Claim), (BOB, m.Post)]
    assert sends[-1].body.drop == [target]
    assert reply.envelope.body.kind == "RunCancelledError"
    assert 30 not in ready.store.objects


def test_a_client_that_goes_leaves_nothing_on_other_workers(ready):
    _, (key,) = keys_of(handle(ready, RUN))
    instructions = ready.handle(Disconnected(1))
    assert isinstance(instructions[0], Wait)
    plan = [one.body.drop for one in instructions if isinstance(one, ToPeer)]
    assert len(plan) == 1  # the plan on alice goes with the protocol
    sends = ready.handle(PeerAnswered(key, made(7), []))
    assert all(isinstance(one, ToPeer) and one.peer == ALICE for one in sends)
    assert 7 in [id for one in sends for id in one.body.drop]
    assert len(ready.store.objects) == 0


def test_a_peer_that_is_gone_names_the_step(ready):
    _, (key,) = keys_of(handle(ready, RUN))
    *_, reply = ready.handle(PeerFailed(key, "cannot reach alice"))
    body = reply.envelope.body
    assert (body.kind, body.step) == ("PeerError", "first")
    assert body.message == "step 'first' on worker 'alice': cannot reach alice"


def test_what_failed_inside_a_plan_is_passed_on(ready):
    _, (key,) = keys_of(handle(ready, RUN))
    told = m.Failure(
        "ExecutionError", "op 0 of plan ...", "Tensor.mul", "_2 = ...", "trace", 0, "IndexError: x", 17
    )
    *_, reply = ready.handle(PeerAnswered(key, told, []))
    body = reply.envelope.body
    assert (body.step, body.index, body.line, body.cause, body.number) == (
        "first",
        0,
        "_2 = ...",
        "IndexError: x",
        None,
    )


def test_a_peer_that_answers_nonsense_ends_the_run_only(ready):
    _, (key,) = keys_of(handle(ready, RUN))
    *_, reply = ready.handle(PeerAnswered(key, m.Counted(3), []))
    assert "unexpected Counted" in reply.envelope.body.message
    assert answer(ready, m.CountObjects()) == m.Counted(2)


def altered(index, value):
    parts = msgpack.unpackb(CHAIN.to_bytes(), raw=False)
    parts[index] = value
    return torch.frombuffer(bytearray(msgpack.packb(parts)), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([], "travels as its chain"),
        ([torch.ones(3)], "travels as its chain"),
        ([torch.zeros(1, dtype=torch.uint8), torch.ones(1)], "not a protocol"),
        ([bytes_of(CHAIN)[:-9], torch.ones(1)], "msgpack"),
        ([altered(1, 7), torch.ones(1)], "newer than 1"),
        ([altered(5, ["r", 0]), torch.ones(1)], "outputs of a protocol"),
        ([bytes_of(CHAIN)], "have 1 state tensors, got 0"),
        ([bytes_of(CHAIN), torch.ones(1), torch.ones(1)], "have 1 state tensors, got 2"),
        ([bytes_of(CHAIN), torch.ones(2)], r"wanted float32\[1\], got float32\[2\]"),
    ],
)
def test_protocols_that_are_none_are_refused(james, tensors, says):
    assert re.search(says, failure(james, m.StoreProtocol(10), tensors))
    assert answer(james, m.CountObjects()) == m.Counted(0)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (m.DeployProtocol(10, {"a": ALICE}), "has the places a, b, not a"),
        (m.DeployProtocol(10, {**PLACES, "c": BOB}), "has the places a, b, not a, b, c"),
        (m.DeployProtocol(20, PLACES), "object 20 is no protocol"),
        (m.DeployProtocol(11, PLACES), "no object 11"),
        (m.RunProtocol(20, 9, [20], [30], True, 3), "object 20 is no protocol"),
        (m.RunProtocol(10, 9, [], [30], True, 3), "1 inputs and 1 results, got 0 and 1"),
        (m.RunProtocol(10, 9, [20, 20], [30], True, 3), "1 inputs and 1 results, got 2 and 1"),
        (m.RunProtocol(10, 9, [20], [], True, 3), "1 inputs and 1 results, got 1 and 0"),
        (m.RunProtocol(10, 9, [20], [20], True, 3), "id 20 is already there"),
        (m.RunProtocol(10, 9, [10], [30], True, 3), "input 'x' is no tensor"),
        (m.RunProtocol(10, 9, [21], [30], True, 3), "no object 21"),
        (m.ReadPlan(20), "object 20 is no plan"),
    ],
)
def test_requests_that_do_not_fit_are_refused(ready, body, says):
    assert says in failure(ready, body)


def test_a_protocol_runs_when_it_is_deployed(james):
    answer(james, m.StoreProtocol(10), [bytes_of(CHAIN), torch.ones(1)])
    answer(james, m.Put([m.PutItem(20)]), [torch.ones(2)])
    assert "not deployed" in failure(james, RUN)


def test_other_sessions_have_no_part_in_it(ready):
    ready.handle(Received(2, m.Envelope(1, m.Hello("t" * 32, own_versions())), []))
    for body in (RUN, m.DeployProtocol(10, PLACES), m.Fetch(10, True), m.ReadPlan(10)):
        assert "no object 10" in failure(ready, body, connection=2)
    keys_of(handle(ready, RUN))
    assert handle(ready, m.CancelRun(99), number=0, connection=2) == []
    assert answer(ready, m.ReadRun(99), connection=2) == m.RunStates([])


def test_taking_a_protocol_back_frees_its_plans_elsewhere(ready):
    _, (key,) = keys_of(handle(ready, RUN))
    ready.handle(PeerFailed(key, "no"))
    stored = list(ready.store.objects[10].value.deployed.values())
    drop, reply = handle(ready, m.Fetch(10, True))
    assert (drop.peer, drop.body.drop) == (ALICE, stored)
    assert isinstance(reply.envelope.body, m.FetchedProtocol)
    assert [tensor.dtype for tensor in reply.tensors] == [torch.uint8, torch.float32]


def test_deploying_elsewhere_frees_what_was_deployed(ready):
    _, (key,) = keys_of(handle(ready, RUN))
    ready.handle(PeerFailed(key, "no"))
    drop, _ = handle(ready, m.DeployProtocol(10, {"a": BOB, "b": BOB}))
    assert drop.peer == ALICE
    assert ready.store.objects[10].value.deployed == {}
