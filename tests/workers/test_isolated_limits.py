"""With isolation the limits of the whole worker hold over the processes of all users."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time

import pytest
import torch

import planrt
from planrt.cli import main
from planrt.errors import LocalError, PolicyRefusedError, RemoteError, SessionLostError
from planrt.fl import RoundScheduler, TrainConfig
from planrt.plans.policy.quotas import Account, Quota
from planrt.plans.policy.room import Room
from planrt.workers.serving.isolation.grants import Grants
from tests.watching import whole_lines
from tests.workers.test_isolation import Server, fit, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is for Linux")

KIB = 1024
USERS = {"ann": "the long token of ann", "ben": "the long token of ben"}


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:

        def start(**options):
            server = Server(users=USERS, isolation=True, **options)
            stack.callback(server.end)
            return server

        yield start


def full(rule="max_worker_memory"):
    return pytest.raises(PolicyRefusedError, match=rf"lets all users keep together: \[{rule}\]")


def sent(worker, kib):
    """A pointer to so many KiB, once they are there."""
    x = torch.ones(kib * KIB // 4).send(worker)
    worker.objects_count()
    return x


def sent_in_the_end(worker, kib):
    """Others give back what they do not use a moment after they have freed it."""
    end = time.monotonic() + 60
    while True:
        try:
            return sent(worker, kib)
        except PolicyRefusedError:
            assert time.monotonic() < end, "there is no room"
            time.sleep(0.1)


def test_the_processes_of_all_users_share_the_room_of_a_worker(serve):
    server = serve(max_worker_memory=8 << 20)
    with server.connect("ann") as ann, server.connect("ben") as ben:
        x, small = sent(ann, 5 * KIB), sent(ben, 10)
        assert len(server.processes()) == 2
        with full():
            sent(ben, 5 * KIB)
        assert x.sum().get().item() == 5 * KIB * KIB // 4  # she goes on
        assert (small + 1).sum().get().item() == 5 * KIB  # and so does he
        with full():  # she has no more than he
            sent(ann, 5 * KIB)
        del x
        ann.objects_count()
        y = sent_in_the_end(ben, 5 * KIB)
        with full():
            sent(ann, 5 * KIB)
        assert y.sum().get().item() == 5 * KIB * KIB // 4


def test_a_process_that_ends_gives_its_room_back(serve):
    server = serve(max_worker_memory=8 << 20)
    with server.connect("ann") as ann:
        x = sent(ann, 6 * KIB)
        (process,) = server.processes()
        ben = server.connect("ben")
        with full():
            sent(ben, 6 * KIB)
        os.kill(process, signal.SIGKILL)
        with pytest.raises(SessionLostError):
            x.sum().get()
        until(lambda: process not in server.processes())
        y = sent_in_the_end(ben, 6 * KIB)
        assert y.sum().get().item() == 6 * KIB * KIB // 4
        ben.close()


def test_objects_of_all_users_count_together(serve):
    server = serve(max_worker_objects=100)
    with server.connect("ann") as ann, server.connect("ben") as ben:
        kept = [torch.ones(1).send(ann) for _ in range(70)]
        assert ann.objects_count() == 70
        with full("max_worker_objects"):
            more = [torch.ones(1).send(ben) for _ in range(60)]
            ben.objects_count()
        more = kept[60:]
        del kept[:60]
        assert ann.objects_count() == 10

        def there():
            x = torch.ones(1).send(ben)
            return x.get().item() == 1.0 and ben.objects_count() == 0

        until(lambda: granted(there), 60)
        assert len(more) == 10


def granted(what):
    try:
        return what()
    except PolicyRefusedError:
        return False


# ------------------------------------------------------------- clients without a user, a process each


def full_there(rule="max_session_memory"):
    return pytest.raises(
        PolicyRefusedError, match=rf"clients without a user keep together at one address: \[{rule}\]"
    )


def test_clients_without_a_user_have_one_quota_at_an_address(serve):
    server = serve(max_session_memory=8 << 20)
    with server.connect("") as first, server.connect("") as second, server.connect("ann") as ann:
        x = sent(first, 5 * KIB)
        with full_there():
            sent(second, 5 * KIB)
        assert len(server.processes()) == 3
        y = sent(second, 1 * KIB)
        assert (x.sum() + 0).get().item() == 5 * KIB * KIB // 4  # each goes on
        assert (y.sum() + 0).get().item() == KIB * KIB // 4
        assert sent(ann, 7 * KIB).sum().get().item() == 7 * KIB * KIB // 4  # hers is her own
        with pytest.raises(PolicyRefusedError, match=r"lets a user keep: \[max_session_memory\]"):
            sent(first, 8 * KIB)  # more than one of them may, too
        del x
        first.objects_count()
        assert sent_in_the_end(second, 5 * KIB).sum().get().item() == 5 * KIB * KIB // 4


def test_many_processes_of_an_address_have_no_more_objects_than_one(serve):
    server = serve(max_session_objects=200)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect("")) for _ in range(6)]
        kept = []
        for client in clients:
            with contextlib.suppress(PolicyRefusedError):
                for _ in range(100):
                    kept.append(torch.ones(1).send(client))
                    client.objects_count()
        assert sum(granted(client.objects_count) for client in clients) <= 200
        assert 200 - 64 <= len(kept) <= 206  # a pointer of each was refused


def test_who_has_closed_a_session_gives_way_at_its_address(serve):
    server = serve(max_session_memory=8 << 20)
    for _ in range(4):  # each holds 6 MiB, and may come back to it
        client = server.connect("")
        x = sent_in_the_end(client, 6 * KIB)  # the one before is told of a moment later
        client.close()
        del x
    with server.connect("") as last:
        assert sent_in_the_end(last, 6 * KIB).sum().get().item() == 6 * KIB * KIB // 4


def test_what_was_published_does_not_give_way(serve):
    server = serve(max_session_memory=8 << 20)
    client = server.connect("")
    torch.ones(3 * KIB * KIB // 4).tag("#kept").send(client)
    client.objects_count()
    client.close()
    with server.connect("") as last:
        with full_there():
            sent(last, 6 * KIB)
        (found,) = last.search("#kept")  # a copy, which counts again
        assert found.sum().get().item() == 3 * KIB * KIB // 4


# ------------------------------------------------------------------ runs that fail on data, a day


def test_neither_sessions_nor_processes_bring_more_failures_a_day(serve, tmp_path):
    """Not of a user, nor at an address, nor where the process crashes in place of a failure."""
    (tmp_path / "granted").mkdir()
    policy = {"approval": "open", "max_failures": 2, "max_daily_failures": 4}
    path = tmp_path / "audit.jsonl"
    server = serve(policy=policy, folder=str(tmp_path), audit=str(path))

    def no_more():
        return pytest.raises(PolicyRefusedError, match=r"\[max_daily_failures\] nothing of yours runs")

    for user in ("ann", ""):
        with server.connect(user) as worker:
            for _ in range(2):
                with pytest.raises(RemoteError, match="for the worker's owner only"):
                    fit(worker, "read")  # its file is not there
        with server.connect(user) as worker, pytest.raises(SessionLostError):
            fit(worker, "crash")
        with server.connect(user) as worker:
            with pytest.raises(RemoteError, match="for the worker's owner only"):
                fit(worker, "read")
            with no_more():
                fit(worker, "read")
            with no_more():
                fit(worker, "rows")
            assert torch.ones(3).send(worker).sum().get().item() == 3.0
    with server.connect("ben") as ben:
        assert fit(ben, "rows").samples == 4
    lines = [json.loads(line) for line in whole_lines(path)]
    assert [line["user"] for line in lines if line["event"] == "no_more_failures"] == ["ann", ""]
    assert main(["audit", str(path), "--check"]) == 0


# ---------------------------------------------------------------------------------- what is computed


def test_a_user_has_computed_what_it_has_though_its_process_has_ended(serve):
    policy = {"approval": "open", "max_session_flops": 1_000_000}
    server = serve(policy=policy)

    def product(worker):
        x = torch.ones(70, 70).send(worker)
        return (x @ x)[0, 0].get().item()  # 686,000 operations

    def used_up():
        return pytest.raises(PolicyRefusedError, match=r"\[max_session_flops\] its computation is")

    with server.connect("ann") as ann, server.connect("ben") as ben:
        assert product(ann) == 70.0
        with used_up():
            product(ann)
        assert product(ben) == 70.0
        with used_up():
            product(ben)
    before = server.processes()
    for process in before:
        os.kill(process, signal.SIGKILL)
    until(lambda: not set(before) & set(server.processes()))
    with server.connect("ann") as ann:
        with used_up():
            product(ann)
        assert torch.ones(3).send(ann).sum().get().item() == 3.0


def test_what_one_process_has_of_another_is_paid_for(serve):
    policy = {"approval": "open", "max_session_flops": 1_000_000}
    server = serve(policy=policy)
    with server.connect("ann") as ann, server.connect("ben") as ben:
        torch.ones(700_000).send(ann).tag("#large")
        ann.objects_count()
        found = []
        until(lambda: found.extend(ben.search("#large")) or found)
        with pytest.raises(PolicyRefusedError, match=r"a search breaks the policy: \[max_session_flops\]"):
            ben.search("#large")


# ------------------------------------------------------------------------------- what rounds send


class Long(torch.nn.Module):
    def __init__(self, ops):
        super().__init__()
        self.inner, self.ops = torch.nn.Linear(3, 1), ops

    def forward(self, x):
        for n in range(self.ops):
            x = x + n
        return self.inner(x).squeeze(1)


def train(worker, ops):
    config = TrainConfig(model=Long(ops), loss_fn=torch.nn.functional.mse_loss, batch_size=4)

    async def main():
        scheduler = RoundScheduler([worker], config, dataset_key="rows", seed=1)
        await scheduler.prepare()
        return await scheduler.run_round(1, config.state)

    return asyncio.run(main()).loss


def test_plans_that_rounds_send_count_in_a_users_own_process(serve):
    server = serve(max_session_memory=400 * KIB)
    with server.connect("ann") as ann, server.connect("ben") as ben:
        for ops in range(40, 50):  # of some 100 KiB each, which would be 1 MiB together
            assert train(ann, ops) >= 0
        x = sent(ann, 340)  # plans give way, tensors do not
        with pytest.raises(RemoteError, match="max_session_memory"):
            train(ann, 100)
        assert train(ben, 100) >= 0  # his are his own
        del x
        ann.objects_count()
        assert train(ann, 52) >= 0


def test_plans_that_rounds_send_count_for_all_users_together(serve):
    server = serve(max_worker_memory=2 << 20)
    with server.connect("ann") as ann, server.connect("ben") as ben:
        x = sent(ann, 1_800)
        with pytest.raises(RemoteError, match="max_worker_memory"):
            train(ben, 300)
        assert train(ben, 20) >= 0
        del x
        ann.objects_count()
        until(lambda: granted(lambda: train(ben, 300) >= 0), 60)


class Adds(torch.nn.Module):
    """A short plan, another one for each number."""

    def __init__(self, number):
        super().__init__()
        self.inner, self.number = torch.nn.Linear(3, 1), number

    def forward(self, x):
        return self.inner(x + self.number).squeeze(1)


class Rounds:
    """Rounds of plans that were sent once, and not again before each."""

    def __init__(self, worker):
        self._worker, self._schedulers = worker, {}

    def requests(self, ops, kind=Long):
        async def main():
            if ops not in self._schedulers:
                config = TrainConfig(kind(ops), torch.nn.functional.mse_loss, batch_size=4)
                self._schedulers[ops] = (
                    RoundScheduler([self._worker], config, dataset_key="rows", seed=1),
                    config,
                )
                await self._schedulers[ops][0].prepare()
            scheduler, config = self._schedulers[ops]
            return (await scheduler.run_round(1, config.state)).workers["bob"].requests

        return asyncio.run(main())


def test_of_the_plans_that_rounds_send_a_process_keeps_so_many(serve):
    server = serve(limits={"round_plans": 3})
    with server.connect("ann") as ann, server.connect("ben") as ben, server.connect("") as nobody:
        all = [Rounds(one) for one in (ann, ben, nobody)]
        for ops in range(3):
            assert [one.requests(ops) for one in all] == [1, 1, 1]
        assert [one.requests(0) for one in all] == [1, 1, 1]  # each has its own three
        assert all[0].requests(3) == 1
        assert all[0].requests(1) == 3  # that was used longest ago: refused, sent, done
        assert all[1].requests(1) == all[2].requests(1) == 1  # what one sends takes nothing from others
        assert all[0].requests(3) == 1


def test_of_these_plans_a_process_keeps_so_many_bytes(serve):
    server = serve(limits={"round_plan_memory": 2_500})
    with server.connect("ann") as ann:
        rounds = Rounds(ann)
        assert rounds.requests(50) == rounds.requests(51) == 1
        assert rounds.requests(50) == 3
        with pytest.raises(RemoteError, match="a plan of .* bytes is over the limit of 2,500"):
            rounds.requests(200)


def test_by_default_it_keeps_256_of_them(serve):
    server = serve()
    with server.connect("ann") as ann:
        rounds = Rounds(ann)
        for number in range(257):
            assert rounds.requests(number, Adds) == 1
        assert rounds.requests(256, Adds) == 1
        assert rounds.requests(1, Adds) == 1
        assert rounds.requests(0, Adds) == 3


# ----------------------------------------------------------------------------------- who grants it


def test_a_process_is_granted_no_more_than_there_is():
    grants = Grants(Quota(worker_memory=100, worker_objects=10))
    assert grants.ask(1, 5, 60) == ""
    assert grants.ask(2, 5, 41) == "max_worker_memory"
    assert grants.ask(2, 6, 40) == "max_worker_objects"
    assert grants.ask(2, 5, 40) == ""
    assert grants.ask(1, 5, 61) == "max_worker_memory"
    assert grants.ask(1, 0, 10) == ""
    assert grants.ask(2, 10, 90) == ""
    grants.over(2)
    grants.over(2)
    assert grants.ask(1, 10, 100) == ""
    with pytest.raises(LocalError, match="less than nothing"):
        grants.ask(2, 0, -1)
    assert grants.ask(2, 1, 0) == "max_worker_objects"


def test_a_process_that_was_taken_over_does_not_get_all_of_it():
    """What it says of itself may be wrong. It has no more of what others need than its user could have."""
    grants = Grants(Quota(memory=10, objects=4, worker_memory=100, worker_objects=100))
    assert grants.ask(1, 8, 20) == ""
    assert grants.ask(1, 8, 21) == "max_worker_memory"
    assert grants.ask(1, 9, 20) == "max_worker_objects"


def test_processes_at_one_address_have_what_one_user_may_have():
    grants = Grants(Quota(memory=10, objects=4, worker_memory=100, worker_objects=100), at_address=True)
    assert grants.ask(1, 2, 6) == ""
    assert grants.ask(2, 2, 5) == "max_session_memory"
    assert grants.ask(2, 3, 4) == "max_session_objects"
    assert grants.ask(2, 2, 4) == ""
    assert len(grants) == 2
    grants.over(1)
    assert grants.ask(2, 4, 10) == ""


def test_room_is_asked_for_seldom_and_given_back():
    asked = []

    def more(objects, memory):
        asked.append((objects, memory))
        return "max_worker_memory" if memory > 300 << 20 else ""

    room = Room(None, 1 << 30)
    room.ask(more)
    account = Account(Quota(worker_memory=1 << 30), rooms=[room])
    kept = []
    for _ in range(2_000):
        one = torch.empty(100 * KIB, dtype=torch.uint8)
        account.check([one], objects=1)
        account.take([one], objects=1)
        kept.append(one)
    assert len(asked) < 100
    assert room.memory == 2_000 * 100 * KIB
    account.check(beside=(300 << 20) - room.memory)  # to the last byte
    before = len(asked)
    del kept[:1_900]
    room.tidy()
    assert len(asked) == before + 1
    assert 100 * 100 * KIB <= asked[-1][1] < 15 << 20
    room.tidy()  # nothing has changed
    assert len(asked) == before + 1
    account.check([torch.empty(1 << 20)])
    del account, kept
    assert (room.objects, room.memory) == (0, 0)
