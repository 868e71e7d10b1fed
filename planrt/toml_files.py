"""Files of an owner in TOML: policies, and who may do what. What is wrong in one is told with its line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from planrt.errors import OptionError

T = TypeVar("T")


def read_toml(path: str | Path, what: str, make: Callable[[Mapping[str, Any]], T]) -> T:
    """Returns what `make` makes of the values in a TOML file; `what` is the file's, in messages: "policy", say.

    Raises:
        OptionError: not there, not TOML, or `make` raised one; names the file and, where one key by itself is what
            `make` does not take, its line.
    """
    try:
        text = Path(path).read_bytes().decode()
        values = tomllib.loads(text)
    except OSError as error:
        raise OptionError(f"{what} {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # what is no TOML, no UTF-8, or no number that Python reads
        raise OptionError(f"{what} {path}: not TOML: {error}") from None
    try:
        return make(values)
    except OptionError as error:
        line = _line_of_fault(text, values, make)
        raise OptionError(f"{what} {path}{f', line {line}' if line else ''}: {error}") from None


def _line_of_fault(text: str, values: Mapping[str, Any], make: Callable[[Mapping[str, Any]], Any]) -> int:
    """Returns the line of the first key that is refused by itself, 0 where there is none: of an entry of its table, if
    that is what makes the difference.
    """
    for key, value in values.items():
        if not _refused(make, {key: value}):
            continue
        number, table = 0, value
        if isinstance(value, list):  # of tables, [[key]]
            number = next((at for at, one in enumerate(value) if _refused(make, {key: [one]})), 0)
            table = value[number] if value else None
        header = _line(text, rf"\[+\s*{_name(key)}\s*\]+", number)
        for entry in table if header and isinstance(table, dict) else ():
            left = {name: one for name, one in table.items() if name != entry}
            if not _refused(make, {key: [left] if isinstance(value, list) else left}):
                return _line(text, rf"{_name(entry)}\s*=", after=header) or header
        return header or _line(text, rf"{_name(key)}\s*[=.]")
    return 0


def _refused(make: Callable[[Mapping[str, Any]], Any], values: Mapping[str, Any]) -> bool:
    try:
        make(values)
    except OptionError:
        return True
    return False


def _name(key: str) -> str:
    return rf"(?:{re.escape(key)}|\"{re.escape(key)}\"|'{re.escape(key)}')"


def _line(text: str, pattern: str, number: int = 0, after: int = 0) -> int:
    """Returns the line, from 1, that begins with the pattern for the `number`-th time, 0 if none does."""
    found = [
        at for at, line in enumerate(text.splitlines(), 1) if at > after and re.match(rf"\s*{pattern}", line)
    ]
    return found[number] if number < len(found) else 0
