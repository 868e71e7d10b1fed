"""A process that is tried out before the worker serves: whether it can be confined, and the data sets be read in it."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NoReturn

from planrt.errors import DataError, IsolationError, OptionError
from planrt.workers.machine.state import WorkerState
from planrt.workers.serving.isolation.child import ignore_signals
from planrt.workers.serving.isolation.confining import close_rings, confine, reopen_files
from planrt.workers.serving.isolation.mappings import make_private
from planrt.workers.serving.isolation.zygote import fork

SECONDS: Final = 120.0
"""That reading one item of each data set may take, on a busy machine."""


def try_out(state: WorkerState, memory: int | None, readable: Iterable[Path]) -> None:
    """Makes a process as those for clients' work are, and ends it.

    Raises:
        IsolationError: it cannot be made, or confined. OptionError: a data set cannot be read in it.
    """
    reading, writing = os.pipe()
    try:
        process = fork()
    except OSError as error:
        os.close(reading)
        os.close(writing)
        raise IsolationError(f"no process for clients' work can be made: {error.strerror}") from None
    if not process:
        os.close(reading)
        _try(state, memory, readable, writing)
    os.close(writing)
    try:
        said = _all_of(reading)
    finally:
        os.close(reading)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    if said.startswith("data "):
        raise OptionError(
            f"{said.removeprefix('data ')}: with isolation a data set reads no files while it is served but those that "
            "its owner grants; write --readable with them, or their folder (readable=), or --isolation off"
        )
    if said != "well":
        raise IsolationError(
            f"no process for clients' work can be confined here: {said or 'it crashed'}; --isolation off "
            "lets the worker's own process do it"
        )


def _all_of(reading: int) -> str:
    data, until = b"", time.monotonic() + SECONDS
    while select.select([reading], [], [], max(0.0, until - time.monotonic()))[0]:
        piece = os.read(reading, 1 << 16)
        if not piece:
            return data.decode(errors="replace")
        data += piece
    return f"it took more than {SECONDS:g} s to read an item of each data set"


def _try(state: WorkerState, memory: int | None, readable: Iterable[Path], writing: int) -> NoReturn:
    said = []

    def read() -> (
        None
    ):  # in a thread of its own, as clients' work is done: torch's other threads are not here
        try:
            state.read_items()
            said.append("well")
        except DataError as error:
            said.append(f"data {error}")
        except BaseException as error:  # whatever an owner's data set raises
            said.append(f"data a data set cannot be read: {type(error).__name__}: {error}")

    try:
        ignore_signals()
        close_rings()
        reopen_files()
        make_private()
        confine(memory=memory, readable=readable)
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join()
    except BaseException as error:  # there is nobody above to hear of it
        said.append(str(error))
    finally:
        os.write(writing, said[0][:4000].encode(errors="replace") if said else b"")
        os._exit(0)
