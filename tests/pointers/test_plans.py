"""Plans on workers: sending, calling, taking back, finding; each test runs over memory and over a websocket."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planrt
from planrt.errors import (
    GonePointerError,
    LocalError,
    MixedLocationsError,
    OptionError,
    PlanArgumentError,
    PlanError,
    PointerError,
    RemoteError,
)


class Net(planrt.Plan):
    """Two layers."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(2, 3)
        self.fc2 = nn.Linear(3, 2)

    def forward(self, x):
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=-1)


@planrt.func2plan(args_shape=[(-1, 2)])
def double_abs(x):
    return torch.abs(x + x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().build(torch.zeros(4, 2))


# ------------------------------------------------------------------------------------------------ calling


def test_a_call_is_one_message_and_gives_a_pointer(bob):
    x = torch.tensor([[-1.0, 2.0]])
    on_bob, plan = x.send(bob), double_abs.send(bob)
    assert repr(plan) == f"[PointerPlan | me:{plan.id} -> bob:{plan.id_at_location}]"
    plan(on_bob).get()
    before = bob.traffic.copy()
    result = plan(on_bob)
    assert isinstance(result, planrt.PointerTensor)
    assert (result.location, tuple(result.shape), result.dtype) == (bob, (1, 2), torch.float32)
    assert bob.traffic.since(before).messages_received == 0  # nobody waited
    assert result.get().tolist() == [[2.0, 4.0]]
    used = bob.traffic.since(before)
    assert (used.messages_sent, used.messages_received) == (2, 1)  # the call; the get and its answer


def test_many_calls_are_pipelined(bob):
    plan, value = double_abs.send(bob), torch.ones(1, 2).send(bob)
    for _ in range(10):
        value = plan(value)
    assert value.get().tolist() == [[1024.0, 1024.0]]


def test_a_class_plan_gives_what_it_gives_here(bob, alice, net):
    x = torch.randn(5, 2)
    here = net(x)
    for worker in (bob, alice):  # without building again
        result = net.send(worker)(x.send(worker))
        assert result.requires_grad
        there = result.get()
        assert there.requires_grad
        assert torch.equal(there, here)


def test_outputs_of_any_nesting_sizes_and_constants(bob):
    @planrt.func2plan(args_shape=[(-1, 3)])
    def many(x):
        return {"sum": x.sum(), "rows": x.shape[0], "parts": [x[:1], (2, None, x)], "text": "a"}

    x = torch.randn(5, 3)
    result = many.send(bob)(x.send(bob))
    assert (result["rows"], result["text"], result["parts"][1][:2]) == (5, "a", (2, None))
    assert torch.equal(result["sum"].get(), x.sum())
    assert torch.equal(result["parts"][0].get(), x[:1])
    assert torch.equal(result["parts"][1][2].get(), x)


def test_results_whose_size_depends_on_values(bob):
    @planrt.func2plan(args_shape=[(-1,)])
    def positive(x):
        return x[x > 0], x.sum()

    x = torch.tensor([1.0, -1.0, 3.0])
    chosen, sum_of = positive.send(bob)(x.send(bob))
    assert (tuple(chosen.shape), chosen.get().tolist(), sum_of.get().item()) == ((2,), [1.0, 3.0], 3.0)


def test_arguments_by_keyword_default_and_in_containers(bob):
    @planrt.func2plan()
    def mix(x, weights, *, scale=2.0, names=("a", "b"), bias=None):
        out = x * weights["w"] * scale + weights["more"][0]
        return out if bias is None else out + bias

    x, w, more = torch.ones(2), torch.full((2,), 3.0), torch.full((2,), 4.0)
    mix.build(x, {"w": w, "more": [more]})
    there = mix.send(bob)
    weights = {"w": w.send(bob), "more": [more.send(bob)]}
    assert there(x.send(bob), weights).get().tolist() == [10.0, 10.0]
    assert there(x=x.send(bob), weights=weights, scale=2.0).get().tolist() == [10.0, 10.0]
    assert there(x.send(bob), weights, names=("a", "b")).get().tolist() == [10.0, 10.0]
    with pytest.raises(PlanArgumentError, match=r"scale of plan 'mix' is fixed at 2.0, as it was built"):
        there(x.send(bob), weights, scale=3.0)
    with pytest.raises(PlanArgumentError, match=r"bias of plan 'mix' is fixed at None"):
        there(x.send(bob), weights, bias=x.send(bob))
    with pytest.raises(PlanArgumentError, match="weights of plan 'mix' has the entries w, more; got w"):
        there(x.send(bob), {"w": w.send(bob)})
    with pytest.raises(PlanArgumentError, match="missing a required argument: 'weights'"):
        there(x.send(bob))
    with pytest.raises(PlanArgumentError, match="weights.more of plan 'mix' has 1 items, got 2"):
        there(x.send(bob), {"w": w.send(bob), "more": [w.send(bob), w.send(bob)]})


def test_a_module_as_an_argument(bob):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))

    @planrt.func2plan()
    def predict(model, x):
        return model(x) * 2

    x = torch.randn(4, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predict.build(model, x)
    assert predict.graph.input_names == (
        "model.0.weight",
        "model.0.bias",
        "model.2.weight",
        "model.2.bias",
        "x",
    )
    assert not predict.graph.state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(isinstance(one, nn.Parameter) for one in model.parameters())
    here = model(x) * 2
    assert torch.equal(predict(model, x), here)
    other = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    assert torch.equal(predict(other, x), other(x) * 2)  # its tensors are inputs
    model.send(bob)
    assert torch.equal(predict.send(bob)(model, x.send(bob)).get(), here)


def test_a_plan_as_an_argument(bob, net):
    @planrt.func2plan()
    def twice(plan, x):
        return plan(x) * 2

    x = torch.randn(3, 2)
    twice.build(net, x)
    assert torch.equal(twice(net, x), net(x) * 2)


def test_a_local_plan_called_with_pointers_goes_there(bob, net):
    x = torch.randn(3, 2)
    on_bob = x.send(bob)
    assert torch.equal(net(on_bob).get(), net(x))
    before = bob.traffic.copy()
    net(on_bob)
    bob.objects_count()
    assert bob.traffic.since(before).bytes_sent < 1_000  # it was there already


def test_random_plans_follow_the_seed(bob):
    @planrt.func2plan(args_shape=[(-1, 8)])
    def noisy(x):
        return F.dropout(x, 0.5)

    there, x = noisy.send(bob), torch.ones(4, 8).send(bob)
    assert torch.equal(there(x, seed=3).get(), there(x, seed=3).get())
    assert not torch.equal(there(x, seed=3).get(), there(x, seed=4).get())
    torch.manual_seed(1)
    first = there(x).get()
    torch.manual_seed(1)
    assert torch.equal(there(x).get(), first)
    with pytest.raises(ValueError, match="seed is a whole number"):
        there(x, seed=-1)


def test_training_and_evaluation_mode(bob):
    class Regular(planrt.Plan):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.norm(x))

    plan, x = Regular().build(torch.randn(4, 3)), torch.randn(16, 3) + 1
    assert plan.hash != plan.eval().hash
    there = plan.train().send(bob)
    trained = there(x.send(bob), seed=0).get()
    assert (trained == 0).any()
    there.eval()
    back = there(x.send(bob)).get()
    moved = there.get()
    assert moved.norm.num_batches_tracked.item() == 1  # its buffers were changed there
    assert plan.norm.num_batches_tracked.item() == 0
    assert torch.allclose(back, moved.eval()(x))
    assert not torch.allclose(back, plan.eval()(x))


