"""Training and evaluating a model from its plans: what a worker does with one request. No I/O in here.

`train` and `evaluate` run the plans that `trace_model` (`planrt.plans.model_plans`) made of a model and its
loss over batches, with the same numbers, bit for bit, as the plain PyTorch loop::

    plans = trace_model(model, F.cross_entropy, *example_batch)
    state = [tensor.clone() for tensor in plans.training.state_values]
    result = train(plans.training, state, batches, optimizer="SGD", optimizer_args={"lr": 0.1}, seed=1)
    result.loss, result.state  # the mean loss, and the entries of the state that training can change

The order within one batch is that of the plain loop, and for the same reasons:

    zero_grad -> run the plan -> loss.backward() -> optimizer.step()

The plan runs on tensors of this call that require gradients (`own_gradients=False` when it was recorded), so
autograd goes over it as over any code. `backward` runs on it from outside, and not as an op in the plan,
because the worker chooses the optimizer by name: one plan serves every optimizer, LBFGS with its several
closures a step included. The loss is kept as a tensor until the end: reading each one would wait for the
device once a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch

from planrt.cards import card
from planrt.errors import ExecutionError, OptionError, PlanArgumentError, PlanError
from planrt.plans.ir.graph import Graph
from planrt.plans.model_plans import Loss, ModelPlans, loss_call, trace_model
from planrt.plans.optimizer_options import OPTIMIZERS, check_optimizer
from planrt.plans.running import progress
from planrt.plans.running.interpreter import check_inputs, check_state, drive, program
from planrt.seeding import seeded
from planrt.types import Ref, TensorSpec

__all__ = [
    "OPTIMIZERS",
    "Batch",
    "EvaluationResult",
    "Loss",
    "ModelPlans",
    "TrainResult",
    "check_classes",
    "check_optimizer",
    "evaluate",
    "loss_call",
    "trace_model",
    "train",
    "warm_up",
]

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of one call of `train`.

    Attributes:
        loss: mean over the samples of the loss of their batch, before that batch's step; nan without samples.
        samples: how many samples were seen.
        batches: how many batches.
        state: the state entries that training can change (trainable parameters and buffers), in plan order.
        changed: their positions in the plan's state.
        optimizer_state: what `train` takes as `optimizer_state` to go on from here; None without batches.
    """

    loss: float
    samples: int
    batches: int
    state: list[torch.Tensor]
    changed: tuple[int, ...]
    optimizer_state: dict[Any, Any] | None


@dataclass(frozen=True, slots=True)
class EvaluationResult(Mapping[str, Any]):
    """The result of one call of `evaluate`, with names as below and as a mapping with those of the 0.2 era.

    As a mapping it has ``loss``; where classes are counted also ``nr_correct_predictions`` and
    ``nr_predictions``; with histograms ``histogram_predictions`` and ``histogram_target``, as arrays.

    Attributes:
        loss: the mean per sample (nan without samples).
        samples: how many.
        correct: how many predictions were right; None where no classes are counted.
        histogram, target_histogram: how often each class was predicted, and was the target.
        hidden: keys that the mapping leaves out, since they were not asked for.
    """

    loss: float
    samples: int
    correct: int | None = None
    histogram: list[int] | None = None
    target_histogram: list[int] | None = None
    hidden: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    @property
    def accuracy(self) -> float | None:
        """The share of predictions that were right, from 0 to 1; None where no classes are counted."""
        return None if self.correct is None or not self.samples else self.correct / self.samples

    def _repr_html_(self) -> str:
        accuracy = (
            None if self.accuracy is None else f"{self.accuracy:.2%} ({self.correct:,} of {self.samples:,})"
        )
        figures = (("predicted", self.histogram), ("targets", self.target_histogram))
        rows = [(name, *counts) for name, counts in figures if counts is not None]
        facts = [("loss", f"{self.loss:.4f}"), ("samples", f"{self.samples:,}"), ("accuracy", accuracy)]
        columns = ("class", *range(max((len(row) - 1 for row in rows), default=0)))
        return card("EvaluationResult", facts, columns=[str(name) for name in columns], rows=rows)

    def _entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = {"loss": self.loss}
        if self.correct is not None:
            entries |= {"nr_correct_predictions": self.correct, "nr_predictions": self.samples}
        if self.histogram is not None:
            entries["histogram_predictions"] = np.asarray(self.histogram)
        if self.target_histogram is not None:
            entries["histogram_target"] = np.asarray(self.target_histogram)
        return {key: value for key, value in entries.items() if key not in self.hidden}

    def __getitem__(self, key: str) -> Any:
        return self._entries()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._entries())


