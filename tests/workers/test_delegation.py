"""Workers that dial workers act for the client that they act for, and for nobody else: tickets, and what they open."""

import asyncio
import contextlib
import json
import logging
import time

import psutil
import pytest
import torch

import planrt
from planrt.errors import (
    GetNotPermittedError,
    HandshakeError,
    PlanrtError,
    PolicyRefusedError,
    RemoteError,
    UnknownObjectError,
)
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.loop import background_loop
from planrt.plans.policy.rules import Policy
from planrt.serde.frames import Limits
from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.client.connection import Connection
from planrt.workers.machine.events import Introduce, PeerFor
from planrt.workers.machine.keeping import tickets
from planrt.workers.machine.sessions import MOST_SESSIONS
from planrt.workers.serving import users_file
from planrt.workers.transport.addresses import DialOptions, dial
from planrt.workers.wire import messages as m
from planrt.workers.wire.proofs import TicketProof
from tests.processes import eventually
from tests.proxy import CuttingProxy
from tests.watching import whole_lines

pytestmark = pytest.mark.usefixtures("warm_workers")


USERS = {name: f"the long token of {name}, no. 1" for name in ("ann", "ben", "alice", "mallory")}


@pytest.fixture(scope="module", autouse=True)
def hook():
    planrt.TorchHook(torch)


@pytest.fixture
def place(transport, tmp_path):
    """``place("bob", policy=...)`` starts a worker that knows ann, ben, alice and mallory; ``place("bob")("ann")`` is a
    client of it, and ``place("bob").log()`` what its owner's log has."""
    with contextlib.ExitStack() as stack:
        made = {}

        def start(id, **options):
            if id in made:
                return made[id]
            path = tmp_path / f"{id}.log"
            options = {"users": USERS, "audit": path, **options}
            datasets = options.pop("datasets", {})
            if transport == "memory":
                worker = stack.enter_context(VirtualWorker(id, datasets=datasets, **options))

                def connect(user=""):
                    return stack.enter_context(worker.connect_as(USERS.get(user, "")))
            else:
                server = WebsocketServerWorker(id, threads=1, **options)
                for key, data in datasets.items():
                    server.add_dataset(data, key)
                uri = stack.enter_context(server.running())

                def connect(user=""):
                    return stack.enter_context(
                        WebsocketClientWorker(id, uri=uri, token=USERS.get(user, ""), auto_add=False)
                    )

            connect.log = lambda: [json.loads(line) for line in whole_lines(path)]
            made[id] = connect
            return connect

        yield start


def ask(worker, kind, body):
    async def asking():
        return (await worker.workplace.ask(kind, body))[0]

    return on_loop(asking())


def on_loop(coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, background_loop()).result()


def ticket_at(worker, permits="put", **who):
    return ask(worker, m.Ticket, m.Delegate("alice", permits, **who))


def use(uri, ticket, *, token="", then=lambda connection: None, worker="bob"):
    """What another program does with a ticket: opens a session with it, and asks for something in it."""

    async def go():
        connection = await Connection.open(
            await dial(uri, DialOptions(10, Limits())), worker, timeout=10, limits=Limits(),
            token=token, for_others=True, ticket=TicketProof(getattr(ticket, "id", "") or ticket.ticket, ticket.secret),
        )  # fmt: skip
        try:
            asked = then(connection)
            return None if asked is None else await asked
        finally:
            await connection.close(forget=True)

    return on_loop(go())


async def forever(ask):
    """Asks until that fails."""
    while True:
        with contextlib.suppress(PolicyRefusedError):  # which is no end
            await ask()
        await asyncio.sleep(0.01)


def acting(log):
    return [line for line in log if line.get("by") == "alice"]


# ---------------------------------------------------------------------------------------- in the client's name


def test_a_move_comes_in_the_clients_name_and_is_the_clients(place):
    alice, bob = place("alice")("ann"), place("bob")("ann")
    moved = torch.tensor([1.0, 2.0]).send(alice).move(bob)
    (again,) = [torch.tensor([3.0]).send(alice).move(bob)]
    assert (moved + 1).get().tolist() == [2, 3]
    assert again.get().tolist() == [3]
    opened = [line for line in acting(place("bob").log()) if line["event"] == "opened"]
    assert [line["user"] for line in opened] == ["ann"]  # one session for both moves


