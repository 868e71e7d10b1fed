"""Workers that compute together act for the client that they act for: protocols, shares and joint runs."""

import asyncio
import contextlib
import json
import socket
import threading

import pytest
import torch

from planrt import Protocol, Step, func2plan
from planrt.errors import (
    GetNotPermittedError,
    NotApprovedError,
    PlanrtError,
    PolicyRefusedError,
    RemoteError,
    SharingError,
    UnknownDatasetError,
)
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.plans.policy.rules import Policy
from planrt.protocols.acting import ActingPlaces
from planrt.serde.frames import Limits
from planrt.sharing.tensors.shared import share
from planrt.vertical import Party, intersection_size, linear_regression
from planrt.workers import WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.client.tickets import among, let_all
from planrt.workers.machine.events import PeerFor, ToPeer
from planrt.workers.machine.keeping import tickets
from planrt.workers.serving import dialling, links, users_file
from planrt.workers.shares.session import sharing_session
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import new_id
from tests.processes import eventually
from tests.vertical.tables import halves, whole
from tests.watching import whole_lines
from tests.workers.test_delegation import USERS, ask, hook, on_loop, place, use  # noqa: F401

X, Y = torch.tensor([[1.5, -2.0], [0.25, 3.0]]), torch.tensor([[-1.0, 0.5], [2.0, -4.0]])


def shared(x, alice, bob, dealer):
    return share(sharing_session([alice, bob], dealer), x)


def plan(function):
    return func2plan(function, args_shape=[(-1,)])


@pytest.fixture
def several(place, transport):  # noqa: F811
    """``several("ann")`` -> her clients of alice, bob and carl, who take users only where they are servers."""
    left, right = halves(whole())
    tables = {"alice": {"t": left}, "bob": {"t": right}, "carl": {}}

    def connect(user, **options):
        if transport != "memory":
            options["require_user"] = True
        return [place(name, datasets=data, **options)(user) for name, data in tables.items()]

    connect.logs = lambda: {name: place(name).log() for name in tables}
    return connect


def opened_by(log):
    """(who acted, for whom, as whom it proved itself) of sessions that another worker opened."""
    return {(one["by"], one["user"]) for one in log if one["event"] == "opened" and "by" in one}


def nobodies(log):
    """Sessions of nobody's, but for that of the program which has a virtual worker: its first one."""
    return [one for one in log if one["event"] == "opened" and not one["user"] and one["session"] > 1]


def owners(alice, bob):
    return Party(alice, "t", "id", ["a", "b"]), Party(bob, "t", "who", ["c", "d", "e"], label="y")


def size(alice, bob):
    return intersection_size(*owners(alice, bob), normalise="casefold")


# ------------------------------------------------------------------------------------- in the client's name


def test_parties_and_dealer_of_shares_act_for_their_client(several):
    alice, bob, carl = several("ann")
    x, y = shared(X, alice, bob, carl), shared(Y, alice, bob, carl)
    assert torch.allclose((x @ y).get(), X @ Y, atol=1e-3)
    assert torch.allclose((x * y).relu().get(), (X * Y).relu(), atol=1e-3)
    logs = several.logs()
    assert opened_by(logs["alice"]) == {("bob", "ann"), ("carl", "ann")}
    assert opened_by(logs["bob"]) == {("alice", "ann"), ("carl", "ann")}
    assert not opened_by(logs["carl"])  # nobody dials the dealer
    assert not any(nobodies(log) for log in logs.values())


def test_sessions_of_shares_that_come_after_need_no_more_tickets(several):
    alice, bob, carl = several("ann")
    shared(X, alice, bob, carl)
    histories = [one.workplace.connection for one in (alice, bob, carl)]
    for one in histories:
        one.history = []
    other = shared(X, bob, alice, carl)  # another group, of the same workers
    assert torch.allclose((other + other).get(), X + X, atol=1e-3)
    assert not any(isinstance(body, m.Delegate) for one in histories for body in one.history)


