"""Requests for correlated randomness as data: what the last party sends to the dealer, checked field by field.

A training loop asks for the same in each step, other numbers apart. So a `Piece` is sent once, with numbers that are
counted from where a run begins; from then on, its place among those that were sent stands for it. Both sides know by
one rule which are kept, so that nobody has to ask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from planrt.errors import PlanrtError, RandomnessError
from planrt.serde.values import decode, encode, pack
from planrt.sharing.bilinear import BILINEAR
from planrt.sharing.gates import Conjunction, Tables
from planrt.sharing.programs.needs import Numbered, Piece
from planrt.sharing.requests import (
    CHANGES,
    Base,
    Coin,
    Given,
    Known,
    Low,
    Mask,
    Product,
    Request,
    Zero,
    fields_of,
    size_of,
)

MAX_BYTES: Final = 1 << 30
"""Bytes of correlated randomness that the dealer makes for one message."""
_LONGEST: Final = 1 << 40


def as_data(requests: Sequence[Numbered]) -> Any:
    """Returns requests as lists, strings and numbers."""
    return [[number, type(request).__name__, *_fields(request)] for number, request in requests]


def _fields(made: Request) -> list[Any]:
    return [_data(getattr(made, name)) for name, _ in fields_of(type(made))]


def _data(value: Any) -> Any:
    if isinstance(value, Known):
        source = [type(value.source).__name__, *_fields(value.source)]
        return [value.number, source, encode(value.shape), encode(value.changes)]
    return encode(value)


def from_data(data: Any) -> list[Numbered]:
    """Returns the requests that `as_data` was called on.

    Raises:
        RandomnessError, PlanFormatError: anything else, or more than the dealer makes at once.
    """
    if not isinstance(data, list):
        raise _malformed("no list")
    found: list[Numbered] = []
    for one in data:
        if not isinstance(one, list) or len(one) < 2 or type(one[0]) is not int or one[0] < 0:
            raise _malformed("a request begins with its number and its name")
        found.append((one[0], _request(one[1], one[2:], one[0])))
    _check_size(_size_of_all(found))
    return found


def _size_of_all(requests: Sequence[Numbered]) -> int:
    return sum(size_of((*request.free, *request.fixed)) for _, request in requests)


Asked: TypeAlias = tuple[Piece, Base]
"""What is asked for, and what the numbers in it mean."""

MOST_PIECES: Final = 1_000
MOST_PACKED: Final = 1 << 22
"""Pieces of one group that are kept, and bytes of these as they are sent."""


class _Room:
    """How much room is left for pieces of one group."""

    def __init__(self) -> None:
        self.count = self._size = 0

    def take(self, data: Any) -> bool:
        """Returns whether a piece that was sent as `data` is kept."""
        size = len(pack(data))
        if self.count >= MOST_PIECES or self._size + size > MOST_PACKED:
            return False
        self.count += 1
        self._size += size
        return True


class Telling:
    """The last party's side of one group: it tells the dealer each piece once."""

    def __init__(self) -> None:
        self._room = _Room()
        self._sent: dict[Piece, int] = {}

    def data(self, asked: Sequence[Asked]) -> list[Any]:
        """Returns what is sent for `asked`, of which the dealer is to hear next."""
        return [[base.start, list(base.masks), self._told(piece)] for piece, base in asked]

    def _told(self, piece: Piece) -> Any:
        place = self._sent.get(piece)
        if place is not None:
            return place
        data = as_data(piece.requests)
        if self._room.take(data):
            self._sent[piece] = self._room.count - 1
        return data


@dataclass(frozen=True, slots=True)
class _Kept:
    piece: Piece
    size: int
    """Bytes of what is drawn and made for it."""
    masks: int
    """How many masks from before there are at least."""


class Told:
    """The dealer's side of one group: the pieces that the last party has told it."""

    def __init__(self) -> None:
        self._room = _Room()
        self._kept: list[_Kept] = []

    def read(self, data: Any) -> list[Asked]:
        """Returns what `Telling.data` was called on.

        Raises:
            RandomnessError, PlanFormatError: anything else, a piece that is not here, or more than is made at once.
        """
        _check(isinstance(data, list), "no list")
        found: list[Asked] = []
        size = 0
        for one in data:
            _check(isinstance(one, list) and len(one) == 3, "what a run asks for has three fields")
            start, masks, told = one
            _check(type(start) is int and 0 <= start <= _LONGEST, "a run begins with a number")
            fits = isinstance(masks, list) and all(type(mask) is int and 0 <= mask < start for mask in masks)
            _check(fits, "masks were made before the run")
            kept = self._piece(told)
            _check(kept.masks <= len(masks), "a mask from before has no number")
            size += kept.size
            _check_size(size)
            found.append((kept.piece, Base(start, tuple(masks))))
        return found

    def known(self, data: Any) -> list[Asked] | None:
        """Returns what `read` would, where all of it was told before."""
        if not isinstance(data, list) or not all(
            isinstance(one, list) and len(one) == 3 and type(one[2]) is int for one in data
        ):
            return None
        try:
            return self.read(data)
        except PlanrtError:  # it is refused when it is read
            return None

    def _piece(self, told: Any) -> _Kept:
        if type(told) is int:
            _check(0 <= told < len(self._kept), f"nothing was told before under the number {told}")
            return self._kept[told]
        requests = from_data(told)
        known = [
            getattr(one, name) for _, one in requests for name, is_known in fields_of(type(one)) if is_known
        ]
        least = min((one.number for one in known), default=0)
        made = sum(size_of(request.fixed) for _, request in requests)
        kept = _Kept(Piece(tuple(requests), made), _size_of_all(requests), max(0, -least))
        if self._room.take(told):
            self._kept.append(kept)
        return kept


