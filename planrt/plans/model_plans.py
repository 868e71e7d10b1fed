"""A model with its loss as two plans: `trace_model` records them, once as it trains and once as it is
evaluated."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch

from planrt.errors import TraceError
from planrt.plans.forms.torchscript import (
    argument_names,
    as_traceable,
    class_name,
    is_torchscript,
    script_call,
)
from planrt.plans.ir.graph import Graph
from planrt.plans.model_state import ModelState, StateMap, map_state
from planrt.plans.recording.lifting import StateRegistry, check_plain
from planrt.plans.recording.trace_warnings import told_once
from planrt.plans.recording.tracer import Recording, assemble, record
from planrt.types import TensorSpec

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ModelPlans:
    """A model with its loss, as two plans over the same state.

    Both take (data, target) and return (loss, prediction), with the batch dimension free. `names` joins the
    entries of their state to those of the model's `state_dict`.
    """

    training: Graph
    evaluation: Graph
    names: StateMap

    def __repr__(self) -> str:
        return f"<ModelPlans {self.training!r}, {self.evaluation!r}, {len(self.names.entries)} state entries>"

    @property
    def state(self) -> ModelState:
        """The model's state as ``load_state_dict`` takes it: its own tensors, detached. They share memory
        with the model, so clone what must not follow it."""
        return self.names.state


@told_once()
def trace_model(
    model: torch.nn.Module, loss_fn: Loss, data: torch.Tensor, target: torch.Tensor
) -> ModelPlans:
    """Record ``loss_fn(model(data), target)`` in training and in evaluation mode.

    Args:
        model: an nn.Module, or a module from `torch.jit.trace`, whose mode stays as it was traced.
        loss_fn: (prediction, target) -> a loss without dimensions; a function or an nn.Module.
        data: an example batch, dimension 0 the batch; at least two samples if the model has batch norm.
        target: its targets, dimension 0 the batch.

    Raises:
        TraceError: the model or loss cannot be recorded, or do not fit; the message names the line. Also a
            loss with parameters of its own, which nothing would train.
    """
    for name, example in (("data", data), ("target", target)):
        check_plain(example, f"the example {name}")
    call, modules = as_traceable(model, (data,))
    call_loss = loss_call(loss_fn)
    loss_modules = [loss_fn] if isinstance(loss_fn, torch.nn.Module) else []
    registry = StateRegistry(modules, also_undo=loss_modules, captured_train=False)
    for name, parameter in (one for module in loss_modules for one in module.named_parameters()):
        if parameter.requires_grad and registry.find(parameter) is None:
            raise TraceError(
                f"the loss has a parameter of its own, {name!r}, and only the model's are trained: make the loss a "
                "part of the model (a module whose forward returns what the loss needs), or freeze it with "
                "requires_grad_(False)"
            )

    def step(data: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, Any]:
        prediction = call(data)
        return _loss(call_loss, prediction, target), prediction

    free = [(0,) if example.dim() else () for example in (data, target)]
    recordings = {}
    for training in (True, False):
        with _mode([*modules, *loss_modules], training=training):
            recordings[training] = record(
                step, (data, target), registry=registry, free_dims=free, own_gradients=False
            )
    registry.warn_of_captures(class_name(model))
    for entry in registry.entries:
        # A moving average of weights, say: no optimizer changes it, forward does.
        if entry.written and entry.kind == "parameter" and not entry.requires_grad:
            entry.kind = "buffer"

    def plan(mode: str, recording: Recording) -> Graph:
        name = f"{class_name(model)} ({mode})"
        return assemble(recording, registry, name=name, input_names=("data", "target"))

    # Both recordings stand before either plan does: what only one of them captured is state of both.
    return ModelPlans(
        training=plan("training", recordings[True]),
        evaluation=plan("evaluation", recordings[False]),
        names=map_state(model, registry),
    )


def loss_call(loss_fn: Loss) -> Loss:
    """`loss_fn` as a function of (prediction, target), in this order.

    A loss with parameters named ``pred`` and ``target`` is called by name, in whatever order they stand;
    every other one by position. TorchScript functions are translated.

    Raises:
        TraceError: a loss that takes the target first under another name, and would be given the prediction
            there; one that cannot be called with two tensors; TorchScript that cannot be translated.
    """
    if isinstance(loss_fn, torch.nn.Module) and is_torchscript(loss_fn):
        raise TraceError("a loss that is a TorchScript module cannot be recorded: pass the nn.Module itself")
    called = script_call(loss_fn) if is_torchscript(loss_fn) else loss_fn
    names = argument_names(loss_fn) if is_torchscript(loss_fn) else _parameter_names(loss_fn)
    if {"pred", "target"} <= set(names):
        if is_torchscript(loss_fn):  # what was translated takes its arguments by position
            if names.index("target") > names.index("pred"):
                return called
            return lambda prediction, target: called(target, prediction)
        return lambda prediction, target: loss_fn(pred=prediction, target=target)  # type: ignore[call-arg]
    if names and names[0].lower() in _TARGETS:
        raise TraceError(
            f"the loss takes {names[0]!r} first, and is called with (prediction, target): name its parameters pred and "
            "target, and it is called by name, or change their order"
        )
    return called


_TARGETS: Final = frozenset({"target", "targets", "y_true", "label", "labels"})


def _parameter_names(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of C code
        return []


def _loss(loss_fn: Loss, prediction: Any, target: torch.Tensor) -> torch.Tensor:
    try:
        loss = loss_fn(prediction, target)
    except TraceError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TraceError(
            f"the model's output {_described(prediction)} does not fit the loss with the target "
            f"{_described(target)}: {reason}"
        ) from error
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        raise TraceError(f"the loss must be one number (a tensor without dimensions), not {_described(loss)}")
    return loss


def _described(value: Any) -> str:
    return str(TensorSpec.of(value)) if isinstance(value, torch.Tensor) else type(value).__name__


@contextmanager
def _mode(modules: Sequence[torch.nn.Module], *, training: bool) -> Iterator[None]:
    """`modules` in training or evaluation mode; each submodule gets its own mode back."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.train(training)
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode
