"""Public places on shares: where they are out of range the call says so, as PyTorch does, and not the opening later."""

import pytest
import torch
from torch import tensor
from torch.nn import functional as F

import planrt
from planrt.errors import ExecutionError, SharingError

planrt.TorchHook(torch)

X = torch.arange(12.0).reshape(3, 4)
COLUMN = tensor([[0], [9], [1]])

WRONG = {
    "index_select": lambda x: x.index_select(0, tensor([7])),
    "index_select of the last dimension": lambda x: torch.index_select(x, -1, tensor([0, 4])),
    "index_select from the end": lambda x: x.index_select(0, tensor([-1])),
    "gather": lambda x: x.gather(1, COLUMN),
    "gather from the end": lambda x: x.gather(1, tensor([[0], [-1], [1]])),
    "gather from a number": lambda x: x[0, 0].gather(0, tensor(1)),
    "embedding": lambda x: F.embedding(tensor([0, 5]), x),
    "embedding from the end": lambda x: F.embedding(tensor([[0, -1]]), x),
    "index_add": lambda x: x.index_add(0, tensor([0, 7]), x[:2]),
    "index_add in place": lambda x: x.clone().index_add_(0, tensor([0, 7]), x[:2]),
    "index_add to what all know": lambda x: torch.zeros(3, 4).index_add(0, tensor([0, 7]), x[:2]),
    "index_copy": lambda x: x.index_copy(0, tensor([0, 7]), x[:2]),
    "index_fill": lambda x: x.index_fill(0, tensor([-4]), 2.0),
    "scatter": lambda x: x.scatter(1, COLUMN, x[:, :1]),
    "scatter of a number": lambda x: x.scatter(1, COLUMN, 1.5),
    "scatter in place": lambda x: x.clone().scatter_(1, COLUMN, x[:, :1]),
    "scatter_add": lambda x: x.scatter_add(1, COLUMN, x[:, :1]),
    "index_put": lambda x: x.index_put((tensor([9]),), x[:1]),
    "brackets": lambda x: x[[0, 7]],
    "brackets, two": lambda x: x[tensor([0, 1]), tensor([0, 9])],
    "brackets, behind others": lambda x: x[:, None, tensor([0, 4])],
    "brackets from the end": lambda x: x[tensor([-4])],
    "a short mask": lambda x: x[tensor([True, False])],
    "a short mask behind others": lambda x: x[:, tensor([True, False, True])],
    "a wide mask": lambda x: x[torch.ones(3, 5) > 0],
    "assignment": lambda x: x.clone().__setitem__(tensor([0, 9]), 1.0),
    "assignment by a short mask": lambda x: x.clone().__setitem__(tensor([True, False]), 1.0),
    "nll_loss": lambda x: F.nll_loss(x, tensor([0, 9, 1])),
    "cross_entropy": lambda x: F.cross_entropy(x, tensor([0, -1, 1])),
    "cross_entropy of images": lambda x: F.cross_entropy(x[None, :, None], torch.full((1, 1, 4), 3)),
}


def graded(function):
    """A program whose results are those of `function`, and the gradient of their sum's square."""

    def program(shared, module):
        x = shared(X, True)
        found = function(x)
        (found * found).sum().backward()
        return found, x.grad

    return program


RIGHT = {
    "from the end": lambda x: x[tensor([-1, -3])].sum() + x.index_fill(0, tensor([-1]), 2.0),
    "a single place": lambda x: x.index_select(0, tensor(1)) + x[tensor(2)] + F.embedding(tensor(1), x),
    "a single place of a row": lambda x: x[0].gather(0, tensor(1)) + x[0].scatter(0, tensor(1), 2.0),
    "a single place that is added to": lambda x: x.index_add(0, tensor(1), x[:1]),
    "a single place that is filled": lambda x: x.index_fill(0, tensor(1), 3.0),
    "a single place that is put": lambda x: torch.index_put(x, (tensor(1), tensor([0, 1])), tensor(5.0)),
    "a single class": lambda x: F.nll_loss(x[0], tensor(1)) + F.cross_entropy(x[1] / 8, tensor(2)),
    "ignored classes": lambda x: F.nll_loss(x, tensor([0, -100, 1])),
    "masks": lambda x: x[tensor([True, False, True])] + x[tensor([False, True, True]), None].sum(),
    "a mask behind others": lambda x: x[:, tensor([True, False, True, True])],
    "rows of rows": lambda x: F.embedding(tensor([[0, 1], [2, 2]]), x),
    "no places": lambda x: F.embedding(tensor([], dtype=torch.int64), x).sum() + x[tensor([1])],
}


@pytest.mark.parametrize("name", WRONG)
def test_places_that_are_not_there_are_told_at_the_call(name, parties):
    program = WRONG[name]
    with pytest.raises((IndexError, RuntimeError)) as plain:
        program(X.clone())
    bob, alice, james = parties
    x = X.fix_precision().share(bob, alice, crypto_provider=james)
    with pytest.raises(plain.type, match="places from|a mask of shape") as shared:
        program(x)
    assert str(plain.value) in str(shared.value)  # in PyTorch's own words
    assert torch.equal(x.get().float_precision(), X)  # nothing was changed, and the parties go on


@pytest.mark.parametrize("name", RIGHT)
def test_places_that_are_there(name, alike):
    alike(graded(RIGHT[name]), within=2e-2)


def test_a_plan_on_shares_tells_of_the_op_and_of_its_places(parties):
    bob, alice, james = parties
    plan = planrt.func2plan()(lambda x, places: F.embedding(places, x) * 2).build(X, tensor([0, 1]))
    x = X.fix_precision().share(bob, alice, crypto_provider=james)
    for places in (tensor([0, 3]), tensor([0, -1])):
        there = plan(x, tensor([1, 2])).get().float_precision()
        assert torch.equal(there, X[1:] * 2)
        with pytest.raises((ExecutionError, SharingError), match="embedding.*index out of range"):
            plan(x, places).get()
