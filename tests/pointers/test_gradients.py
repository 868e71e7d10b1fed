"""Which gradients a backward pass leaves, known here without waiting for the worker: as PyTorch has it, whatever ops
made the graph; and what a pass that fails leaves behind, when its client hears of it only later."""

import asyncio
import copy
import random
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db

from planrt.errors import RemoteError
from planrt.plans.ir import ops
from planrt.workers.pointers.histories import PASSES_TO_ALL, PASSES_TO_FIRST
from tests import op_samples


def _same(pointers, tensors):
    """The gradients there are those here: which there are, their shapes, strides that mean something, values."""
    for pointer, tensor in zip(pointers, tensors, strict=True):
        there, here = pointer.grad, tensor.grad
        assert (there is None) == (here is None)
        if here is not None:
            assert (there.shape, there.dtype, there.requires_grad) == (
                here.shape,
                here.dtype,
                here.requires_grad,
            )
            assert there.is_contiguous() == here.is_contiguous()
            torch.testing.assert_close(there.clone().get(), here)


# ------------------------------------------------------------------------------------ as PyTorch has it, anywhere

_UNARY = [
    torch.relu, torch.tanh, torch.sigmoid, lambda x: x * 2 + 1, lambda x: x.t(), lambda x: x[0:2], lambda x: x.exp(),
    lambda x: x.detach() * 2, lambda x: x.clone(), lambda x: x.sum(0, keepdim=True), lambda x: F.softmax(x, 1),
    lambda x: x.to(torch.float32), lambda x: x.sign(), torch.zeros_like, lambda x: F.relu(x, inplace=False),
    lambda x: x.topk(1, 0).values, lambda x: x.max(0).values, lambda x: torch.stack(x.unbind(0)), lambda x: x.round(),
    lambda x: x.clone().mul_(3), lambda x: torch.cat(x.split(1)), lambda x: x.cumsum(0), lambda x: x.flip(0),
]  # fmt: skip
_BINARY = [
    torch.add, torch.mul, torch.sub, lambda x, y: x @ y.t() @ y, torch.maximum, lambda x, y: torch.where(x > y, x, y),
    lambda x, y: x.expand_as(y) if x.shape == y.shape else x + y,
    lambda x, y: x.view_as(y) if x.shape == y.shape else x,
    lambda x, y: torch.broadcast_tensors(x, y)[0] if x.shape == y.shape else x, lambda x, y: (x == y) * x,
    lambda x, y: torch.cat([x, y])[: x.shape[0]],
]  # fmt: skip


def _program(seed, make):
    """Some ops on a few leaves, two backward passes, and the leaves. `make` puts a tensor where it is computed on."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for _ in range(4):
        value = torch.randn(3, 3, generator=generator)
        one = make(value.t() if draw.random() < 0.3 else value)
        if draw.random() < 0.8:
            one.requires_grad_()
        leaves.append(one)
    values = list(leaves)
    for _ in range(draw.randrange(2, 10)):
        if draw.random() < 0.15:
            with torch.no_grad():
                made = draw.choice(_UNARY)(draw.choice(values))
        elif draw.random() < 0.5:
            made = draw.choice(_UNARY)(draw.choice(values))
        else:
            x = draw.choice(values)
            same = [one for one in values if one.shape == x.shape]
            made = draw.choice(_BINARY)(x, draw.choice(same))
        values.append(made)
        if draw.random() < 0.1 and made.requires_grad and not made.is_leaf:
            made.retain_grad()
            leaves.append(made)
    for turn in range(2):
        if turn and draw.random() < 0.5:
            for one in leaves:
                one.grad = None
        total = sum(one.sum() for one in draw.sample(values, 2)) + leaves[0].sum() * 0
        if total.requires_grad:
            total.backward(retain_graph=True)
    return leaves


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_programs_leave_the_gradients_that_pytorch_leaves(bob, first):
    for seed in range(first, first + 20):
        try:
            here = _program(seed, lambda value: value.contiguous().clone())
        except RuntimeError:  # not a program: a leaf changed, say
            continue
        there = _program(seed, lambda value: value.clone().send(bob))
        _same(there, here)


class _Net(nn.Module):
    """A branch that one batch in two does not use, a frozen layer, and one under two names."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.again = self.left
        self.norm = nn.BatchNorm1d(4)
        self.use_right = True

    def forward(self, x):
        x = F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1).flatten(1)
        x = self.frozen(self.norm(self.left(x)))
        return self.right(x) if self.use_right else self.again(x)


