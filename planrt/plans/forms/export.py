"""Plans for other runtimes: as an `ExportedProgram` of `torch.export`, and as an ONNX file.

Both are translated from the op list, by exporting a module that runs the interpreter. So they take what the
plan takes and return what it returns, on any size of its free dimensions. They are made here and go out only:
nothing ever loads such a program (`torch.export.load` executes what it reads).

What comes out is the plan in the mode it is in, with a copy of its state. Random ops draw other numbers than
the plan where the other runtime has a generator of its own. A plan that differentiates has no exported form.
"""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, Protocol, TypeVar

import torch
from torch.export import Dim, ExportedProgram

from planrt.errors import ExecutionError, OptionError, PlanError
from planrt.extras import needed
from planrt.plans.forms.files import AnyPath, replacing
from planrt.plans.forms.state_tree import hold
from planrt.plans.forms.torchscript import check_only_forward
from planrt.plans.ir.graph import Graph, refs_in
from planrt.plans.ir.ops import COMPARISONS, SIZE_ARITHMETIC
from planrt.plans.ir.record import PlanRecord
from planrt.plans.ir.signature import Signature
from planrt.plans.ir.text import op_line, show
from planrt.plans.running.interpreter import Program, check_inputs, drive
from planrt.types import FREE, Nested, Ref, TensorSpec, leaves

_Made = TypeVar("_Made")

_EXAMPLE_SIZE: Final = 12  # of a free dimension; divisible by what networks divide batches by
_MAX_IN_ONE_FILE: Final = 1 << 30  # bytes of state; an ONNX file cannot be longer than 2 GiB


class Exportable(Protocol):
    """The part of a `Plan` that these functions, which are its methods, need."""

    @property
    def name(self) -> str:
        """As errors call it."""

    @property
    def record(self) -> PlanRecord:
        """The recorded program."""

    @property
    def graph(self) -> Graph:
        """The graph of its mode."""

    def state_tensors(self) -> Sequence[torch.Tensor]:
        """Returns its state, in the order of the record."""

    def state_here(self) -> Sequence[torch.Tensor]:
        """Returns its state; raises if some of it is on a worker."""


def to_exported_program(
    plan: Exportable, examples: Sequence[Any], keywords: Mapping[str, Any]
) -> ExportedProgram:
    """`plan` as an `ExportedProgram`; see `Plan.to_exported_program`."""
    inputs = _example_inputs(plan, examples, keywords)
    return _or_which_op(plan, plan.graph, lambda graph: _export(plan, graph, inputs))


def to_onnx(plan: Exportable, path: AnyPath, examples: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """`plan` as an ONNX file; see `Plan.to_onnx`."""
    for package in ("onnx", "onnxscript"):
        needed(package, by="to_onnx", extra="onnx")
    for leaf in leaves(plan.graph.outputs):
        if leaf is not None and not isinstance(leaf, Ref):
            raise PlanError(
                f"plan {plan.name!r} returns the constant {show(leaf)}, which ONNX cannot: return tensors only"
            )
    inputs = _example_inputs(plan, examples, keywords)

    def attempt(graph: Graph) -> Any:
        program = _export(plan, graph, inputs)
        _check_changes_nothing(program)
        return torch.onnx.export(program, dynamo=True, verbose=False)

    made = _or_which_op(plan, plan.graph, attempt)
    state_bytes = sum(tensor.nbytes for tensor in plan.state_tensors())
    if state_bytes > _MAX_IN_ONE_FILE:
        try:
            made.save(os.fspath(path), external_data=True)  # a second file, PATH.data, takes the tensors
        except OSError as error:
            raise OptionError(f"cannot save to {path}: {error.strerror or error}") from error
        return
    with replacing(path) as file:
        file.write(made.model_proto.SerializeToString())


class _Changes(Exception):  # noqa: N818 - a reason, found while searching for the op it belongs to
    """The program changes state or inputs, which ONNX models do not."""


def _check_changes_nothing(program: ExportedProgram) -> None:
    found = program.run_decompositions({}).graph_signature
    for names, what in (
        (found.buffers_to_mutate, "the state"),
        (getattr(found, "parameters_to_mutate", {}), "the state"),
        (found.user_inputs_to_mutate, "the input"),
    ):
        for name in names.values():
            raise _Changes(
                f"it changes {what} {name!r}, and an ONNX model has no memory of that: export the plan in "
                "evaluation mode (plan.eval()), or without the change"
            )


# The module that is exported


def _checked(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], None]:
    """What the plan assumes of its sizes, as a check that `torch.export` takes along."""

    def assume(left: Any, right: Any) -> None:
        torch._check(
            compare(left, right), lambda: "the function that was recorded goes another way for such sizes"
        )

    return assume


_FUNCTIONS: Final = {
    **SIZE_ARITHMETIC,
    **{f"operator.assume_{word}": _checked(compare) for word, compare in COMPARISONS.items()},
}


class _Runs(torch.nn.Module):
    """Runs a graph on a copy of its state, held under the names that the plan has for it."""

    def __init__(self, graph: Graph, state: Sequence[torch.Tensor], signature: Signature) -> None:
        super().__init__()
        self._names = [entry.name for entry in graph.state]
        tensors: dict[str, torch.Tensor] = {}
        for entry, tensor in zip(graph.state, state, strict=True):
            copied = tensor.detach().cpu().clone()
            is_parameter = entry.kind == "parameter"
            tensors[entry.name] = torch.nn.Parameter(copied, entry.requires_grad) if is_parameter else copied
        hold(self, tensors)
        program = Program(graph, torch.device("cpu"), functions=_FUNCTIONS)

        def forward(*args: Any, **kwargs: Any) -> Nested:
            held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
            inputs = signature.bind(graph.name, args, kwargs)
            return drive(program.run(inputs, [held[name] for name in self._names]))

        forward.__signature__ = _python(signature)  # type: ignore[attr-defined]  # torch.export reads it
        self.__dict__["forward"] = forward


