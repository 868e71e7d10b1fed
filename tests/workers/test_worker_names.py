"""What a user who presses Tab on a worker sees: what users use, and nothing else."""

import asyncio
import gc
import inspect
import weakref

import pytest
import torch

import planrt
from planrt import VirtualWorker
from planrt.errors import OptionError, RemoteError, WireError, WorkerLostError
from planrt.workers import WebsocketClientWorker
from planrt.workers.wire import messages as m

EVERY = """
    address approval ask async_approval async_clear_objects async_close async_evaluate async_fetch_plan async_fit
    async_list_objects async_objects_count async_run async_search async_wait_for_approval clear_objects close connect
    datasets evaluate fetch_plan fit id link_address objects_count remote run search status async_status traffic
    versions wait_for_approval workplace
"""
OF_02 = """
    add_worker add_workers clear_objects_remote de_register_obj get_obj get_worker is_client_worker
    is_framework_supported list_objects list_objects_remote load_data log_msgs message_pending_time msg_history
    objects_count_remote register_obj registration_enabled remove_worker_from_local_worker_registry
    remove_worker_from_registry request_obj request_search rm_obj send send_obj set_obj train_config
    call_timeout
"""
OF_JOBS = "leave_job train_job"
OWN = {
    VirtualWorker: "add_dataset connect_as remove_dataset watched",
    WebsocketClientWorker: "async_reconnect",
}  # fmt: skip


def test_a_worker_has_the_names_that_users_use(make_worker):
    bob = make_worker("bob")
    seen = {name for name in dir(bob) if not name.startswith("_")}
    assert seen == set(f"{EVERY} {OF_02} {OF_JOBS} {OWN[type(bob)]}".split())


@pytest.mark.parametrize("kind", OWN)
def test_every_public_method_says_what_it_does(kind):
    for name, member in inspect.getmembers(kind):
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
            assert inspect.getdoc(member), name


@pytest.fixture
def bob(make_worker):
    planrt.TorchHook(torch)
    return make_worker("bob")


def test_ask_returns_the_answer_of_the_kind_and_its_tensors(bob):
    x = torch.tensor([1.0, 2.0]).send(bob)

    async def asking():
        counted, tensors = await bob.ask(m.Counted, m.CountObjects())
        assert (counted.objects, tensors) == (1, [])
        fetched, (value,) = await bob.ask(m.Fetched, m.Fetch(x.id_at_location, False))
        assert (value.tolist(), fetched.has_grad) == ([1, 2], False)
        await bob.ask(m.Done, m.Put([m.PutItem(77, False)]), [torch.tensor([3.0])])
        _, (value,) = await bob.ask(m.Fetched, m.Fetch(77, True))
        assert value.tolist() == [3]

    asyncio.run(asking())


def test_ask_says_what_came_instead(bob):
    with pytest.raises(WireError, match="worker 'bob' answered with Counted instead of Done"):
        asyncio.run(bob.ask(m.Done, m.CountObjects()))
    with pytest.raises(RemoteError, match="no object"):
        asyncio.run(bob.ask(m.Fetched, m.Fetch(123456, False)))
    with pytest.raises(OptionError, match="query: .*no number and no string"):
        asyncio.run(bob.ask(m.Found, m.Search([object()])))
    assert asyncio.run(bob.ask(m.Counted, m.CountObjects()))[0].objects == 0


@pytest.mark.parametrize(
    ("kind", "body", "tensors"),
    [
        (m.Done, "hello", ()), (m.Done, None, ()), ("Done", m.CountObjects(), ()), (str, m.CountObjects(), ()),
        (None, m.CountObjects(), ()), (m.Done, m.CountObjects, ()), (m.Counted, m.CountObjects(), torch.ones(2)),
        (m.Counted, m.CountObjects(), ["x"]), (m.Counted, m.CountObjects(), None),
    ],
)  # fmt: skip
def test_ask_refuses_what_is_no_message_and_loses_nothing(bob, kind, body, tensors):
    x = torch.tensor([1.0]).send(bob)
    with pytest.raises(OptionError, match="ask takes a kind of answer and a message|tensors= is a list"):
        asyncio.run(bob.ask(kind, body, tensors))
    assert x.get().tolist() == [1]


@pytest.mark.parametrize(
    "body",
    [
        m.Post([]), m.Describe(1, [], ""), m.CancelRun(1), m.Done(), m.Counted(3), m.Found([]), m.Fetch(1 << 62, True),
        m.Failure("LocalError", "no"),
    ],
)  # fmt: skip
def test_ask_with_a_message_that_nobody_answers_says_so(bob, body):
    x = torch.tensor([1.0]).send(bob)
    with pytest.raises(RemoteError):
        asyncio.run(asyncio.wait_for(bob.ask(m.Done, body), timeout=20))
    assert x.get().tolist() == [1]


def test_ask_of_a_worker_that_is_gone(bob):
    bob.close()
    with pytest.raises(WorkerLostError, match="no answer to CountObjects"):
        asyncio.run(bob.ask(m.Counted, m.CountObjects()))


def test_questions_are_answered_after_what_was_posted_before(bob):
    x = torch.zeros(1).send(bob)

    async def asking():
        answers = []
        for _ in range(5):
            x.add_(1)
            answers.append(asyncio.ensure_future(bob.ask(m.Fetched, m.Fetch(x.id_at_location, False))))
            await asyncio.sleep(0.01)
        return [tensors[0].item() for _, tensors in await asyncio.gather(*answers)]

    values = asyncio.run(asking())
    assert values == sorted(values)
    assert values[-1] == 5


def test_a_worker_goes_when_nobody_refers_to_it_any_more():
    """Without waiting for Python's collector of circles: its data may be large."""
    gc.disable()
    try:
        worker = VirtualWorker("short-lived", auto_add=False)
        gone = weakref.ref(worker)
        worker.search("#nothing")
        worker.close()
        del worker
        assert gone() is None
    finally:
        gc.enable()
