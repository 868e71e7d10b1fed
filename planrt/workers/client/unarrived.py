"""Messages that were sent and that the worker may not have: they are kept, and sent again over another connection."""

from __future__ import annotations

import asyncio
from collections.abc import Container
from dataclasses import dataclass

from planrt.serde.frames import Frame, encode
from planrt.workers.client.session import ClientSession
from planrt.workers.wire import messages as m

_MOST_MESSAGES = 1024
_MOST_BYTES = 128 << 20
"""With more nothing further is sent, until the worker has said that it has some."""


@dataclass(slots=True, eq=False)
class Sent:
    """A message that the worker may not have: its bytes, and who waits until it has."""

    frame: Frame
    arrived: asyncio.Future[None] | None = None
    id: int = 0
    """Of a request."""


class Unarrived:
    """The bytes of what `session` has sent, until they have arrived."""

    def __init__(self, session: ClientSession[Sent]) -> None:
        self._session = session
        self._nbytes = 0
        self.room = asyncio.Event()
        """Set when there may be room again; who waits for it clears it before."""

    @property
    def full(self) -> bool:
        """True if the worker has to acknowledge something before more is sent."""
        return self._nbytes > _MOST_BYTES or len(self._session.sent) >= _MOST_MESSAGES

    def add(self, sent: Sent) -> None:
        """Keeps a message that is about to be sent."""
        self._session.sent.add(sent)
        self._nbytes += sent.frame.nbytes

    def acknowledged(self, seen: int) -> None:
        """Forgets the first messages, of which the worker has taken so many."""
        for sent in self._session.sent.acknowledge(seen):
            self._nbytes -= sent.frame.nbytes
            if sent.arrived is not None and not sent.arrived.done():
                sent.arrived.set_result(None)
        self.room.set()

    def fail(self, error: Exception, requests: Container[int]) -> None:
        """Nobody waits for any of it any more. What arrives later in place of these `requests` does nothing."""
        for sent in self._session.sent:
            if sent.id in requests:
                self._nbytes -= sent.frame.nbytes
                sent.frame = encode(m.to_wire(m.Envelope(sent.id, m.CountObjects(), self._session.seen)))
                self._nbytes += sent.frame.nbytes
            if sent.arrived is not None and not sent.arrived.done():
                sent.arrived.set_exception(error)
        self.room.set()
