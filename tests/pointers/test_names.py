"""What programs of PySyft 0.2 write about workers and pointers: names, keywords, order of arguments, errors."""

import asyncio
import gc
import logging
import subprocess
import threading
import time

import pytest
import torch
from torch import nn

import planrt
from planrt import errors
from planrt.errors import GonePointerError, OptionError, PlanrtError, RemoteError, WorkerLostError
from planrt.plans import func2plan
from planrt.serde.frames import Limits
from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from tests.processes import eventually


@pytest.fixture
def hook():
    return planrt.TorchHook(torch)


@pytest.fixture
def bob(hook, make_worker):
    return make_worker("bob")


@pytest.fixture
def alice(make_worker):
    return make_worker("alice")


# --------------------------------------------------------------------------------------- ids and moving


def test_an_object_keeps_its_id(bob, alice):
    x = torch.tensor([1, 2])
    pointer = x.send(bob)
    assert x.id == pointer.id_at_location
    assert x.id in bob._objects
    assert x.send(alice).id_at_location == x.id
    assert pointer.move(alice) is pointer
    back = pointer.get()
    assert (back.id, back.tolist()) == (x.id, [1, 2])
    assert back.send(bob).id_at_location == x.id
    model = nn.Linear(2, 1)
    ids = [one.id for one in model.parameters()]
    assert [one.id_at_location for one in model.send(bob).parameters()] == ids
    assert [one.id for one in model.get().parameters()] == ids


def test_sending_again_keeps_both_objects(bob):
    x = torch.tensor([1.0, 2.0])
    first = x.send(bob)
    first.mul_(10)
    x += 1
    second = x.send(bob)
    assert second.id_at_location == x.id != first.id_at_location
    assert (first + 0).get().tolist() == [10, 20]
    pointer = x.send(bob)
    pointer = x.send(bob)  # the pointer before goes, and its object with it
    assert x.id in bob._objects
    assert pointer.get().tolist() == [2, 3]
    assert second.get().tolist() == [2, 3]
    assert first.get().tolist() == [10, 20]
    assert bob.objects_count() == 0


def test_a_published_object_keeps_its_id_to_itself(bob):
    x = torch.tensor([1.0]).tag("#kept")
    x.send(bob)
    again = x.send(bob)
    assert again.id_at_location == x.id
    assert len(bob.search("#kept")) == 2
    copied = x.clone()
    assert copied.id != x.id


def test_moves_are_in_place_and_chain(bob, alice, make_worker):
    carol = make_worker("carol")
    x = torch.arange(3.0, requires_grad=True).send(bob)
    id = x.id_at_location
    assert x.move(alice).move(carol).move(bob).move(alice) is x
    assert (x.location, x.id_at_location) == (alice, id)
    assert [worker.objects_count() for worker in (bob, alice, carol)] == [0, 1, 0]
    (x * 2).sum().backward()
    x.move(bob)
    assert x.grad.get().tolist() == [2, 2, 2]
    assert asyncio.run(x.async_move(carol)) is x
    assert x.get().tolist() == [0, 1, 2]
    assert [worker.objects_count() for worker in (bob, alice, carol)] == [0, 0, 0]


def test_a_move_where_the_id_is_taken(bob, alice):
    x = torch.tensor([1.0, 2.0])
    there, here = x.send(alice), x.send(bob)
    here.mul_(3)
    here.move(alice)
    assert (here.get().tolist(), there.get().tolist()) == ([3, 6], [1, 2])


def test_a_move_that_fails_loses_nothing(bob, alice, make_worker):
    carol = make_worker("carol")
    x, chain = torch.ones(2).send(bob), torch.ones(3).send(bob).send(alice)
    carol.close()
    for move in (
        lambda: x.move(carol), lambda: chain.move(carol), lambda: x.send(carol), lambda: x.remote_send(carol),
    ):  # fmt: skip
        with pytest.raises(WorkerLostError, match="carol"):
            move()
    for wrong in ("carol", None, 3, torch.ones(1)):
        with pytest.raises(OptionError, match="move takes a worker"):
            x.move(wrong)
    assert x.get().tolist() == [1, 1]
    assert chain.get().get().tolist() == [1, 1, 1]


