"""A process that makes calls, whose memory begins with a byte of its own wherever malloc hands it out.

One process imports torch and waits; for each stretch of calls it forks, so that a crash costs no second import. What
is forked prints ``index outcome`` for each call, and its parent at last how it ended.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

IMPORTED: Final = 60.0
"""Seconds of processor time that a process may take to import torch."""
ASLEEP: Final = 20
"""How many times its processor time a call may take in all: a busy machine lets it wait, and one that sleeps for good
uses no processor at all.
"""
SHORT: Final = "(short of memory)"
"""Ends the line of a call in which malloc refused something, be it in its backward pass. Two processes are never
equally full: where one lacks memory the other may have enough, and what comes of it is not compared.
"""


class Lost(Exception):  # noqa: N818 - it is how a child's answer ends, not an error of ours
    """The child said nothing for too long."""


class Child:
    """The process as its parent sees it.

    Args:
        fill: the byte (1 to 255) that malloc fills freed memory with; what it hands out begins as the complement.
        seed, pattern: of the calls, as `python -m fuzz.ops` takes them.
        memory: bytes of address space that calls may take, beyond what the process has with torch imported.
        plain: whether calls do without torch's samples.
        many: whether to make the samples of all ops first, which takes most of a minute.
    """

    def __init__(self, fill: int, seed: int, pattern: str, memory: int, *, plain: bool, many: bool) -> None:
        self._fill = fill
        self._arguments = [str(seed), str(memory), str(int(plain)), str(int(many)), pattern]
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""
        self._forked = 0

    def prepare(self) -> None:
        """Starts the process, if it does not run; does not wait for it."""
        if self._process is None:
            tunables = f"glibc.malloc.perturb={self._fill}:glibc.malloc.tcache_count=0"
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fuzz.child", *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "GLIBC_TUNABLES": tunables, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            )
            self._read = b""

    def start(self, first: int, stop: int) -> None:
        """Begins with the calls from `first` on, up to `stop`."""
        self.prepare()
        assert self._process is not None
        _pipe(self._process.stdin).write(f"{first} {stop}\n".encode())
        _pipe(self._process.stdin).flush()
        while not (said := self.line(IMPORTED)).startswith("pid "):
            pass  # what the stretch before still said
        self._forked = int(said.split()[1])

    def line(self, seconds: float) -> str:
        """What it says next: ``index outcome``, or ``ended CODE`` (negative: by that signal).

        Raises:
            Lost: nothing, for so many seconds of its processor time, or `ASLEEP` times as many by the clock.
        """
        assert self._process is not None
        file = _pipe(self._process.stdout)
        used, deadline = self._used(), time.monotonic() + ASLEEP * seconds
        while b"\n" not in self._read:
            ready, _, _ = select.select([file], [], [], min(1.0, seconds))
            if ready:
                part = os.read(file.fileno(), 1 << 16)
                if not part:
                    raise Lost
                self._read += part
            elif self._used() - used > seconds or time.monotonic() > deadline:
                raise Lost
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()

    def _used(self) -> float:
        """Seconds of processor time that the calls have used, all threads together."""
        try:
            fields = Path(f"/proc/{self._forked}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:  # it has ended, and its parent will say so
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end_stretch(self) -> None:
        """Ends the calls that run, whether they answer or not."""
        if self._process is None or not self._forked:
            return
        try:
            os.kill(self._forked, signal.SIGKILL)
        except ProcessLookupError:
            return
        try:
            while not self.line(30.0).startswith("ended"):
                pass
        except Lost:
            self.close()

    def close(self) -> None:
        """Ends the process."""
        process, self._process, self._forked = self._process, None, 0
        if process is not None:
            _pipe(process.stdin).close()
            process.kill()
            process.wait()
            _pipe(process.stdout).close()


def _pipe(file: IO[bytes] | None) -> IO[bytes]:
    assert file is not None
    return file


def _calls(seed: int, pattern: str, plain: bool, memory: int, first: int, stop: int) -> None:
    from fuzz.calls import Caller, chosen

    with open("/proc/self/statm", encoding="ascii") as file:
        have = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (have + memory, have + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # their parent ends them
    caller = Caller(seed, chosen(pattern), plain=plain)
    for index in range(first, stop):
        os.write(1, f"{index} {caller.outcome(index)}\n".encode())


def main(arguments: Sequence[str]) -> None:
    """Serves stretches of calls until its stdin ends."""
    from fuzz.arguments import warm
    from fuzz.calls import chosen

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seed, memory, plain, many, pattern = *map(int, arguments[:4]), arguments[4]
    if not plain:
        warm(chosen(pattern) if many else ())
    for line in sys.stdin:
        first, stop = map(int, line.split())
        forked = os.fork()
        if forked == 0:
            code = 1
            try:
                os.write(1, f"pid {os.getpid()}\n".encode())
                _calls(seed, pattern, bool(plain), memory, first, stop)
                code = 0
            except MemoryError:
                code = 9
            finally:
                os._exit(code)
        _, status = os.waitpid(forked, 0)
        os.write(1, f"ended {os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1:])