def test_a_chain_computes_with_the_rights_of_its_client(place):
    """`x[x > 0]` has a size that tells of the values: it is for those who may read them, through another worker too."""
    alice, bob = place("alice")("ann"), place("bob")("ann")
    x = torch.tensor([1.0, -2.0, 3.0]).send(bob, allowed_users=["ann"])
    chained = x.send(alice)
    assert chained[chained > 0].get().get().tolist() == [1, 3]
    y = torch.tensor([1.0, -2.0]).send(bob, allowed_users=["ben"])
    chained = y.send(alice)
    with pytest.raises(GetNotPermittedError):
        chained[chained > 0]


def test_gradients_and_plans_go_through_a_chain(place):
    alice, bob = place("alice")("ann"), place("bob")("ann")
    w = torch.tensor([1.0, 2.0], requires_grad=True).send(bob).send(alice)
    (w * w).sum().backward()
    assert w.grad.get().get().tolist() == [2, 4]
    plan = planrt.func2plan(args_shape=[(2,)])(lambda x: x + 1)
    there = plan.send(alice)
    there.move(bob)
    assert there(torch.ones(2).send(bob)).get().tolist() == [2, 2]


def test_a_client_without_a_name_goes_on_as_before(place):
    alice, bob = place("alice")("ann"), place("bob")()
    bob.workplace.connection.history = []
    moved = torch.tensor([1.0]).send(alice).move(bob)
    assert moved.get().tolist() == [1]
    assert not acting(place("bob").log())
    assert not any(isinstance(one, m.Delegate) for one in bob.workplace.connection.history)


def test_where_there_are_no_users_there_are_no_tickets(place):
    alice, bob = place("alice", users=None)(), place("bob", users=None)()
    chained = torch.tensor([1.0]).send(alice).move(bob).send(alice)
    assert (chained + 1).get().get().tolist() == [2]
    assert not acting(place("bob").log())


def test_one_round_trip_more_and_at_the_first_use_only(place):
    alice, bob = place("alice")("ann"), place("bob")("ann")
    histories = alice.workplace.connection.history, bob.workplace.connection.history = [], []
    for _ in range(3):
        torch.tensor([1.0]).send(alice).move(bob)
        torch.tensor([1.0]).send(bob).send(alice)
    kinds = [type(one) for history in histories for one in history]
    assert kinds.count(m.Delegate) == kinds.count(m.ActFor) == 2  # to put objects, and to compute


def test_a_pointer_may_go_from_worker_to_worker(place):
    alice, bob, carl = (place(name)("ann") for name in ("alice", "bob", "carl"))
    x = torch.tensor([1.0, -1.0]).send(carl, allowed_users=["ann"])
    chained = x.send(bob).send(alice)
    assert chained[chained > 0].get().get().get().tolist() == [1]
    assert (chained * 2).get().get().get().tolist() == [2, -2]


# ------------------------------------------------------------------ a program that is several users at a worker


def test_a_program_that_is_two_users_there_computes_as_both(place):
    """In one session of the worker that dials: what one made there is not the other's, and does not end with it."""
    alice, bob = place("alice")("ann"), place("bob")
    clients = {name: bob(name) for name in ("ann", "ben")}
    secret = {name: torch.tensor([1.0, -2.0, 3.0]) * (1 + len(name)) for name in clients}
    first = {
        name: secret[name].send(clients[name], allowed_users=[name]).send(alice) for name in clients
    }  # pointers to pointers
    for _ in range(3):
        for name, x in first.items():
            assert (x + 1).get().get().tolist() == (secret[name] + 1).tolist()
            assert (
                x[x > 0].get().get().tolist() == secret[name][secret[name] > 0].tolist()
            )  # who may read only
    assert {line["user"] for line in acting(place("bob").log())} == {"ann", "ben"}


def test_what_a_program_that_is_two_users_moves_is_each_ones_own(place):
    policies = {"ann": 0, "ben": 0}
    alice, bob = place("alice")("ann"), place("bob")
    clients = {name: bob(name) for name in policies}
    for turn in range(3):
        for name, client in clients.items():
            x = torch.full((3,), float(turn)).send(alice, allowed_users=["ann", name])
            moved = x.move(client)
            assert moved.get().tolist() == [turn] * 3
    lines = [line for line in acting(place("bob").log()) if line["event"] == "opened"]
    assert sorted(line["user"] for line in lines) == ["ann", "ben"]  # a ticket for each, and no more