@pytest.mark.parametrize("holder", ["alice", "carl"])
def test_what_is_on_a_worker_is_shared_in_the_clients_name(several, holder):
    """By a party, whose own part stays where it is, and by one that is none."""
    named = dict(zip(("alice", "bob", "carl"), several("ann"), strict=True))
    alice, bob, carl = named.values()
    dealer = {"alice": carl, "carl": None}[holder]
    with contextlib.ExitStack() as stack:
        if dealer is None:
            server = WebsocketServerWorker("dan", threads=1)
            dealer = stack.enter_context(
                WebsocketClientWorker("dan", uri=stack.enter_context(server.running()))
            )
        there = X.send(named[holder], allowed_users=["ann"])
        parts = sharing_session([alice, bob], dealer).share_from(there)
        assert torch.allclose((parts * 2).get(), X * 2, atol=1e-3)
        assert not any(nobodies(log) for log in several.logs().values())


def test_parties_of_joint_runs_act_for_their_client(several):
    alice, bob, carl = several("ann")
    assert size(alice, bob) == 40
    with linear_regression(
        *owners(alice, bob), crypto_provider=carl, normalise="casefold", batch_size=20, method="shares"
    ) as run:
        assert run.size == 40
        assert len(run.fit(1)) == 1
    logs = several.logs()
    assert opened_by(logs["alice"]) == {("bob", "ann"), ("carl", "ann")}
    assert opened_by(logs["bob"]) == {("alice", "ann"), ("carl", "ann")}
    assert opened_by(logs["carl"]) == {("alice", "ann"), ("bob", "ann")}
    assert not any(nobodies(log) for log in logs.values())


def steps():
    inc, double = plan(lambda x: x + 1), plan(lambda x: x * 2)
    return [Step("alice", inc, name="first"), Step("bob", double, name="second")]


def test_a_protocol_that_is_run_from_here_goes_on_in_the_clients_name(several):
    alice, bob, _ = several("ann")
    x = torch.tensor([1.0, 2.0]).send(alice, allowed_users=["ann"])
    result = Protocol(steps()).deploy(alice, bob).run(x)
    assert result.location is bob
    assert result.get().tolist() == [4, 6]
    logs = several.logs()
    assert opened_by(logs["bob"]) == {("alice", "ann")}
    assert not nobodies(logs["bob"])


@pytest.mark.parametrize("host", ["carl", "alice"])
def test_a_worker_that_runs_a_protocol_acts_for_its_client(several, host):
    """With values that are for the client alone, from the first step to the last; also at itself."""
    named = dict(zip(("alice", "bob", "carl"), several("ann"), strict=True))
    protocol = Protocol(steps()).deploy(named["alice"], named["bob"])
    there = protocol.send(named[host])
    x = torch.tensor([1.0, 2.0]).send(named[host], allowed_users=["ann"])
    for _ in range(2):  # the second time the plans are there
        result = there.run(x).get().tag("#result")
        assert result.location is named["bob"]
        assert (result + 1).get().tolist() == [5, 7]
        (found,) = several("ben")[1].search("#result")
        with pytest.raises(GetNotPermittedError, match="ann may get it"):
            found.get()
        assert result.get().tolist() == [4, 6]
    logs = several.logs()
    assert opened_by(logs["alice"]) == {(host, "ann")}
    assert opened_by(logs["bob"]) == {(host, "ann"), ("alice", "ann")}
    assert not any(nobodies(log) for log in logs.values())


def test_who_is_nobody_at_one_of_them_is_nobody_there_and_no_more(place):  # noqa: F811
    """bob knows users, and this client shows him nothing: what goes there does so in nobody's name, as ever."""
    left, right = halves(whole())
    alice = place("alice", datasets={"t": left})("ann")
    bob, carl = place("bob", datasets={"t": right})(), place("carl", users=None)()
    x = shared(X, alice, bob, carl)
    assert torch.allclose((x * x).get(), X * X, atol=1e-3)
    assert size(alice, bob) == 40
    result = Protocol(steps()).deploy(alice, bob).send(carl).run(torch.ones(2)).get()
    assert result.get().tolist() == [4, 4]
    assert opened_by(place("alice").log()) == {("bob", "ann"), ("carl", "ann")}
    assert not opened_by(place("bob").log())


