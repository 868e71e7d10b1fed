"""Worker processes that tests stop and kill: ``--dataset tests.vertical.served:everybody``.

Until the second epoch of a run they wait for each other as long as it was opened with, and `WAIT` seconds from then on:
so openings and all that workers load at first use have the time of a slow machine, and who is silent is not waited for
so long.
"""

from __future__ import annotations

import contextlib

import msgspec

from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.vertical import Table
from planrt.workers import WebsocketClientWorker
from planrt.workers.machine.joint import runs
from planrt.workers.machine.joint.roles import role_of
from tests.vertical.tables import whole

WAIT = 10.0
"""Seconds. Who is alive has half of them to say for whom it waits itself."""


def waiting_less(seconds, step, epoch=0):
    """``role_of`` of parties that wait for `seconds` once they are asked for that step (of that epoch)."""

    def shortened(run, body, told):
        if (body.step, body.epoch) == (step, epoch):
            run.about = msgspec.structs.replace(run.about, timeout=seconds)
            run.alarm = 0.0  # one that was set for the longer time would wake it too late
        return role_of(run, body, told)

    return shortened


def everybody():
    """The whole table. Whoever serves it waits less from the second epoch on."""
    runs.role_of = waiting_less(WAIT, "epoch", 1)
    return Table(whole(), "id", label="y")


@contextlib.contextmanager
def worker_processes(ids):
    """(workers, process ids) by id: each has the whole table under the key "t"."""
    options = ("--dataset", "tests.vertical.served:everybody", "--key", "t", "--threads", "1")
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(WorkerProcesses([ChildOptions(id, 0, options) for id in ids]))
        workers = {
            id: stack.enter_context(WebsocketClientWorker(id, uri=ready.uri, auto_add=False))
            for id, ready in processes.wait_ready().items()
        }
        yield workers, processes.pids
