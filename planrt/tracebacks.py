"""Tracebacks of planrt's errors as users are shown them: their own lines, and not the way through planrt.

What went wrong, and where on a worker, is in the error's words; the frames between the user's line and these
words are planrt's, torch's and asyncio's. Notebooks ask an error how it wants to be shown, scripts ask
`sys.excepthook`. Nothing is taken from the error itself: debuggers, loggers and test runners see every frame.
``PLANRT_FULL_TRACEBACK=1`` in the environment shows all of them everywhere.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import TracebackType

VARIABLE = "PLANRT_FULL_TRACEBACK"
"""Set to anything but an empty text or 0, it shows whole tracebacks."""


def full_wanted() -> bool:
    """Returns whether the user asked for whole tracebacks."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def short(error: BaseException, name_line: Callable[[str], str] | None = None) -> list[str]:
    """Returns the lines of `error`'s traceback with the frames of the user's code only.

    A cause that has no frame of the user's is left out; what it said is in the words of `error`. `name_line`
    gives the place ``file:line`` another name, as notebooks do with their cells.
    """
    shown = traceback.TracebackException.from_exception(error)
    _shorten(shown)
    if name_line is None:
        return "".join(shown.format()).splitlines()
    lines = [f"{type(error).__name__}: Traceback (most recent call last)"] if shown.stack else []
    for frame in shown.stack:
        lines.append(f"{name_line(f'{frame.filename}:{frame.lineno}')}")
        lines += [f"    {frame.line}"] if frame.line else []
    return lines + "".join(shown.format_exception_only()).splitlines()


def _shorten(shown: traceback.TracebackException) -> None:
    kept = [frame for frame in shown.stack if not _internal(frame.filename)]
    if kept:  # an error that never met the user's code shows all of it
        shown.stack = traceback.StackSummary.from_list(kept)
    for name in ("__cause__", "__context__"):
        before: traceback.TracebackException | None = getattr(shown, name)
        if before is None:
            continue
        if all(_internal(frame.filename) for frame in before.stack):
            setattr(shown, name, None)
        else:
            _shorten(before)


def _internal(filename: str) -> bool:
    return filename.startswith(_folders())


_LIBRARIES = "torch", "websockets", "IPython"


def _folders() -> tuple[str, ...]:
    return _folders_of(
        *[name for name in _LIBRARIES if name in sys.modules]
    )  # more may be loaded at the next error


@lru_cache
def _folders_of(*loaded: str) -> tuple[str, ...]:
    files = [sys.modules[name].__file__ for name in loaded]
    homes = [Path(file).parent for file in (asyncio.__file__, concurrent.futures.__file__, *files) if file]
    homes.append(Path(__file__).parent)
    return (contextlib.__file__, "<frozen ", "uvloop/", *(f"{home}{os.sep}" for home in homes))


def install() -> None:
    """Uncaught errors of planrt in scripts show the short form, unless a hook of somebody else's is there
    already."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _hook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if full_wanted() or not hasattr(error, "_render_traceback_"):
        sys.__excepthook__(kind, error, trace)
        return
    print("\n".join(short(error)), file=sys.stderr)


def rendered(error: BaseException) -> list[str]:
    """Returns the lines that a notebook shows of `error`."""
    if full_wanted():
        return "".join(traceback.format_exception(error)).splitlines()
    return short(error, place_shown)


def shorten(error: BaseException) -> None:
    """Has an error of another class than planrt's shown as those are: torch's, about what the user gave a
    pointer."""
    error._render_traceback_ = _rendered_now  # type: ignore[attr-defined]


def _rendered_now() -> list[str]:
    """Of the error that is being shown: one that held on to itself would keep every tensor of its frames."""
    error = sys.exception() or getattr(sys, "last_value", None)
    return rendered(error) if error is not None else []


def number_of(line: str) -> int:
    """Returns the number in ``file:line``."""
    number = line.rpartition(":")[2]
    return int(number) if number.isdecimal() else 0


def place_shown(line: str) -> str:
    """``file:line``, or in a notebook the cell, as its own tracebacks name it."""
    file = line.rpartition(":")[0]
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    named = getattr(getattr(shell, "compile", None), "format_code_name", lambda name: None)(file)
    return f"{' '.join(named)}, line {number_of(line)}" if named else line