def test_pointers_to_pointers_move_too(bob, alice, make_worker):
    carol = make_worker("carol")
    pointer = torch.arange(2.0).send(bob).send(alice)
    assert pointer.move(carol) is pointer
    assert pointer.location is carol
    assert [worker.objects_count() for worker in (alice, carol)] == [0, 1]
    assert (pointer * 2).get().get().tolist() == [0, 2]
    assert pointer.remote_get() is pointer
    assert pointer.location is carol
    assert pointer.get().tolist() == [0, 1]
    x = torch.arange(2.0).send(bob)
    assert x.remote_send(alice) is x
    assert (x.location, x.get().location) == (bob, alice)
    with pytest.raises(errors.LocalError, match="is a tensor"):
        torch.ones(1).send(bob).remote_get()


def held(worker):
    """How many objects a worker holds, whoever's they are, without asking it anything."""
    host = getattr(worker, "_host", None)
    return len(host.state.store.objects) if host is not None else None


def test_a_dropped_pointer_frees_its_object_by_itself(hook):
    bob, alice = VirtualWorker(hook, id="bob"), VirtualWorker(hook, id="alice")
    x = torch.zeros(1_000).send(bob)
    assert eventually(lambda: held(bob) == 1)
    assert eventually(
        lambda: bob.traffic.messages_sent == 2
    )  # Hello and the tensor, counted once they are taken
    del x
    assert eventually(lambda: held(bob) == 0)
    assert eventually(lambda: bob.traffic.messages_sent == 3)
    chain = torch.zeros(1_000).send(bob).send(alice)
    assert (held(bob), held(alice)) == (1, 1)
    del chain
    assert eventually(lambda: (held(bob), held(alice)) == (0, 0))


def test_a_dropped_pointer_frees_its_object_over_a_socket(hook):
    with (
        WebsocketServerWorker("bob", threads=1).running() as uri,
        WebsocketClientWorker("bob", uri=uri) as bob,
    ):
        x = torch.zeros(10).send(bob)
        assert bob.objects_count() == 1
        before = bob.traffic.copy()
        del x
        assert eventually(lambda: bob.traffic.since(before).messages_sent == 1)
        assert bob.objects_count() == 0


def test_drops_that_leave_by_themselves_never_overtake_ops(bob):
    x, done = torch.ones(2).send(bob), threading.Event()

    def flush():
        while not done.is_set():
            bob._connection.flush_drops()
            time.sleep(0)

    flushing = threading.Thread(target=flush)
    flushing.start()
    try:
        for _ in range(300):
            y = x
            for _ in range(10):
                y = (y + 1) - 1
            assert y.get().tolist() == [1, 1]
    finally:
        done.set()
        flushing.join()


def test_many_threads_drop_and_send_the_same_tensor(bob):
    x, wrong = torch.arange(4.0), []

    def work():
        for _ in range(100):
            pointer = x.send(bob)
            if pointer.get().tolist() != [0, 1, 2, 3]:
                wrong.append(pointer)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    gc.collect()
    assert bob.objects_count() == 0


# -------------------------------------------------------------------------------------------- listings


def test_what_is_on_a_worker_is_shown_without_its_values(bob, alice):
    big = torch.zeros(100_000).tag("#big").send(bob)
    chain = big.send(alice)
    before = bob.traffic.copy(), alice.traffic.copy()
    (shown,) = alice._objects.values()
    assert repr(shown) == f"(Wrapper)>[PointerTensor | alice:{shown.id} -> bob:{shown.id_at_location}]"
    assert (shown.location, shown.owner) == (bob, "alice")
    assert str(alice._objects) == alice.list_objects_remote()
    assert bob.traffic.since(before[0]).bytes_received < 10_000
    assert alice.traffic.since(before[1]).bytes_received < 10_000
    assert (alice.objects_count_remote(), alice.objects_count()) == (1, 1)
    assert alice.clear_objects_remote() is alice
    assert alice._objects == {}
    del chain


