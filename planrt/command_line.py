"""What planrt's commands share: option types, one-line errors and exit codes.

Exit codes: 0 done or stopped as asked, 1 failed, 2 wrong options, 130 interrupted (Ctrl-C), 143 terminated.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from planrt.deadlines import MOST_SECONDS
from planrt.errors import OptionError, PlanrtError
from planrt.shown import shown
from planrt.stopping import in_order, said, signalled

FAILED, WRONG_OPTIONS, INTERRUPTED, TERMINATED = 1, 2, 130, 143


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text; it takes no abbreviations."""

    def __init__(self, *, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Ends the command with exit code 2."""
        message = message if message.isprintable() else shown(message)
        self.exit(WRONG_OPTIONS, f"{self.prog}: error: {message} (--help lists the options)\n")


def whole_number(*, at_least: int, at_most: int = 2**63 - 1) -> Callable[[str], int]:
    """Makes an option type for argparse: an integer within bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if not at_least <= value <= at_most:
            open_end = at_most == 2**63 - 1 and value < at_least
            bounds = f"at least {at_least}" if open_end else f"from {at_least} to {at_most}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {value}")
        return value

    return parse


def tag(text: str) -> str:
    """Parses an option of argparse: a tag such as ``#patients``. One without ``#`` no release rule is ever about."""
    if not re.fullmatch(r"#\S+", text):
        raise argparse.ArgumentTypeError(f"a tag is written as #patients, got {text!r}")
    return text


def positive_number(text: str) -> float:
    """Parses an option of argparse: a finite number above zero."""
    value = _number(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def seconds(*, at_most: float = MOST_SECONDS, or_none: bool = False) -> Callable[[str], float]:
    """Makes an option type for argparse: a number of seconds above 0 and within a bound; `or_none` takes 0, too."""
    least = "from 0" if or_none else "above 0"

    def parse(text: str) -> float:
        value = _number(text)
        if not (0 < value <= at_most or (or_none and value == 0)):
            raise argparse.ArgumentTypeError(
                f"must be a number of seconds {least} and of at most {at_most:,.0f}, got {text}"
            )
        return value

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def run_command(name: str, action: Callable[[], None], *, verbose: bool) -> int:
    """Runs `action` and turns its end into an exit code; errors meant for users become one line on stderr.

    Ctrl-C and SIGTERM raise KeyboardInterrupt and SystemExit in the main thread, so that `finally` blocks and context
    managers clean up; `planrt.stopping` sees that this does not take long. With `verbose` errors show their traceback.
    """
    with in_order(name):
        try:
            action()
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # the reader of our output went away, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except Exception as error:
            if (number := signalled()) is not None:  # it came of the end
                print(f"{name}: {said(number)}", file=sys.stderr)
                return 128 + number
            if not isinstance(error, PlanrtError | OSError):
                raise
            if verbose:
                traceback.print_exc()
            print(f"{name}: error: {one_line(error)}", file=sys.stderr)
            return WRONG_OPTIONS if isinstance(error, OptionError) else FAILED
    return 0


def stopped_by() -> str:
    """Returns what stops this process: Ctrl-C, or a signal where that is ignored, as in a job in the
    background of a script."""
    return "Ctrl-C" if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else f"kill {os.getpid()}"


def leave(code: int) -> NoReturn:
    """Ends the process at once, without waiting for a computation on another thread.

    Taking torch apart in an orderly way takes a second or more of what others could compute in.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def one_line(error: BaseException) -> str:
    """Returns the words of `error` on a single line."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Returns the first line of what `error` says: torch's errors go on for many."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
