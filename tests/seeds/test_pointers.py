"""Documents 0 and 3: tensors on workers, gradients, pointers to pointers, moves."""

from __future__ import annotations

import re

import torch

import planrt as sy


def shown(objects) -> list[list[int]]:
    """The values of a listing: tensors on a virtual worker, pointers on one behind a socket."""
    return [
        (value.copy().get() if isinstance(value, sy.PointerTensor) else value).tolist()
        for value in objects.values()
    ]


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", sy.version.__version__)


def test_two_tensors_on_bob(bob, hook):
    x, y = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1, 1, 1, 1, 1])
    x_ptr, y_ptr = x.send(bob), y.send(bob)
    assert re.fullmatch(r"\(Wrapper\)>\[PointerTensor \| me:\d+ -> bob:\d+\]", str(x_ptr))
    assert set(bob._objects) == {x_ptr.id_at_location, y_ptr.id_at_location}
    assert shown(bob._objects) == [[1, 2, 3, 4, 5], [1, 1, 1, 1, 1]]
    assert (x_ptr.location, x_ptr.owner) == (bob, hook.local_worker)
    z = x_ptr + y_ptr
    assert re.fullmatch(r"\(Wrapper\)>\[PointerTensor \| me:\d+ -> bob:\d+\]", str(z))
    assert z.get().tolist() == [2, 3, 4, 5, 6]
    assert torch.add(x_ptr, y_ptr).get().tolist() == [2, 3, 4, 5, 6]
    assert x_ptr.get().tolist() == [1, 2, 3, 4, 5]
    assert y_ptr.get().tolist() == [1, 1, 1, 1, 1]
    assert bob._objects == {}


def test_gradients_on_bob(bob):
    x = torch.tensor([1, 2, 3, 4, 5.0], requires_grad=True).send(bob)
    y = torch.tensor([1, 1, 1, 1, 1.0], requires_grad=True).send(bob)
    z = (x + y).sum()
    first = z.backward()
    assert str(first).startswith("(Wrapper)>[PointerTensor | me:")
    assert re.fullmatch(r"\(Wrapper\)>\[PointerTensor \| me:\d+ -> bob:\d+\]::grad", str(x.grad))
    value = x.get()
    assert str(value) == "tensor([1., 2., 3., 4., 5.], requires_grad=True)"
    assert value.grad.tolist() == [1, 1, 1, 1, 1]


def test_a_worker_called_kong(make_worker):
    kong = make_worker("kong")
    pointer = torch.tensor([0, 1, 2, 1, 2]).send(kong)
    assert shown(kong._objects) == [[0, 1, 2, 1, 2]]
    assert str(pointer.get()) == "tensor([0, 1, 2, 1, 2])"
    assert kong._objects == {}
    train = torch.tensor([2.4, 6.2], requires_grad=True).send(kong)
    label = torch.tensor([2, 6.0]).send(kong)
    (train - label).abs().sum().backward()
    train = train.get()
    assert str(train) == "tensor([2.4000, 6.2000], requires_grad=True)"
    assert str(train.grad) == "tensor([1., 1.])"


def test_pointers_to_pointers(bob, alice):
    x_ptr = torch.tensor([1, 2, 3, 4]).send(bob)
    id_on_bob = x_ptr.id_at_location
    chain = x_ptr.send(alice)
    assert re.match(r"\(Wrapper\)>\[PointerTensor \| me:\d+ -> alice:\d+", str(chain))
    (held,) = alice._objects.values()
    assert str(held) == f"(Wrapper)>[PointerTensor | alice:{chain.id_at_location} -> bob:{id_on_bob}]"
    back = chain.get()
    assert (back.location, back.id_at_location) == (bob, id_on_bob)
    assert back.get().tolist() == [1, 2, 3, 4]


def test_ops_through_two_pointers(bob, alice):
    p2p2x = torch.tensor([1, 2, 3, 4, 5]).send(bob).send(alice)
    y = torch.add(p2p2x, p2p2x)
    assert len(alice._objects) == 2
    assert y.get().get().tolist() == [2, 4, 6, 8, 10]
    assert bob.objects_count() == 0  # they are alice's
    assert p2p2x.get().get().tolist() == [1, 2, 3, 4, 5]


def test_move(bob, alice):
    x = torch.tensor([1, 2, 3, 4]).send(bob)
    id = x.id_at_location
    assert list(bob._objects) == [id]
    assert alice._objects == {}
    x = x.move(alice)
    assert bob._objects == {}
    assert list(alice._objects) == [id]
    assert re.fullmatch(rf"\(Wrapper\)>\[PointerTensor \| me:\d+ -> alice:{id}\]", str(x))
    assert x.get().tolist() == [1, 2, 3, 4]
