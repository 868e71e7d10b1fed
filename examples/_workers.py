"""What the examples share: their options, and workers in this process or in processes of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

import planrt as sy
from planrt.command_line import Parser, available_cores
from planrt.workers import BaseWorker


def options_of(name: str, description: str | None) -> Parser:
    """A parser with the options that every example has; the first line of `description` is its help."""
    parser = Parser(prog=name, description=(description or "").partition("\n")[0])
    parser.add_argument(
        "--websocket", action="store_true", help="workers in processes of their own, behind websockets"
    )
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    return parser


@contextlib.contextmanager
def workers(*ids: str, websocket: bool, in_turn: bool = False) -> Iterator[list[BaseWorker]]:
    """Workers that hold nothing yet, for the block; whatever ends it ends them.

    Virtual ones, or with `websocket` processes of this machine that share its cores; each may use all of them
    when the workers compute `in_turn`.
    """
    hook = sy.TorchHook(torch)
    with contextlib.ExitStack() as stack:
        if not websocket:
            yield [stack.enter_context(sy.VirtualWorker(hook, id=id)) for id in ids]
            return
        local = sy.local_workers(*ids, threads=available_cores() if in_turn else None)
        started = stack.enter_context(local)
        print(f"Worker processes: {', '.join(f'{one.id} at {one.address}' for one in started)}")
        yield list(started)
