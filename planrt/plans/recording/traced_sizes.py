"""Sizes that remember where they came from, for the tracer.

While a function is recorded, `x.shape[0]` is a `SizeInt`: an ordinary int that also knows the number of the
plan value it stands for. Arithmetic keeps that memory, and a comparison is remembered with its outcome: a
plan checks that its sizes still compare that way. Whatever turns it into a plain number (`int`, `float`,
`hash`, bits) is remembered too, as far as Python asks: `range` and list indices just see an int.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, Protocol, SupportsIndex

import torch

from planrt.types import Ref


class SizeRecorder(Protocol):
    """The interface that sizes need of the tracer: one op recorded per arithmetic step."""

    def record_arithmetic(self, name: str, *operands: int | float) -> int | float:
        """Computes ``operator.name(*operands)``; the result remembers its own plan value."""

    def record_comparison(self, name: str, left: int | float, right: int | float) -> bool:
        """Computes ``operator.name(left, right)``, and remembers it with its line."""

    def record_reading(self, number: Any) -> Any:
        """Returns the plain number that `number` is, and remembers that somebody saw it."""


_LARGEST_POWER = 8  # x.shape[0] ** 2 is written as products


class TracedNumber:
    """Operators shared by `SizeInt` and `SizeFloat`."""

    recorder: SizeRecorder
    ref: Ref

    def _apply(self, name: str, *operands: Any) -> Any:
        if not all(isinstance(operand, int | float) for operand in operands):
            return NotImplemented
        return self.recorder.record_arithmetic(name, *operands)

    def __add__(self, other: Any) -> Any:
        return self._apply("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return self._apply("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return self._apply("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._apply("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return self._apply("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return self._apply("mul", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return self._apply("floordiv", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._apply("floordiv", other, self)

    def __mod__(self, other: Any) -> Any:
        return self._apply("mod", self, other)

    def __rmod__(self, other: Any) -> Any:
        return self._apply("mod", other, self)

    def __truediv__(self, other: Any) -> Any:
        return self._apply("truediv", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._apply("truediv", other, self)

    def __neg__(self) -> Any:
        return self._apply("neg", self)

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return self if self >= 0 else -self

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __pow__(self, exponent: Any, modulo: Any = None) -> Any:
        if modulo is None and type(exponent) is int and 1 <= exponent <= _LARGEST_POWER:
            return functools.reduce(operator.mul, [self] * exponent)
        return pow(self._read(), exponent, modulo)

    @property
    def plain(self) -> Any:
        """The number without its memory."""
        return int.__int__(self) if isinstance(self, int) else float.__float__(self)  # type: ignore[arg-type]

    def _read(self) -> int:  # or a float: the hints of what calls it are those of int
        number: int = self.recorder.record_reading(self)
        return number

    def _compare(self, name: str, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        return self.recorder.record_comparison(name, self, other)  # type: ignore[arg-type]  # it is one, too

    def __eq__(self, other: Any) -> Any:
        return self._compare("eq", other)

    def __ne__(self, other: Any) -> Any:
        return self._compare("ne", other)

    def __lt__(self, other: Any) -> Any:
        return self._compare("lt", other)

    def __le__(self, other: Any) -> Any:
        return self._compare("le", other)

    def __gt__(self, other: Any) -> Any:
        return self._compare("gt", other)

    def __ge__(self, other: Any) -> Any:
        return self._compare("ge", other)

    def __bool__(self) -> bool:
        return bool(self != 0)

    def __hash__(self) -> int:
        return hash(self._read())  # a key of a dict or set

    def __int__(self) -> int:
        return int(self._read())

    def __float__(self) -> float:
        return float(self._read())

    def __round__(self, digits: Any = None) -> Any:
        return round(self._read(), digits)

    def __trunc__(self) -> int:
        return math.trunc(self._read())

    def __floor__(self) -> int:
        return math.floor(self._read())

    def __ceil__(self) -> int:
        return math.ceil(self._read())

    def __rpow__(self, base: Any) -> Any:
        return base ** self._read()

    def __and__(self, other: Any) -> Any:
        return self._read() & other

    def __or__(self, other: Any) -> Any:
        return self._read() | other

    def __xor__(self, other: Any) -> Any:
        return self._read() ^ other

    def __lshift__(self, other: Any) -> Any:
        return self._read() << other

    def __rshift__(self, other: Any) -> Any:
        return self._read() >> other


class SizeInt(TracedNumber, int):  # type: ignore[misc]  # int's own hints are narrower
    """A size, or a whole number computed from sizes, that knows its plan value."""


class SizeFloat(TracedNumber, float):  # type: ignore[misc]
    """A fraction computed from sizes (``x.shape[0] / 2``) that knows its plan value."""


def traced(value: int | float, ref: Ref, recorder: SizeRecorder) -> int | float:
    """`value` with a memory of being plan value `ref`."""
    number = SizeInt(value) if isinstance(value, int) else SizeFloat(value)
    number.recorder, number.ref = recorder, ref
    return number


class TracedShape(tuple[int, ...]):
    """A shape whose sizes remember where they came from. It passes for a torch.Size, which cannot be
    subclassed."""

    __class__ = property(lambda self: torch.Size)  # for isinstance

    def numel(self) -> int:
        """Returns the product of the sizes, as `torch.Size.numel` returns it."""
        return functools.reduce(operator.mul, self) if self else 1

    def __repr__(self) -> str:
        return f"torch.Size({list(self)})"

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        part = tuple.__getitem__(self, index)
        return TracedShape(part) if isinstance(part, tuple) else part

    def __add__(self, other: Any) -> Any:
        return TracedShape((*self, *other)) if isinstance(other, tuple) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return TracedShape((*other, *self)) if isinstance(other, tuple) else NotImplemented