def test_where_there_are_no_users_there_are_no_tickets(place):  # noqa: F811
    alice, bob, carl = (place(name, users=None)() for name in ("alice", "bob", "carl"))
    connections = [one.workplace.connection for one in (alice, bob, carl)]
    for one in connections:
        one.history = []
    x = shared(X, alice, bob, carl)
    assert torch.allclose((x * x).get(), X * X, atol=1e-3)
    result = Protocol(steps()).deploy(alice, bob).send(carl).run(torch.ones(2)).get()
    assert result.get().tolist() == [4, 4]
    asked = [body for one in connections for body in one.history]
    assert not any(isinstance(body, m.Delegate | m.ActFor) for body in asked)


def test_a_ticket_is_good_however_long_after_it_is_needed(several, monkeypatch):
    """What it opens, it opens at once: the last step of a protocol may come much later than its ticket."""
    now, given, used = [0.0], [], []
    note, use = tickets.Tickets.note, tickets.Tickets.use

    def noted(self, id, *about, **more):
        given.append(id)
        note(self, id, *about, **more)

    def opens(self, id, *bearer, **more):
        opened = use(self, id, *bearer, **more)
        used.append(id)
        return opened

    monkeypatch.setattr(tickets.Tickets.__init__, "__defaults__", (lambda: now[0],))
    monkeypatch.setattr(tickets.Tickets, "note", noted)
    monkeypatch.setattr(tickets.Tickets, "use", opens)
    alice, bob, carl = several("ann")
    protocol = Protocol(steps()).deploy(alice, bob)
    there = protocol.send(carl)
    on_loop(ActingPlaces(protocol._description.chain, {"alice": alice, "bob": bob}, carl).let())
    on_loop(let_all(among([one.workplace for one in (alice, bob, carl)]), "joint"))
    assert eventually(lambda: sorted(used) == sorted(given))
    assert len(given) >= 4
    now[0] += 10 * tickets.SECONDS
    assert there.run(torch.ones(2)).get().get().tolist() == [4, 4]
    assert size(alice, bob) == 40
    assert sorted(used) == sorted(given)  # those were it, and no others were asked for


# ------------------------------------------------------------------------------- no more than the client may


def test_who_may_not_run_on_a_table_does_not_through_another_worker(several):
    """ben may run on alice's table, and not on bob's; alice herself may do all at bob."""
    tables = {"t": {"run": ["ann", "alice"], "see": ["ben"]}}
    several("ann", access=tables)
    alice, bob, _ = several("ben")
    with pytest.raises(PolicyRefusedError, match="user 'ben' may see the data set 't', and not run"):
        size(alice, bob)
    alice, bob, _ = several("ann")
    assert size(alice, bob) == 40
    alice, bob, _ = several("mallory")
    with pytest.raises(UnknownDatasetError):
        size(alice, bob)


def test_what_a_protocol_puts_elsewhere_counts_for_its_client(several):
    policy = Policy(approval="open", max_session_objects=6)
    alice, bob, carl = several("ann", policy=policy)
    there = Protocol(steps()).deploy(alice, bob).send(carl)
    kept = []

    def fill():
        for _ in range(8):
            kept.append(there.run(torch.ones(2)))

    with pytest.raises(PolicyRefusedError, match="6"):
        fill()
    theirs = several("ben")
    other = Protocol(steps()).deploy(*theirs[:2]).send(theirs[2])
    assert other.run(torch.ones(2)).get().get().tolist() == [4, 4]
    assert kept


def test_an_owner_is_asked_for_what_a_protocol_runs_by_its_client(several):
    """bob's owner sees whose plan it is, and his decision is about that user."""
    _, bob, carl = several("ann", policy=Policy(approval="list"))
    there = Protocol([Step("bob", plan(lambda x: x * 2), name="only")]).deploy(bob).send(carl)
    with pytest.raises(NotApprovedError):
        there.run(torch.ones(2))
    refused = [
        one for one in several.logs()["bob"] if one["event"] == "refused" or one.get("outcome") == "refused"
    ]
    assert {(one["user"], one.get("by")) for one in refused} == {("ann", "carl")}


