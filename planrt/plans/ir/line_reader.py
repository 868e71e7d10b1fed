"""One line of a printed plan, read from left to right: values, names, shapes. `planrt.plans.ir.parsing` reads
the whole.

A reader of its own: it evaluates nothing and builds plain values only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from planrt.errors import PlanFormatError
from planrt.plans.ir.graph import check_spec
from planrt.plans.ir.text import PLAIN_NAME
from planrt.serde.dtypes import DTYPES
from planrt.serde.values import DEVICE, LAYOUTS, MAX_DEPTH, MEMORY_FORMATS
from planrt.types import FREE, Nested, Ref, TensorSpec

_ESCAPE = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|.|$)", re.DOTALL)
_FLOAT = re.compile(r"-?(?:inf|nan|[0-9]+(?:\.[0-9]+(?:e[+-]?[0-9]+)?|e[+-]?[0-9]+))(?![A-Za-z0-9_.])")
_COMPLEX_PARTS = re.compile(f"({_FLOAT.pattern}), ({_FLOAT.pattern})\\)")
_INT = re.compile(r"-?[0-9]+(?![A-Za-z0-9_.])")
NUMBERED = re.compile(r"_([0-9]{1,19})(?![A-Za-z0-9_])")
SPEC = re.compile(r"([a-z0-9]+)\[([*0-9, ]*)\]")
_STRING = re.compile(r"'[^'\\]*(?:\\.[^'\\]*)*'|\"[^\"\\]*(?:\\.[^\"\\]*)*\"")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*|\.\.\.")

_SIMPLE_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", "'": "'", '"': '"'}
_WORDS: dict[str, Any] = {
    "None": None, "True": True, "False": False, "...": Ellipsis, "DEVICE": DEVICE,
    **{f"torch.{name}": value for name, value in (*DTYPES.items(), *MEMORY_FORMATS.items(), *LAYOUTS.items())},
}  # fmt: skip


class LineReader:
    """One line, and how far it has been read."""

    def __init__(self, text: str, number: int) -> None:
        self.text = text
        self.number = number
        self._at = 0

    def fail(self, expected: str) -> PlanFormatError:
        """Returns the error for what stands here instead of `expected`."""
        rest = self.text[self._at : self._at + 40]
        found = ascii(rest) if rest else "the end of the line"
        return PlanFormatError(f"line {self.number}: expected {expected}, found {found}")

    def wrong(self, reason: str) -> PlanFormatError:
        """Returns the error for something that is readable and cannot be."""
        return PlanFormatError(f"line {self.number}: {reason}")

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Reads what `pattern` matches here; None, and nothing read, where it does not."""
        found = pattern.match(self.text, self._at)
        if found:
            self._at = found.end()
        return found

    def sees(self, pattern: re.Pattern[str]) -> bool:
        """Returns whether `pattern` matches here; reads nothing."""
        return pattern.match(self.text, self._at) is not None

    def accept(self, literal: str) -> bool:
        """Reads `literal`, if it stands here."""
        if not self.text.startswith(literal, self._at):
            return False
        self._at += len(literal)
        return True

    def expect(self, literal: str, what: str = "") -> None:
        """Reads `literal`, or raises."""
        if not self.accept(literal):
            raise self.fail(what or repr(literal))

    def end(self, printed: str) -> None:
        """Raises unless the line is read, and is spelled as plans are printed."""
        if self._at < len(self.text):
            raise self.fail("the end of the line")
        if self.text != printed:
            raise self.wrong(f"this is written {printed[:200]!r}, not {self.text[:200]!r}")

    # Values

    def listed(self, closing: str, item: Callable[[], None]) -> int:
        """Items between commas up to `closing`; how many. ``(1,)`` ends in a comma, nothing else does."""
        count = 0
        while not self.accept(closing):
            if count:
                self.expect(", ", f"', ' or {closing!r}")
            item()
            count += 1
            if closing == ")" and count == 1 and self.accept(",)"):
                return count
        return count

    def value(self, known: int, depth: int) -> Nested:
        """Reads an argument of an op; `show` is the inverse."""
        if depth > MAX_DEPTH:
            raise self.wrong(f"values nested more than {MAX_DEPTH} levels deep")
        if self.accept("("):
            return tuple(self._items(")", known, depth))
        if self.accept("["):
            return self._items("]", known, depth)
        if self.accept("{"):
            return self._dict(known, depth)
        if self.accept("slice("):
            parts = self._items(")", known, depth)
            if len(parts) != 3:
                raise self.wrong("a slice has three parts: slice(start, stop, step)")
            return slice(*parts)
        if self.accept("complex("):
            return self._complex()
        if self.sees(_STRING):
            return self.string()
        if self.sees(NUMBERED):
            return self.ref(known)
        if found := self.match(_FLOAT):
            return float(found[0])
        if found := self.match(_INT):
            return self._int(found[0])
        found = _WORD.match(self.text, self._at)
        if found is None or found[0] not in _WORDS:
            raise self.fail("a value")
        self._at = found.end()
        return _WORDS[found[0]]

    def _items(self, closing: str, known: int, depth: int) -> list[Any]:
        items: list[Any] = []
        self.listed(closing, lambda: items.append(self.value(known, depth + 1)))
        return items

    def _dict(self, known: int, depth: int) -> dict[str, Any]:
        items: dict[str, Any] = {}

        def item() -> None:
            key = self.string()
            self.expect(": ")
            if key in items:
                raise self.wrong(f"the key {key!a} stands twice")
            items[key] = self.value(known, depth + 1)

        self.listed("}", item)
        return items

    def _complex(self) -> complex:
        found = self.match(_COMPLEX_PARTS)
        if found is None:
            raise self.fail("two numbers with a point, such as complex(1.0, 0.5)")
        return complex(float(found[1]), float(found[2]))

    def _int(self, digits: str) -> int:
        number = int(digits) if len(digits) <= 20 else 2**63
        if not -(2**63) <= number < 2**63:
            raise self.wrong(f"the integer {digits[:30]} is outside the 64-bit range")
        return number

    def string(self) -> str:
        """Reads a string in quotes."""
        found = self.match(_STRING)
        if found is None:
            raise self.fail("a string in quotes")

        return self.unescaped(found[0][1:-1])

    def unescaped(self, text: str) -> str:
        """`text` with the characters that its backslashes stand for."""

        def character(escape: re.Match[str]) -> str:
            word = escape[1]
            if word in _SIMPLE_ESCAPES:
                return _SIMPLE_ESCAPES[word]
            code = int(word[1:], 16) if len(word) > 1 else -1
            if not (0 <= code < 0xD800 or 0xE000 <= code <= 0x10FFFF):
                raise self.wrong(f"no character is written {ascii(escape[0])[1:-1]}")
            return chr(code)

        return _ESCAPE.sub(character, text)

    def ref(self, known: int) -> Ref:
        """Reads a value of the plan that an earlier line made."""
        found = self.match(NUMBERED)
        if found is None:
            raise self.fail("a value of the plan, such as _0")
        if int(found[1]) >= known:
            raise self.wrong(f"{found[0]} is made by no earlier line")
        return Ref(int(found[1]))

    def name(self, what: str) -> str:
        """Reads a name, in quotes or plain."""
        if self.sees(_STRING):
            return self.string()
        found = self.match(PLAIN_NAME)
        if found is None:
            raise self.fail(what)
        return found[0]

    def spec(self) -> TensorSpec:
        """``float32[*, 2]``."""
        found = SPEC.match(self.text, self._at)
        if found is None or found[1] not in DTYPES:
            raise self.fail("a dtype and a shape, such as float32[*, 2]")
        self._at = found.end()
        sizes = found[2].split(", ") if found[2] else []
        if not all(size == "*" or (size.isdecimal() and len(size) <= 19) for size in sizes):
            raise self.wrong(f"{found[0][:80]} is no shape: sizes are numbers, or * for any size")
        spec = TensorSpec(tuple(FREE if size == "*" else int(size) for size in sizes), DTYPES[found[1]])
        try:
            check_spec(spec)
        except PlanFormatError as error:
            raise self.wrong(str(error)) from None
        return spec
