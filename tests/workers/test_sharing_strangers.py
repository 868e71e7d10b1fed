"""Parties that deviate, users at the same workers, calls at once, connections that are lost: through public calls."""

import asyncio
import contextlib
import threading

import pytest
import torch

import planrt as sy
from planrt.errors import SharingError
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.client.workplace import RemoteWorkplace
from planrt.workers.machine.sharing.groups import Group
from planrt.workers.machine.sharing.parties import PartyOps
from planrt.workers.wire import messages as m

pytestmark = pytest.mark.usefixtures("warm_workers")

sy.TorchHook(torch)
X = torch.tensor([[0.5, -1.25], [2.0, 0.25]])

DEVIATIONS = {
    "another shape": (lambda body, parts: [(body, [one.reshape(-1) for one in parts])], "party 'alice' opened"),
    "another dtype": (lambda body, parts: [(body, [one.to(torch.int32) for one in parts])], "party 'alice' opened"),
    "fewer": (lambda body, parts: [(body, parts[:-1])], "party 'alice' opened"),
    "out of order": (lambda body, parts: [(m.Opening(body.group, body.number + 1), parts)], "party 'alice' sent"),
    "twice": (lambda body, parts: [(body, parts)] * 2, "party 'alice' sent"),
    "nothing": (lambda body, parts: [], "party 'alice' did not answer within 10 s"),
}  # fmt: skip


@pytest.fixture
def workers(make_worker):
    return [make_worker(name) for name in ("bob", "alice", "james")]


def shared(workers, values=X, **options):
    bob, alice, james = workers
    return values.fix_precision(base=2, precision_fractional=16).share(
        bob, alice, crypto_provider=james, **options
    )


def deviate(monkeypatch, change):
    """What alice opens reaches bob as `change` makes it, from now on."""
    arrived = Group.arrived

    def instead(self, session, body, parts):
        if self.members.get(session) != 1:
            arrived(self, session, body, parts)
            return
        for other, changed in change(body, parts):
            arrived(self, session, other, changed)

    monkeypatch.setattr(Group, "arrived", instead)


@pytest.mark.parametrize("kind", DEVIATIONS)
def test_a_party_that_does_not_keep_to_the_protocol_is_named_and_nothing_is_opened(
    kind, workers, monkeypatch
):
    change, says = DEVIATIONS[kind]
    x = shared(workers, timeout=10.0 if kind == "nothing" else 60.0)
    with monkeypatch.context() as patch:
        deviate(patch, change)
        with pytest.raises(SharingError, match=says):
            (x * x).relu().get()
        with pytest.raises(SharingError):  # the group is over: no part of it is handed out
            x.get()
    again = shared(workers, timeout=30.0)
    assert ((again * again).relu().get() - X * X).abs().max() < 1e-3


def _first(change):
    return lambda body, tensors: [(body, [change(tensors[0]), *tensors[1:]])]


def _numbers(change):
    return lambda body, tensors: [(m.Corrections(body.group, change(body.numbers)), tensors)]


DEALT = {
    "another shape": _first(lambda one: one.reshape(-1)),
    "none of the entries": _first(lambda one: one[:0]),
    "another dtype": _first(lambda one: one.to(torch.int16)),
    "fractions": _first(lambda one: torch.full_like(one, torch.nan, dtype=torch.float64)),
    "fewer": lambda body, tensors: [(body, tensors[:-1])],
    "more": lambda body, tensors: [(body, [*tensors, tensors[0]])],
    "none": lambda body, tensors: [(body, [])],
    "other numbers": _numbers(lambda numbers: [one + 1 for one in numbers]),
    "backwards": _numbers(lambda numbers: numbers[::-1]),
    "fewer numbers": _numbers(lambda numbers: numbers[:-1]),
    "more numbers": _numbers(lambda numbers: [*numbers, numbers[-1] + 1]),
    "no numbers": _numbers(lambda numbers: []),
    "twice": lambda body, tensors: [(body, tensors)] * 2,
    "nothing": lambda body, tensors: [],
}