def train(
    plan: Graph,
    state: Sequence[torch.Tensor],
    batches: Iterable[Batch],
    *,
    optimizer: str,
    optimizer_args: Mapping[str, Any] | None = None,
    optimizer_state: dict[Any, Any] | None = None,
    device: torch.device | str = "cpu",
    seed: int,
    deadline: float = math.inf,
) -> TrainResult:
    """Train `state` with one optimizer step per batch.

    The tensors in `state` are owned by this call: those that training can change are changed in place where
    they are on `device` (so they must be writable), and given back. Batches may be on any device.

    Args:
        plan: takes (data, target), returns (loss, prediction), as `trace_model` makes it.
        state: one tensor per entry of ``plan.state``, in its order.
        batches: pairs of (data, target); dimension 0 counts samples.
        optimizer: a name in `OPTIMIZERS`.
        optimizer_args: its keyword arguments: numbers, bools, None, short strings, short tuples of numbers.
        optimizer_state: `TrainResult.optimizer_state` of an earlier call, which this one takes over; without
            it the optimizer starts fresh.
        device: where to compute.
        seed: seeds torch's generators during the call (dropout); they are put back afterwards.
        deadline: when it must be over, on `time.monotonic`'s clock (seconds).

    Raises:
        OptionError: unknown optimizer, or arguments it does not take.
        PlanArgumentError: state or a batch that does not fit the plan.
        PlanError: a plan that does not return a loss to train on.
        ExecutionError: an op failed.
    """
    changed = tuple(index for index, entry in enumerate(plan.state) if entry.can_change)
    checked_args = check_optimizer(optimizer, optimizer_args)
    device = torch.device(device)
    _check_loss_plan(plan)
    check_state(plan, state)
    losses: list[torch.Tensor] = []
    sizes: list[int] = []
    with seeded(seed, device), torch.enable_grad():  # batches are drawn in here too: data sets may be random
        values = [  # `data`: what shares memory with another tensor does not share its count of changes
            tensor.data.to(device).requires_grad_(entry.trainable)
            for entry, tensor in zip(plan.state, state, strict=True)
        ]
        stepper = optimizer_of(
            optimizer, checked_args, [v for v in values if v.requires_grad], optimizer_state
        )
        compiled = program(plan, device)
        remaining = iter(batches)  # from here on failures can depend on data
        first = next(remaining, None)
        if first is None:
            return TrainResult(math.nan, 0, 0, [state[index] for index in changed], changed, optimizer_state)
        for batch in chain([first], remaining):
            check_inputs(plan, batch)
            on_device = _own(batch, device)

            def closure(inputs: list[torch.Tensor] = on_device) -> torch.Tensor:
                stepper.zero_grad()
                loss: torch.Tensor = drive(compiled.run(inputs, values, deadline=deadline))[0]
                if loss.dim() != 0 or not loss.requires_grad:
                    raise PlanError(f"plan {plan.name!r} does not give a loss that depends on its parameters")
                progress.began("backward")
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            with _in_batch(len(sizes), batch):
                losses.append(_stepped(stepper, closure).detach())
            sizes.append(_sample_count(batch))
    kept: dict[Any, Any] = stepper.state_dict()["state"]
    return TrainResult(
        loss=_weighted_mean(losses, sizes),
        samples=sum(sizes),
        batches=len(sizes),
        state=[values[index].detach() for index in changed],
        changed=changed,
        optimizer_state=kept,
    )


def evaluate(
    plan: Graph,
    state: Sequence[torch.Tensor],
    batches: Iterable[Batch],
    *,
    bins: int = 0,
    device: torch.device | str = "cpu",
    deadline: float = math.inf,
) -> EvaluationResult:
    """Computes the loss of `state` over `batches`, and with `bins` > 0 counts what was predicted for so many
    classes.

    The predicted class is the argmax over dimension 1 of a prediction [samples, classes]; it is counted as
    correct where it equals the integer target [samples]. Classes outside ``range(bins)`` are in no histogram.

    Raises:
        OptionError: negative `bins`.
        PlanArgumentError: state or a batch that does not fit, or no classes to count.
        ExecutionError: an op failed.
    """
    if bins < 0:
        raise OptionError(f"bins must be at least 0, not {bins}")
    device = torch.device(device)
    _check_loss_plan(plan)
    check_state(plan, state)
    compiled = program(plan, device)
    values = [tensor.detach().to(device) for tensor in state]
    # A buffer that the evaluation changes (batch norm traced in training mode) must not change the caller's.
    written = [entry.kind == "buffer" for entry in plan.state]
    values = [value.clone() if copy else value for value, copy in zip(values, written, strict=True)]
    losses: list[torch.Tensor] = []
    sizes: list[int] = []
    counts = torch.zeros(2 * bins + 1, dtype=torch.int64, device=device)  # predicted, targets, correct
    with torch.no_grad():
        for batch in batches:
            check_inputs(plan, batch)
            inputs = _own(batch, device)
            with _in_batch(len(sizes), batch):
                loss, prediction = drive(compiled.run(inputs, values, deadline=deadline))
            losses.append(loss.detach())
            sizes.append(_sample_count(batch))
            if bins:
                counts += _class_counts(prediction, inputs[1], bins)
    result = EvaluationResult(_weighted_mean(losses, sizes), sum(sizes))
    if not bins:
        return result
    figures = counts.tolist()
    return EvaluationResult(
        result.loss, result.samples, figures[-1], figures[:bins], figures[bins : 2 * bins]
    )


