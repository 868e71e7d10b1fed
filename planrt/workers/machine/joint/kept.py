"""What a party keeps of a joint run after each epoch, so that it can go on when somebody was gone. No I/O.

A party keeps its own part alone, in its owner's folder: which of its rows are in all tables, its weights, what its
optimizer keeps, and what the noise is drawn from. Nobody is sent any of it. A key is made anew: nothing that is trained
depends on it. Whatever else a run needs follows from its terms and the table, which must be the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from planrt.errors import JointError
from planrt.serde.checkpoints import Checkpoint


class Keeps(Protocol):
    """A place where a worker keeps its part of joint runs: by user, and a name that the client chose."""

    def epochs(self, user: str, name: str) -> Sequence[int]:
        """Returns the epochs after which the run was kept: the newest first, two at most."""
        ...

    def read(self, user: str, name: str, epoch: int) -> Checkpoint:
        """Returns what was kept.

        Raises:
            JointError: it is damaged.
        """
        ...

    def check_room(self, user: str, name: str) -> None:
        """Raises JointError if the user has kept as many runs as there is room for."""
        ...

    def write(self, user: str, name: str, epoch: int, kept: Checkpoint) -> None:
        """Keeps it: all of it, or what was there before stays. Of older epochs the newest stays.

        Raises:
            JointError: it could not be written.
        """
        ...

    def forget(self, user: str, name: str) -> None:
        """Removes all that was kept of a run."""
        ...


@dataclass(slots=True)
class KeptRun:
    """A run that is kept, at one party."""

    folder: Keeps
    user: str
    name: str
    whose: str
    """This worker, as messages call it."""
    terms: str
    """Hash of the terms."""
    origin: str
    """The id of the run that began."""
    table: str = ""
    """Digest of the table; "" for who holds a key."""

    def checked(self, epoch: int) -> Checkpoint:
        """Returns what was kept after an epoch.

        Raises:
            JointError: nothing was, or it is of other terms or of another table.
        """
        found = self.folder.read(self.user, self.name, epoch)
        if found.facts.get("terms") != self.terms:
            raise JointError(
                f"{self.whose} has kept {self.name!r} of a run with other terms: open it with the same ones, or under "
                "another name"
            )
        if found.facts.get("epochs") != epoch:
            raise JointError(
                f"what {self.whose} has kept of {self.name!r} after {epoch} epochs is of another time: begin a new run"
            )
        if found.facts.get("table") != self.table:
            raise JointError(
                f"the table at {self.whose} is not the one that {self.name!r} began with: begin a new run"
            )
        return found

    def write(self, epoch: int, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Keeps what there is after `epoch` epochs."""
        whole = {"terms": self.terms, "table": self.table, "origin": self.origin, "epochs": epoch, **facts}
        self.folder.write(self.user, self.name, epoch, Checkpoint(whole, dict(tensors)))


def named(prefix: str, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns tensors under names that tell their places."""
    return {f"{prefix}/{place}": tensor for place, tensor in enumerate(tensors)}


def taken(prefix: str, checkpoint: Checkpoint) -> list[torch.Tensor]:
    """Returns the tensors that `named` has given such names, in order."""
    found: list[torch.Tensor] = []
    while (tensor := checkpoint.tensors.get(f"{prefix}/{len(found)}")) is not None:
        found.append(tensor)
    return found
