"""``import planrt.compat``: from there on ``import syft as sy`` and PySyft 0.2's module paths give planrt's
names.

For scripts that cannot be edited; others write ``import planrt as sy``. The modules are made of one table,
`planrt.compat_names`. A name that planrt has not raises an error that says what to write instead. Nothing is
imported before it is asked for.

Raises:
    ImportError: a real PySyft is installed or imported: planrt does not take its place.
"""

from __future__ import annotations

import difflib
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from planrt.compat_names import BY_OLD, MODULES
from planrt.errors import UnknownNameError
from planrt.lazy import AliasFinder

_ROOT = "syft"
_ORIGIN = "planrt.compat"


class _Alias(ModuleType):
    """A module of PySyft 0.2, with planrt's names in it."""

    def __getattr__(self, name: str) -> Any:
        full = f"{self.__name__}.{name}"
        row = BY_OLD.get(full)
        if name.startswith("__") and row is None:
            # `inspect` asks every module in the process, at each frame that it shows: no place to look for near names.
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if full in MODULES:
            value: Any = import_module(full)
        elif row is not None and row.new:
            value = resolve(row.new)
        elif self.__name__ == _ROOT and row is None and not name.startswith("_") and _in_planrt(name):
            value = getattr(import_module("planrt"), name)
        else:
            raise UnknownNameError(_missing(full))
        if row is None or row.new not in ("planrt.hook", "planrt.local_worker"):
            self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        prefix = f"{self.__name__}."
        every = [*MODULES, *(old for old, row in BY_OLD.items() if row.new)]
        inside = {old.removeprefix(prefix) for old in every if old.startswith(prefix)}
        return sorted({name for name in inside if "." not in name} | set(self.__dict__))


class _Finder(AliasFinder):
    """Finds the modules of the table, and says of others below ``syft`` what to write instead."""

    packages = True

    def origin_of(self, fullname: str) -> str | None:
        """Says that a module of 0.2 is planrt's; None for any other name.

        Raises:
            ImportError: a name below ``syft`` that planrt has not.
        """
        if fullname not in MODULES and fullname.startswith(f"{_ROOT}."):
            raise ImportError(_missing(fullname), name=fullname)
        return _ORIGIN if fullname in MODULES else None

    def make(self, fullname: str) -> ModuleType:
        """Returns an empty module, which looks names up when they are asked for."""
        return _Alias(fullname, f"PySyft 0.2's {fullname}, as planrt has it: see planrt.compat.")

    def exec_module(self, module: ModuleType) -> None:
        """Names what ``from syft import *`` gives, and nothing else."""
        prefix = f"{module.__name__}."
        module.__dict__["__all__"] = [
            old.removeprefix(prefix)
            for old, row in BY_OLD.items()
            if row.new and old.startswith(prefix) and old.count(".") == prefix.count(".")
        ]


def resolve(new: str) -> Any:
    """Returns the object that a name of the table's right side stands for, such as
    ``planrt.PointerTensor.get``."""
    parts = new.split(".")
    value: Any = import_module(parts[0])
    for count, part in enumerate(parts[1:], start=2):
        if not hasattr(value, part) and isinstance(value, ModuleType):
            import_module(".".join(parts[:count]))
        value = getattr(value, part)
    return value


def _in_planrt(name: str) -> bool:
    return name in dir(import_module("planrt"))


def _missing(full: str) -> str:
    row = BY_OLD.get(full)
    if row is not None:
        return f"planrt has no {full}: {row.note}" if not row.new else f"{full} is no module: it is {row.new}"
    module, _, name = full.rpartition(".")
    near = difflib.get_close_matches(name, [old.rpartition(".")[2] for old in BY_OLD], n=1)
    places = sorted((old for old in BY_OLD if near and old.endswith(f".{near[0]}")), key=len)
    hint = f"the nearest name is {places[0]}" if places else "MIGRATION.md lists the names of PySyft 0.2"
    return f"planrt.compat has no {name!r} in {module}: {hint}"


def _install() -> None:
    there = sys.modules.get(_ROOT)
    if there is not None and getattr(there.__spec__, "origin", None) == _ORIGIN:
        return
    if there is not None or PathFinder.find_spec(_ROOT) is not None:
        raise ImportError(
            "a PySyft is installed here, and planrt.compat does not take its place: uninstall it (pip uninstall syft), "
            "or write `import planrt as sy` and see MIGRATION.md",
            name=_ROOT,
        )
    _Finder().install()


_install()