def test_it_may_be_so_many_users_there(place):
    """Of more, what was made over the oldest is gone, and said to be."""
    bob, alice = place("bob"), place("alice")("ann")
    chained = [(torch.ones(2) * n).send(bob("ann")).send(alice) for n in range(MOST_SESSIONS + 1)]
    for n, x in enumerate(chained[1:], 1):
        assert (x + 0).get().get().tolist() == [n] * 2
    with pytest.raises(PlanrtError, match="no longer|over|not known|gone"):
        (chained[0] + 0).get().get()


# ------------------------------------------------------------------------------- no more than the client may


def test_who_may_not_publish_does_not_through_another_worker(place):
    """alice herself may publish under the tag at bob, and ann may not."""
    tables = {"#kept": {"own": ["alice", "ben"], "run": "*", "fetch": "*"}}
    alice, bob = place("alice")("ann"), place("bob", access=tables)("ann")
    x = torch.tensor([1.0]).tag("#kept").send(alice)
    with pytest.raises(PolicyRefusedError, match="user 'ann' may not publish"):
        x.move(bob)
    assert x.get().tolist() == [1]  # where it was
    alice, bob = place("alice")("ben"), place("bob")("ben")
    assert torch.tensor([2.0]).tag("#kept").send(alice).move(bob).get().tolist() == [2]


def test_what_moves_counts_for_its_client(place):
    policy = Policy(approval="open", max_session_objects=3)
    alice, bob = place("alice")("ann"), place("bob", policy=policy)("ann")
    kept = [torch.tensor([float(number)]).send(alice).move(bob) for number in range(3)]
    more = torch.tensor([9.0]).send(alice)
    with pytest.raises(PolicyRefusedError, match="3"):
        more.move(bob)
    assert more.get().tolist() == [9]
    theirs = torch.tensor([1.0]).send(place("alice")("ben")).move(place("bob")("ben"))
    assert theirs.get().tolist() == [1]
    assert kept.pop().get().tolist() == [2]
    assert torch.tensor([9.0]).send(alice).move(bob).get().tolist() == [9]


def test_another_client_of_the_worker_has_nothing_of_it(place):
    """Ids behave as absent: for ben, whose worker alice is too, and who knows them."""
    alice, bob = place("alice")("ann"), place("bob")("ann")
    x = torch.tensor([1.0, 2.0]).send(bob).send(alice)
    moved = torch.tensor([5.0]).send(alice).move(bob)
    chained = (x + 1).get()  # it is the client's again, and known by its id at bob
    ids = [moved.id_at_location, chained.id_at_location, 12345]
    theirs, bobs = place("alice")("ben"), place("bob")("ben")
    said = []
    peer = m.PeerAddress("bob", bobs.link_address)
    torch.tensor([1.0]).send(bobs).send(theirs)  # so that ben has a ticket for alice
    for id in ids:
        with pytest.raises(RemoteError) as caught:
            ask(theirs, m.Done, m.PutPointer(77, peer, id, "a guess"))
        said.append(str(caught.value).replace(str(id), "ID"))
    assert len(set(said)) == 1
    for id in ids:
        with pytest.raises(UnknownObjectError):
            ask(bobs, m.Fetched, m.Fetch(id, False))
    assert moved.get().tolist() == [5]


def test_a_link_ends_with_its_session(place):
    alice, bob = place("alice")("ann"), place("bob")("ann")
    x = torch.tensor([1.0]).send(bob).send(alice)
    y = x + 1
    assert y.get().get().tolist() == [2]
    on_loop(alice.workplace.connection.close(forget=True))
    assert eventually(lambda: any(one["event"] == "ended" for one in acting(place("bob").log())))


# ------------------------------------------------------------------------------------- tickets that open nothing