@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "RMSprop"])
def test_training_is_plain_training(bob, optimizer, clears):
    torch.manual_seed(0)
    here = _Net()
    there = copy.deepcopy(here)
    batches = [(torch.randn(8, 1, 6, 6), torch.randint(0, 4, (8,))) for _ in range(6)]
    for model, place in ((here, None), (there, bob)):
        if place is not None:
            model.send(place)
        steps = getattr(torch.optim, optimizer)(model.parameters(), lr=0.05)
        for number, (x, y) in enumerate(batches):
            model.use_right = number % 3 != 0
            steps.zero_grad(set_to_none=clears)
            F.cross_entropy(
                model(x if place is None else x.send(place)), y if place is None else y.send(place)
            ).backward()
            steps.step()
    there.get()
    for name, value in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name], value, msg=name)


def test_reading_a_gradient_does_not_wait(bob):
    """While the worker computes, a loop of the user's own may read gradients: nothing blocks it."""

    async def main():
        w = torch.ones(3, requires_grad=True).send(bob)
        unused = torch.ones(3, requires_grad=True).send(bob)
        ((w * 2).sum()).backward()
        passes = bob.workplace.gradients._pending
        assert [one.foreseen for one in passes] == [True]
        assert unused.grad is None
        return await w.grad.clone().async_get()

    assert asyncio.run(main()).tolist() == [2, 2, 2]


# -------------------------------------------------------------------------------------- the table, by experiment


def _leaf(*size):
    return torch.randn(size, dtype=torch.float64, requires_grad=True)


_BY_HAND = {
    **{name: [(_leaf(2, 3), _leaf(2, 3)), (_leaf(2, 3), 2.0), (_leaf(2, 1), _leaf(3))] for name in (
        "Tensor.__add__", "Tensor.__mul__", "Tensor.__sub__", "Tensor.__truediv__", "Tensor.__pow__",
    )},
    "Tensor.__matmul__": [(_leaf(2, 3), _leaf(3, 2)), (_leaf(4, 2, 3), _leaf(3))],
    "Tensor.T": [(_leaf(2, 3),)],
    "Tensor.mT": [(_leaf(2, 3),)],
    "Tensor.relu": [(_leaf(2, 3),)],
    "torch.relu": [(_leaf(2, 3),)],
    "nn.functional.dropout": [(_leaf(2, 3),), (_leaf(2, 3), 0.0), (_leaf(2, 3), 1.0), (_leaf(2, 3), 0.5, False)],
    "nn.functional.dropout2d": [(_leaf(2, 3, 2, 2),), (_leaf(2, 3, 2, 2), 1.0)],
    "nn.functional.embedding": [(torch.tensor([[0, 2]]), _leaf(3, 2)), (torch.tensor([1]), _leaf(3, 2), 1)],
}  # fmt: skip
"""Arguments where torch's own list has no samples."""


def _samples():
    """name -> samples of torch's own list, of functions and methods."""
    found = {}
    for op in op_db:
        for one in (op, *op.aliases):
            for function in (one.op, one.method_variant):
                name = ops.name_of(function) if function is not None else None
                if name is not None:
                    found.setdefault(name, []).append(op)
    for name in ("chunk", "div", "divide", "split", "unbind"):  # which the table bounds first
        for home in ("torch", "Tensor"):
            found[f"{home}.{name}"] = [
                op for op in op_db if name in (op.name, *(one.name for one in op.aliases))
            ]
    return found


_SAMPLES = _samples()


def samples_of(name):
    """(function, args, kwargs) for an op of the table."""
    for args in _BY_HAND.get(name, ()):
        yield ops.TABLE[name], args, {}
    for op in _SAMPLES.get(name, ()):
        for sample in op_samples.samples_of(op, torch.float64, 12, requires_grad=True):
            yield ops.TABLE[name], (sample.input, *sample.args), sample.kwargs


@pytest.mark.filterwarnings("ignore:reduction:UserWarning", "ignore:Using padding:UserWarning")
@pytest.mark.parametrize("name", sorted(PASSES_TO_ALL | PASSES_TO_FIRST))
def test_ops_of_the_table_pass_gradients(name):
    """Each result of each sample gives every operand that requires a gradient one, and no operand was written to."""
    tried = 0
    for function, args, kwargs in samples_of(name):
        operands = [
            one
            for one in (*args, *kwargs.values())
            for one in (one if isinstance(one, tuple | list) else [one])
        ]
        operands = [one for one in operands if isinstance(one, torch.Tensor) and one.requires_grad]
        if name in PASSES_TO_FIRST:
            operands = [one for one in operands if one is args[0]]
        versions = [one._version for one in operands]
        results = function(*args, **kwargs)
        assert [one._version for one in operands] == versions
        for result in results if isinstance(results, tuple | list) else [results]:
            if not operands or not isinstance(result, torch.Tensor) or not result.requires_grad:
                continue
            tried += 1
            if any(result is one for one in operands):
                continue
            grads = torch.autograd.grad(
                result.sum().abs() if result.is_complex() else result.sum(),
                operands,
                allow_unused=True,
                retain_graph=True,
            )
            assert all(one is not None for one in grads), (args, kwargs)
            assert not any(one.is_sparse for one in grads)
    assert tried, "no sample requires a gradient"


