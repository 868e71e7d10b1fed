"""What Python code keeps between calls: attributes that `forward` changes, lists that grow, globals that
count.

A plan is recorded from a first call and runs that call for ever. So what a call leaves behind for the next
one would be lost, and nobody would be told. `KeptState` looks at all that the function can reach before and
after a run: attributes of modules and of objects of the user's own classes, lists, dicts and sets, and the
globals and closures that the code names. Where a run changed some of it, the tracer runs the function once
more from there:

- If it then does something else, what is kept has a part in what is computed: a `TraceError` names it.
- If it does the same, and what is kept goes on changing (a counter, a list that grows), a `PlanWarning` names
  it.
- If it does the same and leaves the same, it is a cache or a note (``self.last_shape = x.shape``): the plan
  is right.

Why a second run decides, and not the change itself: a module that writes ``self.last_shape = x.shape``
changes, and is right as a plan; one that counts its calls and adds the count to the result changes as little,
and is not. Only what the function *does* from the changed state tells them apart, and ops are compared
exactly as for other sizes (`size_probing.in_common`). Tensors are an exception. A first run may make a mask
and keep it, and the second use it again, with fewer ops and the same result: that is allowed where nothing
but sizes has a part in the mask (`Left.reuses`, `KnownValues.follows_sizes_only`), since then it is the same
at every run of the plan.

For example, with ``def forward(self, x): self.calls += 1; return x * self.calls``

    start {calls: 0} -> run 1 -> after {calls: 1}   differs: run again from `after`
    after {calls: 1} -> run 2                       multiplies by 2, and run 1 by 1: refused, `calls` is named

After every run all of it is as it was before. Parameters and buffers are no matter of this: a plan keeps
them.
"""

from __future__ import annotations

import collections
import dis
import functools
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from planrt.errors import PlanWarning, TraceError
from planrt.plans.ir.source import frames_to_user
from planrt.plans.recording.known_values import KnownValues
from planrt.plans.recording.python_rng import generator_state
from planrt.plans.recording.traced_sizes import TracedNumber

_REGISTERS: Final = frozenset({"_parameters", "_buffers", "_modules", "training"})
_PLAIN: Final = (type(None), bool, int, float, complex, str, bytes)
_MOST: Final = 10_000  # entries of one container that are looked into, and containers in all
_MOST_NAMED: Final = 4
_EMPTY: Final = object()
_STORES: Final = frozenset({"STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF", "DELETE_ATTR"})
_LOADS: Final = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_DEREF"})

Container = dict[Any, Any] | list[Any] | set[Any] | types.CellType


@dataclass(frozen=True, slots=True)
class Change:
    """Something kept that another run found, or left, differently."""

    name: str
    """As users would write it: ``self.calls of layers.0 (Net)``, ``global CALLS``."""
    line: str | None
    before: Any
    after: Any

    @property
    def is_generator(self) -> bool:
        """Tells whether it is a random generator that was drawn from."""
        return isinstance(self.after, _State)


@dataclass(frozen=True, slots=True)
class _State:
    """The state of a random generator."""

    state: Any


@dataclass(slots=True)
class _Place:
    """A mutable thing with what is in it."""

    name: str  # with {} for the entry
    of: str
    container: Any
    only: tuple[str, ...] | None
    """Of a namespace of globals: the names that matter."""

    def called(self, key: Any) -> str:
        """What the entry is called that `key` stands for."""
        return self.name.format("..." if isinstance(self.container, list | set) else key) + self.of

    def items(self) -> dict[Any, Any]:
        found = self.container
        if isinstance(found, types.CellType):
            try:
                return {"": found.cell_contents}
            except ValueError:
                return {}
        if self.only is not None:
            return {name: found.get(name, _EMPTY) for name in self.only}
        if isinstance(found, dict):
            return dict(found)
        if isinstance(found, set):
            return dict.fromkeys(found)
        return dict(enumerate(found))

    def put(self, items: dict[Any, Any]) -> None:
        found = self.container
        if isinstance(found, types.CellType):
            if items:
                found.cell_contents = items[""]
        elif self.only is not None:
            for name, value in items.items():
                if value is _EMPTY:
                    found.pop(name, None)
                else:
                    found[name] = value
        elif isinstance(found, dict | set):
            found.clear()
            found.update(items)
        else:
            found.clear()
            found.extend(items.values())


Snapshot = list[tuple[_Place, dict[Any, Any]]]


