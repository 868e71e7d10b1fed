"""Who a row is about: the values of its id columns, normalised, as bytes that mean the same in every table."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, Literal, TypeVar, get_args

import numpy as np

from planrt.errors import DataError, OptionError
from planrt.sharing.columns.steps import Turn

T = TypeVar("T")
_SLICE: Final = 8192
"""Rows between two turns: some hundredths of a second."""

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
    return at_once(keys_in_turns(columns, normalise, whose=whose))


def keys_in_turns(
    columns: Sequence[tuple[str, Sequence[str]]], normalise: str, *, whose: str
) -> Generator[Turn, None, list[bytes]]:
    """Does what `keys_of` does, a slice of the rows at a time."""
    change = normaliser(normalise)
    keys: list[bytes] = []
    empty = [0] * len(columns)
    rows = len(columns[0][1])
    for start in range(0, rows, _SLICE):
        parts = []
        for place, (_, values) in enumerate(columns):
            changed = [
                change(value).encode("utf-8", "surrogatepass") for value in values[start : start + _SLICE]
            ]
            empty[place] += sum(not one for one in changed)
            parts.append(changed)
        keys += [
            b"".join(len(one).to_bytes(4, "big") + one for one in row) for row in zip(*parts, strict=True)
        ]
        yield Turn("ids normalised", len(keys), rows)
    for (name, _), count in zip(columns, empty, strict=True):
        if count:
            raise DataError(
                f"{whose}: id column {name!r} has {count} values of which {normalise!r} leaves nothing: every row "
                "needs an id"
            )
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
    return at_once(order_in_turns(keys, seed))


def order_in_turns(keys: Sequence[bytes], seed: int) -> Generator[Turn, None, list[int]]:
    """Does what `order_of` does, a slice of the rows at a time."""
    salt = b"planrt aligned rows" + seed.to_bytes(8, "big")
    hashed: list[bytes] = []
    for start in range(0, len(keys), _SLICE):
        hashed += [hashlib.sha256(salt + key).digest() for key in keys[start : start + _SLICE]]
        yield Turn("rows put in order", len(hashed), len(keys))
    return sorted(range(len(keys)), key=hashed.__getitem__)


def at_once(steps: Generator[Turn, None, T]) -> T:
    """Returns the result of steps that let others have their turn, without doing so."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
