"""Objects keep their ids; plans and protocols are found, fetched and pointed to by them."""

from __future__ import annotations

import copy

import pytest
import syft as sy
import torch
from torch import nn

from planrt.errors import GetNotPermittedError, LocalError, OptionError, UnknownObjectError

PointerPlan, PointerProtocol = sy.PointerPlan, sy.PointerProtocol


def inc():
    return sy.func2plan(args_shape=[(1,)])(lambda x: x + 1)


class Net(sy.Plan):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, x):
        return self.fc(x)


def test_a_plan_keeps_its_id_on_every_worker(bob, alice, me):
    plan = inc()
    id = plan.id
    on_bob, on_alice = plan.send(bob), plan.send(alice)
    assert plan.id == id == on_bob.id_at_location == on_alice.id_at_location
    (found,) = me.request_search([plan.id], location=alice)
    assert isinstance(found, PointerPlan)
    assert found.id_at_location == plan.id
    assert plan.id in bob._objects
    assert on_bob.owner is plan.owner is me


def test_the_same_plan_twice_and_a_changed_one(bob):
    net = Net()
    net.build(torch.zeros(1, 2))
    first, again = net.send(bob), net.send(bob)
    assert first.id_at_location == again.id_at_location == net.id
    before = net.id
    with torch.no_grad():
        net.fc.weight.add_(1)
    changed = net.send(bob)
    assert changed.id_at_location == net.id != before == first.id_at_location
    x = torch.ones(1, 2)
    assert torch.allclose(changed(x.send(bob)).get() - first(x.send(bob)).get(), torch.tensor([[2.0]]))


def test_sent_taken_back_and_sent_again(bob):
    plan = inc()
    id = plan.id
    plan.send(bob).get()
    assert plan.send(bob).id_at_location == id
    plan.send(bob)
    assert bob.objects_count() <= 1


def test_copies_are_other_plans(bob):
    plan = inc()
    copies = [plan.copy(), copy.deepcopy(plan), copy.copy(plan)]
    assert len({plan.id, *(one.id for one in copies)}) == 4
    pointers = [one.send(bob) for one in (plan, *copies)]
    assert [one(torch.ones(1).send(bob)).get().item() for one in pointers] == [2.0] * 4


def test_a_form_of_a_plan_is_another_one(bob):
    plan = inc()
    pointer = plan.send(bob)
    assert pointer(torch.tensor([[1, 2]]).send(bob)).get().tolist() == [[2, 3]]
    assert pointer.id_at_location == plan.id
    assert pointer(torch.ones(1).send(bob)).get().item() == 2.0


def test_a_protocol_keeps_its_id(bob, alice, me):
    protocol = sy.Protocol([("worker1", inc()), ("worker2", inc())])
    id = protocol.id
    pointer = protocol.send(bob)
    assert protocol.id == id == pointer.id_at_location
    (found,) = me.request_search([protocol.id], location=bob)
    assert isinstance(found, PointerProtocol)
    assert found.get().id == id
    assert protocol.send(alice).id_at_location == id
    assert protocol.owner is me


def test_fetch_plan(bob, me):
    net = Net().tag("#net")
    net.build(torch.zeros(1, 2))
    pointer = net.send(bob)
    x = torch.randn(3, 2)
    for options in ({"copy": True}, {"copy": False}, {}):
        fetched = net.owner.fetch_plan(pointer.id_at_location, bob, **options)
        assert fetched.is_built
        assert torch.equal(fetched(x), net(x))
        assert fetched.id != net.id
        assert [name for name, _ in fetched.named_parameters()] == ["fc.weight", "fc.bias"]
    with torch.no_grad():
        fetched.fc.weight.zero_() if hasattr(fetched, "fc") else next(fetched.parameters()).zero_()
    assert torch.equal(pointer(x.send(bob)).get(), net(x))
    assert torch.equal(bob.fetch_plan(net.id, bob)(x), net(x))


def test_fetching_what_is_no_plan_there(bob, alice, me):
    plan = inc()
    pointer = plan.send(bob)
    x = torch.ones(1).send(bob)
    with pytest.raises(OptionError, match="is no plan: get"):
        me.fetch_plan(x.id_at_location, bob)
    assert x.get().item() == 1.0
    with pytest.raises(UnknownObjectError):
        me.fetch_plan(plan.id, alice)
    with pytest.raises(OptionError, match=r"fetch_plan\(pointer\.id_at_location, pointer\.location\)"):
        me.fetch_plan(plan.id, "bob")
    with pytest.raises(LocalError):
        me.fetch_plan("x", bob)
    assert pointer(torch.ones(1).send(bob)).get().item() == 2.0


def test_a_private_plan_is_not_fetched(bob, me):
    net = Net()
    net.build(torch.zeros(1, 2))
    pointer = net.send(bob, private=True)
    with pytest.raises(GetNotPermittedError):
        me.fetch_plan(pointer.id_at_location, bob)


def test_a_pointer_from_an_id(bob, me):
    plan = inc()
    sent = plan.send(bob)
    pointer = PointerPlan(location=bob, id_at_location=plan.id)
    assert pointer(torch.ones(1).send(bob)).get().item() == 2.0
    assert pointer.readable_plan == plan.readable_plan
    del pointer
    assert sent(torch.ones(1).send(bob)).get().item() == 2.0
    protocol = sy.Protocol([("worker1", inc())])
    there = protocol.send(bob)
    assert [
        name for name, _ in PointerProtocol(location=bob, id_at_location=there.id_at_location).get().plans
    ] == ["worker1"]


def test_a_pointer_from_an_id_that_is_none(bob):
    for wrong in ({}, {"location": bob}, {"id_at_location": 3}, {"location": "bob", "id_at_location": 3}):
        with pytest.raises(OptionError, match="location=worker and id_at_location="):
            PointerPlan(**wrong)
    with pytest.raises(UnknownObjectError):
        PointerPlan(location=bob, id_at_location=3)(torch.ones(1).send(bob))


def test_a_plan_moves_in_place(bob, alice, james):
    net = Net().tag("#net").describe("a net")
    net.build(torch.zeros(1, 2))
    pointer = net.send(bob)
    x = torch.randn(3, 2)
    assert pointer.move(alice) is pointer
    assert (pointer.location, pointer.id_at_location) == (alice, net.id)
    assert torch.equal(pointer(x.send(alice)).get(), net(x))
    assert net.get_pointers() == {"alice": pointer}
    assert bob.search("#net") == []
    assert alice.search("#net")[0].description == "a net"
    assert pointer.move(james).move(bob).move(bob) is pointer
    assert torch.equal(pointer.get()(x), net(x))


def test_a_plan_that_moved_has_its_forms_where_it_is(bob, alice):
    plan = inc()
    pointer = plan.send(bob)
    assert pointer(torch.tensor([1, 2]).send(bob)).get().tolist() == [2, 3]
    pointer.move(alice)
    assert pointer(torch.tensor([1, 2]).send(alice)).get().tolist() == [2, 3]


def test_a_move_that_fails_leaves_the_plan_where_it_is(bob):
    pointer = inc().send(bob)
    with pytest.raises(OptionError, match="move takes a worker"):
        pointer.move("alice")
    assert pointer(torch.ones(1).send(bob)).get().item() == 2.0


def test_new_ids():
    assert len({sy.ID_PROVIDER.pop() for _ in range(100)}) == 100
