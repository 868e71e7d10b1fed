"""Private data in protocols: labels travel, and a step that would carry what must not go is named."""

import contextlib

import pytest
import torch

from planrt import Protocol, Step
from planrt.errors import GetNotPermittedError
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker

USERS = {"ann": "the long token of ann", "ben": "the long token of ben"}


@pytest.fixture
def connect(transport):
    """``connect("clinic", "ann")`` -> a client of that worker, which knows ann and ben; "" is nobody."""
    with contextlib.ExitStack() as stack:
        made = {}

        def connect(id, user=""):
            token = USERS.get(user, "")
            if transport == "memory":
                if id not in made:
                    made[id] = stack.enter_context(VirtualWorker(id, users=USERS))
                return stack.enter_context(made[id].connect_as(token))
            if id not in made:
                server = WebsocketServerWorker(id, threads=1, users=USERS)
                made[id] = stack.enter_context(server.running())
            return stack.enter_context(WebsocketClientWorker(id, uri=made[id], token=token))

        yield connect


def two(inc):
    return Protocol([Step("clinic", inc, name="first"), Step("bob", inc, name="second")])


def test_private_values_do_not_go_on(inc, connect, count):
    clinic, bob = connect("clinic"), connect("bob")
    protocol = two(inc).deploy(clinic, bob)
    x = torch.tensor([123.25]).send(clinic, private=True)
    held = count(clinic, bob)
    with pytest.raises(
        GetNotPermittedError, match="step 'second' on worker 'bob'.*result of step 'first'"
    ) as caught:
        protocol.run(x)
    assert (caught.value.step, caught.value.worker_id) == ("second", "clinic")
    told = str(caught.value) + caught.value.remote_traceback
    assert "123.25" not in told
    assert "124.25" not in told
    assert count(clinic, bob) == held


def test_steps_may_compute_on_private_values_where_they_are(inc, connect):
    clinic = connect("clinic")
    protocol = Protocol([("clinic", inc), ("clinic", inc)]).deploy(clinic)
    result = protocol.run(torch.tensor([123.0, 1.0]).send(clinic, private=True))
    assert result.shape == (2,)
    with pytest.raises(GetNotPermittedError):
        result.get()


def test_a_step_does_not_tell_whether_it_failed_on_private_values(pick, connect):
    clinic = connect("clinic")
    protocol = Protocol([("clinic", pick)]).deploy(clinic)
    for values in ([0.0, 1.0], [0.0, 9.0]):
        result = protocol.run(torch.tensor(values).send(clinic, private=True))
        assert result.shape == (2,)
        with pytest.raises(GetNotPermittedError):
            result.get()


def test_a_step_whose_result_sizes_depend_on_private_values_is_refused(connect):
    from tests.protocols.conftest import plan

    clinic = connect("clinic")
    protocol = Protocol([("clinic", plan(lambda x: x[x > 0]))]).deploy(clinic)
    assert protocol.run(torch.tensor([1.0, -1.0]).send(clinic)).get().tolist() == [1]
    with pytest.raises(GetNotPermittedError, match="depends on the values"):
        protocol.run(torch.tensor([1.0, -1.0]).send(clinic, private=True))


def test_labels_travel_with_what_may_go(inc, connect):
    clinic, bob = connect("clinic", "ann"), connect("bob", "ann")
    protocol = two(inc).deploy(clinic, bob)
    x = torch.tensor([1.0]).send(clinic, allowed_users=["ann"])
    result = protocol.run(x).tag("#result")
    assert result.location is bob
    (theirs,) = connect("bob", "ben").search("#result")
    with pytest.raises(GetNotPermittedError, match="ann may get it"):
        theirs.get()
    assert result.get().tolist() == [3]


