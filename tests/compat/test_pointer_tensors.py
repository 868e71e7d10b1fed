"""What programs of PySyft 0.2 expect of pointers to tensors, in its calls."""

from __future__ import annotations

import gc

import pytest
import syft as sy
import torch
import torch.nn.functional as F
from syft.exceptions import TensorsNotCollocatedException
from syft.generic.pointers.pointer_tensor import PointerTensor

from planrt.errors import LocalError, OptionError, RemoteOpError, UnknownObjectError


def value_on(worker, id):
    """What `worker` holds under that id: itself where it is virtual, else a copy that is fetched."""
    found = worker._objects[id]
    return found.copy().get() if isinstance(found, PointerTensor) else found


# ------------------------------------------------------------------------------------------------ made by hand


def test_a_pointer_is_made_by_hand(bob, me):
    x = torch.tensor([1.0, 2.0])
    sent = x.send(bob)
    made = PointerTensor(location=bob, id_at_location=x.id, owner=me, id=1000)
    assert str(made) == f"(Wrapper)>[PointerTensor | me:1000 -> bob:{x.id}]"
    assert (made.id, made.owner, made.location, made.id_at_location) == (1000, me, bob, x.id)
    assert (made + made).get().tolist() == [2, 4]
    del made
    gc.collect()
    assert sent.get().tolist() == [1, 2]


def test_a_pointer_by_hand_may_take_the_object_along(bob):
    x = torch.ones(2)
    x.send(bob).gc = False
    gc.collect()
    made = PointerTensor(location=bob, id_at_location=x.id, garbage_collect_data=True)
    del made
    gc.collect()
    assert x.id not in bob._objects


def test_a_pointer_by_hand_to_nothing(bob, me):
    for wrong in (
        {"location": bob, "owner": me},
        {"id_at_location": 3},
        {"location": "bob", "id_at_location": 3},
        {},
    ):
        with pytest.raises(OptionError, match="location=worker and id_at_location="):
            PointerTensor(**wrong)
    with pytest.raises(UnknownObjectError):
        PointerTensor(location=bob, id_at_location=3)
    plan = sy.func2plan(args_shape=[(1,)])(lambda x: x + 1)
    there = plan.send(bob)
    with pytest.raises(OptionError, match="no tensor"):
        PointerTensor(location=bob, id_at_location=there.id_at_location)
    with pytest.raises(RuntimeError, match=r"x\.send\(worker\) gives a pointer"):
        torch.ones(1).create_pointer(location=bob)


def test_an_id_of_ones_own(bob):
    x = torch.tensor([1.0])
    x.id = 43
    pointer = x.send(bob)
    assert (x.id, pointer.id_at_location, list(bob._objects)) == (43, 43, [43])
    for wrong in ("a", -1, 2**63, None):
        with pytest.raises(OptionError):
            x.id = wrong
    assert x.id == 43


# ----------------------------------------------------------------------------------------- garbage collection


def test_the_object_goes_with_its_pointer_by_default(bob):
    pointer = torch.Tensor([-1, 2]).send(bob)
    assert pointer.gc is pointer.child.garbage_collect_data is pointer.garbage_collection is True


@pytest.mark.parametrize("name", ["gc", "garbage_collection", "garbage_collect_data"])
def test_it_stays_once_that_is_said_by_any_name(bob, name):
    x = torch.Tensor([-1, 2])
    pointer = x.send(bob)
    setattr(pointer.child, name, False)
    assert pointer.gc is pointer.garbage_collect_data is pointer.garbage_collection is False
    del pointer
    gc.collect()
    assert x.id in bob._objects


def test_it_stays_with_disable_gc(bob):
    x = torch.Tensor([-1, 2])
    pointer = x.send(bob).disable_gc
    assert pointer.child.gc is False
    del pointer
    gc.collect()
    assert x.id in bob._objects


def test_deleting_the_pointer_frees_the_object(bob):
    x = torch.Tensor([1, 2])
    pointer = x.send(bob)
    assert x.id in bob._objects
    del pointer
    assert x.id not in bob._objects


def test_giving_the_name_to_something_else_frees_the_object(bob):
    x = torch.Tensor([1, 2])
    pointer = x.send(bob)
    pointer = "asdf"  # noqa: F841
    assert x.id not in bob._objects


