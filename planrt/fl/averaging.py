"""Federated averaging: a streaming mean over models, in a fixed order.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017
(arXiv:1602.05629), section 2, algorithm 1: the server's step. In round t each of K workers trains the state
w(t) on its n_k samples, which makes w_k(t+1) of it; the server then sets

    w(t+1)  =  sum over k of  (n_k / n) w_k(t+1),    where  n  =  sum over k of  n_k

That is the mean `weighted` by samples. Unweighted, every model counts the same: n_k = 1, n = K.

The sum is kept, and divided once at the end, so one state is held for any number of models:

    total = n_1 w_1;   total += n_k w_k  for k = 2, 3, ...;   w = total / n

Additions of floats do not associate: another order would have other last bits. So whoever adds does so in the
order of the workers' ids, and equal runs have equal bits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

from planrt.errors import OptionError
from planrt.plans.recording.lifting import attribute_tensors
from planrt.types import TensorSpec

State = Mapping[str, torch.Tensor]
Model = TypeVar("Model", bound=nn.Module | dict[str, torch.Tensor])
A = TypeVar("A")
"""What an `Aggregation` keeps while the states of a round come in."""


class Aggregation(Protocol[A]):
    """A way to make one state out of those that the workers of a round return:
    ``RoundScheduler(aggregation=...)``.

    It is three functions over plain state, as the aggregators of FedJAX are: of itself it keeps nothing from
    call to call, so one object serves any number of rounds. The coordinate-wise median, which one worker
    cannot drag away however wrong its state is (Yin et al., "Byzantine-Robust Distributed Learning: Towards
    Optimal Statistical Rates", ICML 2018, arXiv:1803.01498, algorithm 1, option I)::

        class CoordinateMedian:
            def init(self):
                return []

            def add(self, states, entries, weight):
                return [*states, entries]

            def result(self, states):
                return {
                    name: torch.stack([one[name] for one in states]).median(dim=0).values
                    for name in states[0]
                }

        scheduler = RoundScheduler(workers, config, dataset_key="d", seed=1, aggregation=CoordinateMedian())

    `add` may run in a thread of its own, never two at a time.

    One that keeps something from round to round, such as a momentum, has two methods more: ``state_dict()``, which
    returns it (tensors and plain values by name), and ``load_state_dict(state)``. Checkpoints of a run have it then.
    """

    def init(self) -> A:
        """Returns the aggregate of no states: called once a round, before the first reply."""
        ...

    def add(self, aggregate: A, entries: dict[str, torch.Tensor], weight: float, /) -> A:
        """Returns `aggregate` with the state of one more worker, which it may change and return itself.

        Called for each worker that trained on something, in the order of their ids. `entries` are the entries
        that training can change, by name; they are the aggregation's own, to keep or to overwrite. `weight`
        is the number of samples in a weighted round, else 1.
        """
        ...

    def result(self, aggregate: A, /) -> Mapping[str, torch.Tensor]:
        """Returns the new state: each name that `add` was given, in the same shape and dtype.

        Called once, after the last `add`; not at all where no worker trained on anything.
        """
        ...


class StreamingAverage:
    """The mean of states that come one after the other; holds one state, whatever their number.

    Floating-point (and complex) entries are averaged; half precision accumulates in float32. Integer and bool
    entries, such as batch norm's ``num_batches_tracked``, are the first state's. `count` states were added.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._weight = 0.0
        self.count = 0

    def add(self, state: State, *, weight: float = 1.0, own: bool = False) -> None:
        """Adds `state`, counting `weight` times. With `own`, its tensors may be overwritten.

        Raises:
            OptionError: a weight that is not positive and finite, or other names or shapes than before.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise OptionError(f"a weight in an average must be a positive number, not {weight}")
        if not self.count:
            self._dtypes = {name: value.dtype for name, value in state.items()}
            self._sums = {name: _first_term(value.detach(), weight, own) for name, value in state.items()}
        else:
            self._check(state)
            for name, total in self._sums.items():
                if _averages(total):
                    total.add_(state[name].detach(), alpha=weight)
        self._weight += weight
        self.count += 1

    def result(self) -> dict[str, torch.Tensor]:
        """Returns the mean; the accumulator is used up.

        Raises:
            OptionError: nothing was added.
        """
        if not self.count:
            raise OptionError("nothing to average: no model was added")
        sums, self._sums = self._sums, {}
        for total in sums.values():
            if _averages(total):
                total.div_(self._weight)
        return {name: total.to(self._dtypes[name]) for name, total in sums.items()}

    def _check(self, state: State) -> None:
        if state.keys() != self._sums.keys():
            odd = sorted(state.keys() ^ self._sums.keys())
            raise OptionError(f"models to average must have the same entries; these differ: {', '.join(odd)}")
        for name, total in self._sums.items():
            if state[name].shape != total.shape or state[name].dtype != self._dtypes[name]:
                raise OptionError(
                    f"models to average must have the same shapes and dtypes; {name} is {state[name].dtype} "
                    f"{tuple(state[name].shape)} in one and {self._dtypes[name]} {tuple(total.shape)} in another"
                )


class FederatedAveraging:
    """The aggregation that rounds use by default: the mean of the states, `StreamingAverage`, in the memory
    of one."""

    def init(self) -> StreamingAverage:
        """Returns an average of nothing."""
        return StreamingAverage()

    def add(self, average: StreamingAverage, entries: State, weight: float) -> StreamingAverage:
        """Adds `entries` to `average`, and returns it; the first entries become the accumulator."""
        average.add(entries, weight=weight, own=True)
        return average

    def result(self, average: StreamingAverage) -> dict[str, torch.Tensor]:
        """Returns the mean; `average` is used up."""
        return average.result()


def check_aggregation(aggregation: Any) -> None:
    """Raises OptionError unless `aggregation` has the methods of an `Aggregation`."""
    if isinstance(aggregation, type):
        raise OptionError(f"aggregation is an object, not a class: write {aggregation.__name__}()")
    missing = [name for name in ("init", "add", "result") if not callable(getattr(aggregation, name, None))]
    if missing:
        raise OptionError(
            f"aggregation must have the methods init, add and result (see planrt.fl.Aggregation), and a "
            f"{type(aggregation).__name__} lacks {', '.join(missing)}"
        )
    for name in ("init", "add", "result"):
        if inspect.iscoroutinefunction(getattr(aggregation, name)):
            raise OptionError(f"{name} of an aggregation is a plain method: write def, not async def")


def check_aggregated(found: Any, like: State) -> dict[str, torch.Tensor]:
    """Returns the result of an aggregation, checked against entries `like` those that it was given.

    Raises:
        OptionError: it is no mapping of tensors, or has other names, shapes or dtypes.
    """
    if not isinstance(found, Mapping):
        raise OptionError(f"result of an aggregation returns tensors by name, not a {type(found).__name__}")
    if found.keys() != like.keys():
        odd = ", ".join(sorted(map(str, found.keys() ^ like.keys())))
        raise OptionError(
            f"result of an aggregation must have the entries that add was given; these differ: {odd}"
        )
    for name, wanted in like.items():
        value = found[name]
        if not isinstance(value, torch.Tensor) or value.shape != wanted.shape or value.dtype != wanted.dtype:
            what = TensorSpec.of(value) if isinstance(value, torch.Tensor) else type(value).__name__
            raise OptionError(
                f"result of an aggregation: {name!r} must be {TensorSpec.of(wanted)}, as it was given, not {what}"
            )
    return {name: value.detach() for name, value in found.items()}


def apart(entries: State) -> dict[str, torch.Tensor]:
    """Returns `entries` so that `torch.save` takes them: tensors of one message share its memory, which it refuses
    where they have several dtypes. All but those of the dtype with most bytes are copied."""
    sizes: dict[torch.dtype, int] = {}
    for value in entries.values():
        sizes[value.dtype] = sizes.get(value.dtype, 0) + value.nbytes
    most = max(sizes, key=lambda dtype: sizes[dtype], default=None)
    return {name: value if value.dtype == most else value.clone() for name, value in entries.items()}


def _averages(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _first_term(value: torch.Tensor, weight: float, own: bool) -> torch.Tensor:
    if not _averages(value):
        return value if own else value.clone()
    wide = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    term = wide if own or wide is not value else wide.clone()
    return term if weight == 1.0 else term.mul_(weight)


def federated_avg(
    models: Mapping[Any, Model] | Sequence[Model],
    weights: Mapping[Any, float] | Sequence[float] | None = None,
    *,
    copy: bool = False,
) -> Model:
    """Averages `models` (worker id -> model), plainly, or weighted by `weights` (worker id -> samples).

    For example, after each worker trained a copy of `model`::

        model = federated_avg({"alice": trained_by_alice, "bob": trained_by_bob})
        model = federated_avg({"alice": one, "bob": other}, weights={"alice": 600, "bob": 200})

    The formula, and the paper that it is from, are in the docstring of `planrt.fl.averaging`.

    Models are nn.Modules, traced modules or state dicts. Of modules, the first in the mapping is changed to
    be the average, and returned, as in PySyft 0.2: its parameters stay the same objects, so an optimizer of
    it goes on. With `copy` it is a new model, and the given ones stay as they are. Of state dicts it is
    always a new dict.

    Models are added in the order of their ids, whatever order the mapping has, so the result does not depend
    on who answered first. A sequence is averaged in its own order; its weights then are a sequence, too.

    Raises:
        OptionError: no models, models that do not match, or a weight missing or not positive.
    """
    if isinstance(models, nn.Module | torch.Tensor) or not isinstance(models, Mapping | Sequence):
        raise OptionError(
            f"federated_avg takes models by worker id, {{worker.id: model}}, not a {type(models).__name__}"
        )
    by_id: dict[Any, Model] = dict(models) if isinstance(models, Mapping) else dict(enumerate(models))
    if weights is not None and not isinstance(weights, Mapping):
        weights = dict(enumerate(weights))
    if not by_id:
        raise OptionError("federated_avg needs at least one model")
    for id, one in by_id.items():
        if not isinstance(one, nn.Module | Mapping):
            raise OptionError(
                f"federated_avg averages models or their state dicts; {id!r} is a {type(one).__name__}"
            )
    if weights is not None and (missing := by_id.keys() - weights.keys()):
        raise OptionError(f"no weight for {', '.join(sorted(map(str, missing)))}: give one per model")
    average = StreamingAverage()
    for id in sorted(by_id, key=str) if isinstance(models, Mapping) else by_id:
        average.add(state_of(by_id[id]), weight=1.0 if weights is None else _number(weights[id]))
    state = average.result()
    first: nn.Module | State = next(iter(by_id.values()))
    if not isinstance(first, nn.Module):
        return cast(Model, state)
    if copy:
        return with_state(first, state)  # type: ignore[return-value]
    first.load_state_dict({**first.state_dict(), **state})
    return first  # type: ignore[return-value]


def _number(weight: Any) -> float:
    try:
        return float(weight)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"a weight in an average must be a positive number, not {weight!r}") from error


def state_of(model: nn.Module | State) -> dict[str, torch.Tensor]:
    """Returns the parameters and persistent buffers of `model` by name, detached, sharing memory with it."""
    entries = model.state_dict() if isinstance(model, nn.Module) else model
    return {name: value.detach() for name, value in entries.items() if isinstance(value, torch.Tensor)}


def with_state(model: nn.Module, state: State) -> nn.Module:
    """Returns a copy of `model` that holds `state`; `model` stays as it is."""
    result = copied(model)
    result.load_state_dict({**model.state_dict(), **state})
    return result


def copied(model: nn.Module) -> nn.Module:
    """Returns a deep copy of `model`, also where it holds a weight that its forward computes (`weight_norm`,
    `prune`).

    Such a tensor has a gradient history, which torch refuses to copy; its next forward computes it anew.
    """
    computed = [tensor for _, tensor in attribute_tensors(model) if tensor.grad_fn is not None]
    return deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})
