"""What a process for one user's work has of the other processes of the same worker. No I/O.

Published objects are found by all, what is handed over goes to whoever shows its token, and computations on shares have
one process, wherever their parties' connections come in. The worker's own process knows where everything is (`Board`);
the objects themselves go from process to process, as messages between two workers do.

What the others ask here comes over connections of their own (`Session.sibling`), in the name of the user whom the
worker's own process found them to have. They may ask for what stands in `TAKEN`, and run nothing.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import torch

from planrt.errors import LocalError
from planrt.workers.machine.access import Access
from planrt.workers.machine.counting.work import entries
from planrt.workers.machine.events import Alarm, Answer, PeerAnswered, Steps, TimePassed, ToPeer, Wait
from planrt.workers.machine.failures import OpFailedError
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.kinds.protocol import PeerError
from planrt.workers.machine.objects import KeptObjects
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.siblings import lending
from planrt.workers.machine.store import new_id
from planrt.workers.wire import messages as m
from planrt.workers.wire.refusals import UnknownObject

ANSWER_SECONDS: Final = 20.0
"""Seconds that a search waits for a process that is busy: its user's work must not keep the others from theirs."""

_TO_PARTIES: Final = (
    m.GiveSeed, m.JoinGroup, m.AskNeeds, m.AskGroup, m.PutShare, m.JoinJoint, m.AskJoint, m.Opening, m.Corrections,
    m.FailGroup, m.Parcel, m.FailJoint,
)  # fmt: skip
"""What parties and dealers say to each other: it goes to the process that has the computation."""
TAKEN: Final = (*_TO_PARTIES, m.Lend, m.HandOver, m.Remove, m.Hello, m.Bye, m.Ack)
"""What one process takes from another one."""


class Board(Protocol):
    """The worker's own process, as it knows what is where. Each method asks it, and waits."""

    def keeps(self, id: int, tags: Sequence[str], description: str, token: str) -> None:
        """Says what others can have of the object `id`: all of them by its tags, who shows the token under that.
        Without any of these nobody can any more.

        Raises:
            DuplicateIdError: another process has one of that id that others can have. LocalError: it is too much.
        """

    def computes(self, names: Sequence[str]) -> None:
        """Says which computations with other workers are here."""

    def find(self, terms: Sequence[str]) -> Sequence[tuple[m.PeerAddress, list[int]]]:
        """Returns where there are published objects that match, which the user of this process may find."""

    def holder(self, ids: Sequence[int], token: str) -> m.PeerAddress | None:
        """Returns who has these objects to be handed over under that token."""

    def computing(self, name: str) -> m.PeerAddress | None:
        """Returns who has a computation."""


