"""With isolation users have of each other what they have without: published objects, what is handed over, shares."""

import asyncio
import os
import signal
import sys

import pytest
import torch

import planrt
from planrt.errors import GetNotPermittedError, HandshakeError, PlanrtError, RemoteError
from planrt.plans import func2plan
from planrt.vertical import Party, logistic_regression
from planrt.workers.serving import users_file
from planrt.workers.wire import messages as m
from tests.vertical.tables import SHORT, joined, trained, whole
from tests.workers.test_isolation import Server, gone, hook, until  # noqa: F401

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="isolation is for Linux"),
    pytest.mark.filterwarnings("ignore:a key of 1024 bits"),
]


def served(request, **options):
    started = Server(isolation=True, **options)
    request.addfinalizer(started.end)
    return started


def search(worker, *terms):
    """What is found at once: who publishes something waits until others can find it."""
    return worker.search(*terms)


USERS = {"ann": "the long token of ann", "ben": "the long token of ben"}


@pytest.fixture(scope="module")
def alice(request):
    return served(request, id="alice", users=USERS, table=0)


@pytest.fixture(scope="module")
def jim(request):
    return served(request, id="jim", table=1)


@pytest.fixture(scope="module")
def third(request):
    return served(request, id="carl")


@pytest.fixture
def carl(third):
    with third.connect(None) as worker:
        yield worker


@pytest.fixture
def ann(alice):
    with alice.connect("ann") as worker:
        yield worker


@pytest.fixture
def ben(alice):
    with alice.connect("ben") as worker:
        yield worker


@pytest.fixture
def nobody(jim):
    with jim.connect(None) as worker:
        yield worker


def test_what_one_publishes_the_others_find(ann, ben):
    x = torch.arange(3.0).tag("#shared", "#x").describe("of ann for all").send(ann)
    (found,) = search(ben, "#shared")
    assert torch.equal(found.get(), torch.arange(3.0))
    assert [len(ben.search(*terms)) for terms in (["#shared", "ann"], [str(x.id_at_location)], ["#no"])] == [
        1,
        1,
        0,
    ]
    x.add_(1)  # a snapshot is what there is when somebody searches
    (again,) = search(ben, "#x")
    again.mul_(2)
    assert torch.equal(again.get(), torch.tensor([2.0, 4, 6]))
    assert torch.equal(x.get(), torch.tensor([1.0, 2, 3]))
    assert ben.search("#x") == []


def test_what_is_published_is_found_at_once_whatever_it_is(alice, ann, ben):
    @func2plan(args_shape=[(2,)])
    def doubled(x):
        return x * 2

    async def sends(tensor):
        return await tensor.async_send(ann)

    large = torch.zeros(1_000_000)
    made = {
        "#small": lambda: torch.ones(2).tag("#small").send(ann),
        "#large": lambda: large.tag("#large").send(ann),
        "#later": lambda: large.clone().send(ann).tag("#later"),
        "#result": lambda: (torch.randn(300, 300).send(ann) @ torch.randn(300, 300).send(ann)).tag("#result"),
        "#awaited": lambda: asyncio.run(sends(large.clone().tag("#awaited"))),
        "#data": lambda: planrt.BaseDataset(large, large).tag("#data").send(ann),
        "#plan": lambda: doubled.tag("#plan").send(ann),
        "#awaited-plan": lambda: asyncio.run(doubled.tag("#awaited-plan").async_send(ann)),
        "#protocol": lambda: planrt.Protocol([("one", doubled)]).tag("#protocol").send(ann),
    }
    for tag, make in made.items():
        kept = make()
        assert len(ben.search(tag)) == (2 if tag == "#data" else 1), tag
        del kept
    with alice.connect("ann") as new:  # also by a client whose process is only just there
        torch.ones(2).tag("#new").send(new)
        assert len(ben.search("#new")) == 1


def test_what_was_published_stays_when_its_session_ends_and_is_its_users_to_remove(alice, ben):
    with alice.connect("ann") as worker:
        torch.ones(2).tag("#stays").send(worker)
    (found,) = search(ben, "#stays")
    assert torch.equal(found.get(), torch.ones(2))


def test_plans_are_published_with_their_state(ann, ben):
    @func2plan(args_shape=[(2,)], state=(torch.tensor([3.0, 4.0]),))
    def scaled(x, state):
        (scale,) = state.read()
        return x * scale

    scaled.tag("#scaled").send(ann)
    (found,) = search(ben, "#scaled")
    assert torch.equal(found(torch.ones(2).send(ben)).get(), torch.tensor([3.0, 4.0]))


def test_labels_of_private_data_travel(ann, ben, alice):
    torch.ones(2).tag("#for-ben").send(ann, allowed_users=["ben"])
    torch.ones(2).tag("#for-ann").send(ann, allowed_users=["ann"])
    (mine,) = search(ben, "#for-ben")
    assert torch.equal((mine + 1).get(), torch.full((2,), 2.0))
    (hers,) = search(ben, "#for-ann")
    assert len(hers) == 2
    with pytest.raises(GetNotPermittedError):
        (hers * 2).get()
    with alice.connect("ann") as again:
        (own,) = again.search("#for-ann")
        assert torch.equal(own.get(), torch.ones(2))


