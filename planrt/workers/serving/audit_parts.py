"""The files of an audit log, one chain of lines over all of them: ``audit.jsonl.1``, ``audit.jsonl.2``, ..., and the
newest lines in ``audit.jsonl``.

A file that is full gets the next number, and a new one goes on after it: its first line, `CONTINUED`, has the hash of
the last line there and says which file that was. Nothing of a chain is lost where the process ends in between::

    1. the new file is written, as audit.jsonl.new;    it is no part of the chain, and is made again
    2. audit.jsonl.N becomes another name of the full one;    both are the same file, which counts once
    3. the new one takes the name audit.jsonl, in one step.

So there is an ``audit.jsonl`` at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from planrt.chained import FIRST, ChainError, Link, links, sealed, write_whole
from planrt.errors import OptionError
from planrt.shown import shown

CONTINUED: Final = "continued"
"""The event of the first line of a file that goes on after another one."""
SIZE: Final = 256 << 20
"""Bytes of a file, about, before the next one is begun."""
LEAST_SIZE: Final = 1 << 16
_LONGEST: Final = 1 << 20
"""Bytes of a line, at most."""


def check_size(size: object) -> int:
    """Returns the bytes after which a file is full.

    Raises:
        OptionError: that is no whole number of 64 KiB or more.
    """
    if type(size) is not int or size < LEAST_SIZE:
        raise OptionError(
            f"audit_size (--audit-size) must be a whole number of bytes, at least 64 KiB: got {size!r}"
        )
    return size


def numbered(path: Path) -> dict[int, Path]:
    """Returns the full files of a log, by their numbers, the oldest first. One that is still the newest is none of
    them."""
    found = {}
    pattern = re.compile(re.escape(path.name) + r"\.([1-9][0-9]{0,8})")
    for one in path.parent.iterdir():
        match = pattern.fullmatch(one.name)
        if match and not (path.exists() and one.samefile(path)):
            found[int(match[1])] = one
    return dict(sorted(found.items()))


def parts(path: Path) -> list[Path]:
    """Returns all files of a log, in their order.

    Raises:
        ChainError: one is missing; names it.
    """
    full = numbered(path)
    for wanted, number in enumerate(full, 1):
        if number != wanted:
            raise ChainError(f"{path}.{wanted}: the file is missing, and {full[number].name} is there")
    return [*full.values(), path]


def entries(path: str | Path) -> Iterator[tuple[Path, Link]]:
    """Returns the lines of an audit log, the oldest first, each with the file that it is in.

    Raises:
        OptionError: it cannot be read. ChainError: at the first line that is not what it should be, or where a file is
            missing.
    """
    head, before = FIRST, None
    try:
        for one in parts(Path(path)):
            with open(one, "rb") as file:
                for link in links(_checked(file, one, before), str(one), previous=head):
                    head = link.hash
                    yield one, link
            before = one
    except OSError as error:
        raise OptionError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None


def _checked(lines: Iterable[bytes], path: Path, before: Path | None) -> Iterator[bytes]:
    for number, line in enumerate(lines):
        if not number:
            check_goes_on(path, line, before)
        yield line


def check_goes_on(path: Path, line: bytes, before: Path | None) -> None:
    """Raises ChainError where a file's first line names another file than `before` to go on after; the hashes show the
    rest."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return
    if not isinstance(said, dict) or said.get("event") != CONTINUED:
        return
    after = str(said.get("after"))
    if before is None or after != before.name:
        raise ChainError(
            f"{path}, line 1: it goes on after {shown(after, 100)}, which is missing or not the file before it"
        )


def begun_after(path: Path) -> tuple[str, Path | None]:
    """Returns the hash of the last line before those of the newest file, and the file that has it."""
    full = numbered(path)
    if not full:
        return FIRST, None
    last = full[max(full)]
    with open(last, "rb") as file:
        file.seek(max(0, last.stat().st_size - _LONGEST))
        lines = file.read().splitlines()
    return hashlib.sha256(lines[-1]).hexdigest() if lines else FIRST, last


def turn(path: Path, facts: Mapping[str, Any], head: str) -> None:
    """Gives the full file its number, and begins the next one after its last line, of the hash `head`. Who calls it has
    a lock on the full file.

    Raises:
        OSError: it cannot be done; the full file is the newest one, as before.
    """
    for one in path.parent.glob(f"{path.name}.*"):  # of a process that ended in between
        if one.is_file() and one.samefile(path):
            one.unlink()
    last = max(numbered(path), default=0) + 1
    full, new = path.with_name(f"{path.name}.{last}"), path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    line, _ = sealed({**facts, "event": CONTINUED, "after": full.name}, head)
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        write_whole(file, line)
        os.fsync(file)
    finally:
        os.close(file)
    os.link(path, full)
    os.replace(new, path)
