"""Loops on shares whose batches, labels and rates are others in each step: as in PyTorch, and looked at once."""

import contextlib

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import planrt as sy
from planrt.errors import PlanWarning, SharingError
from planrt.sharing.kernels.shapes import are_mixed, flags_of
from planrt.sharing.programs import needs
from planrt.sharing.programs.calls import Call, Program
from planrt.sharing.tensors.batches import Value
from planrt.sharing.tensors.shared import SharedTensor
from planrt.types import Ref
from planrt.workers.wire.objects import new_id
from planrt.workers.wire.posted import PROGRAM, PostedOp
from tests.workers.conftest import PRECISION

sy.TorchHook(torch)
STEPS = 9
MIXED = next(seed for seed in range(2**40, 2**41) if are_mixed(flags_of(seed, (3,), 0.5)))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(step):
    return random(8, 5, seed=step).clamp(-3.9, 3.9).index_put((torch.tensor(step % 8),), torch.tensor(3.9))


def labels(step):
    return torch.randint(0, 4, (8,), generator=torch.Generator().manual_seed(step))


def model_of(module, *more):
    torch.manual_seed(0)
    return module(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), *more, nn.Linear(6, 4)))


def looked_at(monkeypatch):
    """Counts the programs that parties look at before they run them."""
    found = []

    def looked(program, *rest, **about):
        found.append(program)
        return look(program, *rest, **about)

    look = needs.dry_run
    monkeypatch.setattr(needs, "dry_run", looked)
    return found


def _training(x, module, after):
    """On batches that all know, with their labels."""
    model = model_of(module)
    optimizer = optim.Adam(model.parameters(), lr=0.02)
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch(step)), labels(step))
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.detach()
        after(loss)


def _annealed(x, module, after):
    """A weight that decays beside the loss, gradients that are clipped by value, targets that all know."""
    model, rows = model_of(module), x(random(8, 5, seed=50))
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.93**step
        optimizer.zero_grad()
        norms = sum(one.pow(2).sum() for one in model.parameters())
        loss = F.mse_loss(model(rows), batch(step)[:, :4]) + 0.01 * 0.97**step * norms
        loss.backward()
        optimizer.step()
        yield loss.detach()
        after(loss)


def _chosen(x, module, after):
    """Rows of a data set in shares, by places that all know; hidden entries, weights of examples."""
    model, rows, classes = model_of(module), x(random(20, 5, seed=51)), x(random(20, 4, seed=52))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        places = torch.randperm(20, generator=torch.Generator().manual_seed(step))[:8]
        optimizer.zero_grad()
        scores = model(rows[places]).masked_fill(random(8, 4, seed=step) > 1.5, 0.0)
        loss = F.binary_cross_entropy_with_logits(scores, (batch(step)[:, :4] > 0).float())
        loss = loss + (scores - classes[places]).pow(2).mean()
        loss.backward()
        optimizer.step()
        yield loss.detach()
        after(loss)


@pytest.mark.parametrize(("program", "more"), [(_training, 3), (_annealed, 2), (_chosen, 0)])
def test_other_values_in_each_step(program, more, alike, monkeypatch):
    """A number that comes to another power of two is looked at again: `more` times in the last four steps here."""
    found = looked_at(monkeypatch)
    counts = []

    def after(loss):
        if getattr(loss, "in_shares", False):
            loss.get()  # the step runs
            counts.append(len(found))

    alike(lambda x, module: list(program(x, module, after)), within=5e-3)
    assert len(counts) == STEPS
    assert counts[-1] <= counts[4] + more, "the later steps were like those before"


def test_evaluation_of_other_batches(alike, monkeypatch):
    found = looked_at(monkeypatch)

    def program(x, module):
        model, kept = model_of(module, nn.Dropout(0.5)).eval(), []
        with torch.no_grad():
            for step in range(6):
                kept.append(model(batch(step)))
                if getattr(kept[-1], "in_shares", False):
                    kept[-1].get()
        return kept

    alike(program)
    assert len(found) <= 2


def test_dropout_in_each_step(parties, monkeypatch):
    """What stays is drawn anew, and the gradient is that of what stayed."""
    bob, alice, james = parties
    found, seen = looked_at(monkeypatch), []

    def steps():
        torch.manual_seed(3)
        for _ in range(5):
            x = (
                torch.ones(64)
                .fix_precision(**PRECISION)
                .share(bob, alice, crypto_provider=james, requires_grad=True)
            )
            y = F.dropout(x * 3, 0.25)
            y.sum().backward()
            yield y.get().float_precision().detach(), x.grad.get().float_precision(), len(found)

    first, again = list(steps()), list(steps())
    for out, grad, _ in first:
        kept = (out > 1).float()
        assert 24 < kept.sum() < 64
        assert torch.allclose(out, kept * 4, atol=1e-3)
        assert torch.allclose(grad, kept * 4, atol=1e-3)
        seen.append(tuple(kept.tolist()))
    assert len(set(seen)) == 5
    assert all(torch.allclose(one[0], other[0], atol=1e-3) for one, other in zip(first, again, strict=True))
    assert again[-1][2] == first[1][2], "all steps from the second one on were alike"


