"""What a client has handed over and not sent yet: ops and messages in their order, and pointers that were freed.

Everything here but `Outbox.gathered` may be called from any thread; finalizers call `Outbox.drop` at any time.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from planrt.serde.frames import Allocate, in_memory
from planrt.workers.wire import messages as m
from planrt.workers.wire.posted import Line

Response = tuple[m.Body, list[torch.Tensor]]

MAX_WAITING = 20_000
"""Posted ops that may wait to be sent; who posts more waits until fewer do."""
DROPS_WAITING = 512
"""Freed pointers that may wait for an op to travel with before they get a message of their own."""
_OPS_PER_MESSAGE = 1024
_LINES_KEPT = 50_000


@dataclass(slots=True, eq=False)
class QueuedMessage:
    """A message to be sent: a request if somebody waits for a `reply`."""

    body: m.Body
    tensors: Sequence[torch.Tensor]
    reply: asyncio.Future[Response] | None
    sent: asyncio.Future[None] | None
    """Done when its tensors may change."""
    allocate: Allocate[m.Envelope] = in_memory
    id: int = 0
    given_up: bool = False
    failed: bool = False
    """Whether who waited for it has been told that it was not sent."""

    def fail(self, error: Exception) -> None:
        """Tells whoever waits for it."""
        self.failed = self.reply is not None or self.sent is not None
        for future in (self.reply, self.sent):
            if future is not None and not future.done():
                future.set_exception(error)


class PostedLines:
    """The lines of programs that made the latest posted ops, by the numbers of these."""

    def __init__(self) -> None:
        self.posted = 0
        """Ops posted so far."""
        self._lines: dict[int, Line | None] = {}

    def add(self, line: Line | None) -> None:
        """Takes note of the next op; `line` made it."""
        self._lines[self.posted] = line
        self.posted += 1
        if len(self._lines) > _LINES_KEPT:
            for number in list(self._lines)[: _LINES_KEPT // 2]:
                del self._lines[number]

    def line(self, number: int | None) -> str | None:
        """Returns ``file:line`` that made the op of that number, where it is still known."""
        found = self._lines.get(number) if number is not None else None
        return f"{found[0].co_filename}:{found[1]}" if found else None

    def place_in_plan(self, number: int | None, index: int | None) -> str:
        """Returns the line of op `index` of the plan that the op of that number called; see `Graph.place`."""
        found = self._lines.get(number) if number is not None else None
        graph = found[2]() if found is not None and len(found) == 3 else None
        return graph.place(index) if graph is not None and index is not None else ""


class Outbox:
    """The queue of a connection.

    Args:
        op_bytes: the longest op that may be posted, in bytes; the ops of one message have as much room together.
    """

    def __init__(self, op_bytes: int) -> None:
        self.op_bytes = op_bytes
        self.lines = PostedLines()
        self._queue: deque[bytes | QueuedMessage] = deque()
        self.nbytes = 0
        """Bytes of the tensors of the messages that wait, for who sends them from one thread."""
        self._posting = threading.Lock()
        self._drops: deque[int] = deque()
        self._dropping = threading.Lock()  # held by who takes from them; finalizers only add

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def drops(self) -> int:
        """Counts the freed pointers that wait."""
        return len(self._drops)

    def add_op(self, packed: bytes, line: Line | None) -> bool:
        """Takes a packed op; `line` made it. False: too many wait."""
        with self._posting:
            self.lines.add(line)
            self._queue.append(packed)
        return len(self._queue) < MAX_WAITING

    def add(self, message: QueuedMessage) -> None:
        """Takes a message, to go after everything before it."""
        self.nbytes += sum(tensor.nbytes for tensor in message.tensors)
        self._queue.append(message)

    def drop(self, id: int) -> None:
        """Notes that nobody points at object `id` any more."""
        self._drops.append(id)

    def drops_of(self, id: int) -> bool:
        """Returns whether object `id` waits to be freed."""
        return id in self._drops

    def take_drops(self) -> tuple[int, ...]:
        """Returns objects to free before the next op, which takes them along."""
        if not self._drops:
            return ()
        with self._dropping:
            count = min(len(self._drops), _OPS_PER_MESSAGE, max(1, self.op_bytes // 16))
            return tuple([self._drops.popleft() for _ in range(count)])

    # For who sends.

    def messages(self) -> Iterator[QueuedMessage]:
        """Returns the messages that wait."""
        return iter([one for one in self._queue if isinstance(one, QueuedMessage)])

    def next_message(self) -> QueuedMessage | None:
        """Takes the message at the head of the queue; None if ops are there, or nothing."""
        if not self._queue or isinstance(self._queue[0], bytes):
            return None
        first = self._queue.popleft()
        assert isinstance(first, QueuedMessage)  # noqa: S101 - it is no bytes
        self.nbytes -= sum(tensor.nbytes for tensor in first.tensors)
        return first

    def gathered(self) -> m.Post:
        """Takes the ops at the head of the queue, as one message; when none are left, with what nobody points at."""
        with (
            self._dropping
        ):  # or others would take those that are counted now, and later ones would go in their place
            return self._gather(len(self._drops))

    def _gather(self, drops: int) -> m.Post:
        """`drops` is how many freed pointers there were before: whatever uses these is in the queue by now."""
        ops: list[bytes] = []
        room = self.op_bytes
        while self._queue and len(ops) < _OPS_PER_MESSAGE:
            head = self._queue[0]
            if not isinstance(head, bytes) or (ops and len(head) > room):
                break
            ops.append(head)
            room -= len(head) + 5
            self._queue.popleft()
        if self._queue:
            return m.Post(ops)
        return m.Post(ops, [self._drops.popleft() for _ in range(min(drops, max(1, room // 16)))])

    def clear(self, *, failed_only: bool = False) -> None:
        """Forgets everything that waits, or what has failed alone."""
        left = [one for one in self._queue if failed_only and (isinstance(one, bytes) or not one.failed)]
        self._queue.clear()
        self._queue.extend(left)
        self.nbytes = sum(t.nbytes for one in left if not isinstance(one, bytes) for t in one.tensors)
