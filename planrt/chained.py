"""Records that only grow: JSON lines, each with the SHA-256 of the line before.

A line is a JSON object with the key ``previous``: 64 hex digits, the SHA-256 of the line before without its newline,
zeros for the first. So a line that was changed, removed or put in between later shows. The last lines can be cut off
unseen by who reads the file alone, and who may write the file may write a new one: the hash of the last line stands for
the whole, and a copy of it elsewhere shows that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from planrt.errors import LocalError
from planrt.shown import hidden

FIRST: Final = "0" * 64
"""What the first line has in place of a hash."""


class ChainError(LocalError):
    """A line is not what it should be; the message names the first one."""


class Link(NamedTuple):
    """One line: its number, from 1; what it says, without ``previous``; and its own hash."""

    number: int
    values: dict[str, Any]
    hash: str


def finite(value: Any) -> Any:
    """Returns plain values with None in place of numbers that JSON has no word for: the loss of a run that diverged, or
    of a worker whose loss nobody knows. Python alone would read what `json` writes of them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def sealed(values: Mapping[str, Any], previous: str) -> tuple[bytes, str]:
    """Returns the line that says `values` after one of the hash `previous`, with its newline; and its own hash.

    Names in it are others': what cannot be seen is written as JSON's escapes, as files are also looked at as they are.
    Numbers that are not `finite` are null.
    """
    text = json.dumps(finite({**values, "previous": previous}), ensure_ascii=False, allow_nan=False)
    if not (text.isascii() and text.isprintable()):
        text = "".join(json.dumps(char)[1:-1] if hidden(char) else char for char in text)
    line = text.encode()
    return line + b"\n", hashlib.sha256(line).hexdigest()


def links(
    lines: Iterable[bytes], where: str, *, what: str = "an entry", previous: str = FIRST, first: int = 1
) -> Iterator[Link]:
    """Returns the entries of a record, the oldest first. `lines` have their newlines, as those of a file have.

    Raises:
        ChainError: at the first line that is not what it should be; `where` and the line's number begin it.
    """
    for number, line in enumerate(lines, first):
        if not line.endswith(b"\n"):
            raise ChainError(
                f"{where}, line {number}: it is not complete: who wrote it was stopped half-way, as by a power cut, "
                "or it was cut since; where the former is so, remove this line, and do again what it was about"
            )
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise ChainError(f"{where}, line {number}: not JSON") from None
        if not isinstance(values, dict) or "previous" not in values:
            raise ChainError(f"{where}, line {number}: not {what}")
        if values.pop("previous") != previous:
            raise ChainError(
                f"{where}, line {number}: the chain is broken: this line or the one before was changed"
            )
        previous = hashlib.sha256(line[:-1]).hexdigest()
        yield Link(number, values, previous)


def write_whole(file: int, data: bytes) -> None:
    """Writes `data` at the end of an open file, all of it or nothing.

    Raises:
        OSError: it cannot be written, or the disk is full.
    """
    size = os.fstat(file).st_size
    written = os.write(file, data)
    if written != len(data):
        os.ftruncate(file, size)
        raise OSError(f"only {written} of {len(data)} bytes were written (disk full?)")
