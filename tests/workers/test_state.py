"""The worker as a state machine: events in, instructions out, no loop."""

import pytest
import torch
import torch.nn.functional as F

from planrt.plans.training import trace_model
from planrt.workers.machine.events import (
    Close,
    Disconnected,
    PeerAnswered,
    PeerFailed,
    Received,
    Reply,
    ToPeer,
    Wait,
)
from planrt.workers.machine.state import WorkerState
from planrt.workers.wire import delivery
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions
from tests.models import classification_data, seeded_classifier

HELLO = m.Hello("s" * 32, own_versions())


@pytest.fixture
def state():
    state = WorkerState("bob")
    state.add_dataset(classification_data(0), "flowers", tags=["#flowers"], description="synthetic")
    state.handle(Received(1, m.Envelope(1, HELLO), []))
    return state


@pytest.fixture(scope="module")
def plans():
    return trace_model(seeded_classifier(), F.nll_loss, torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64))


def ask(state, body, tensors=(), connection=1):
    """Sends one request and returns the one reply's body and tensors."""
    (reply,) = state.handle(Received(connection, m.Envelope(5, body), list(tensors)))
    assert isinstance(reply, Reply)
    assert (reply.connection, reply.envelope.id) == (connection, 5)
    return reply.envelope.body, reply.tensors


def put(state, plan):
    canonical = torch.frombuffer(bytearray(plan.to_bytes()), dtype=torch.uint8)
    return ask(state, m.PutPlan(plan.hash), [canonical])[0]


def fit(training, **changes):
    fields = {
        "plan": training.hash, "dataset": "flowers", "batch_size": 8, "epochs": 1, "max_nr_batches": 3, "shuffle": True,
        "optimizer": "SGD", "optimizer_args": {"lr": 0.1}, "keep_optimizer_state": False, "seed": 4,
    }  # fmt: skip
    return m.Fit(**{**fields, **changes})


def values(plans):
    return [plans.state[entry.name].clone() for entry in plans.training.state]


def test_a_session_opens_and_tells_about_the_data_sets():
    state = WorkerState("bob")
    state.add_dataset(classification_data(0), "flowers", tags=["#flowers"])
    (reply,) = state.handle(Received(1, m.Envelope(1, HELLO), []))
    welcome = reply.envelope.body
    assert welcome.worker == "bob"
    assert welcome.versions == own_versions(resumes=True, dials=m.Dials())
    assert welcome.kept is None  # its client has not said that it could go on
    info = welcome.datasets["flowers"]
    assert (info.length, info.data, info.target) == (60, ("float32", [-1, 6]), ("int64", [-1]))
    assert info.tags == ["#flowers"]


def test_requests_before_the_handshake_are_refused_and_the_connection_closed(state, plans):
    reply, close = state.handle(Received(2, m.Envelope(9, m.RunPlan(plans.training.hash, 0)), []))
    assert reply.envelope == m.Envelope(9, m.Failure("HandshakeError", reply.envelope.body.message))
    assert close == Close(2)


def test_another_protocol_version_is_refused_with_both_versions_named(state):
    mine = own_versions()
    theirs = m.Versions(mine.protocol + 1, "9.9", mine.torch, mine.ops)
    reply, close = state.handle(Received(2, m.Envelope(1, m.Hello("s", theirs)), []))
    assert "9.9" in reply.envelope.body.message
    assert mine.planrt in reply.envelope.body.message
    assert close == Close(2)


def test_training_answers_with_what_changed(state, plans):
    assert put(state, plans.training) == m.Done()
    before = values(plans)
    fitted, changed = ask(state, fit(plans.training), values(plans))
    assert isinstance(fitted, m.Fitted)
    assert (fitted.samples, fitted.batches) == (24, 3)
    assert fitted.loss > 0
    assert fitted.changed == list(range(len(before)))
    assert not torch.equal(changed[0], before[0])


def test_training_is_a_function_of_state_and_seed(state, plans):
    put(state, plans.training)
    one, two, other = (ask(state, fit(plans.training, seed=seed), values(plans))[1][0] for seed in (4, 4, 5))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_kept_optimizer_state_belongs_to_the_session(state, plans):
    put(state, plans.training)
    state.handle(Received(2, m.Envelope(1, m.Hello("other" * 8, own_versions())), []))
    request = fit(plans.training, optimizer="Adam", optimizer_args={"lr": 0.01}, keep_optimizer_state=True)
    first = ask(state, request, values(plans))[1][0]
    second = ask(state, request, values(plans))[1][0]
    elsewhere = ask(state, request, values(plans), connection=2)[1][0]
    assert not torch.equal(first, second)
    assert torch.equal(first, elsewhere)
    state.handle(Disconnected(1))
    state.handle(Received(1, m.Envelope(1, HELLO), []))
    assert torch.equal(first, ask(state, request, values(plans))[1][0])


