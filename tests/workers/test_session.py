"""The client's half of a session, without a loop."""

import pytest

from planrt.errors import HandshakeError, RemoteError, UnknownPlanError, WireError
from planrt.workers.client.session import ClientSession
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions


@pytest.fixture
def session():
    session = ClientSession("bob", address="ws://there:1")
    hello = session.hello()
    session.welcome(m.Envelope(hello.id, m.Welcome("bob", own_versions(), {})))
    return session


def test_sessions_have_ids_nobody_can_guess():
    ids = {ClientSession("bob", address="").hello().body.session for _ in range(50)}
    assert len(ids) == 50
    assert all(len(id) >= 32 for id in ids)


def test_versions_that_differ_are_listed(session):
    assert session.differences() == []
    mine = own_versions()
    session.versions = m.Versions(mine.protocol, mine.planrt, "2.0.0", "0" * 64)
    assert session.differences() == [("torch", mine.torch, "2.0.0"), ("ops", mine.ops, "0" * 64)]


def test_replies_are_matched_in_any_order(session):
    one, two = session.request(m.Done()), session.request(m.Done())
    assert one.id != two.id
    assert session.reply(m.Envelope(two.id, m.Values([]))).id == two.id
    assert session.reply(m.Envelope(one.id, m.Done())).result == m.Done()


def test_failures_become_errors_that_carry_everything(session):
    request = session.request(m.Done())
    failure = m.Failure("ExecutionError", "it broke", "torch.mm", "_3 = torch.mm(_0, _1)", "Traceback ...")
    error = session.reply(m.Envelope(request.id, failure)).result
    assert type(error) is RemoteError
    assert (error.worker_id, error.kind, error.op) == ("bob", "ExecutionError", "torch.mm")
    assert error.line == "_3 = torch.mm(_0, _1)"
    assert error.remote_traceback == "Traceback ..."
    assert "bob" in str(error)
    assert "it broke" in str(error)
    assert error.line in str(error)


def test_an_unknown_plan_has_an_error_of_its_own(session):
    request = session.request(m.Done())
    assert isinstance(
        session.reply(m.Envelope(request.id, m.Failure("UnknownPlanError", "no"))).result, UnknownPlanError
    )


def test_an_answer_to_nothing_is_an_error(session):
    with pytest.raises(WireError, match="never made"):
        session.reply(m.Envelope(99, m.Done()))


def test_an_answer_twice_is_an_error(session):
    request = session.request(m.Done())
    session.reply(m.Envelope(request.id, m.Done()))
    with pytest.raises(WireError, match="never made"):
        session.reply(m.Envelope(request.id, m.Done()))


def test_a_complaint_about_the_connection_is_passed_on(session):
    with pytest.raises(WireError, match="that was no frame"):
        session.reply(m.Envelope(0, m.Failure("WireError", "that was no frame")))


def test_a_late_reply_to_a_forgotten_request_is_dropped(session):
    request = session.request(m.Done())
    session.forget(request.id)
    assert session.reply(m.Envelope(request.id, m.Done())) is None


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (m.Welcome("alice", own_versions(), {}), "is 'alice', not 'bob'"),
        (m.Failure("HandshakeError", "protocol version 9"), "refused the session: protocol version 9"),
        (m.Done(), "answered the handshake with Done"),
    ],
)
def test_a_handshake_that_does_not_fit(answer, says):
    session = ClientSession("bob", address="ws://there:1")
    hello = session.hello()
    with pytest.raises(HandshakeError, match=says) as caught:
        session.welcome(m.Envelope(hello.id, answer))
    assert caught.value.address == "ws://there:1"


def test_messages_survive_the_wire():
    body = m.Fit(
        plan="a" * 64, dataset="d", batch_size=1, epochs=2, max_nr_batches=-1, shuffle=True, optimizer="Adam",
        optimizer_args={"betas": [0.9, 0.99], "eps": 1e-8, "amsgrad": False, "foreach": None},
        keep_optimizer_state=False, seed=2**62,
    )  # fmt: skip
    assert m.from_wire(m.to_wire(m.Envelope(7, body))) == m.Envelope(7, body)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0}, {"batch_size": "8"}, {"epochs": 0}, {"max_nr_batches": -2}, {"plan": "short"},
        {"plan": "A" * 64}, {"dataset": ""}, {"dataset": "x" * 201}, {"seed": -1}, {"extra": 1},
        {"optimizer_args": {"lr": "0.1"}}, {"optimizer_args": {"lr": [0.1] * 9}}, {"type": "exec"}, {"shuffle": 1},
        {"optimizer_args": {"lr": {"a": 1}}},
    ],
    ids=str,
)  # fmt: skip
def test_messages_with_bad_fields_are_refused(change):
    body = m.Fit("a" * 64, "d", 1, 1, -1, True, "SGD", {}, False, 1)
    wire = m.to_wire(m.Envelope(1, body))
    wire["body"].update(change)
    with pytest.raises(WireError, match="malformed message"):
        m.from_wire(wire)
