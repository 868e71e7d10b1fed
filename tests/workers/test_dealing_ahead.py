"""A dealer that makes what is likely to be asked for next: it is the same, leaves once, and is dropped if it is not."""

import contextlib

import pytest
import torch
from torch import nn

import planrt
from planrt.errors import PolicyRefusedError, SharingError
from planrt.plans.policy.rules import Policy
from planrt.sharing.programs.needs import Piece
from planrt.sharing.requests import Base
from planrt.sharing.tensors.shared import share, share_module
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.sharing import dealers
from planrt.workers.machine.sharing.ahead import Ahead
from planrt.workers.machine.sharing.groups import Group
from planrt.workers.shares.session import sharing_session

planrt.TorchHook(torch)
NAMES = ("bob", "alice", "james")


@pytest.fixture
def connect(transport):
    """Makes a session of new workers, whose server has the given options."""
    with contextlib.ExitStack() as stack:

        def made(**options):
            workers = []
            for name in NAMES:
                if transport == "memory":
                    workers.append(stack.enter_context(VirtualWorker(name, auto_add=False, **options)))
                else:
                    server = WebsocketServerWorker(name, threads=1, **options)
                    uri = stack.enter_context(server.running())
                    workers.append(stack.enter_context(WebsocketClientWorker(name, uri=uri, auto_add=False)))
            return sharing_session(workers[:2], workers[2])

        yield made


@pytest.fixture
def taken(monkeypatch):
    """For each question of a dealer's, how many corrections had been made ahead."""
    found = []
    take = Ahead.take

    def noted(self, asked):
        made = take(self, asked)
        found.append(len(made))
        return made

    monkeypatch.setattr(Ahead, "take", noted)
    return found


def trained(session, steps):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x, y = torch.randn(8, 6), torch.randn(8, 2)
    if session is not None:
        model, x, y = share_module(session, model), share(session, x), share(session, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).sum() / 8
        loss.backward()
        optimizer.step()
        losses.append(loss.detach() if session is None else loss.detach().get())
    return torch.stack(losses)


def test_a_training_loop_is_dealt_for_ahead(connect, taken):
    losses = trained(connect(), 10)
    assert torch.allclose(losses, trained(None, 10), atol=2e-3)
    assert sum(one > 0 for one in taken[-8:]) >= 3, taken


def test_other_things_in_between_are_right(connect, taken):
    session = connect()
    x, y = torch.tensor([1.5, -2.0, 0.25]), torch.tensor([2.0, 3.0, -4.0])
    a, b = share(session, x), share(session, y)
    for step in range(12):
        assert torch.allclose((a * b).relu().get(), (x * y).relu(), atol=1e-3)
        if step % 5 == 4:
            assert torch.equal((a > b).get(), (x > y).to(torch.int64))
            assert torch.allclose((a + step).relu().get(), (x + step).relu(), atol=1e-3)
    assert any(taken)
    assert not all(taken[3:]), "some of it was not foreseen"


