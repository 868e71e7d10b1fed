"""Sharing between workers, as its client sees it: on both transports, compared with plain PyTorch."""

import contextlib
import copy
import gc
import itertools
import os
import signal

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional

import planrt
from planrt.errors import (
    GetNotPermittedError,
    LocalError,
    NotApprovedError,
    OptionError,
    SharingError,
    ValueRangeError,
)
from planrt.plans.policy.rules import Policy
from planrt.sharing.kernels import Share
from planrt.sharing.randomness import Stream
from planrt.sharing.tensors.batches import Value
from planrt.sharing.tensors.in_process import InProcessSession
from planrt.sharing.tensors.shared import SharedTensor, share, share_module
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.events import Wait
from planrt.workers.machine.sharing import dealers
from planrt.workers.machine.sharing.parties import PartyOps
from planrt.workers.shares import session as sessions
from planrt.workers.shares.session import sharing_session

pytestmark = pytest.mark.usefixtures("warm_workers")


planrt.TorchHook(torch)
NAMES = ["bob", "alice", "charlie", "dan"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def among(make_worker):
    """``among(3)`` -> the session of three workers, and a fourth one as its dealer."""

    def make(count=2, **options):
        workers = [make_worker(name) for name in NAMES[:count]]
        return sharing_session(workers, make_worker("james"), **options)

    return make


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def trained(model, x, y, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.get() if isinstance(loss, SharedTensor) else loss)
    return losses


@pytest.mark.parametrize("count", [2, 3, 4])
def test_operations_and_gradients(among, count):
    session = among(count)
    x, y = random(4, 5), random(5, 3, seed=1)
    here, there = x.clone().requires_grad_(), share(session, x).requires_grad_()
    expected, found = (here @ y).relu() * 2 + 1, (there @ share(session, y)).relu() * 2 + 1
    assert (found.get() - expected).abs().max() < 1e-3
    expected.sum().backward()
    found.sum().backward()
    assert (there.grad.get() - here.grad).abs().max() < 1e-3


@pytest.mark.parametrize("count", [2, 3])
def test_a_network_trains_as_it_does_in_the_clear_and_in_one_process(among, count, monkeypatch):
    def seeds(first):
        numbers = itertools.count(first)
        return lambda: next(numbers).to_bytes(16, "big")

    monkeypatch.setattr(dealers, "new_seed", seeds(1))
    monkeypatch.setattr(sessions, "new_seed", seeds(1000))
    x, y = random(12, 8, seed=1), random(12, 3, seed=2)
    plain, there = network(), network()
    expected = trained(plain, x, y)
    session = among(count)
    share_module(session, there)
    found = trained(there, share(session, x), share(session, y))
    for one, other in zip(expected, found, strict=True):
        assert (one - other).abs() < 1e-3
    parameters = [one.get() for one in there.parameters()]
    for one, other in zip(plain.parameters(), parameters, strict=True):
        assert (one - other).abs().max() < 1e-3

    other = InProcessSession(
        count, at_once=10_000, seeds=[one.to_bytes(16, "big") for one in range(1, count + 1)]
    )
    make = seeds(1000)

    def split(values, scale):
        parts = [Stream(make()).ring(values.shape) for _ in range(count - 1)]
        parts.append(values - sum(parts))
        return Value(other, place=[Share(part, scale) for part in parts])

    monkeypatch.setattr(other, "share", split)
    here = share_module(other, network())
    trained(here, share(other, x), share(other, y))
    for one, two in zip(here.parameters(), parameters, strict=True):
        assert torch.equal(one.get(), two)


def test_a_training_step_is_one_message_to_each_party_and_its_traffic_is_counted(among):
    session = among(3)
    x, y = share(session, random(12, 8, seed=1)), share(session, random(12, 3, seed=2))
    model = share_module(session, network())
    trained(model, x, y, steps=2)
    messages = [one.traffic.messages_sent for one in session._workers]
    before = session.traffic()
    trained(model, x, y, steps=1)
    after = session.traffic()
    for one, earlier in zip(session._workers, messages, strict=True):
        assert (
            one.traffic.messages_sent - earlier <= 6
        )  # the program, the loss, what is dropped, and twice the traffic
    rounds = {after[name].rounds - before[name].rounds for name in after}
    assert len(rounds) == 1
    assert 5 < rounds.pop() < 40
    assert [after[name].dealt > 0 for name in NAMES[:3]] == [False, False, True]
    for name in NAMES[:3]:
        assert after[name].sent == after[name].received > before[name].sent


def test_what_nobody_has_any_more_goes_from_the_parties(among):
    session = among(2)
    x = share(session, random(30))
    y = (x * x).relu()
    y.get()
    assert [one.objects_count() for one in session._workers] == [2, 2]
    del y
    gc.collect()
    assert [one.objects_count() for one in session._workers] == [1, 1]
    assert sharing_session(session._workers, session._dealer) is session
    workers = session._workers
    del x, session
    gc.collect()
    assert [one.objects_count() for one in workers] == [0, 0]


def test_shared_from_the_worker_that_has_it(among, make_worker):
    session = among(2)
    values = random(6, 5)
    eve = make_worker("eve")
    for holder in (eve, session._workers[0]):  # somebody else, and a party
        received = holder.traffic.bytes_received
        pointer = values.clone().requires_grad_().send(holder)
        shared = session.share_from(pointer)
        assert holder.traffic.bytes_received - received < 6 * 5 * 8
        assert shared.requires_grad
        assert (shared.get() - values).abs().max() < 1e-4
        assert ((shared * shared).get() - values**2).abs().max() < 1e-3
        assert torch.equal(pointer.get(), values)
    with pytest.raises(ValueRangeError, match="'eve'.*values lie between"):
        session.share_from((values * 1e20).send(eve))


def test_private_tensors_are_shared_by_who_may_read_them(transport, make_worker):
    users = {"ann": "pTq7-Lm2x_VzR9sK", "ben": "hW4k+Jd8y/NcB3fG"}
    with contextlib.ExitStack() as stack:
        if transport == "memory":
            ann = stack.enter_context(VirtualWorker("clinic", users=users, token=users["ann"]))
            ben = stack.enter_context(ann.connect_as(users["ben"]))
        else:
            uri = stack.enter_context(WebsocketServerWorker("clinic", threads=1, users=users).running())
            ann, ben = (
                stack.enter_context(WebsocketClientWorker("clinic", uri=uri, token=token))
                for token in users.values()
            )
        session = sharing_session([make_worker("bob"), make_worker("alice")], make_worker("james"))
        own = torch.tensor([1.0, 2.0]).tag("#scores").send(ann, allowed_users=["ann"])
        ann.objects_count()
        (found,) = ben.search("#scores")
        with pytest.raises(GetNotPermittedError, match="private.*ann.*may share it"):
            session.share_from(found)
        with pytest.raises(GetNotPermittedError, match="private.*nobody"):
            session.share_from(torch.ones(2).send(ann, private=True))
        shared = session.share_from(own)
        with pytest.raises(
            GetNotPermittedError, match="private"
        ):  # its parts keep the label, and bob knows no ann
            (shared + 1).get()


def test_wrong_parties(make_worker):
    bob, alice, james = make_worker("bob"), make_worker("alice"), make_worker("james")
    for workers, provider, error, says in (
        ([bob], james, SharingError, "two parties or more, not 1"),
        ([], james, SharingError, "two parties or more"),
        ([bob, bob], james, SharingError, "'bob' is given twice"),
        ([bob, alice], bob, SharingError, "a party and the crypto provider"),
        ([bob, "alice"], james, OptionError, "between workers, not str"),
        ([bob, alice], None, OptionError, "between workers, not NoneType"),
    ):
        with pytest.raises(error, match=says):
            sharing_session(workers, provider)
    assert bob.objects_count() == 0


def test_mixed_sessions(among, make_worker):
    session = among(2)
    bob, alice = session._workers
    others = [
        sharing_session([bob, alice], session._dealer, scale=1000),
        InProcessSession(2),
        sharing_session([alice, bob], make_worker("dan")),
        sharing_session([alice, bob], session._dealer, timeout=7),
    ]
    x = share(session, random(3))
    says_of = ("different precisions", "different parties", "providers james and dan", "same timeout=")
    for other, says in zip(others, says_of, strict=True):
        with pytest.raises(SharingError, match=says):
            x + share(other, random(3))
    assert (share(others[0], random(3)).get() - random(3)).abs().max() < 1e-2
    assert (x.get() - random(3)).abs().max() < 1e-4


@pytest.mark.parametrize("count", [2, 3])
def test_parties_may_be_named_in_any_order(make_worker, count):
    """They hold parts of one sum each: who is named first is all the same, as it was in PySyft 0.2."""
    workers, dealer = [make_worker(name) for name in NAMES[:count]], make_worker("james")
    x, y, w = random(4, 5), random(4, 5, seed=1), random(5, 2, seed=2)
    shared = [
        one.fix_precision().share(*order, crypto_provider=dealer, requires_grad=True)
        for one, order in zip((x, y, w), (workers, workers[::-1], [*workers[1:], workers[0]]), strict=True)
    ]
    ((shared[0] * shared[1]).relu() @ shared[2]).sum().backward()
    plain = [one.clone().requires_grad_() for one in (x, y, w)]
    ((plain[0] * plain[1]).relu() @ plain[2]).sum().backward()
    for one, two in zip(shared, plain, strict=True):
        assert (one.grad.get().float_precision() - two.grad).abs().max() < 0.02
        assert (one.get().float_precision() - two).abs().max() < 0.002


def test_a_dealer_whose_randomness_repeats_is_refused(make_worker, monkeypatch):
    """As that of a machine that was copied, or set back to a snapshot: masks would come twice."""
    parties, dealer = [make_worker(name) for name in NAMES[:2]], make_worker("james")
    drawn = [bytes([number]) * 16 for number in (1, 2, 3, 2)]
    monkeypatch.setattr(dealers, "new_seed", lambda: drawn.pop(0))
    x = share(sharing_session(parties, dealer), random(3))
    with pytest.raises(SharingError, match="a seed that it has given before, so its randomness repeats"):
        share(sharing_session(parties, dealer, scale=1000), random(3))
    assert (x.get() - random(3)).abs().max() < 1e-4
    monkeypatch.undo()
    assert (
        share(sharing_session(parties, dealer, scale=1000), random(3)).get() - random(3)
    ).abs().max() < 1e-2


def test_a_call_that_cannot_be_done_fails_alone(among):
    session = among(2)
    x = share(session, random(3))
    bad, good = x**1.3, x * 2
    assert (good.get() - random(3) * 2).abs().max() < 1e-3
    for one in (bad, bad + 1):
        with pytest.raises(SharingError, match="party 'bob'.*whole numbers, halves and quarters"):
            one.get()
    assert session.is_open
    x += 1
    assert (x.get() - random(3) - 1).abs().max() < 1e-3


def test_a_new_session_after_the_connection_was_lost(among):
    session = among(2)
    x = share(session, random(3))
    first, second = session._workers
    second.close()
    with pytest.raises(SharingError, match="'alice' is gone"):
        x.get()
    second.connect()
    with pytest.raises(SharingError):
        x.get()
    again = sharing_session([first, second], session._dealer)
    assert again is not session
    assert ((share(again, random(3)) * 2).get() - 2 * random(3)).abs().max() < 1e-3


def test_an_owner_who_approves_plans_runs_no_operations(tmp_path):
    policy = Policy(approval="ask")
    with (
        VirtualWorker("owner", policy=policy, approvals=tmp_path) as owner,
        VirtualWorker("bob") as bob,
        VirtualWorker("james") as james,
    ):
        session = sharing_session([bob, owner], james)
        x = share(session, random(3))
        with pytest.raises(NotApprovedError, match="mul on shares: this worker runs plans"):
            (x * x).get()
        with pytest.raises((SharingError, NotApprovedError)):  # and no part is opened any more
            x.get()


def test_shares_are_not_sent(among, make_worker):
    x = share(among(2), random(3))
    with pytest.raises(LocalError, match="no values here.*get"):
        x.send(make_worker("eve"))
    assert (x.get() - random(3)).abs().max() < 1e-4


def test_a_worker_that_is_gone(among):
    session = among(3)
    x = share(session, random(50))
    x.get()
    session._workers[1].close()
    with pytest.raises(SharingError, match="party '(alice|bob)'.*(gone|over)"):
        (x * x).get()
    assert not session.is_open
    with pytest.raises(SharingError):
        share(session, random(3)).get()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8])
