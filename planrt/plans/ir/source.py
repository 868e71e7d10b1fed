"""Which line of the user's code is running: for error messages and for the lines that plans carry."""

from __future__ import annotations

import os
import sys
import sysconfig
from functools import lru_cache
from types import FrameType
from typing import cast

import torch

_PLANRT = os.path.dirname(os.path.abspath(sys.modules["planrt"].__file__ or "")) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_MODULE_FILE = torch.nn.Module._call_impl.__code__.co_filename
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep


@lru_cache(maxsize=4096)
def is_users(filename: str) -> bool:
    """Returns whether that file is the user's: not torch's, Python's or planrt's."""
    if filename.startswith((_PLANRT, _TORCH, "<frozen")):
        return False
    return not filename.startswith(_STDLIB) or "site-packages" in filename


def user_line() -> str | None:
    """``file:line`` of the innermost frame outside torch and planrt, below the tracer."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if is_users(code.co_filename):
            return f"{code.co_filename}:{frame.f_lineno}"
        if code.co_name == "run_once" and code.co_filename.startswith(_PLANRT):
            break  # what called the tracer is not part of what is traced
        frame = frame.f_back
    return None


def running_modules() -> list[torch.nn.Module]:
    """Returns the modules whose forward is running, innermost first, below the tracer."""
    found: list[torch.nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_call_impl" and code.co_filename == _MODULE_FILE:
            found.append(cast(torch.nn.Module, frame.f_locals["self"]))
        if code.co_name == "run_once" and code.co_filename.startswith(_PLANRT):
            break
        frame = frame.f_back
    return found


def called_by_user(through: str) -> bool:
    """Returns whether the innermost frame that is not in the file `through`, above the caller's caller, is
    the user's."""
    frame = sys._getframe(3)
    while frame.f_code.co_filename == through and frame.f_back is not None:
        frame = frame.f_back
    return is_users(frame.f_code.co_filename)


def frames_to_user() -> int:
    """Counts the frames from the caller up to the user's own code: a `stacklevel` for the caller's warnings,
    less 1."""
    frame, count = sys._getframe(1), 0
    while frame.f_back is not None and not is_users(frame.f_code.co_filename):
        frame, count = frame.f_back, count + 1
    return count


def line_of_error(error: BaseException) -> str | None:
    """``file:line`` of the innermost frame outside torch and planrt that `error` passed through."""
    line: str | None = None
    trace = error.__traceback__
    while trace is not None:
        if is_users(trace.tb_frame.f_code.co_filename):
            line = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return line
