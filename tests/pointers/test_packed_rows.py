"""Recurrent layers on rows of several lengths: refused on pointers, with what to write instead; and that it works."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import planrt
from planrt.errors import PlanrtError

planrt.TorchHook(torch)

ROWS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([5, 3])
LAYERS = [nn.GRU, nn.LSTM, nn.RNN]


def packed(x, lengths, **options):
    return pack_padded_sequence(x, lengths, batch_first=True, **options)


def hidden(layer, worker):
    zeros = torch.zeros(1, 2, 4) if worker is None else torch.zeros(1, 2, 4).send(worker)
    return (zeros, zeros) if isinstance(layer, nn.LSTM) else zeros


REFUSED = {
    "lengths here": lambda layer, x, worker: layer(packed(x, LENGTHS)),
    "lengths there": lambda layer, x, worker: layer(packed(x, LENGTHS.clone().send(worker))),
    "out of order": lambda layer, x, worker: layer(
        packed(x, LENGTHS.clone().send(worker), enforce_sorted=False)
    ),
    "with a first state": lambda layer, x, worker: layer(
        packed(x, LENGTHS.clone().send(worker)), hidden(layer, worker)
    ),
    "packed by hand": lambda layer, x, worker: layer(
        PackedSequence(torch.randn(8, 3).send(worker), torch.tensor([2, 2, 2, 1, 1]))
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", REFUSED)
def test_the_error_says_to_record_a_plan(kind, name, bob):
    layer, x = kind(3, 4, batch_first=True).send(bob), ROWS.clone().send(bob)
    with pytest.raises(PlanrtError, match="record a plan of the whole"):
        REFUSED[name](layer, x, bob)
    assert layer(x)[0].get().shape == (2, 5, 4)  # rows of one length are no matter
    with pytest.raises(PlanrtError) as other:
        layer(x, hidden(layer, None))
    assert "record a plan" not in str(other.value)


class States(planrt.Plan):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(3, 4, batch_first=True)

    def forward(self, x, lengths):
        states, _ = self.layer(packed(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(states, batch_first=True)[0]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("lengths", [[5, 3], [2, 5]])
def test_the_plan_that_it_says_runs(kind, lengths, bob):
    plan, lengths = States(kind), torch.tensor(lengths)
    expected = plan.forward(ROWS, lengths)
    there = plan.build(ROWS, lengths).send(bob)
    found = there(ROWS.clone().send(bob), lengths.clone().send(bob)).get()
    assert torch.allclose(found, expected, atol=1e-6)