def check_classes(prediction: TensorSpec | None, target: TensorSpec) -> None:
    """Raises unless classes can be counted in such tensors; None is no tensor.

    Only where it is plain what they are: one score per class and sample. What one output says about two
    classes depends on the loss (a logit, a probability?), and classes per pixel are no samples.

    Raises:
        PlanArgumentError: they cannot; says why, and what to write.
    """

    def refuse(why: str) -> PlanArgumentError:
        return PlanArgumentError(
            f"no classes to count in a target {target} for a prediction {prediction or 'that is no tensor'}: "
            f"{why}; pass bins=0 (nr_bins=0) for the loss alone"
        )

    if prediction is None or prediction.dtype.is_complex or not prediction.shape:
        raise refuse("classes are counted in [samples, classes]")
    if len(prediction.shape) == 1 or prediction.shape[1] == 1:
        raise refuse("one output per sample can be a logit or a probability; classes need an output each")
    if len(prediction.shape) > 2:
        raise refuse("these are several predictions for each sample")
    if target.dtype.is_floating_point or target.dtype.is_complex or target.shape != prediction.shape[:1]:
        raise refuse("targets are class numbers, one for each sample")


def _class_counts(prediction: Any, target: torch.Tensor, bins: int) -> torch.Tensor:
    """Predicted classes, target classes and right predictions, of one batch."""
    known = TensorSpec.of(prediction) if isinstance(prediction, torch.Tensor) else None
    check_classes(known, TensorSpec.of(target))
    predicted = prediction.argmax(dim=1)
    correct = (predicted == target).sum().reshape(1)
    return torch.cat([_histogram(predicted, bins), _histogram(target, bins), correct])


def _histogram(classes: torch.Tensor, bins: int) -> torch.Tensor:
    inside = classes.reshape(-1).long()
    inside = torch.where((inside >= 0) & (inside < bins), inside, bins)
    return torch.bincount(inside, minlength=bins + 1)[:bins]


def _check_loss_plan(plan: Graph) -> None:
    outputs = plan.outputs
    if len(plan.inputs) != 2 or not (
        isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[0], Ref)
    ):
        raise PlanArgumentError(
            f"plan {plan.name!r} is not one of a model with its loss: it must take (data, target) and give "
            "(loss, prediction), as trace_model records it"
        )


def _own(batch: Batch, device: torch.device) -> list[torch.Tensor]:
    """The batch on `device`, copied: a plan with in-place ops must not change the data owner's tensors."""
    return [tensor.detach().to(device, non_blocking=True, copy=True) for tensor in batch]


@contextmanager
def _in_batch(number: int, batch: Batch) -> Iterator[None]:
    """An op that fails in here, or its backward pass, says in which batch (from 0), and of how many
    samples."""
    try:
        yield
    except ExecutionError as error:
        count = _sample_count(batch)
        said = f"{error} (in batch {number}, of {count} sample{'s' if count != 1 else ''})"
        raise ExecutionError(said, op=error.op, index=error.index, line=error.line) from error.__cause__


def _sample_count(batch: Batch) -> int:
    return batch[0].shape[0] if batch[0].dim() else 1


def _weighted_mean(losses: list[torch.Tensor], sizes: list[int]) -> float:
    """Mean of `losses` weighted by `sizes`; the one point where a round waits for the device."""
    samples = sum(sizes)
    if not samples:
        return math.nan
    numbers = torch.stack(losses).tolist()
    return float(sum(loss * size for loss, size in zip(numbers, sizes, strict=True)) / samples)


# Optimizers


def warm_up() -> None:
    """Makes torch load what it puts off until the first optimizer is made: more than a second of imports."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


_UNFIT = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What torch's optimizers raise for options, or a state to go on from, that are not what they expect."""


def optimizer_of(
    name: str, args: dict[str, Any], parameters: list[torch.Tensor], kept: dict[Any, Any] | None
) -> torch.optim.Optimizer:
    """Returns the optimizer of that name in `OPTIMIZERS`, with the state that was `kept` of an earlier one.

    Raises:
        PlanError: there is nothing to train. OptionError: it does not take these arguments.
    """
    if not parameters:
        raise PlanError("the plan has no trainable parameters: nothing for an optimizer to do")
    factory: Callable[..., torch.optim.Optimizer] = OPTIMIZERS[name]
    try:
        made = factory(parameters, **args)
        if kept is not None:
            made.load_state_dict({"state": kept, "param_groups": made.state_dict()["param_groups"]})
    except _UNFIT as error:
        raise OptionError(f"optimizer {name} does not accept these options: {_first_line(error)}") from error
    return made


def _stepped(stepper: torch.optim.Optimizer, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The loss of ``stepper.step(closure)``; every optimizer calls the closure first, LBFGS several times."""
    failed: list[Exception] = []

    def guarded() -> torch.Tensor:
        try:
            return closure()
        except Exception as error:
            failed.append(error)
            raise

    try:
        loss: torch.Tensor = stepper.step(guarded)  # type: ignore[arg-type,assignment]
    except _UNFIT as error:
        if failed:
            raise  # the plan or its backward, not the optimizer
        name = type(stepper).__name__
        raise OptionError(f"optimizer {name} cannot train this plan: {_first_line(error)}") from error
    return loss


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