def _python(signature: Signature) -> inspect.Signature:
    """The parameters that a recorded call passes; ``**kwargs`` by the names that it had."""
    parameters: list[inspect.Parameter] = []
    keyword_only = False
    for one in signature.parameters:
        if one.name not in signature.arguments:
            keyword_only = True  # what follows is passed by name; see `Signature.call`
        elif one.kind == "args":
            parameters.append(inspect.Parameter(one.name, inspect.Parameter.VAR_POSITIONAL))
        else:
            names = list(signature.arguments[one.name]) if one.kind == "kwargs" else [one.name]
            by_name = keyword_only or one.kind != "positional"
            kind = inspect.Parameter.KEYWORD_ONLY if by_name else inspect.Parameter.POSITIONAL_OR_KEYWORD
            parameters += [inspect.Parameter(name, kind) for name in names]
    return inspect.Signature(parameters)


def _passed(signature: Signature) -> Signature:
    """`signature` without the arguments that are constants and may be left out."""
    takes_any_number = any(one.kind == "args" for one in signature.parameters)  # in which order decides
    optional = {one.name for one in signature.parameters if one.default and not takes_any_number}
    passed = {
        name: value
        for name, value in signature.arguments.items()
        if name not in optional or any(isinstance(leaf, Ref) for leaf in leaves(value))
    }
    return Signature(signature.parameters, passed)


def _export(plan: Exportable, graph: Graph, inputs: Sequence[torch.Tensor]) -> ExportedProgram:
    signature = _passed(plan.record.signature)
    module = _Runs(graph, plan.state_tensors(), signature)
    args, kwargs = signature.call(lambda *args, **kwargs: (args, kwargs), inputs, {})
    free: dict[str, Any] = {}
    for one in signature.parameters:
        if one.name in signature.arguments:
            dims = _free_dims(signature.arguments[one.name], graph.inputs)
            free |= dims if one.kind == "kwargs" else {one.name: dims}
    with _quiet(), torch.random.fork_rng(devices=[]):
        return torch.export.export(module, args, kwargs, dynamic_shapes=free)


def _free_dims(argument: Nested, specs: Sequence[TensorSpec]) -> Any:
    if isinstance(argument, Ref):
        return {dim: Dim.DYNAMIC for dim, size in enumerate(specs[argument.index].shape) if size == FREE}
    if isinstance(argument, tuple | list):
        return type(argument)(_free_dims(item, specs) for item in argument)
    if isinstance(argument, dict):
        return {key: _free_dims(item, specs) for key, item in argument.items()}
    return None


def _example_inputs(
    plan: Exportable, examples: Sequence[Any], keywords: Mapping[str, Any]
) -> Sequence[torch.Tensor]:
    """Inputs to export with: the examples, or zeros. A free size of 1 is doubled: torch would take it as
    fixed."""
    graph = plan.graph
    check_only_forward(graph, "an exported program")
    plan.state_here()
    if not examples and not keywords:
        return [
            torch.zeros([_EXAMPLE_SIZE if size == FREE else size for size in spec.shape], dtype=spec.dtype)
            for spec in graph.inputs
        ]
    inputs = plan.record.signature.bind(plan.name, examples, keywords)
    check_inputs(graph, inputs)
    enlarged = []
    for spec, example in zip(graph.inputs, inputs, strict=True):
        tensor = example.detach().cpu()
        for dim, size in enumerate(spec.shape):
            if size == FREE and tensor.shape[dim] == 1:
                tensor = torch.cat([tensor, tensor], dim)
        enlarged.append(tensor)
    return enlarged


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporters report their own deprecations and steps, as warnings and in their log."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


# Which op was it?


def _or_which_op(plan: Exportable, graph: Graph, attempt: Callable[[Graph], _Made]) -> _Made:
    """``attempt(graph)``; where that fails, an error that names the op."""
    try:
        with _quiet():
            return attempt(graph)
    except Exception as error:
        index = _failing_op(graph, attempt, error)
        reason = _reason(error)
        if index is None:
            raise PlanError(f"plan {plan.name!r} cannot be exported: {reason}") from error
        raise PlanError(
            f"op {index} of plan {plan.name!r} cannot be exported: {op_line(graph.ops[index])}: {reason}"
        ) from error


def _failing_op(graph: Graph, attempt: Callable[[Graph], Any], error: BaseException | None) -> int | None:
    """The first op with which exporting fails: torch's errors speak of its own operators."""
    while error is not None:
        if isinstance(error, ExecutionError):
            return error.index
        error = error.__cause__ or error.__context__
    works, fails = 0, len(graph.ops)
    if not fails or _works(attempt, _beginning(graph, fails)):
        return None  # it is the outputs
    while fails - works > 1:
        middle = (works + fails) // 2
        if _works(attempt, _beginning(graph, middle)):
            works = middle
        else:
            fails = middle
    return fails - 1


def _works(attempt: Callable[[Graph], Any], graph: Graph) -> bool:
    try:
        with _quiet():
            attempt(graph)
    except Exception:
        return False
    return True


def _beginning(graph: Graph, count: int) -> Graph:
    """The first `count` ops, everything they make returned, so that torch leaves none of them out."""
    ops = graph.ops[:count]
    made = tuple(ref for op in ops for ref in refs_in(op.results))
    return replace(graph, ops=ops, outputs=made or graph.ops[0].args, lines=graph.lines[:count])


def _reason(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