def test_objects_by_their_ids(bob, alice):
    x = torch.tensor([1.0, 2.0]).send(bob)
    y = x + 1
    assert set(bob._objects) == {x.id_at_location, y.id_at_location}
    found = bob.get_obj(x.id_at_location)
    assert found.shape == (2,)
    del found
    assert bob.objects_count() == 2
    assert planrt.local_worker.request_obj(x.id_at_location, bob).tolist() == [1, 2]
    with pytest.raises(GonePointerError):
        x + 1
    for ask in (lambda: bob.get_obj(123), lambda: alice.request_obj(123, bob)):
        with pytest.raises(KeyError, match="no object 123"):
            ask()
    with pytest.raises(OptionError, match="token"):
        alice.request_obj(y.id_at_location, bob, user="ann")
    assert y.get().tolist() == [2, 3]


def test_torchs_functions_on_a_worker_by_their_names(bob, alice):
    assert bob.remote.torch.zeros((2, 3)).get().tolist() == [[0] * 3] * 2
    assert bob.remote.torch.ones(2, dtype=torch.int64).get().dtype == torch.int64
    assert bob.remote.torch.arange(3).location is bob
    assert bob.remote.torch.tensor([1.0, 2.0]).get().tolist() == [1, 2]
    torch.manual_seed(3)
    one = bob.remote.torch.randn(4).get()
    torch.manual_seed(3)
    assert torch.equal(bob.remote.torch.randn(4).get(), one)
    x = torch.tensor([-1.0, 2.0]).send(bob)
    assert bob.remote.torch.add(x, 1).get().tolist() == [0, 3]
    assert bob.remote.torch.nn.functional.relu(x).get().tolist() == [0, 2]
    assert "zeros" in dir(bob.remote.torch)
    for name in ("save", "load", "no_such_thing", "Tensor", "__globals__"):
        with pytest.raises(AttributeError):
            getattr(bob.remote.torch, name)
    with pytest.raises(AttributeError, match="os"):
        bob.remote.os  # noqa: B018
    with pytest.raises(errors.MixedLocationsError, match="alice"):
        bob.remote.torch.add(torch.ones(1).send(alice), 1)
    with pytest.raises(PlanrtError):
        bob.remote.torch.add(torch.ones(1), 1)


# ---------------------------------------------------------------------------------------------- pointers


def test_names_of_pointers(bob, alice):
    x = torch.tensor([1.0, 2.0], requires_grad=True).send(bob)
    assert (x.child, x.is_wrapper, torch.ones(1).is_wrapper, x.gc) == (x, True, False, True)
    loss = (x * 2).sum()
    assert loss.backward() is loss
    y = torch.ones(2).send(bob, garbage_collect_data=False)
    z = torch.ones(2).send(bob)
    assert (y.gc, y.garbage_collect_data, z.disable_gc is z, z.gc) == (False, False, True, False)
    del y, z, loss
    gc.collect()
    assert bob.objects_count() == 3  # x, and the two that stay
    x.gc = False
    x.garbage_collect_data = True
    del x
    gc.collect()
    assert bob.objects_count() == 2
    one, other = torch.ones(1).send(bob), torch.ones(1).send(alice)
    assert one.combine(other).sum_results().item() == 2
    both = planrt.combine_pointers(torch.ones(1).send(bob), torch.ones(1).send(alice))
    assert [worker.id for worker in both.location] == ["bob", "alice"]
    with pytest.raises(OptionError, match="send"):
        planrt.combine_pointers(torch.ones(1))
    here = torch.ones(1)
    assert here.send(bob, inplace=True) is here
    assert here.get_().tolist() == [1]
    with pytest.raises(errors.LocalError, match="one worker"):
        here.send(bob, alice, inplace=True)


