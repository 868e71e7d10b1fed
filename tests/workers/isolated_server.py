"""A worker in a process of its own, for the tests of isolation: ``python -m tests.workers.isolated_server '{...}'``.

Its data sets do what a broken or taken-over kernel could do, in the process that reads their batches.
"""

import ctypes
import errno
import hashlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import torch

from planrt.plans.policy.rules import Policy
from planrt.plans.running import progress
from planrt.serde.frames import Limits
from planrt.workers import BaseDataset, WebsocketServerWorker
from planrt.workers.serving.isolation import child, supervisor
from planrt.workers.serving.isolation.watching import SLOTS, Slot
from tests.vertical.tables import halves, whole


class Acting:
    """A data set whose items do something first, in any process for clients' work."""

    def __init__(self, action):
        self._action = action
        self._owner = os.getpid()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self._owner not in (os.getpid(), os.getppid()):  # neither there nor in the one that is tried out
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


def _never_end():
    ctypes.CDLL(None).prctl(
        15, b"endless"
    )  # the thread's name from now on, PR_SET_NAME: whoever waits for it sees that
    time.sleep(3600)


def _debug_the_parent():
    if ctypes.CDLL(None, use_errno=True).ptrace(16, os.getppid(), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def _ring(call, *arguments):
    if ctypes.CDLL(None, use_errno=True).syscall(call, *arguments) < 0 and ctypes.get_errno() == errno.ENOSYS:
        raise OSError(errno.ENOSYS, "as if there were none")


def _write_all_slots():
    """Says of every process but this one that it has computed since the machine began."""
    own = progress.watcher.__self__
    for index in range(SLOTS):
        slot = Slot(own._page, index)
        if slot.memory != own.memory:
            struct.pack_into("<d", own._page, slot._at, 1e-3)
    return "wrote"


def _there(start, end):
    """The parts of a mapping that are in memory: a stack of a thread is 1 GiB, and most of it is not."""
    page = resource.getpagesize()
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(start // page * 8)
        bits = torch.frombuffer(bytearray(file.read((end - start) // page * 8)), dtype=torch.int64)
    present = torch.cat([torch.tensor([0]), ((bits >> 62) & 3 != 0).long(), torch.tensor([0])])
    (edges,) = torch.diff(present).nonzero(as_tuple=True)
    return [(start + a * page, start + b * page) for a, b in edges.view(-1, 2).tolist()]


def _found_here(folder):
    """Which of the `needles` are in this process's memory: name -> first bytes, length and SHA-256, so that none of
    them is there because it is looked for."""
    needles = json.loads(Path(folder, "granted", "needles").read_text())
    about = [
        (name, bytes.fromhex(first), length, digest) for name, (first, length, digest) in needles.items()
    ]
    found, spans = set(), []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(one, 16) for one in words[0].split("-"))
            seen = words[1][:2] == "rw" and "[v" not in line
        elif words[0] == "Rss:" and seen and int(words[1]):
            spans += _there(start, end)
    for start, end in spans:
        for at in range(start, end, 1 << 24):
            data = ctypes.string_at(at, min(end - at, (1 << 24) + 256))
            for name, first, length, digest in about:
                place = data.find(first)
                while place >= 0:
                    if hashlib.sha256(data[place : place + length]).hexdigest() == digest:
                        found.add(name)
                    place = data.find(first, place + 1)
    return ",".join(sorted(found))


class Opened:
    """A data set that has its file open."""

    def __init__(self, path):
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - for as long as it is served

    def place(self):
        self._file.read(1)
        return self._file.tell()

    def write(self):
        self._file.write(b"x")


class Mapped:
    """Tensors in memory that is shared: of a file, and of none."""

    def __init__(self, path):
        file = torch.from_file(path, shared=True, size=4)
        self._tensors = {"file": file, "memory": torch.ones(4).share_memory_()}

    def change(self, which):
        tensor = self._tensors[which]
        before = tensor.tolist()
        start = tensor.data_ptr() // resource.getpagesize() * resource.getpagesize()
        ctypes.CDLL(None).mprotect(
            ctypes.c_void_p(start), resource.getpagesize(), 3
        )  # as if it had been taken away
        tensor.fill_(7.0)
        return before


class Reading:
    """A data set whose items are read from a file while it is served."""

    def __init__(self, path):
        self._path = path

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([len(Path(self._path).read_text())] * 3), torch.zeros(())


def actions(folder):
    opened = Opened(Path(folder, "secret")) if Path(folder, "secret").exists() else None
    mapped = Mapped(str(Path(folder, "mapped"))) if Path(folder, "mapped").exists() else None
    return {
        "mapped_file": _said(lambda: mapped.change("file")),
        "mapped_memory": _said(lambda: mapped.change("memory")),
        "slots": _said(_write_all_slots),
        "place": _said(lambda: opened.place()),
        "write_to_what_is_open": _said(lambda: opened.write()),
        "crash": _crash,
        "endless": _never_end,
        "read": _said(lambda: Path(folder, "secret").read_text()),
        "granted": _said(lambda: Path(folder, "granted", "file").read_text()),
        "write": _said(lambda: Path(folder, "new").write_text("x")),
        "overwrite": _said(lambda: Path(folder, "granted", "file").write_text("x")),
        "truncate": _said(lambda: os.truncate(Path(folder, "granted", "file"), 0)),
        "list": _said(lambda: os.listdir("/")),
        "tcp": _said(lambda: socket.create_connection(("127.0.0.1", 9), 1)),
        "udp": _said(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
        "unix": _said(lambda: socket.socket(socket.AF_UNIX)),
        "fork": _said(os.fork),
        "program": _said(lambda: os.execv("/bin/true", ["true"])),
        "signal": _said(lambda: os.kill(os.getppid(), signal.SIGKILL)),
        "debug": _said(_debug_the_parent),
        "memory_of_others": _said(lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes()),
        "ring": _said(lambda: _ring(425, 8, ctypes.create_string_buffer(120))),
        "ring_of_before": _said(lambda: _ring(426, -1, 0, 0, 0, 0)),
        "memory_file": _said(lambda: os.memfd_create("x")),
        "more_files": _said(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 16, 1 << 16))),
        "secrets": _said(lambda: _found_here(folder)),
        "module": _said(lambda: __import__("wave").__name__),
    }


def main(arguments):
    supervisor.STOP_SECONDS, child.STOP_SECONDS = 60.0, 50.0  # clients are told on a busy machine, too
    options = json.loads(arguments)
    folder, side, reads = (options.pop(name, None) for name in ("folder", "table", "reads"))
    if "policy" in options:
        options["policy"] = Policy(**options["policy"])
    if "limits" in options:
        options["limits"] = Limits(**options["limits"])
    if "peer_token" in options:
        options["peer_token"] = Path(options["peer_token"])
    worker = WebsocketServerWorker(options.pop("id", "bob"), threads=1, **options)
    for name, action in actions(folder).items() if folder else ():
        worker.add_dataset(Acting(action), name)
    data = torch.arange(12.0).reshape(4, 3)
    rows = BaseDataset(data, data.sum(1))
    worker.add_dataset(rows, "rows")
    if reads is not None:
        worker.add_dataset(Reading(reads), "reads")
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