def test_objects_move_between_workers_with_gradients_and_chains(ann, nobody):
    x = torch.arange(3.0, requires_grad=True).send(ann)
    (x * x).sum().backward()
    x.move(nobody)
    assert x.location is nobody
    assert torch.equal(x.grad.get(), torch.tensor([0.0, 2, 4]))
    x.move(ann)
    assert torch.equal(x.get(), torch.arange(3.0))
    y = torch.arange(3.0).send(nobody).send(ann)  # a pointer to a pointer
    z = y + 1
    assert torch.equal(z.get().get(), torch.arange(1.0, 4))


def test_what_cannot_be_handed_over_is_refused_by_name_and_stays(ann, nobody):
    x = torch.arange(3.0, requires_grad=True).send(nobody)
    y = x * 2
    with pytest.raises(RemoteError, match=r"history.*detach.*isolation off"):
        y.send(ann)
    assert torch.equal(y.get(), torch.arange(3.0) * 2)


def test_a_plan_moves(ann, nobody):
    @func2plan(args_shape=[(2,)])
    def plus(x):
        return x + 1

    there = plus.send(nobody)
    there.move(ann)
    assert torch.equal(there(torch.ones(2).send(ann)).get(), torch.full((2,), 2.0))


def test_shares_between_isolated_workers_whose_dealer_is_isolated_too(ann, nobody, carl):
    among = {"crypto_provider": carl}
    x = torch.tensor([1.5, -2.0]).fix_precision().share(ann, nobody, **among)
    y = torch.tensor([2.0, 3.0]).fix_precision().share(ann, nobody, **among)
    assert torch.allclose((x * y).get().float_precision(), torch.tensor([3.0, -6.0]), atol=1e-2)
    held = torch.tensor([4.0, 5.0]).send(ann).fix_precision()
    z = held.share(ann, nobody, **among)
    assert torch.allclose(z.get().get().float_precision(), torch.tensor([4.0, 5.0]), atol=1e-2)


@pytest.fixture
def second(request, nobody):
    """The second party: one that knows no users, or one where ann is a user, too, so that others act for her there."""
    if request.param == "nobody":
        yield nobody
        return
    with served(request, id="dan", users=USERS, table=1).connect("ann") as worker:
        yield worker


@pytest.mark.parametrize("second", ["nobody", "ann"], indirect=True)
def test_a_joint_run_between_isolated_workers(ann, second, carl):
    left = Party(ann, "t", "id", ["a", "b"])
    right = Party(second, "t", "who", ["c", "d", "e"], label="y")
    about = {"epochs": 1, "batch_size": 20, "lr": 0.1, "seed": 5}
    with logistic_regression(
        left, right, key_holder=carl, normalise="casefold", standardise=False, **about, **SHORT
    ) as run:
        assert run.people == 40
        losses = run.fit()
    _, expected = trained(*joined(whole(), seed=5), "logistic", **about)
    assert losses == pytest.approx(expected, abs=1e-5)


def test_what_is_between_processes_is_not_for_clients(ann):
    with pytest.raises(RemoteError, match="does not take messages of type Lend"):
        planrt.loop.run(ann.ask(m.Lent, m.Lend([5])), instead="-")


def test_a_search_does_not_wait_for_another_users_process_that_has_ended(alice, ann, ben):
    torch.ones(2).tag("#gone").send(ann)
    search(ben, "#gone")
    for one in alice.processes():
        os.kill(one, signal.SIGKILL)
    until(lambda: ends(ann) and ends(ben))  # the worker knows by then
    with alice.connect("ben") as again:
        assert again.search("#gone") == []


def test_a_user_that_is_taken_out_loses_the_process_and_the_others_notice_nothing(request, tmp_path):
    path = tmp_path / "users"
    for name, token in USERS.items():
        users_file.add(path, name, token)
    server = served(request, id="dora", users=str(path), require_user=True)
    with server.connect("ann") as ann, server.connect("ben") as ben:
        x, y = torch.ones(2).send(ann), torch.ones(2).send(ben)
        assert torch.equal((x + 1).get(), torch.full((2,), 2.0))
        users_file.remove(path, "ann")
        until(lambda: ends(ann))
        with pytest.raises(HandshakeError):
            server.connect("ann")
        assert torch.equal((y + 1).get(), torch.full((2,), 2.0))
        users_file.add(path, "ann", USERS["ann"])
        until(lambda: gets_in(server, "ann"))
        assert len([one for one in server.processes() if not gone([one])]) == 2


def ends(worker):
    try:
        worker.objects_count()
    except PlanrtError:
        return True
    return False


def gets_in(server, user):
    try:
        server.connect(user).close()
    except HandshakeError:
        return False
    return True