@pytest.mark.parametrize("gone", ["ann", "alice"])
def test_who_is_taken_out_takes_part_no_longer(gone, tmp_path, monkeypatch):
    """The client at bob, or the worker that acts for it there."""
    monkeypatch.setattr("planrt.workers.websocket_server.USERS_SECONDS", 0.02)
    path = tmp_path / "users"
    for name in ("ann", "alice"):
        users_file.add(path, name, USERS[name])
    with (
        WebsocketServerWorker("bob", threads=1, users=path, require_user=True).running() as bob_at,
        WebsocketServerWorker(
            "alice", threads=1, users=USERS, peer_token=USERS["alice"]
        ).running() as alice_at,
        WebsocketServerWorker("carl", threads=1).running() as carl_at,
        WebsocketClientWorker("bob", uri=bob_at, token=USERS["ann"], auto_add=False) as bob,
        WebsocketClientWorker("alice", uri=alice_at, token=USERS["ann"], auto_add=False) as alice,
        WebsocketClientWorker("carl", uri=carl_at, auto_add=False) as carl,
    ):
        x = shared(X, alice, bob, carl)
        assert torch.allclose((x * x).get(), X * X, atol=1e-3)
        path.write_text("".join(line for line in path.read_text().splitlines(True) if gone not in line))

        def over():
            try:
                (x * x).get()
            except SharingError:
                return True
            return False

        assert eventually(over)


@pytest.mark.parametrize("proves", ["a token", "nothing"])
def test_a_stranger_uses_no_worker_through_another_one(proves, tmp_path):
    """mallory is a user of alice's, and none of bob's, who takes users only: neither by a protocol, nor by shares, nor
    by a move does alice let her in there, though bob would let alice in."""
    log = tmp_path / "log"
    at_bob = {name: USERS[name] for name in ("ann", "alice")}
    token = {"peer_token": USERS["alice"]} if proves == "a token" else {}
    with (
        WebsocketServerWorker(
            "bob", threads=1, users=at_bob, require_user=True, audit=log
        ).running() as bob_at,
        WebsocketServerWorker(
            "alice", threads=1, users=USERS, require_user=True, **token
        ).running() as alice_at,
        WebsocketClientWorker("alice", uri=alice_at, token=USERS["mallory"], auto_add=False) as alice,
    ):
        peer = m.PeerAddress("bob", bob_at)
        me = m.PeerAddress("alice", alice_at)
        x = torch.ones(2).send(alice)
        sent = Protocol([Step("bob", plan(lambda x: x + 1))]).send(alice)
        alice.workplace.post(m.DeployProtocol(sent.id_at_location, {"bob": peer}))
        refused = [
            m.RunProtocol(sent.id_at_location, 1, [x.id_at_location], [new_id()], False, 0),
            m.MakeDealer("g", "a token", [peer, me]),
            m.ShareOut(x.id_at_location, "g", 2**16, [peer, me], [new_id()] * 2, "a token"),
            m.Move(x.id_at_location, peer, new_id(), "a token", keep=True),
            m.PutPointer(new_id(), peer, 1, "a token"),
        ]
        for body in refused:
            with pytest.raises(RemoteError, match="this worker takes users only"):
                ask(alice, m.Message, body)
        assert x.get().tolist() == [1, 1]
    events = [json.loads(line) for line in whole_lines(log)]
    assert {one["event"] for one in events} == {"started", "refused"}


# -------------------------------------------------------------------------------------- who speaks as a party


@pytest.fixture
def bob_at(tmp_path):
    right = halves(whole())[1]
    server = WebsocketServerWorker("bob", threads=1, users=USERS, require_user=True, audit=tmp_path / "log")
    server.add_dataset(right, "t")
    with server.running() as uri:
        yield uri


@pytest.fixture
def as_user(bob_at):
    with contextlib.ExitStack() as stack:

        def connect(user):
            client = WebsocketClientWorker("bob", uri=bob_at, token=USERS[user], auto_add=False)
            return stack.enter_context(client)

        yield connect


PARTIES = [
    m.PeerAddress(name, f"ws://127.0.0.1:{number}") for number, name in enumerate(["bob", "alice", "carl"], 1)
]
TOKEN, SEED = "the token of the group", b"0" * 16


def of_shares(bob):
    """A group of ann's at bob, whose parties and dealer are still to come: what they would say, and for what."""
    parties, dealer = PARTIES[:2], PARTIES[2]
    ask(bob, m.Done, m.MakeGroup("one", TOKEN, 0, parties, dealer, 2**16, 5.0))
    return "share", m.JoinGroup("one", TOKEN, 1), m.GiveSeed("one", TOKEN, SEED), "group 'one'"


