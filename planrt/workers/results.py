"""What comes back from a fit, and of a worker's status: `FitResult`, `WorkerStatus`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planrt.cards import card
from planrt.plans.model_state import ModelState
from planrt.shown import shown
from planrt.workers.wire import messages as m


@dataclass(frozen=True, slots=True)
class FitResult:
    """The answer to a fit: the trained entries of the state, and how training went.

    `loss` is the mean over the samples seen (nan if there were none); ``float(result)`` and ``result.item()`` are the
    same. `changed` has the entries by the names of the model's `state_dict`, `entries` the same tensors by the names of
    the plan, each once. Both are empty where the model stays on the worker, as with `worker.fit`.
    """

    worker_id: str
    loss: float
    samples: int
    batches: int
    changed: ModelState
    entries: dict[str, torch.Tensor]

    def __float__(self) -> float:
        return self.loss

    def item(self) -> float:
        """Returns the loss, as scripts read it from a tensor."""
        return self.loss

    def _repr_html_(self) -> str:
        return card(
            f"FitResult of {self.worker_id}",
            [
                ("loss", f"{self.loss:.4f}"),
                ("samples", f"{self.samples:,} in {self.batches:,} batches"),
                ("came back", f"{len(self.changed)} entries" if self.changed else None),
            ],
        )

    def __repr__(self) -> str:
        back = f", {len(self.changed)} entries came back" if self.changed else ""
        return (
            f"<FitResult of {shown(self.worker_id)}: loss {self.loss:.4f}, {self.samples} samples in {self.batches} "
            f"batches{back}>"
        )


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """The state of a worker, as far as it is for whoever asked: figures of that user's own sessions there.

    Who is nobody sees one session, this one; at a worker that knows no users, everybody's.

    Attributes:
        worker_id, address: which worker. planrt: the version that it runs. device: where it computes.
        since: when it began (seconds, as of `time.time`).
        user: the user whom it knows the client by; ``""`` for nobody.
        sessions, objects, bytes: how many of them the user has there, and the memory of the objects.
        waiting: requests of the user's that are under way, and wait for other workers.
    """

    worker_id: str
    address: str
    planrt: str
    device: str
    since: float
    user: str
    sessions: int
    objects: int
    bytes: int
    waiting: int

    @classmethod
    def of(cls, worker_id: str, address: str, planrt: str, told: m.WorkerStatus) -> WorkerStatus:
        """Returns what a worker told."""
        return cls(
            worker_id, address, planrt, told.device, told.since, told.user, told.sessions, told.objects, told.bytes,
            told.waiting,
        )  # fmt: skip
