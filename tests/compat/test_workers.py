"""What programs of PySyft 0.2 expect of workers: what they hold, whom they know, and what is sent to them."""

from __future__ import annotations

import time

import pytest
import syft as sy
import torch

from planrt.errors import OptionError, UnknownObjectError, WireError
from planrt.workers.wire import messages as m

# ------------------------------------------------------------------------------------------- objects by name


def held(worker, id):
    found = worker._objects[id]
    return found.copy().get() if isinstance(found, sy.PointerTensor) else found


def test_an_object_is_sent_by_a_worker_and_asked_back(me, alice):
    x = torch.Tensor([100, 100])
    me.send_obj(x, alice)
    assert torch.equal(held(alice, x.id), x)
    assert torch.equal(me.request_obj(x.id, alice), x)
    assert x.id not in alice._objects


def test_an_object_is_set_and_got(bob, alice):
    x = torch.Tensor([200, 200])
    bob.set_obj(x)
    found = bob.get_obj(x.id)
    assert torch.equal(found.copy().get() if isinstance(found, sy.PointerTensor) else found, x)
    assert torch.equal(alice.request_obj(x.id, bob), x)


def test_a_worker_sends_as_a_tensor_does(me, bob):
    x = torch.tensor([1.0, 2])
    pointer = me.send(x, bob)
    assert (pointer.location, pointer.id_at_location) == (bob, x.id)
    assert pointer.get().tolist() == [1, 2]


def test_what_is_set_stays_until_it_is_removed(bob):
    x, y = torch.ones(1), torch.ones(2)
    bob.register_obj(x)
    bob.register_obj(y, obj_id=77)
    assert set(bob._objects) == {x.id, 77}
    assert y.id == 77
    bob.de_register_obj(x)
    assert set(bob._objects) == {77}
    bob.rm_obj(77)
    bob.rm_obj(77)
    assert bob._objects == {}


def test_a_pointer_to_what_was_removed_says_so(bob):
    pointer = torch.ones(2).send(bob)
    bob.de_register_obj(pointer)
    with pytest.raises(RuntimeError, match="used up"):
        pointer.get()


def test_data_is_loaded(bob):
    data = [torch.ones(1).tag("#one"), torch.ones(2)]
    bob.load_data(data)
    assert len(bob._objects) == 2
    assert bob.search("#one")[0].get().tolist() == [1]


def test_plans_data_sets_and_configs_are_set(bob):
    plan = sy.func2plan(args_shape=[(1,)])(lambda x: x + 1)
    bob.set_obj(plan)
    assert list(bob._objects) == [plan.id]
    bob.set_obj(sy.BaseDataset(torch.ones(2, 2), torch.ones(2)))
    assert bob.objects_count() == 3
    config = sy.TrainConfig(model=None, loss_fn=None, id="a")
    bob.set_obj(config)
    assert bob.train_config.id == "a"


def test_what_is_no_object(bob, me):
    for wrong in (3, "x", None, {}):
        with pytest.raises(OptionError, match="workers hold tensors"):
            bob.set_obj(wrong)
        with pytest.raises(OptionError):
            bob.send(wrong, bob)
    with pytest.raises(OptionError, match=r"module\.send"):
        bob.set_obj(torch.nn.Linear(1, 1))
    with pytest.raises(OptionError, match="a worker"):
        me.send_obj(torch.ones(1), "bob")
    with pytest.raises(OptionError, match=r"write \[x\]"):
        bob.load_data(torch.ones(1))
    with pytest.raises(OptionError):
        bob.de_register_obj(3)
    with pytest.raises(OptionError):
        bob.rm_obj("x")
    with pytest.raises(UnknownObjectError):
        bob.get_obj(3)
    assert bob._objects == {}


def test_a_listing_is_emptied_and_nothing_else(bob):
    x = torch.tensor([1, 2]).send(bob)
    bob._objects = {}
    assert bob._objects == {}
    with pytest.raises(KeyError):
        (x + x).get()
    with pytest.raises(OptionError, match="set_obj"):
        bob._objects = {1: torch.ones(1)}


def test_objects_are_counted_cleared_and_shown(bob):
    kept = [torch.tensor([1, 2, 3]).send(bob, garbage_collect_data=False) for _ in range(2)]
    assert (bob.objects_count(), bob.objects_count_remote(), len(bob._objects)) == (2, 2, 2)
    assert str(kept[0].id_at_location) in bob.list_objects()
    assert bob.clear_objects() is bob
    assert bob.objects_count() == 0


