"""Order: sort, topk, kthvalue and median beside torch, for two, three and four parties, with equal entries, edges."""

import pytest
import torch

from planrt.sharing.orders import MOST, ordered
from planrt.sharing.rounds import Transcript
from planrt.sharing.tensors.in_process import InProcessSession
from planrt.sharing.tensors.shared import share


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_equals(*shape, seed=0):
    """Few different values, so that many are equal."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)) / 2


STABLE = {
    "sort": lambda x: torch.sort(x, stable=True),
    "sort of a dimension": lambda x: torch.sort(x, dim=0, descending=True, stable=True),
    "argsort": lambda x: torch.argsort(x, dim=1, stable=True),
    "msort": torch.msort,
    "topk, values": lambda x: x.topk(3)[0],
    "topk of a dimension": lambda x: x.topk(2, dim=0, largest=False)[0],
    "topk of all": lambda x: x.topk(x.shape[1])[0],
    "topk of none": lambda x: x.topk(0),
    "kthvalue": lambda x: x.kthvalue(3)[0],
    "kthvalue keepdim": lambda x: x.kthvalue(2, dim=0, keepdim=True)[0],
    "median": lambda x: x.median(),
    "median along": lambda x: x.median(0)[0],
    "nanmedian": lambda x: x.nanmedian(),
    "median keepdim": lambda x: torch.median(x, 1, keepdim=True)[0],
    "one entry": lambda x: torch.sort(x[:1], dim=0, stable=True),
    "a scalar": lambda x: torch.sort(x[0, 0], stable=True),
    "nothing": lambda x: torch.sort(x[:, :0], dim=1, stable=True),
}


def results(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", STABLE)
def test_as_torch_with_equal_entries(name, parties):
    x = with_equals(4, 7, seed=len(name))
    found = results(STABLE[name](share(InProcessSession(parties), x)))
    for one, expected in zip(found, results(STABLE[name](x)), strict=True):
        assert one.dtype == expected.dtype
        assert one.get().shape == expected.shape
        assert torch.equal(one.get(), expected)


def test_whole_numbers_to_the_edges(parties):
    far = 2**61
    x = torch.tensor([[3, -far, far, 0, 3, -1, far - 1], [1, 1, 1, 1, 1, 1, 1]])
    values, places = torch.sort(share(InProcessSession(parties), x), dim=1, stable=True)
    expected = torch.sort(x, dim=1, stable=True)
    assert torch.equal(values.get(), expected[0])
    assert torch.equal(places.get(), expected[1])


GRADIENTS = {
    "sort": lambda x: x.sort(1)[0],
    "sort descending": lambda x: x.sort(0, descending=True)[0],
    "topk": lambda x: x.topk(3)[0],
    "kthvalue": lambda x: x.kthvalue(2, dim=0)[0],
    "median": lambda x: x.median(),
    "median along": lambda x: x.median(1, keepdim=True)[0],
    "a gather by places": lambda x: x.gather(1, x.argsort(1)),
    "a scatter by places": lambda x: torch.zeros_like(x).scatter(1, x.sort(1)[1], x * 2),
    "a scatter of some": lambda x: (x * 0.5).scatter(1, x.topk(3)[1], x[:, :3]),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    x = random(4, 7, seed=len(name))
    plain, there = x.clone().requires_grad_(), share(InProcessSession(2), x).requires_grad_()
    weights = random(*GRADIENTS[name](x).shape, seed=9)
    found, expected = GRADIENTS[name](there), GRADIENTS[name](plain)
    assert (found.get() - expected).abs().max() < 1e-3
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    assert (there.grad.get() - plain.grad).abs().max() < 1e-3


def test_as_many_as_are_put_in_order():
    x = random(MOST, seed=3)
    values, places = share(InProcessSession(2), x).sort(descending=True)
    assert (values.get() - x.sort(descending=True)[0]).abs().max() < 1e-4
    assert sorted(places.get().tolist()) == list(range(MOST))


def test_rounds_do_not_grow_with_the_entries(run):
    """As the docstring says: seven openings, of values, comparisons and ranks."""

    def protocol(party, part):
        return (yield from ordered(party, part, range(len(part)))).value

    for count in (2, 9, 40):
        transcript = Transcript(2)
        x = torch.randint(-100, 100, (count, 3))
        found = run(protocol, x, transcript=transcript, count=2)
        assert torch.equal(found, x.sort(0, descending=True)[0])
        assert transcript.rounds == 7
