"""Who gives wrong proofs waits before the next one is looked at: longer each time, up to a bound, by address."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from planrt.errors import HandshakeError
from planrt.workers.wire.channel import caller

FREE: Final = 2
"""Wrong proofs that cost nothing: anybody mistypes."""
FIRST_WAIT: Final = 0.25
LONGEST_WAIT: Final = 5.0
"""Seconds; each wait is twice the one before."""
FORGOTTEN_AFTER: Final = 600.0
"""Seconds without a wrong proof after which an address is like any other."""
MOST_WAITING: Final = 8
"""Proofs that may wait for their turn from an address that gave wrong ones. Of others all may: clients that start
together wait for nothing but what the worker computes."""
_MOST_ADDRESSES: Final = 10_000


@dataclass(slots=True)
class _Address:
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    wrong: int = 0
    next: float = 0.0
    """When the next proof from there may be looked at."""

    def waits(self, now: float) -> bool:
        """Returns whether proofs from there wait, or did lately, since some were wrong."""
        return self.wrong > FREE and now <= self.next + FORGOTTEN_AFTER


class Guesses:
    """The wrong proofs of one worker's callers. `now` and `sleep` are the clock, in seconds."""

    def __init__(
        self,
        *,
        now: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._now = now or (lambda: asyncio.get_running_loop().time())
        self._sleep = sleep
        self._addresses: OrderedDict[str, _Address] = OrderedDict()

    @asynccontextmanager
    async def turn(self, host: str) -> AsyncIterator[None]:
        """Waits until a proof from `host` may be looked at, and lets no other from there be meanwhile.

        Raises:
            HandshakeError: some from there were wrong, and too many wait already.
        """
        name = caller(host)
        address = self._addresses.setdefault(name, _Address())
        if address.waiting >= MOST_WAITING and address.waits(self._now()):
            raise HandshakeError(
                "too many proofs from your address wait to be looked at, after wrong ones: try again later",
                address=host,
            )
        address.waiting += 1
        try:
            async with address.turn:
                if address.wrong and self._now() > address.next + FORGOTTEN_AFTER:
                    address.wrong = 0
                if (left := address.next - self._now()) > 0:
                    await self._sleep(left)
                yield
        finally:
            address.waiting -= 1
            if not address.waiting and not address.wrong:
                self._addresses.pop(name, None)

    def wrong(self, host: str) -> float:
        """A proof from `host` was wrong; how long the next one from there will wait, in seconds."""
        address = self._addresses.setdefault(caller(host), _Address())
        self._addresses.move_to_end(caller(host))
        if len(self._addresses) > _MOST_ADDRESSES:
            self._addresses.popitem(last=False)  # the one whose wrong proof is longest ago
        address.wrong += 1
        doubled = min(address.wrong - FREE - 1, 30)
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2**doubled) if doubled >= 0 else 0.0
        address.next = self._now() + wait
        return wait
