"""Connections that are cut, over real sockets: programs go on as if nothing had been, or are told what they lost."""

import asyncio
import contextlib
import itertools
import threading
import time

import msgspec
import pytest
import torch
from torch import nn

import planrt
from planrt import Protocol, func2plan
from planrt.deadlines import waiting
from planrt.errors import (
    GonePointerError,
    HandshakeError,
    OptionError,
    SessionLostError,
    WorkerLostError,
    WorkerTimeoutError,
)
from planrt.fl import TrainConfig
from planrt.loop import background_loop, run
from planrt.serde.frames import Limits
from planrt.workers import BaseDataset, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.client.connection import Connection
from planrt.workers.client.handshaking import shake_hands
from planrt.workers.transport.addresses import DialOptions, dial
from planrt.workers.wire import messages as m
from tests.processes import eventually
from tests.proxy import CuttingProxy


@pytest.fixture(autouse=True, scope="module")
def hook():
    """Tensors have `send` from here on."""
    return planrt.TorchHook(torch)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def through(stack):
    """``through("bob")`` -> a client of a new worker, and the proxy between them."""

    def start(id, *, limits=None, datasets=None, rate=0.0, users=None, reconnect=60, **options):
        server = WebsocketServerWorker(id, threads=1, limits=limits, users=users)
        for key, dataset in (datasets or {}).items():
            server.add_dataset(dataset, key)
        proxy = CuttingProxy(stack.enter_context(server.running()), rate=rate)
        uri = stack.enter_context(proxy.running())
        client = stack.enter_context(WebsocketClientWorker(id, uri=uri, reconnect=reconnect, **options))
        client.server = server
        return client, proxy

    return start


@func2plan(args_shape=[(3,)])
def double(x):
    return x * 2


def test_pointers_tags_and_plans_go_on_after_a_cut(through):
    bob, proxy = through("bob")
    x = torch.tensor([1.0, 2.0, 3.0]).tag("#x").send(bob)
    plan = double.send(bob)
    for times in range(1, 4):
        proxy.cut()
        x.add_(1)  # posted while there is no connection
        assert plan(x).get().tolist() == [2 * (1 + times), 2 * (2 + times), 2 * (3 + times)]
    assert bob.search("#x")[0].get().tolist() == [4, 5, 6]
    assert proxy.connections >= 4
    assert bob.objects_count() == 1


def test_posted_ops_are_applied_once_and_in_order_however_often_it_is_cut(through):
    bob, proxy = through("bob")
    here = torch.arange(4, dtype=torch.int64)
    there = here.clone().send(bob)
    stop = threading.Event()

    def cutting():
        for _ in range(60):  # then it gets through, however long a connection takes to be made
            if stop.wait(0.05):
                return
            proxy.cut()

    thread = threading.Thread(target=cutting)
    thread.start()
    try:
        for number in range(3000):
            for value in (here, there):
                value.mul_(3).add_(number).remainder_(1_000_003)
            if number % 500 == 0:
                assert torch.equal(there.copy().get(), here)
    finally:
        stop.set()
        thread.join()
    assert torch.equal(there.get(), here)
    assert proxy.connections > 3


def test_gradients_and_a_failed_pass_go_on_after_a_cut(through):
    bob, proxy = through("bob")
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    there = x.send(bob)
    loss = (there * there).sum()
    proxy.cut()
    loss.backward()
    proxy.cut()
    assert there.grad.get().tolist() == [2, 4]
    proxy.cut()
    loss.backward()
    with pytest.raises(planrt.errors.RemoteError, match="second time"):
        there.grad.copy().get()
    proxy.cut()
    assert (there * 2).get().tolist() == [2, 4]


