"""A Python that has loaded torch already, for tests of programs whose start is not what they try.

Most of what a short program costs is the import of torch: seconds of CPU time, again for each worker process that it
starts. `python` gives a program that is called like `sys.executable`. It hands its arguments, its environment, its
folder and its standard streams to a process that has torch and planrt loaded and has no threads; a copy of that
(a fork) runs the program, with this Python as its own `sys.executable`. It passes signals on and ends as the copy ends;
whoever kills it kills the copy. What only a real start can do, options of Python itself and malloc's settings, starts
a real one; and systems without what this takes have the real one for everything.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REAL = sys.executable
"""The Python that runs the tests."""

LAUNCHER = """#!{real} -IS
import json, os, signal, socket, sys

words = sys.argv[1:]
if not words or (words[0][0] == "-" and words[0] not in ("-m", "-c")) or "GLIBC_TUNABLES" in os.environ:
    os.execv({real!r}, [{real!r}, *words])
if "--parent" in words:  # as planrt.stopping.die_with has it; a copy's parent is another one
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(words[words.index("--parent") + 1]):
        os._exit(1)
passed = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
signal.pthread_sigmask(signal.SIG_BLOCK, passed)
warm = socket.socket(socket.AF_UNIX)
warm.connect({address!r})
asked = json.dumps({{"words": words, "environment": dict(os.environ), "folder": os.getcwd()}}).encode()
socket.send_fds(warm, [len(asked).to_bytes(4, "big")], [0, 1, 2])
warm.sendall(asked)
process = int(warm.recv(100))
with open(f"{address}.{{os.getpid()}}", "w") as file:  # for `send_signal`
    file.write(str(process))
null = os.open(os.devnull, os.O_RDWR)
for file in (0, 1, 2):  # who reads these waits for the end of the copy's only
    os.dup2(null, file)
