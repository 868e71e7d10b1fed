"""Pointers as users meet them: sent, used, fetched; on both transports."""

import asyncio
import copy
import gc
import pickle
import subprocess
import sys
import threading

import pytest
import torch

import planrt
from planrt.errors import (
    BlockingCallError,
    GonePointerError,
    LocalError,
    MixedLocationsError,
    OptionError,
    PointerError,
    RemoteError,
    RemoteOpError,
    RemoteValueError,
    UnsupportedTensorError,
    WorkerLostError,
)
from planrt.loop import run
from planrt.types import Ref
from planrt.workers.wire.posted import PostedOp


def test_a_tensor_goes_there_and_comes_back(bob):
    x = torch.tensor([1, 2, 3]).send(bob)
    assert bob.objects_count() == 1
    assert torch.equal(x.get(), torch.tensor([1, 2, 3]))
    assert bob.objects_count() == 0


def test_a_pointer_says_where_it_points(bob):
    x = torch.zeros(2, 3).send(bob)
    assert repr(x) == f"(Wrapper)>[PointerTensor | me:{x.id} -> bob:{x.id_at_location}]"
    assert str(x) == f"{x}" == repr(x)
    assert x.location is bob
    assert x.owner is planrt.local_worker
    assert (x.shape, x.dtype, x.dim(), len(x), x.numel()) == (torch.Size([2, 3]), torch.float32, 2, 2, 6)


def test_shape_and_dtype_cost_no_message(bob):
    x = torch.zeros(2, 3, dtype=torch.int16).send(bob)
    x.get()
    before = bob.traffic.copy()
    y = x.T if False else torch.zeros(2).send(bob)
    bob.objects_count()
    sent = bob.traffic.since(before).messages_sent
    for _ in range(3):
        assert (y.shape, y.dtype, y.requires_grad, y.is_leaf, y.stride()) == (
            (2,),
            torch.float32,
            False,
            True,
            (1,),
        )
    bob.objects_count()
    assert bob.traffic.since(before).messages_sent == sent + 1


def test_operators_functions_and_methods_run_there(bob):
    x, y = torch.tensor([1.0, 2.0]).send(bob), torch.tensor([3.0, 4.0]).send(bob)
    assert (x + y).get().tolist() == [4, 6]
    assert torch.add(x, y, alpha=2).get().tolist() == [7, 10]
    assert (2 * x - 1).get().tolist() == [1, 3]
    assert (x @ y).get().item() == 11
    assert x.max().get().item() == 2
    values, indices = torch.sort(y, descending=True)
    assert (values.get().tolist(), indices.get().tolist()) == ([4, 3], [1, 0])
    top = y.max(dim=0)
    assert (top.values.get().item(), top.indices.get().item()) == (4, 1)
    assert [part.get().item() for part in x] == [1, 2]
    assert torch.nn.functional.softmax(x, 0).shape == (2,)


def test_indexing_and_assignment(bob):
    x = torch.arange(12.0).view(3, 4).send(bob)
    x[0] = 7
    x[:, 1] += 1
    x[2, 2:] = torch.tensor([5.0, 6.0]).send(bob)
    x[x > 10] = 0
    expected = torch.arange(12.0).view(3, 4)
    expected[0] = 7
    expected[:, 1] += 1
    expected[2, 2:] = torch.tensor([5.0, 6.0])
    expected[expected > 10] = 0
    assert torch.equal(x.get(), expected)


def test_in_place_operations_give_the_same_pointer(bob):
    x = torch.ones(3).send(bob)
    same = x.add_(1)
    assert same is x
    x *= 2
    assert x.unsqueeze_(0) is x
    assert x.shape == (1, 3)
    assert x.get().tolist() == [[4, 4, 4]]


def test_views_share_memory_there(bob):
    x = torch.zeros(2, 2).send(bob)
    row = x[1]
    row.fill_(5)
    assert x.T.is_contiguous() is False
    assert x.get().tolist() == [[0, 0], [5, 5]]


def test_results_whose_size_depends_on_values_are_asked_for(bob):
    x = torch.tensor([0, 3, 0, 4]).send(bob)
    found = x.nonzero()
    assert found.shape == (2, 1)
    assert x[x > 0].get().tolist() == [3, 4]
    values, counts = torch.unique(x, return_counts=True)
    assert (values.get().tolist(), counts.get().tolist()) == ([0, 3, 4], [2, 1, 1])