def test_torchs_own_functions_have_their_own_names(bob):
    x = torch.tensor([-1.0, 2.0])
    assert x.native_abs().tolist() == [1, 2]
    assert x.send(bob).native_add(1).native_mul(2).get().tolist() == [0, 6]
    with pytest.raises(AttributeError, match=r"write torch\.masked_select"):
        torch.native_masked_select(x, x > 0)
    assert torch.native_dropout(x, 0.0, True)[0].tolist() == [-1, 2]  # torch's own


def test_what_differs_on_purpose_says_what_to_write(bob):
    x = torch.ones(1)
    with pytest.raises(errors.PointerError, match=r"x\.send\(worker, allowed_users="):
        x.private_tensor(allowed_users=("ann",), no_wrap=True)
    pointer = x.send(bob)
    for get in (pointer.get, lambda user: asyncio.run(pointer.async_get(user=user))):
        with pytest.raises(OptionError, match="shows a token"):
            get(user="ann")
    assert pointer.get(reason="to look at it").tolist() == [1]


# ---------------------------------------------------------------------------------------------- workers


def test_workers_know_each_other(bob, alice):
    assert bob.add_workers([alice]) is bob
    assert bob.add_worker(alice) is bob
    assert bob.get_worker("alice") is alice
    assert planrt.local_worker.get_worker(bob) is bob
    for wrong in ("zed", 3, None):
        with pytest.raises(KeyError, match="known here: make it first"):
            bob.get_worker(wrong)
    for wrong in (alice, "alice", [3]):
        with pytest.raises(OptionError, match="add_worker"):
            bob.add_workers(wrong)
    alice.remove_worker_from_local_worker_registry()
    with pytest.raises(KeyError, match="no worker 'alice'"):
        bob.get_worker("alice")


def test_a_worker_made_again_is_the_same(hook, caplog):
    dataset = BaseDataset(torch.ones(2, 1), torch.ones(2))
    data = torch.ones(2).tag("#own")
    bob = VirtualWorker(hook, id="bob", data=[data], datasets={"d": dataset})
    x = torch.ones(2).send(bob)
    with caplog.at_level(logging.WARNING, "planrt.client"):
        again = VirtualWorker(hook, "bob", data=[data.clone().tag("#own")], datasets={"d": dataset})
    assert again is bob
    assert "'bob' is there already" in caplog.text
    assert (x + torch.ones(2).send(again)).get().tolist() == [2, 2]
    assert len(bob.search("#own")) == 1
    VirtualWorker("bob", datasets={"e": dataset})
    assert set(bob.datasets) == {"d", "e"}
    for options in (
        {"token": "t"}, {"users": {"ann": "t"}}, {"datasets": {"d": BaseDataset(torch.ones(1, 1), torch.ones(1))}},
        {"policy": planrt_policy()},
    ):  # fmt: skip
        with pytest.raises(OptionError, match="'bob' is there already, with another"):
            VirtualWorker(hook, id="bob", **options)
    apart = VirtualWorker(hook, id="bob", auto_add=False)
    assert (apart is bob, apart.objects_count()) == (False, 0)
    bob.close()
    fresh = VirtualWorker(hook, id="bob", token="t", users={"ann": "t"})
    assert (fresh is bob, fresh.objects_count()) == (False, 0)


def planrt_policy():
    from planrt.plans.policy.rules import Policy

    return Policy()


def test_a_worker_that_nobody_has_is_in_nobodys_way(hook):
    gone = VirtualWorker(hook, id="bob", token="t", users={"ann": "t"})
    gone.circle = gone
    del gone
    assert VirtualWorker(hook, id="bob").objects_count() == 0