@pytest.fixture
def bob_at():
    tables = {"scans": {"see": ["ann"], "run": ["ben"]}}
    server = WebsocketServerWorker("bob", threads=1, users=USERS, require_user=True, access=tables)
    server.add_dataset(BaseDataset(torch.ones(4, 2), torch.ones(4, 1)), "scans")
    with server.running() as uri:
        yield uri


@pytest.fixture
def as_user(bob_at):
    with contextlib.ExitStack() as stack:

        def connect(user):
            client = WebsocketClientWorker("bob", uri=bob_at, token=USERS[user], auto_add=False)
            return stack.enter_context(client)

        yield connect


@pytest.mark.parametrize("permits", ["put", "compute"])
def test_a_ticket_runs_nothing_on_a_data_set_and_looks_for_nothing(as_user, bob_at, permits):
    """Neither for who may only see it, nor for who may run: that is for a session of the user's own."""
    fit = m.Fit("0" * 64, "scans", 1, 1, -1, False, "SGD", {}, False, 0)
    asked = [
        fit, m.Evaluate("0" * 64, "scans", 1, 0), m.RunPlan("0" * 64, 0), m.Search([]), m.ListObjects(),
        m.Clear(), m.Delegate("mallory", "compute"), m.AskStatus(), m.AskApproval("0" * 64),
        *([m.Fetch(1, False), m.Claim([1], "")] if permits == "put" else []),
    ]  # fmt: skip
    for user in ("ann", "ben"):
        given = ticket_at(as_user(user), permits, user="alice")

        async def then(connection, user=user):
            for one in asked:
                with pytest.raises(PolicyRefusedError, match=f"worker 'alice' acts for user '{user}'"):
                    await connection.request(one)
            connection.post(m.Describe(1, [], ""))
            with pytest.raises(RemoteError, match="acts for user"):
                await connection.request(m.Remove([1]))

        use(bob_at, given, token=USERS["alice"], then=then)


def test_a_ticket_opens_one_session(as_user, bob_at):
    given = ticket_at(as_user("ann"))

    async def again(connection):
        with pytest.raises(HandshakeError, match="was used: it opens one session"):
            await asyncio.to_thread(use, bob_at, given)

    use(bob_at, given, then=again)
    with pytest.raises(HandshakeError, match="no ticket of this worker's"):
        use(bob_at, given)


def test_a_ticket_expires(as_user, bob_at, monkeypatch):
    monkeypatch.setattr(tickets, "SECONDS", 0.0)
    given = ticket_at(as_user("ann"))
    with pytest.raises(HandshakeError, match="has expired"):
        use(bob_at, given)


def test_a_ticket_ends_with_its_session(as_user, bob_at):
    ann = as_user("ann")
    given = ticket_at(ann)
    on_loop(ann.workplace.connection.close(forget=True))
    with pytest.raises(HandshakeError, match="no ticket of this worker's"):
        use(bob_at, given)


def test_what_it_opened_ends_with_its_session(as_user, bob_at):
    ann = as_user("ann")
    given = ticket_at(ann)

    async def then(connection):
        await connection.request(m.Put([m.PutItem(5)], "a token"), [torch.ones(1)])
        await ann.workplace.connection.close(forget=True)
        with pytest.raises(PlanrtError, match="was over|is over|closed|never made"):
            await forever(lambda: connection.request(m.CountObjects()))

    use(bob_at, given, then=then)


def test_a_ticket_is_for_the_worker_that_it_names(as_user, bob_at):
    """Where that is a user here it is this that it proves: another worker, or nobody, has no use for its secret."""
    ann = as_user("ann")
    for token in (USERS["mallory"], USERS["ann"], ""):
        given = ticket_at(ann, user="alice")
        with pytest.raises(HandshakeError, match="is for worker 'alice', which is somebody else here"):
            use(bob_at, given, token=token)
        use(bob_at, given, token=USERS["alice"])  # whose it is still


def test_a_wrong_secret_and_an_unknown_ticket_look_alike(as_user, bob_at):
    given = ticket_at(as_user("ann"))
    said = set()
    for ticket in (m.Ticket(given.id, "0" * 64, 1.0), m.Ticket("0" * 32, given.secret, 1.0)):
        with pytest.raises(HandshakeError) as caught:
            use(bob_at, ticket)
        said.add(str(caught.value))
    assert len(said) == 1
    use(bob_at, given)