def test_deleting_a_pointer_to_a_pointer_frees_both(bob, alice, transport):
    x = torch.Tensor([1, 2])
    inner = x.send(bob)
    outer = inner.send(alice)
    if transport == "memory":  # behind a socket one sees one's own, and bob's object is alice's now
        assert x.id in bob._objects
    assert len(alice._objects) == 1
    del outer
    assert alice.objects_count() == 0
    assert bob.objects_count() == 0
    assert x.id not in bob._objects


def test_the_name_of_a_pointer_to_a_pointer_given_away_frees_both(bob, alice):
    x = torch.Tensor([1, 2])
    outer = x.send(bob).send(alice)
    outer = "asdf"  # noqa: F841
    assert alice._objects == {}
    assert x.id not in bob._objects


def test_what_was_taken_back_is_gone(bob):
    x = torch.tensor([1, 2, 3, 4])
    pointer = x.send(bob)
    _ = pointer.get()
    assert x.id not in bob._objects


# -------------------------------------------------------------------------------------------- sending, getting


def test_there_and_back(bob):
    x = torch.tensor([1.0, 2.0])
    pointer = x.send(bob)
    assert isinstance(pointer, PointerTensor)
    back = pointer.get()
    assert type(back) is torch.Tensor
    assert torch.equal(back, x)
    assert back.id == x.id


def test_in_place_there_and_back(bob):
    tensor = torch.tensor([1.0, -1.0, 3.0, 4.0])
    before, copy = tensor.id, tensor.clone()
    pointer = tensor.send_(bob)
    assert pointer is tensor
    assert pointer.id == before
    back = pointer.get_()
    assert back is tensor
    assert back.id == before
    assert torch.equal(back, copy)


def test_sent_twice_it_is_there(bob):
    x = torch.Tensor([1, 2])
    pointer = x.send(bob)
    pointer = x.send(bob)
    assert x.id in bob._objects
    assert pointer.get().tolist() == [1, 2]


def test_the_id_on_the_worker_is_that_of_the_tensor(bob, me):
    x = torch.Tensor([100, 100])
    number = x.id
    _ = x.send(bob)
    assert torch.equal(value_on(bob, number), x)
    assert me.id == "me"


def test_shape_size_and_dim(bob):
    p = torch.rand(10, 12).send(bob)
    assert p.shape == p.size() == torch.Size([10, 12])
    assert (p.size(0), p.dim(), p.numel(), p.dtype) == (10, 2, 120, torch.float32)
    assert (p + p).t().shape == torch.Size([12, 10])


def test_to_the_cpu(bob):
    x = torch.tensor([1, 2, 3]).send(bob)
    assert x.to(torch.device("cpu")).get().tolist() == [1, 2, 3]


def test_values_are_not_read(bob):
    x = torch.tensor([1.0]).send(bob)
    with pytest.raises(RuntimeError, match="get"):
        x.item()


def test_operands_in_different_places(bob, alice):
    x, y, here = torch.ones(3).send(bob), torch.ones(3).send(alice), torch.ones(3)
    for one, other in ((x, y), (y, x), (x, here), (here, x)):
        with pytest.raises(TensorsNotCollocatedException, match="move|send"):
            one + other
    with pytest.raises(TensorsNotCollocatedException):
        x += here


# ------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("name", ["abs", "neg", "exp", "relu"])
def test_methods_of_one_tensor(bob, name):
    x = torch.Tensor([1, -2, 3])
    assert torch.equal(getattr(x.send(bob), name)().get(), getattr(x, name)())


@pytest.mark.parametrize("name", ["add", "mul", "sub", "eq"])
def test_methods_of_two_tensors(bob, name):
    x = torch.Tensor([1, 2, 3])
    pointer = x.send(bob)
    assert torch.equal(getattr(pointer, name)(pointer).get(), getattr(x, name)(x))


@pytest.mark.parametrize("name", ["abs", "relu"])
def test_methods_of_one_tensor_through_two_pointers(bob, alice, name):
    x = torch.Tensor([1, -2, 3])
    pointer = x.send(bob).send(alice)
    assert torch.equal(getattr(pointer, name)().get().get(), getattr(x, name)())


