"""What a run goes on from: everything of a scheduler that is in a checkpoint, and how it is put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from planrt.errors import RunFolderError
from planrt.fl.averaging import apart
from planrt.fl.exchange import Exchange
from planrt.fl.runs.run_record import plain_facts
from planrt.plans.model_plans import ModelPlans
from planrt.plans.model_state import ModelState
from planrt.serde.checkpoints import Checkpoint
from planrt.workers.wire import messages as m

SETTINGS: Final = frozenset(
    {"hold", "weighted", "min_workers", "round_timeout", "max_update_norm", "checkpoint_every"}
)
"""Options of a scheduler that are in a journal, beside what makes the run what it is."""

CHANGEABLE: Final = frozenset({"hold", "min_workers", "round_timeout", "checkpoint_every"})
"""Those that may be another when a run goes on: they change no bit of a round that all workers answer."""

_STATE, _SERVER = "state/", "server/"


def data_of(infos: Mapping[str, m.DatasetInfo]) -> dict[str, str]:
    """Returns what is remembered of the workers' data sets: id -> items and specs."""
    return {
        id: f"{info.length} items of {_spec(info.data)} and {_spec(info.target)}"
        for id, info in infos.items()
    }


def _spec(spec: tuple[str, list[int]]) -> str:
    name, sizes = spec
    return f"{name}{sizes[1:]}"


def named(thing: object) -> str:
    """Returns what an object of the caller's is remembered as: what it prints as, or its class."""
    text = repr(thing)
    return type(thing).__qualname__ if " at 0x" in text else text[:200]


def captured(
    plans: ModelPlans, state: Mapping[str, torch.Tensor], exchange: Exchange
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns what a checkpoint has of a run: plain facts, and tensors.

    Raises:
        OptionError: the exchange keeps something that cannot be written.
    """
    tensors = {_STATE + name: value for name, value in plans.names.by_entry(state).items()}
    facts: dict[str, Any] = {}
    if callable(of := getattr(exchange, "state_dict", None)):
        facts["server"], kept = plain_facts(exchange, of())
        tensors |= {_SERVER + name: value for name, value in kept.items()}
    return facts, tensors


def put_back(checkpoint: Checkpoint, plans: ModelPlans, exchange: Exchange) -> ModelState:
    """Returns the state in `checkpoint`, and gives `exchange` what it kept.

    Raises:
        RunFolderError: it is not of this model.
    """
    entries = _under(_STATE, checkpoint)
    wanted = plans.names.entries
    if entries.keys() != wanted.keys():
        odd = ", ".join(sorted(entries.keys() ^ wanted.keys())[:5])
        raise RunFolderError(f"the checkpoint is of another model: these entries differ: {odd}")
    for name, value in entries.items():
        if value.shape != wanted[name].shape or value.dtype != wanted[name].dtype:
            raise RunFolderError(f"the checkpoint is of another model: {name!r} has another shape or dtype")
    if "server" in checkpoint.facts:
        load = getattr(exchange, "load_state_dict", None)
        if not callable(load):
            raise RunFolderError(
                "the run kept the state of an aggregation, and this one takes none: give it again"
            )
        load({**checkpoint.facts["server"], **_under(_SERVER, checkpoint)})
    return plans.names.named(apart(entries))


def _under(prefix: str, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in checkpoint.tensors.items()
        if name.startswith(prefix)
    }
