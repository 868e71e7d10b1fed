"""The objects a worker holds for its clients: tensors, plans, protocols, pointers to objects on other workers. No I/O.

Every object belongs to the session that made it, which alone can use it by its id, and is freed with it. A
tagged object is published: it outlives its session, and others find it by `search`. They get a snapshot that
shares the owner's memory until somebody writes (`torch._lazy_clone`), so nobody can change what another
published.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from planrt.errors import DuplicateIdError, LocalError
from planrt.plans.policy.quotas import OBJECT_BYTES, Account
from planrt.workers.machine.kinds import KINDS
from planrt.workers.machine.kinds.base import ObjectKinds, StoredObject
from planrt.workers.machine.kinds.tensor import grad_of
from planrt.workers.machine.labels import Label, MemoryLabels, join
from planrt.workers.machine.sessions import Session
from planrt.workers.wire import messages as m
from planrt.workers.wire.refusals import UnknownObject

MAX_OBJECTS = 1_000_000
"""Objects that a worker keeps for all its sessions."""

_OBJECTS_LOOKED_AT: Final = 50
"""For each object that is removed, where tensors may keep themselves."""
_REST: Final = 50
"""Adding up is left out for so many times as long as it took the last time."""


def new_id() -> int:
    """Returns an object id that nobody else will choose, in [0, 2**63)."""
    return secrets.randbits(52)


@dataclass(slots=True)
class ObjectStore:
    """id -> object, with the sessions' rights to them."""

    limit: int = MAX_OBJECTS
    objects: dict[int, StoredObject] = field(default_factory=dict)
    memory: MemoryLabels = field(default_factory=MemoryLabels)
    kinds: ObjectKinds = field(default_factory=lambda: ObjectKinds(KINDS))
    when_private: Callable[[], None] | None = None
    """Called when the first object comes that not everybody may read."""
    shown_to_others: Callable[[int, StoredObject | None], None] | None = None
    """Told of what other processes of the worker may have of an object, where there are some: of its tags and the token
    that it is handed over under, whenever these change; None once it is gone. It may refuse."""
    _of_session: dict[str, dict[int, None]] = field(default_factory=dict)
    _accounts: dict[str, Account] = field(default_factory=dict)
    """Sessions whose user has a quota."""
    _cyclic: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Tensors that may keep themselves: their gradients have graphs."""
    _removed: int = 0
    """Objects that were removed since it was looked for such ones last."""

    def add(self, id: int, stored: StoredObject) -> None:
        """Takes `stored` under `id`.

        Raises:
            DuplicateIdError: the id is in use. LocalError: the worker holds as many objects as it may.
            PolicyError: its user may keep no more.
        """
        self.check_free(id)
        if len(self.objects) >= self.limit:
            raise LocalError(f"the worker holds {self.limit:,} objects, its limit: drop some pointers")
        self._show(id, stored)
        try:
            self._charge(stored, self._accounts.get(stored.owner))
        except BaseException:
            self._show_no_more(id, stored)
            raise
        self.objects[id] = stored
        self._of_session.setdefault(stored.owner, {})[id] = None
        if stored.label is not None and not self.memory.watching:
            self.memory.watch(self._gradients())
            if self.when_private is not None:
                self.when_private()

    def _show(self, id: int, stored: StoredObject) -> None:
        if self.shown_to_others is not None and (stored.tags or stored.handover):
            self.shown_to_others(id, stored)

    def _show_no_more(self, id: int, stored: StoredObject) -> None:
        if self.shown_to_others is not None and (stored.tags or stored.handover):
            self.shown_to_others(id, None)

    def offer(self, id: int, token: str) -> None:
        """Hands object `id` to whoever shows `token`; to nobody any more if that is empty."""
        stored = self.objects[id]
        before, stored.handover = stored.handover, token
        if self.shown_to_others is not None and (before or token):
            self.shown_to_others(id, stored)

    def _gradients(self) -> Iterator[torch.Tensor]:
        """Every gradient that an object has."""
        for stored in self.objects.values():
            for tensor in self.tensors_of(stored):
                if (grad := grad_of(tensor)) is not None:
                    yield grad

    def check_free(self, id: int) -> None:
        """Raises DuplicateIdError if the id is in use."""
        if id in self.objects:
            raise DuplicateIdError(f"an object with the id {id} is already there: choose another id")

    def find(self, session: str, id: int) -> StoredObject:
        """Returns the session's object `id`.

        Raises:
            UnknownObject: it holds none under that id: never made, taken back, or another session's.
        """
        stored = self.objects.get(id)
        if stored is None or stored.owner != session:
            raise UnknownObject(
                f"no object {id} here for this session: was it taken back by get() or dropped?"
            )
        return stored

    def drop(self, session: str, id: int) -> StoredObject | None:
        """Forgets the session's object `id`, unless it is published; unknown ids are none of our business."""
        stored = self.objects.get(id)
        if stored is None or stored.owner != session or stored.tags:
            return None
        return self.remove(id)

    def remove(self, id: int) -> StoredObject:
        """Forgets an object, published or not."""
        stored = self.objects.pop(id)
        self._show_no_more(id, stored)
        self._of_session[stored.owner].pop(id)
        if stored.account is not None:
            stored.account.give_back(objects=1, beside=stored.charged)
        self._removed += 1
        if self._cyclic and self._removed > len(self.objects) // _OBJECTS_LOOKED_AT:
            self._break_cycles()
        return stored

    def may_keep_itself(self, tensor: torch.Tensor) -> None:
        """Takes note of a tensor whose gradient may have a graph. Such a graph mostly keeps the tensor, which keeps the
        gradient, so nobody would ever free them: that is done when no object holds the tensor any more."""
        grad = grad_of(tensor)
        if grad is not None and grad.grad_fn is not None:
            self._cyclic[tensor] = None

    def _break_cycles(self) -> None:
        """Takes their gradients from tensors that no object holds: nobody can ask for these any more."""
        self._removed = 0
        held = {id(tensor) for stored in self.objects.values() for tensor in self.tensors_of(stored)}
        for tensor in list(self._cyclic):
            if id(tensor) not in held:
                del self._cyclic[tensor]
                tensor.grad = None

    def discard(self, session: str, id: int) -> None:
        """Forgets the session's object `id`, published or not, if it is still there."""
        if (stored := self.objects.get(id)) is not None and stored.owner == session:
            self.remove(id)

    def change_owner(self, id: int, session: str) -> None:
        """Makes object `id` belong to `session`. What becomes the worker's own (``""``) counts on for who had it.

        Raises:
            PolicyError: the user of that session may keep no more; nothing has changed then.
        """
        stored = self.objects[id]
        before, account = stored.account, self._accounts.get(session)
        if session and account is not before:
            self._charge(stored, account)
            if before is not None:
                before.give_back(objects=1, beside=stored.charged)
                before.hand_on(self._kept_by(stored))
        self._of_session[stored.owner].pop(id)
        stored.owner = session
        self._of_session.setdefault(session, {})[id] = None

    # Quotas

    def open_account(self, session: str, account: Account) -> None:
        """Whatever belongs to `session` counts for that account from now on."""
        self._accounts[session] = account

    def account_of(self, session: str) -> Account | None:
        """Returns what counts for the user of a session; None where nothing bounds that."""
        return self._accounts.get(session)

    def check_room(self, session: str, tensors: Iterable[torch.Tensor], *, objects: int = 0) -> None:
        """Raises unless the session may keep these tensors, and so many objects more.

        Raises:
            PolicyError: its user may not.
        """
        if (account := self._accounts.get(session)) is not None:
            account.check(tensors, objects=objects, beside=objects * OBJECT_BYTES)

    def keep(self, session: str, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors that a session keeps beside its objects, for as long as they are there.

        Raises:
            PolicyError: its user may keep no more.
        """
        if (account := self._accounts.get(session)) is not None:
            tensors = list(tensors)
            account.check(tensors)
            account.take(tensors)

    def keep_graphs(self, session: str, tensors: Iterable[torch.Tensor]) -> None:
        """Counts what is new in the autograd graphs behind `tensors`.

        Raises:
            PolicyError: the user of the session may keep no more. It counts until it is freed.
        """
        if (account := self._accounts.get(session)) is not None:
            account.take_graph(tensors)

    def check_bytes(self, session: str, nbytes: int) -> None:
        """Raises unless the session may keep so many bytes more: as `check_room`."""
        if (account := self._accounts.get(session)) is not None:
            account.check(beside=nbytes)

    def keep_bytes(self, session: str, nbytes: int) -> Callable[[], None]:
        """Counts bytes that a session keeps beside its objects; returns what is called when they are free again.

        Raises:
            PolicyError: its user may keep no more.
        """
        account = self._accounts.get(session)
        if account is None:
            return lambda: None
        account.check(beside=nbytes)
        account.take(beside=nbytes)
        return lambda: account.give_back(beside=nbytes)

    def spend(self, session: str, what: str, flops: float, *, seen: bool = False) -> None:
        """Pays for so many operations of the session's user, before `what` runs.

        Raises:
            PolicyError: there are not so many left now. Nothing is taken, but where `seen` all that is left: looking at
                it took as long as it takes itself.
        """
        if (account := self._accounts.get(session)) is not None:
            account.spend(what, flops, seen=seen)

    def counts_work(self, session: str) -> bool:
        """Returns whether there is a limit to what the session computes."""
        account = self._accounts.get(session)
        return account is not None and account.counts_work

    def limits(self, session: str) -> bool:
        """Returns whether there is a limit to what the session keeps."""
        return session in self._accounts

    def _charge(self, stored: StoredObject, account: Account | None) -> None:
        if account is not None:
            tensors, beside = self._kept_by(stored), self._bytes_beside(stored)
            account.check(tensors, objects=1, beside=beside)
            account.take(tensors, objects=1, beside=beside)
            stored.charged = beside
        stored.account = account

    def _bytes_beside(self, stored: StoredObject) -> int:
        """What an object takes besides its tensors: itself, its texts, and what its kind says."""
        failures = [one for one in (stored.failure, stored.hidden_failure) if one is not None]
        said = sum(len(one.message) + len(one.traceback) + len(one.cause) for one in failures)
        own = self.kinds.of(stored.value).bytes_beside(stored.value)
        return OBJECT_BYTES + own + said + _bytes_of(stored.tags, stored.description)

    def _kept_by(self, stored: StoredObject) -> list[torch.Tensor]:
        tensors = list(self.kinds.of(stored.value).kept(stored.value))
        return [*tensors, *(grad for one in tensors if (grad := grad_of(one)) is not None)]

    def describe(self, id: int, tags: tuple[str, ...], description: str) -> None:
        """Gives the object `id` tags and a description.

        Raises:
            PolicyError: its user may keep no more.
        """
        stored = self.objects[id]
        if stored.account is not None:
            more = _bytes_of(tags, description) - _bytes_of(stored.tags, stored.description)
            stored.account.check(beside=more)
            stored.account.take(beside=more)
            stored.charged += more
        before = stored.tags, stored.description
        stored.tags, stored.description = tags, description
        if self.shown_to_others is not None and (tags or before[0]):
            try:
                self.shown_to_others(id, stored)
            except BaseException:
                stored.tags, stored.description = before
                raise

    def of(self, session: str) -> Iterator[tuple[int, StoredObject]]:
        """Returns the objects of a session, oldest first."""
        for id in list(self._of_session.get(session, ())):
            yield id, self.objects[id]

    def count(self, session: str) -> int:
        """Returns how many objects belong to `session`."""
        return len(self._of_session.get(session, ()))

    def end(self, session: str) -> list[StoredObject]:
        """Frees what belongs to a session that has ended; what it published becomes the worker's own."""
        gone = []
        for id, stored in list(self.of(session)):
            if stored.tags and self.kinds.of(stored.value).outlives_session:
                self.change_owner(id, "")
            else:
                gone.append(self.remove(id))
        self._of_session.pop(session, None)
        self._accounts.pop(session, None)
        if self._cyclic:
            self._break_cycles()
        return gone

    def clear(self, session: str) -> list[StoredObject]:
        """Removes everything that belongs to `session`, published or not."""
        return [self.remove(id) for id, _ in list(self.of(session))]

    def search(
        self,
        session: str,
        query: Iterable[str],
        may_find: Callable[[Sequence[str]], bool] = lambda tags: True,
    ) -> list[tuple[int, StoredObject]]:
        """Objects that match every term: a tag, the id, or a word of the description, exactly.

        The session's own are found as they are. Of others' published ones, where it `may_find` what has their tags, it
        gets snapshots of its own.
        """
        terms = list(query)
        hits = [
            (id, stored)
            for id, stored in list(self.objects.items())
            if (stored.owner in (session, "") or stored.tags)
            and self.kinds.of(stored.value).can_be_found(stored.value)
            and all(_matches(term, id, stored) for term in terms)
            and (stored.owner == session or may_find(stored.tags))
        ]
        return [hit if hit[1].owner == session else self._snapshot(session, hit[1]) for hit in hits]

    def label_of(self, stored: StoredObject) -> Label:
        """Returns who may read the value of `stored`: its own label, joined with those of the memory of its tensors."""
        label = stored.label
        if not self.memory:
            return label
        for tensor in self.tensors_of(stored):
            label = join(label, self.memory.of(tensor))
        return label

    def tensors_of(self, stored: StoredObject) -> Sequence[torch.Tensor]:
        """Returns the tensors that an object holds."""
        return self.kinds.of(stored.value).tensors(stored.value)

    def source_of(self, stored: StoredObject) -> frozenset[str] | None:
        """Returns its tags as data that nothing was written to since its owner put it here; None for anything else."""
        if isinstance(stored.value, torch.Tensor) and self.memory.of(stored.value) is None:
            return stored.source
        return None

    def _snapshot(self, session: str, stored: StoredObject) -> tuple[int, StoredObject]:
        own = self.kinds.of(stored.value).snapshot(stored.value)
        id, label = new_id(), self.label_of(stored)
        copy = StoredObject(
            own, session, label, description=stored.description, source=self.source_of(stored)
        )
        self.add(id, copy)
        return id, StoredObject(own, session, label, tags=stored.tags, description=stored.description)


def _bytes_of(tags: Sequence[str], description: str) -> int:
    return len(description) + sum(map(len, tags))


def _matches(term: str, id: int, stored: StoredObject) -> bool:
    return term in stored.tags or term == str(id) or term in stored.description.split()


@dataclass(frozen=True, slots=True)
class Held:
    """The figures of some sessions: how many, their objects, and the bytes of these."""

    sessions: int
    objects: int
    bytes: int


class Overview:
    """Tells what a worker has, since when it serves, and what is under way; may be asked from any thread.

    Whoever asks over a session hears of what is its user's own, in numbers (`told_to`). Who is nobody, at a worker that
    knows users, hears of that session only. The owner sees the figures of all at the worker's own machine: `held`,
    which the metrics are of.

    Args:
        store: its objects. device: where it computes.
        sessions: returns those that there are.
        waiting: returns the sessions of the requests that wait for other workers, or for parties, one each.
        knows_users: whether its clients can prove who they are.
    """

    def __init__(
        self,
        store: ObjectStore,
        device: torch.device,
        sessions: Callable[[], Collection[Session]],
        waiting: Callable[[], Collection[Session]],
        *,
        knows_users: bool,
    ) -> None:
        self.since = time.time()
        """When it began (seconds, as of `time.time`)."""
        self._store, self._device = store, device
        self._sessions, self._waiting = sessions, waiting
        self._knows_users = knows_users
        self._nbytes, self._rest_until = 0, 0.0

    def held(self) -> Held:
        """Returns the figures of all sessions, and of what outlived them. The bytes may be those of a moment ago."""
        now = time.monotonic()
        if now >= self._rest_until:
            self._nbytes = self._bytes_of(list(self._store.objects.values()))
            self._rest_until = time.monotonic() + _REST * (time.monotonic() - now)
        return Held(len(self._sessions()), len(self._store.objects), self._nbytes)

    def waiting(self) -> int:
        """Returns how many requests wait."""
        return len(self._waiting())

    def told_to(self, session: Session) -> m.WorkerStatus:
        """Returns what a session hears."""
        there = self._sessions()
        everybody = not self._knows_users and all(one.user is None for one in there)
        own = {one.id: one for one in there if everybody or _same(one, session)}
        objects = [stored for id in own for _, stored in self._store.of(id)]
        return m.WorkerStatus(
            since=self.since,
            device=str(self._device),
            user=session.user or "",
            sessions=len(own),
            objects=len(objects),
            bytes=self._bytes_of(objects),
            waiting=sum(one.id in own for one in self._waiting()),
        )

    def _bytes_of(self, objects: Iterable[StoredObject]) -> int:
        """The bytes of their memory; what several show counts once."""
        found: dict[int, int] = {}
        for stored in objects:
            for tensor in self._store.kinds.of(stored.value).kept(stored.value):
                storage = tensor.untyped_storage()
                found[storage._cdata] = storage.nbytes()
        return sum(found.values())


def _same(one: Session, other: Session) -> bool:
    return one is other or (one.user is not None and one.user == other.user)
