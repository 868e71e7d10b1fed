"""Warnings that come up while something is recorded: each once, with the user's line.

Recording runs a function several times, and torch warns from inside planrt's own calls of it. So a warning
would be shown up to six times, each naming a file of planrt.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from planrt.plans.ir.source import is_users, user_line

_Told = dict[tuple[str, type[Warning], str, int], Warning | str]


class _Collecting(threading.local):
    told: _Told | None = None
    quiet = False


_collecting = _Collecting()
_registries: dict[str, dict[Any, Any]] = {}
"""For each file what was shown: Python's default is to show a warning of a line once."""


@contextmanager
def told_once() -> Iterator[None]:
    """Collects the warnings of this thread, and issues each once where it ends. Also a decorator."""
    if _collecting.told is not None:
        yield
        return
    thread, told = threading.get_ident(), dict[Any, Any]()
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def collect(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            *rest: Any,
            **more: Any,
        ) -> None:
            if threading.get_ident() != thread:
                shown(message, category, filename, lineno, *rest, **more)
            elif not _collecting.quiet:
                line = None if is_users(filename) else user_line()
                if line is not None:
                    filename, _, number = line.rpartition(":")
                    lineno = int(number)
                told.setdefault((str(message), category, filename, lineno), message)

        warnings.showwarning = collect
        warnings.simplefilter("always")
        _collecting.told = told
        try:
            yield
        finally:
            _collecting.told = None
    for (_, category, filename, lineno), message in told.items():
        warnings.warn_explicit(
            message, category, filename, lineno, registry=_registries.setdefault(filename, {})
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings of this thread that `told_once` would tell are not told: of sizes that nobody asked for."""
    before, _collecting.quiet = _collecting.quiet, True
    try:
        yield
    finally:
        _collecting.quiet = before