@pytest.mark.parametrize("name", ["add", "mul"])
def test_methods_of_two_tensors_through_two_pointers(bob, alice, name):
    x = torch.Tensor([1, 2, 3])
    pointer = x.send(bob).send(alice)
    assert torch.equal(getattr(pointer, name)(pointer).get().get(), getattr(x, name)(x))


@pytest.mark.parametrize("name", ["relu", "celu", "elu"])
def test_functions_of_functional(bob, name):
    x = torch.Tensor([1, -1, 3, 4])
    function = getattr(F, name)
    assert torch.allclose(function(x.send(bob)).get(), function(x))
    assert torch.equal(function(x), getattr(torch.nn.functional, name)(x))


def test_results_of_a_pointer_to_a_pointer_are_registered_on_both(bob, alice):
    pointer = torch.tensor([1, 2, 3]).send(bob).send(alice)
    done = pointer + pointer
    assert (len(alice._objects), done.get().get().tolist()) == (2, [2, 4, 6])


def test_several_results(bob):
    x = torch.tensor([1.0, 2, 3, 4.0])
    pointer = x.send(bob)
    first, second = torch.split(pointer, 2)
    assert (first.get().tolist(), second.get().tolist()) == ([1, 2], [3, 4])
    largest, where = torch.max(pointer, 0)
    assert (largest.get().item(), where.get().item()) == (4.0, 3)
    ordered, places = torch.sort(torch.tensor([1.0, 3, 2]).send(bob))
    assert (ordered.get().tolist(), places.get().tolist()) == ([1, 2, 3], [0, 2, 1])


def test_in_place_addition(bob):
    a, b = torch.ones(1, 5).send(bob), torch.ones(1, 5).send(bob)
    before = b
    b += a
    assert b is before
    assert len(bob._objects) == 2
    assert b.get().tolist() == [[2] * 5]


def test_in_place_methods(bob):
    x = torch.tensor([[1.0, 2], [4, 5]])
    pointer = x.send(bob)
    pointer.add_(pointer)
    assert torch.equal(pointer.get(), x * 2)


def test_in_place_on_a_long_tensor_that_was_sent_in_place(bob):
    t = torch.LongTensor([2])
    p = t.send_(bob)
    p += 2
    assert p.get_()[0] == 4
    t.send_(bob)
    t *= 3
    t.get_()
    assert t.tolist() == [12]


def test_iteration(bob):
    t = torch.Tensor([[1, 2], [4, 5], [7, 8]])
    p = t.send(bob)
    assert len(bob._objects) == 1
    for index, row in enumerate(p):
        assert isinstance(row, PointerTensor)
        assert row.location is bob
        assert torch.equal(row.get(), t[index])
    del row
    gc.collect()
    assert len(bob._objects) == 1
    rows = list(p)
    assert len(bob._objects) == 4
    del rows
    gc.collect()
    assert len(bob._objects) == 1
    assert [one.get().item() for one in p[:, 1]] == [2, 5, 8]


# -------------------------------------------------------------------------------------------------- gradients


def test_gradients_on_the_worker(bob):
    x = torch.tensor([1, 2, 3, 4.0], requires_grad=True).send(bob)
    y = (x + x).sum()
    y.backward()
    assert x.grad.copy().get().tolist() == [2, 2, 2, 2]
    assert x.get().grad.tolist() == [2, 2, 2, 2]


def test_gradients_from_a_gradient_there(bob):
    x = torch.tensor([1, 2, 3, 4.0], requires_grad=True).send(bob)
    (x + x).sum().backward(torch.tensor(1.0).send(bob))
    assert x.get().grad.tolist() == [2, 2, 2, 2]


def test_a_gradient_goes_along_and_comes_back(bob):
    x = torch.tensor([1.0, 2, 3], requires_grad=True)
    (x + x).sum().backward()
    pointer = x.send(bob)
    assert isinstance(pointer.grad, PointerTensor)
    assert pointer.grad.copy().get().tolist() == [2, 2, 2]
    assert pointer.get().grad.tolist() == [2, 2, 2]


def test_gradients_through_two_pointers(bob, alice):
    x = torch.tensor([1.0, 2], requires_grad=True).send(bob).send(alice)
    (x * 3).sum().backward()
    assert x.get().get().grad.tolist() == [3, 3]


