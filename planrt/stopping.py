"""How commands end on Ctrl-C and SIGTERM: within two seconds, without a traceback, and at once where they come twice.

While a command only starts, there is nothing to put in order, and the system ends it (`in_a_command`, `at_once`). From
there on `in_order` has it clean up: the first signal raises KeyboardInterrupt or SystemExit where the command is (or
cancels its task, under `run_until_stopped`), and a thread ends the process if it is still there `GRACE` seconds later.
A second signal ends it at once. Before `planrt` is imported nothing here can hear of a signal: while the interpreter
itself starts (some 20 ms), Ctrl-C shows Python's own traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, Final, NoReturn, TypeVar

T = TypeVar("T")

GRACE: Final = 1.2
"""Seconds that a command may take to end in order."""

_SCRIPTS: Final = ("planrt", "planrt.exe")
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class _Ending:
    """What has come so far of a command's end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.signal: int | None = None
        self.cancel: Callable[[], None] | None = None
        self.timer: threading.Timer | None = None

    def came(self, number: int) -> None:
        """Notes a signal: the first one leaves `GRACE` seconds, and the second none."""
        if self.signal is not None:
            self.end()
        self.signal = number
        self.timer = threading.Timer(GRACE, self.end)
        self.timer.daemon = True
        self.timer.start()

    def end(self) -> NoReturn:
        """Ends the process, whatever it is at."""
        number = self.signal or signal.SIGTERM
        with contextlib.suppress(OSError):  # not by sys.stderr, which may be locked
            os.write(2, f"{self.name}: {said(number)}, and ended at once\n".encode())
        os._exit(128 + number)

    def error(self) -> BaseException:
        """What the first signal raises."""
        return KeyboardInterrupt() if self.signal == signal.SIGINT else SystemExit(128 + signal.SIGTERM)


_ending: _Ending | None = None


def said(number: int) -> str:
    """Returns what a signal does to a command, in a word."""
    return "interrupted" if number == signal.SIGINT else "terminated"


def signal_came(number: int) -> None:
    """Tells the command that runs here, if one does, of a signal that somebody else handles: see `in_order`."""
    if _ending is not None:
        _ending.came(number)


def signalled() -> int | None:
    """Returns the signal that ends the command which runs here; None before one came."""
    return None if _ending is None else _ending.signal


def at_once() -> None:
    """Has the system end this process on Ctrl-C and SIGTERM. One that was started with Ctrl-C ignored goes on so."""
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def in_a_command() -> None:
    """Calls `at_once` if this process was started as a command, ``planrt`` or ``python -m planrt...``, and only begins.

    Importing torch and the rest takes seconds, and an exception in the middle of that would show a traceback.
    """
    words = sys.orig_argv
    module = words[words.index("-m") + 1 :][:1] if sys.argv[:1] == ["-m"] and "-m" in words else []
    script = os.path.basename(next(iter(sys.argv), ""))
    if script in _SCRIPTS or [name.partition(".")[0] for name in module] == ["planrt"]:
        at_once()


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Within a command, `at_once` for a block in which Python cannot be interrupted, as the import of torch. Elsewhere
    it changes nothing."""
    if _ending is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.getsignal(number)) for number in _SIGNALS]
    at_once()
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextlib.contextmanager
def in_order(name: str) -> Iterator[None]:
    """Runs a command called `name` in a block of the main thread, with the signals as the module says."""
    global _ending
    ending, outer = _Ending(name), _ending

    def handle(number: int, _frame: FrameType | None) -> None:
        ending.came(number)
        if ending.cancel is None:
            raise ending.error()
        ending.cancel()

    def unraisable(found: Any) -> None:
        if ending.signal is None or not issubclass(found.exc_type, KeyboardInterrupt | SystemExit):
            shown(found)  # else it was raised where nothing can be: the timer ends the command

    before = [(number, signal.getsignal(number)) for number in _SIGNALS]
    shown, sys.unraisablehook = sys.unraisablehook, unraisable
    _ending = ending
    try:
        for number, handler in before:
            if handler != signal.SIG_IGN:
                signal.signal(number, handle)
        yield
    finally:
        _ending, sys.unraisablehook = outer, shown
        for number, handler in before:
            signal.signal(number, handler)
        if ending.timer is not None:
            ending.timer.cancel()


def run_until_stopped(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs `coroutine` as `asyncio.run` does. The first signal cancels it, and is raised once it has ended."""
    import asyncio  # not before the signals are looked after

    async def run() -> T:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None  # noqa: S101 - this is one
        if _ending is not None:
            _ending.cancel = lambda: loop.call_soon_threadsafe(task.cancel)  # type: ignore[assignment]
        try:
            return await coroutine
        finally:
            if _ending is not None and _ending.signal is None:
                _ending.cancel = None

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        if _ending is None or _ending.signal is None:
            raise
        raise _ending.error() from None


def die_with(parent: int) -> None:
    """Has the system kill this process when the main thread of its parent, of id `parent`, has ended: on Linux, where
    this is possible. A stopped process ends so too."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    set_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(1)