def _check_size(nbytes: int) -> None:
    if nbytes > MAX_BYTES:
        raise RandomnessError(
            f"the dealer is asked for {nbytes:,} bytes of correlated randomness at once, over the limit of "
            f"{MAX_BYTES:,}: compute with fewer elements at a time"
        )


def _malformed(why: str) -> RandomnessError:
    return RandomnessError(f"malformed request for correlated randomness: {why}")


def _check(fits: bool, what: str) -> None:
    if not fits:
        raise _malformed(what)


def _shape(data: Any) -> tuple[int, ...]:
    value = decode(data)
    fits = isinstance(value, tuple) and all(type(size) is int and size >= 0 for size in value)
    _check(fits and len(value) <= 16 and math.prod(value) <= _LONGEST, "a shape")
    shape: tuple[int, ...] = value
    return shape


def _whole(data: Any, low: int, high: int) -> int:
    _check(type(data) is int and low <= data <= high, "a number")
    number: int = data
    return number


def _flag(data: Any) -> bool:
    _check(type(data) is bool, "a flag")
    flag: bool = data
    return flag


def _known(data: Any, before: int) -> Known:
    _check(isinstance(data, list) and len(data) == 4, "a known value")
    number, source, shape, changes = data
    _check(
        type(number) is int and -_LONGEST < number < before,
        "a known value was made before what is asked of it",
    )
    _check(isinstance(source, list) and bool(source) and source[0] in ("Mask", "Coin"), "a source")
    made = _request(source[0], source[1:], before)
    _check_size(size_of(made.free))
    steps = decode(changes)
    _check(isinstance(steps, tuple) and len(steps) <= 64, "changes")
    for step in steps:
        _check(isinstance(step, tuple) and bool(step) and step[0] in CHANGES, "a change")
    assert isinstance(made, Mask | Coin)  # noqa: S101 - by its name
    return Known(number, made, _shape(shape), steps)


def _options(data: Any) -> tuple[tuple[str, Any], ...]:
    value = decode(data)
    _check(isinstance(value, tuple) and len(value) <= 16, "options")
    for one in value:
        _check(isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str), "an option")
    options: tuple[tuple[str, Any], ...] = value
    return options


def _function(data: Any) -> str:
    _check(isinstance(data, str) and data in BILINEAR, "a product")
    name: str = data
    return name


def _planes(data: Any) -> tuple[int, int]:
    shape = _shape(data)
    _check(len(shape) == 2, "planes of bits")
    return shape[0], shape[1]


_Reader = Callable[[Any, int], Any]
"""A field's data, and the number of the request -> the field."""


def _plain(read: Callable[[Any], Any]) -> _Reader:
    return lambda data, before: read(data)


REQUESTS: Final[dict[str, tuple[Callable[..., Request], tuple[_Reader, ...]]]] = {
    "Mask": (Mask, (_plain(_shape),)),
    "Coin": (Coin, (_plain(_shape), _plain(lambda data: _whole(data, 1, _LONGEST)))),
    "Zero": (Zero, (_plain(_shape),)),
    "Given": (Given, (_known,)),
    "Low": (Low, (_known, _known)),
    "Product": (Product, (_plain(_function), _known, _known, _plain(_options))),
    "Tables": (
        Tables,
        (
            _known,
            _plain(lambda data: _whole(data, 1, 64)),
            _plain(lambda data: _whole(data, 1, _LONGEST)),
            _plain(_flag),
        ),
    ),
    "Conjunction": (Conjunction, (_plain(lambda data: _whole(data, 1, 1 << 20)), _plain(_planes))),
}
"""Name of a request -> its class, and what reads each of its fields. A new kind of request needs a line here."""


def _request(name: Any, data: Sequence[Any], number: int) -> Request:
    known = REQUESTS.get(name) if isinstance(name, str) else None
    if known is None:
        raise _malformed(f"there is none called {str(name)[:40]!r}")
    made, readers = known
    _check(len(data) == len(readers), f"{name} has {len(readers)} fields")
    request = made(*[read(one, number) for read, one in zip(readers, data, strict=True)])
    _check(not isinstance(request, Tables) or len(request.known.shape) == 2, "tables are of rows")
    return request