def test_a_worker_prints_its_name(bob, transport):
    assert "bob" in str(bob)
    if transport == "memory":
        pointer = torch.ones(1).send(bob)
        assert str(bob) == "<VirtualWorker id:bob #objects:1>"
        del pointer


def test_a_worker_starts_with_much_data(hook):
    data = [torch.full((5, 5), float(index)) for index in range(2_000)]
    with sy.VirtualWorker(hook, id="dummy", data=data) as dummy:
        assert len(dummy._objects) == 2_000
        assert dummy._objects[data[7].id][0, 0] == 7


# ----------------------------------------------------------------------------------------------------- search


@pytest.fixture
def tagged(bob):
    made = [
        torch.tensor([1, 2]).tag("#fun", "#mnist").describe("The images in the MNIST training dataset."),
        torch.tensor([3, 4]).tag("#not_fun", "#cifar").describe("The labels in the CIFAR training dataset."),
        torch.tensor([5, 6])
        .tag("#fun", "#boston_housing")
        .describe("The input datapoints to the boston housing."),
    ]
    return [one.send(bob) for one in made]


@pytest.mark.parametrize(
    ("query", "count"),
    [
        (["#fun"], 2), (["#mnist"], 1), (["#fun", "#mnist"], 1), (["#fun", "#cifar"], 0), (["#nothing"], 0),
        (["training"], 2), (["The", "#fun"], 2),
    ],
)  # fmt: skip
def test_search_by_tags_and_words(bob, tagged, query, count):
    assert len(bob.search(query)) == len(bob.search(*query)) == count


def test_search_by_id_and_from_here(bob, me, tagged):
    assert [one.get().tolist() for one in bob.search(tagged[1].id_at_location)] == [[3, 4]]
    found = me.request_search(["#fun"], location=bob)
    assert [one.location for one in found] == [bob, bob]
    assert found[0].owner is me
    assert (found[0].tags, found[0].description) == (
        {"#fun", "#mnist"},
        "The images in the MNIST training dataset.",
    )


def test_tags_show_when_a_pointer_is_printed(bob, tagged):
    (found,) = bob.search("#mnist")
    text = str(found)
    assert "Tags: #fun #mnist" in text
    assert "Shape: [2]" in text
    assert "Description: The images" in text


# ------------------------------------------------------------------------------------------------ the registry


def test_workers_made_again_are_the_same(hook):
    bob = sy.VirtualWorker(hook, "bob")
    x = torch.tensor([1, 2, 3]).send(bob)
    bob = sy.VirtualWorker(hook, "bob")
    y = torch.tensor([2, 2, 2]).send(bob)
    bob = sy.VirtualWorker(hook, "bob")
    z = torch.tensor([3, 3, 3]).send(bob)
    assert (x + y * z).get().tolist() == [7, 8, 9]
    bob.close()


def test_a_worker_that_is_not_added_is_not_known(hook, me):
    quiet = sy.VirtualWorker(hook, id="quiet", auto_add=False)
    assert "quiet" not in me._known_workers
    me.add_worker(quiet)
    assert me._known_workers["quiet"] is quiet
    me.remove_worker_from_registry("quiet")
    assert "quiet" not in me._known_workers
    quiet.close()


def test_a_client_worker_for_a_while(hook):
    with sy.VirtualWorker(hook, id="ann", is_client_worker=True) as ann:
        with ann.registration_enabled():
            assert ann.is_client_worker is False
        assert ann.is_client_worker is True
        with pytest.raises(ZeroDivisionError), ann.registration_enabled():
            _ = 1 / 0
        assert ann.is_client_worker is True


# ------------------------------------------------------------------------------------------------- messages


def test_messages_are_written_down_while_that_is_wanted(bob):
    x = torch.tensor([1, 2])
    assert (bob.log_msgs, bob.msg_history) == (False, [])
    bob.log_msgs = True
    pointer = x.send(bob)
    assert isinstance(bob.msg_history[-1], m.Put)
    done = pointer + pointer
    assert isinstance(bob.msg_history[-1], m.Post)
    done.get()
    assert isinstance(bob.msg_history[-1], m.Fetch)
    assert bob.search("#none") == []
    assert isinstance(bob.msg_history[-1], m.Search)
    bob.log_msgs = False
    count = len(bob.msg_history)
    pointer.get()
    assert len(bob.msg_history) == count >= 4