def sent(connect, monkeypatch, most):
    """What the last party is sent by a dealer that works ahead for so many bytes, of the same seeds and programs."""
    monkeypatch.setattr(dealers, "_AHEAD", most)
    seeds = iter([bytes([number]) * 16 for number in range(1, 50)])
    monkeypatch.setattr(dealers, "new_seed", lambda: next(seeds))
    found = []
    dealt = Group.dealt

    def noted(self, session, body, tensors):
        numbers = list(body.numbers)
        found.extend([(numbers, [one.clone() for one in tensors])])
        return dealt(self, session, body, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(Group, "dealt", noted)
        session = connect()
        a, b = share(session, torch.arange(6.0).reshape(2, 3)), share(session, torch.ones(2, 3))
        for step in range(8):
            (a * b).relu().get()
            if step == 5:
                (a - b).amax(1).get()
    return found


def test_what_is_sent_does_not_depend_on_when_it_was_made(connect, monkeypatch, taken):
    ahead = sent(connect, monkeypatch, 1 << 25)
    assert any(taken)
    taken.clear()
    plain = sent(connect, monkeypatch, -1)
    assert not any(taken)
    assert [numbers for numbers, _ in ahead] == [numbers for numbers, _ in plain]
    every = [number for numbers, _ in ahead for number in numbers]
    assert every == sorted(set(every)), "each number leaves once, in order"
    for (_, ones), (_, others) in zip(ahead, plain, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def pieces(count):
    return [Piece((), 0) for _ in range(count)]


def test_what_is_expected():
    (step,) = pieces(1)
    ahead = Ahead()
    for start in (10, 30, 50):
        assert ahead.expected() is None
        ahead.take([(step, Base(start, (4, start - 3)))])
    assert ahead.expected() == [(step, Base(70, (4, 67)))]


def test_two_that_take_turns_are_expected():
    forward, backward = pieces(2)
    ahead = Ahead()
    for start in (0, 100, 200):
        ahead.take([(forward, Base(start, ()))])
        ahead.take([(backward, Base(start + 40, (start + 2,)))])
    assert ahead.expected() == [(forward, Base(300, ()))]
    ahead.take([(forward, Base(300, ()))])
    assert ahead.expected() == [(backward, Base(340, (302,)))]


@pytest.mark.parametrize(
    "bases",
    [
        [Base(10, (1,)), Base(20, (1,)), Base(31, (1,))],  # other things came in between
        [Base(10, (1,)), Base(20, (3,)), Base(30, (2,))],  # masks of neither kind
        [Base(10, (1,)), Base(20, (1, 2)), Base(30, (1,))],
    ],
)
def test_what_does_not_go_on_alike_is_not_expected(bases):
    (step,) = pieces(1)
    ahead = Ahead()
    for base in bases:
        ahead.take([(step, base)])
    assert ahead.expected() is None


def test_what_was_made_is_for_one_question_alone():
    step, other = pieces(2)
    freed = []
    expected = [(step, Base(30, (4,)))]
    for asked in ([(step, Base(30, (5,)))], [(step, Base(31, (4,)))], [(other, Base(30, (4,)))], expected):
        ahead = Ahead()
        ahead.keep(expected, {30: [torch.ones(1)]}, lambda: freed.append(1))
        assert ahead.fits(asked) == (asked is expected)
        assert list(ahead.take(asked)) == ([30] if asked is expected else [])
        assert ahead.take(asked) == {}, "and once"
    assert len(freed) == 4


def test_what_follows_is_remembered_for_so_many():
    ahead = Ahead()
    for number, piece in enumerate(pieces(200)):
        ahead.take([(piece, Base(number, ()))])
    assert len(ahead._next) <= 64


@pytest.mark.parametrize(("memory", "ahead"), [(160_000, False), (1_000_000, True)])
def test_who_may_keep_too_little_is_dealt_for_when_asked(connect, taken, memory, ahead):
    policy = Policy(approval="open", max_session_memory=memory, max_worker_memory=None)
    values = torch.linspace(-2, 2, 3000)  # of which a relu takes 183,000 bytes of the dealer
    a = share(connect(policy=policy), values)
    for _ in range(6):
        assert torch.allclose((a + 0.5).relu().get(), (values + 0.5).relu(), atol=1e-3)
    assert any(taken) == ahead


def test_what_is_made_ahead_is_paid_for_and_refused_when_it_is_asked_for(connect, taken):
    policy = Policy(approval="open", max_session_flops=60_000_000)
    values = torch.linspace(-2, 2, 300)
    a = share(connect(policy=policy), values)
    found = []

    def often():
        for _ in range(200):
            found.append((a + 0.5).relu().get())

    with pytest.raises((SharingError, PolicyRefusedError), match="max_session_flops"):
        often()
    assert len(found) > 3
    assert all(torch.allclose(one, (values + 0.5).relu(), atol=1e-3) for one in found)
    assert any(taken)
