"""The loop around a worker, where something ends early."""

import asyncio

import pytest

from planrt.serde.frames import Limits
from planrt.workers.client.connection import Connection
from planrt.workers.machine.state import WorkerState
from planrt.workers.serving.host import ComputeThread, WorkerHost
from planrt.workers.transport.pipes import memory_pipes


@pytest.mark.parametrize("ends", ["client", "process"])
def test_a_worker_whose_compute_thread_is_gone_ends_quietly(ends, caplog):
    """As at the end of a process: Python closes every thread pool before it lets go of the loop."""
    unhandled = []

    async def go():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        compute = ComputeThread("test")
        host = WorkerHost(WorkerState("bob"), compute)
        near, far = memory_pipes("memory://bob", Limits())
        serving = asyncio.create_task(host.serve(far))
        connection = await Connection.open(near, "bob", timeout=5, limits=Limits())
        compute.close()
        if ends == "client":
            await connection.close()
        else:
            host.stop()
        await asyncio.wait([serving], timeout=5)
        ended = serving.done() and (serving.cancelled() or serving.exception() is None)
        await connection.close()
        return ended

    assert asyncio.run(go())
    assert (unhandled, caplog.records) == ([], [])
