"""Where the steps of a run are, kept for whoever asks and told to whoever wants to be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from planrt.workers.wire.chain_runs import StepState, Transfer

OnProgress: TypeAlias = Callable[[str, str, StepState], object]
"""Called with a step's name, its worker's id, and "waiting", "running", "done" or "failed"."""


@dataclass(frozen=True, slots=True)
class StepProgress:
    """The worker and the state of one step of a run."""

    worker: str
    state: StepState


class Progress:
    """The steps of one run. `ids` maps places to the ids of their workers."""

    def __init__(self, ids: Mapping[str, str], on_progress: OnProgress | None, *, verbose: bool) -> None:
        self.steps: dict[str, StepProgress] = {}
        self._ids = ids
        self._on_progress = on_progress
        self._verbose = verbose
        self._untold: list[tuple[str, StepProgress]] = []

    def on_step(self, step: str, place: str, state: StepState) -> None:
        """Notes that a step has come to another state; as `ChainRun` calls it."""
        before = self.steps.get(step)
        if state == "done" and before is not None and before.state == "waiting":
            self.on_step(step, place, "running")  # who asks now and then does not see every state
        now = StepProgress(self._ids[place], state)
        if self.steps.get(step) != now:
            self.steps[step] = now
            self._untold.append((step, now))

    def on_transfer(self, kind: Transfer, source: str, target: str) -> None:
        """Notes that a value goes somewhere; as `ChainRun` calls it."""
        if self._verbose:
            way = f"{self._ids[source]} -> " if source else ""
            print(f"{kind} {way}{self._ids[target]}")

    def tell(self) -> None:
        """Calls back for what has happened since the last time."""
        untold, self._untold = self._untold, []
        if self._on_progress is not None:
            for step, now in untold:
                self._on_progress(step, now.worker, now.state)