@pytest.mark.parametrize("kind", DEALT)
def test_a_dealer_that_does_not_keep_to_the_protocol_is_named_and_ends_that_group_alone(
    kind, workers, monkeypatch
):
    x, other = shared(workers, timeout=10.0 if kind == "nothing" else 60.0), shared(workers, timeout=61.0)
    dealt = Group.dealt

    def instead(self, session, body, tensors):
        change = DEALT[kind] if self.about.group == x.session.group else lambda *same: [same]
        for one in change(body, list(tensors)):
            dealt(self, session, *one)

    with monkeypatch.context() as patch:
        patch.setattr(Group, "dealt", instead)
        with pytest.raises(SharingError, match="the dealer, worker 'james', (sent|did not answer)"):
            (x * x).relu().get()
        with pytest.raises(SharingError):
            x.get()
        assert ((other * other).relu().get() - X * X).abs().max() < 1e-3
    again = shared(workers, timeout=30.0)
    assert ((again * again).relu().get() - X * X).abs().max() < 1e-3


@pytest.mark.parametrize("without", [[0], [1], [0, 1]], ids=["bob", "alice", "both"])
def test_a_dealer_that_gives_no_seed_is_named(without, workers, monkeypatch):
    take = PartyOps.take_seed

    def instead(self, session, body):
        if self._groups[body.group].about.number not in without:
            yield from take(self, session, body)
        return m.Done(), ()

    monkeypatch.setattr(PartyOps, "take_seed", instead)
    x = shared(workers)
    with pytest.raises(SharingError, match="worker 'james', has given this party no seed"):
        (x * x).get()


GIVEN = {
    "another shape": lambda body, tensors: (body, [tensors[0].reshape(-1)]),
    "another dtype": lambda body, tensors: (body, [tensors[0].int()]),
    "fractions": lambda body, tensors: (body, [tensors[0].double()]),
    "none": lambda body, tensors: (body, []),
    "two": lambda body, tensors: (body, tensors * 2),
    "another scale": lambda body, tensors: (m.FetchedShare(body.scale * 2), tensors),
}


@pytest.mark.parametrize("who", [["bob"], ["alice"], ["bob", "alice"]], ids=" and ".join)
@pytest.mark.parametrize("kind", GIVEN)
def test_parts_that_are_none_of_the_tensor_are_not_added_up(kind, who, workers, monkeypatch):
    y, ask = shared(workers) * 2, RemoteWorkplace.ask

    async def instead(self, wanted, body, *args, **kwargs):
        found = await ask(self, wanted, body, *args, **kwargs)
        return GIVEN[kind](*found) if wanted is m.FetchedShare and self.worker.id in who else found

    with monkeypatch.context() as patch:
        patch.setattr(RemoteWorkplace, "ask", instead)
        if kind == "another scale" and len(who) == 2:  # wrong values, of which there is nothing to be seen
            assert torch.allclose(y.get(), X, atol=1e-3)
        else:
            with pytest.raises(SharingError, match=rf"part.*{who[0]}"):
                y.get()
    assert (y.get() - 2 * X).abs().max() < 1e-3


@pytest.mark.parametrize("whose", ["a party's", "the dealer's", "parts"])
def test_wrong_values_are_not_noticed(whose, workers, monkeypatch):
    """As docs/sharing.md says: the protocol is for parties that follow it. The result is wrong, and that is all."""
    x = shared(workers)
    dealt, ask = Group.dealt, RemoteWorkplace.ask

    async def asked(self, wanted, *args, **kwargs):
        body, tensors = await ask(self, wanted, *args, **kwargs)
        return body, [one + 2**40 for one in tensors] if wanted is m.FetchedShare else tensors

    with monkeypatch.context() as patch:
        if whose == "a party's":
            deviate(patch, lambda body, parts: [(body, [one + 2**40 for one in parts])])
        elif whose == "the dealer's":
            patch.setattr(Group, "dealt", lambda self, session, body, tensors: dealt(
                self, session, body, [one + 2**40 if one.dtype == torch.int64 else one for one in tensors]
            ))  # fmt: skip
        else:
            patch.setattr(RemoteWorkplace, "ask", asked)
        assert ((x * x).get() - X * X).abs().max() > 1
    again = shared(workers)  # what was opened of the first one stays wrong
    assert ((again * again).get() - X * X).abs().max() < 1e-3


# ---------------------------------------------------------------------------------------------------- at once


@sy.func2plan()
def step(x, w):
    w = w.detach().requires_grad_()
    loss = ((x @ w).relu() ** 2).mean()
    loss.backward()
    return loss.detach(), w.detach() - 0.1 * w.grad


STEPS = 3
USERS = {"ann": "pTq7-Lm2x_VzR9sK", "ben": "hW4k+Jd8y/NcB3fG"}


