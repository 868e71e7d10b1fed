"""Federated learning: training configurations, averaging, rounds, and the commands built on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planrt.lazy import names_of

if TYPE_CHECKING:
    from planrt.fl.averaging import Aggregation, federated_avg
    from planrt.fl.config import TrainConfig
    from planrt.fl.data.federated import FederatedDataLoader, FederatedDataset
    from planrt.fl.data.splitting import federate
    from planrt.fl.optims import Optims
    from planrt.fl.robust import CoordinateMedian, Krum, MultiKrum, TrimmedMean
    from planrt.fl.rounds import ModelEvaluator, RoundResult, RoundScheduler
    from planrt.fl.secure import SecureAggregation
    from planrt.fl.utils import evaluate_model_on_worker, fit_model_on_worker
    from planrt.workers.results import FitResult

_HOMES = {
    "Aggregation": "planrt.fl.averaging",
    "federated_avg": "planrt.fl.averaging",
    "FitResult": "planrt.workers.results",
    "TrainConfig": "planrt.fl.config",
    "FederatedDataLoader": "planrt.fl.data.federated",
    "FederatedDataset": "planrt.fl.data.federated",
    "Optims": "planrt.fl.optims",
    "CoordinateMedian": "planrt.fl.robust",
    "Krum": "planrt.fl.robust",
    "MultiKrum": "planrt.fl.robust",
    "TrimmedMean": "planrt.fl.robust",
    "ModelEvaluator": "planrt.fl.rounds",
    "RoundResult": "planrt.fl.rounds",
    "RoundScheduler": "planrt.fl.rounds",
    "SecureAggregation": "planrt.fl.secure",
    "federate": "planrt.fl.data.splitting",
    "evaluate_model_on_worker": "planrt.fl.utils",
    "fit_model_on_worker": "planrt.fl.utils",
}
"""Public name -> module, imported at first use, so that the commands can parse options before torch loads."""

__all__ = [
    "Aggregation",
    "CoordinateMedian",
    "FederatedDataLoader",
    "FederatedDataset",
    "FitResult",
    "Krum",
    "ModelEvaluator",
    "MultiKrum",
    "Optims",
    "RoundResult",
    "RoundScheduler",
    "SecureAggregation",
    "TrainConfig",
    "TrimmedMean",
    "evaluate_model_on_worker",
    "federate",
    "federated_avg",
    "fit_model_on_worker",
]

__getattr__ = names_of(__name__, _HOMES)
