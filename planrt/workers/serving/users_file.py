"""The file of a worker's users: a line ``name: what proves it`` each, and lines that begin with ``#``.

What proves a user is a `planrt.workers.wire.proofs.Verifier` in words, which `planrt users add` writes: the token
itself is in no file. Lines ``name: token``, as they were written before, are read as well.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from planrt.errors import OptionError
from planrt.workers.serving.secret_files import read_secret, write_secret
from planrt.workers.wire.proofs import Verifier, check_strength, is_verifier


@dataclass(frozen=True, slots=True, repr=False)
class UsersFile:
    """What such a file says. Its lines hold secrets, so it shows none."""

    path: Path
    lines: tuple[str, ...]
    users: dict[str, str]
    """Name -> what proves it."""

    @property
    def in_clear(self) -> list[str]:
        """Users whose tokens themselves are in the file."""
        return [name for name, text in self.users.items() if not is_verifier(text)]


def read(path: str | Path) -> UsersFile:
    """Reads a file of users.

    Raises:
        OptionError: it cannot be read, others may read or write it, or a line is none or has a token that is easy to
            guess; names the line, and shows no token.
    """
    path = Path(path)
    lines = read_secret(path).splitlines()
    users: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, proof = (part.strip() for part in line.partition(":"))
        if not colon or not name or not proof or name in users:
            raise OptionError(f"{path}, line {number}: write `name: token`, each name once")
        try:
            _check_name(name)
            if is_verifier(proof):
                Verifier.parse(proof)
            else:
                check_strength(name, proof)
        except OptionError as error:
            raise OptionError(f"{path}, line {number}: {error}") from None
        users[name] = proof
    return UsersFile(path, tuple(lines), users)


_SETTLES = 0.1
"""Seconds for which a changed file has to stay as it is."""


class WatchedUsers:
    """A file of users that its owner may change while a worker runs. A broken one counts as no change.

    Args:
        path: the file.

    Raises:
        OptionError: as `read`.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._seen = _look(self._path)
        self.users = read(path).users
        """As the file had them last, when it was whole."""

    def changed(self) -> dict[str, str] | None:
        """Returns the users that there are now, if the file has others than before; None if not. It is read when its
        time, size or place on the disk is another, and has been for a tenth of a second: many editors empty a file
        before they write it, and users who are not there for a moment would lose their sessions. Takes that tenth.

        Raises:
            OptionError: it has changed, and cannot be used: the users before count on. Told once for each change.
        """
        now = _look(self._path)
        if now == self._seen:
            return None
        time.sleep(_SETTLES)
        if _look(self._path) != now:
            return None
        self._seen = now
        users = read(self._path).users
        if users == self.users:
            return None
        self.users = users
        return users


def _look(path: Path) -> tuple[int, ...]:
    try:
        about = path.stat()
    except OSError:
        return ()
    return about.st_mtime_ns, about.st_size, about.st_ino, about.st_mode


def add(path: str | Path, name: str, token: str) -> None:
    """Adds a user who has that token, in a new file if there is none.

    Raises:
        OptionError: the user is there already, the name or the token will not do, or as `read`.
    """
    _check_name(name)
    check_strength(name, token)
    path = Path(path)
    found = read(path) if path.exists() else UsersFile(path, ("# planrt users",), {})
    if name in found.users:
        raise OptionError(f"{path} has a user {name!r}: remove that one first")
    _write(path, [*found.lines, _line(name, token)])


def remove(path: str | Path, name: str) -> None:
    """Removes a user.

    Raises:
        OptionError: there is none of that name, or as `read`.
    """
    found = read(path)
    if name not in found.users:
        raise OptionError(f"{path} has no user {name!r}")
    _write(found.path, [line for line in found.lines if not _is_of(line, name)])


def convert(path: str | Path) -> list[str]:
    """Puts what proves it in the place of every token that is in the file; returns whose these were.

    Raises:
        OptionError: as `read`.
    """
    found = read(path)
    lines = list(found.lines)
    for name in found.in_clear:
        number = next(number for number, line in enumerate(lines) if _is_of(line, name))
        lines[number] = _line(name, found.users[name])
    _write(found.path, lines)
    return found.in_clear


def _line(name: str, token: str) -> str:
    return f"{name}: {Verifier.of(token)}"


def _is_of(line: str, name: str) -> bool:
    return not line.startswith("#") and line.partition(":")[0].strip() == name


def _check_name(name: str) -> None:
    if (
        not (1 <= len(name) <= 200 and name.isprintable() and name == name.strip())
        or ":" in name
        or name[0] == "#"
    ):
        raise OptionError(f"{name!r:.80} is no name of a user: write a short text without a colon")


def _write(path: Path, lines: Sequence[str]) -> None:
    write_secret(path, "\n".join(lines) + "\n", replace=True)
