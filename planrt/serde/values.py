"""Nested op arguments to msgpack-able values and back: the one codec of everything a plan contains.

Scalars (None, bool, int, float, str) stand for themselves. Everything else is an array whose first item is
a one-letter tag from a closed set, so a tuple stays a tuple, a list a list, and nothing is ever looked up by
name outside a fixed table. Dicts keep their order and their keys are strings. Encoding is deterministic:
equal values have equal bytes, whatever machine made them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgpack
import torch

from planrt.errors import PlanFormatError
from planrt.serde.dtypes import DTYPE_NAMES, DTYPES
from planrt.types import Ref

MAX_DEPTH: Final = 16
"""Deepest nesting of tuples, lists and dicts in one value."""
MAX_ITEMS: Final = 1_000_000
"""Most items, nested ones included, in one value."""

_MAX_ARRAY: Final = MAX_ITEMS + 1  # a tuple of as many items as there may be, and its tag
_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1


class PlanDevice:
    """The device that the plan runs on; stands in arguments where a `torch.device` stood while tracing."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "DEVICE"


DEVICE: Final = PlanDevice()

MEMORY_FORMATS: dict[str, torch.memory_format] = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
_MEMORY_FORMAT_NAMES = {value: name for name, value in MEMORY_FORMATS.items()}
LAYOUTS: dict[str, torch.layout] = {"strided": torch.strided}
_LAYOUT_NAMES = {value: name for name, value in LAYOUTS.items()}


def encode(value: Any) -> Any:
    """`value` as something that `msgpack.packb` takes.

    Raises:
        PlanFormatError: a value of a kind that plans cannot hold, or nested too deeply.
    """
    return _encode(value, 0)


def _encode(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise PlanFormatError(f"value nested more than {MAX_DEPTH} levels deep")
    # Exact types first: an op that is posted has little else, and each of its arguments comes through here.
    kind = type(value)
    if kind is Ref:
        return ["r", value.index]
    if kind is tuple:
        return ["t", *[_encode(item, depth + 1) for item in value]]
    if kind is str or kind is bool or value is None:
        return value
    if isinstance(value, int):
        if not _INT_MIN <= value <= _INT_MAX:
            raise PlanFormatError("an integer outside the 64-bit range cannot stand in a plan")
        return int(value)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, tuple):
        return ["t", *[_encode(item, depth + 1) for item in value]]
    if isinstance(value, list):
        return ["l", *[_encode(item, depth + 1) for item in value]]
    if isinstance(value, dict):
        return ["d", *[part for key, item in value.items() for part in (_key(key), _encode(item, depth + 1))]]
    if isinstance(value, slice):
        return ["s", *[_encode(part, depth + 1) for part in (value.start, value.stop, value.step)]]
    if value is Ellipsis:
        return ["e"]
    if isinstance(value, complex):
        return ["c", _float(value.real), _float(value.imag)]
    if value is DEVICE or isinstance(value, torch.device):
        return ["v"]
    if isinstance(value, torch.dtype) and value in DTYPE_NAMES:
        return ["y", DTYPE_NAMES[value]]
    if isinstance(value, torch.memory_format):
        return ["m", _MEMORY_FORMAT_NAMES[value]]
    if isinstance(value, torch.layout) and value in _LAYOUT_NAMES:
        return ["o", _LAYOUT_NAMES[value]]
    if isinstance(value, torch.dtype | torch.layout):
        raise PlanFormatError(f"{value} cannot stand in a plan")
    raise PlanFormatError(f"a value of type {type(value).__name__} cannot stand in a plan")


def _float(value: float) -> float:
    return float("nan") if value != value else float(value)  # one NaN, so that bytes are canonical


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise PlanFormatError(f"dict keys in a plan are strings, not {type(key).__name__}")
    return key


def decode(value: Any) -> Any:
    """Decodes what msgpack unpacked into the value that `encode` took; every part is checked.

    Raises:
        PlanFormatError: anything that `encode` cannot have made.
    """
    if type(value) is list and len(value) == 1 and value[0] == "d":
        return {}  # the keyword arguments of most ops
    return _Decoder().items([value], 0)[0]


