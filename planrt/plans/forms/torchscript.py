"""TorchScript in and out: the only file that touches `torch.jit`, so that it can go when torch.jit goes.

Out: a plan as a `ScriptModule`, for people and devices that want one. In: a module from `torch.jit.trace`,
translated from its ATen graph to ops of the one table. Neither form ever crosses the wire: workers run plans.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from planrt.errors import ExecutionError, PlanError, PlanFormatError, TraceError
from planrt.plans.forms.aten import call_for
from planrt.plans.forms.state_tree import hold
from planrt.plans.ir.graph import Graph, Op, StateSpec
from planrt.plans.ir.ops import ASSUMPTIONS, GRADIENTS, REQUIRES_GRAD, SIZE_ARITHMETIC, SIZE_OPS
from planrt.plans.ir.text import show
from planrt.plans.recording.lifting import check_plain
from planrt.plans.running.interpreter import Program, drive, local_state
from planrt.serde.dtypes import DTYPES
from planrt.types import FREE, Nested, Ref, TensorSpec, map_leaves

_jit_trace: Callable[..., Any] = torch.jit.trace
_MADE_BY_TRACE = (
    torch.jit.TracedModule,  # type: ignore[attr-defined]
    torch.jit.TopLevelTracedModule,  # type: ignore[attr-defined]
    torch.jit.ScriptFunction,  # or scripted: no difference is seen
)
_TRACED = (torch.jit.ScriptModule, torch.jit.ScriptFunction)

_PLACES = re.compile(r"__torch__[\w.]*|#[^\n]*")
"""Names of classes, which are numbered, and comments."""

_ON_TRACED_SIZES: dict[str, Callable[..., Any]] = {
    **SIZE_ARITHMETIC,
    **dict.fromkeys(ASSUMPTIONS, lambda left, right: None),
}


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns that torch.jit is deprecated, and about every size that tracing sees; both are known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def contents(script: Any) -> tuple[str, list[torch.Tensor], list[tuple[str, torch.Tensor]]]:
    """Returns what a script module or function is made of: its code as text, that says nothing of where it
    was made; the tensors in the code; its parameters and buffers, under all their names."""
    with _quiet():
        graph = script.inlined_graph
    constants = [
        value
        for node in graph.findAllNodes("prim::Constant", recurse=True)
        if isinstance(value := node.output().toIValue(), torch.Tensor)
    ]
    tensors = [(name, tensor) for name, (tensor, _) in _state_of(script).items()]
    return f"{_name_of(script)}\n{_PLACES.sub('', str(graph))}", constants, tensors


def is_torchscript(model: object) -> bool:
    """Returns whether `model` is a module or function that runs in TorchScript."""
    return isinstance(model, _TRACED)


# Out


def check_only_forward(plan: Graph, form: str) -> None:
    """Raise PlanError if `plan` computes gradients, which no exported form (`form` names it) can."""
    for index, op in enumerate(plan.ops):
        if op.name in GRADIENTS or op.name == REQUIRES_GRAD:
            raise PlanError(
                f"plan {plan.name!r} computes gradients, which {form} cannot (op {index}: {op}): make it of a plan of "
                "the forward pass"
            )


def _check_traceable(plan: Graph) -> None:
    check_only_forward(plan, "TorchScript")
    for index, op in enumerate(plan.ops):
        if op.name == "torch.set_grad_enabled":
            raise PlanError(
                f"plan {plan.name!r} has no_grad regions, which torch.jit.trace would lose (op {index}: {op}): see "
                "Plan.to_exported_program"
            )


def under_trace(plan: Graph, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]) -> Nested:
    """Runs `plan` while `torch.jit.trace` writes down what happens; what it assumes of its sizes is not
    checked then.

    Raises:
        PlanError: no TorchScript can be made of it.
    """
    _check_traceable(plan)
    return drive(Program(plan, torch.device("cpu"), functions=_ON_TRACED_SIZES).run(inputs, state))


def to_torchscript(plan: Graph, *examples: torch.Tensor) -> torch.jit.ScriptModule:
    """`plan` as TorchScript, made by tracing the interpreter; it has copies of the plan's state.

    It takes the plan's input tensors in order, and returns what the plan returns; a size that the plan
    returns is a 0-d tensor there. What the plan assumes of its sizes is not checked there.

    Args:
        plan: with its state values (as traced, not as read from bytes).
        examples: inputs to trace with; by default zeros, free dimensions of size 2.

    Raises:
        PlanError: no TorchScript can be made of it; the message says why.
    """
    _check_traceable(plan)
    if not examples:
        examples = tuple(_zeros(spec) for spec in plan.inputs)
    originals = local_state(plan)
    copies = [
        tensor.detach().clone().requires_grad_(tensor.requires_grad or entry.trainable)
        for entry, tensor in zip(plan.state, originals, strict=True)
    ]
    compiled = Program(plan, torch.device("cpu"), functions=_ON_TRACED_SIZES)

    def forward(*inputs: torch.Tensor) -> Nested:
        return drive(compiled.run(inputs, copies))

    module = _Holder(dict(zip((entry.name for entry in plan.state), copies, strict=True)), forward)
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            traced = _jit_trace(module, examples, check_trace=False, strict=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not isinstance(error, ExecutionError) and not isinstance(plan.outputs, Ref):
            reason = (
                f"it returns {show(plan.outputs)}, and TorchScript has tensors, tuples of what it has, and lists and "
                f"dicts of things of one kind ({reason})"
            )
        raise PlanError(f"plan {plan.name!r} cannot be made TorchScript: {reason}") from error
    with torch.no_grad():  # tracing ran the plan once: batch norm has counted a batch that never was
        for copy, original in zip(copies, originals, strict=True):
            copy.copy_(original)
    assert isinstance(traced, torch.jit.ScriptModule)  # noqa: S101 - tracing a module returns one
    return traced


def _zeros(spec: TensorSpec) -> torch.Tensor:
    return torch.zeros([2 if size == FREE else size for size in spec.shape], dtype=spec.dtype)


class _Holder(torch.nn.Module):
    """Tensors under their dotted names, and a function that uses them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function
        hold(self, tensors)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._function(*inputs)


