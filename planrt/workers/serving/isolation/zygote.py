"""The process that all processes for clients' work are copies of.

It is made from the worker's process before that has threads or connections, and has loaded what all of them need:
torch, the owner's data sets, rules and objects. A copy of it shares this memory until somebody writes to it. So data
sets are there once, and a new process takes some hundredths of a second. It has one thread, and never runs anything of
a client.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import select
import socket
import warnings
from typing import Any, NoReturn

from planrt.errors import IsolationError
from planrt.plans import training
from planrt.workers.serving.isolation import child
from planrt.workers.serving.isolation.confining import ends_with_its_parent
from planrt.workers.serving.isolation.messages import gift_sockets, give, take
from planrt.workers.serving.isolation.watching import Slot


def start(work: child.Work, page: mmap.mmap) -> socket.socket:
    """Makes the zygote; returns the socket to it. It ends when the calling thread does.

    Through the socket it says ``["ready"]`` once, takes ``["make", number, slot, seconds to linger]`` with the sockets
    of a new process, gifts and calls, and says ``["made", number, process]`` and ``["died", number, status]``.

    Raises:
        IsolationError: the system makes no more processes.
    """
    ours, theirs = gift_sockets()
    parent = os.getpid()
    try:
        process = fork()
    except OSError as error:
        raise IsolationError(f"no process for clients' work can be made: {error.strerror}") from None
    if process:
        theirs.close()
        ours.setblocking(False)
        return ours
    ours.close()
    return _serve(work, page, theirs, parent)


def fork() -> int:
    """Copies this process; returns 0 in the copy, and the copy's number here."""
    with warnings.catch_warnings():
        # Python warns of threads, those of libraries included: these wait for work that this process never gives them.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _serve(work: child.Work, page: mmap.mmap, calls: socket.socket, parent: int) -> NoReturn:
    try:
        ends_with_its_parent(parent)
        child.ignore_signals()
        training.warm_up()
        gc.collect()
        gc.freeze()  # what is there stays; looking for garbage in it would copy its memory
        gc.set_threshold(700, 10, 2)  # as `WebsocketServerWorker` has it, where it works by itself
        give(calls, ["ready"])
        _make_processes(work, page, calls)
    except BaseException:
        os._exit(1)
    os._exit(0)


def _make_processes(work: child.Work, page: mmap.mmap, calls: socket.socket) -> None:
    poll = select.poll()
    poll.register(calls, select.POLLIN)
    made: dict[int, tuple[int, int]] = {}  # what tells of a process's end -> its number, itself
    while True:
        for file, _ in poll.poll():
            if file != calls.fileno():
                number, process = made.pop(file)
                poll.unregister(file)
                os.close(file)
                _, status = os.waitpid(process, 0)
                give(calls, ["died", number, status])
            elif (taken := take(calls)) is None:
                return
            else:
                _make(work, page, calls, taken, poll, made)


def _make(
    work: child.Work,
    page: mmap.mmap,
    calls: socket.socket,
    taken: tuple[list[Any], list[int]],
    poll: select.poll,
    made: dict[int, tuple[int, int]],
) -> None:
    (_, number, slot, lingers), files = taken
    zygote = os.getpid()
    try:
        process = fork()
    except OSError:
        for file in files:
            os.close(file)
        give(calls, ["died", number, 0])
        return
    if not process:
        for file in made:
            with contextlib.suppress(OSError):
                os.close(file)
        calls.close()
        gifts, asks = (socket.socket(fileno=file) for file in files)
        child.run(work, zygote, gifts, asks, Slot(page, slot), lingers)
    for file in files:
        os.close(file)
    end = os.pidfd_open(process)
    made[end] = number, process
    poll.register(end, select.POLLIN)
    give(calls, ["made", number, process])
