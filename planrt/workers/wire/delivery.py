"""Messages that arrive once and in order, over one connection after the other.

A connection keeps its order and loses nothing but its tail. So it is enough that each side counts the messages that it
has taken, and keeps those that it sent until the other one has said that it took them: with every message goes how many
were taken so far (`Envelope.seen`), or an `Ack` says it alone. When a session goes on over a new connection, both tell
their counts in the handshake, and each sends again what the other one has not taken (`Resumption` and `Kept` of
`planrt.workers.wire.messages`). This is the acknowledgement of XEP-0198 (stream management), with the handshake's
messages, `Ack` and `Bye` left out of the count.

Where a connection loses not even its tail (`Pipe.hands_over`), who has sent a message knows that it was taken, and is
not told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

from planrt.errors import WireError

T = TypeVar("T")

LARGE: Final = 1 << 20
"""Bytes of a client's messages that are acknowledged at once: the client keeps that much memory until then."""
LARGE_ANSWER: Final = 8 << 20
"""The same of a worker's answers: fewer are acknowledged with the client's next message."""
SMALL_ANSWER: Final = 64 << 10
"""Bytes of answers that may be left unacknowledged by a client that has nothing to say. More are acknowledged within
`TELL_SECONDS`: a worker has many clients, and a client many workers, that rest after a round."""
TELL_SECONDS: Final = 0.5
MESSAGES: Final = 32
"""Messages that are taken before they are acknowledged, where nothing that is sent says so anyway."""


class Unacknowledged(deque[T]):
    """The messages that one side has sent and the other one has not said that it took, oldest first."""

    __slots__ = ("sent",)

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        """Messages sent so far."""

    def add(self, message: T) -> None:
        """Takes note of a message that is about to be sent."""
        self.append(message)
        self.sent += 1

    def acknowledge(self, seen: int) -> list[T]:
        """Forgets the first `seen` of all messages, which the other side has taken; returns those that it had kept.

        Raises:
            WireError: so many were never sent.
        """
        if seen > self.sent:
            raise WireError(f"{seen:,} messages were acknowledged, and {self.sent:,} sent", address="")
        taken = len(self) - (self.sent - seen)
        return [self.popleft() for _ in range(taken)] if taken > 0 else []

    def until(self, found: Callable[[T], bool]) -> None:
        """Forgets all messages up to the first that is `found`; none where there is no such."""
        for number, message in enumerate(self, 1):
            if found(message):
                for _ in range(number):
                    self.popleft()
                return