def test_random_numbers_follow_the_callers_seed(bob):
    x = torch.ones(5).send(bob)

    def draw():
        torch.manual_seed(3)
        return torch.rand_like(x).get(), torch.nn.functional.dropout(x).get(), x.clone().normal_().get()

    first, second = draw(), draw()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not torch.equal(first[0], torch.rand_like(x).get())


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
def test_every_dtype_and_shape_travels(bob, dtype, shape):
    x = torch.ones(shape, dtype=dtype)
    pointer = x.send(bob)
    assert (pointer.shape, pointer.dtype) == (x.shape, dtype)
    assert torch.equal(pointer.clone().get(), x)


def test_what_is_not_contiguous_travels(bob):
    x = torch.arange(6).view(2, 3).T
    assert torch.equal(x.send(bob).get(), x)
    assert torch.equal(torch.ones(1).expand(4).send(bob).get(), torch.ones(4))
    assert torch.equal(torch.tensor(2.0).expand(1, 1).send(bob).get(), torch.tensor([[2.0]]))


def test_a_tensor_may_change_once_it_is_sent(bob):
    for size in (3, 100_000):
        x = torch.ones(size)
        pointer = x.send(bob)
        x.zero_()
        assert pointer.sum().get().item() == size


def test_in_place_forms(bob):
    x = torch.tensor([1.0, 2.0])
    alias = x
    assert x.send_(bob) is x
    assert alias.location is bob
    y = x + 1
    assert x.get_() is alias
    assert x.tolist() == [1, 2]
    assert type(x) is torch.Tensor
    assert y.get().tolist() == [2, 3]
    with pytest.raises(LocalError, match="get_"):
        torch.ones(2).send(bob).get_()


def test_tags_and_descriptions_travel_and_are_found(bob):
    x = (
        torch.tensor([1.0, 2.0])
        .tag("#x", "#boston")
        .describe("the input datapoints of the boston dataset")
        .send(bob)
    )
    y = torch.tensor([3.0]).tag("#y", "#boston").send(bob)
    torch.tensor([4.0]).send(bob)
    assert {found.id_at_location for found in bob.search(["#boston"])} == {x.id_at_location, y.id_at_location}
    (found,) = bob.search(["#boston", "datapoints"])
    assert "#x" in repr(found)
    assert "Shape: [2]" in repr(found)
    assert "input datapoints" in repr(found)
    assert bob.search("#bost") == []
    assert [one.id_at_location for one in bob.search(str(x.id_at_location))] == [x.id_at_location]
    assert len(planrt.local_worker.request_search(["#y"], location=bob)) == 1
    value = found.get()
    assert value.tags == {"#x", "#boston"}
    assert value.description.startswith("the input")
    z = torch.ones(1).send(bob)
    z.tag("#late").describe("tagged afterwards")
    assert len(bob.search("#late")) == 1
    assert len(bob.search("afterwards")) == 1


def test_one_tensor_on_several_workers(bob, alice):
    x = torch.tensor([1.0, 2.0])
    both = x.send(bob, alice)
    doubled = both * 2 + both
    assert [value.tolist() for value in doubled.get()] == [[3, 6], [3, 6]]
    assert "MultiPointerTensor" in repr(both)
    assert both.shape == (2,)
    assert both.get(sum_results=True).tolist() == [2, 4]
    apart = x.send(bob, alice)
    apart.child["bob"].add_(2)
    assert apart.average().tolist() == [2, 3]
    with pytest.raises(MixedLocationsError, match="twice"):
        x.send(bob, bob)


def test_values_are_not_read_through_a_pointer(bob):
    x = torch.ones(1).send(bob)
    before = None
    bob.objects_count()
    before = bob.traffic.copy()
    reads = [
        bool, float, int, complex, lambda t: t.item(), lambda t: t.tolist(), lambda t: t.numpy(), lambda t: 1 in t,
        lambda t: [0, 1][t], lambda t: torch.equal(t, t), lambda t: torch.allclose(t, t), lambda t: t.__array__(),
        lambda t: f"{t:.4f}", lambda t: format(t, "d"),
    ]  # fmt: skip
    for read in reads:
        with pytest.raises(RemoteValueError, match=r"\.get\(\)"):
            read(x)
    print(x, f"{x}", f"{x:>80}", [x])
    assert bob.traffic.since(before).messages_sent == 0
    assert x.get().item() == 1


