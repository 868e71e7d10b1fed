"""What all users of a worker may keep together, on either transport: who would exceed it is refused, others go on."""

from __future__ import annotations

import pytest
import torch

from planrt.cli import main
from planrt.errors import OptionError, PolicyRefusedError
from planrt.fl import TrainConfig
from planrt.plans import Plan
from planrt.plans.policy.rules import Policy
from planrt.workers import BaseDataset, WebsocketClientWorker, WebsocketServerWorker
from tests.pointers.conftest import OWNER

KIB = 1024


def shared(memory=100 * KIB, objects=None, **more):
    return Policy(approval="open", max_worker_memory=memory, max_worker_objects=objects, **more)


def full(rule="max_worker_memory"):
    return pytest.raises(
        PolicyRefusedError, match=rf"more than the .* that the owner lets all users keep together: \[{rule}\]"
    )


def test_two_users_share_the_room_of_a_worker(hospital):
    connect = hospital(shared())
    first, second = connect(OWNER), connect()
    x = torch.ones(15 * KIB).send(first)  # 60 of 100 KiB
    assert x.sum().get().item() == 15 * KIB
    with full() as refused:
        torch.ones(15 * KIB).send(second)
        second.objects_count()
    assert "60" not in str(refused.value)  # what others have is not told
    assert x[:10].sum().get().item() == 10.0  # the first one goes on, and so does the second
    y = torch.ones(KIB).send(second)
    with full():
        (y.expand(15, KIB) + 1).get()
    assert (y + 1).sum().get().item() == 2 * KIB
    assert x.get().shape == (15 * KIB,)  # and is gone there ...
    first.objects_count()  # ... once it is known to have arrived
    z = torch.ones(15 * KIB).send(second)
    assert z.sum().get().item() == 15 * KIB


def test_what_a_user_drops_is_there_for_others_at_once(hospital):
    connect = hospital(shared())
    first, second = connect(OWNER), connect()
    for _ in range(5):
        x = torch.ones(20 * KIB).send(first)
        assert x.sum().get().item() == 20 * KIB
        del x
        first.objects_count()  # so that it has arrived there that it was dropped
        y = torch.ones(20 * KIB).send(second)
        assert y.sum().get().item() == 20 * KIB
        del y
        second.objects_count()


def test_what_ends_with_a_session_is_there_for_others(hospital):
    connect = hospital(shared(objects=20))
    first, second = connect(OWNER), connect()
    kept = [torch.ones(1).send(first) for _ in range(20)]
    assert first.objects_count() == 20
    with full("max_worker_objects"):
        torch.ones(1).send(second)
        second.objects_count()
    with full("max_worker_objects"):  # nor has the first one room for more
        (kept[0] + 1).get()
    first.clear_objects()
    assert [torch.ones(1).send(second).get().item() for _ in range(20)] == [1.0] * 20


def test_a_closed_session_gives_way_to_its_own_user_and_to_nobody_else(hospital):
    connect = hospital(shared())
    first, again, other = connect(OWNER), connect(OWNER), connect()
    x = torch.ones(20 * KIB).send(first)
    assert x.sum().get().item() == 20 * KIB
    first.close()  # and is kept for two minutes
    with full():
        torch.ones(20 * KIB).send(other)
        other.objects_count()
    assert torch.ones(20 * KIB).send(again).sum().get().item() == 20 * KIB


def test_gradients_graphs_optimizers_and_plans_count(hospital):
    data = BaseDataset(torch.ones(8, 3 * KIB), torch.ones(8, 1))
    connect = hospital(shared(), datasets={"k": data})
    first, second = connect(OWNER), connect()
    x = torch.ones(17 * KIB).send(first)  # 68 of 100 KiB
    w = torch.ones(5 * KIB, requires_grad=True).send(second)  # 20 KiB
    loss = (w * 1).sum()
    with full():
        loss.backward()
        w.grad.get()
    del loss
    second.objects_count()
    with full():
        y = w[:10]
        for _ in range(100):
            y = y.exp()
        y.sum().get()
    del w, y
    with full():
        Plan(torch.nn.Linear(20 * KIB, 1)).build(torch.ones(1, 20 * KIB)).send(second)
        second.objects_count()
    config = TrainConfig(
        model=torch.nn.Linear(3 * KIB, 1),
        loss_fn=torch.nn.functional.mse_loss,
        batch_size=8,
        optimizer="Adam",
        keep_optimizer_state=True,
    )
    with full():
        config.send(second)
        second.fit("k")
    assert x.sum().get().item() == 17 * KIB


def test_the_owners_own_data_do_not_count(transport):
    server = WebsocketServerWorker(
        "bob", threads=1, data=[torch.ones(100 * KIB).tag("#own")], max_worker_memory=50 * KIB
    )
    server.add_dataset(BaseDataset(torch.ones(100, 200), torch.ones(100)), "k")
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri) as worker:
        x = torch.ones(10 * KIB).send(worker)
        assert x.sum().get().item() == 10 * KIB
        with full():
            torch.ones(10 * KIB).send(worker)
            worker.objects_count()


def test_a_users_own_limit_is_named_where_it_is_the_one_in_the_way(hospital):
    worker = hospital(shared(max_session_memory=50 * KIB))()
    with pytest.raises(PolicyRefusedError, match="max_session_memory"):
        torch.ones(15 * KIB).send(worker).sum().get()


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "many"])
@pytest.mark.parametrize("key", ["max_worker_memory", "max_worker_objects"])
def test_limits_that_cannot_be(key, value, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(f"{key} = {value if not isinstance(value, str | bool) else repr(value).lower()}")
    with pytest.raises(OptionError, match=rf"policy .*policy.toml, line 1: {key} must be a"):
        Policy.from_file(path)


def test_policies_say_them_with_units(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text('max_worker_memory = "3 GiB"\nmax_worker_objects = "none"')
    policy = Policy.from_file(path)
    assert (policy.max_worker_memory, policy.max_worker_objects) == (3 * 2**30, None)
    assert "memory that all users keep: at most 3 GiB" in str(policy)
    assert "objects that all users keep: no limit" in str(policy)
    assert Policy().version != policy.version
    path.write_text("max_workers_memory = 1")
    with pytest.raises(OptionError, match=r"unknown key 'max_workers_memory'; known are .*max_worker_memory"):
        Policy.from_file(path)


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--max-worker-memory", "0", "must be at least 1 byte"),
        ("--max-worker-memory", "many", "must be a number of bytes"),
        ("--max-worker-memory", "5 parsecs", "must be a number of bytes"),
        ("--max-worker-memory", "none", "must be at least 1 byte"),
        ("--max-worker-objects", "0", "at least 1"),
        ("--max-worker-objects", "-3", "at least 1"),
        ("--max-worker-objects", "many", "whole number"),
    ],
)
def test_flags_that_cannot_be(flag, value, says, capsys):
    """One line, before anything starts."""
    try:
        code = main(["serve", "--id", "bob", "--empty", "--port", "0", f"{flag}={value}"])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if flag in one and "usage" not in one]
    assert says in line
