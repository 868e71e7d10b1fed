"""Who a row is about: the values of its id columns, normalised, as bytes that mean the same in every table."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, get_args

import numpy as np

from planrt.errors import DataError, OptionError

Normalisation = Literal["exact", "strip", "casefold", "alphanumeric"]


def _casefold(text: str) -> str:
    return unicodedata.normalize("NFKC", " ".join(unicodedata.normalize("NFKC", text).split()).casefold())


NORMALISATIONS: Final[dict[str, Callable[[str], str]]] = {
    "exact": lambda text: text,
    "strip": lambda text: unicodedata.normalize("NFC", text).strip(),
    "casefold": _casefold,
    "alphanumeric": lambda text: "".join(one for one in _casefold(text) if one.isalnum()),
}
"""Name -> what it makes of one value. ``exact``: nothing. ``strip``: without blanks at both ends (and in Unicode's
composed form). ``casefold``: also without case and with single blanks, compatible characters being the same (NFKC).
``alphanumeric``: also without anything but letters and digits."""

assert set(NORMALISATIONS) == set(get_args(Normalisation))  # noqa: S101


def normaliser(name: str) -> Callable[[str], str]:
    """Returns the normalisation of that name.

    Raises:
        OptionError: there is none.
    """
    if not isinstance(name, str) or name not in NORMALISATIONS:
        raise OptionError(f"normalise must be one of {', '.join(NORMALISATIONS)}, got {name!r}")
    return NORMALISATIONS[name]


def as_id(value: Any) -> str | None:
    """Returns a value of an id column as text; None where there is none. Whole numbers are the same however typed."""
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return None
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    text = str(value)
    return None if text in ("<NA>", "NaT") else text


def keys_of(columns: Sequence[tuple[str, Sequence[str]]], normalise: str, *, whose: str) -> list[bytes]:
    """Returns one key for each row: its values in these id columns, normalised, each with its length before it.

    Raises:
        DataError: a value that is empty once normalised, or two rows with one key; names `whose` and the columns, never
            a value. OptionError: an unknown normalisation.
    """
    change = normaliser(normalise)
    parts: list[list[bytes]] = []
    for name, values in columns:
        changed = [change(value).encode("utf-8", "surrogatepass") for value in values]
        empty = sum(not one for one in changed)
        if empty:
            raise DataError(
                f"{whose}: id column {name!r} has {empty} values of which {normalise!r} leaves nothing: every row "
                "needs an id"
            )
        parts.append(changed)
    keys = [b"".join(len(one).to_bytes(4, "big") + one for one in row) for row in zip(*parts, strict=True)]
    twice = len(keys) - len(set(keys))
    if twice:
        names = " and ".join(repr(name) for name, _ in columns)
        raise DataError(
            f"{whose}: id column {names} has {twice} duplicates under the normalisation {normalise!r}: a person is one "
            "row; drop or merge them, or take further columns into the id"
        )
    return keys


def order_of(keys: Sequence[bytes], seed: int) -> list[int]:
    """Returns the order in which all parties put these rows: by a hash of key and seed.

    It tells nothing: whoever has these keys can work it out, and it has nothing to do with the order in a table.
    """
    salt = b"planrt aligned rows" + seed.to_bytes(8, "big")
    hashed = [hashlib.sha256(salt + key).digest() for key in keys]
    return sorted(range(len(keys)), key=hashed.__getitem__)
