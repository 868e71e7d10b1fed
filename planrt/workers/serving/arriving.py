"""The memory of large messages while they arrive: of each user, so much at a time.

A connection brings one message after the other, and its header says how much memory that takes. What has arrived counts
for the user's quota; what is under way counts here, or somebody with many connections would have as many messages in
the memory of the worker, of which none is ever whole. Clients without a user are one user for each address. There is a
bound without a quota, too, and one for all clients of the worker together, or many addresses would do the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from planrt.errors import MessageTooLargeError
from planrt.serde.frames import MemoryStore, Store

MOST: Final = 16 << 30
"""Bytes of messages of one user or address that may arrive at a time where there is no quota: as much as a policy lets
a user keep by default."""
MOST_OF_ALL: Final = 64 << 30
"""Those of all clients of a worker, where the owner says nothing."""
_SMALL = 1 << 20
"""Bytes of a message that does not count: all connections together have fewer."""


class Arriving:
    """Counts bytes by connection and user. Used on the loop.

    Args:
        most: bytes that messages of one user, or of one address of nobody's, may take together while they arrive.
        most_of_all: the same of all users.
    """

    def __init__(self, most: int, most_of_all: int) -> None:
        self._most, self._most_of_all = most, most_of_all
        self.begun: dict[int, tuple[str, int]] = {}
        """Connection -> its user, and the bytes of the message that it brings."""

    def room(
        self, connection: int, whose_is: Callable[[int], str], address: str, message: object, nbytes: int
    ) -> Store:
        """Returns memory for the `message` that `connection` brings now, of whose tensors there are `nbytes`;
        `whose_is` returns the user of a connection.

        Raises:
            MessageTooLargeError: with what else arrives for that user it is too much.
        """
        if nbytes > _SMALL:
            whose = whose_is(connection)
            others = sum(size for user, size in self.begun.values() if user == whose)
            if others + nbytes > self._most:
                raise MessageTooLargeError(
                    f"a message of {nbytes:,} bytes is over the limit while {others:,} others arrive for the same "
                    f"user: {self._most:,} together",
                    address=address,
                )
            all = sum(size for _, size in self.begun.values())
            if all + nbytes > self._most_of_all:
                raise MessageTooLargeError(
                    f"a message of {nbytes:,} bytes is over the limit while {all:,} others arrive at this worker: "
                    f"{self._most_of_all:,} together; try again later",
                    address=address,
                )
            self.begun[connection] = whose, nbytes
        return MemoryStore(nbytes)

    def over(self, connection: int) -> None:
        """Notes that the message of `connection` has been handled, or will never be whole."""
        self.begun.pop(connection, None)
