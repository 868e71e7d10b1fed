"""State of a plan: the tensors a traced function uses but does not make; and undoing what tracing did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from planrt.errors import TraceError
from planrt.plans.graph import StateKind, StateSpec
from planrt.serde.dtypes import DTYPE_NAMES
from planrt.types import TensorSpec

LOST_BACKWARD = "a custom autograd.Function cannot be recorded: the plan would lose its backward"

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


@dataclass(slots=True)
class StateEntry:
    """One tensor of the state, with what it held before tracing."""

    name: str
    tensor: torch.Tensor
    kind: StateKind
    before: torch.Tensor
    version: int

    def spec(self) -> StateSpec:
        """The entry as the plan describes it."""
        trains = self.kind == "parameter" and self.tensor.requires_grad
        return StateSpec(self.name, TensorSpec.of(self.tensor), self.kind, trains)


class StateRegistry:
    """Parameters and buffers of `modules`, in module order, then tensors captured while tracing.

    A tensor that is there twice (tied weights) is one entry, under its first name. Several recordings may
    share a registry: their plans then have the same state. `also_undo` are modules that run as well, such as
    a loss: their attributes are put back too, but they bring no state unless the function uses it.
    """

    def __init__(
        self, modules: Sequence[torch.nn.Module] = (), *, also_undo: Sequence[torch.nn.Module] = ()
    ) -> None:
        self.entries: list[StateEntry] = []
        self.modules = list(
            dict.fromkeys(part for module in (*modules, *also_undo) for part in module.modules())
        )
        self._index: dict[int, int] = {}
        self._bound: list[tuple[dict[str, Any], str, str, torch.Tensor]] = []
        for root in modules:
            for path, module in root.named_modules():
                self._lift(module, f"{path}." if path else "")

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

    def find(self, tensor: torch.Tensor) -> int | None:
        """The index of `tensor` in the state, None if it is not there."""
        return self._index.get(id(tensor))

    def capture(self, tensor: torch.Tensor, line: str | None) -> int:
        """Take in a tensor from outside the traced function."""
        if isinstance(tensor.grad_fn, BackwardCFunction):
            raise TraceError(LOST_BACKWARD, line=line)
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise TraceError("torch.func transforms (vmap, grad) cannot be recorded", line=line)
        if tensor.grad_fn is not None:
            raise TraceError(
                "a tensor from outside with a gradient history: the plan would lose it; detach() it",
                line=line,
            )
        check_plain(tensor, "a captured tensor", line=line)
        kind: StateKind = "parameter" if tensor.requires_grad else "constant"
        return self._add(f"captured.{len(self.entries)}", tensor, kind)

    def _add(self, name: str, tensor: torch.Tensor, kind: StateKind) -> int:
        self._index[id(tensor)] = len(self.entries)
        self.entries.append(StateEntry(name, tensor, kind, tensor.detach().clone(), tensor._version))
        return len(self.entries) - 1

    def rebound(self) -> Iterator[tuple[str, torch.Tensor, Any]]:
        """(name, tensor before, what stands there now) for module state that was assigned anew."""
        for registered, name, path, tensor in self._bound:
            if registered.get(name) is not tensor:
                yield path, tensor, registered.get(name)


class Undo:
    """Puts back what tracing changed: module attributes and state, captured tensors, random generators."""

    def __init__(self, registry: StateRegistry) -> None:
        self._registry = registry
        self._attributes = [
            (module, dict(module.__dict__), [dict(module.__dict__[name]) for name in _REGISTERED])
            for module in registry.modules
        ]
        devices = {e.tensor.device.index or 0 for e in registry.entries if e.tensor.device.type == "cuda"}
        self._generators = torch.random.fork_rng(devices=sorted(devices))

    def __enter__(self) -> Undo:
        self._generators.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
        self._generators.__exit__(kind, error, trace)

    def restore(self) -> None:
        """Modules and tensors as they were; a captured constant that was changed is a buffer."""
        for module, attributes, registered in self._attributes:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, before in zip(_REGISTERED, registered, strict=True):
                module.__dict__[name].clear()
                module.__dict__[name].update(before)
        for entry in self._registry.entries:
            if entry.kind == "constant" and entry.tensor._version != entry.version:
                entry.kind = "buffer"
            if not torch.equal(entry.tensor, entry.before):
                entry.tensor.data.copy_(entry.before)