def test_a_worker_hands_private_inputs_on_for_those_who_may_read_them(inc, connect):
    clinic, james, anyone = connect("clinic", "ann"), connect("james", "ann"), connect("james")
    protocol = Protocol([Step("clinic", inc, name="only")]).deploy(clinic)
    x = torch.tensor([1.0]).tag("#x").send(james, allowed_users=["ann"])
    result = protocol.send(james).run(x).get().tag("#result")
    assert result.location is clinic
    with pytest.raises(GetNotPermittedError, match="ann may get it"):
        connect("clinic", "ben").search("#result")[0].get()
    assert result.get().tolist() == [2]
    theirs = protocol.send(anyone)
    with pytest.raises(GetNotPermittedError, match="input 'x' is private.*ann may send it"):
        theirs.run(anyone.search("#x")[0])


def test_from_step_to_step_values_go_on_for_those_who_may_read_them(inc, connect):
    """The worker acts for its client at the others, with what that one may read there."""
    clinic, bob, james = connect("clinic", "ann"), connect("bob", "ann"), connect("james", "ann")
    pointer = two(inc).deploy(clinic, bob).send(james)
    x = torch.tensor([1.0]).send(james, allowed_users=["ann"])
    result = pointer.run(x).get().tag("#result")
    (theirs,) = connect("bob", "ben").search("#result")
    with pytest.raises(GetNotPermittedError, match="ann may get it"):
        theirs.get()
    assert result.get().tolist() == [3]
    y = torch.tensor([1.0]).send(clinic, allowed_users=["ben"])
    with pytest.raises(GetNotPermittedError, match="step 'second' on worker 'bob'.*ben may move it"):
        two(inc).deploy(clinic, bob).run(y)


def test_where_its_client_is_nobody_a_worker_is_nobody_too(inc, connect, count):
    """What it got there with a label does not go further."""
    clinic, bob, james = connect("clinic"), connect("bob", "ann"), connect("james", "ann")
    protocol = two(inc).deploy(clinic, bob)
    pointer = protocol.send(james)
    x = torch.tensor([1.0]).send(james, allowed_users=["ann"])
    held = count(james)
    with pytest.raises(
        GetNotPermittedError, match="step 'second' on worker 'bob'.*from worker 'clinic'"
    ) as caught:
        pointer.run(x)
    assert caught.value.step == "second"
    assert count(james) == held


def test_values_that_go_through_here_keep_their_labels(inc):
    """From a server to a virtual worker, which it does not reach."""
    with (
        WebsocketServerWorker("clinic", threads=1, users=USERS).running() as uri,
        WebsocketClientWorker("clinic", uri=uri, token=USERS["ann"], auto_add=False) as clinic,
        VirtualWorker("bob", users=USERS) as owner,
        owner.connect_as(USERS["ann"]) as bob,
        owner.connect_as(USERS["ben"]) as bens,
    ):
        x = torch.tensor([1.0]).send(clinic, allowed_users=["ann"])
        result = two(inc).deploy(clinic, bob).run(x).tag("#result")
        bob.objects_count()  # nothing orders what two clients send
        assert result.location is bob
        (theirs,) = bens.search("#result")
        with pytest.raises(GetNotPermittedError, match="ann may get it"):
            theirs.get()
        assert result.get().tolist() == [3]


def test_private_protocols_keep_their_state(connect):
    import planrt

    class Net(planrt.Plan):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(1, 1)

        def forward(self, x):
            return self.fc(x)

    net = Net().build(torch.ones(2, 1))
    james, bens, clinic = connect("james", "ann"), connect("james", "ben"), connect("clinic")
    Protocol([("clinic", net)]).tag("#net").send(james, allowed_users=["ann"])
    james.objects_count()
    (found,) = bens.search("#net")
    with pytest.raises(GetNotPermittedError, match="ann may get it"):
        found.get()
    with pytest.raises(GetNotPermittedError, match="ann may have them sent"):
        bens.search("#net")[0].deploy(clinic).run(torch.ones(2, 1))
    anns = james.search("#net")[0].deploy(clinic)
    result = anns.run(torch.ones(2, 1)).get().tag("#out")
    with pytest.raises(GetNotPermittedError):
        result.get()  # computed from ann's parameters, on a worker where this client is nobody
