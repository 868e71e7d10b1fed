"""Who a row is about: the values of its id columns, normalised, as bytes that mean the same in every table."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import math
import unicodedata
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Final, Literal, TypeVar, get_args, overload

import numpy as np

from planrt.errors import DataError, OptionError
from planrt.sharing.columns.steps import Turn

T = TypeVar("T")
_SLICE: Final = 8192
"""Rows between two turns: some hundredths of a second."""
_EXACT: Final = 2.0**53
"""Floats of this size are whole numbers apart: their last digits may be lost."""

Normalisation = Literal["exact", "strip", "casefold", "alphanumeric"]


def _casefold(text: str) -> str:
    return unicodedata.normalize("NFKC", " ".join(unicodedata.normalize("NFKC", text).split()).casefold())


NORMALISATIONS: Final[dict[str, Callable[[str], str]]] = {
    "exact": lambda text: text,
    "strip": lambda text: unicodedata.normalize("NFC", text).strip(),
    "casefold": _casefold,
    "alphanumeric": lambda text: "".join(
        one for one in _casefold(text) if one.isalnum() or unicodedata.category(one)[0] == "M"
    ),
}
"""Name -> what it makes of one value. ``exact``: nothing. ``strip``: without blanks at both ends (and in Unicode's
composed form). ``casefold``: also without case and with single blanks, compatible characters being the same (NFKC).
``alphanumeric``: also without anything but letters (with the marks that belong to them: vowels, in many scripts) and
digits."""

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
    """Returns a value of an id column as text; None where there is none.

    The same is the same however it is typed: whole numbers, be they floats or decimals, have no fraction; a day, and a
    time that is midnight, is ``2026-01-31``; bytes are text in UTF-8.

    Raises:
        DataError: it is no id: a float so large that digits are missing, or bytes that are no text; tells no value.
    """
    if isinstance(value, str):
        return None if value in ("<NA>", "NaT") else value
    if value is None:
        return None
    if isinstance(value, np.datetime64):
        value = value.astype("datetime64[us]")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return _of_float(value)
    if isinstance(value, decimal.Decimal) and value.is_finite() and value == value.to_integral_value():
        return str(int(value))
    if isinstance(value, datetime.datetime):
        if value != value:  # as pandas has no time at all
            return None
        if value.tzinfo is None and value.time() == datetime.time():
            value = value.date()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise DataError("bytes that are no text in UTF-8") from None
    text = str(value)
    return None if text in ("<NA>", "NaT", "None", "NaN") else text  # pandas' and Decimal's nothing


def _of_float(value: float) -> str | None:
    if not math.isfinite(value):
        return None
    if not value.is_integer():
        return repr(value)
    if abs(value) >= _EXACT:
        raise DataError(
            "floats so large that digits are missing: have them read as text, or as whole numbers"
        )
    return str(int(value))


class Keys(Sequence[bytes]):
    """Keys of a table's rows, end to end in one block of memory: 8 bytes each besides what they hold."""

    def __init__(self, keys: Iterable[bytes] = ()) -> None:
        self._data = bytearray()
        self._ends = array("Q")
        self.extend(keys)

    def extend(self, keys: Iterable[bytes]) -> None:
        """Adds keys at the end."""
        for key in keys:
            self._data += key
            self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> bytes: ...
    @overload
    def __getitem__(self, place: slice) -> list[bytes]: ...
    def __getitem__(self, place: int | slice) -> bytes | list[bytes]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        end = self._ends[place]
        place %= len(self._ends)
        return bytes(self._data[self._ends[place - 1] if place else 0 : end])

    @property
    def nbytes(self) -> int:
        """The bytes that they take."""
        return len(self._data) + 8 * len(self._ends)


