"""Sizes that remember where they came from, for the tracer.

While a function is recorded, `x.shape[0]` is a `SizeInt`: an ordinary int that also knows the number of the
plan value it stands for. Arithmetic keeps that memory; anything else (comparison, `range`, `int`, `math`)
sees a plain int.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Protocol, SupportsIndex

from planrt.types import Ref


class SizeRecorder(Protocol):
    """What sizes need from the tracer: one op recorded per arithmetic step."""

    def record_arithmetic(self, name: str, *operands: int | float) -> int | float:
        """The result of ``operator.name(*operands)``, remembering its own plan value."""


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


class SizeInt(TracedNumber, int):
    """A size, or a whole number computed from sizes, that knows its plan value."""


class SizeFloat(TracedNumber, float):
    """A fraction computed from sizes (``x.shape[0] / 2``) that knows its plan value."""


def traced(value: int | float, ref: Ref, recorder: SizeRecorder) -> int | float:
    """`value` with a memory of being plan value `ref`."""
    number = SizeInt(value) if isinstance(value, int) else SizeFloat(value)
    number.recorder, number.ref = recorder, ref
    return number


class TracedShape(tuple[int, ...]):
    """A shape whose sizes remember where they came from; torch.Size cannot be subclassed."""

    def numel(self) -> int:
        """The product of the sizes, as `torch.Size.numel` gives it."""
        return functools.reduce(operator.mul, self) if self else 1

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        part = tuple.__getitem__(self, index)
        return TracedShape(part) if isinstance(part, tuple) else part

    def __add__(self, other: Any) -> Any:
        return TracedShape((*self, *other)) if isinstance(other, tuple) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return TracedShape((*other, *self)) if isinstance(other, tuple) else NotImplemented
