"""Random changes of bytes, of text and of nested values: what the fuzzers of decoders have in common."""

from __future__ import annotations

import random
from typing import Any, Final

ATOMS: Final[tuple[Any, ...]] = (
    None, True, False, 0, 1, -1, 63, 64, 65, 255, 256, 2**16, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63,
    2**64 - 1, -(2**31), -(2**63), 0.0, -0.0, 1e308, float("nan"), float("inf"), "", "x", "type", "\0", "\u202e",
    "\U0001f600", "x" * 201, "x" * 70_000, "0" * 64, b"", b"\xff" * 9, [], {}, [[]], {"": None}, ["r", 0], ["t"],
)  # fmt: skip
"""Values at the borders of what decoders take."""
_NUMBERS: Final = b"\x00", b"\x7f", b"\x80", b"\xff", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\xff" * 8
_DEEP: Final = 600
_WORDS: Final = (
    "", "\0", "\n", "\r", "\t", "\u202e", "\ufeff", "\U0001f600", "é", "(" * 40, "[" * 2_000, "{", '"', '"""', "'", "=",
    "9" * 400, "-", "1e999", "nan", "0x", "%", "#", ":", ",", "->", "../", "x" * 5_000,
)  # fmt: skip


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """Returns `data` with one to four changes: bytes flipped, cut out, doubled, put in, or the end left away."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(result) + 1)
        match rng.randrange(7):
            case 0 if at < len(result):
                result[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(result):
                result[at] = rng.randrange(256)
            case 2:
                del result[at : at + rng.choice((1, 1, 4, 60))]
            case 3:
                result[at:at] = result[at : at + rng.choice((1, 8, 200))]
            case 4:
                result[at:at] = rng.randbytes(rng.choice((1, 4, 50)))
            case 5:
                number = rng.choice(_NUMBERS)
                result[at : at + len(number)] = number
            case _:
                del result[at:]
    return bytes(result)


def changed_text(rng: random.Random, text: str, others: str = "") -> str:
    """Returns `text` with one to four changes; what is put in can be a piece of `others`."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.choice((0, 1, 1, 5, 80)))
        source = rng.choice((text, others)) or text
        start = rng.randrange(len(source) + 1)
        piece = rng.choice((
            "", rng.choice(_WORDS), chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xD800)))),
            source[start : start + rng.choice((1, 10, 100))], text[at:end] * 2,
        ))  # fmt: skip
        text = text[:at] + piece + text[end:]
    return text


def changed_value(rng: random.Random, value: Any) -> Any:
    """Returns a copy of `value`, builtins in lists and dicts, of which one to three parts are others, or gone."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _changed_at(rng, value, 8)
    return value


def _changed_at(rng: random.Random, value: Any, depth: int) -> Any:
    if depth and rng.random() < 0.75 and isinstance(value, list | dict) and value:
        if isinstance(value, list):
            place = rng.randrange(len(value))
            return [*value[:place], _changed_at(rng, value[place], depth - 1), *value[place + 1 :]]
        key = rng.choice(list(value))
        return {**value, key: _changed_at(rng, value[key], depth - 1)}
    match rng.randrange(6):
        case 0 if isinstance(value, list):
            place = rng.randrange(len(value) + 1)
            head, tail = value[:place], value[place:]
            return rng.choice(([*head, *tail[1:]], [*head, rng.choice(ATOMS), *tail], value * 3))
        case 1 if isinstance(value, dict) and value:
            gone = rng.choice(list(value))
            left = {key: item for key, item in value.items() if key != gone}
            return rng.choice((left, {**left, rng.choice(("", "x", "id", "type")): value[gone]}))
        case 2:
            return nested(rng, value)
        case 3 if type(value) is int:
            return value + rng.choice((-1, 1, -(2**31), 2**31))
        case _:
            return rng.choice(ATOMS)


def nested(rng: random.Random, value: Any) -> Any:
    """Returns `value` inside of many lists or dicts, one in the other."""
    for _ in range(rng.choice((1, 17, _DEEP))):
        value = [value] if rng.random() < 0.9 else {"x": value}
    return value