def test_in_place_ops_change_the_operand_there(bob):
    @planrt.func2plan(args_shape=[(-1,)])
    def grow(x):
        x += 1
        return x * 2

    x = torch.zeros(3).send(bob)
    assert grow.send(bob)(x).get().tolist() == [2.0, 2.0, 2.0]
    assert x.get().tolist() == [1.0, 1.0, 1.0]


def test_state_is_changed_there_and_comes_back(bob):
    @planrt.func2plan(args_shape=[(-1,)], state=(torch.zeros(1),))
    def count(x, state):
        (seen,) = state.read()
        seen += x.shape[0]
        return x.sum() + seen

    there = count.send(bob)
    assert there(torch.ones(5).send(bob)).get().item() == 10.0
    assert there(torch.ones(3).send(bob)).get().item() == 11.0
    back = there.get()
    assert back.state.read()[0].item() == 8.0
    assert count.state.read()[0].item() == 0.0  # this one was not there
    assert back(torch.ones(2)).item() == 12.0


# ---------------------------------------------------------------------------------- sending and taking back


def test_sending_again_sends_nothing(bob, net):
    first = net.send(bob)
    bob.objects_count()
    before = bob.traffic.copy()
    again = net.send(bob)
    assert bob.traffic.since(before).messages_sent == 0
    assert again.id_at_location == first.id_at_location
    with torch.no_grad():
        net.fc1.bias += 1
    assert net.send(bob).id_at_location != first.id_at_location  # other contents