class Places:
    """Finds where a key is among some rows of a table: a table of hashes, 16 bytes for a row."""

    def __init__(self, keys: Sequence[bytes], rows: Iterable[int]) -> None:
        self._keys = keys
        self._rows = np.fromiter(rows, np.int64)
        hashes = np.fromiter((hash(keys[row]) for row in self._rows.tolist()), np.int64, len(self._rows))
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, key: bytes) -> int | None:
        """Returns which of the rows has this key: the place among `rows`; None if none has."""
        wanted = hash(key)
        at = int(np.searchsorted(self._hashes, wanted))
        while at < len(self._hashes) and self._hashes[at] == wanted:
            place = int(self._order[at])
            if self._keys[int(self._rows[place])] == key:
                return place
            at += 1
        return None


def keys_of(columns: Sequence[tuple[str, Sequence[str]]], normalise: str, *, whose: str) -> Keys:
    """Returns one key for each row: its values in these id columns, normalised, each with its length before it.

    Raises:
        DataError: a value that is empty once normalised, or two rows with one key; names `whose` and the columns, never
            a value. OptionError: an unknown normalisation.
    """
    return at_once(keys_in_turns(columns, normalise, whose=whose))


def key_of(values: Sequence[str], normalise: str) -> bytes:
    """Returns the key of a person, by the values of the id columns."""
    change = normaliser(normalise)
    return _joined([_encoded(change(value)) for value in values])


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _joined(parts: Sequence[bytes]) -> bytes:
    return b"".join(len(one).to_bytes(4, "big") + one for one in parts)


def keys_in_turns(
    columns: Sequence[tuple[str, Sequence[str]]], normalise: str, *, whose: str
) -> Generator[Turn, None, Keys]:
    """Does what `keys_of` does, a slice of the rows at a time."""
    change = normaliser(normalise)
    keys = Keys()
    empty = [0] * len(columns)
    rows = len(columns[0][1])
    for start in range(0, rows, _SLICE):
        parts = []
        for place, (_, values) in enumerate(columns):
            changed = [_encoded(change(value)) for value in values[start : start + _SLICE]]
            empty[place] += sum(not one for one in changed)
            parts.append(changed)
        keys.extend(map(_joined, zip(*parts, strict=True)))
        yield Turn("ids normalised", len(keys), rows)
    for (name, _), count in zip(columns, empty, strict=True):
        if count:
            raise DataError(
                f"{whose}: id column {name!r} has {count} values of which {normalise!r} leaves nothing: every row "
                "needs an id"
            )
    twice = _duplicates(keys)
    if twice:
        names = " and ".join(repr(name) for name, _ in columns)
        raise DataError(
            f"{whose}: id column {names} has {twice} duplicates under the normalisation {normalise!r}: a person is one "
            "row; drop or merge them, or take further columns into the id"
        )
    return keys


def _duplicates(keys: Sequence[bytes]) -> int:
    """How many keys are there already: only those whose hashes are the same are compared."""
    hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
    order = np.argsort(hashes)
    same = hashes[order[1:]] == hashes[order[:-1]]
    suspects = np.unique(np.concatenate([order[1:][same], order[:-1][same]])).tolist()
    return len(suspects) - len({keys[place] for place in suspects})


def order_of(keys: Sequence[bytes], seed: int) -> list[int]:
    """Returns the order in which all parties put these rows: by a hash of key and seed.

    It tells nothing: whoever has these keys can work it out, and it has nothing to do with the order in a table.
    """
    order: list[int] = at_once(order_in_turns(keys, range(len(keys)), seed)).tolist()
    return order


def order_in_turns(
    keys: Sequence[bytes], rows: Sequence[int], seed: int
) -> Generator[Turn, None, np.ndarray[Any, np.dtype[np.int64]]]:
    """Returns what `order_of` does, int64, of the keys of some rows, a slice of them at a time."""
    salt = b"planrt aligned rows" + seed.to_bytes(8, "big")
    hashed = np.empty(len(rows), f"S{hashlib.sha256().digest_size}")
    for start in range(0, len(rows), _SLICE):
        part = [hashlib.sha256(salt + keys[row]).digest() for row in rows[start : start + _SLICE]]
        hashed[start : start + len(part)] = part
        yield Turn("rows put in order", start + len(part), len(rows))
    return np.argsort(hashed)


def at_once(steps: Generator[Turn, None, T]) -> T:
    """Returns the result of steps that let others have their turn, without doing so."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
