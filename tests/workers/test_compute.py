"""The thread that a worker computes on: jobs run in order, and nothing keeps it, or Python, from ending."""

import asyncio
import subprocess
import sys
import threading

import pytest

from planrt.workers.serving import compute
from planrt.workers.serving.compute import ComputeThread

ENDS = """
import asyncio
from planrt.workers.serving.compute import ComputeThread

thread = ComputeThread("compute")

async def main():
    for _ in range(20):
        await asyncio.gather(*(thread.run(int) for _ in range(50)))

asyncio.run(main())
print("over")
"""


@pytest.fixture
def thread():
    made = ComputeThread("compute")
    yield made
    made.close()


@pytest.mark.parametrize("linger", [1e-6, 0.002])
def test_jobs_run_in_order_on_one_thread_wherever_it_waits(thread, monkeypatch, linger):
    monkeypatch.setattr(compute, "_LINGER", linger)
    seen = asyncio.run(asked(thread))
    assert [number for number, _ in seen] == list(range(300))
    assert len({ident for _, ident in seen}) == 1
    assert not thread.asked


async def asked(thread):
    seen = []

    def note(number):
        seen.append((number, threading.get_ident()))
        return number

    for turn in range(30):
        found = await asyncio.gather(*(thread.run(note, 10 * turn + one) for one in range(10)))
        assert found == [10 * turn + one for one in range(10)]
        await asyncio.sleep(0.004 * (turn % 2))
    return seen


def test_what_waits_is_dropped_when_it_is_closed_and_what_runs_ends(thread):
    asyncio.run(closed_at_work(thread))
    (of_executor,) = thread._executor._threads
    of_executor.join(60)
    assert not of_executor.is_alive()


async def closed_at_work(thread):
    begun, go_on = threading.Event(), threading.Event()

    def wait():
        begun.set()
        return go_on.wait(60)

    running = asyncio.create_task(thread.run(wait))
    waiting = [asyncio.create_task(thread.run(int)) for _ in range(5)]
    assert await asyncio.to_thread(begun.wait, 10)
    thread.close()
    for one in waiting:
        with pytest.raises(asyncio.CancelledError):
            await one
    assert not running.done()
    go_on.set()
    assert await running
    with pytest.raises(asyncio.CancelledError):
        await thread.run(int)


def test_python_ends_though_nobody_has_closed_it():
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")