def test_keywords_and_order_of_the_workers_arguments(hook):
    data = torch.tensor([1.0]).tag("#there")
    server = WebsocketServerWorker(hook, "127.0.0.1", 0, "alice", False, True, [data], None)
    with server.running():
        one = WebsocketClientWorker(
            hook,
            "127.0.0.1",
            server.port,
            id="alice",
            is_client_worker=True,
            log_msgs=True,
            verbose=True,
            data=None,
        )
        two = WebsocketClientWorker(hook, "127.0.0.1", server.port, False, "alice", timeout=None)
        three = WebsocketClientWorker("alice", "127.0.0.1", server.port)
        assert one.search("#there")[0].get().tolist() == [1]
        assert one.is_client_worker
        for worker in (one, two, three):
            assert worker.id == "alice"
            worker.close()
        for wrong, says in (
            (lambda: WebsocketClientWorker(hook, "127.0.0.1", server.port), "needs an id"),
            (lambda: WebsocketClientWorker("alice", "127.0.0.1", server.port, id="bob"), "two ids"),
            (lambda: WebsocketClientWorker(hook, id=3), "id is a string"),
            (lambda: WebsocketClientWorker(hook, "127.0.0.1", "x", id="alice"), "port is a whole number"),
            (lambda: WebsocketClientWorker(hook, 3, 8777, id="alice"), "host is a string"),
            (lambda: WebsocketClientWorker(hook, id="alice", data=[data]), "WebsocketServerWorker"),
            (lambda: WebsocketClientWorker(hook, id="a", uri="ws://127.0.0.1:1", secure=True), "wss://"),
            (lambda: WebsocketServerWorker(hook, "127.0.0.1", 0), "needs an id"),
            (lambda: WebsocketServerWorker("a", loop=object()), "loop"),
            (lambda: WebsocketServerWorker("a", cert_path="cert.pem"), "both a certificate"),
            (lambda: WebsocketServerWorker("a", cert_path="no", key_path="no"), "cannot be read"),
        ):
            with pytest.raises(OptionError, match=says):
                wrong()
    bob = VirtualWorker(hook, "bob", (data,), True, log_msgs=True, verbose=True, auto_add=True)
    assert (bob.is_client_worker, len(bob.search("#there"))) == (True, 1)


def test_the_hooks_arguments(hook):
    mine, before = VirtualWorker(hook, id="mine"), hook.local_worker
    try:
        assert planrt.TorchHook(torch, local_worker=mine) is hook
        assert (planrt.local_worker, torch.ones(1).owner, hook.torch) == (mine, mine, torch)
        for wrong in ({"local_worker": "me"}, {"seed": 3}):
            with pytest.raises(OptionError):
                planrt.TorchHook(torch, **wrong)
        assert planrt.local_worker is mine
    finally:
        planrt.TorchHook(torch, local_worker=before)