# --------------------------------------------------------------------------------------------- passes that fail


def _eventually(holds):
    end = time.monotonic() + 20
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def test_a_step_whose_pass_failed_changes_nothing(bob):
    """The labels of a batch are wrong. Its optimizer step, and those after it, must not use the gradients of the batch
    before; whoever asks next hears why; and training goes on from where it was.
    """
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    expected = copy.deepcopy(model)
    x, right, wrong = torch.randn(8, 4), torch.randint(0, 3, (8,)), torch.full((8,), 7)
    here = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        here.zero_grad(set_to_none=False)
        F.cross_entropy(expected(x), right).backward()
        here.step()
    model.send(bob)
    there = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data, right, wrong = x.send(bob), right.send(bob), wrong.send(bob)

    def train(target):
        there.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(data), target)
        loss.backward()
        there.step()
        return loss

    train(right)

    def three_steps():
        for _ in range(3):
            loss = train(wrong)
        loss.detach().get()

    with pytest.raises(RemoteError, match=r"cross_entropy|out of bounds"):
        three_steps()
    train(right)
    model.get()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(model.weight.grad, expected.weight.grad)


def test_a_pass_over_a_freed_graph_fails_as_in_pytorch(bob):
    w = torch.ones(3, requires_grad=True).send(bob)
    loss = (w * w).sum()
    loss.backward()
    loss.backward()
    with pytest.raises(RemoteError, match="second time"):
        w.grad.get()
    assert w.grad.clone().get().tolist() == [2, 2, 2]
    assert w.clone().get().tolist() == [1, 1, 1]


def test_gradients_after_a_failure_are_those_that_are_there(bob):
    """What the client did while it did not know of the failure has not happened, on either side."""
    w = torch.ones(2, requires_grad=True).send(bob)
    v = torch.ones(2, requires_grad=True).send(bob)
    (w * 3).sum().backward()
    loss = (v * v).sum()
    loss.backward()
    with torch.no_grad():
        v.grad = None
    assert v.grad is None
    loss.backward()  # fails
    w.grad = None
    made = w + 1
    with pytest.raises(RemoteError, match="second time"):
        made.get()
    assert w.grad.clone().get().tolist() == [3, 3]
    assert v.grad is None
    with pytest.raises(RemoteError, match="second time"):
        made.get()  # it was never computed
    (w * 2).sum().backward()
    assert w.grad.clone().get().tolist() == [5, 5]


def test_a_failure_is_heard_at_the_next_gradient_once_it_is_known(bob):
    w = torch.ones(2, requires_grad=True).send(bob)
    loss = (w * w).sum()
    loss.backward()
    loss.backward()
    assert _eventually(
        lambda: bob.workplace.gradients._pending and bob.workplace.gradients._pending[-1].went_well is False
    )
    with pytest.raises(RemoteError, match="second time"):
        w.grad  # noqa: B018
    assert w.grad is not None


def test_who_stops_waiting_leaves_the_failure_to_others(bob):
    """A get that is cancelled, by a time-out say, while a pass is under way that fails."""
    w = torch.ones(2, requires_grad=True).send(bob)
    loss = (w * w).sum()
    loss.backward()
    bob.message_pending_time = 0.2  # so that the pass is still under way when its caller is cancelled

    async def cancelled():
        loss.backward()
        asked = asyncio.ensure_future(w.async_get())
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    asyncio.run(cancelled())
    bob.message_pending_time = 0
    with pytest.raises(RemoteError, match="second time"):
        w.clone().get()
    assert (w + 1).detach().get().tolist() == [2, 2]


def test_what_is_sent_while_a_pass_has_failed_arrives(bob):
    w = torch.ones(2, requires_grad=True).send(bob)
    loss = (w * w).sum()
    loss.backward()
    loss.backward()
    sent = torch.arange(3.0).send(bob)
    with pytest.raises(RemoteError, match="second time"):
        sent.clone().get()
    assert sent.get().tolist() == [0, 1, 2]


def test_many_passes_leave_nothing_behind(bob):
    w = torch.ones(2, requires_grad=True).send(bob)
    for _ in range(500):
        (w * w).sum().backward()
        w.grad = None
    w.clone().get()
    connection = bob._connection
    assert len(connection._pending) < 100
    assert not bob.workplace.gradients._pending


def test_a_worker_that_does_not_halt_is_waited_for(bob, monkeypatch):
    """An older worker, in the handshake, does not say that it halts."""
    monkeypatch.setattr(type(bob.workplace), "halts", property(lambda self: False))
    w = torch.ones(2, requires_grad=True).send(bob)
    (w * w).sum().backward()
    assert [one.foreseen for one in bob.workplace.gradients._pending] == [False]
    assert w.grad.clone().get().tolist() == [2, 2]