class Neighbours:
    """The other processes, for the sessions of this one."""

    def __init__(self, board: Board, objects: KeptObjects, access: Access, device: torch.device) -> None:
        self._board, self._objects, self._access, self._device = board, objects, access, device
        self._store = objects.store
        self._store.shown_to_others = self._shown
        self._names: frozenset[str] = frozenset()
        self._relayed: dict[str, dict[str, m.PeerAddress]] = {}
        """Session -> computations that it takes part in -> who has them."""
        self._lent: dict[int, tuple[str, ...]] = {}
        """Objects that go to another process -> the tags that they were published with."""
        self._parts: dict[str, dict[int, m.PeerAddress]] = {}
        """Session -> parts of secrets that it has put -> who has them."""

    def _shown(self, id: int, stored: StoredObject | None) -> None:
        if stored is None:
            with contextlib.suppress(LocalError):  # the worker ends: nobody asks for it any more
                self._board.keeps(id, (), "", "")
        else:
            self._board.keeps(id, stored.tags, stored.description, stored.handover)

    # ---------------------------------------------------------------------------- what others ask here

    def check(self, session: Session, body: m.Body) -> None:
        """Raises LocalError for what is not between processes, or between processes alone."""
        if not isinstance(body, TAKEN) if session.sibling else isinstance(body, m.Lend):
            raise LocalError(f"a worker does not take messages of type {type(body).__name__} here")

    def lend(self, session: Session, body: m.Lend, sessions: Mapping[str, Session]) -> Answer:
        """Answers with objects that another process asks for.

        Raises:
            UnknownObject: they were not handed over under that token. LocalError: they cannot go.
        """
        items, tensors = [], []
        for id in body.ids:
            stored = self._store.objects.get(id)
            if body.token:
                if stored is None or not _opens(stored, body.token):
                    raise UnknownObject(f"no object {id} was handed over to this session")
                lending.check_goes(self._store, id)
                packed = lending.whole(self._store, id)
            elif stored is None or not stored.tags or not self._access.finds(session.user, stored.tags):
                continue
            elif (found := lending.snapshot(self._store, id)) is not None:
                packed = found
            else:
                continue
            items.append(packed[0])
            tensors += packed[1]
        if (
            body.token
        ):  # it is the asker's, who says when it has arrived (Remove), or gives it back (HandOver)
            self._objects.claim(session, m.Claim(body.ids, body.token), sessions)
            for id in body.ids:
                self._lent[id] = tags = self._store.objects[id].tags
                if tags:  # from now on they are the asker's to publish
                    self._store.describe(id, (), self._store.objects[id].description)
        return m.Lent(items), tensors

    def came_back(self, ids: Sequence[int]) -> None:
        """Publishes again what was given to another process, which could not keep it."""
        for id in ids:
            stored, tags = self._store.objects.get(id), self._lent.pop(id, ())
            if stored is not None and tags:
                self._store.describe(id, tags, stored.description)

    # ---------------------------------------------------------------------------- what is asked of others

    def search(self, session: Session, body: m.Search, here: Answer) -> Steps:
        """Adds what others have published to what a search has found here."""
        answer = here[0]
        assert isinstance(answer, m.Found)  # noqa: S101 - as `KeptObjects.search` answers
        found = list(answer.objects)
        for peer, ids in self._board.find(body.query):
            try:
                lent, tensors = yield from self._asked(peer, m.Lend(ids), seconds=ANSWER_SECONDS)
            except PeerError:  # it has ended, and its objects with it
                continue
            self._store.spend(session.id, "a search", entries(tensors))
            for item, stored, _ in lending.unpacked(lent.objects, tensors, self._device):
                found.append(self._keep_snapshot(session, item, stored))
        return m.Found(found), ()

    def _keep_snapshot(self, session: Session, item: m.LentItem, stored: StoredObject) -> m.FoundItem:
        kind = self._store.kinds.of(stored.value)
        id, tags = new_id(), stored.tags
        stored.owner, stored.tags, stored.original = session.id, (), False
        self._store.add(id, stored)
        if kind.gains_gradient(stored.value):
            session.leaves[id] = None
        shown = StoredObject(
            stored.value, session.id, stored.label, tags=tags, description=stored.description
        )
        return kind.found(id, shown, private=item.allowed is not None, snapshot=True)

    def is_elsewhere(self, body: m.Claim) -> bool:
        """Returns whether what is to be claimed is not here."""
        return any(id not in self._store.objects for id in body.ids)

    def claim(self, session: Session, body: m.Claim) -> Steps:
        """Takes over what was handed over in another process.

        Raises:
            UnknownObject: nobody has it under that token. LocalError: it cannot go. PolicyError: there is no room.
        """
        peer = self._board.holder(body.ids, body.token) if body.token else None
        if peer is None:
            raise UnknownObject(f"no object {body.ids[0]} was handed over to this session")
        for id in body.ids:
            self._store.check_free(id)
        lent, tensors = yield from self._asked(peer, m.Lend(body.ids, body.token))
        kept: list[int] = []
        try:
            self._store.spend(session.id, "taking over objects", entries(tensors))
            for item, stored, of_gradient in lending.unpacked(lent.objects, tensors, self._device):
                kept.append(self._keep_claimed(session, item, stored, of_gradient))
        except Exception:  # nothing is lost
            for id in kept:
                self._objects.forget(session, id)
            yield ToPeer(peer, m.HandOver(body.ids, body.token))
            raise
        yield ToPeer(peer, m.Remove(body.ids))
        return m.Done(), ()

    def _keep_claimed(
        self, session: Session, item: m.LentItem, stored: StoredObject, of_gradient: frozenset[str] | None
    ) -> int:
        stored.owner = session.id
        self._store.add(item.id, stored)
        value = stored.value
        if isinstance(value, torch.Tensor) and value.grad is not None:
            self._store.memory.account(value.grad, of_gradient)
        if self._store.kinds.of(value).gains_gradient(value):
            session.leaves[item.id] = None
        return item.id

    def _asked(self, peer: m.PeerAddress, body: m.Lend, seconds: float | None = None) -> Any:
        """Returns the `Lent` that another process answers with, and its tensors.

        Raises:
            PeerError: it has ended. LocalError: it is too busy.
        """
        key, alarm = secrets.token_hex(8), secrets.token_hex(8)
        yield ToPeer(peer, body, (), key)
        if seconds is not None:
            yield Alarm(seconds, alarm)
        answered = yield Wait(key, () if seconds is None else (alarm,))
        if isinstance(answered, TimePassed):
            raise LocalError(
                f"{len(body.ids)} objects that match are in the process of another user, which has been busy for "
                f"{seconds:g} s: search again later"
            )
        assert isinstance(answered, PeerAnswered)  # noqa: S101 - what a Wait gives
        if isinstance(answered.body, m.Failure):
            raise OpFailedError(answered.body)
        if not isinstance(answered.body, m.Lent):
            raise LocalError(f"a process of this worker answered with {type(answered.body).__name__}")
        return answered.body, answered.tensors

    # -------------------------------------------------------------------- computations with other workers

    def computations_are(self, names: Iterable[str]) -> None:
        """Takes note of the computations that there are here."""
        now = frozenset(names)
        if now != self._names:
            with contextlib.suppress(LocalError):  # as in _shown
                self._board.computes(sorted(now))
            self._names = now

    def check_new(self, body: m.MakeGroup | m.OpenJoint) -> None:
        """Raises LocalError for a computation that another process has."""
        name = f"joint {body.joint}" if isinstance(body, m.OpenJoint) else f"group {body.group}"
        if self._board.computing(name) is not None:
            raise LocalError(f"{name!r} is known here already")

    def computing(self, session: Session, body: m.Body) -> m.PeerAddress | None:
        """Returns which other process has the computation that a message is about; None if none has, or this one."""
        if session.sibling or not isinstance(body, _TO_PARTIES):
            return None
        name = _name_of(body)
        if name in self._names:
            return None
        known = self._relayed.setdefault(session.id, {})
        if name not in known:
            peer = self._board.computing(name)
            if peer is None:
                return None
            known[name] = peer
        return known[name]

    def relayed(
        self, session: Session, peer: m.PeerAddress, body: m.Body, tensors: Sequence[torch.Tensor]
    ) -> Steps:
        """Has another process answer a message of another worker."""
        key = secrets.token_hex(8)
        yield ToPeer(peer, body, tensors, key)
        answered = yield Wait(key)
        assert isinstance(answered, PeerAnswered)  # noqa: S101 - what a Wait gives
        if isinstance(answered.body, m.Failure):
            raise OpFailedError(answered.body)
        if isinstance(body, m.PutShare):
            self._parts.setdefault(session.id, {})[body.id] = peer
        return answered.body, answered.tensors

    def removed(self, session: Session, body: m.Remove) -> list[ToPeer]:
        """Returns what other processes can free of what a session has put there."""
        for id in body.ids:
            self._lent.pop(id, None)
        parts = self._parts.get(session.id, {})
        return [ToPeer(parts.pop(id), m.Remove([id])) for id in body.ids if id in parts]

    def gone(self, session: Session) -> list[ToPeer]:
        """Returns what the computations hear that a session took part in, whose connection has ended."""
        self._parts.pop(session.id, None)
        relayed = self._relayed.pop(session.id, {})
        try:
            return [
                ToPeer(peer, _failed(name, "the connection of one of its members has ended"))
                for name, peer in relayed.items()
                if self._board.computing(name) == peer
            ]
        except LocalError:  # as in _shown
            return []


def _opens(stored: StoredObject, token: str) -> bool:
    return bool(stored.handover) and hmac.compare_digest(stored.handover.encode(), token.encode())


def _name_of(body: Any) -> str:
    """A computation as the worker's own process knows it: groups and joint runs have names of their own."""
    return f"joint {body.joint}" if hasattr(body, "joint") else f"group {body.group}"


def _failed(name: str, why: str) -> m.Body:
    kind, _, own = name.partition(" ")
    return m.FailJoint(own, why) if kind == "joint" else m.FailGroup(own, why)
