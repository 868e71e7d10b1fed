"""Functions as programs on shares, and what they cost, against what runs of them do."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planrt.errors import SharingError
from planrt.sharing.correlated import Supply
from planrt.sharing.programs.lowering import Argument, lower
from planrt.sharing.programs.preflight import preflight
from planrt.sharing.tensors.in_process import InProcessSession
from planrt.sharing.tensors.shared import SharedTensor, share


def step(x, y, w, v):
    """A training step of two layers: the loss and the new weights."""
    loss = F.mse_loss((x @ w).relu() @ v, y)
    loss.backward()
    with torch.no_grad():
        return loss.detach(), w - 0.1 * w.grad, v - 0.1 * v.grad


def values():
    torch.manual_seed(0)
    return torch.randn(8, 5), torch.randn(8, 3), torch.randn(5, 4), torch.randn(4, 3)


def shared(session):
    x, y, w, v = (share(session, one) for one in values())
    return x, y, w.requires_grad_(), v.requires_grad_()


FUNCTIONS = {
    "step": step,
    "pool": lambda x, y, w, v: F.max_pool2d(x.reshape(1, 1, 8, 5), 2).amax(),
    "assignment": lambda x, y, w, v: torch.stack([_assigned(y), y * 2]),
    "attention": lambda x, y, w, v: (x @ w @ v).softmax(1) * y,
    "classes": lambda x, y, w, v: F.cross_entropy(x, torch.arange(8) % 5) + (x.argmax(1) == 3).sum(),
}


def _assigned(y):
    z = y * 1
    z[0] = 5
    z[1:, 1] = y[1:, 0]
    return z


@pytest.mark.parametrize("parties", [2, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_costs_are_those_of_a_run(name, parties, monkeypatch):
    session = InProcessSession(parties, at_once=100_000)
    args = shared(session)
    foreseen = preflight(FUNCTIONS[name], args, parties=parties, scale=session.scale)
    numbers = []
    monkeypatch.setattr(
        Supply, "take", lambda self, request, take=Supply.take: numbers.append(request) or take(self, request)
    )
    found = FUNCTIONS[name](*args)
    session.flush()
    assert session.transcript.rounds == foreseen.rounds
    assert session.transcript.sent == [foreseen.bytes_sent] * parties
    assert len(numbers) == foreseen.randomness * parties
    plain = [one.requires_grad_(place > 1) for place, one in enumerate(values())]
    expected = FUNCTIONS[name](*plain)
    for one, other in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
        assert (one.get() - other).abs().max() < 1e-2


def test_the_page():
    session = InProcessSession(2)
    x = share(session, torch.randn(64, 784))
    model = nn.Linear(784, 10)
    found = preflight(lambda x: model(x).relu(), [x], parties=2, scale=session.scale)
    assert found.rounds == 5
    page = str(found)
    assert page.startswith(
        "2 operations on shares of 2 parties\n  rounds              5 (waiting 5 ms at 1 ms, "
    )
    assert f"{found.bytes_sent:,} B" in page
    assert session.transcript.rounds == 0


def test_lowering_is_a_pure_function_of_what_it_is_given():
    texts = {lower(step, shared(InProcessSession(2)), scale=2**16).program.text for _ in range(2)}
    assert len(texts) == 1


def test_arguments_that_are_returned():
    x, y, *_ = shared(InProcessSession(2))
    found = lower(lambda x, y: (x, y * 2, [y.detach()], 3), [x, y], scale=2**16)
    first, made, (last,), three = found.results
    assert (first, last, three) == (Argument(0), Argument(1), 3)
    assert (made.shape, made.dtype, found.wanted) == ((8, 3), torch.float32, {made.number})
    assert lower(lambda x: x, [x], scale=2**16).program.calls == ()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, *_: x.sum().get(), "opens nothing"),
        (lambda x, *_: 3, "returns tensors in shares"),
        (lambda x, *_: torch.mode(x), "mode"),
    ],
)
def test_what_is_no_function_on_shares(function, message):
    with pytest.raises(SharingError, match=message):
        lower(function, shared(InProcessSession(2)), scale=2**16)
    assert isinstance(shared(InProcessSession(2))[0], SharedTensor)
