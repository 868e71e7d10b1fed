"""Data sets for worker processes that tests start, stop and kill: ``--dataset tests.fl.served:alice``.

A worker hangs in its items while the file ``hang-<id>`` is in the folder PLANRT_TEST_HANG.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.workers import WebsocketClientWorker
from tests.models import classification_data

IDS = ["alice", "bob", "charlie"]


class Hanging:
    def __init__(self, id):
        self.inner = classification_data(IDS.index(id))
        self.file = Path(os.environ.get("PLANRT_TEST_HANG", "/nowhere"), f"hang-{id}")

    def __len__(self):
        return len(self.inner)

    def fetch(self, indices):
        while self.file.exists():
            time.sleep(0.02)
        return self.inner.data[indices], self.inner.targets[indices]


def alice():
    return Hanging("alice")


def bob():
    return Hanging("bob")


def charlie():
    return Hanging("charlie")


def child(id, port=0):
    return ChildOptions(id, port, ("--dataset", f"tests.fl.served:{id}", "--key", "d", "--threads", "1"))


@contextlib.contextmanager
def worker_processes(folder):
    """(workers, processes, ready) of three worker processes; ``hang-<id>`` in `folder` makes one hang."""
    os.environ["PLANRT_TEST_HANG"] = str(folder)
    try:
        with contextlib.ExitStack() as stack:
            processes = stack.enter_context(WorkerProcesses([child(id) for id in IDS]))
            ready = processes.wait_ready()
            workers = [
                stack.enter_context(WebsocketClientWorker(id, uri=ready[id].uri, auto_add=False))
                for id in IDS
            ]
            yield workers, processes, ready
    finally:
        del os.environ["PLANRT_TEST_HANG"]