def test_pointers_are_neither_pickled_nor_deep_copied(bob):
    x = torch.ones(1).send(bob)
    for attempt in (pickle.dumps, copy.deepcopy, lambda t: torch.save(t, "/dev/null")):
        with pytest.raises(RemoteOpError, match=r"copy\(\)"):
            attempt(x)
    assert x.copy().get().item() == 1


def test_operands_in_different_places(bob, alice):
    x, y, here = torch.ones(2).send(bob), torch.ones(2).send(alice), torch.ones(2)
    with pytest.raises(MixedLocationsError, match=r"worker 'bob' and worker 'alice'.*move"):
        x + y
    for mix in (lambda: x + here, lambda: here + x, lambda: torch.stack([x, here]), lambda: here.add_(x)):
        with pytest.raises(MixedLocationsError, match=r"this process.*send"):
            mix()
    assert x.get().tolist() == y.get().tolist() == here.tolist() == [1, 1]


def test_shape_and_dtype_mistakes_are_raised_where_they_are_made(bob):
    x, y = torch.ones(2, 3).send(bob), torch.ones(2).send(bob)
    with pytest.raises(RuntimeError):
        x @ x
    with pytest.raises(RuntimeError):
        x.view(5)
    with pytest.raises(IndexError):
        x.sum(dim=4)
    with pytest.raises(RuntimeError):
        y.add_(torch.ones(3).send(bob))
    with pytest.raises(TypeError):
        torch.sum(x, dim="rows")
    assert y.get().tolist() == [1, 1]


def test_a_failure_surfaces_at_get_with_op_line_worker_and_traceback(bob):
    x = torch.zeros(2, 2).send(bob)
    inverse = torch.linalg.inv(x)  # the line that fails
    dependent = (inverse + 1).sum()
    for pointer in (dependent, inverse):
        with pytest.raises(RemoteError, match="singular") as caught:
            pointer.get()
        error = caught.value
        assert (error.op, error.worker_id) == ("linalg.inv", "bob")
        assert error.line.startswith(__file__)
        line = int(error.line.rsplit(":", 1)[1])
        with open(__file__) as file:
            assert "the line that fails" in file.read().splitlines()[line - 1]
        assert "Traceback" in error.remote_traceback
    assert x.get().tolist() == [[0, 0], [0, 0]]


def test_more_results_than_memory_holds_are_refused_here_and_there(bob):
    x = torch.zeros(1).send(bob).expand(10**9)
    for many in (x.unbind, lambda: x.split(1), lambda: torch.chunk(x, 10**8)):
        with pytest.raises(ValueError, match=r"would give 1.*,000 results, and an op may give 65,536"):
            many()
    assert [part.shape[0] for part in x.split(4 * 10**8)] == [4 * 10**8, 4 * 10**8, 2 * 10**8]
    unchecked = PostedOp("Tensor.unbind", (Ref(x.id_at_location),), {}, None, True, None, ())
    with pytest.raises(RemoteError, match=r"unbind would give 1,000,000,000 results"):
        bob.workplace.call(unchecked.pack())


def test_an_op_that_does_not_travel_frees_what_it_was_to_free(bob):
    x = torch.ones(2, requires_grad=True).send(bob)
    y = (x * 2).sum()
    before = bob.objects_count()
    forgotten = torch.ones(3).send(bob)
    assert bob.objects_count() == before + 1
    del forgotten
    with pytest.raises(RemoteOpError, match=r"autograd\.grad: "):
        torch.autograd.grad(y, [x] * 300_000)
    gc.collect()
    assert bob.objects_count() == before
    assert torch.autograd.grad(y, x)[0].get().tolist() == [2.0, 2.0]


def test_a_failed_change_in_place_leaves_its_operands_alone(bob):
    x = torch.ones(3).send(bob)
    x.index_add_(0, torch.tensor([7]).send(bob), torch.ones(1).send(bob))
    after = x + 1
    with pytest.raises(RemoteError, match="index_add_"):
        x.get()
    with pytest.raises(RemoteError, match="index_add_"):
        after.get()
    assert x.get().tolist() == [1, 1, 1]