def stepped(w):
    x, losses = X, []
    for _ in range(STEPS):
        leaf = w.detach().requires_grad_()
        loss = ((x @ leaf).relu() ** 2).mean()
        loss.backward()
        w = leaf.detach() - 0.1 * leaf.grad
        losses.append(loss.detach())
    return losses, w


def in_threads(*functions):
    """Runs all at once; raises what one of them raised."""
    failed = []

    def caught(function):
        try:
            function()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=caught, args=(one,)) for one in functions]
    for one in threads:
        one.start()
    for one in threads:
        one.join(120)
    assert not any(one.is_alive() for one in threads)
    if failed:
        raise failed[0]


def trains(workers, seed):
    """A function that trains by the plan `step` on shares, and compares with plain tensors."""
    start = torch.randn(2, 1, generator=torch.Generator().manual_seed(seed))

    def run():
        x, w = shared(workers), shared(workers, start)
        losses = []
        for _ in range(STEPS):
            loss, w = step(x, w)
            losses.append(loss)
        expected, end = stepped(start)
        for one, other in zip(losses, expected, strict=True):
            assert (one.get() - other).abs() < 2e-3
        assert (w.get() - end).abs().max() < 2e-3

    return run


def test_two_users_call_one_plan_at_the_same_workers(transport):
    step.build(X, torch.zeros(2, 1))
    with contextlib.ExitStack() as stack:
        of_users = {name: [] for name in USERS}
        for name in ("bob", "alice", "james"):
            if transport == "memory":
                worker = stack.enter_context(VirtualWorker(name, users=USERS, token=USERS["ann"]))
                clients = [worker, stack.enter_context(worker.connect_as(USERS["ben"]))]
            else:
                uri = stack.enter_context(WebsocketServerWorker(name, threads=1, users=USERS).running())
                clients = [
                    stack.enter_context(WebsocketClientWorker(name, uri=uri, token=token))
                    for token in USERS.values()
                ]
            for user, client in zip(USERS, clients, strict=True):
                of_users[user].append(client)
        sent = [step.send(*workers[:2]) for workers in of_users.values()]
        in_threads(*(trains(workers, seed) for seed, workers in enumerate(of_users.values())))
        ann, ben = of_users.values()
        with pytest.raises(SharingError, match="different"):
            (shared(ann) + shared(ben)).get()
        del sent


def test_threads_and_tasks_of_one_client(workers):
    step.build(X, torch.zeros(2, 1))
    in_threads(*(trains(workers, seed) for seed in range(3)))
    x = shared(workers)

    async def opened():
        return await asyncio.gather(*((x * number).async_get() for number in range(1, 6)))

    for number, one in enumerate(asyncio.run(opened()), 1):
        assert (one - X * number).abs().max() < 1e-3


# ------------------------------------------------------------------------------------- connections that are lost


@pytest.mark.parametrize("lost", [0, 1, 2], ids=["bob", "alice", "the dealer"])
def test_shares_are_not_gone_on_with_after_a_connection_is_made_anew(lost, workers):
    """Neither a number nor a mask of before: what was shared is told to be gone, and is shared anew."""
    x = shared(workers)
    y = x * x
    assert (y.get() - X * X).abs().max() < 1e-3
    before = x.session
    workers[lost].close()
    workers[lost].connect()
    for call in (lambda: (x * x).get(), lambda: (y + 1).get()):
        with pytest.raises(SharingError, match="gone|over|lost|closed"):
            call()
    again = shared(workers)
    assert again.session is not before
    assert again.session.group != before.group  # so new seeds: no mask is used twice
    assert ((again * again).get() - X * X).abs().max() < 1e-3
    with pytest.raises(SharingError):
        (again + x).get()
    assert ((again + again).get() - 2 * X).abs().max() < 1e-3


def test_what_is_under_way_goes_on_when_its_last_share_is_gone(workers):
    """Whole numbers that went over to fractions of another precision, which is another group: theirs is over then."""
    bob, alice, james = workers
    whole, x = torch.arange(600) - 300, shared(workers, torch.full((600,), 0.5), timeout=60)
    for _ in range(5):
        numbers = whole.share(bob, alice, crypto_provider=james, timeout=60)
        signs = (numbers > 2).float() * x
        del numbers
        assert torch.allclose(signs.get(), (whole > 2) * 0.5, atol=1e-3)