# In


def as_traceable(
    model: torch.nn.Module | Callable[..., Any], examples: Sequence[torch.Tensor]
) -> tuple[Callable[..., Any], list[torch.nn.Module]]:
    """(what to call, the modules with its state): TorchScript is translated, everything else is as it is."""
    if not is_torchscript(model):
        return model, [model] if isinstance(model, torch.nn.Module) else []
    plans = {training: from_torchscript(model, examples, training=training) for training in (True, False)}
    state = local_state(plans[True])
    compiled = {
        mode: Program(plan, examples[0].device, functions=SIZE_ARITHMETIC) for mode, plan in plans.items()
    }
    tensors = dict(zip((entry.name for entry in plans[True].state), state, strict=True))
    holder = _Holder(tensors, lambda *inputs: drive(compiled[holder.training].run(inputs, state)))
    return holder, [holder]


def from_torchscript(
    script: Any,
    examples: Sequence[torch.Tensor] | None = None,
    *,
    training: bool = False,
) -> Graph:
    """Returns the plan of a `ScriptModule` or `ScriptFunction`.

    What `torch.jit.trace` made is in the mode it was traced in, what `torch.jit.script` made in the one that
    `training` says. Dimension 0 of the inputs is free; their other sizes and dtypes come from `examples`, or
    from the graph where `torch.jit.trace` left them there. State values are the script's own tensors.

    Raises:
        TraceError: control flow that depends on values or sizes, an operator without a place in the table, or
            unknown input shapes.
    """
    with _quiet():
        graph = _straight(script, training)
        return _Translation(graph, _state_of(script), _input_specs(graph, examples), _name_of(script)).plan()