def test_a_chain_of_operations_costs_one_wait(bob):
    x = torch.ones(3).send(bob)
    bob.objects_count()
    before = bob.traffic.copy()
    for _ in range(500):
        x = x * 1.001 + 0.1
    x.get()
    assert bob.traffic.since(before).messages_received == 1


def test_use_after_get(bob, alice):
    x = torch.ones(2).send(bob)
    x.get()
    for use in (lambda: x + 1, x.get, lambda: x.move(alice), lambda: x.add_(1)):
        with pytest.raises(GonePointerError, match="used up"):
            use()
    assert "used up" in repr(x)


def test_a_closed_worker(make_worker):
    bob = make_worker("bob")
    x = torch.ones(2).send(bob)
    bob.close()
    for use in (lambda: torch.ones(1).send(bob), x.get, lambda: x + 1):
        with pytest.raises(WorkerLostError, match="bob"):
            use()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        lambda: torch.ones(2, device="meta"),
    ],
    ids=["sparse", "quantised", "meta"],
)
@pytest.mark.filterwarnings("ignore:.*quantize.*")
def test_tensors_that_cannot_travel(bob, make):
    with pytest.raises(UnsupportedTensorError, match="convert it"):
        make().send(bob)
    assert bob.objects_count() == 0


def test_functions_off_the_table_say_why(bob):
    x = torch.ones(2).send(bob)
    for refused in (
        lambda: x.apply_(lambda v: v), lambda: x.data_ptr(), lambda: x.register_hook(print), lambda: x.to_sparse(),
        lambda: x.untyped_storage(),
    ):  # fmt: skip
        with pytest.raises(PointerError, match="remote tensor|on a worker"):
            refused()
    assert x.get().tolist() == [1, 1]


def test_results_go_where_out_says(bob):
    x, y = torch.ones(2).send(bob), torch.zeros(2).send(bob)
    assert torch.add(x, x, out=y) is y
    assert y.get().tolist() == [2, 2]
    with pytest.raises(RemoteOpError, match="out="):
        torch.add(x, x, out=torch.zeros(3).send(bob))
    whole = torch.zeros(2, dtype=torch.int64).send(bob)
    with pytest.raises(RuntimeError, match=r"float32 can't be cast .* torch\.int64"):
        torch.add(x, x, out=whole)
    assert whole.get().tolist() == [0, 0]


def test_send_used_wrongly(bob):
    with pytest.raises(LocalError, match="send to whom"):
        torch.ones(1).send()
    with pytest.raises(LocalError, match="workers"):
        torch.ones(1).send("bob")
    with pytest.raises(LocalError, match="send\\(\\) it first"):
        torch.ones(1).get()
    with pytest.raises(LocalError, match="TorchHook"):
        planrt.TorchHook("torch")
    with pytest.raises(LocalError, match="list of user names"):
        torch.ones(1).send(bob, allowed_users="ann")


# ------------------------------------------------------------------------------------------------- garbage


def test_objects_go_with_their_last_pointer(bob):
    x = torch.ones(2).send(bob)
    y = x
    del x
    assert bob.objects_count() == 1
    del y
    gc.collect()
    assert bob.objects_count() == 0


def test_objects_can_be_kept(bob):
    x = torch.ones(2).send(bob, garbage_collection=False)
    y = torch.ones(2).send(bob)
    y.garbage_collection = False
    del x, y
    gc.collect()
    assert bob.objects_count() == 2
    bob.clear_objects()
    assert bob.objects_count() == 0


def test_ten_thousand_operations_leave_nothing_behind(bob):
    x = torch.ones(2).send(bob)
    start = bob.objects_count()
    y = x
    sent = bob.traffic.messages_sent
    for _ in range(10_000):
        y = y + x
    assert y.get().tolist() == [10_001, 10_001]
    messages = bob.traffic.messages_sent - sent
    del y
    assert bob.objects_count() == start
    assert messages < 2_000  # operations, and what became garbage meanwhile, travel together


# ------------------------------------------------------------------------------- pointers to pointers, moving