def test_nobody_and_who_acts_for_another_gets_no_ticket(place):
    with pytest.raises(RemoteError, match="acting in a user's name"):
        ticket_at(place("bob")())


def test_tickets_do_not_pile_up(as_user):
    ann = as_user("ann")
    for _ in range(256):
        ticket_at(ann)
    with pytest.raises(RemoteError, match="256 tickets at the most"):
        ticket_at(ann)


def test_a_worker_takes_so_many_tickets(place):
    alice = place("alice")("ann")
    for number in range(65):
        peer = m.PeerAddress("bob", f"ws://127.0.0.1:{number + 1}")
        alice.workplace.post(m.ActFor(peer, "put", "0" * 32, "0" * 64))
    with pytest.raises(RemoteError, match="64 other workers at the most"):
        alice.objects_count()


def test_a_ticket_that_is_over_is_asked_for_once_more(place):
    """As after the other worker has lost what the ticket opened."""
    alice, bob = place("alice")("ann"), place("bob")("ann")
    peer = m.PeerAddress("bob", bob.link_address)
    torch.tensor([1.0]).send(alice).move(bob)
    for permits in ("put", "compute"):
        over = m.ActFor(peer, permits, "0" * 32, "0" * 64)
        alice.workplace.post(over)
        bob.workplace.acting._given.setdefault(alice.workplace, {})[permits] = over
        alice.workplace.acting._latest[peer, permits] = over.ticket
    assert torch.tensor([2.0]).send(alice).move(bob).get().tolist() == [2]
    assert (torch.tensor([3.0]).send(bob).send(alice) + 1).get().get().tolist() == [4]


def test_addresses_are_still_those_that_the_owner_listed(bob_at, as_user):
    with (
        WebsocketServerWorker("alice", threads=1, peers=["10.1.2.3:1"]).running() as alice_at,
        WebsocketClientWorker("alice", uri=alice_at) as alice,
    ):
        x = torch.tensor([1.0]).send(alice)
        with pytest.raises(RemoteError, match="does not dial .* --peers"):
            x.move(as_user("ann"))
        assert x.get().tolist() == [1]


# ------------------------------------------------------------------------------------- users that change, and cuts


@pytest.mark.parametrize("gone", ["ann", "alice"])
def test_who_is_taken_out_acts_no_longer_and_is_acted_for_no_longer(gone, tmp_path, monkeypatch):
    monkeypatch.setattr("planrt.workers.websocket_server.USERS_SECONDS", 0.02)
    path = tmp_path / "users"
    for name in ("ann", "alice"):
        users_file.add(path, name, USERS[name])
    options = {"threads": 1, "users": path, "require_user": True, "audit": tmp_path / "log"}
    with (
        WebsocketServerWorker("bob", **options).running() as bob_at,
        WebsocketServerWorker("alice", threads=1, peer_token=USERS["alice"]).running() as alice_at,
        WebsocketClientWorker("bob", uri=bob_at, token=USERS["ann"], auto_add=False) as bob,
        WebsocketClientWorker("alice", uri=alice_at, auto_add=False) as alice,
    ):
        x = torch.tensor([1.0]).send(bob).send(alice)
        assert (x + 1).get().get().tolist() == [2]
        path.write_text("".join(line for line in path.read_text().splitlines(True) if gone not in line))
        log = tmp_path / "log"
        assert eventually(
            lambda: any(
                one["event"] == "ended" and one.get("by") == "alice"
                for one in map(json.loads, log.read_text().splitlines())
            )
        )
        with pytest.raises(PlanrtError):
            (x + 1).get().get()


def test_links_stay_right_over_cuts():
    with contextlib.ExitStack() as stack:
        bobs = WebsocketServerWorker("bob", threads=1, users=USERS, audit=None)
        to_bob = CuttingProxy(stack.enter_context(bobs.running()))
        bob_at = stack.enter_context(to_bob.running())
        alices = WebsocketServerWorker("alice", threads=1, users=USERS)
        to_alice = CuttingProxy(stack.enter_context(alices.running()))
        alice_at = stack.enter_context(to_alice.running())
        options = {"token": USERS["ann"], "auto_add": False, "reconnect": 60}
        bob = stack.enter_context(WebsocketClientWorker("bob", uri=bob_at, **options))
        alice = stack.enter_context(WebsocketClientWorker("alice", uri=alice_at, **options))
        x = torch.tensor([1.0, -1.0]).send(bob, allowed_users=["ann"]).send(alice)
        for _ in range(3):
            assert x[x > 0].get().get().tolist() == [1]
            to_bob.cut()  # the client's session, and the one that alice has in its name
            time.sleep(0.1)
            assert x[x > 0].get().get().tolist() == [1]
            to_alice.cut()
            assert torch.tensor([2.0]).send(alice).move(bob).get().tolist() == [2]


