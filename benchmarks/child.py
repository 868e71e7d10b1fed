"""Helper processes that answer over pipes: one JSON line in, one JSON line out, end with end of file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]

STOP_GRACE = 10.0
"""Seconds a child may take to end once its pipe is closed."""

Answer = Callable[[Any], Any]


class Child:
    """``python -m benchmarks.NAME ARGUMENTS``; use in a `with` block, which stops it."""

    def __init__(self, name: str, *arguments: object) -> None:
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # As planrt starts its workers: Linux shares the cores out by session where many want them.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._to.close()
        try:
            self._process.wait(0 if kind is not None else STOP_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._from.close()

    def send(self, message: Any = None) -> None:
        """Sends a message; `receive` waits for the answer."""
        self._to.write(json.dumps(message) + "\n")
        self._to.flush()

    def receive(self) -> Any:
        """The next answer.

        Raises:
            RuntimeError: the process has ended; its traceback is on stderr.
        """
        line = self._from.readline()
        if not line:
            raise RuntimeError(f"benchmarks.{self._name} ended before it answered")
        return json.loads(line)

    def ask(self, message: Any = None) -> Any:
        """`send`, then `receive`."""
        self.send(message)
        return self.receive()


def answer_with(answer: Answer) -> None:
    """The child's side: answers every message until the parent closes the pipe."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not get between the lines
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")
        replies.flush()
