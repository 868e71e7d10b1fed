"""Names that are imported when they are first asked for: a command that lists plans loads no torch."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def names_of(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Makes the ``__getattr__`` of a package: `homes` says in which module each of its public names is (PEP
    562)."""

    def look_up(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(home), name)
        vars(sys.modules[package])[name] = value
        return value

    return look_up


class AliasFinder(MetaPathFinder, Loader):
    """Finds modules that have no file, and look their names up in others. Subclasses say which there are, and
    make them.

    The class's own module is its identity: `install` takes out the finder that the same module put in before.
    """

    packages = False
    """Whether there are modules below these."""

    @abstractmethod
    def origin_of(self, fullname: str) -> str | None:
        """Returns what the spec of module `fullname` names as its origin; None where the finder has no such
        module."""

    @abstractmethod
    def make(self, fullname: str) -> ModuleType:
        """Returns the module, which looks its names up when they are asked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of a module that `origin_of` knows; None for any other."""
        origin = self.origin_of(fullname)
        return None if origin is None else ModuleSpec(fullname, self, origin=origin, is_package=self.packages)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Makes the module; see `make`."""
        return self.make(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: there is no code to run."""

    def install(self) -> None:
        """Finds these modules from here on, where nobody else finds any."""
        mine = type(self).__module__
        sys.meta_path[:] = [*(one for one in sys.meta_path if type(one).__module__ != mine), self]
