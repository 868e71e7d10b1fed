"""Pointers to objects on other workers, as objects of a worker. No I/O."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import ClassVar, Literal

from planrt.workers.machine.events import Steps
from planrt.workers.machine.kinds.base import Freed, ObjectKind, StoredObject
from planrt.workers.machine.labels import Label, MemoryLabels
from planrt.workers.machine.sessions import Session, ask
from planrt.workers.wire import messages as m


@dataclass(frozen=True, slots=True)
class PeerRef:
    """A pointer to an object on another worker."""

    peer: m.PeerAddress
    id: int
    """The object's id there."""

    @property
    def plain(self) -> m.PeerAddress:
        """The other worker, whoever reaches it there."""
        return m.PeerAddress(self.peer.worker, self.peer.address)


class PointerKind(ObjectKind[PeerRef]):
    """Pointers. The other worker keeps what one points to for as long as it is here, and it goes with its session."""

    python_type = PeerRef
    name: ClassVar[Literal["pointer"]] = "pointer"
    elsewhere = True
    outlives_session = False

    def freed(self, value: PeerRef) -> Freed:
        """Returns what it points to."""
        return [(value.peer, [value.id])]

    def freed_by_fetch(self, value: PeerRef) -> Freed:
        """Returns nothing: the client owns what it points to from then on."""
        return ()

    def listed(self, id: int, stored: StoredObject) -> m.ListedItem:
        """Returns where it points to, with its tags."""
        ref: PeerRef = stored.value
        return m.ListedItem(id, self.name, None, list(stored.tags), stored.description, ref.plain, ref.id)

    def fetch(
        self, session: Session, id: int, stored: StoredObject, label: Label, memory: MemoryLabels
    ) -> Steps:
        """Returns where it points to, with a token for who claims it there."""
        ref: PeerRef = stored.value
        token = secrets.token_hex(16)
        yield from ask(ref.peer, m.HandOver([ref.id], token))
        return m.FetchedPointer(ref.plain, ref.id, token), ()