def test_what_is_shared_stays_as_it_was_here(make_worker, dtype):
    parties, dealer = [make_worker(name) for name in NAMES[:3]], make_worker("james")
    session, holder = sharing_session(parties, dealer), make_worker("erin")
    values = (random(300, 301) * 50).abs().mul(8).round().div(8).to(dtype)  # exact in fixed point
    before = values.clone()
    pointer = values.send(holder)
    assert torch.equal(share(session, values).get(), before)
    assert torch.equal(share(session, values.T).get(), before.T)
    assert torch.equal(values, before)
    fixed = pointer.fix_precision() if dtype.is_floating_point else pointer
    there = fixed.share(*parties, crypto_provider=dealer).get()
    assert torch.allclose(there.get().double(), before.double(), atol=1e-3)
    assert torch.equal(pointer.get(), before)


def test_large_tensors_and_public_ones(among):
    session = among(2)
    x, known = random(300, 400), random(400, 50, seed=1)
    shared = share(session, x)
    y = shared @ known
    known_before = known.clone()
    known.zero_()
    assert (y.get() - x @ known_before).abs().max() < 2e-2
    assert (shared.mean().get() - x.mean()).abs() < 1e-3
    model = share_module(session, copy.deepcopy(network()))
    assert (model(share(session, random(7, 8))).get() - network()(random(7, 8))).abs().max() < 1e-3