def test_pointers_to_pointers(bob, alice):
    x = torch.tensor([1.0, 2.0]).send(bob).send(alice)
    assert f"alice:{x.id_at_location} -> bob" in repr(x)
    assert x.shape == (2,)
    y = (x + x) * 3
    y.add_(1)
    back = y.get()
    assert back.location is bob
    assert back.get().tolist() == [7, 13]
    assert x.get().get().tolist() == [1, 2]
    del y, back, x
    assert (bob.objects_count(), alice.objects_count()) == (0, 0)


def test_chains_of_any_length(bob, alice, make_worker):
    carol = make_worker("carol")
    x = torch.tensor([2.0], requires_grad=True).send(bob).send(alice).send(carol)
    assert f"carol:{x.id_at_location} -> alice -> bob" in repr(x)
    loss = (x * x).sum()
    loss.backward()
    assert x.grad.get().get().get().tolist() == [4]
    assert x[x > 1].get().get().get().tolist() == [2]
    back = x.get().get()
    assert back.location is bob
    assert back.get().grad.tolist() == [4]


def test_a_failure_in_a_chain_surfaces_at_get(bob, alice):
    x = torch.zeros(2, 2).send(bob).send(alice)
    bad = torch.linalg.inv(x)
    with pytest.raises(RemoteError, match="singular"):
        bad.get().get()
    with pytest.raises(MixedLocationsError, match="alice"):
        x + torch.zeros(2, 2).send(alice)


def test_moving_goes_from_worker_to_worker(bob, alice):
    x = torch.randn(100_000, requires_grad=True)
    x.grad = torch.ones(100_000)
    pointer = x.send(bob)
    bob.objects_count(), alice.objects_count()
    before = bob.traffic.copy(), alice.traffic.copy()
    moved = pointer.move(alice)
    assert moved.location is alice
    assert (bob.objects_count(), alice.objects_count()) == (0, 1)
    for worker, counted in zip((bob, alice), before, strict=True):
        assert worker.traffic.since(counted).bytes_sent < 2_000
        assert worker.traffic.since(counted).bytes_received < 2_000
    assert moved.grad.sum().get().item() == 100_000
    value = moved.get()
    assert torch.equal(value, x)
    assert torch.equal(value.grad, x.grad)


def test_moving_to_where_it_is(bob):
    x = torch.ones(1).send(bob)
    assert x.move(bob) is x


def test_moving_to_a_worker_that_is_gone_loses_nothing(bob, make_worker):
    carol = make_worker("carol")
    x = torch.ones(2).send(bob)
    carol.close()
    with pytest.raises(WorkerLostError, match="carol"):
        x.move(carol)
    with pytest.raises(WorkerLostError, match="carol"):
        x.send(carol)
    assert x.get().tolist() == [1, 1]


# --------------------------------------------------------------------------------------- who waits, and where


def test_await_forms_from_any_loop(bob, alice):
    async def go():
        x = await torch.tensor([1.0, 2.0]).async_send(bob)
        found = await bob.async_search("#nothing")
        y = await (x + 1).async_move(alice)
        return found, await asyncio.gather(x.async_get(), (y * 2).async_get())

    found, (x, y) = asyncio.run(go())
    assert (found, x.tolist(), y.tolist()) == ([], [1, 2], [4, 6])


def test_await_forms_take_what_their_twins_take(bob, alice):
    async def go():
        x = torch.ones(2)
        kept = await x.async_send(bob, garbage_collection=False)
        both = await torch.tensor([1.0, 2.0]).async_send(bob, alice)
        total = await both.async_get(sum_results=True)
        inplace = torch.full((2,), 3.0)
        assert await inplace.async_send(bob, inplace=True, timeout=60) is inplace
        await inplace.async_move(alice, False, timeout=60)
        with pytest.raises(OptionError, match="move takes no requires_grad="):
            await inplace.async_move(bob, True)
        with pytest.raises(OptionError, match="send takes no user="):
            await x.async_send(bob, user="me")
        with pytest.raises(LocalError, match="inplace=True is for one worker"):
            await x.async_send(bob, alice, inplace=True)
        assert kept.garbage_collection is False
        return total, inplace.get_()

    total, inplace = asyncio.run(go())
    assert (total.tolist(), inplace.tolist()) == ([2, 4], [3, 3])
    assert (bob.objects_count(), alice.objects_count()) == (1, 0)  # what was sent to be kept


