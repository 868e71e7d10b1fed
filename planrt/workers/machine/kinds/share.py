"""One worker's parts of secrets as objects of a worker. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from planrt.errors import LocalError
from planrt.sharing.kernels import Share
from planrt.workers.machine.events import Steps
from planrt.workers.machine.kinds.base import ObjectKind, StoredObject
from planrt.workers.machine.labels import Label, MemoryLabels
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.sharing.groups import Group
from planrt.workers.wire import messages as m


@dataclass(slots=True, eq=False)
class SharedPart:
    """This party's part of a secret that a group holds."""

    group: Group
    share: Share

    def __repr__(self) -> str:
        about = self.group.about
        return f"<part {about.number} of {len(about.parties)} of a secret, {list(self.share.part.shape)}>"


class ShareKind(ObjectKind[SharedPart]):
    """Parts of secrets. Nobody finds, copies or moves one; its own session alone fetches it, while its group lasts."""

    python_type = SharedPart
    name: ClassVar[Literal["share"]] = "share"
    outlives_session = False

    def kept(self, value: SharedPart) -> Sequence[torch.Tensor]:
        """Returns the part itself."""
        return (value.share.part,)

    def fetch(
        self, session: Session, id: int, stored: StoredObject, label: Label, memory: MemoryLabels
    ) -> Steps:
        """Returns the part and its scale.

        Raises:
            SharingError: the group has failed: what it holds is not opened any more.
        """
        yield from ()  # asks nobody
        part: SharedPart = stored.value
        part.group.check()
        return m.FetchedShare(part.share.scale), [part.share.part.contiguous()]

    def move(self, stored: StoredObject, body: m.Move, label: Label) -> Steps:
        """Refuses: a part belongs to one party.

        Raises:
            LocalError: always.
        """
        raise LocalError("a part of a secret stays with its party: get() the shared tensor, and send that")