@pytest.fixture(scope="module")
def processes():
    """Three parties and a dealer, each in a process of its own."""
    with planrt.local_workers("bob", "alice", "charlie", "james", threads=1) as workers:
        yield workers


def test_between_processes(processes):
    *workers, james = processes
    session = sharing_session(workers, james)
    x, y = random(12, 8, seed=1), random(12, 3, seed=2)
    plain, there = network(), share_module(session, network())
    trained(plain, x, y)
    trained(there, share(session, x), share(session, y))
    for one, other in zip(plain.parameters(), there.parameters(), strict=True):
        assert (one - other.get()).abs().max() < 1e-3


def test_the_local_worker_deals_for_workers_elsewhere(processes):
    """It dials them; they could not dial it."""
    session = sharing_session(processes[:2], planrt.local_worker)
    x = share(session, random(40))
    assert ((x * x).relu().get() - random(40) ** 2).abs().max() < 1e-3


def test_a_process_that_stands_still_is_named_after_the_time_out():
    """The last party alone waits for the dealer; the others wait for that one, and do not name it."""
    with planrt.local_workers("bob", "alice", "carol", "james", threads=1) as (bob, alice, carol, james):
        with planrt.waiting(60):  # they know each other, and have dialled
            share(sharing_session([bob, alice, carol], james), random(3)).get()
        session = sharing_session([bob, alice, carol], james, timeout=10)
        x = share(session, random(20))
        x.get()
        (pid,) = _pids(james)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(SharingError, match="dealer, worker 'james', did not answer within 10 s"):
                (x * x).get()
        finally:
            os.kill(pid, signal.SIGCONT)


