"""What pointers ask of the place that their objects are at, held against one that writes it down: no worker."""

import asyncio

import pytest
import torch

from planrt.errors import GonePointerError, MixedLocationsError, OptionError, RemoteOpError
from planrt.plans import func2plan
from planrt.types import Ref
from planrt.workers.client.workplace import RemoteWorkplace
from planrt.workers.pointers import kinds
from planrt.workers.pointers import workplace as interface
from planrt.workers.pointers.handle import Handle
from planrt.workers.pointers.plan import PointerPlan
from planrt.workers.wire import messages as m

from .recorded import RecordedGradients, RecordedIds, RecordedWorkplace


@pytest.fixture
def place():
    return RecordedWorkplace()


def members(kind):
    return {name for name in vars(kind) if not name.startswith("_")}


@pytest.mark.parametrize("fake", [RecordedWorkplace, RemoteWorkplace])
def test_a_workplace_has_what_the_interface_names(fake, place):
    made = place if fake is RecordedWorkplace else None
    for name in members(interface.Workplace):
        there = hasattr(made, name) if made else hasattr(fake, name) or name in (
            "gradients", "ids", "objects", "plans", "moves",
        )  # fmt: skip
        assert there, name
    assert members(interface.KnownGradients) <= {*dir(RecordedGradients())}
    assert members(interface.Ids) <= {*dir(RecordedIds())}


def test_an_op_is_one_posted_op(place):
    x, y = place.pointer(2, 3), place.pointer(3)
    z = x + y
    (op,) = place.ops
    assert (op.name, op.args, op.kwargs) == ("Tensor.add", (Ref(x.id_at_location), Ref(y.id_at_location)), {})
    assert op.results == Ref(z.id_at_location)
    assert op.seed is None
    assert (z.shape, z.location) == ((2, 3), place.location)
    assert place.asked == []


def test_random_ops_carry_a_seed_and_ops_carry_drops(place):
    x = place.pointer(4)
    place.drops = [11, 12]
    torch.nn.functional.dropout(x, 0.5)
    assert (place.ops[0].seed, place.ops[0].drop) == (7, (11, 12))
    _ = x * 2
    assert (place.ops[1].seed, place.ops[1].drop) == (None, ())


def test_what_the_values_decide_is_asked(place):
    x = place.pointer(4)
    place.answers = ["what the worker said"]
    assert torch.nonzero(x) == "what the worker said"
    ((what, (op,), options),) = place.asked
    assert (what, op.name, options) == ("call", "torch.nonzero", {"via": ()})


def test_a_pointer_that_goes_is_forgotten_once(place):
    x = place.pointer(2)
    number = x.id_at_location
    del x
    assert place.forgotten == [number]
    kept = place.pointer(2)
    kept.garbage_collection = False
    number = kept.id_at_location
    del kept
    assert place.forgotten != [number]
    assert place.ids.left == [number]


def test_nothing_is_forgotten_where_the_session_has_ended(place):
    x = place.pointer(2)
    place.location.workplace = RecordedWorkplace()
    with pytest.raises(GonePointerError, match="went with the earlier session on worker 'bob'"):
        x + 1
    del x
    assert place.forgotten == place.location.workplace.forgotten == []


def test_operands_in_two_places_are_refused_before_anything_is_posted(place):
    other = RecordedWorkplace("alice")
    with pytest.raises(MixedLocationsError, match="worker 'bob' and worker 'alice'"):
        place.pointer(2) + other.pointer(2)
    with pytest.raises(RemoteOpError):
        place.pointer(2).map_(place.pointer(2), None)
    assert place.ops == other.ops == []


def test_an_op_that_is_too_long_frees_what_it_was_to_free(place):
    place.op_bytes, place.drops = 50, [5]
    with pytest.raises(RemoteOpError, match="over the limit of 50"):
        place.pointer(2) + 1.5
    assert 5 in place.forgotten


def test_a_backward_pass_and_its_gradients(place):
    w = place.pointer(2, requires_grad=True)
    loss = (w * 3).sum()
    loss.backward()
    assert [what for what, *_ in place.asked] == ["backward"]
    assert place.asked[0][1][0] == [loss.id_at_location]
    assert w.grad is None
    place.gradients.specs[w.id_at_location] = w._spec
    grad = w.grad
    assert place.ops[-1].name == "Tensor.grad"
    assert w.grad is grad
    w.grad = None
    assert place.ops[-1].name == "Tensor.grad.__set__"
    assert w.grad is None


def test_values_come_from_the_places_objects(place):
    x = place.pointer(2)
    place.answers = ["value", "value"]
    assert x.get() == "value"
    assert asyncio.run(x.async_get()) == "value"
    x.tag("#a").describe("what it is")
    assert [what for what, *_ in place.asked] == [
        "objects.fetch", "objects.fetch_async", "objects.describe", "objects.describe",
    ]  # fmt: skip


def test_moves_are_the_places_affair(place):
    x, other = place.pointer(2), RecordedWorkplace("alice").location
    x.move(other)
    x.send(other)
    asyncio.run(x.async_move(other))
    assert [(what, args[1]) for what, args, _ in place.asked] == [
        ("moves.move", other), ("moves.hand_over", other), ("moves.move_async", other),
    ]  # fmt: skip


def test_a_plans_call_is_one_posted_op(place):
    plan = func2plan(lambda x: x.sum() + 1, args_shape=[(2,)])
    pointer = PointerPlan(Handle(place.location, 99), record=plan.record)
    result = pointer(place.pointer(2))
    (op,) = place.ops
    assert (op.name, op.args[0], op.results) == ("plan", Ref(99), (Ref(result.id_at_location),))
    assert result.shape == ()


def test_found_objects_become_pointers_by_their_kind(place):
    like = m.ObjectSpec([2], [1], "float32")
    tensor = kinds.pointer_to(place.location, m.FoundItem(5, like, ["#t"], "a tensor", False, True))
    plan = kinds.pointer_to(
        place.location, m.FoundItem(6, None, ["#p"], "", False, False, "plan", "two", True)
    )
    protocol = kinds.pointer_to(place.location, m.FoundItem(7, None, [], "", False, False, "protocol"))
    assert [type(one).__name__ for one in (tensor, plan, protocol)] == [
        "PointerTensor", "PointerPlan", "PointerProtocol",
    ]  # fmt: skip
    assert (tensor.tags, tensor.id_at_location, tensor.garbage_collection) == ({"#t"}, 5, True)
    assert (plan.name, plan.training, plan.garbage_collection) == ("two", True, False)


def test_a_kind_is_registered_once(place):
    with pytest.raises(OptionError, match="'tensor' have pointers already"):
        kinds.register("tensor", lambda worker, found: None)
    share = m.FoundItem(5, None, [], "", False, True, "share")
    with pytest.raises(Exception, match="kind 'share', which this planrt does not know"):
        kinds.pointer_to(place.location, share)
    kinds.register("share", lambda worker, found: (worker.id, found.id))
    try:
        assert kinds.pointer_to(place.location, share) == ("bob", 5)
    finally:
        del kinds._makers["share"]
