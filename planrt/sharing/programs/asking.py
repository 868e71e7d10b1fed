"""Requests for correlated randomness as data: what the last party sends to the dealer, checked field by field."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, Final

from planrt.errors import RandomnessError
from planrt.serde.values import decode, encode
from planrt.sharing.bilinear import BILINEAR
from planrt.sharing.gates import Conjunction, Tables
from planrt.sharing.programs.needs import Numbered
from planrt.sharing.requests import CHANGES, Coin, Given, Known, Mask, Product, Request, Spec, Zero

MAX_BYTES: Final = 1 << 30
"""Bytes of correlated randomness that the dealer makes for one message."""
_LONGEST: Final = 1 << 40

_BYTES = {"ring": 8, "words": 2, "bits": 1}


def size_of(specs: Iterable[Spec]) -> int:
    """Returns how many bytes parts of these forms take."""
    return sum(_BYTES[spec.kind] * math.prod(spec.shape) for spec in specs)


def as_data(requests: Sequence[Numbered]) -> Any:
    """Returns requests as lists, strings and numbers."""
    return [[number, type(request).__name__, *_fields(request)] for number, request in requests]


@cache
def _names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _fields(made: Request) -> list[Any]:
    return [_data(getattr(made, name)) for name in _names(type(made))]


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
    _check_size(sum(size_of((*request.free, *request.fixed)) for _, request in found))
    return found


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
    _check(type(number) is int and 0 <= number < before, "a known value was made before what is asked of it")
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
