"""`@func2plan()`: a Python function that becomes a plan, by its example shapes or by a call of `build`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from planrt.errors import PlanArgumentError, PlanError
from planrt.plans.graph import Graph
from planrt.plans.interpreter import execute
from planrt.plans.recorder import SizesFixedError
from planrt.plans.tracer import trace
from planrt.types import FREE, Nested

_EXAMPLE_SIZE = 2  # what a free size is while recording; the tracer doubles it


class Plan:
    """A function with its plan, once it is built. Call it like the function; `plan` is what travels.

    Attributes:
        function: the function as written.
        name: its name.
        plan: the recorded plan; PlanError until it is built.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name: str = getattr(function, "__name__", type(function).__name__)
        self._names = _argument_names(function)
        self._graph: Graph | None = None

    @property
    def is_built(self) -> bool:
        """Whether the function has been recorded."""
        return self._graph is not None

    @property
    def graph(self) -> Graph:
        """The recorded plan.

        Raises:
            PlanError: not built yet.
        """
        if self._graph is None:
            raise PlanError(
                f"plan {self.name!r} is not built: call {self.name}.build(...) with example tensors"
            )
        return self._graph

    @property
    def hash(self) -> str:
        """The plan's identity; see `Graph.hash`."""
        return self.graph.hash

    @property
    def code(self) -> str:
        """The recorded ops, one per line."""
        return self.graph.code

    @property
    def torchscript(self) -> torch.nn.Module:
        """The plan as TorchScript; see `planrt.plans.torchscript.to_torchscript`."""
        return self.graph.torchscript

    def build(self, *examples: torch.Tensor, free_dims: Sequence[Sequence[int]] | None = None) -> Plan:
        """Record the function on example tensors, and return self. Building again replaces the plan.

        Args:
            examples: one tensor per argument.
            free_dims: per argument, the dimensions that may differ at run time. By default dimension 0 of
                every argument is free if the function takes that, else all sizes are those of the examples.

        Raises:
            PlanArgumentError: wrong number of examples, or something that is no tensor.
            TraceError: the function cannot be recorded.
        """
        self._check_count(len(examples), "example tensors")
        for name, example in zip(self._names or map(str, range(len(examples))), examples, strict=False):
            if not isinstance(example, torch.Tensor):
                raise PlanArgumentError(
                    f"{self.name}.build: argument {name} must be a tensor, not {type(example).__name__}"
                )
        if free_dims is not None:
            self._graph = self._trace(examples, free_dims)
            return self
        try:
            self._graph = self._trace(examples, [(0,) if example.dim() else () for example in examples])
        except SizesFixedError:
            self._graph = self._trace(examples, [()] * len(examples))
        return self

    def build_from_shapes(self, shapes: Sequence[Sequence[int]]) -> Plan:
        """Record the function on float32 tensors of these shapes, -1 for a size that stays free."""
        self._check_count(len(shapes), "shapes in args_shape")
        for name, shape in zip(self._names or map(str, range(len(shapes))), shapes, strict=False):
            if any(isinstance(size, bool) or not isinstance(size, int) or size < FREE for size in shape):
                raise PlanArgumentError(
                    f"{self.name}: {tuple(shape)} is not a shape for argument {name}: sizes are whole "
                    "numbers from 0, or -1 for any size"
                )
        examples = [
            torch.zeros([_EXAMPLE_SIZE if size == FREE else size for size in shape]) for shape in shapes
        ]
        free = [[dim for dim, size in enumerate(shape) if size == FREE] for shape in shapes]
        self._graph = self._trace(examples, free)
        return self

    def __call__(self, *inputs: torch.Tensor) -> Nested:
        """Run the plan here, on its own state.

        Raises:
            PlanError: not built. PlanArgumentError: arguments that do not fit. ExecutionError: an op failed.
        """
        return execute(self.graph, inputs)

    def _trace(self, examples: Sequence[torch.Tensor], free_dims: Sequence[Sequence[int]]) -> Graph:
        modules = [self.function] if isinstance(self.function, torch.nn.Module) else []
        return trace(
            self.function,
            examples,
            modules=modules,
            free_dims=free_dims,
            name=self.name,
            input_names=self._names or (),
            doc=inspect.getdoc(self.function) or "",
        )

    def _check_count(self, given: int, what: str) -> None:
        if self._names is not None and given != len(self._names):
            raise PlanArgumentError(
                f"{self.name} takes {len(self._names)} arguments ({', '.join(self._names)}), "
                f"got {given} {what}"
            )

    def __str__(self) -> str:
        return str(self._graph) if self._graph is not None else repr(self)

    def __repr__(self) -> str:
        if self._graph is None:
            return f"<Plan {self.name} not built: call {self.name}.build(...)>"
        return repr(self._graph)


def func2plan(*, args_shape: Sequence[Sequence[int]] | None = None) -> Callable[[Callable[..., Any]], Plan]:
    """Decorator that turns a function of tensors into a `Plan`.

    With `args_shape`, one shape per argument (-1 for a size that stays free), it is built at once, on float32
    tensors; without, by the first call of ``build``.

    Raises:
        PlanArgumentError: wrong number of shapes, or an impossible one.
        TraceError: the function cannot be recorded.
    """

    def decorate(function: Callable[..., Any]) -> Plan:
        made = Plan(function)
        return made if args_shape is None else made.build_from_shapes(args_shape)

    return decorate


def _argument_names(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """Names of the positional arguments without defaults; None where the function takes any number."""
    target = function.forward if isinstance(function, torch.nn.Module) else function
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in positional and p.default is p.empty)