def test_a_large_tensor_arrives_whole_though_it_is_cut_on_the_way(through):
    bob, proxy = through("bob")
    for nbytes in (1 << 20, 20 << 20):
        value = torch.arange(nbytes // 4, dtype=torch.int32)
        proxy.cut_at("up", nbytes // 2)
        there = value.send(bob)
        wanted = value.clone()
        value.zero_()  # it may change now
        assert eventually(lambda: not proxy.cuts_later)  # it was cut halfway
        proxy.cut()
        assert torch.equal(there.get(), wanted)
    assert bob.objects_count() == 0


def test_an_answer_is_sent_again_as_it_was(through):
    """The objects go on changing, and the answer does not."""
    bob, proxy = through("bob")
    x = torch.zeros(300_000).send(bob)
    asked = bob._connection.enqueue(m.Fetch(x.id_at_location, False))
    x.add_(1)
    proxy.cut()
    x.add_(1)
    (_, (value,)) = run(bob._connection.finish(asked), instead="")
    assert value.unique().tolist() == [0]
    assert x.get().unique().tolist() == [2]


def test_training_goes_on_after_a_cut(through):
    def job():
        torch.manual_seed(0)
        return TrainConfig(
            nn.Linear(4, 2), nn.functional.cross_entropy, batch_size=8, optimizer_args={"lr": 0.1}
        )

    torch.manual_seed(1)
    data = BaseDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
    bob, proxy = through("bob", datasets={"d": data})
    losses = []
    for cuts in (False, True):
        job().send(bob)
        for _ in range(3):
            if cuts:
                proxy.cut()
            losses.append(bob.fit("d", seed=3).loss)
    assert losses[:3] == losses[3:]


def test_a_protocol_and_a_move_go_on_when_links_between_workers_are_cut(through, stack):
    alice, between = through("alice")
    bob, _ = through("bob")
    x = torch.tensor([1.0, 2.0, 3.0]).send(alice)
    chained = torch.tensor([5.0]).send(alice).send(bob)  # bob dials alice, through the proxy
    assert (chained * 1).get().get().tolist() == [5]
    between.cut()
    time.sleep(0.3)  # bob notices
    assert (chained + 1).get().get().tolist() == [6]
    between.cut()
    time.sleep(0.3)
    assert x.move(bob).get().tolist() == [1, 2, 3]
    protocol = Protocol([("one", double), ("two", double)]).deploy(alice, bob)
    between.cut()
    time.sleep(0.3)
    assert protocol.run(torch.ones(3)).get().tolist() == [4, 4, 4]


def test_close_and_connect(through):
    bob, _ = through("bob")
    x = torch.tensor([1.0]).send(bob)
    bob.close()
    with pytest.raises(WorkerLostError):
        x.get()
    assert bob.connect() is bob
    assert (x + 1).get().tolist() == [2]


def test_a_session_that_was_not_kept_names_what_is_gone(through):
    bob, proxy = through("bob", limits=Limits(session_seconds=0.05), reconnect=20)
    x = torch.tensor([1.0]).send(bob)
    assert x.copy().get().tolist() == [1]
    proxy.refuses = True
    proxy.cut()
    with pytest.raises(WorkerTimeoutError, match=r"no answer to Fetch of object \d+ within"), waiting(0.5):
        x.copy().get()
    assert eventually(lambda: not bob.server._state._parts.sessions)  # it has not been kept
    proxy.refuses = False
    with pytest.raises((SessionLostError, GonePointerError)) as caught:
        x.get()
    assert str(x.id_at_location) in str(caught.value) or "CallPlan" in str(caught.value)
    assert "without a connection" in str(caught.value)
    with pytest.raises(GonePointerError, match=f"object {x.id_at_location} went with the earlier session"):
        x.get()
    assert (torch.ones(2).send(bob) * 3).get().tolist() == [3, 3]  # new work goes on


def test_who_does_not_reconnect_is_told_at_once(through):
    bob, proxy = through("bob", reconnect=0)
    x = torch.tensor([1.0]).send(bob)
    assert x.copy().get().tolist() == [1]
    proxy.cut()
    with pytest.raises(WorkerLostError, match="gone"):
        until_it_fails(lambda: x.copy().get())
    bob.connect()
    assert x.get().tolist() == [1]


def test_it_is_given_up_in_time_and_nothing_is_lost_by_that(through):
    bob, proxy = through("bob", reconnect=0.3)
    x = torch.tensor([1.0]).send(bob)
    proxy.refuses = True
    proxy.cut()
    with pytest.raises(WorkerLostError, match=r"tried to go on for 0.3 s"):
        until_it_fails(lambda: x.add_(1).copy().get())
    proxy.refuses = False
    assert bob.connect() is bob
    assert x.get().item() >= 2  # what was posted before arrived


def test_a_protocol_whose_worker_does_not_answer_names_the_step_and_frees_what_it_made(through):
    alice, _ = through("alice")
    bob, between = through("bob")
    protocol = Protocol([("one", double), ("two", double)]).deploy(alice, bob)
    assert protocol.run(torch.ones(3)).get().tolist() == [4, 4, 4]
    before = alice.objects_count()
    between.refuses = True
    between.cut()
    with pytest.raises((WorkerTimeoutError, planrt.errors.RemoteError), match="step ") as caught, waiting(5):
        protocol.run(torch.ones(3))
    assert caught.value.step  # alice's, who cannot hand on to bob, or bob's
    between.refuses = False
    assert eventually(lambda: alice.objects_count() == before)
    assert protocol.run(torch.ones(3)).get().tolist() == [4, 4, 4]


def test_every_call_that_waits_ends_in_time(through):
    """The worker is there and does not answer: as frozen, or far away."""
    data = BaseDataset(torch.randn(8, 3), torch.zeros(8, dtype=torch.int64))
    bob, between = through("bob", datasets={"d": data}, reconnect=600)
    alice, _ = through("alice")
    x, y = torch.ones(3).send(bob), torch.ones(3).send(alice)
    found, there = torch.ones(3, requires_grad=True).send(bob), double.send(bob)
    TrainConfig(nn.Linear(3, 2), nn.functional.cross_entropy, batch_size=4).send(bob)
    bob.fit("d")
    between.refuses = True
    between.cut()
    bob.call_timeout = 0.2
    calls = [
        x.copy().get, lambda: torch.ones(4_000_000).send(bob), lambda: bob.search("#x"),
        lambda: bob.fit("d"), lambda: bob.evaluate("d"), lambda: bob.run(double, torch.ones(3)),
        bob.list_objects, bob.objects_count, lambda: bob.approval(double), bob.clear_objects, there.get,
        lambda: x.move(alice), lambda: y.move(bob), lambda: y.send(bob), lambda: x.nonzero(),
        lambda: (found.sum().backward(), found.grad.copy().get()), lambda: bob.fetch_plan(there.id_at_location, bob),
        lambda: bob.get_obj(x.id_at_location), lambda: bob.rm_obj(x.id_at_location),
    ]  # fmt: skip
    for number, call in enumerate(calls):
        with pytest.raises((WorkerTimeoutError, WorkerLostError, planrt.errors.RemoteError)) as caught:
            call()
        assert "bob" in str(caught.value) or bob.address in str(caught.value), number
    bob.call_timeout = None
    between.refuses = False
    assert (x + 1).get().tolist() == [2, 2, 2]  # nothing of this has cost anything
    assert (y + 1).get().tolist() == [2, 2, 2]


# ------------------------------------------------------------------------------------- secrets of sessions


def resume(uri, wanted, token=""):
    """Opens a connection that asks for a session, as a thief would."""

    async def go():
        options = DialOptions(10, Limits())
        first = await Connection.open(
            await dial(uri, options), "bob", timeout=10, limits=Limits(), token=token
        )
        first.session.kept = wanted
        pipe = await dial(uri, options)
        try:
            await shake_hands(pipe, first.session, token, for_others=False)
        finally:
            await pipe.close()
            await first.close(forget=True)

    asyncio.run_coroutine_threadsafe(go(), background_loop()).result()


def until_it_fails(function):
    """Calls `function` until it raises: when a cut is noticed is nobody's to say."""
    for _ in itertools.repeat(None):
        function()


def test_a_wrong_secret_opens_nothing(through):
    bob, _ = through("bob")
    x = torch.tensor([1.0]).send(bob)
    kept = bob._connection.session.kept
    wrong = msgspec.structs.replace(kept, secret="0" * 64)
    with pytest.raises(HandshakeError, match="not the secret of this session"):
        resume(bob.server.address, wrong)
    assert x.get().tolist() == [1]


def test_a_session_is_refused_while_its_connection_answers(through):
    """A secret that was stolen is of no use while its owner is there."""
    bob, _ = through("bob")
    x = torch.tensor([1.0]).send(bob)
    assert x.copy().get().tolist() == [1]
    with pytest.raises(HandshakeError, match="another connection has this session, and answers"):
        resume(bob.server.address, bob._connection.session.kept)
    assert x.get().tolist() == [1]


def test_a_secret_is_of_no_use_to_another_user(through):
    tokens = {"ann": "ann's token, which is long", "ben": "ben's token, which is long"}
    bob, _ = through("bob", users=tokens, token=tokens["ann"])
    x = torch.tensor([1.0]).send(bob, private=True)
    kept = bob._connection.session.kept
    bob.close()
    for token in ("", tokens["ben"]):
        with pytest.raises(HandshakeError, match="another user's"):
            resume(bob.server.address, kept, token)
    bob.connect()
    assert (x + 1).shape == (1,)


def test_a_worker_keeps_hashes_of_secrets_only(through):
    bob, _ = through("bob")
    secret = bob._connection.session.kept.secret
    (session,) = bob.server._state._parts.sessions.values()
    kept = {name: getattr(session.kept, name) for name in type(session.kept).__slots__}
    assert len(secret) == 64
    assert secret not in repr(kept)
    assert bytes.fromhex(secret) not in kept.values()


def test_one_client_cannot_pile_up_sessions(stack):
    server = WebsocketServerWorker("bob", threads=1, limits=Limits(kept_sessions=3))
    uri = stack.enter_context(server.running())
    for _ in range(10):
        one = WebsocketClientWorker("bob", uri=uri, auto_add=False)
        torch.ones(2).send(one, garbage_collect_data=False)
        one.close()
    with WebsocketClientWorker("bob", uri=uri, auto_add=False) as other:
        other.objects_count()
        assert len(server._state._parts.kept) <= 4
        assert len(server._state.store.objects) <= 3


@pytest.mark.parametrize("wrong", [-1, float("nan"), "1", None, True])
def test_wrong_times_are_refused(wrong):
    with pytest.raises(OptionError, match="reconnect"):
        WebsocketClientWorker("bob", "127.0.0.1", 1, reconnect=wrong)
    if wrong is not None:
        with pytest.raises(OptionError, match="call_timeout is a number of seconds"):
            planrt.VirtualWorker("bob", call_timeout=wrong, auto_add=False)
    with pytest.raises(OptionError, match="kept for a number of seconds"):
        WebsocketServerWorker("bob", limits=Limits(session_seconds=wrong))


def test_a_worker_that_was_started_again_after_it_had_stopped_in_order_serves_at_once():
    """It had said goodbye, so nothing could go on; what was counted in the session before counts no more."""
    with contextlib.ExitStack() as stack:
        with WebsocketServerWorker("bob", threads=1).running() as uri:
            worker = stack.enter_context(WebsocketClientWorker("bob", uri=uri))
            for _ in range(3):
                assert worker.objects_count() == 0
        again = WebsocketServerWorker("bob", threads=1, port=int(uri.rpartition(":")[2]))
        stack.enter_context(again.running())
        worker.connect()
        assert [worker.objects_count() for _ in range(3)] == [0, 0, 0]
        assert (torch.ones(2).send(worker) + 1).get().tolist() == [2.0, 2.0]
