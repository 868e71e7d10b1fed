"""Files that hold secrets: for their owner only, written whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from planrt.errors import OptionError

TOKEN_VARIABLE = "PLANRT_TOKEN"  # noqa: S105 - the name of an environment variable
"""Where commands find a token that no option names a file for."""


def read_secret(path: str | Path) -> str:
    """The text of a file that nobody but its owner may read.

    Raises:
        OptionError: it cannot be read, or others may read it or write to it.
    """
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise OptionError(f"{path} cannot be read: {why}") from None
    if os.name == "posix" and mode & 0o077:
        raise OptionError(f"others may read {path}, or write to it: chmod 600 {path}")
    return text


def write_secret(path: str | Path, text: str, *, replace: bool = False) -> None:
    """Writes a file for its owner only, whole or not at all. Where `path` is a link, what it points to is replaced: a
    worker may read that by its own name.

    Raises:
        OptionError: it cannot be written, or it is there and is not to be replaced.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise OptionError(f"{path} is there already")
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(
            os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
        ) as file:
            file.write(text)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OptionError(f"{path} cannot be written: {error.strerror}") from None


def token_from(path: str | Path | None) -> str:
    """The token in a file, or else in the environment (`PLANRT_TOKEN`), or ``""``.

    Raises:
        OptionError: as `read_secret`, or the file is empty.
    """
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    token = read_secret(path).strip()
    if not token or "\n" in token:
        raise OptionError(f"{path} holds no token: it has one line, the token")
    return token
