"""`Optims`: an optimizer per worker over the same parameters, for a model that visits the workers in turn."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterable
from typing import Any

import torch

from planrt.errors import OptionError
from planrt.workers.base import BaseWorker
from planrt.workers.optimizers import stay


class Optims:
    """One optimizer for each worker, all over the same parameters, each with a state of its own.

    What an optimizer remembers (momenta, step counts) stays with the worker it comes from, instead of
    travelling along with the model: ``opt = optims.get_optim(data.location.id)``.

    Args:
        workers: workers or their ids, each once.
        optim: the optimizer to make copies of: the copies have its class, parameters and options, and no
            state. A scheduler of its learning rate does not reach the copies; make one for each.

    Raises:
        OptionError: no workers, the same one twice, or `optim` is no optimizer.
    """

    def __init__(self, workers: Iterable[str | BaseWorker], optim: torch.optim.Optimizer) -> None:
        if not isinstance(optim, torch.optim.Optimizer):
            raise OptionError(
                f"Optims: optim must be an optimizer, such as optim.Adam(model.parameters()), not {optim!r}"
            )
        if isinstance(workers, str | BaseWorker):
            raise OptionError(f"Optims takes several workers: write Optims([{_id(workers)!r}], ...)")
        self.workers = [_id(worker) for worker in workers]
        if not self.workers:
            raise OptionError("Optims: no workers: give the ids of those that the model visits")
        twice = sorted({id for id in self.workers if self.workers.count(id) > 1})
        if twice:
            raise OptionError(f"Optims: {', '.join(twice)} given twice: name each worker once")
        self._optimizers = {id: _fresh(optim) for id in self.workers}
        for made in self._optimizers.values():
            stay(made)

    def get_optim(self, worker: str | BaseWorker) -> torch.optim.Optimizer:
        """Returns the optimizer for one worker, given its id or itself.

        Raises:
            OptionError: it is not among those given.
        """
        found = self._optimizers.get(_id(worker))
        if found is None:
            raise OptionError(
                f"no optimizer for {_id(worker)!r}: Optims was made for {', '.join(self.workers)}"
            )
        return found

    def count(self) -> int:
        """Returns the number of optimizers."""
        return len(self._optimizers)

    def __len__(self) -> int:
        return self.count()

    def __repr__(self) -> str:
        kind = type(next(iter(self._optimizers.values()))).__name__
        return f"<Optims: {kind} for {', '.join(self.workers)}>"


def _id(worker: Any) -> str:
    if isinstance(worker, BaseWorker):
        return worker.id
    if not isinstance(worker, str):
        raise OptionError(f"Optims takes workers or their ids, not {type(worker).__name__}")
    return worker


def _fresh(optim: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer like `optim` over the same parameters, without its state.

    Made by torch's own copying, because not every option that an optimizer keeps is one that its class takes
    (AdamW's, for instance).
    """
    made = copy.copy(optim)
    made.state = collections.defaultdict(dict)
    made.defaults = dict(optim.defaults)
    made.param_groups = [
        {key: list(value) if key == "params" else copy.deepcopy(value) for key, value in group.items()}
        for group in optim.param_groups
    ]
    for name, value in optim.__dict__.items():
        if name != "step":  # a scheduler's wrapper of it is bound to `optim`
            made.__dict__.setdefault(name, value)
    return made
