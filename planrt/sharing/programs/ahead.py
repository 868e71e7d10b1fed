"""What can be opened before it is needed, and which calls can begin beside others, told from a program alone.

A product opens its factors under masks. Those that are there when a program begins, such as the weights of all layers,
need not wait for the first product that takes them: all are opened in the same rounds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from planrt.sharing.kernels.table import VIEWS
from planrt.sharing.programs.calls import Call, Program
from planrt.types import Ref

_FACTORS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
"""Products of matrices -> the places of their factors among the arguments."""


class Factor(NamedTuple):
    """An operand that a call multiplies by another value, by itself or by a view of it."""

    operand: int
    other: int | None
    """The operand that the other value is, or is a view of; None for what calls make."""
    call: int
    late: bool
    """Whether the other value comes of an earlier product: there is time until it is there."""


@lru_cache(maxsize=256)
def factors(program: Program) -> tuple[Factor, ...]:
    """Returns the operands that calls multiply, in the order of these calls."""
    shown: dict[int, int] = {number: number for number in range(program.operands)}
    late: set[int] = set()
    found: list[Factor] = []
    for number, call in enumerate(program.calls):
        first = call.args[0] if call.args else None
        if call.name in VIEWS and type(first) is Ref and first.index in shown:
            shown.update((made, shown[first.index]) for made in program.makes[number])
        given = [call.args[place] for place in _FACTORS.get(call.name, ()) if place < len(call.args)]
        if given and all(type(one) is Ref for one in given):
            for one, other in zip(given, reversed(given), strict=True):
                if one.index in shown:
                    place = shown.get(other.index)
                    found.append(
                        Factor(shown[one.index], place, number, place is None and other.index in late)
                    )
        if call.name in _FACTORS or late.intersection(program.reads[number]):
            late.update(program.makes[number])
    return tuple(found)


def only_copies(call: Call) -> bool:
    """Returns whether a call gives its operand as it is, and changes nothing of what is kept with that: x ** 1, as in
    the gradient of a square.
    """
    return call.name == "pow" and call.args[1:] == (1,) and not call.kwargs and not call.in_place