def test_messages_are_written_down_from_the_start_and_over_a_reconnection(hook):
    with sy.VirtualWorker(hook, id="ann", log_msgs=True) as ann:
        torch.ones(1).send(ann).get()
        before = len(ann.msg_history)
        assert before >= 2
        ann.close()
        ann.connect()
        torch.ones(1).send(ann).get()
        assert len(ann.msg_history) > before


def test_messages_wait_as_in_a_slow_network(bob):
    assert bob.message_pending_time == 0
    bob.message_pending_time = 0.05
    start = time.monotonic()
    assert torch.ones(1).send(bob).get().item() == 1
    assert time.monotonic() - start >= 0.05  # they cannot have been there sooner
    bob.message_pending_time = 0
    for wrong in (-1, "1", None, float("nan"), float("inf"), True):
        with pytest.raises(OptionError, match="number of seconds"):
            bob.message_pending_time = wrong


def test_a_worker_made_with_a_pending_time(hook):
    with sy.VirtualWorker(hook, id="ann", message_pending_time=0.01) as ann:
        assert ann.message_pending_time == 0.01
        assert torch.ones(1).send(ann).get().item() == 1
    with pytest.raises(OptionError):
        sy.VirtualWorker(hook, id="eve", message_pending_time=-1)


def test_frameworks(bob):
    assert bob.is_framework_supported("torch")
    assert not bob.is_framework_supported("tensorflow")
    assert bob.remote.frameworks == {"torch"}


@pytest.mark.parametrize("name", ["tensor", "rand", "randn", "randint", "zeros", "ones"])
def test_tensors_are_made_there(bob, name):
    given = {
        "tensor": ([1, 2],),
        "rand": (2,),
        "randn": (2,),
        "randint": (10, (2,)),
        "zeros": (2,),
        "ones": (2,),
    }
    for framework in bob.remote.frameworks:
        made = getattr(getattr(bob.remote, framework), name)(*given[name])
        assert (made.location, made.get().shape) == (bob, (2,))


def test_what_is_not_on_the_list_is_no_attribute(bob):
    for framework in bob.remote.frameworks:
        with pytest.raises(AttributeError, match="openmind"):
            getattr(getattr(bob.remote, framework), "openmind")  # noqa: B009
    with pytest.raises(AttributeError):
        bob.remote.torch.frameworks  # noqa: B018


# ------------------------------------------------------------------------------------------------ exceptions


def test_names_of_exceptions_are_caught(bob, alice, hook):
    from syft import exceptions

    with pytest.raises(exceptions.TensorsNotCollocatedException):
        torch.ones(1).send(bob) + torch.ones(1).send(alice)
    with pytest.raises(exceptions.ObjectNotFoundError):
        bob.get_obj(1)
    with pytest.raises(exceptions.GetNotPermittedError):
        torch.ones(1).send(bob, private=True).get()
    with pytest.raises(exceptions.InvalidTensorForRemoteGet):
        torch.ones(1).send(bob).remote_get()
    assert issubclass(exceptions.ResponseSignatureError, WireError)


def test_fit_without_a_config_is_a_value_error(bob):
    for call in (bob.fit, bob.evaluate):
        with pytest.raises(ValueError, match=r"TrainConfig\(\.\.\.\)\.send"):
            call(dataset_key="k")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("send_msg", r"x\.send\(worker\)"), ("recv_msg", r"pointer\.get"), ("send_command", "call torch's functions"),
        ("execute_command", "pointers"), ("generate_triple", "crypto provider"), ("find_by_tag", "search"),
        ("_get_msg", "msg_history"), ("execute_worker_function", "func2plan"),
    ],
)  # fmt: skip
def test_what_workers_had_and_have_not_says_what_to_write(bob, name, says):
    with pytest.raises(AttributeError, match=says):
        getattr(bob, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing_like_it'"):
        bob.nothing_like_it  # noqa: B018
    assert not hasattr(bob, name)


def test_what_tensors_had_and_have_not_says_what_to_write(bob):
    x = torch.ones(1)
    for tensor in (x, x.send(bob)):
        with pytest.raises(RuntimeError, match="allowed_users="):
            tensor.allow("User")
        with pytest.raises(RuntimeError, match=r"serde\.serialize"):
            tensor.ser()
