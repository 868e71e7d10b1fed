"""Federated learning: training configurations, averaging, rounds, and the commands built on them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planrt.fl.averaging import federated_avg
    from planrt.fl.config import FitResult, TrainConfig
    from planrt.fl.rounds import ModelEvaluator, RoundResult, RoundScheduler
    from planrt.fl.utils import evaluate_model_on_worker, fit_model_on_worker

_HOMES = {
    "federated_avg": "planrt.fl.averaging",
    "FitResult": "planrt.fl.config",
    "TrainConfig": "planrt.fl.config",
    "ModelEvaluator": "planrt.fl.rounds",
    "RoundResult": "planrt.fl.rounds",
    "RoundScheduler": "planrt.fl.rounds",
    "evaluate_model_on_worker": "planrt.fl.utils",
    "fit_model_on_worker": "planrt.fl.utils",
}
"""Public name -> module, imported at first use, so that the commands can parse options before torch loads."""

__all__ = [
    "FitResult",
    "ModelEvaluator",
    "RoundResult",
    "RoundScheduler",
    "TrainConfig",
    "evaluate_model_on_worker",
    "federated_avg",
    "fit_model_on_worker",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'planrt.fl' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value
