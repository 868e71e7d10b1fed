"""What programs of PySyft 0.2 expect of protocols, in its calls."""

from __future__ import annotations

import pytest
import syft as sy
import torch
from syft.generic.pointers.pointer_plan import PointerPlan
from syft.generic.pointers.pointer_protocol import PointerProtocol
from syft.messaging.protocol import Protocol


def inc_protocol(**options):
    @sy.func2plan(args_shape=[(1,)])
    def inc1(x):
        return x + 1

    @sy.func2plan(args_shape=[(1,)])
    def inc2(x):
        return x + 1

    @sy.func2plan(args_shape=[(1,)])
    def inc3(x):
        return x + 1

    return Protocol([("worker1", inc1), ("worker2", inc2), ("worker3", inc3)], **options)


@pytest.fixture
def workers(alice, bob, charlie):
    return alice, bob, charlie


def test_not_deployed(workers):
    protocol = inc_protocol()
    assert not protocol.workers_resolved
    assert [name for name, _ in protocol.plans] == ["worker1", "worker2", "worker3"]
    with pytest.raises(RuntimeError, match="deploy"):
        protocol.run(torch.tensor([1.0]))


def test_deployed(workers):
    protocol = inc_protocol()
    assert protocol.deploy(*workers) is protocol
    assert protocol.workers_resolved
    for (_, plan), worker in zip(protocol.plans, workers, strict=True):
        assert isinstance(plan, sy.Plan)
        pointer = plan.get_pointers()[worker.id] if plan.get_pointers() else plan.send(worker)
        assert isinstance(pointer, PointerPlan)
        assert pointer.location is worker


@pytest.mark.parametrize("count", [1, 2, 4])
def test_too_few_and_too_many_workers(workers, james, count):
    with pytest.raises(RuntimeError, match="worker"):
        inc_protocol().deploy(*[*workers, james][:count])


def test_workers_by_name_take_their_places(make_worker):
    made = {name: make_worker(name) for name in ("worker2", "worker1", "worker3")}
    protocol = inc_protocol().deploy(*made.values())
    assert protocol.run(torch.tensor([1.0])).location is made["worker3"]


def test_run_from_here(workers):
    protocol = inc_protocol().deploy(*workers)
    pointer = protocol.run(torch.tensor([1.0]))
    assert pointer.location is workers[-1]
    assert pointer.get() == torch.tensor([4.0])
    assert protocol.run(torch.tensor([2.0])).get() == torch.tensor([5.0])


def test_run_on_a_worker(workers, james):
    protocol = inc_protocol().deploy(*workers)
    pointer = protocol.send(james)
    assert isinstance(pointer, PointerProtocol)
    assert protocol.location is james
    ptr = protocol.run(torch.tensor([1.0]).send(james))
    assert ptr.location is james
    assert ptr.get().get() == torch.tensor([4.0])


def test_run_on_a_worker_with_an_input_elsewhere(workers, james, bob):
    protocol = inc_protocol().deploy(*workers)
    protocol.send(james)
    with pytest.raises(RuntimeError, match="james"):
        protocol.run(torch.tensor([1.0]).send(bob))


def test_found_by_its_tag_fetched_and_run(workers, james, me):
    protocol = inc_protocol().tag("my_protocol")
    protocol.send(james)
    (found,) = me.request_search(["my_protocol"], location=james)
    assert (found.id_at_location, found.location) == (protocol.id, james)
    back = found.get()
    assert back.deploy(*workers).run(torch.tensor([1.0])).get() == torch.tensor([4.0])


def test_a_pointer_by_hand(workers, james):
    protocol = inc_protocol()
    protocol.send(james)
    back = PointerProtocol(location=james, id_at_location=protocol.id).get()
    assert len(back.plans) == 3
    assert back.deploy(*workers).run(torch.tensor([1.0])).get() == torch.tensor([4.0])


def test_printed(workers, capsys):
    protocol = inc_protocol(verbose=True)
    assert str(protocol).startswith(f"<Protocol id:{protocol.id} owner:me>")
    protocol.deploy(*workers)
    assert str(protocol).startswith(f"<Protocol id:{protocol.id} owner:me resolved>")
    protocol.run(torch.tensor([1.0]))
    assert capsys.readouterr().out.splitlines() == ["send alice", "move alice -> bob", "move bob -> charlie"]


def test_the_class_protocol_that_goes_and_comes(workers, james):
    protocol = inc_protocol().deploy(*workers)
    protocol.send(james)
    assert protocol.get() is protocol
    assert protocol.location is None
    assert protocol.run(torch.tensor([1.0])).get() == torch.tensor([4.0])
