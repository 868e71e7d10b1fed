"""Packages that only some jobs need: imported by these jobs, and installed with an extra (see
pyproject.toml)."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, Final

from planrt.errors import MissingPackageError

_PACKAGES: Final = {"sklearn": "scikit-learn", "prometheus_client": "prometheus-client"}
"""Module -> the package that brings it, where they are called differently."""


def needed(module: str, *, by: str, extra: str = "run") -> Any:
    """Imports `module`, which `by` needs, and which ``pip install 'planrt[extra]'`` brings; returns it.

    Raises:
        MissingPackageError: it is not installed, or fails while it is imported; says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        absent = (error.name or module).partition(".")[0] == module.partition(".")[0]
        raise _missing(module, by, extra, "" if absent else f" (importing it failed: {error})") from error


def check_installed(*modules: str, by: str, extra: str = "run") -> None:
    """Sees that `needed` will find `modules`, without the time that importing them takes.

    Raises:
        MissingPackageError: one is not installed.
    """
    for module in modules:
        if module not in sys.modules:
            found = any(finder.find_spec(module, None) is not None for finder in sys.meta_path)
        else:
            found = sys.modules[module] is not None
        if not found:
            raise _missing(module, by, extra)


def _missing(module: str, by: str, extra: str, why: str = "") -> MissingPackageError:
    top = module.partition(".")[0]
    return MissingPackageError(
        f"{by} needs the package {_PACKAGES.get(top, top)}{why}: pip install 'planrt[{extra}]'", name=top
    )