def of_tables(bob):
    about = m.OpenJoint(
        joint="one", token=TOKEN, number=0, parties=PARTIES[:2], owners=2, dataset="t", ids=["who"],
        normalise="casefold", size_only=True, features=[], label="", label_owner=0, columns=[0, 0], model=None,
        standardise=False, holdout=0.0, seed=0, predictions_to="client", weights_to_client=False, timeout=5.0,
    )  # fmt: skip
    ask(bob, m.Done, about)
    return "joint", m.JoinJoint("one", TOKEN, 1, "0" * 64), None, "joint run 'one'"


BEGUN = {"shares": of_shares, "tables": of_tables}


def ticket(worker, permits, of="alice"):
    return ask(worker, m.Ticket, m.Delegate(of, permits, of if of in USERS else ""))


def says(uri, given, body, *, as_worker="alice"):
    """What bob answers to a message over a session that this ticket opens."""
    return use(uri, given, token=USERS.get(as_worker, ""), then=lambda connection: connection.request(body))


@pytest.mark.parametrize("kind", BEGUN)
def test_a_party_speaks_with_a_ticket_of_that_client_for_that_worker(kind, as_user, bob_at):
    ann = as_user("ann")
    permits, join, seed, what = BEGUN[kind](ann)
    refusal = pytest.raises(
        PolicyRefusedError, match=f"{what} is of user 'ann': .* with a ticket, and not as user 'alice'"
    )
    with refusal, WebsocketClientWorker("bob", uri=bob_at, token=USERS["alice"], auto_add=False) as herself:
        ask(herself, m.Done, join)
    others = {
        "ben": "acts here for another session",
        "ann": "acts here for another session",  # in which she has begun nothing
    }
    for user, match in others.items():
        with pytest.raises(PolicyRefusedError, match=match):
            says(bob_at, ticket(as_user(user), permits), join)
    with pytest.raises(
        PolicyRefusedError, match=f"worker 'mallory' acts for user 'ann' here, and is not 'alice' in {what}"
    ):
        says(bob_at, ticket(ann, permits, of="mallory"), join, as_worker="mallory")
    for other in {"put", "compute", "share", "joint"} - {permits}:
        with pytest.raises(PolicyRefusedError, match="which does not include Join"):
            says(bob_at, ticket(ann, other), join)
    for body in (seed,) if seed is not None else ():
        with pytest.raises(
            PolicyRefusedError, match="worker 'alice' acts for user 'ann' here, and is not 'carl'"
        ):
            says(bob_at, ticket(ann, permits), body)
    known = "parties|were told different things|Done"
    if kind == "shares":
        says(bob_at, ticket(ann, permits), join)
    else:  # it got as far as what the parties were told
        with pytest.raises(RemoteError, match=known):
            says(bob_at, ticket(ann, permits), join)


@pytest.mark.parametrize("kind", BEGUN)
def test_the_token_of_a_computation_is_asked_for_first(kind, as_user, bob_at):
    """Who does not know it learns nothing of whose it is."""
    ann = as_user("ann")
    permits, join, _, _ = BEGUN[kind](ann)
    wrong = type(join)(
        *[
            TOKEN[::-1] if one == TOKEN else one
            for one in (getattr(join, name) for name in join.__struct_fields__)
        ]
    )
    elsewhere = type(join)(
        *["two" if one == "one" else one for one in (getattr(join, name) for name in join.__struct_fields__)]
    )
    for user, body in (("mallory", wrong), ("mallory", elsewhere), ("ann", wrong)):
        with pytest.raises(RemoteError, match="there is no") as caught:
            says(bob_at, ticket(as_user(user), permits), body)
        assert "ann" not in str(caught.value)


def test_parts_of_secrets_are_put_in_the_name_of_the_client(as_user, bob_at):
    ann = as_user("ann")
    of_shares(ann)
    part = m.PutShare(new_id(), "one", 2**16, [2], SEED, handover="a token")
    for user in ("ben", "ann"):
        with pytest.raises(PolicyRefusedError, match="acts here for another session"):
            says(bob_at, ticket(as_user(user), "share"), part)
    with pytest.raises(PolicyRefusedError, match="and not as user 'mallory'"):
        ask(as_user("mallory"), m.Done, part)
    says(bob_at, ticket(ann, "share"), part)