def test_what_has_a_history_has_a_node_there(bob):
    x = torch.tensor([1.0, 1], requires_grad=True).send(bob)
    assert x.grad_fn is None
    assert "on the worker" in repr(x.sum().grad_fn)


def test_gradients_do_not_come_from_a_worker_by_themselves(bob, alice):
    """0.2's ``send(..., requires_grad=True)``; the way that the error names gives the same gradients."""
    x = torch.tensor([1.0, 2, 3], requires_grad=True)
    y = x + x
    for call in (
        lambda: y.send(bob, requires_grad=True),
        lambda: y.send(bob).move(alice, requires_grad=True),
    ):
        with pytest.raises(OptionError, match=r"y\.backward\(pointer\.grad\.get\(\)\)"):
            call()
    pointer = y.detach().requires_grad_().send(bob)
    (pointer * 2).sum().backward()
    y.backward(pointer.grad.get())
    assert x.grad.tolist() == [4, 4, 4]


def test_options_that_are_not_taken_say_what_to_write(bob):
    x = torch.ones(1)
    assert x.send(bob, no_wrap=True, requires_grad=False, user=None).get().item() == 1
    for option, says in (
        ("local_autograd", r"loss\.backward"),
        ("preinitialize_grad", "backward pass"),
        ("user", "token"),
    ):
        with pytest.raises(OptionError, match=says):
            x.send(bob, **{option: True})


def test_hooks_are_refused(bob):
    x = torch.ones(2, requires_grad=True).send(bob)
    with pytest.raises((RemoteOpError, LocalError)):
        (x * 2).register_hook(print)


# ------------------------------------------------------------------------------------------ moving, combining


def test_a_move_is_in_place(bob, alice):
    x = torch.tensor([1, 2, 3, 4, 5]).send(bob)
    assert x.id_at_location in bob._objects
    assert x.id_at_location not in alice._objects
    x.move(alice)
    assert x.id_at_location in alice._objects
    assert x.id_at_location not in bob._objects
    assert len(alice._objects) == 1
    assert x.get().tolist() == [1, 2, 3, 4, 5]


def test_moves_there_and_back_and_to_where_it_is(bob, alice):
    t = torch.tensor([1.0, 2, 3, 4, 5]).send(bob)
    assert t.move(bob) is t
    assert t.move(alice).move(bob).get().tolist() == [1, 2, 3, 4, 5]
    assert len(alice._objects) == len(bob._objects) == 0


def test_moved_to_this_process_it_is_a_pointer_to_me(bob, me):
    x = torch.tensor([1.0, 2]).send(bob).move(me)
    assert x.location is me
    assert x.get().tolist() == [1, 2]


def test_a_move_keeps_whether_gradients_are_wanted(bob, alice):
    x = torch.tensor([1.0, 2], requires_grad=True).send(bob)
    x.move(alice)
    assert x.requires_grad
    (x * 3).sum().backward()
    assert x.get().grad.tolist() == [3, 3]


def test_remote_send_and_remote_get(bob, alice, transport):
    x = torch.tensor([1, 2, 3]).send(bob).remote_send(alice)
    assert x.location is bob
    if transport == "memory":
        assert len(alice._objects) == 1
    assert x.get().get().tolist() == [1, 2, 3]
    y = torch.tensor([1, 2, 3]).send(bob).send(alice).remote_get()
    assert (y.location, len(bob._objects)) == (alice, 0)
    assert y.get().tolist() == [1, 2, 3]


def test_pointers_are_combined(bob, alice):
    x, y = torch.tensor([1, 2, 3, 4, 5]).send(bob), torch.tensor([1, 2, 3, 4, 5]).send(alice)
    a = x.combine(y)
    b = a + a
    assert b.get(sum_results=True).tolist() == [4, 8, 12, 16, 20]
    b = a + a
    parts = b.get(sum_results=False)
    assert [one.tolist() for one in parts] == [[2, 4, 6, 8, 10]] * 2


def test_one_tensor_on_two_workers(bob, alice):
    a = torch.tensor([1, 2, 3]).send(bob, alice)
    assert a.dim() == 1
    assert (a + a).get(sum_results=True).tolist() == [4, 8, 12]
    assert set(a.child) == {"bob", "alice"}