class _Decoder:
    """Counts the items of one value while it is decoded."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = MAX_ITEMS

    def items(self, values: list[Any], depth: int) -> list[Any]:
        """Decodes values that lie `depth` levels deep."""
        if values and depth > MAX_DEPTH:
            raise PlanFormatError(f"value nested more than {MAX_DEPTH} levels deep")
        self._left -= len(values)
        if self._left < 0:
            raise PlanFormatError(f"a value with more than {MAX_ITEMS} items")
        items = []
        for value in values:
            kind = type(value)  # msgpack makes no subclasses
            if kind is list:
                items.append(self._tagged(value, depth))
                continue
            if kind is int:
                if not _INT_MIN <= value <= _INT_MAX:
                    raise PlanFormatError("integer outside the 64-bit range")
            elif value is not None and kind is not bool and kind is not float and kind is not str:
                raise PlanFormatError(f"malformed value: expected a tagged array, got {kind.__name__}")
            items.append(value)
        return items

    def _tagged(self, value: list[Any], depth: int) -> Any:
        if not value or type(value[0]) is not str:
            raise PlanFormatError("malformed value: expected a tagged array, got list")
        tag, parts = value[0], value[1:]
        if tag == "r":
            return _ref(parts)
        if tag == "t":
            return tuple(self.items(parts, depth + 1))
        if tag == "l":
            return self.items(parts, depth + 1)
        if tag == "d":
            return self._dict(parts, depth)
        if tag == "s":
            return slice(*self.items(_exactly(parts, 3, "slice"), depth + 1))
        simple = _SIMPLE.get(tag)
        if simple is None:
            raise PlanFormatError(f"malformed value: unknown tag {tag[:20]!r}")
        return simple(parts)

    def _dict(self, parts: list[Any], depth: int) -> dict[str, Any]:
        keys = parts[::2]
        if len(parts) % 2 or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
            raise PlanFormatError("malformed dict: keys must be different strings, each with a value")
        return dict(zip(keys, self.items(parts[1::2], depth + 1), strict=True))


def _exactly(parts: list[Any], count: int, what: str) -> list[Any]:
    if len(parts) != count:
        raise PlanFormatError(f"malformed {what}: {len(parts)} parts instead of {count}")
    return parts


def _named(parts: list[Any], table: dict[str, Any], what: str) -> Any:
    (name,) = _exactly(parts, 1, what)
    if not isinstance(name, str) or name not in table:
        raise PlanFormatError(f"unknown {what} {str(name)[:40]!r}")
    return table[name]


def _ref(parts: list[Any]) -> Ref:
    if len(parts) != 1:
        _exactly(parts, 1, "reference")  # says so
    index = parts[0]
    if type(index) is not int or not 0 <= index <= _INT_MAX:
        raise PlanFormatError("malformed reference: its number is not a 63-bit integer")
    return Ref(index)


def _complex(parts: list[Any]) -> complex:
    real, imag = _exactly(parts, 2, "complex number")
    if type(real) is not float or type(imag) is not float:
        raise PlanFormatError("malformed complex number: its parts are not floats")
    return complex(real, imag)


def _constant(constant: Any, what: str) -> Callable[[list[Any]], Any]:
    def read(parts: list[Any]) -> Any:
        _exactly(parts, 0, what)
        return constant

    return read


_SIMPLE: dict[str, Callable[[list[Any]], Any]] = {
    "e": _constant(Ellipsis, "ellipsis"),
    "v": _constant(DEVICE, "device"),
    "c": _complex,
    "y": lambda parts: _named(parts, DTYPES, "dtype"),
    "m": lambda parts: _named(parts, MEMORY_FORMATS, "memory format"),
    "o": lambda parts: _named(parts, LAYOUTS, "layout"),
}


def pack(encoded: Any) -> bytes:
    """msgpack bytes of an encoded value (or of an array of them)."""
    try:
        packed = msgpack.packb(encoded, use_bin_type=True)
    except (UnicodeEncodeError, ValueError, OverflowError) as error:
        raise PlanFormatError(f"a value that has no byte form: {error}") from None
    assert isinstance(packed, bytes)  # noqa: S101 - msgpack has no type hints
    return packed


def unpack(data: bytes) -> Any:
    """Returns the value that `pack` took. Sizes announced in `data` can never make more items than `data` has
    bytes.

    Raises:
        PlanFormatError: truncated, trailing or malformed bytes.
    """
    try:
        return msgpack.unpackb(data, raw=False, use_list=True, strict_map_key=True, max_array_len=_MAX_ARRAY)
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise PlanFormatError(f"not readable as msgpack: {reason[:120]}") from None


def unpack_sections(data: bytes, magic: str, version: int, count: int, *, what: str) -> list[Any]:
    """Unpacks the `count` sections of a versioned form: an array that begins with `magic` and its version
    number.

    Raises:
        PlanFormatError: no such form, one newer than `version`, or with another number of sections.
    """
    parts = unpack(data)
    if not isinstance(parts, list) or len(parts) < 2 or parts[0] != magic:
        raise PlanFormatError(f"these bytes are not a {what}")
    if type(parts[1]) is not int or parts[1] < 1:
        raise PlanFormatError(f"malformed {what}: no version number")
    if parts[1] > version:
        raise PlanFormatError(
            f"the {what} has format {parts[1]}, newer than {version}: update planrt on this side"
        )
    if len(parts) != count:
        raise PlanFormatError(f"malformed {what}: {len(parts)} sections instead of {count}")
    return parts