def test_taking_back_uses_the_pointer_up(bob, net):
    there = net.send(bob)
    back = there.get()
    assert type(back) is Net
    assert back is not net
    assert back.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(back(torch.ones(1, 2)), net(torch.ones(1, 2)))
    with torch.no_grad():
        back.fc1.weight.zero_()
    assert net.fc1.weight.abs().sum() > 0
    for use in (there.get, lambda: there(torch.ones(1, 2).send(bob)), there.copy):
        with pytest.raises(GonePointerError, match="used up"):
            use()
    assert bob.objects_count() == 0
    assert net.send(bob)(torch.ones(1, 2).send(bob)).get() is not None


def test_copies_do_not_alias(bob, net):
    @planrt.func2plan(args_shape=[(-1,)], state=(torch.zeros(1),))
    def count(x, state):
        state.read()[0].add_(1)
        return x + state.read()[0]

    there = count.send(bob)
    copied = there.copy()
    there(torch.zeros(1).send(bob))
    assert copied(torch.zeros(1).send(bob)).get().item() == 1.0
    local = count.copy()
    local(torch.zeros(1))
    assert (local.state.read()[0].item(), count.state.read()[0].item()) == (1.0, 0.0)
    assert local.id != count.id


def test_moving_a_plan(bob, alice, net):
    x, caller = torch.randn(2, 2), bob.traffic.copy()
    there = net.send(bob)
    bob.objects_count()
    sent = bob.traffic.since(caller).bytes_sent
    before = bob.traffic.copy()
    moved = there.move(alice)
    assert bob.traffic.since(before).bytes_sent < sent / 2
    assert repr(moved).startswith("[PointerPlan | me:")
    assert moved.location is alice
    assert torch.equal(moved(x.send(alice)).get(), net(x))
    assert moved is there
    with pytest.raises(MixedLocationsError):
        there(x.send(bob))
    assert bob.objects_count() == 0
    with pytest.raises(LocalError, match="is on worker 'alice' already"):
        moved.send(bob)


def test_to_several_workers(bob, alice, net):
    x = torch.randn(3, 2)
    there = net.send(bob, alice)
    assert [worker.id for worker in there.location] == ["bob", "alice"]
    results = there(x.send(bob, alice))
    assert all(torch.equal(value, net(x)) for value in results.get())
    assert "MultiPointerPlan" in repr(there)
    assert len(there.get()) == 2
    with pytest.raises(LocalError, match="the same worker twice"):
        net.send(bob, bob)


def test_garbage_goes_with_the_pointer(bob, net):
    there = net.send(bob)
    x = torch.ones(1, 2).send(bob)
    for _ in range(100):
        there(x)
    assert bob.objects_count() == 2
    del there
    gc.collect()
    assert bob.objects_count() == 1
    kept = net.send(bob)
    kept.garbage_collection = False
    del kept
    gc.collect()
    assert bob.objects_count() == 2


async def _awaited(bob, net):
    with pytest.raises(LocalError, match="send to whom"):
        await net.async_send()
    with pytest.raises(LocalError, match="send takes workers, not str"):
        await net.async_send("bob")
    with pytest.raises(OptionError, match="timeout is a number"):
        await net.async_send(bob, timeout=0)
    there = await net.async_send(bob, timeout=60)
    result = there(await torch.ones(2, 2).async_send(bob))
    return await result.async_get(), await there.async_get()


def test_the_await_forms(bob, net):
    import asyncio

    value, back = asyncio.run(_awaited(bob, net))
    assert torch.equal(value, net(torch.ones(2, 2)))
    assert torch.equal(back(torch.ones(2, 2)), value)


# ------------------------------------------------------------------------------------------------- finding


def test_published_plans_are_found_with_their_tags(bob, net):
    net.tag("#net", "#mnist").describe("classifies two numbers").send(bob)
    (found,) = bob.search("#net", "classifies")
    assert found.tags == {"#net", "#mnist"}
    assert "Plan: Net" in repr(found)
    assert "Tags: #net #mnist" in repr(found)
    x = torch.randn(2, 2)
    assert torch.equal(found(x.send(bob)).get(), net(x))
    assert found.code == net.code
    assert bob.search("#nothing") == []
    (again,) = planrt.local_worker.request_search(["#net"], location=bob)
    back = again.get()
    assert back.name == "Net"
    assert back.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(back(x), net(x))


def test_tagging_on_the_worker(bob, net):
    there = net.send(bob).tag("#later")
    assert [one.id_at_location for one in bob.search("#later")] == [there.id_at_location]


# --------------------------------------------------------------------------------------------- wrong uses