def test_openings_of_who_joined_no_more_end_the_group_of_nobody_else(as_user, bob_at):
    """A stranger's openings, corrections and failures are no part of it, with the ticket of another session or none."""
    ann = as_user("ann")
    of_shares(ann)
    mallory = as_user("mallory")
    for body in (
        m.FailGroup("one", "because"),
        m.EndGroup("one"),
        m.Opening("one", 0),
        m.Corrections("one", [1]),
    ):
        mallory.workplace.post(body)
    with contextlib.suppress(PlanrtError):
        mallory.objects_count()

    async def then(connection):
        for body in (m.FailGroup("one", "because"), m.Opening("one", 0)):
            connection.post(body)
        await connection.request(m.JoinGroup("one", "another", 1))

    with pytest.raises(RemoteError):
        use(bob_at, ticket(as_user("ben"), "share"), token=USERS["alice"], then=then)
    assert ask(ann, m.GroupTraffic, m.ReadTraffic("one")).rounds == 0


def test_the_log_names_the_user_of_what_was_refused(as_user, bob_at, tmp_path):
    permits, join, _, _ = of_shares(as_user("ann"))
    with pytest.raises(PolicyRefusedError):
        says(bob_at, ticket(as_user("ben"), permits), join)
    log = [json.loads(line) for line in whole_lines(tmp_path / "log")]
    (refused,) = [one for one in log if one["event"] == "refused"]
    found = {key: refused[key] for key in ("user", "by", "proved", "request", "rule")}
    assert found == {
        "user": "ben",
        "by": "alice",
        "proved": "alice",
        "request": "joingroup",
        "rule": "ticket",
    }


# -------------------------------------------------------------------------------------------- tickets that are over


def spoil(workers, permits):
    """Has each of the workers a ticket of no use for each of the others, as after these have lost what it opened."""
    for who in workers:
        for there in workers:
            if who is not there:
                peer = m.PeerAddress(there.id, there.link_address)
                given(who, there, m.ActFor(peer, permits, "0" * 32, "0" * 64))


def given(who, there, ticket):
    """Gives `who` a ticket in the place of one that its client got `there`."""
    who.workplace.post(ticket)
    there.workplace.acting._given.setdefault(who.workplace, {})[ticket.permits] = ticket
    who.workplace.acting._latest[ticket.peer, ticket.permits] = ticket.ticket


def test_tickets_that_are_over_are_asked_for_once_more(several):
    workers = alice, bob, carl = several("ann")
    spoil(workers, "share")
    x = shared(X, alice, bob, carl)
    assert torch.allclose((x * x).get(), X * X, atol=1e-3)
    spoil(workers, "joint")
    assert size(alice, bob) == 40


def test_what_is_on_a_worker_is_shared_though_its_tickets_were_over(several):
    alice, bob, carl = several("ann")
    session = sharing_session([alice, bob], carl)
    there = X.send(carl)
    spoil([alice, carl], "share")
    spoil([bob, carl], "share")
    with contextlib.suppress(SharingError):  # the dealer was at them over the tickets before: its group ends
        parts = session.share_from(there)
        assert torch.allclose(parts.get(), X, atol=1e-3)


def test_a_protocol_says_that_its_tickets_were_over_and_the_next_run_has_others(several):
    """It does not begin again by itself: plans may have changed what they were given."""
    workers = alice, bob, carl = several("ann")
    there = Protocol(steps()).deploy(alice, bob).send(carl)
    spoil(workers, "put")
    with pytest.raises(RemoteError, match="no ticket of this worker's") as caught:
        there.run(torch.ones(2))
    assert caught.value.step == "second"
    assert there.run(torch.ones(2)).get().get().tolist() == [4, 4]


def test_a_group_ends_with_the_session_of_its_client_and_what_acted_in_it(several):
    alice, bob, carl = several("ann")
    x = shared(X, alice, bob, carl)
    on_loop(alice.workplace.connection.close(forget=True))
    with pytest.raises(SharingError):
        (x * x).get()
    ended = eventually(
        lambda: (
            {one["by"] for one in several.logs()["alice"] if one["event"] == "ended" and "by" in one}
            == {"bob", "carl"}
        )
    )
    assert ended


