"""What a run leaves behind: the report as JSON and a plot of accuracy and loss over rounds."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planrt.chained import finite
from planrt.extras import needed

if TYPE_CHECKING:  # it imports torch, which the commands do later
    from planrt.fl.attendance import Missing
    from planrt.fl.round_result import WorkerRound

FEDERATED = "federated"
"""Name of the averaged model among the evaluations of a round."""


@dataclass(frozen=True)
class Evaluation:
    """One model on the test images: mean loss, share of right answers, predictions per digit."""

    loss: float
    accuracy: float
    histogram: list[int]


@dataclass(frozen=True)
class Round:
    """One round. `seconds` is training and averaging; `evaluation` (model name -> result) may be empty, and `missing`
    says which workers do not count in it, and why."""

    round: int
    seconds: float
    workers: dict[str, WorkerRound]
    evaluation_seconds: float = 0.0
    evaluation: dict[str, Evaluation] = field(default_factory=dict)
    missing: dict[str, Missing] = field(default_factory=dict)


@dataclass
class Report:
    """A whole run. `options` and `versions` are what it takes to repeat it; `stopped` says why it ended early."""

    dataset: str
    seed: int
    options: dict[str, Any]
    versions: dict[str, str]
    rounds: list[Round] = field(default_factory=list)
    stopped: str = ""

    @property
    def final_accuracy(self) -> float | None:
        """Accuracy of the averaged model after the last evaluated round; None where there was none."""
        found = (r.evaluation[FEDERATED].accuracy for r in reversed(self.rounds) if FEDERATED in r.evaluation)
        return next(found, None)

    @property
    def median_seconds(self) -> float:
        """Median seconds of a round, evaluation not counted."""
        return statistics.median(r.seconds for r in self.rounds)

    @property
    def median_bytes(self) -> int:
        """Median bytes of a round and worker, both ways together."""
        return round(
            statistics.median(
                w.bytes_sent + w.bytes_received for r in self.rounds for w in r.workers.values()
            )
        )

    def to_json(self) -> str:
        """Returns the report as JSON. Numbers that are not finite (a run that diverged) become null."""
        rounds = []
        for entry in self.rounds:
            fields = dataclasses.asdict(entry)
            if not entry.evaluation:
                del fields["evaluation"], fields["evaluation_seconds"]
            if not entry.missing:
                del fields["missing"]
            rounds.append(fields)
        content = {
            "final_accuracy": self.final_accuracy,
            "dataset": self.dataset,
            "seed": self.seed,
            "options": self.options,
            "versions": self.versions,
            "rounds": rounds,
        }
        if self.stopped:
            content["stopped"] = self.stopped
        return json.dumps(finite(content), indent=1, allow_nan=False) + "\n"


def plot(report: Report, path: Path) -> None:
    """Draws accuracy and loss of the averaged and the workers' models on the test images, as a PNG.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figures = needed("matplotlib.figure", by="the plot of a run")
    evaluated = [r for r in report.rounds if r.evaluation]
    names = list(dict.fromkeys(name for r in evaluated for name in r.evaluation if name != FEDERATED))
    figure = figures.Figure(figsize=(11, 4.6), layout="constrained")  # not pyplot's, which wants a display
    accuracy, loss = figure.subplots(1, 2)
    for name in [*names, FEDERATED]:
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.2, "alpha": 0.8}
        if name == FEDERATED:
            style = {"marker": "o", "markersize": 5, "linewidth": 2.5, "color": "black"}
        label = "average of all" if name == FEDERATED else f"{name}'s model"
        numbers = [r.round for r in evaluated if name in r.evaluation]
        results = [r.evaluation[name] for r in evaluated if name in r.evaluation]
        accuracy.plot(numbers, [100 * result.accuracy for result in results], label=label, **style)
        loss.plot(numbers, [result.loss for result in results], label=label, **style)
    every = [r.round for r in report.rounds]
    training = [statistics.fmean(w.loss for w in r.workers.values()) for r in report.rounds]
    loss.set_yscale("log")
    loss.plot(every, training, color="grey", linewidth=1, linestyle=":", label="training loss")
    low, high = loss.get_ylim()
    loss.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # 0.5, not 5 x 10^-1
    loss.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if high < 10 * low or _leads(value) else "")
    accuracy.set(ylabel="accuracy on test images (%)", ylim=(0, 101))
    loss.set(ylabel="loss (mean negative log-likelihood)")
    for axes in (accuracy, loss):
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    final = "not evaluated" if report.final_accuracy is None else f"{100 * report.final_accuracy:.2f}%"
    figure.suptitle(f"{report.dataset}, seed {report.seed}: {final} after {every[-1]} rounds")
    figure.savefig(path, dpi=130)


def _leads(value: float) -> bool:
    """Whether the first digit of `value` is 2 or 5: what is labelled between powers of ten."""
    return f"{value:e}"[0] in "25"