def script_call(script: Any) -> Callable[..., Any]:
    """Turns a `ScriptFunction` of tensors into a Python function, for recording: the ops of its graph, one by
    one.

    Raises:
        TraceError: as `from_torchscript`.
    """
    with _quiet():
        graph = _straight(script, training=False)
        specs = tuple(
            TensorSpec((), torch.float32) for _ in graph.inputs()
        )  # not looked at: numbers are enough
        plan = _Translation(graph, {}, specs, _name_of(script)).plan()
    state = local_state(plan)
    compiled = Program(plan, torch.device("cpu"), functions=SIZE_ARITHMETIC)
    return lambda *inputs: drive(compiled.run(inputs, state))


def argument_names(script: Any) -> list[str]:
    """Returns the names of the arguments that a `ScriptFunction`, or the forward of a `ScriptModule`,
    takes."""
    called: Any = script if isinstance(script, torch.jit.ScriptFunction) else script.forward
    return [argument.name for argument in called.schema.arguments if argument.name != "self"]


_CONTROL = ("prim::If", "prim::Loop")
_CHECKS = frozenset(
    {
        "prim::Constant", "prim::RaiseException", "prim::ListConstruct", "prim::Uninitialized", "aten::warn",
        "aten::format", "aten::size", "aten::dim", "aten::len", "aten::__getitem__", "aten::add", "aten::mul",
    }
)  # fmt: skip
"""What a branch or loop that only checks sizes is made of."""


def _straight(script: Any, training: bool) -> Any:
    """The graph of `script`. What was scripted and not traced is rid of whatever depends on constants alone,
    such as the mode, and of checks of sizes, which the ops after them make as well."""
    graph = script.inlined_graph
    if isinstance(script, _MADE_BY_TRACE) and not any(graph.findNode(kind) for kind in _CONTROL):
        return graph
    graph = graph.copy()
    for node in graph.findAllNodes("prim::GetAttr", recurse=True):
        value = _attribute(script, node, training)
        if isinstance(value, bool | int | float | str) or value is None:
            with graph.insert_point_guard(
                node
            ):  # torch ends the process if the point stays at a node that goes
                constant = graph.insertConstant(value)
            node.output().replaceAllUsesWith(constant)
    for _ in range(3):  # a check may hang on another one's outcome
        torch._C._jit_pass_constant_propagation(graph)
        torch._C._jit_pass_peephole(graph, True)  # but not by the sizes that tracing saw
        for node in [node for kind in _CONTROL for node in graph.findAllNodes(kind, recurse=False)]:
            inner = [part.kind() for block in node.blocks() for part in block.nodes()]
            if not node.hasUses() and _CHECKS.issuperset(inner):
                node.destroy()
        torch._C._jit_pass_dce(graph)
    return graph


def _attribute(script: Any, node: Any, training: bool) -> Any:
    """What a node that reads an attribute reads; the node itself where that cannot be told."""
    path = [node.s("name")]
    owner = node.input().node()
    while owner.kind() == "prim::GetAttr":
        path.append(owner.s("name"))
        owner = owner.input().node()
    if owner.kind() != "prim::Param":
        return node
    if path[0] == "training":
        return training
    value = script
    for name in reversed(path):
        value = getattr(value, name, node)
    return value


def _name_of(traced: Any) -> str:
    return str(getattr(traced, "original_name", None) or getattr(traced, "name", "torchscript"))


def class_name(model: object) -> str:
    """Returns the name of the class of `model` in Python."""
    return _name_of(model) if is_torchscript(model) else type(model).__name__


def _state_of(traced: Any) -> dict[str, tuple[torch.Tensor, str]]:
    if not isinstance(traced, torch.jit.ScriptModule):
        return {}
    found: dict[str, tuple[torch.Tensor, str]] = {}
    for path, module in traced.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found[prefix + name] = (parameter, "parameter")
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            found[prefix + name] = (buffer, "buffer")
    return found


