"""Plans called on shares: sent once to each party, one message a call, the same as op by op and as plain PyTorch."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import planrt as sy
from planrt import cli
from planrt.errors import NotApprovedError, PolicyRefusedError, SharingError
from planrt.plans.policy.approvals import Approvals
from planrt.plans.policy.rules import Policy
from planrt.sharing.tensors.in_process import InProcessSession
from planrt.sharing.tensors.shared import SharedTensor, share, share_module
from planrt.workers import VirtualWorker
from planrt.workers.machine.sharing import dealers, parties
from planrt.workers.shares import session as sessions
from planrt.workers.shares.session import sharing_session
from planrt.workers.wire import messages as m
from planrt.workers.wire import shared_plan
from planrt.workers.wire.posted import PostedOp

sy.TorchHook(torch)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def session(make_worker):
    return sharing_session([make_worker("bob"), make_worker("alice")], make_worker("james"))


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


@sy.func2plan(args_shape=[(4, 6), (6, 3)])
def product(x, w):
    return (x @ w).relu() * 2 + 1, x.sum()


def noting(kept, posted):
    def note(body, *rest):
        posted.append(body)
        return kept(body, *rest)

    return note


def messages(session, monkeypatch):
    """What the client sends to the parties from here on."""
    sent = [[] for _ in session._places]
    for place, posted in zip(session._places, sent, strict=True):
        for name in ("post", "post_op"):
            monkeypatch.setattr(place.connection, name, noting(getattr(place.connection, name), posted))
    return sent


def test_a_plan_is_sent_once_and_a_call_is_one_message(session, monkeypatch):
    x, w = random(4, 6), random(6, 3, seed=1)
    there = share(session, x), share(session, w)
    sent = messages(session, monkeypatch)
    for calls in (1, 2, 3):
        found, total = product(*there)
        assert isinstance(found, SharedTensor)
        assert found.shape == (4, 3)
        for posted in sent:
            plans = [one for one in posted if isinstance(one, m.StorePlan)]
            ops = [one for one in posted if isinstance(one, bytes)]
            assert (len(plans), len(ops), len(posted)) == (1, calls, 1 + calls)
        assert sent[0][1:] == sent[1][1:]  # the same bytes to every party
    expected = product(x, w)
    assert (found.get() - expected[0]).abs().max() < 1e-3
    assert (total.get() - expected[1]).abs() < 1e-3
    more = random(7, 6, seed=2)  # another batch
    assert (product(share(session, more), there[1])[0].get() - product(more, w)[0]).abs().max() < 1e-3


def test_what_is_public_is_sent_once(session, monkeypatch):
    plan = sy.func2plan(args_shape=[(4, 6)])(network())
    x = share(session, random(4, 6))
    sent = messages(session, monkeypatch)
    for _ in range(3):
        with torch.no_grad():
            found = plan(x)
    assert [len(one) for one in sent] == [1 + 4 + 3] * 2  # the plan, its state, three calls
    assert (found.get() - network()(random(4, 6))).abs().max() < 1e-3


def test_a_program_is_sent_once(session, monkeypatch):
    x, y = share(session, random(4, 6)), share(session, random(4, 6, seed=1))
    sent = messages(session, monkeypatch)
    for _ in range(3):
        found = (x * y).relu() + x
        assert (
            found.get() - ((random(4, 6) * random(4, 6, seed=1)).relu() + random(4, 6))
        ).abs().max() < 1e-3
    for posted in sent:
        first, second, third = (PostedOp.unpack(one).args for one in posted if isinstance(one, bytes))
        assert (len(first), second[1], second[3]) == (3, "", third[3])
        assert len(second[3]) == 64


def step(x, y, w, v, lr=0.1):
    w, v = w.detach().requires_grad_(), v.detach().requires_grad_()
    loss = F.mse_loss((x @ w).relu() @ v, y)
    loss.backward()
    return loss.detach(), w.detach() - lr * w.grad, v.detach() - lr * v.grad


def values():
    return random(8, 5), random(8, 3, seed=1), random(5, 4, seed=2), random(4, 3, seed=3)


def test_a_training_step_is_one_program(session, monkeypatch):
    plan = sy.func2plan()(step).build(*values())
    expected = list(values())
    x, y, w, v = (share(session, one) for one in values())
    sent = messages(session, monkeypatch)
    for _ in range(3):
        loss, w, v = plan(x, y, w, v)
        plain = step(expected[0], expected[1], *expected[2:])
        expected[2:] = plain[1:]
        assert (loss.get() - plain[0]).abs() < 1e-3
    assert [len([one for one in posted if isinstance(one, bytes)]) for posted in sent] == [3, 3]
    assert (w.get() - expected[2]).abs().max() < 1e-3
    assert (v.get() - expected[3]).abs().max() < 1e-3


def test_a_training_step_in_place(session):
    @sy.func2plan()
    def train(x, y, w):
        weight = w.detach().requires_grad_()
        loss = ((x @ weight - y) ** 2).mean()
        loss.backward()
        with torch.no_grad():
            w.sub_(0.1 * weight.grad)

    x, y, w = random(8, 5), random(8, 2, seed=1), random(5, 2, seed=2)
    train.build(x, y, w.clone())
    there = [share(session, one) for one in (x, y, w)]
    version = there[2]._version
    plain = w.clone()
    for _ in range(3):
        assert train(*there) is None
        train(x, y, plain)
    assert there[2]._version > version
    assert not torch.equal(plain, w)
    assert (there[2].get() - plain).abs().max() < 1e-3


@pytest.mark.parametrize("count", [2, 3])
def test_the_same_bits_as_op_by_op_and_as_in_one_process(make_worker, count, monkeypatch):
    def seeds(first):
        numbers = itertools.count(first)
        return lambda: next(numbers).to_bytes(16, "big")

    plan = sy.func2plan()(step).build(*values())
    names = ["bob", "alice", "charlie"][:count]
    workers, dealer = [make_worker(name) for name in names], make_worker("james")
    found = []
    monkeypatch.setattr(parties, "_SEEDS", 0)  # the same seeds twice are no others' mistake here
    for function in (plan, step):
        monkeypatch.setattr(dealers, "new_seed", seeds(1))
        monkeypatch.setattr(sessions, "new_seed", seeds(1000))
        session = sharing_session(workers, dealer, timeout=50.0 + len(found))
        found.append([one.get() for one in function(*(share(session, one) for one in values()))])
        assert session.traffic()["bob"].rounds > 0
    other = InProcessSession(
        count, at_once=10_000, seeds=[one.to_bytes(16, "big") for one in range(1, count + 1)]
    )
    monkeypatch.setattr(sessions, "new_seed", seeds(1000))

    def split(values, scale):
        from planrt.sharing.kernels import Share
        from planrt.sharing.randomness import Stream
        from planrt.sharing.tensors.batches import Value

        parts = [Stream(sessions.new_seed()).ring(values.shape) for _ in range(count - 1)]
        parts.append(values - sum(parts))
        return Value(other, place=[Share(part, scale) for part in parts])

    monkeypatch.setattr(other, "share", split)
    found.append([one.get() for one in step(*(share(other, one) for one in values()))])
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_gradients_through_a_plan(session):
    x, w = random(4, 6), random(6, 3, seed=1)
    here, there = w.clone().requires_grad_(), share(session, w).requires_grad_()
    product(x, here)[0].sum().backward()
    product(share(session, x), there)[0].sum().backward()
    assert (there.grad.get() - here.grad).abs().max() < 1e-3


def test_a_shared_model_as_a_plan(session):
    model = network()
    plan = sy.func2plan(args_shape=[(4, 6)])(model)
    x = random(4, 6)
    expected = model(x)
    share_module(session, model)
    with torch.no_grad():
        found = plan(share(session, x))
    assert isinstance(found, SharedTensor)
    assert (found.get() - expected).abs().max() < 1e-3


def test_plans_that_run_op_by_op(session):
    @sy.func2plan(args_shape=[(4, 6)])
    def dropped(x):
        return F.dropout(x, 0.5, training=True)

    @sy.func2plan(args_shape=[(4, 6), (4, 6)])
    def same(x, y):
        return x, x + y, y

    x = share(session, random(4, 6))
    torch.manual_seed(1)
    first, second = dropped(x).get(), dropped(x).get()
    assert not torch.equal(first, second)  # each call draws anew
    one, total, known = same(x, torch.ones(4, 6))
    assert (one.get() - random(4, 6)).abs().max() < 1e-4
    assert (total.get() - random(4, 6) - 1).abs().max() < 1e-4
    assert torch.equal(known, torch.ones(4, 6))
    turned = share(session, random(6, 4)).t()
    assert (same(turned, turned)[1].get() - 2 * random(6, 4).t()).abs().max() < 1e-3


def test_what_a_plan_cannot_do_on_shares_is_said_and_nothing_is_sent(session, monkeypatch):
    @sy.func2plan(args_shape=[(4, 6)])
    def commonest(x):
        return x.mode(1)[0]

    x = share(session, random(4, 6))
    sent = messages(session, monkeypatch)
    with pytest.raises(Exception, match="mode"):
        commonest(x)
    assert sent == [[], []]
    assert (x.get() - random(4, 6)).abs().max() < 1e-4


@contextlib.contextmanager
def owned(tmp_path, policy):
    approvals = tmp_path if policy.approval == "ask" else None
    with (
        VirtualWorker("owner", policy=policy, approvals=approvals) as owner,
        VirtualWorker("bob") as bob,
        VirtualWorker("james") as james,
    ):
        yield [bob, owner], james


def test_an_owner_approves_a_plan_and_it_runs_on_shares(tmp_path, capsys):
    plan = sy.func2plan()(step).build(*values())
    with owned(tmp_path, Policy(approval="ask")) as (workers, dealer):
        session = sharing_session(workers, dealer)
        with pytest.raises(NotApprovedError, match=r"waits for the owner's approval"):
            plan(*(share(session, one) for one in values()))[0].get()
        approvals = Approvals(tmp_path)
        (waiting,) = approvals.pending()
        (asking,) = [one for one in approvals.askings(waiting.plan) if one.data]
        says = "shares (opened to who asks) of bob, owner, with the crypto provider james"
        assert asking.data == (says,)
        sizes = [
            f"{name}={'x'.join(map(str, one.shape))}" for name, one in zip("xywv", values(), strict=True)
        ]
        options = [word for size in sizes for word in ("--input", size)]
        assert cli.main(["inspect", waiting.plan, "--approvals", str(tmp_path), *options]) == 0
        page = capsys.readouterr().out
        assert f"Asked for by somebody without a token, on {says}" in " ".join(page.split())
        assert page.count("output[") == 3
        assert "torch.nn.functional.mse_loss" in page
        approvals.approve(waiting.plan)
        session = sharing_session(workers, dealer)  # the one before has ended
        found = plan(*(share(session, one) for one in values()))
        assert (found[0].get() - step(*values())[0]).abs() < 1e-3
        with pytest.raises(NotApprovedError, match="single operations"):
            (found[0] * 2).get()


def test_a_policy_binds_plans_and_operations_on_shares(tmp_path):
    from dataclasses import replace

    policy = Policy(approval="open")
    names = sorted(name for name in policy.allowed_ops if name.rpartition(".")[2].strip("_") == "relu")
    policy = replace(policy, deny=tuple(names))
    with owned(tmp_path, policy) as (workers, dealer):
        session = sharing_session(workers, dealer)
        x, w = share(session, random(4, 6)), share(session, random(6, 3))
        assert (x.abs().get() - random(4, 6).abs()).abs().max() < 1e-4
        with pytest.raises(PolicyRefusedError, match="relu"):
            product(x, w)[0].get()
        session = sharing_session(workers, dealer)
        with pytest.raises(PolicyRefusedError, match="relu"):
            share(session, random(4, 6)).relu().get()


def test_another_program_at_a_party_is_not_run(session, monkeypatch):
    lowered_plan = shared_plan.lowered_plan
    x, w = share(session, random(4, 6)), share(session, random(6, 3))
    from planrt.workers.shares import plans

    def other(*args, **kwargs):
        found = lowered_plan(*args, **kwargs)
        found.__dict__["identity"] = "0" * 64
        return found

    shared_plan._KEPT.clear()
    monkeypatch.setattr(plans, "lowered_plan", other)
    found, _ = product(x, w)
    shared_plan._KEPT.clear()
    with pytest.raises(SharingError, match="another program here than at its client"):
        found.get()