for number in passed:
    signal.signal(number, lambda number, _: os.kill(process, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, passed)
status = int(warm.recv(100) or b"9")
if os.WIFSIGNALED(status):
    signal.signal(os.WTERMSIG(status), signal.SIG_DFL) if os.WTERMSIG(status) != signal.SIGKILL else None
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.waitstatus_to_exitcode(status))
"""


def send_signal(process: int, number: int) -> None:
    """Sends a signal that no launcher can pass on, one that stops or kills, to a process of any Python.

    To a launcher of ``sys.executable`` and its copy, that is, whose end is waited for where it kills.
    """
    os.kill(process, number)
    with contextlib.suppress(FileNotFoundError):
        copy = int(Path(sys.executable).with_name(f"warm.{process}").read_text())
        with contextlib.suppress(ProcessLookupError):
            end = os.pidfd_open(copy)
            try:
                os.kill(copy, number)
                if number == signal.SIGKILL:  # its port is free then, for one that is started in its place
                    select.select([end], [], [], 60)
            finally:
                os.close(end)


@contextlib.contextmanager
def python() -> Iterator[str]:
    """Gives the path of a Python that starts at once, for the block."""
    if not hasattr(os, "pidfd_open"):
        yield sys.executable
        return
    with tempfile.TemporaryDirectory(prefix="warm") as folder:
        launcher, address = Path(folder) / "python", str(Path(folder) / "warm")
        launcher.write_text(LAUNCHER.format(real=sys.executable, address=address))
        launcher.chmod(0o755)
        warm = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", address, str(launcher)],
            cwd=ROOT,
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            assert warm.stdout.readline() == b"ready\n"
            yield str(launcher)
        finally:
            warm.stdin.close()  # it ends then, and kills what is left of its copies
            warm.wait()
            warm.stdout.close()


class Copies:
    """The copies that run, and who waits for each."""

    def __init__(self, address: str) -> None:
        self.poll = select.poll()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        self.running: dict[int, tuple[int, socket.socket]] = {}  # what tells of its end -> process, launcher
        self.launchers: dict[int, int] = {}  # launcher's file -> what tells of the end
        for file in (0, self.listener.fileno()):
            self.poll.register(file, select.POLLIN)

    def serve(self) -> dict[str, Any] | None:
        """Makes copies until the tests end. Returns what to run, in a copy; None in the process itself, at the end."""
        while True:
            for file, _ in self.poll.poll():
                if file == 0:
                    for process, _ in self.running.values():
                        os.kill(process, signal.SIGKILL)
                    return None
                if file == self.listener.fileno():
                    if (asked := self.make()) is not None:
                        return asked
                elif file in self.running:
                    self.ended(file)
                elif file in self.launchers:  # killed
                    process, _ = self.running[self.launchers[file]]
                    self.poll.unregister(file)
                    os.kill(process, signal.SIGKILL)

    def make(self) -> dict[str, Any] | None:
        launcher, _ = self.listener.accept()
        length, streams, _, _ = socket.recv_fds(launcher, 4, 3)
        text = b""
        while len(text) < int.from_bytes(length, "big"):
            text += launcher.recv(1 << 20)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of threads that libraries have, which only wait
            process = os.fork()
        if not process:
            os.setsid()
            self.listener.close()
            launcher.close()
            for end, (_, other) in self.running.items():
                os.close(end)
                other.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            return json.loads(text)
        for stream in streams:
            os.close(stream)
        launcher.sendall(str(process).encode())
        end = os.pidfd_open(process)
        self.running[end] = process, launcher
        self.launchers[launcher.fileno()] = end
        for file in (end, launcher.fileno()):
            self.poll.register(file, select.POLLIN)
        return None

    def ended(self, end: int) -> None:
        process, launcher = self.running.pop(end)
        _, status = os.waitpid(process, 0)
        del self.launchers[launcher.fileno()]
        for file in (end, launcher.fileno()):
            with contextlib.suppress(KeyError):
                self.poll.unregister(file)
        os.close(end)
        with launcher, contextlib.suppress(OSError):
            launcher.sendall(str(status).encode())


def become(asked: dict[str, Any], launcher: str) -> None:
    """Runs what a launcher was given, as Python would: in the module ``__main__``."""
    import planrt.fl.runs.discovery
    import planrt.stopping

    words: list[str] = asked["words"]
    planrt.stopping.die_with = lambda parent: None  # the launcher does so, and takes the copy along
    planrt.stopping.GRACE = 60.0  # a busy machine must not end at once what a test wants to see end in order
    planrt.fl.runs.discovery.HANDSHAKE_SECONDS = 60.0  # nor take a worker that is there for none
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.executable, sys.orig_argv = launcher, [launcher, *words]
    sys.path.pop(0)  # the folder that this process was started in
    sys.path[:0] = [
        one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one not in {"", *sys.path}
    ]
    sys.modules["__main__"] = types.ModuleType("__main__")
    main = sys.modules["__main__"].__dict__
    main["__builtins__"] = builtins
    match words:
        case ["-m", name, *_]:
            sys.path.insert(0, os.getcwd())
            sys.argv = ["-m", *words[2:]]
            runpy._run_module_as_main(name)
        case ["-c", code, *_]:
            sys.path.insert(0, "")
            sys.argv = ["-c", *words[2:]]
            main["__spec__"] = None
            exec(compile(code, "<string>", "exec"), main)
        case [path, *_]:
            sys.path.insert(0, str(Path(path).resolve().parent))
            sys.argv = words
            file = os.path.abspath(path)
            main |= {"__file__": file, "__spec__": None}
            exec(compile(Path(file).read_bytes(), file, "exec"), main)


def load() -> None:
    """Imports what most programs of the tests need, but none that one runs with ``-m``."""
    import sklearn.datasets  # noqa: F401
    import torch  # noqa: F401

    import planrt.fl.local
    import planrt.fl.rounds
    import planrt.protocols
    import planrt.sandbox
    import planrt.stopping
    import planrt.torch_hook
    import planrt.vertical
    import planrt.workers.websocket_server  # noqa: F401

    assert threading.active_count() == 1  # a copy has none but the one that makes it
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    load()
    copies = Copies(sys.argv[1])
    print("ready", flush=True)
    if (asked := copies.serve()) is not None:
        become(asked, sys.argv[2])
