"""Packages that only some jobs need: imported by these jobs, and installed with an extra (see pyproject.toml)."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from planrt.errors import MissingPackageError

_PACKAGES: Final = {"sklearn": "scikit-learn"}
"""Module -> the package that brings it, where they are called differently."""


def needed(module: str, *, by: str, extra: str = "run") -> Any:
    """Imports `module`, which `by` needs, and which ``pip install 'planrt[extra]'`` brings; returns it.

    Raises:
        MissingPackageError: it is not installed, or fails while it is imported; says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        missing = (error.name or top).partition(".")[0] == top
        why = "" if missing else f" (importing it failed: {error})"
        raise MissingPackageError(
            f"{by} needs the package {_PACKAGES.get(top, top)}{why}: pip install 'planrt[{extra}]'", name=top
        ) from error
