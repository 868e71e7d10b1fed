"""What a coordinator's memory does: during a large round, and over many rounds. Each in a fresh process.

As a child process (``python -m benchmarks.memory CASE``) it is that coordinator and answers with its figures.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

from benchmarks.child import Child, answer_with
from benchmarks.measure import Goal, PeakMemory, Row, Sample, resident_bytes
from benchmarks.rounds import Rounds, mnist_workers, websocket_workers
from benchmarks.throughput import WIDTH
from benchmarks.workloads import (
    Size,
    mnist_config,
    model_bytes,
    set_width,
    wide_children,
    wide_config,
    wide_model,
)

HOLD = 2
ROUNDS = 200
SETTLED = 20
"""Rounds after which caches and allocators have taken what they will."""
WINDOW = 15
"""Rounds whose highest counts: after any single one, malloc may or may not keep a few models' worth of memory."""


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    set_width(300 if size.quick else WIDTH)
    rows = [
        _peak_row("three workers", size, workers=3, slow=False),
        _peak_row("five workers, the first one slow", size, workers=5, slow=True),
    ]
    with Child("memory", "growth") as coordinator:
        grown = coordinator.ask(SETTLED + WINDOW if size.quick else ROUNDS)
    rows.append(
        Row(
            "memory over rounds",
            "MB",
            Sample((grown["after"] / 1e6,)),
            Sample((grown["settled"] / 1e6,)),
            f"after {SETTLED} rounds",
            Goal(at_most=1.02),
            f"the coordinator's after {grown['rounds']} rounds of the MNIST network, one batch, three workers",
        )
    )
    return rows


def _peak_row(title: str, size: Size, *, workers: int, slow: bool) -> Row:
    """Peak above what the coordinator had before it made the model, in models: the model itself counts."""
    runs = []
    for _ in range(min(size.repeats, 3)):
        with Child("memory", "peak") as coordinator:
            runs.append(coordinator.ask({"workers": workers, "slow": slow, "rounds": 3}))
    model = runs[0]["model"]
    peaks = Sample(tuple(float(max(run["peaks"])) for run in runs))
    beyond = peaks.median - (2 + HOLD) * model
    return Row(
        f"coordinator's peak, {title}",
        "models",
        peaks.map(lambda nbytes: nbytes / model),
        goal=Goal(at_most=2.0 + HOLD, absolute=True),
        note=f"hold={HOLD}; highest of three rounds in place, {model / 1e6:.0f} MB a model; "
        f"{beyond / 1e6:+.0f} MB from the bound",
        details={"runs": runs},
    )


# -------------------------------------------------------------------------------- the coordinator


def peak(request: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of rounds that only carry parameters, in bytes above what there was before the model."""
    batches = 1 if request["slow"] else 0  # a slow worker takes its time over a batch
    with websocket_workers(wide_children(request["workers"], first_slow=request["slow"])) as workers:
        gc.collect()
        before = resident_bytes()
        model = wide_model()
        with PeakMemory() as preparing:
            rounds = Rounds(workers, wide_config(model, batches=batches), dataset_key="wide", hold=HOLD)
        peaks = []
        for number in range(1, request["rounds"] + 1):
            with PeakMemory() as watched:
                rounds.run(number, in_place=True)
            peaks.append(watched.bytes - before)
    return {"model": model_bytes(model), "preparing": preparing.bytes - before, "peaks": peaks}


def growth(rounds_in_all: int) -> dict[str, Any]:
    """Resident memory around round `SETTLED` and at the end: the highest of `WINDOW` rounds each."""
    resident = []
    with mnist_workers() as workers:
        rounds = Rounds(workers, mnist_config(batches=1))
        for number in range(1, rounds_in_all + 1):
            rounds.state = rounds.run(number).state
            gc.collect()
            resident.append(resident_bytes())
    settled, after = max(resident[SETTLED - WINDOW : SETTLED]), max(resident[-WINDOW:])
    return {"rounds": rounds_in_all, "settled": settled, "after": after}


if __name__ == "__main__":
    answer_with(peak if sys.argv[1] == "peak" else growth)