def test_evaluation_counts(state, plans):
    put(state, plans.evaluation)
    figures, tensors = ask(state, m.Evaluate(plans.evaluation.hash, "flowers", 7, 3), values(plans))
    assert (figures.samples, sum(figures.histogram), sum(figures.target_histogram)) == (60, 60, 60)
    assert 0 <= figures.correct <= 60
    assert not tensors


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"dataset": "nope"}, "UnknownDatasetError", "it has: flowers"),
        ({"plan": "0" * 64}, "UnknownPlanError", "send it first"),
        ({"optimizer": "Sgd"}, "OptionError", "Sgd"),
        ({"optimizer_args": {"learning": 1.0}}, "OptionError", "learning"),
    ],
)
def test_what_cannot_be_done_is_a_failure_with_its_kind(state, plans, change, kind, says):
    put(state, plans.training)
    failure, _ = ask(state, fit(plans.training, **change), values(plans))
    assert isinstance(failure, m.Failure)
    assert failure.kind == kind
    assert says in failure.message


def test_a_state_that_does_not_fit_the_plan_is_refused(state, plans):
    put(state, plans.training)
    for tensors in ([], values(plans)[:-1], [value.double() for value in values(plans)]):
        failure, _ = ask(state, fit(plans.training), tensors)
        assert failure.kind == "PlanArgumentError"


def test_bytes_that_are_no_plan_or_another_one_are_refused(state, plans):
    good = plans.training.to_bytes()
    for hash, data in [
        (plans.evaluation.hash, good),
        (plans.training.hash, good[:-3]),
        (plans.training.hash, b""),
    ]:
        tensor = torch.tensor(list(data), dtype=torch.uint8)
        failure, _ = ask(state, m.PutPlan(hash), [tensor])
        assert failure.kind in ("PlanError", "PlanFormatError")
    failure, _ = ask(state, m.PutPlan(plans.training.hash), [])
    assert failure.kind == "PlanError"


def test_replies_are_no_requests(state):
    failure, _ = ask(state, m.Done())
    assert "does not take messages of type Done" in failure.message


def test_data_set_keys_are_taken_once(state):
    with pytest.raises(ValueError, match="already has a data set"):
        state.add_dataset(classification_data(1), "flowers")


def meets(parts, session, body, tensors):
    """A request that exchanges a tensor with a peer."""
    yield ToPeer(m.PeerAddress("alice", "ws://alice"), m.Values([None]), tensors, "key")
    answer = yield Wait("key")
    return m.Values([None]), [tensors[0] + answer.tensors[0]]


@pytest.fixture
def meeting(monkeypatch):
    monkeypatch.setattr("planrt.workers.machine.state.answer", meets)
    state = WorkerState("bob")
    state.handle(Received(1, m.Envelope(1, HELLO), []))
    return state


def test_a_request_waits_for_its_peer_and_the_machine_goes_on(meeting):
    asked = meeting.handle(Received(1, m.Envelope(2, m.Done()), [torch.ones(2)]))
    assert [type(step) for step in asked] == [ToPeer, Wait]
    other = m.Hello("t" * 32, own_versions())
    assert meeting.handle(Received(2, m.Envelope(1, other), []))[0].envelope.body.worker == "bob"
    (reply,) = meeting.handle(PeerAnswered("key", m.Values([None]), [torch.ones(2)]))
    assert (reply.connection, reply.envelope.id) == (1, 2)
    assert torch.equal(reply.tensors[0], torch.full((2,), 2.0))


def test_an_answer_that_nobody_waits_for_changes_nothing(meeting):
    assert meeting.handle(PeerAnswered("key", m.Values([None]), [torch.ones(2)])) == []


def test_a_peer_that_cannot_be_reached_fails_the_request_alone(meeting):
    meeting.handle(Received(1, m.Envelope(2, m.Done()), [torch.ones(2)]))
    (reply,) = meeting.handle(PeerFailed("key", "no route"))
    assert reply.envelope.body.kind == "PeerError"
    assert "no route" in reply.envelope.body.message


def test_a_client_that_leaves_takes_its_waiting_requests_with_it(meeting):
    meeting.handle(Received(1, m.Envelope(2, m.Done()), [torch.ones(2)]))
    assert meeting.handle(Disconnected(1)) == []
    assert meeting.handle(PeerFailed("key", "late")) == []


@pytest.mark.parametrize("id", [7, 0])
def test_a_large_message_is_acknowledged_once(id):
    """By its answer, where it has one; else by a message of its own, for its client keeps it until then."""
    state = WorkerState("bob")
    hello = m.Hello("s" * 32, own_versions(resumes=True))
    state.handle(Received(1, m.Envelope(1, hello), []))
    large = torch.zeros(delivery.LARGE // 4)
    put = m.Put([m.PutItem(3)])
    (reply,) = state.handle(Received(1, m.Envelope(id, put), [large]))
    assert isinstance(reply.envelope.body, m.Done if id else m.Ack)
    assert reply.envelope.seen == 1
