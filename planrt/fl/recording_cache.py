"""What was recorded of models, kept for models that are the same but for the values of their state.

The tutorial's loop makes a new model every round: the average of the last ones. It must not be recorded again
each time, and a model that was changed between rounds must be. So recordings are kept by the model's
fingerprint (`planrt.plans.fingerprint`), never by the model, and no entry keeps a model or its weights alive.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from planrt.errors import LocalError, TraceError, UnknownDatasetError
from planrt.plans.fingerprint import Fingerprint, fingerprint
from planrt.plans.ir.graph import Graph
from planrt.plans.model_plans import Loss, ModelPlans, trace_model
from planrt.plans.model_state import StateMap
from planrt.serde.dtypes import DTYPES
from planrt.workers.base import BaseWorker
from planrt.workers.pointers.tensor import PointerTensor
from planrt.workers.wire import messages as m

_KEPT: Final = 32


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Both plans and the map of their state, without the model's tensors."""

    training: Graph
    evaluation: Graph
    names: StateMap

    def of(self, model: nn.Module) -> ModelPlans:
        """The plans with the tensors of `model` as their state."""
        names = self.names.on(model)
        values = tuple(names.entries.values())
        return ModelPlans(
            self.training.with_state_values(values), self.evaluation.with_state_values(values), names
        )


_recorded: OrderedDict[Fingerprint, _Recorded] = OrderedDict()
_lock = threading.Lock()


def recorded(model: nn.Module, loss_fn: Loss, data: torch.Tensor, target: torch.Tensor) -> ModelPlans:
    """As `trace_model`, which it calls unless an equal model was recorded with an equal loss before.

    Raises:
        TraceError: see `trace_model`. LocalError: the model is on a worker.
    """
    check_here(model)
    key = fingerprint(model, loss_fn, data, target)
    with _lock:
        known = None if key is None else _recorded.get(key)
        if known is not None:
            _recorded.move_to_end(key)
    if known is not None:
        return known.of(model)
    plans = trace_model(model, loss_fn, data, target)
    if key is not None:
        kept = _Recorded(
            plans.training.with_state_values(None),
            plans.evaluation.with_state_values(None),
            plans.names.forgetful(),
        )
        with _lock:
            _recorded[key] = kept
            while len(_recorded) > _KEPT:
                _recorded.popitem(last=False)
    return plans


def check_here(model: nn.Module) -> None:
    """Raises LocalError for a model that was sent to a worker."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, PointerTensor):
            raise LocalError(
                f"{name!r} of the model is on worker {tensor.location.id!r}: get() the model before it is given to a "
                "TrainConfig"
            )


def dataset_of(worker: BaseWorker, key: str) -> m.DatasetInfo:
    """Returns the description that `worker` gave of its data set `key`.

    Raises:
        UnknownDatasetError: it has none under that key.
    """
    info = worker.datasets.get(key)
    if info is None:
        keys = ", ".join(sorted(worker.datasets)) or "none"
        raise UnknownDatasetError(
            f"no data set under the key {key!r}; it has: {keys}",
            worker_id=worker.id,
            kind="UnknownDatasetError",
        )
    return info


def example_batch(info: m.DatasetInfo, size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a batch of `size` zeros with the shapes and dtypes a worker announces: enough to trace on."""
    data, target = (
        torch.zeros([size if extent == -1 else extent for extent in shape], dtype=DTYPES[dtype])
        for dtype, shape in (info.data, info.target)
    )
    return data, target


@contextmanager
def casting_hint(model: nn.Module | None, data: torch.Tensor, key: str) -> Iterator[None]:
    """Adds to a failure on floating-point data of another dtype than the model's how to cast one of them."""
    try:
        yield
    except TraceError as error:
        floats = {
            one.dtype for one in (model.parameters() if model is not None else ()) if one.is_floating_point()
        }
        if not data.is_floating_point() or not floats or data.dtype in floats:
            raise
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in floats))
        there = str(data.dtype).removeprefix("torch.")
        raise TraceError(
            f"{error}: data set {key!r} is {there} and the model {names}: cast one of them, the data where it is held "
            f"(data.to(torch.{names.split(', ')[0]})) or the model (model.{_CASTS.get(data.dtype, 'to')}())"
        ) from error


_CASTS = {torch.float64: "double", torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16"}
