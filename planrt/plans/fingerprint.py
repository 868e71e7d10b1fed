"""What a recording depends on, as one value: a model that was changed since has another.

A plan is recorded once and used for many rounds, so somebody has to notice when the model is no longer the
one that was recorded: layers frozen or added, another dropout rate, another `forward`. `fingerprint` walks
over everything that Python code can reach from a model and its loss: the tree of modules with their plain
attributes and hooks; shapes, dtypes, memory and `requires_grad` of tensors; the code of classes, methods and
functions with their closures, defaults and the globals they name. Of a module's own tensors the values do not
matter, of all other tensors they do, since a plan keeps these. Two models with equal fingerprints are
recorded to equal plans. Where something cannot be looked into there is no fingerprint, and whoever asks has
to record again.

Code of libraries (the standard library, torch, whatever is installed in site-packages) is taken not to
change.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import types
import weakref
from collections.abc import Hashable, Iterable
from typing import Any, Final

import torch

from planrt.plans.forms import torchscript
from planrt.plans.recording.python_state import is_library
from planrt.serde.tensors import raw_bytes

Fingerprint = Hashable
"""Two models are equal here where recording makes equal plans of them."""

_PLAIN: Final = (
    type(None), bool, int, str, bytes, type(Ellipsis), type(NotImplemented), range, torch.dtype, torch.device,
    torch.layout, torch.memory_format,
)  # fmt: skip
_NO_BEHAVIOUR: Final = frozenset({
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__annotate__", "__annotate_func__",
    "__annotations_cache__", "__firstlineno__", "__static_attributes__", "__abstractmethods__", "_abc_impl",
    "__orig_bases__", "__parameters__", "__slots__", "__slotnames__", "__classcell__", "__jit_unused_properties__",
})  # fmt: skip
"""Attributes of classes that no call depends on."""
_DESCRIPTORS: Final = (
    types.WrapperDescriptorType, types.MethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
    types.ClassMethodDescriptorType, types.MethodWrapperType,
)  # fmt: skip
"""What C code defines: its name says what it does."""
_REGISTERS: Final = ("_parameters", "_buffers", "_modules")
_HOOKS: Final = ("_backward_hooks", "_post_accumulate_grad_hooks")


class _UnsureError(Exception):
    """Something that cannot be looked into."""


def fingerprint(model: torch.nn.Module, *others: Any) -> Fingerprint | None:
    """Computes one value for all that recording `model` with `others` (a loss, examples) depends on; None if
    that is not known.

    The values of the model's parameters and buffers do not matter, those of all other tensors do. It is made
    of descriptions, and keeps none of the values alive.
    """
    try:
        walk = _Walk(model)
        described = (_modes(), *(walk(value) for value in (model, *others)))
        hash(described)  # of a value whose class has no hash
    except Exception:  # user code runs in here: __reduce_ex__, properties of odd classes
        return None
    return described


def _modes() -> Fingerprint:
    """The settings of this thread and process that change what torch calls do."""
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled(),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
    )


class _Walk:
    """Describes values as nested tuples. What is met twice is told by its number the second time, so that
    what is shared (tied weights), and circles, are told from copies."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._met: dict[int, tuple[int, Any]] = {}  # the values are kept here, so that no id is used twice
        self._memory: dict[tuple[str, int], int] = {}
        self._own = {
            id(tensor)
            for part in model.modules()
            for tensors in (part._parameters, part._buffers)
            for tensor in tensors.values()
        }

    def __call__(self, value: Any) -> Fingerprint:
        kind = type(value)
        if kind in _PLAIN:
            return kind, value
        if kind in (float, complex):
            return kind, repr(value)  # nan equals itself, 0.0 not -0.0
        if kind in (tuple, torch.Size):
            return kind, tuple(map(self, value))
        known = self._met.get(id(value))
        if known is not None:
            return "again", known[0]
        self._met[id(value)] = (len(self._met), value)
        return self._described(value)

    def _described(self, value: Any) -> Fingerprint:
        match value:
            case _ if torchscript.is_torchscript(value):
                return self._script(value)
            case torch.nn.Module():
                return self._module(value)
            case torch.Tensor():
                return self._tensor(value)
            case type():
                return self._class(value)
            case types.FunctionType():
                return self._function(value)
            case types.MethodType():
                return "method", self(value.__self__), self(value.__func__)
            case types.BuiltinFunctionType():  # of a module, or bound to an object
                owner = value.__self__
                of = None if isinstance(owner, types.ModuleType) else self(owner)
                return "builtin", value.__module__, value.__name__, of
            case types.ModuleType():
                return "module", value.__name__
            case staticmethod() | classmethod():
                return type(value), self(value.__func__)
            case property():
                return "property", self(value.fget), self(value.fset), self(value.fdel)
            case weakref.ReferenceType():
                return "weak", self(value())
            case enum.Enum():
                return "enum", self(type(value)), value.name
            case types.CodeType():
                return value
        if isinstance(value, _DESCRIPTORS):
            return type(value), value.__name__
        return self._object(value)

    # --------------------------------------------------------------------------------------- torch

    def _module(self, module: torch.nn.Module) -> Fingerprint:
        attributes = vars(module)
        return (
            "nn.Module",
            self(type(module)),
            tuple((name, self._entries(attributes[name])) for name in _REGISTERS),
            tuple(
                # Recording sets the mode of all modules itself. Hooks are numbered by a counter.
                (name, tuple(map(self, value.values())) if name.endswith("_hooks") else self(value))
                for name, value in sorted(attributes.items())
                if name not in _REGISTERS and name != "training"
            ),
        )

    def _entries(self, entries: dict[str, Any]) -> Fingerprint:
        return tuple((name, self(value)) for name, value in entries.items())

    def _tensor(self, tensor: torch.Tensor) -> Fingerprint:
        if tensor.layout is not torch.strided or type(tensor) not in (
            torch.Tensor,
            torch.nn.Parameter,
            torch.nn.Buffer,
        ):
            raise _UnsureError
        own = id(tensor) in self._own
        hooks = tuple(
            tuple(map(self, hooked.values())) for name in _HOOKS if (hooked := getattr(tensor, name, None))
        )
        looks = self._looks(tensor)
        return type(tensor), tensor.is_leaf, looks, hooks, None if own else _digest(tensor)

    def _looks(self, tensor: torch.Tensor) -> Fingerprint:
        return (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.device,
            tensor.requires_grad,
            self._memory_of(tensor),
        )

    def _memory_of(self, tensor: torch.Tensor) -> Fingerprint:
        address = tensor.untyped_storage().data_ptr()
        if not address:
            return None
        number = self._memory.setdefault((str(tensor.device), address), len(self._memory))
        return number, tensor.storage_offset()

    def _script(self, script: Any) -> Fingerprint:
        code, constants, tensors = torchscript.contents(script)
        return (
            "script",
            code,
            tuple(map(_digest, constants)),
            tuple(
                (name, self._looks(tensor)) for name, tensor in tensors
            ),  # a copy's parameters are plain tensors
        )

    # -------------------------------------------------------------------------------------- Python

    def _class(self, kind: type) -> Fingerprint:
        if is_library(kind.__module__):
            return kind
        members = [(name, value) for name, value in vars(kind).items() if name not in _NO_BEHAVIOUR]
        return (
            "class",
            kind.__module__,
            kind.__qualname__,
            tuple(map(self, kind.__bases__)),
            tuple((name, self(value)) for name, value in members),
        )

    def _function(self, function: types.FunctionType) -> Fingerprint:
        library = is_library(function.__globals__.get("__name__", ""))
        return (
            "function",
            function.__code__,
            self(function.__defaults__),
            self._entries(function.__kwdefaults__ or {}),
            tuple(map(self._cell, function.__closure__ or ())),
            self._entries(function.__dict__),
            () if library else tuple(self._globals(function.__code__, function.__globals__)),
        )

    def _cell(self, cell: types.CellType) -> Fingerprint:
        try:
            return self(cell.cell_contents)
        except ValueError:
            return "empty"

    def _globals(self, code: types.CodeType, known: dict[str, Any]) -> Iterable[Fingerprint]:
        """What the global names in `code` stand for; of modules that are no library the attributes it may
        mean."""
        names, attributes = _names_in(code)
        for name in names:
            if name in known:
                yield name, self._attributes(known[name], attributes)

    def _attributes(self, value: Any, names: tuple[str, ...]) -> Fingerprint:
        if not isinstance(value, types.ModuleType) or is_library(value.__name__):
            return self(value)
        if id(value) in self._met:
            return "again", self._met[id(value)][0]
        number = len(self._met)
        self._met[id(value)] = (number, value)
        described = [
            (name, self._attributes(found, names)) for name in names if (found := vars(value).get(name))
        ]
        del self._met[id(value)]  # another function may mean other attributes of it
        self._met[id(described)] = (number, described)
        return "module", value.__name__, tuple(described)

    def _object(self, value: Any) -> Fingerprint:
        """Containers, and whatever says what it is made of, as for a copy."""
        kind = type(value)
        attributes = getattr(value, "__dict__", {})  # first: asking for them may make an empty dict
        if isinstance(value, set | frozenset):
            items: Fingerprint = frozenset(map(self, value))
        elif isinstance(value, dict):
            items = tuple((self(key), self(item)) for key, item in value.items())
        elif isinstance(value, list):
            items = tuple(map(self, value))
        else:
            made = value.__reduce_ex__(4)  # raises for what has no parts: locks, files, sockets
            parts = (made,) if isinstance(made, str) else made
            items = tuple(self(tuple(part) if hasattr(part, "__next__") else part) for part in parts)
        return self(kind), items, self._entries(attributes)


def _digest(tensor: torch.Tensor) -> str:
    """What stands for the values of `tensor`."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that `code` (and what is defined in it) reads as globals, and those it may read as
    attributes."""
    found: dict[str, None] = {}
    attributes = dict.fromkeys(code.co_names)
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found[instruction.argval] = None
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names, others = _names_in(inner)
            found.update(dict.fromkeys(names))
            attributes.update(dict.fromkeys(others))
    return tuple(found), tuple(attributes)
