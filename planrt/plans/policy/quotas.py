"""What the sessions of one user may keep on a worker: so many bytes and objects, all of them together. No I/O.

Counted are the tensors of objects with their gradients, the state of plans and protocols, what optimizers keep, what
waits to be sent to another worker or until an answer has arrived, and what an autograd graph keeps: of all that ops
made, though its pointer is gone, what kernels saved for themselves (`graph_memory.py`), and 1 KiB for each node. Memory
that several objects show counts once. An object counts 1 KiB besides, and its texts; a plan, as an object or as rounds
send it, 32 times what it takes as a file.

Clients that are nobody's are one user for each address that they come from. What was published stays when its session
ends, and counts on for who published it.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from planrt.errors import OptionError, PolicyError
from planrt.plans.analysis.report import count_bytes
from planrt.plans.policy.budgets import Purse
from planrt.plans.policy.graph_memory import NODE_BYTES, NewNodes
from planrt.plans.policy.room import Room
from planrt.plans.policy.rules import Policy

OBJECT_BYTES: Final = 1024
"""Bytes that an object takes besides its values."""
PLAN_BYTES: Final = 32
"""Bytes of memory that a plan takes for each byte of it as a file: 13 are its ops, and 12 what they are compiled to."""
MOST_NODES: Final = 1_000_000
"""Nodes of autograd graphs that a user may keep, whatever the memory: torch frees a chain of those that Python has
looked at by a call for each, 170 to 330 bytes deep, on a stack of 1 GiB."""
_RECOUNT_EVERY: Final = 1_000


@dataclass(frozen=True, slots=True)
class Quota:
    """The limits of what one user may keep, bytes and objects, and of what all users of a worker may keep together; and
    of what they may compute in an hour. None for no limit.

    Raises:
        OptionError: a limit that is no whole number above 0.
    """

    memory: int | None = None
    objects: int | None = None
    worker_memory: int | None = None
    worker_objects: int | None = None
    session_flops: int | None = None
    worker_flops: int | None = None

    def __post_init__(self) -> None:
        for name, key in _KEYS.items():
            limit = getattr(self, name)
            if limit is not None and (type(limit) is not int or limit < 1):
                raise OptionError(f"{key} must be a whole number, at least 1: got {limit!r}")

    def with_policy(self, policy: Policy | None) -> Quota:
        """Returns the stricter of these limits and those of a policy."""
        if policy is None:
            return self
        return Quota(
            **{name: _least(getattr(self, name), getattr(policy, key)) for name, key in _KEYS.items()}
        )

    def __bool__(self) -> bool:
        return any(getattr(self, name) is not None for name in _KEYS)


_KEYS: Final = {
    "memory": "max_session_memory",
    "objects": "max_session_objects",
    "worker_memory": "max_worker_memory",
    "worker_objects": "max_worker_objects",
    "session_flops": "max_session_flops",
    "worker_flops": "max_worker_flops",
}
"""Limit -> its name in a policy, and as an option."""


def _least(first: int | None, second: int | None) -> int | None:
    if first is None or second is None:
        return second if first is None else first
    return min(first, second)


class Account:
    """The sum of what one user's sessions keep now.

    Args:
        quota: what they may.
        make_room: called where that is not enough: frees something, and returns whether it did.
        rooms: what it may keep together with others, where that has limits: all users of the worker, and clients at
            the same address.
        purse: what they compute, where that has.
    """

    def __init__(
        self,
        quota: Quota,
        make_room: Callable[[], bool] = lambda: False,
        rooms: Sequence[Room] = (),
        purse: Purse | None = None,
    ) -> None:
        self._quota = quota
        self._counts_memory = quota.memory is not None or any(room.counts_memory for room in rooms)
        self._make_room = make_room
        self._rooms, self._purse = rooms, purse
        self._parts = [room.enter(self) for room in rooms]
        self._objects = 0
        self._beside = 0
        self._memory = 0
        self._storages: dict[StorageWeakRef, int] = {}
        self._added = 0
        self._nodes = 0
        self._gone: deque[None] = deque()
        """Nodes of graphs that have gone since they were counted last: any thread may add to it."""

    def check(self, tensors: Iterable[torch.Tensor] = (), *, objects: int = 0, beside: int = 0) -> None:
        """Raises unless so many objects more, with these tensors and bytes `beside`, may be kept.

        Raises:
            PolicyError: they would be more than the owner allows.
        """
        tensors = list(tensors)
        while True:
            try:
                return self._check(tensors, objects, beside)
            except PolicyError:
                if not self._make_room():
                    raise

    def _check(self, tensors: Sequence[torch.Tensor], objects: int, beside: int) -> None:
        """Raises PolicyError unless there is room for that."""
        most = self._quota.objects
        if most is not None and self._objects + objects > most:
            raise PolicyError(
                f"this would be more than the {most:,} objects that the owner lets a user keep: "
                f"[max_session_objects] your sessions hold {self._objects:,}: drop some pointers, or end sessions",
                rule="max_session_objects",
            )
        if not self._counts_memory:
            for room in self._rooms:
                room.check(objects, 0)
            return
        new = {
            ref: nbytes
            for ref, nbytes in map(_storage, tensors)
            if ref not in self._storages
        }  # fmt: skip
        wanted = sum(new.values()) + beside
        allowed = self._quota.memory
        if allowed is not None and self._total + wanted > allowed:
            self.recount()
        if allowed is not None and self._total + wanted > allowed:
            raise PolicyError(
                f"this would be more than the {count_bytes(allowed)} that the owner lets a user keep: "
                f"[max_session_memory] your sessions hold {count_bytes(self._total)}, and this takes "
                f"{count_bytes(wanted)} more: drop some pointers, or end sessions",
                rule="max_session_memory",
            )
        for room in self._rooms:
            room.check(objects, wanted)

    def spend(self, what: str, flops: float, *, seen: bool = False) -> None:
        """Pays for what is to run: see `Purse.spend`."""
        if self._purse is not None:
            self._purse.spend(what, flops, seen=seen)

    @property
    def counts_work(self) -> bool:
        """True where there is a limit to what is computed."""
        return self._purse is not None

    @property
    def _total(self) -> int:
        return self._memory + self._beside + self._count_nodes() * NODE_BYTES

    def _count_nodes(self) -> int:
        while self._gone:
            self._gone.popleft()
            self._nodes -= 1
        return self._nodes

    def take_graph(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts what is new in the graphs behind `tensors`, for as long as it is there.

        Raises:
            PolicyError: that is more than may be kept. It is counted nevertheless: it is there until whoever asks lets
                go of it.
        """
        if not self._counts_memory:
            return
        new = NewNodes(tensors)
        if not len(new):
            return
        try:
            if self._count_nodes() + len(new) > MOST_NODES:
                raise PolicyError(
                    f"this would be more than the {MOST_NODES:,} nodes of autograd graphs that a user may keep: "
                    "[max_session_memory] drop some pointers, or detach what needs no gradient",
                    rule="max_session_memory",
                )
            self.check(new.saved, beside=len(new) * NODE_BYTES)
        finally:
            self.take(new.saved)
            self._nodes += len(new)
            new.mark(functools.partial(self._gone.append, None))
            self._tell()

    def take(self, tensors: Iterable[torch.Tensor] = (), *, objects: int = 0, beside: int = 0) -> None:
        """Counts what is kept from now on: tensors for as long as anything keeps their memory."""
        self._objects += objects
        self._beside += beside
        if self._counts_memory:
            for ref, nbytes in map(_storage, tensors):
                self._memory += nbytes - self._storages.get(ref, 0)
                self._storages[ref] = nbytes
                self._added += 1
            if self._added > max(_RECOUNT_EVERY, len(self._storages) // 2):
                self.recount()
        self._tell()

    def give_back(self, *, objects: int = 0, beside: int = 0) -> None:
        """No longer counts so many objects, and bytes beside them."""
        self._objects -= objects
        self._beside -= beside
        self._tell()

    def hand_on(self, tensors: Iterable[torch.Tensor]) -> None:
        """No longer counts these tensors, which are somebody else's now."""
        for ref, _ in map(_storage, tensors):
            self._memory -= self._storages.pop(ref, 0)
        self._tell()

    def recount(self) -> None:
        """Looks which memory is still there, and how large it is."""
        self._added = 0
        left: dict[StorageWeakRef, int] = {}
        for ref in self._storages:
            storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
            if storage is not None:
                left[ref] = storage.nbytes()
        self._storages = left
        self._memory = sum(left.values())
        self._tell()

    def _tell(self) -> None:
        """Lets the sums over several users have what is kept now."""
        if self._parts:
            objects, total = self._objects, self._total
            for part in self._parts:
                part.holds(objects, total)


def _storage(tensor: torch.Tensor) -> tuple[StorageWeakRef, int]:
    storage = tensor.untyped_storage()
    return StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
