"""What a round gives: `RoundResult`, and each worker's part in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from planrt.cards import card
from planrt.fl.attendance import Missing
from planrt.plans.model_state import ModelState
from planrt.shown import shown


@dataclass(frozen=True, slots=True)
class WorkerRound:
    """One worker's part in a round: messages and bytes each way, the mean loss over its samples.

    After a secure aggregation nobody knows these: `loss` is nan and `samples` 0.
    """

    requests: int
    replies: int
    bytes_sent: int
    bytes_received: int
    loss: float
    samples: int


@dataclass(frozen=True, slots=True)
class RoundResult:
    """A round: `seconds` of training and averaging, the averaged state, each worker's part.

    `loss` is the mean over all samples; `worker_states` is filled only if asked for. States are as
    ``model.load_state_dict`` takes them. `missing` are the workers that do not count in it, and why.
    """

    round: int
    seconds: float
    state: ModelState
    loss: float
    workers: dict[str, WorkerRound]
    worker_states: dict[str, ModelState] = field(default_factory=dict)
    missing: dict[str, Missing] = field(default_factory=dict)

    def as_line(self) -> dict[str, Any]:
        """Returns what a journal says of the round: all but the states, as plain values."""
        return {
            "round": self.round,
            "seconds": self.seconds,
            "loss": self.loss,
            "workers": {id: asdict(part) for id, part in self.workers.items()},
            "missing": {id: asdict(why) for id, why in self.missing.items()},
        }

    def __repr__(self) -> str:
        workers = shown(", ".join(map(_told, self.workers, self.workers.values())), 200)
        without = shown(", ".join(f"{id} ({why.kind})" for id, why in self.missing.items()), 200)
        return (
            f"<RoundResult of round {self.round}: loss {self.loss:.4f} ({workers}), {self.seconds:.2f} s"
            f"{f', without {without}' if without else ''}>"
        )

    def _repr_html_(self) -> str:
        rows = [
            (
                id,
                f"{part.loss:.4f}" if part.samples else "",
                f"{part.samples:,}",
                f"{part.bytes_sent:,}",
                f"{part.bytes_received:,}",
            )
            for id, part in self.workers.items()
        ]
        return card(
            f"RoundResult of round {self.round}",
            [
                ("loss", f"{self.loss:.4f}"),
                ("seconds", f"{self.seconds:.2f}"),
                ("state", f"{len(self.state)} entries"),
                *((f"without {id}", str(why)) for id, why in self.missing.items()),
            ],
            columns=("worker", "loss", "samples", "bytes sent", "bytes received"),
            rows=rows,
        )


def known(loss: float | None) -> float:
    """Returns a loss of a journal's line: nan where it has null, since JSON has no word for what is not finite."""
    return math.nan if loss is None else loss


def _told(id: str, part: WorkerRound) -> str:
    return f"{id}: {part.loss:.4f}" if part.samples else id


def parts_in(line: Mapping[str, Any]) -> tuple[dict[str, WorkerRound], dict[str, Missing]]:
    """Returns the parts of a round's workers, and who was missing, from what `as_line` returned."""
    return (
        {id: WorkerRound(**{**part, "loss": known(part["loss"])}) for id, part in line["workers"].items()},
        {id: Missing(**why) for id, why in line["missing"].items()},
    )
