"""Whether a message can be sent, asked before it is: at the line of the caller, with nothing sent and nothing lost.

The fields of a message hold what users gave as arguments. NumPy scalars, tensors without dimensions, members of
enumerations and paths become the numbers and strings that they stand for here, and nowhere else. Everything else that
the other side would not take is refused here by the name of the argument, and so is what is over its limits.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, NoReturn, TypeVar
from uuid import UUID

import msgpack
import msgspec
import torch

from planrt.errors import LocalError, MessageTooLargeError, OptionError
from planrt.serde.tensors import header_entries, payload_bytes
from planrt.types import plain
from planrt.workers.wire import messages as m

B = TypeVar("B", bound=m.Body)

_AS_THEY_ARE = (bytes, bytearray, memoryview, datetime, date, time, timedelta, UUID, Decimal)
"""What msgspec would turn into strings: refused where a string is wanted, since nobody meant that."""
_WITH_VALUES = (torch.Tensor, torch.nn.Parameter)
_PLACE = re.compile(r" - at (?:`key` in )?`\$(?P<path>[^`]*)`$")
_STEP = re.compile(r"\.(?P<name>\w+)|\[(?P<index>\d+|\.\.\.)\]")


def sendable(body: B, tensors: Sequence[torch.Tensor], *, to: m.Versions, worker: str, address: str) -> B:
    """`body` as it will arrive, for a worker that accepts what `to` says.

    Raises:
        OptionError: a field of it cannot be sent; names the argument and its type. LocalError: a tensor that cannot
        travel. MessageTooLargeError: it is over a limit of the worker's.
    """
    body = _validated(body)
    for tensor in tensors:
        if (place := getattr(tensor, "location", None)) is not None:  # a pointer has one
            raise LocalError(
                f"a value that is to be sent from here is on worker {place.id!r}: get() it first, or call "
                "what is on that worker"
            )
        if (
            type(tensor) not in _WITH_VALUES
            and not tensor.is_meta
            and not tensor.data_ptr()
            and tensor.numel()
        ):
            raise LocalError(
                f"a {type(tensor).__name__} has no values here that could be sent: get() it first"
            )
    nbytes = payload_bytes(tensors)
    if nbytes > to.message_limit:
        raise MessageTooLargeError(
            f"a message of {nbytes:,} bytes is over the limit of {to.message_limit:,} bytes that worker {worker!r} "
            "takes, and was not sent: send it in parts, or make the worker with limits=Limits(message=...)",
            address=address,
        )
    if not isinstance(body, m.Post):  # these are gathered to fit
        header = len(_packed([m.to_wire(m.Envelope(2**62, body)), header_entries(tensors)], body))
        if header > to.header_limit:
            raise MessageTooLargeError(
                f"a message with a header of {header:,} bytes is over the limit of {to.header_limit:,} bytes that "
                f"worker {worker!r} takes, and was not sent: give fewer tensors or options at once, or make the "
                "worker with limits=Limits(header=...)",
                address=address,
            )
    return body


def _validated(body: B) -> B:
    try:
        built = msgspec.to_builtins(body, enc_hook=_plain, builtin_types=_AS_THEY_ARE)
        return msgspec.convert(built, type(body))
    except msgspec.ValidationError as error:
        text = str(error)
        found = _PLACE.search(text)
        name, value = _at(body, found["path"]) if found else ("", body)
        if found and "`key` in" in found[0]:
            _refuse(name, value, f"its keys are strings: {text[: found.start()].lower()}")
        _refuse(name, value, text[: found.start()].lower() if found else text)
    except _UnknownTypeError as error:
        unknown = error.value
        _refuse(_name_of(body, lambda value: value is unknown), unknown, "it is no number and no string")
    except (RecursionError, TypeError, ValueError) as error:
        _refuse("", body, str(error))


def _packed(header: Any, body: m.Message) -> bytes:
    try:
        packed: bytes = msgpack.packb(header)
        return packed
    except OverflowError:
        found = _first(body, lambda value: isinstance(value, int) and not -(2**63) <= value < 2**64)
        _refuse(*found, "whole numbers that are sent have 64 bits")
    except UnicodeEncodeError:
        found = _first(body, lambda value: isinstance(value, str) and not _is_utf8(value))
        _refuse(*found, "it is no text: it has no UTF-8 form")
    except (TypeError, ValueError, RecursionError) as error:
        _refuse("", body, str(error))


class _UnknownTypeError(Exception):
    def __init__(self, value: object) -> None:
        super().__init__("")
        self.value = value


def _plain(value: object) -> Any:
    """What `msgspec` asks about types that it does not know."""
    made = plain(value)
    if made is value:
        raise _UnknownTypeError(value)
    return made


def _refuse(name: str, value: object, why: str) -> NoReturn:
    what = "a message" if isinstance(value, m.Message) else f"{reprlib.repr(value)} ({type(value).__name__})"
    raise OptionError(f"{name}: {what} cannot be sent: {why}" if name else f"{what} cannot be sent: {why}")


# ------------------------------------------------------------------- the argument that a field was given as


def _at(body: object, path: str) -> tuple[str, object]:
    """The last name on a path in msgspec's words, such as ``.items[0][4]``, and the value there."""
    name, value = "", body
    for step in _STEP.finditer(path):
        if step["name"]:
            name = step["name"]
            value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        elif step["index"] == "...":  # of some key of a mapping
            return name, value
        elif isinstance(value, msgspec.Struct):
            name = value.__struct_fields__[int(step["index"])]
            value = getattr(value, name)
        elif isinstance(value, Sequence):
            value = value[int(step["index"])]
    return name, value


def _first(body: m.Message, wanted: Any) -> tuple[str, object]:
    return next(((name, value) for name, value in _named_leaves("", body, 0) if wanted(value)), ("", body))


def _name_of(body: m.Message, wanted: Any) -> str:
    return _first(body, wanted)[0]


def _named_leaves(name: str, value: object, depth: int) -> Iterator[tuple[str, object]]:
    """Everything in `value` with the name of the field or key that it is under; not deeper than options are."""
    if isinstance(value, msgspec.Struct):
        for field in value.__struct_fields__:
            yield from _named_leaves(field, getattr(value, field), depth)
    elif isinstance(value, Mapping) and depth < 8:
        for key, item in value.items():
            yield name, key
            yield from _named_leaves(str(key), item, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset) and depth < 8:
        for item in value:
            yield from _named_leaves(name, item, depth + 1)
    else:
        yield name, value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