class KeptState:
    """All that a function and its modules can reach and change, but parameters and buffers."""

    def __init__(self, function: Callable[..., Any], modules: Sequence[torch.nn.Module]) -> None:
        self._places: list[_Place] = []
        self._generators: list[tuple[str, Any]] = []
        self._met: dict[int, Any] = {}
        self._codes: list[types.CodeType] = []
        for module in modules:
            self._modules(module, "")
        self._value(function, "", "")
        self.start = self.snapshot()

    # -------------------------------------------------------------------------------------------- what there is

    def snapshot(self) -> Snapshot:
        """Copies what is in every place now, and the states of random generators."""
        states = {name: _State(generator_state(found)) for name, found in self._generators}
        return [*((place, place.items()) for place in self._places), (_Place("{}", "", {}, None), states)]

    def restore(self, snapshot: Snapshot) -> None:
        """Puts every place back as it was then."""
        for place, items in snapshot[:-1]:
            now = place.items()
            if now.keys() != items.keys() or any(now[key] is not items[key] for key in items):
                place.put(items)

    def changes(self, before: Snapshot, after: Snapshot, *, tensors: bool) -> list[Change]:
        """Lists what is another thing in `after` than in `before`. Without `tensors`, all tensors are alike:
        whether a run uses one that an earlier run left is seen by the recorder."""
        found = []
        for (place, old), (_, new) in zip(before, after, strict=True):
            if old is new:
                continue
            for key in [*old, *(key for key in new if key not in old)]:
                was, now = old.get(key, _EMPTY), new.get(key, _EMPTY)
                if was is not now and not _alike(was, now, tensors):
                    whole = isinstance(place.container, list | set) or not isinstance(key, str)
                    name = place.called("..." if whole else key)
                    found.append(Change(name, self._line(name), was, now))
                    if whole:
                        break
        return found

    def holder(self, snapshot: Snapshot, tensor: torch.Tensor) -> Change | None:
        """Returns the entry of `snapshot` that holds `tensor`; None where none does."""
        for place, items in snapshot:
            for key, value in items.items():
                if value is tensor:
                    name = place.called(key)
                    return Change(name, self._line(name), None, value)
        return None

    def _line(self, name: str) -> str | None:
        """``file:line`` where the code stores to what is called so, or else first reads it."""
        word = name.partition(" of ")[0].removeprefix("self.").removeprefix("global ").partition("[")[0]
        word = word.removeprefix("variable ").partition(".")[0]
        codes = sorted(self._codes, key=lambda code: code.co_name != "forward")
        for code in codes:
            for wanted in (_STORES, _LOADS):
                for instruction in dis.get_instructions(code):
                    if instruction.opname in wanted and instruction.argval == word:
                        line = instruction.positions.lineno if instruction.positions else None
                        if code.co_name != "__init__" and line is not None:
                            return f"{code.co_filename}:{line}"
        return None

    # -------------------------------------------------------------------------------------------- finding it

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._met or len(self._met) > _MOST:
            return False
        self._met[id(value)] = value  # kept, so that no id is used twice
        return True

    def _value(self, value: Any, name: str, of: str) -> None:
        """Looks into `value`, which is called `name`, and belongs to what `of` says."""
        if isinstance(value, (*_PLAIN, torch.Tensor, type, types.ModuleType)):
            return
        if isinstance(value, torch.nn.Module):
            self._modules(value, f" of {name}{of}" if name else "")
            return
        if not self._is_new(value):
            return
        if generator_state(value) is not None:
            self._generators.append((f"{name}{of}", value))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._value(value.__func__, name, of)
            self._value(value.__self__, name, of)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._value(part, name, of)
        elif isinstance(value, dict):
            self._container(value, f"{name}[{{!r}}]", of)
        elif isinstance(value, list | set | collections.deque):
            self._container(value, f"{name}[{{}}]", of)
        elif isinstance(value, tuple):
            for item in value[:_MOST]:
                self._value(item, name, of)
        elif not is_library(type(value).__module__) and isinstance(getattr(value, "__dict__", None), dict):
            self._class(type(value))
            self._container(value.__dict__, f"{name}.{{}}", of)

    def _container(self, container: Any, name: str, of: str) -> None:
        if len(container) > _MOST:
            return
        self._places.append(_Place(name, of, container, None))
        items = container.items() if isinstance(container, dict) else (("...", item) for item in container)
        for key, item in list(items):
            self._value(item, name.format(key), of)

    def _modules(self, root: torch.nn.Module, of: str) -> None:
        """The attributes of `root` and of the modules in it."""
        new = [(path, part) for path, part in root.named_modules() if self._is_new(part)]
        for path, module in new:
            home = type(module).__module__.partition(".")[0]
            if home == "planrt":  # a plan of a function
                self._value(vars(module).get("_function"), "", "")
            if home in ("planrt", "torch"):
                continue
            kind = type(module).__name__
            where = f" of {path} ({kind}){of}" if path else of or f" of {kind}"
            self._class(type(module))
            attributes = _Attributes("self.{}", where, vars(module), None)
            self._places.append(attributes)
            for key, value in attributes.items().items():
                self._value(value, f"self.{key}", where)

    def _class(self, kind: type) -> None:
        if not self._is_new(kind) or is_library(kind.__module__):
            return
        for base in kind.__mro__:
            if base is not kind:
                self._class(base)
        for value in vars(kind).values():
            found = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
            if isinstance(found, types.FunctionType) and self._is_new(found):
                self._function(found)

    def _function(self, function: types.FunctionType) -> None:
        if is_library(function.__globals__.get("__name__", "")):
            self._cells(function, places=False)
            return
        self._codes.append(function.__code__)
        self._cells(function, places=True)
        for part in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._value(part, f"a default of {function.__name__}", "")
        known, names = function.__globals__, _globals_in(function.__code__)
        self._places.append(_Place("global {}", "", known, names))
        for name in names:
            self._value(known.get(name), f"global {name}", "")

    def _cells(self, function: types.FunctionType, *, places: bool) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:
                continue
            if places and self._is_new(cell):
                self._places.append(_Place(f"variable {name}", "", cell, None))
            self._value(value, f"variable {name}" if places else "", "")