def test_a_process_that_stands_still_before_anything_is_shared_is_named_too():
    """Whoever it is: its client waits for a party directly, and for others that wait for it."""
    with planrt.local_workers("bob", "alice", "carol", "james", threads=1) as workers:
        *parties, james = workers
        with planrt.waiting(60):  # they know each other, and have dialled
            share(sharing_session(parties, james), random(3)).get()
        for one in workers:
            (pid,) = _pids(one)
            os.kill(pid, signal.SIGSTOP)
            try:
                with pytest.raises(SharingError, match=f"'{one.id}',? did not answer within 3 s"):
                    sharing_session(parties, james, timeout=3)
            finally:
                os.kill(pid, signal.SIGCONT)
            x = share(sharing_session(parties, james, timeout=60), random(20))
            assert ((x * x).get() - random(20) ** 2).abs().max() < 1e-3


def test_a_dealer_that_never_answers_is_waited_for_no_longer_than_the_time_out(make_worker, monkeypatch):
    """It waits for alice, who is alive, and does not answer it."""
    bob, alice, james = (make_worker(name) for name in ("bob", "alice", "james"))
    take_seed = PartyOps.take_seed

    def never(self, session, body):
        about = self._groups[body.group].about
        if about.parties[about.number].worker == "alice":
            yield Wait(f"never:{body.group}")
        return (yield from take_seed(self, session, body))

    with monkeypatch.context() as patch:
        patch.setattr(PartyOps, "take_seed", never)
        with pytest.raises(SharingError, match="'james' did not answer within 3 s"):
            sharing_session([bob, alice], james, timeout=3)
    x = share(sharing_session([bob, alice], james, timeout=60), random(20))
    assert ((x * x).get() - random(20) ** 2).abs().max() < 1e-3


def _pids(*workers):
    """The processes that listen where these workers are."""
    ports = [int(one.address.rpartition(":")[2].rstrip("/")) for one in workers]
    found = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            for connection in child.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.port] = child.pid
    return [found[port] for port in ports]