def test_await_forms_of_training(bob, alice):
    async def go():
        model = torch.nn.Linear(2, 1, bias=False)
        weight = model.weight.detach().clone()
        await model.async_send(bob)
        x = await torch.ones(1, 2).async_send(bob)
        model(x).sum().backward()
        grad = await model.weight.async_grad()
        counted = await bob.async_objects_count()
        await model.async_move(alice)
        assert model.location is alice
        assert model.weight.grad is not None
        await model.async_get()
        chain = await x.async_send(alice)
        back = await (await chain.async_get()).async_get()
        await bob.async_clear_objects()
        return model, weight, grad, counted, back

    model, weight, grad, counted, back = asyncio.run(go())
    assert torch.equal(model.weight, weight)
    assert model.weight.grad.tolist() == [[1, 1]]
    assert (grad.shape, counted > 1, back.tolist()) == ((1, 2), True, [[1, 1]])
    assert bob.objects_count() == 0


def test_what_search_found_goes_with_its_pointer(bob):
    kept = torch.ones(2).tag("#kept").send(bob)
    for _ in range(5):
        (found,) = bob.search("#kept")
        assert found.sum().get().item() == 2
    del found
    assert bob.objects_count() == 1
    assert kept.get().tolist() == [1, 1]


def test_threads_use_pointers_at_once(bob):
    results = {}

    def work(number):
        x = torch.full((3,), float(number)).send(bob)
        for _ in range(200):
            x = x + 1
        results[number] = x.get().tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [number + 200.0] * 3 for number in range(4)}
    assert bob.objects_count() == 0


def test_blocking_on_planrts_own_loop_names_the_await_form(bob):
    x = torch.ones(1).send(bob)

    async def block():
        return x.get()

    with pytest.raises(BlockingCallError, match="async_get"):
        run(block(), instead="nothing")
    assert x.get().item() == 1


def test_this_process_has_a_worker_too():
    me = planrt.local_worker
    assert me is planrt.hook.local_worker
    assert planrt.TorchHook(torch) is planrt.hook
    x = torch.ones(2).send(me)
    assert (x + x).get().tolist() == [2, 2]


def test_virtual_workers_show_what_they_hold():
    kept = torch.tensor([5.0]).tag("#kept")
    with planrt.VirtualWorker(planrt.hook, id="dan", data=(kept,)) as dan:
        assert [value.tolist() for value in dan._objects.values()] == [[5]]
        x = torch.ones(2).send(dan)
        assert repr(dan) == "<VirtualWorker id:dan #objects:2>"
        assert torch.equal(dan._objects[x.id_at_location], torch.ones(2))
        (found,) = dan.search("#kept")
        found.zero_()
        assert kept.item() == 5
        assert found.get().item() == 0
        assert len(dan.search("#kept")) == 1
    with pytest.raises(ValueError, match="needs an id"):
        planrt.VirtualWorker(planrt.hook)


def test_a_virtual_worker_that_is_forgotten_ends_quietly():
    code = (
        "import gc, time, planrt\n"
        "for _ in range(3):\n"
        "    bob = planrt.VirtualWorker('bob')\n"
        "gc.collect(); time.sleep(0.3); print(len(bob._objects))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_forgotten_virtual_workers_that_know_each_other_end_quietly():
    code = (
        "import gc, time, torch, planrt\n"
        "planrt.TorchHook(torch)\n"
        "def work():\n"
        "    bob, alice = planrt.VirtualWorker('bob'), planrt.VirtualWorker('alice')\n"
        "    print(torch.ones(1).send(bob).move(alice).get().item())\n"
        "work(); gc.collect(); time.sleep(0.3); gc.collect()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("1.0\n", "")


def test_names_have_the_homes_that_scripts_know():
    from planrt.fl import Optims
    from planrt.fl.utils import federated_avg
    from planrt.workers.websocket_client import WebsocketClientWorker
    from planrt.workers.websocket_server import WebsocketServerWorker

    assert planrt.WebsocketClientWorker is WebsocketClientWorker
    assert planrt.WebsocketServerWorker is WebsocketServerWorker
    assert (planrt.Optims, planrt.federated_avg) == (Optims, federated_avg)
    assert all(getattr(planrt, name) is not None for name in planrt.__all__)
