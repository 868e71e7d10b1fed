"""Time-outs of rounds that pass when a test says so: events decide who is late, and not how busy the machine is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from planrt.fl import waiting
from planrt.workers.base import BaseWorker


class Clock:
    """What `planrt.fl.waiting` reads the time from: it stands still until `passes`."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    def passes(self, seconds: float) -> None:
        """Lets so many seconds pass. Who waits sees it with the next answer, or when as many have passed outside."""
        self._now += seconds


@contextlib.contextmanager
def standing_clock() -> Iterator[Clock]:
    """Has no time-out of a round pass in the block but by the clock that it gives."""
    before, clock = waiting.time, Clock()
    waiting.time = clock
    try:
        yield clock
    finally:
        waiting.time = before


@contextlib.contextmanager
def late_once_answered(workers: Sequence[BaseWorker], kind: type, seconds: float) -> Iterator[None]:
    """`seconds` pass in the block, once all `workers` have answered a message of that kind, however long they take."""
    left = {worker.id for worker in workers}

    def answering(worker, ask):
        async def asked(expected, body, *args, **options):
            answer = await ask(expected, body, *args, **options)
            if isinstance(body, kind) and left:
                left.discard(worker.id)
                if not left:
                    clock.passes(seconds)
            return answer

        return asked

    with standing_clock() as clock:
        for worker in workers:
            worker.ask = answering(worker, worker.ask)
        try:
            yield
        finally:
            for worker in workers:
                del worker.ask