def test_a_plan_with_one_entry_out_of_a_longer_tensor(parties):
    """Its stride is not 1, though it is the only one."""
    bob, alice, james = parties
    one = torch.arange(8.0)[3::8]
    with pytest.warns(PlanWarning, match="captured"):
        plan = sy.func2plan(args_shape=[(1,)])(lambda x: x * one + one)
    x = torch.tensor([2.0]).fix_precision().share(bob, alice, crypto_provider=james)
    assert plan(x).get().float_precision().item() == pytest.approx(9.0, abs=0.01)


NARROW = [torch.uint8, torch.int8, torch.int16, torch.int32]
WITH_WHOLE_NUMBERS = {
    "x - u": lambda x, u: x - u,
    "u - x": lambda x, u: u - x,
    "x - 2 u": lambda x, u: torch.sub(x, u, alpha=2),
    "x + 3 u": lambda x, u: torch.add(x, u, alpha=3),
    "in place": lambda x, u: x.clone().sub_(u),
    "x u": lambda x, u: x * u,
    "u <= x": lambda x, u: (u <= x).long(),
    "where": lambda x, u: torch.where(x > 3, x, u),
}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_whole_numbers_that_all_know_do_not_wrap(dtype, alike):
    """Bytes of an image, as they are read: what is subtracted of them in shares was 256 too much."""
    u = torch.tensor([120, 3, 0]).to(dtype)

    def program(x, _):
        shared = [x(torch.tensor([5.0, 6.0, 2.0])), x(torch.tensor([5, 6, 2]))]
        return [function(one, u) for function in WITH_WHOLE_NUMBERS.values() for one in shared]

    alike(program)


def test_thousandths(parties):
    """The scale that `fix_precision()` means is no power of two."""
    bob, alice, james = parties
    values = random(6, seed=3)
    x = values.fix_precision().share(bob, alice, crypto_provider=james)
    for step in range(1, 7):
        factor = 1 / (step + 0.3)
        found = (x * factor + step / 7 - x / (1 + factor)).get().float_precision()
        want = values * factor + step / 7 - values / (1 + factor)
        assert (found - want).abs().max() < 6e-3


@pytest.mark.parametrize(
    ("call", "number", "says"),
    [
        (Call("mul", (Ref(0), Ref(1)), {}, Ref(2)), float("nan"), "no operand"),
        (Call("mul", (Ref(0), Ref(1)), {}, Ref(2)), float("inf"), "no operand"),
        (Call("mul", (Ref(0), Ref(1)), {}, Ref(2)), 0.5, "no operand"),
        (Call("pow", (Ref(0), Ref(1)), {}, Ref(2)), 0.3, "pow takes no number there"),
        (Call("mul", (Ref(1), 2), {}, None, True), 0.3, "mul takes no number there"),
        (Call("relu", (Ref(1),), {}, Ref(2)), 0.3, "relu takes no number there"),
        (Call("mul", (Ref(0), Ref(1)), {}, Ref(2)), 7, "mul takes no number there"),
        (Call("mul", (Ref(0), Ref(1)), {}, Ref(2)), True, "its group, its text and its operands"),
        (Call("bernoulli", (Ref(0), 1.0), {"seed": Ref(1)}, Ref(2)), 7, "flags that are all the same"),
        (
            Call("bernoulli", (Ref(0), 0.5), {"seed": Ref(1)}, Ref(2)),
            -7,
            "bernoulli: can't convert negative int",
        ),
        (Call("bernoulli", (Ref(0), 0.5), {"seed": Ref(1)}, Ref(2)), MIXED, ""),
        (Call("mul", (Ref(0), Ref(1)), {}, Ref(2)), "0.3", "its group, its text and its operands"),
    ],
)
def test_numbers_of_a_hostile_client(call, number, says, parties):
    bob, alice, james = parties
    x = torch.ones(3).fix_precision(**PRECISION).share(bob, alice, crypto_provider=james)
    session = x.session
    x.get()
    made = None if call.results is None else Ref(new_id())
    args = (session.group, Program.of(2, [call]).text, (Ref(x.handle.place), number))
    session.post_op(PostedOp(PROGRAM, args, {}, (made,) if made else (), False))
    of_the_result = call.name == "bernoulli"  # of which the call alone fails
    asked = (
        SharedTensor(session, Value(session, place=made.index), (3,), torch.float32) if of_the_result else x
    )
    with contextlib.nullcontext() if not says else pytest.raises(SharingError, match=says):
        assert asked.get().shape == (3,)
    again = torch.ones(3).fix_precision(**PRECISION).share(bob, alice, crypto_provider=james)
    assert torch.equal((again * 0.3).get().float_precision().round(decimals=2), torch.full((3,), 0.3))


def test_parties_that_know_no_such_operands_are_sent_none(parties):
    bob, alice, james = parties
    session = bob.workplace.connection.session
    before = session.versions
    session.versions = msgspec.structs.replace(before, takes_numbers=False)
    try:
        x = torch.ones(3).fix_precision(precision_fractional=5).share(bob, alice, crypto_provider=james)
    finally:
        session.versions = before
    sent = []
    x.session.post_op, post = lambda op: (sent.append(op), post(op)), x.session.post_op
    for number in (0.3, 0.7, 0.9):
        assert ((x * number).get().float_precision() - number).abs().max() < 1e-4
    assert all({Ref}.issuperset(map(type, op.args[2])) for op in sent if op.name == PROGRAM)
    assert len(sent) == 3