class _Translation:
    """One pass over the nodes of an inlined graph."""

    def __init__(
        self,
        graph: Any,
        tensors: dict[str, tuple[torch.Tensor, str]],
        inputs: tuple[TensorSpec, ...],
        name: str,
    ) -> None:
        self._graph = graph
        self._name = name
        self._ops: list[Op] = []
        self._values: dict[str, Any] = {}  # debug name -> Ref, constant, container of those, or _Path
        self._numbers: set[int] = set()  # results that are sizes, not tensors
        self._inputs = inputs
        for value in graph.inputs():
            if isinstance(value.type(), torch._C.ClassType):
                self._values[value.debugName()] = _Path("")
        for index, value in enumerate(_arguments(graph)):
            self._values[value.debugName()] = Ref(index)

        self._state: list[StateSpec] = []
        self._state_values: list[torch.Tensor] = []
        self._paths: dict[str, Ref] = {}
        for path, (tensor, kind) in tensors.items():
            self._paths[path] = self._known(tensor) or self._add_state(path, tensor, kind)
        self._constants = [
            node.output().toIValue() for node in graph.nodes() if node.kind() == "prim::Constant"
        ]
        for constant in self._constants:  # all state must be known before results get their numbers
            if isinstance(constant, torch.Tensor) and constant.dim():
                self._add_state(f"constant.{len(self._state)}", constant, "constant")
        self._next = len(self._inputs) + len(self._state)

    def _add_state(self, name: str, tensor: torch.Tensor, kind: Any) -> Ref:
        check_plain(tensor, f"{kind} {name!r}")
        trains = kind == "parameter" and tensor.requires_grad
        self._state.append(StateSpec(name, TensorSpec.of(tensor), kind, trains))
        self._state_values.append(tensor)
        return Ref(len(self._inputs) + len(self._state) - 1)

    def _known(self, tensor: torch.Tensor) -> Ref | None:
        for index, other in enumerate(self._state_values):
            same_memory = tensor.data_ptr() == other.data_ptr() and tensor.numel() > 0
            if tensor is other or (same_memory and TensorSpec.of(tensor) == TensorSpec.of(other)):
                return Ref(len(self._inputs) + index)
        return None

    def plan(self) -> Graph:
        for node in self._graph.nodes():
            self._node(node)
        outputs = [self._argument(self._value(value)) for value in self._graph.outputs()]
        try:
            return Graph(
                inputs=self._inputs,
                state=tuple(self._state),
                ops=tuple(self._ops),
                outputs=outputs[0] if len(outputs) == 1 else tuple(outputs),
                name=self._name,
                state_values=tuple(self._state_values),
            )
        except PlanFormatError as error:
            raise TraceError(f"the traced module is no plan: {error}") from error

    def _value(self, value: Any) -> Any:
        return self._values[value.debugName()]

    def _argument(self, value: Any) -> Any:
        """`value` as an op takes it: tensors as their number."""

        def leaf(part: Any) -> Any:
            if isinstance(part, torch.Tensor):
                known = self._known(part)
                return known if known is not None else part.item()  # a number written as a 0-d tensor
            return part

        return map_leaves(value, leaf)

    def _node(self, node: Any) -> None:
        kind: str = node.kind()
        outputs = [value.debugName() for value in node.outputs()]
        values = [self._value(value) for value in node.inputs()]
        if kind == "prim::GetAttr":
            path = values[0].joined(node.s("name"))
            ref = self._paths.get(str(path))
            self._values[outputs[0]] = path if ref is None else ref
        elif kind == "prim::Constant":
            self._values[outputs[0]] = node.output().toIValue()
        elif kind == "prim::ListConstruct":
            self._values[outputs[0]] = list(values)
        elif kind == "prim::TupleConstruct":
            self._values[outputs[0]] = tuple(values)
        elif kind in ("prim::TupleUnpack", "prim::ListUnpack"):
            self._values.update(zip(outputs, values[0], strict=True))
        elif kind in (
            "prim::NumToTensor",
            "aten::Int",
            "aten::ScalarImplicit",
            "aten::Float",
            "aten::Bool",
            "aten::item",
        ):
            if isinstance(values[0], Ref) and values[0].index not in self._numbers:
                raise TraceError(
                    f"{self._name!r} in TorchScript reads the value of a tensor ({kind}), which a plan cannot: pass "
                    "the nn.Module itself, with torch.where in place of what depends on values"
                )
            self._values[outputs[0]] = values[0]
        elif kind in ("prim::If", "prim::Loop"):
            raise TraceError(
                f"control flow of {self._name!r} in TorchScript that depends on values or sizes ({kind}) cannot be "
                "translated: pass the nn.Module or Python function itself"
            )
        elif kind.startswith("aten::"):
            self._operator(node, kind.removeprefix("aten::"), values, outputs)
        else:
            raise TraceError(f"{kind} in a traced module cannot be translated: pass the nn.Module itself")

    def _operator(self, node: Any, kind: str, values: list[Any], outputs: list[str]) -> None:
        schema = torch._C.parse_schema(node.schema())
        on_sizes = (
            bool(values)
            and all(
                type(value) in (int, float)
                or (isinstance(value, Ref) and value.index in self._numbers)
                or (isinstance(value, torch.Tensor) and value.dim() == 0)
                or isinstance(value, str)
                for value in values
            )
            and any(isinstance(value, Ref) for value in values)
        )
        named = [
            (argument, self._argument(value))
            for argument, value in zip(schema.arguments, values, strict=True)
        ]
        name, args, kwargs = call_for(kind, named, on_sizes=on_sizes)
        count = len(outputs)
        results: Nested
        if count == 1:
            unpacked = [use.user for use in node.output().uses() if use.user.kind() == "prim::ListUnpack"]
            size = len(list(unpacked[0].outputs())) if unpacked else 0
            results = self._refs(size) if unpacked else self._refs(1)[0]
            self._values[outputs[0]] = results
        else:
            results = self._refs(count)
            self._values.update(zip(outputs, results, strict=True))
        if name in SIZE_OPS and isinstance(results, Ref):
            self._numbers.add(results.index)
        self._ops.append(Op(name, args, kwargs, results))

    def _refs(self, count: int) -> tuple[Ref, ...]:
        self._next += count
        return tuple(Ref(index) for index in range(self._next - count, self._next))


class _Path(str):
    """Where in the module tree a value stands."""

    def joined(self, name: str) -> _Path:
        return _Path(f"{self}.{name}" if self else name)


def _arguments(graph: Any) -> list[Any]:
    """The inputs of a graph that are not the module itself."""
    return [value for value in graph.inputs() if not isinstance(value.type(), torch._C.ClassType)]


def _input_specs(graph: Any, examples: Sequence[torch.Tensor] | None) -> tuple[TensorSpec, ...]:
    values = _arguments(graph)
    if examples is not None:
        if len(examples) != len(values):
            raise TraceError(f"the traced module takes {len(values)} inputs, got {len(examples)} examples")
        return tuple(TensorSpec.of(example, free_dims=(0,)) for example in examples)
    specs = []
    for index, value in enumerate(values):
        kind = value.type()
        sizes = kind.sizes() if isinstance(kind, torch._C.TensorType) else None
        if sizes is None or None in sizes or kind.dtype() not in DTYPES.values():
            raise TraceError(f"the traced module does not say the shape of input {index}: pass examples=...")
        specs.append(TensorSpec((FREE, *sizes[1:]) if sizes else (), kind.dtype()))
    return tuple(specs)