# --------------------------------------------------------------------------------- processes, and secrets


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Two workers in processes of their own, with users files; each proves a token at the other one."""
    folder = tmp_path_factory.mktemp("delegation")
    users_of, children = folder / "users.txt", []
    for name in USERS:
        users_file.add(users_of, name, USERS[name])
    for name in ("alice", "bob"):
        options = ["--users", users_of, "--require-user", "--audit", folder / f"{name}.log"]
        if name == "alice":
            token = folder / "token"
            token.write_text(USERS["alice"])
            token.chmod(0o600)
            options += ["--peer-token-file", token]
        words = ("--empty", "--threads", "1", "--isolation", "off", *map(str, options))
        children.append(ChildOptions(name, options=words))
    with WorkerProcesses(children) as running:
        ready = running.wait_ready()
        yield {name: one.uri for name, one in ready.items()}, running.pids, folder


def test_workers_of_processes_act_for_their_clients(processes):
    uris, pids, folder = processes
    options = {"token": USERS["ann"], "auto_add": False, "timeout": 30}
    with (
        WebsocketClientWorker("alice", uri=uris["alice"], **options) as alice,
        WebsocketClientWorker("bob", uri=uris["bob"], **options) as bob,
    ):
        alice.workplace.connection.history = history = []
        moved = torch.tensor([1.0]).send(alice, allowed_users=["ann"]).move(bob)
        chained = moved.send(alice)
        assert chained[chained > 0].get().get().tolist() == [1]
        given = [one for one in history if isinstance(one, m.ActFor)]
        assert [one.permits for one in given] == ["put", "compute"]
        for pid in pids.values():
            process = psutil.Process(pid)
            seen = " ".join([*process.cmdline(), *process.environ().values()])
            assert not any(one.secret in seen for one in given)
        with pytest.raises(HandshakeError, match="was used"):  # what alice proved is of no use to others
            use(uris["bob"], given[0], token=USERS["mallory"])
    log = [json.loads(line) for line in whole_lines(folder / "bob.log")]
    assert {(one["user"], one["proved"]) for one in acting(log)} == {("ann", "alice")}
    assert not any(one.secret in (folder / "bob.log").read_text() for one in given)


def test_secrets_of_tickets_are_shown_nowhere(place, caplog):
    alice, bob = place("alice")("ann"), place("bob")("ann")
    given = ticket_at(bob)
    secret = given.secret
    peer = m.PeerAddress("bob", "ws://127.0.0.1:1")
    texts = [
        repr(given), str(given), repr(m.ActFor(peer, "put", given.id, secret)),
        repr(m.Envelope(1, m.ActFor(peer, "put", given.id, secret))), repr(m.Envelope(1, given)),
        repr(TicketProof(given.id, secret)), repr(Introduce(PeerFor("bob", "ws://x", given.id, "1:x"), secret)),
    ]  # fmt: skip
    assert not any(secret in text for text in texts)
    alice.workplace.connection.history = history = []
    with caplog.at_level(logging.DEBUG):
        torch.tensor([1.0]).send(alice).move(bob)
        alice.workplace.post(m.ActFor(peer, "compute", given.id, secret))
        with pytest.raises(RemoteError) as caught:
            ask(alice, m.Done, m.PutPointer(5, peer, 1, "a token"))
    secrets = [one.secret for one in history if isinstance(one, m.ActFor)] + [secret]
    assert len(secrets) >= 2
    log = json.dumps(place("bob").log()) + json.dumps(place("alice").log())
    for one in secrets:
        assert one not in caplog.text
        assert one not in log
        assert one not in str(caught.value) + caught.value.remote_traceback