def test_who_names_the_ticket_of_another_user_has_nothing_of_what_it_opened(several):
    """Not even with the right id: what one client's ticket opened is not another one's way to go."""
    ann, ben = several("ann"), several("ben")
    ann[0].workplace.connection.history = history = []
    kept = torch.ones(2).send(ann[0], allowed_users=["ann"]).move(ann[1])
    chained = kept.send(ann[0])
    assert (chained + 1).get().get().tolist() == [2, 2]
    for one in [one for one in history if isinstance(one, m.ActFor)]:
        given(ben[0], ben[1], m.ActFor(one.peer, one.permits, one.ticket, "0" * 64))
    body = m.Move(
        torch.ones(1).send(ben[0]).id_at_location,
        m.PeerAddress("bob", ben[1].link_address),
        new_id(),
        "a token",
        keep=True,
    )
    with pytest.raises(RemoteError, match="no ticket of this worker's|was used|is somebody else"):
        ask(ben[0], m.Done, body)
    assert (chained + 1).get().get().tolist() == [2, 2]


def test_tickets_without_end_open_one_connection_each_at_the_most(several):
    """One client gives ticket after ticket; the worker acts for others as before, and at bob has a few connections."""
    ann, ben = several("ann"), several("ben")
    peer = m.PeerAddress("bob", ben[1].link_address)
    for number in range(500):
        ben[0].workplace.post(m.ActFor(peer, "put", f"{number:032x}", "0" * 64))
    assert size(ann[0], ann[1]) == 40
    assert torch.ones(2).send(ann[0]).move(ann[1]).get().tolist() == [1, 1]
    for number in range(100):
        address = m.PeerAddress("bob", f"ws://127.0.0.1:{number + 1}")
        ben[0].workplace.post(m.ActFor(address, "share", f"{number:032x}", "0" * 64))
    with pytest.raises(RemoteError, match="64 other workers at the most"):
        ben[0].objects_count()
    assert ann[0].objects_count() >= 0


def test_tickets_without_end_knock_at_few_doors_at_a_time(several, monkeypatch):
    """A worker that does not answer is dialled a few times at once, however many tickets for it there are, and those
    that are over before their turn are for nothing. Others' tickets have their turn meanwhile."""
    monkeypatch.setattr(
        dialling, "LINK_TIMEOUT", 600.0
    )  # those who knock go on knocking, also where the rest is slow
    ann, ben = several("ann"), several("ben")
    with silent_listener() as (address, knocks):
        for number in range(300):
            peer = m.PeerAddress(f"eve{number % 60}", address)
            ben[0].workplace.post(m.ActFor(peer, "put", f"{number:032x}", "0" * 64))
        eventually(lambda: len(knocks) >= links.AT_ONCE)
        assert size(ann[0], ann[1]) == 40
        assert torch.ones(2).send(ann[0]).move(ann[1]).get().tolist() == [1, 1]
        assert len(knocks) == links.AT_ONCE
    assert ben[0].objects_count() >= 0  # its own program goes on as well


@contextlib.contextmanager
def silent_listener():
    """Yields the address of what takes connections and says nothing, and these, which it closes in the end."""
    knocks, over = [], threading.Event()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        listening.settimeout(0.05)

        def take():
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    knocks.append(listening.accept()[0])

        taking = threading.Thread(target=take)
        taking.start()
        try:
            yield f"ws://127.0.0.1:{listening.getsockname()[1]}", knocks
        finally:
            over.set()
            taking.join()
            for one in knocks:
                one.close()