def test_plans_that_are_not_built(bob):
    @planrt.func2plan()
    def f(x):
        return x + 1

    with pytest.raises(
        PlanError, match=r"plan 'f' is not built: call f\.build\(\.\.\.\) with example tensors"
    ):
        f.send(bob)
    with pytest.raises(PlanError, match="plan 'f' is not built"):
        bob.run(f, torch.ones(1))
    assert f(torch.ones(1).send(bob)).get().item() == 2.0  # its Python code, as any function


def test_arguments_that_do_not_fit(bob, alice, net):
    there = net.send(bob)
    bob.objects_count()
    before = bob.traffic.copy()
    with pytest.raises(
        PlanArgumentError, match=r"x of plan 'Net': wanted float32\[\*, 2\], got float32\[3, 5\]"
    ):
        there(torch.ones(3, 5).send(bob))
    with pytest.raises(PlanArgumentError, match=r"got int64\[1, 2\]"):
        there(torch.ones(1, 2, dtype=torch.int64).send(bob))
    with pytest.raises(PlanArgumentError, match="too many positional arguments"):
        there(torch.ones(1, 2).send(bob), 1)
    with pytest.raises(PlanArgumentError, match="x of plan 'Net' is a tensor, got list"):
        there([1.0, 2.0])
    with pytest.raises(MixedLocationsError, match=r"its argument x in this process: send it there"):
        there(torch.ones(1, 2))
    with pytest.raises(
        MixedLocationsError, match=r"on worker 'bob', its argument x in worker 'alice': move it"
    ):
        there(torch.ones(1, 2).send(alice))
    assert bob.traffic.since(before).messages_received == 0


def test_wrong_places_to_send_to(bob, net):
    with pytest.raises(LocalError, match=r"send to whom\? write plan.send\(worker\)"):
        net.send()
    with pytest.raises(LocalError, match="send takes workers, not str"):
        net.send("bob")
    with pytest.raises(PlanError, match="plan 'Net' is here already"):
        net.get()


def test_a_failure_names_the_op_its_place_and_the_worker(bob):
    @planrt.func2plan()
    def pick(x, index):
        y = x * 2
        return y[index]

    pick.build(torch.ones(3), torch.tensor([0]))
    x = torch.ones(3).send(bob)
    failed = pick.send(bob)(x, torch.tensor([7]).send(bob))
    later = failed + 1
    for pointer in (later, failed):
        with pytest.raises(RemoteError) as raised:
            pointer.get()
        error = raised.value
        assert (error.worker_id, error.kind) == ("bob", "ExecutionError")
        assert (error.op, error.index) == ("Tensor.__getitem__", 1)
        assert "__getitem__" in error.line
        assert error.cause.startswith("IndexError: index 7 is out of bounds")
        assert "op 1 of plan 'pick' failed" in str(error)
        assert "test_plans.py" in str(error)
        assert "index 7 is out of bounds" in error.remote_traceback
    assert x.get().tolist() == [1.0, 1.0, 1.0]  # nothing is lost


def test_a_failure_shows_where_a_plan_gives_no_tensors_and_leaves_the_plan_usable(bob):
    @planrt.func2plan()
    def overwrite(x, index):
        x[index] = 0.0
        return x.shape[0]

    overwrite.build(torch.ones(3), torch.tensor([0]))
    there, x = overwrite.send(bob), torch.ones(3).send(bob)
    assert there(x, torch.tensor([7]).send(bob)) == 3
    with pytest.raises(RemoteError, match="index 7 is out of bounds"):
        bob.objects_count()
    assert there(x, torch.tensor([1]).send(bob)) == 3
    assert x.get().tolist() == [1.0, 0.0, 1.0]


def test_other_clients_do_not_notice_a_hostile_plan(bob, net):
    """Bytes that are no plan: the sender hears of it, the worker and its other clients go on."""
    from planrt.workers.wire import messages as m

    there = net.send(bob)
    for tensors in ([], [torch.zeros(3, dtype=torch.uint8)], [torch.zeros(3)]):
        bob._connection.post(m.StorePlan(2**40, True), tensors)
        with pytest.raises(RemoteError):
            bob.objects_count()
    record = torch.frombuffer(bytearray(net.record.to_bytes()), dtype=torch.uint8)
    bob._connection.post(m.StorePlan(2**40, True), [record])
    with pytest.raises(RemoteError, match="has 4 state tensors, got 0"):
        bob.objects_count()
    assert torch.equal(there(torch.ones(1, 2).send(bob)).get(), net(torch.ones(1, 2)))


def test_pointers_to_plans_cannot_be_copied_by_python(bob, net):
    import copy
    import pickle

    there = net.send(bob)
    for use in (copy.deepcopy, pickle.dumps):
        with pytest.raises(PointerError, match="cannot be pickled or deep-copied"):
            use(there)
