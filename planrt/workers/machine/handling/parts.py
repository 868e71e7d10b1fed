"""What a worker's state machine consists of: one object that all who handle its events have. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planrt.workers.machine.access import Access
from planrt.workers.machine.audit import Auditor
from planrt.workers.machine.backward import BackwardPasses
from planrt.workers.machine.eager import EagerOps
from planrt.workers.machine.gate import Gate
from planrt.workers.machine.handshakes import Handshakes
from planrt.workers.machine.joint.runs import JointOps
from planrt.workers.machine.keeping.openings import Openings
from planrt.workers.machine.keeping.sessions import KeptSessions
from planrt.workers.machine.objects import KeptObjects
from planrt.workers.machine.protocols import ProtocolOps
from planrt.workers.machine.rounds.secure_sums import SecureSums
from planrt.workers.machine.rounds.training import TrainingOps
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.sharing.dealers import DealerOps
from planrt.workers.machine.sharing.parties import PartyOps
from planrt.workers.machine.siblings.neighbours import Neighbours
from planrt.workers.machine.store import ObjectStore, Overview


@dataclass(slots=True, eq=False)
class Parts:
    """The parts of one worker. Who handles its events keeps this object, and none of its parts: a process that serves
    one user has others of some (`WorkerState.serve_alone`)."""

    device: torch.device
    store: ObjectStore
    gate: Gate | None
    """None where there is no policy."""
    access: Access
    audit: Auditor
    objects: KeptObjects
    passes: BackwardPasses
    parties: PartyOps
    dealers: DealerOps
    eager: EagerOps
    protocols: ProtocolOps
    sums: SecureSums
    training: TrainingOps
    joint: JointOps
    handshakes: Handshakes
    openings: Openings
    kept: KeptSessions
    overview: Overview
    siblings: Neighbours | None = None
    """The other processes of this worker, where this one serves the sessions of one user."""

    @property
    def sessions(self) -> dict[int, Session]:
        """Connection -> its session."""
        return self.openings.sessions

    def sessions_by_id(self) -> dict[str, Session]:
        """Returns id -> session, of those that have a connection and those that may be gone on with."""
        return {one.id: one for one in (*self.sessions.values(), *self.kept.away())}

    def tell_computations(self) -> None:
        """Tells the other processes of this worker which computations on shares and joint runs are here."""
        if self.siblings is not None:
            self.siblings.computations_are([*self.parties.names, *self.joint.names])
