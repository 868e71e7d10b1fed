"""State of a plan: the tensors a traced function uses but does not make; and undoing what tracing did.

To lift a tensor is to make it an entry of the plan's state (`torch.export` calls it that). There are three
kinds, decided where the tensor is first met:

* ``parameter``: a parameter of the modules, or a tensor from outside that requires gradients. A round may
  train it.
* ``buffer``: a buffer of the modules, or another tensor that the function wrote to in some run: what it holds
  after a run is what the next one begins with.
* ``constant``: another tensor from outside. Its values are as much of the program as its ops, and an owner
  approves them (`planrt.plans.ir.constants`).

A constant becomes a buffer when a run has written to it, which is only known after that run: so kinds are
final once all runs are over, and plans are assembled then. Whether it was written to is told by torch's
version counters (`tensor._version`). `Tensor.data` has a counter of its own, which is why such aliases are
kept (`unversioned`).

Tracing runs the user's function several times, and each run must begin as the first did: `Undo` puts back
attributes, registers, values, gradients, optimizers and generators after each run, not only at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from planrt.errors import PlanWarning, TraceError
from planrt.plans.ir.graph import StateKind, StateSpec
from planrt.plans.ir.source import frames_to_user
from planrt.plans.recording import torch_calls
from planrt.plans.recording.optimizers import OptimizerWatch
from planrt.serde.dtypes import DTYPE_NAMES
from planrt.types import TensorSpec

LOST_BACKWARD = "a custom autograd.Function cannot be recorded: the plan would lose its backward"

_MOST_LISTED = 5  # captured tensors that a notice lists
_REGISTERED = ("_parameters", "_buffers", "_modules")


def check_plain(tensor: Any, what: str, *, line: str | None = None) -> torch.Tensor:
    """`tensor`, if it is one that plans can hold: strided, of an ordinary dtype.

    Raises:
        TraceError: sparse, quantised, nested, uninitialised or exotic tensors, and what is no tensor.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TraceError(f"{what} must be a tensor, not {type(tensor).__name__}", line=line)
    if torch.nn.parameter.is_lazy(tensor):
        raise TraceError(
            f"{what} has no shape yet: run the lazy module once before it is recorded", line=line
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise TraceError(
            f"{what} is a sparse, quantised or nested tensor: plans hold ordinary dense ones", line=line
        )
    if tensor.dtype not in DTYPE_NAMES:
        raise TraceError(f"{what} has dtype {tensor.dtype}, which plans do not know", line=line)
    return tensor


def attribute_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of tensors that are plain attributes of a part of `module`: neither parameters nor
    buffers."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                yield (f"{path}.{name}" if path else name), value


@dataclass(slots=True)
class StateEntry:
    """One tensor of the state, with what it was before tracing."""

    name: str
    tensor: torch.Tensor
    kind: StateKind
    before: torch.Tensor
    version: int
    requires_grad: bool
    grad: torch.Tensor | None = None
    """The user's own gradient, put aside while the function runs."""
    geometry: tuple[torch.Size, tuple[int, ...]] = field(init=False)
    written: bool = False
    """Whether the function wrote to it in place."""
    reshaped: bool = False
    """Whether the function gave it another shape in place (`Tensor.t_`)."""
    unversioned: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    """Tensors that share its memory but not its version counter (`Tensor.data`), with their versions then."""

    def __post_init__(self) -> None:
        self.geometry = (self.tensor.shape, self.tensor.stride())

    def spec(self) -> StateSpec:
        """Returns the entry as the plan describes it."""
        trains = self.kind == "parameter" and self.requires_grad
        return StateSpec(self.name, TensorSpec.of(self.tensor), self.kind, trains)

    def hide_gradient(self) -> None:
        """Put the user's gradient aside: a plan starts without gradients."""
        if self.tensor.is_leaf and self.tensor.grad is not None:
            self.grad, self.tensor.grad = self.tensor.grad, None

    def show_gradient(self) -> None:
        """Give the user's gradient back."""
        if self.grad is not None:
            self.tensor.grad, self.grad = self.grad, None

    def restore(self) -> None:
        """Puts the tensor back as it was; a captured constant that was written to becomes a buffer."""
        tensor = self.tensor
        written = tensor._version != self.version or any(
            alias._version != version for alias, version in self.unversioned
        )
        self.written = self.written or written
        if written and self.kind == "constant":
            self.kind = "buffer"
        self.unversioned.clear()
        if tensor.is_leaf:
            tensor.grad = None
        elif not self.requires_grad:  # written to in place by something with a history
            tensor.detach_()
        if tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if (tensor.shape, tensor.stride()) != self.geometry:
            self.reshaped = True
            tensor.data = tensor.data.as_strided(*self.geometry)
        if not torch.equal(tensor, self.before):
            tensor.data.copy_(self.before)


class StateRegistry:
    """Parameters and buffers of `modules`, in module order, then tensors captured while tracing.

    A tensor that is there twice (tied weights) is one entry, under its first name. Several recordings may
    share a registry: their plans then have the same state. `also_undo` are modules that run as well, such as
    a loss: their attributes are put back too, but they bring no state unless the function uses it.

    A captured tensor that requires gradients is a parameter of the plan, unless `captured_train` is False:
    then only the modules' own parameters are, as for an optimizer that is given ``model.parameters()``.
    """

    def __init__(
        self,
        modules: Sequence[torch.nn.Module] = (),
        *,
        also_undo: Sequence[torch.nn.Module] = (),
        captured_train: bool = True,
    ) -> None:
        self._captured_train = captured_train
        self.entries: list[StateEntry] = []
        self.modules = list(
            dict.fromkeys(part for module in (*modules, *also_undo) for part in module.modules())
        )
        self.captured: list[tuple[TensorSpec, str | None]] = []
        """What and where: the tensors from outside that nobody named."""
        self._index: dict[int, int] = {}
        self._names: dict[int, tuple[str, StateKind | None, torch.Tensor]] = {}
        self._bound: list[tuple[dict[str, Any], str, str, torch.Tensor]] = []
        self._attributes: dict[int, tuple[str, torch.Tensor]] = {}
        self._module_names: dict[int, str] = {}
        for prefix, root in (*(("", root) for root in modules), *(("loss", root) for root in also_undo)):
            self._name_modules(root, prefix)
        for root in modules:
            for path, tensor in attribute_tensors(root):
                self._attributes.setdefault(id(tensor), (path, tensor))
            for path, module in root.named_modules():
                self._lift(module, f"{path}." if path else "")
        for root in also_undo:
            for name, tensor in (*root.named_parameters(), *root.named_buffers()):
                self.name(tensor, f"loss.{name}")

    def module_name(self, module: torch.nn.Module, root: torch.nn.Module) -> str:
        """Returns what errors call `module`: its path in `root`, the outermost that runs, and its kind."""
        if id(module) not in self._module_names:
            self._name_modules(root, "")
        return self._module_names.get(id(module)) or type(module).__name__

    def _name_modules(self, root: torch.nn.Module, prefix: str) -> None:
        for path, part in root.named_modules(prefix=prefix):
            kind = type(part).__name__
            self._module_names.setdefault(id(part), f"{path} ({kind})" if path else kind)

    def name(self, tensor: torch.Tensor, name: str, kind: StateKind | None = None) -> None:
        """Sets what `tensor` is to be called if the function uses it, and what kind of state it is. Named
        tensors are captured without a warning."""
        self._names.setdefault(id(tensor), (name, kind, tensor))

    def _lift(self, module: torch.nn.Module, prefix: str) -> None:
        registers: tuple[tuple[dict[str, Any], StateKind], ...] = (
            (module._parameters, "parameter"),
            (module._buffers, "buffer"),
        )
        for registered, kind in registers:
            for name, tensor in registered.items():
                if tensor is None:
                    continue
                self._bound.append((registered, name, prefix + name, tensor))
                if id(tensor) not in self._index:
                    check_plain(tensor, f"{kind} {prefix + name!r}")
                    self._add(prefix + name, tensor, kind)

    def name_optimizer_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Names for the tensors that `optimizer` keeps: ``weight.momentum_buffer``."""
        for number, (parameter, state) in enumerate(optimizer.state.items()):
            index = self.find(parameter)
            owner = self.entries[index].name if index is not None else f"optimizer.{number}"
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    self.name(value, f"{owner}.{key}")

    def named(self, inputs: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the state by name, and the inputs by number."""
        for entry in self.entries:
            yield f"state {entry.name!r}", entry.tensor
        for index, tensor in enumerate(inputs):
            yield f"argument {index}", tensor

    def find(self, tensor: torch.Tensor) -> int | None:
        """Returns the index of `tensor` in the state, None if it is not there."""
        return self._index.get(id(tensor))

    def capture(self, tensor: torch.Tensor, line: str | None) -> int:
        """Take in a tensor from outside the traced function."""
        if isinstance(tensor.grad_fn, BackwardCFunction):
            raise TraceError(torch_calls.why_lost(tensor) or LOST_BACKWARD, line=line)
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise TraceError("torch.func transforms (vmap, grad) cannot be recorded", line=line)
        if tensor.grad_fn is not None:
            raise TraceError(
                "a tensor from outside with a gradient history: the plan would lose it; detach() it",
                line=line,
            )
        check_plain(tensor, "a captured tensor", line=line)
        name, kind, _ = self._names.get(id(tensor), (None, None, None))
        if name is None:
            self.captured.append((TensorSpec.of(tensor), line))
            name, _ = self._attributes.get(id(tensor), (f"captured.{len(self.entries)}", None))
        trains = tensor.requires_grad and self._captured_train
        index = self._add(self._unused(name), tensor, kind or ("parameter" if trains else "constant"))
        self.entries[index].hide_gradient()
        return index

    def _add(self, name: str, tensor: torch.Tensor, kind: StateKind) -> int:
        self._index[id(tensor)] = len(self.entries)
        self.entries.append(
            StateEntry(name, tensor, kind, tensor.detach().clone(), tensor._version, tensor.requires_grad)
        )
        return len(self.entries) - 1

    def _unused(self, name: str) -> str:
        taken = {entry.name for entry in self.entries}
        number, free = 1, name
        while free in taken:
            number += 1
            free = f"{name}_{number}"
        return free

    def warn_of_captures(self, plan: str) -> None:
        """Warn of the tensors from outside that became state, once for all of them."""
        if not self.captured:
            return
        shown = ", ".join(str(spec) for spec, _ in self.captured[:_MOST_LISTED])
        shown += ", ..." if len(self.captured) > _MOST_LISTED else ""
        line = next((line for _, line in self.captured if line), None)
        many = len(self.captured) > 1
        warnings.warn(
            f"plan {plan!r} captured {len(self.captured)} tensor{'s' if many else ''} from outside the function "
            f"({shown}{f'; the first at {line}' if line else ''}): the plan keeps {'them' if many else 'it'} as "
            "state, with today's values; pass what changes from call to call as an argument, and give a module "
            "what belongs to it",
            PlanWarning,
            stacklevel=frames_to_user() + 1,
        )

    def rebound(self) -> Iterator[tuple[str, torch.Tensor, Any]]:
        """(name, tensor before, what stands there now) for module state that was assigned anew."""
        for registered, name, path, tensor in self._bound:
            if registered.get(name) is not tensor:
                yield path, tensor, registered.get(name)


class Undo:
    """Puts back what tracing changed: module attributes and state, captured tensors, gradients, optimizers,
    random generators."""

    def __init__(self, registry: StateRegistry) -> None:
        self._registry = registry
        self._attributes = [
            (module, dict(module.__dict__), [dict(module.__dict__[name]) for name in _REGISTERED])
            for module in registry.modules
        ]
        devices = {e.tensor.device.index or 0 for e in registry.entries if e.tensor.device.type == "cuda"}
        self._generators = torch.random.fork_rng(devices=sorted(devices))
        self.optimizers = OptimizerWatch()

    def __enter__(self) -> Undo:
        self._generators.__enter__()
        self.optimizers.__enter__()
        for entry in self._registry.entries:
            entry.hide_gradient()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.restore()
        finally:
            for entry in self._registry.entries:
                entry.show_gradient()
            self.optimizers.__exit__()
            self._generators.__exit__(kind, error, trace)

    def restore(self) -> None:
        """Modules, optimizers and tensors as they were; a captured constant that was changed is a buffer."""
        for module, attributes, registered in self._attributes:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, before in zip(_REGISTERED, registered, strict=True):
                module.__dict__[name].clear()
                module.__dict__[name].update(before)
        self.optimizers.restore()
        for entry in self._registry.entries:
            entry.restore()
