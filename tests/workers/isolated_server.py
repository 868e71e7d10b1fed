"""A worker in a process of its own, for the tests of isolation: ``python -m tests.workers.isolated_server '{...}'``.

Its data sets do what a broken or taken-over kernel could do, in the process that reads their batches.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from planrt.plans.policy.rules import Policy
from planrt.workers import BaseDataset, WebsocketServerWorker
from tests.vertical.tables import halves, whole


class Acting:
    """A data set whose items do something first, in any process but the one that made it."""

    def __init__(self, action):
        self._action = action
        self._owner = os.getpid()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if os.getpid() != self._owner:
            self._action()
        return torch.zeros(3), torch.zeros(())


def _said(action):
    """Raises what came of `action`: who asked for the batch is told."""

    def act():
        try:
            result = action()
        except Exception as error:
            raise RuntimeError(f"refused with {type(error).__name__}") from None
        raise RuntimeError(f"went on: {result!r}"[:60])

    return act


def _crash():
    ctypes.string_at(0)


def _debug_the_parent():
    if ctypes.CDLL(None, use_errno=True).ptrace(16, os.getppid(), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def actions(folder):
    return {
        "crash": _crash,
        "endless": lambda: time.sleep(3600),
        "read": _said(lambda: Path(folder, "secret").read_text()),
        "granted": _said(lambda: Path(folder, "granted", "file").read_text()),
        "write": _said(lambda: Path(folder, "new").write_text("x")),
        "overwrite": _said(lambda: Path(folder, "granted", "file").write_text("x")),
        "list": _said(lambda: os.listdir("/")),
        "tcp": _said(lambda: socket.create_connection(("127.0.0.1", 9), 1)),
        "udp": _said(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
        "unix": _said(lambda: socket.socket(socket.AF_UNIX)),
        "fork": _said(os.fork),
        "program": _said(lambda: os.execv("/bin/true", ["true"])),
        "signal": _said(lambda: os.kill(os.getppid(), signal.SIGKILL)),
        "debug": _said(_debug_the_parent),
        "memory_of_others": _said(lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes()),
        "module": _said(lambda: __import__("wave").__name__),
    }


def main(arguments):
    options = json.loads(arguments)
    folder, side = options.pop("folder", None), options.pop("table", None)
    if "policy" in options:
        options["policy"] = Policy(**options["policy"])
    worker = WebsocketServerWorker(options.pop("id", "bob"), threads=1, **options)
    for name, action in actions(folder).items() if folder else ():
        worker.add_dataset(Acting(action), name)
    data = torch.arange(12.0).reshape(4, 3)
    rows = BaseDataset(data, data.sum(1))
    worker.add_dataset(rows, "rows")
    if side is not None:
        worker.add_dataset(halves(whole())[side], "t")

    def ready(port):
        said = []
        for change in (lambda: worker.add_dataset(rows, "more"), lambda: worker.remove_dataset("rows")):
            try:
                change()
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        print(json.dumps([worker.address, said, worker.metrics_address]), flush=True)

    worker.start(ready=ready)


if __name__ == "__main__":
    main(sys.argv[1])
