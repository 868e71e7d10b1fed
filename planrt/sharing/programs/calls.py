"""Programs: lists of kernel calls on shares, as data. Every party is given the same one.

The values of a program have numbers: its operands first, then the results of its calls, in the order of the calls.
Arguments refer to them by `Ref`. A program says nothing about where its operands are or what they are called there, so
two steps of a training loop are one and the same program.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from planrt.errors import PlanFormatError, SharingError
from planrt.serde.values import decode, encode, pack, unpack
from planrt.sharing.kernels.table import KERNELS
from planrt.types import Ref, leaves

MAX_CALLS = 10_000
"""Calls of one program."""
_CACHED_LENGTH = 1 << 16


@dataclass(frozen=True)
class Call:
    """One kernel call: `results` are `Ref`s of its results, nested as these are; None where there is none."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: Any
    in_place: bool = False
    """Whether the first argument takes the result as its value; then `results` is None."""

    @cached_property
    def reads(self) -> tuple[int, ...]:
        """The numbers of the values among its arguments, each once, in their order."""
        found = dict.fromkeys(one.index for one in leaves((self.args, self.kwargs)) if type(one) is Ref)
        return tuple(found)

    @cached_property
    def makes(self) -> tuple[int, ...]:
        """The numbers of its results."""
        return tuple(one.index for one in leaves(self.results) if type(one) is Ref)

    @cached_property
    def direct(self) -> tuple[tuple[int, int], ...]:
        """The places of arguments that are values by themselves, and the numbers of these."""
        return tuple((place, one.index) for place, one in enumerate(self.args) if type(one) is Ref)

    @cached_property
    def nested(self) -> bool:
        """Returns whether there are values among its arguments otherwise, as in lists."""
        others = [one for one in self.args if type(one) is not Ref]
        return any(type(one) is Ref for one in leaves((others, self.kwargs)))


@dataclass(frozen=True, eq=False)
class Program:
    """Kernel calls, in an order in which they could run one by one."""

    operands: int
    """How many values it is given."""
    calls: tuple[Call, ...]
    values: int
    """How many values there are: operands and results."""
    reads: tuple[tuple[int, ...], ...]
    """`Call.reads` of each call."""
    makes: tuple[tuple[int, ...], ...]
    """`Call.makes` of each call."""

    @classmethod
    def of(cls, operands: int, calls: Sequence[Call]) -> Program:
        """Returns the program of these calls.

        Raises:
            SharingError: a call of no kernel, one that reads what is not there yet, or results not numbered on.
        """
        if len(calls) > MAX_CALLS:
            raise SharingError(f"a program on shares has at most {MAX_CALLS:,} calls, not {len(calls):,}")
        there = operands
        reads, makes = tuple(call.reads for call in calls), tuple(call.makes for call in calls)
        for call, read, made in zip(calls, reads, makes, strict=True):
            if call.name not in KERNELS:
                raise SharingError(f"{call.name[:60]!r} has no protocol on shares")
            if any(not 0 <= number < there for number in read):
                raise SharingError(f"{call.name} reads a value that is not there yet")
            if made != tuple(range(there, there + len(made))):
                raise SharingError(f"the results of {call.name} are not numbered on")
            if call.in_place and (made or not call.args or type(call.args[0]) is not Ref):
                raise SharingError(f"{call.name} in place changes its first argument, and gives nothing")
            there += len(made)
        return cls(operands, tuple(calls), there, reads, makes)

    @cached_property
    def text(self) -> str:
        """The program as text: the same for equal programs.

        Raises:
            PlanFormatError: an argument that does not travel.
        """
        calls = [
            [call.name, encode(call.args), encode(call.kwargs), encode(call.results), call.in_place]
            for call in self.calls
        ]
        return base64.b85encode(pack([self.operands, calls])).decode()


def program_of(text: str) -> Program:
    """Returns the program of which `text` is `Program.text`. Every part is checked.

    Raises:
        PlanFormatError, SharingError: anything else.
    """
    return _short_program(text) if len(text) <= _CACHED_LENGTH else _program(text)


@lru_cache(maxsize=256)
def _short_program(text: str) -> Program:
    return _program(text)


def _program(text: str) -> Program:
    try:
        fields = unpack(base64.b85decode(text))
    except (ValueError, binascii.Error) as error:
        raise PlanFormatError(f"these are no bytes of a program on shares: {error}") from None
    if not isinstance(fields, list) or len(fields) != 2:
        raise PlanFormatError("a program on shares has two fields")
    operands, calls = fields
    if type(operands) is not int or not 0 <= operands <= MAX_CALLS or not isinstance(calls, list):
        raise PlanFormatError("a program on shares is a number of operands and a list of calls")
    return Program.of(operands, [_call(fields) for fields in calls])


def _call(fields: Any) -> Call:
    if not isinstance(fields, list) or len(fields) != 5:
        raise PlanFormatError("a call of a program on shares has five fields")
    name, in_place = fields[0], fields[4]
    args, kwargs, results = decode(fields[1]), decode(fields[2]), decode(fields[3])
    fits = isinstance(name, str) and isinstance(args, tuple) and isinstance(kwargs, dict)
    if not fits or type(in_place) is not bool:
        raise PlanFormatError("malformed call of a program on shares: a field of the wrong type")
    return Call(name, args, kwargs, results, in_place)