def test_one_users_tickets_leave_room_for_others_connections(monkeypatch):
    """So many in one user's name, of which fewer to one worker; the next one is told, and another user's opens."""
    monkeypatch.setattr(links, "MAX_OF_USER", 5)
    monkeypatch.setattr(links, "MAX_OF_USER_THERE", 3)
    opened, told = [], []

    class Opened:
        closed, waiting, on_renewed = False, (0, 0), None

        def post_own(self, body, tensors):
            pass

        async def close(self, *, forget):
            opened.remove(self)

    class Dialling:
        async def connect(self, worker_id, peer, limits, ticket):
            await asyncio.sleep(0)
            opened.append(made := Opened())
            return made

    async def handle(event):
        told.append(event.reason)

    async def settled():
        for _ in range(100):
            await asyncio.sleep(0)

    async def go():
        acting = links.Links("alice", handle, Limits(), Dialling())

        def ticket(whose, worker, number):
            peer = PeerFor(worker, f"ws://{worker}", f"{whose}{number}", "1:x", f"user {whose}")
            acting.introduce(peer, "0" * 64)
            return peer

        bobs = [ticket("ben", "bob", number) for number in range(4)]
        await settled()
        assert len(opened) == 3
        acting.send(ToPeer(bobs[3], m.CountObjects(), [], "key"))
        await settled()
        assert told == [
            "worker 'alice' has 3 connections in that user's name to worker 'bob', its limit: close some of the "
            "sessions that they are for"
        ]
        carls = [ticket("ben", "carl", number) for number in range(3)]
        ticket("ann", "bob", 0)
        await settled()
        assert len(opened) == 6
        acting.send(ToPeer(carls[2], m.CountObjects(), [], "key"))
        await settled()
        assert "has 5 connections in that user's name, its limit" in told[1]
        acting.part(bobs)
        await settled()
        assert len(opened) == 3
        ticket("ben", "bob", 9)
        await settled()
        assert len(opened) == 4
        acting.close()

    asyncio.run(go())


# ------------------------------------------------------------------------------------- processes of their own


@pytest.fixture(scope="module", params=["on", "off"])
def served(request, tmp_path_factory):
    """alice, bob and carl as the command serves them: users files, a token of each at the others, users only."""
    folder, children = tmp_path_factory.mktemp("acting"), []
    for name in ("ann", "ben", "alice", "bob", "carl"):
        users_file.add(folder / "users.txt", name, f"the long token of {name}, no. 1")
        token = folder / f"{name}.token"
        token.write_text(f"the long token of {name}, no. 1")
        token.chmod(0o600)
    (folder / "access.toml").write_text('[digits]\nrun = ["ann"]\n')
    for name in ("alice", "bob", "carl"):
        options = ["--users", folder / "users.txt", "--require-user", "--audit", folder / f"{name}.log"]
        options += ["--peer-token-file", folder / f"{name}.token", "--isolation", request.param]
        children.append(ChildOptions(name, options=("--empty", "--threads", "1", *map(str, options))))
    with WorkerProcesses(children) as running:
        ready = running.wait_ready()

        def connect(user):
            token = f"the long token of {user}, no. 1"
            return [
                WebsocketClientWorker(name, uri=one.uri, token=token, auto_add=False, timeout=60)
                for name, one in ready.items()
            ]

        def log(name):
            return [json.loads(line) for line in whole_lines(folder / f"{name}.log")]

        yield connect, log


def test_workers_of_the_command_act_for_their_clients(served):
    connect, log = served
    with contextlib.ExitStack() as stack:
        alice, bob, carl = [stack.enter_context(one) for one in connect("ann")]
        x = shared(X, alice, bob, carl)
        assert torch.allclose((x @ x).relu().get(), (X @ X).relu(), atol=1e-3)
        there = Protocol(steps()).deploy(alice, bob).send(carl)
        result = there.run(torch.ones(2).send(carl, allowed_users=["ann"])).get()
        assert result.get().tolist() == [4, 4]
        itself = Protocol(steps()).deploy(alice, bob).send(alice)  # which has a place, too
        assert itself.run(torch.ones(2).send(alice, allowed_users=["ann"])).get().get().tolist() == [4, 4]
        parts = sharing_session([alice, bob], carl).share_from(X.send(carl, allowed_users=["ann"]))
        assert torch.allclose((parts + x).get(), 2 * X, atol=1e-3)
    for name, by in (("alice", {"alice", "bob", "carl"}), ("bob", {"alice", "carl"})):
        opened = [one for one in log(name) if one["event"] == "opened" and "by" in one]
        assert {(one["user"], one["by"]) for one in opened} == {("ann", other) for other in by}
        assert all(one["proved"] == one["by"] for one in opened)
        assert not nobodies(log(name))
