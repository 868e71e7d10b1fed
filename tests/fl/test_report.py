"""The report: its JSON has the form that readers rely on, and the plot is a picture."""

from __future__ import annotations

import json
import math
import re

import pytest

from planrt.fl.report import FEDERATED, Evaluation, Report, Round, plot
from planrt.fl.rounds import WorkerRound


def traffic(sent: int = 10, received: int = 20, loss: float = 0.5) -> WorkerRound:
    return WorkerRound(
        requests=1, replies=1, bytes_sent=sent, bytes_received=received, loss=loss, samples=320
    )


def evaluation(accuracy: float, loss: float = 1.0) -> Evaluation:
    return Evaluation(loss=loss, accuracy=accuracy, histogram=[1] * 10)


def report(*, loss: float = 1.0) -> Report:
    names = ("alice", "bob")
    both = {"alice": traffic(), "bob": traffic(30, 40)}
    first = {name: evaluation(0.2) for name in names} | {FEDERATED: evaluation(0.5, loss)}
    last = {name: evaluation(0.4) for name in names} | {FEDERATED: evaluation(0.9, loss)}
    return Report(
        dataset="mnist",
        seed=1,
        options={"rounds": 3, "data": None},
        versions={"planrt": "0"},
        rounds=[
            Round(1, 0.5, both, evaluation_seconds=2.0, evaluation=first),
            Round(2, 0.1, both),
            Round(3, 0.3, both, evaluation_seconds=1.0, evaluation=last),
        ],
    )


def test_the_json_has_the_promised_form():
    content = json.loads(report().to_json())
    assert list(content) == ["final_accuracy", "dataset", "seed", "options", "versions", "rounds"]
    assert content["final_accuracy"] == 0.9
    first = content["rounds"][0]
    assert first["round"] == 1
    assert first["seconds"] == 0.5
    assert first["evaluation_seconds"] == 2.0
    assert first["workers"]["alice"] == {
        "requests": 1,
        "replies": 1,
        "bytes_sent": 10,
        "bytes_received": 20,
        "loss": 0.5,
        "samples": 320,
    }
    assert first["evaluation"]["federated"] == {"loss": 1.0, "accuracy": 0.5, "histogram": [1] * 10}


def test_evaluation_stands_on_evaluated_rounds_only():
    rounds = json.loads(report().to_json())["rounds"]
    assert ["evaluation" in entry for entry in rounds] == [True, False, True]
    assert ["evaluation_seconds" in entry for entry in rounds] == [True, False, True]


def test_figures_of_the_summary():
    assert report().median_seconds == 0.3
    assert report().median_bytes == 50
    assert report().final_accuracy == 0.9


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_run_that_diverged_is_still_valid_json(loss):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(report(loss=loss).to_json(), parse_constant=refuse)
    assert content["rounds"][0]["evaluation"]["federated"]["loss"] is None


@pytest.mark.parametrize("loss", [1.0, 0.0, math.nan])
def test_the_plot_is_a_png_of_some_size(tmp_path, loss):
    from matplotlib import image

    path = tmp_path / "plot.png"
    plot(report(loss=loss), path)
    pixels = image.imread(path)
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 1000
    assert pixels.std() > 0.01  # something is drawn


@pytest.mark.parametrize("losses", [(2.3, 2.1), (4.1, 3.2), (0.9, 0.004), (250.0, 3.0)])
def test_the_plots_ticks_are_plain_numbers(tmp_path, monkeypatch, losses):
    from matplotlib.figure import Figure

    drawn = []

    def keep(figure, path, **options):
        figure.draw_without_rendering()
        drawn.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    run = report()
    for entry, loss in zip((run.rounds[0], run.rounds[2]), losses, strict=True):
        entry.evaluation[FEDERATED] = evaluation(0.5, loss)
    plot(run, tmp_path / "plot.png")
    for axes in drawn[0].axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [
                label.get_text() for label in [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]
            ]
            shown = [label for label in labels if label]
            assert len(shown) >= 2
            assert all(re.fullmatch(r"\d+(\.\d+)?(e-\d+)?", label) for label in shown), labels