def test_tls(hook, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    server = WebsocketServerWorker(hook, "127.0.0.1", 0, id="alice", cert_path=cert, key_path=str(key))
    with server.running() as uri:
        assert uri.startswith("wss://")
        with WebsocketClientWorker(hook, "127.0.0.1", server.port, secure=True, id="alice", ca=cert) as alice:
            x = torch.arange(1_000_000.0)
            assert torch.equal((x.send(alice) + 1).get(), x + 1)
            alice.close()
            assert alice.connect() is alice
        with pytest.raises(errors.HandshakeError, match="certificate"):
            WebsocketClientWorker(hook, "127.0.0.1", server.port, secure=True, id="alice")
        with pytest.raises(errors.TransportError):
            WebsocketClientWorker("alice", "127.0.0.1", server.port, timeout=2)
    with pytest.raises(OptionError, match="cannot be read"):
        WebsocketClientWorker("alice", secure=True, ca=tmp_path / "none")
    with pytest.raises(OptionError, match="without"):
        WebsocketClientWorker("alice", ca=cert)


def test_a_closed_connection_opens_again(bob, alice):
    x, kept = torch.ones(2).send(bob), torch.ones(3).tag("#kept").send(bob)
    model = nn.Linear(2, 1).send(bob)
    assert bob.connect() is bob  # it is open
    assert (x + 1).get().tolist() == [2, 2]
    bob.close()
    with pytest.raises(WorkerLostError):
        torch.ones(1).send(bob)
    assert bob.connect() is bob
    assert (x + 1).get().tolist() == [2, 2]
    assert x.move(alice).get().tolist() == [1, 1]
    assert kept.get().tolist() == [1, 1, 1]
    assert model.get().weight.shape == (1, 2)
    assert torch.ones(2).send(bob).get().tolist() == [1, 1]
    assert bob.run(double, torch.ones(2)).tolist() == [2, 2]
    del x, kept, model
    gc.collect()
    assert bob.objects_count() == 0


def test_a_worker_that_keeps_no_sessions_says_what_went(hook, alice):
    with VirtualWorker(hook, id="carl", limits=Limits(session_seconds=0)) as carl:
        x, kept = torch.ones(2).send(carl), torch.ones(3).tag("#kept").send(carl)
        model = nn.Linear(2, 1).send(carl)
        carl.close()
        assert carl.connect() is carl
        uses = [x.get, lambda one=x: one + 1, lambda one=x: one.move(alice), kept.get, model.get]
        for use in uses:
            with pytest.raises(GonePointerError, match="went with the earlier session on worker 'carl'"):
                use()
        with pytest.raises(GonePointerError, match=f"object {kept.id_at_location} .#kept. went"):
            kept.get()
        uses.clear()
        assert torch.ones(2).send(carl).get().tolist() == [1, 1]
        (found,) = carl.search("#kept")
        assert found.get().tolist() == [1, 1, 1]
        assert carl.run(double, torch.ones(2)).tolist() == [2, 2]
        del x, kept, model
        gc.collect()
        assert torch.ones(2).send(carl).get().tolist() == [1, 1]


@func2plan(args_shape=[(2,)])
def double(x):
    return x * 2


# ----------------------------------------------------------------------------------------------- errors


def test_errors_are_caught_as_programs_of_0_2_catch_them(bob):
    @func2plan()
    def unbuilt(x):
        return x

    pointer = torch.ones(1).send(bob)
    cases = [
        (RuntimeError, lambda: unbuilt.send(bob)),
        (RuntimeError, pointer.item),
        (RuntimeError, lambda: bool(pointer)),
        (RuntimeError, lambda: torch.zeros(2, 2).send(bob).inverse().get()),
        (ConnectionRefusedError, lambda: WebsocketClientWorker("bob", "127.0.0.1", 1)),
        (ConnectionError, lambda: WebsocketClientWorker("bob", "127.0.0.1", 1)),
        (ValueError, lambda: double(torch.ones(2), torch.ones(2))),
        (KeyError, lambda: bob.get_worker("zed")),
        (KeyError, lambda: bob.get_obj(3)),
        (ValueError, lambda: torch.ones(1).send(bob, allowed_users="ann")),
        (AttributeError, lambda: bob.remote.torch.save),
        (TypeError, lambda: pointer + "text"),
    ]  # fmt: skip
    for kind, call in cases:
        with pytest.raises(kind) as caught:
            call()
        assert not str(caught.value).startswith(("'", '"')), "KeyError quotes its message"
    bob.close()
    with pytest.raises(ConnectionError):
        pointer.get()


def test_every_error_can_be_made_shown_and_is_no_type_error():
    made = {
        RemoteError: {"worker_id": "bob"},
        errors.TransportError: {"address": "ws://bob"},
        errors.ExecutionError: {"op": "add", "index": 1, "line": "x"},
        errors.PolicyError: {"rule": "r"},
        errors.UpdateRefusedError: {"worker_id": "bob"},
        errors.QuorumError: {"missing": {"bob": "late"}, "answered": ["alice"], "needed": 2},
    }
    for kind in [
        one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, PlanrtError)
    ]:
        options = next((given for base, given in made.items() if issubclass(kind, base)), {})
        if issubclass(kind, WorkerLostError | errors.WorkerTimeoutError):
            options = {**options, "worker_id": "bob"}
        if kind is errors.WorkerTimeoutError:
            options = {**options, "seconds": 1.0}
        error = kind("what is wrong", **options)
        assert str(error).endswith("what is wrong")
        assert not issubclass(kind, TypeError)