class _Attributes(_Place):
    """Attributes of a module: those that there were, and those that a run added."""

    def items(self) -> dict[Any, Any]:
        return {
            key: value
            for key, value in self.container.items()
            if key not in _REGISTERS and not key.endswith(("_hooks", "_hooks_with_kwargs"))
        }

    def put(self, items: dict[Any, Any]) -> None:
        for key in self.items().keys() - items.keys():
            del self.container[key]
        self.container.update(items)


def _alike(old: Any, new: Any, tensors: bool) -> bool:
    """Whether `new` is as good as `old` for code that reads it. Containers are places of their own."""
    if isinstance(old, TracedNumber):
        old = old.plain
    if isinstance(new, TracedNumber):
        new = new.plain
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return not tensors
    if isinstance(old, tuple | list) and isinstance(new, tuple | list):
        return len(old) == len(new) and all(
            _alike(one, other, tensors) for one, other in zip(old, new, strict=True)
        )
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_alike(old[key], new[key], tensors) for key in old)
    if isinstance(old, float) and isinstance(new, float) and old != old and new != new:
        return True
    try:
        return type(old) is type(new) and (bool(old == new) or not isinstance(old, (*_PLAIN, set, _State)))
    except Exception:  # an __eq__ of the user's
        return False


@functools.lru_cache(maxsize=4096)
def _globals_in(code: types.CodeType) -> tuple[str, ...]:
    """The names that `code`, and what is defined in it, reads or writes as globals."""
    found = dict.fromkeys(
        one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "STORE_GLOBAL")
    )
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found.update(dict.fromkeys(_globals_in(inner)))
    return tuple(found)


def _listed(changes: Sequence[Change]) -> str:
    """Returns the names of the first few changes, each once."""
    return ", ".join(dict.fromkeys(change.name for change in changes[:_MOST_NAMED]))


@dataclass(frozen=True, slots=True)
class Left:
    """The state that a run left behind, for the next run that begins there."""

    kept: KeptState
    snapshot: Snapshot
    known: KnownValues

    def reuses(self, tensor: torch.Tensor) -> bool:
        """Returns whether `tensor` is one that the earlier run left, and as good as made anew.

        Raises:
            TraceError: it is one, and what it holds followed that run's arguments or state.
        """
        holder = self.kept.holder(self.snapshot, tensor)
        if holder is None:
            return False
        if not self.known.follows_sizes_only(tensor):
            raise KeptError(why_kept([holder]), line=holder.line)
        return True


class KeptError(TraceError):
    """The state that one call leaves behind decides what the next one computes."""


def why_kept(changes: Sequence[Change]) -> str:
    """Explains why a plan cannot be made of a function that keeps something, and what to write."""
    return (
        f"the function keeps something from call to call, and computes with it: {_listed(changes)}. A plan "
        "would compute as in the first call for ever: keep it in a buffer (self.register_buffer(name, tensor), "
        "self.name += 1), or pass it as an argument"
    )


def warn_of_changes(changes: Sequence[Change], plan: str) -> None:
    """Warn of what changes from call to call without a part in what is computed, as far as can be seen."""
    line = next((change.line for change in changes if change.line), None)
    warnings.warn(
        f"{plan} changes {_listed(changes)} at every call{f' (at {line})' if line else ''}: a plan does not, "
        "and computes as in the first call; keep what counts in a buffer (self.register_buffer), which plans change",
        PlanWarning,
        stacklevel=frames_to_user() + 1,
    )


_LIBRARIES: Final = frozenset({"torch", "torchvision", "numpy", "planrt", *sys.stdlib_module_names})


@functools.lru_cache(maxsize=4096)
def is_library(module: str) -> bool:
    """Returns whether the module of that name is somebody else's: its code stays as it is while a program
    runs."""
    if module.partition(".")[0] in _LIBRARIES:
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file
