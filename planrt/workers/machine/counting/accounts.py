"""For whom the sessions of a worker count: an account for each user, where something is bounded. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

from planrt.plans.policy.budgets import Budgets, Draw, Purse
from planrt.plans.policy.quotas import Account, Quota
from planrt.plans.policy.room import OF_ADDRESS, More, Room
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.store import ObjectStore


class Accounts:
    """The accounts of one worker, or of one process of it.

    Args:
        quota: what one user may keep, and all of them together.
        store: whose objects count.
        make_room: called with a user who needs room, and with that user's account: frees something that is the user's
            own, and returns whether it did. Nobody gives way to others.
    """

    def __init__(self, quota: Quota, store: ObjectStore, make_room: Callable[[str, Account], bool]) -> None:
        self.quota = quota
        self._store, self._make_room = store, make_room
        bounded = quota.worker_memory is not None or quota.worker_objects is not None
        self._room = Room(quota.worker_objects, quota.worker_memory) if bounded else None
        self._at_address: Room | None = None
        """What clients without a user at one address may keep, where others of them are in other processes."""
        self._computes = quota.session_flops, quota.worker_flops
        self._draw: Draw = Budgets(*self._computes).draw
        self._accounts: WeakValueDictionary[str, Account] = WeakValueDictionary()
        """Whose sessions and published objects there are."""

    def open(self, session: Session, host: str) -> None:
        """Lets a session count for its user; `host` is where it was opened from."""
        whose = session.counts_for = session.whose(host)
        if not self.quota:
            return
        account = self._accounts.get(whose)
        if account is None:
            purse = None
            if self._computes != (None, None):
                purse = Purse(whose, *self._computes, self._draw)
            shared = self._at_address if session.user is None and not session.sibling else None
            rooms = [room for room in (shared, self._room) if room is not None]
            account = Account(self.quota, lambda: self._made_room(whose), rooms, purse)
            self._accounts[whose] = account
        self._store.open_account(session.id, account)

    def _made_room(self, whose: str) -> bool:
        account = self._accounts.get(whose)
        return account is not None and self._make_room(whose, account)

    def ask(self, more: More, more_at_address: More, draw: Draw) -> None:
        """Has granted by the worker's own process, which knows of all users, what they may keep and compute, and what
        those without a user may at their address."""
        self._draw = draw
        if self._room is not None:
            self._room.ask(more)
        if self.quota.memory is not None or self.quota.objects is not None:
            self._at_address = Room(self.quota.objects, self.quota.memory, OF_ADDRESS)
            self._at_address.ask(more_at_address)

    def tidy(self) -> None:
        """Gives back what was granted, and is not used."""
        for room in (self._room, self._at_address):
            if room is not None:
                room.tidy()
