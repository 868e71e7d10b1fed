"""A function of tensors as a program on shares: run once on shares without parts, it gives the list of kernel calls.

torch's own autograd runs with it, so a training step lowers as a forward pass does. What comes out follows from the
function and from what its arguments are like; no values are seen, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planrt.errors import SharingError
from planrt.sharing.programs.calls import Program
from planrt.sharing.tensors.batches import BatchedSession, Value
from planrt.sharing.tensors.shared import SharedTensor
from planrt.types import leaves, map_leaves


@dataclass(frozen=True, slots=True)
class Lowered:
    """A function as a program, with what its results are made of."""

    program: Program
    operands: tuple[torch.Tensor | int, ...]
    """In the order of the program: the number of an argument in shares, or a tensor that all know."""
    results: Any
    """The results of the function, with the number of a value of the program in place of each in shares."""


class _Lowering(BatchedSession):
    """A session that keeps its program, and has no parties."""

    def __init__(self, scale: int) -> None:
        super().__init__(at_once=2**31)
        self.scale = scale
        self.kept: tuple[Program, list[Value | torch.Tensor], list[Value | None]] | None = None

    @property
    def parties(self) -> Sequence[str]:
        """Nobody."""
        return []

    @property
    def provider(self) -> str:
        """Nobody."""
        return "nobody"

    def share(self, values: torch.Tensor, scale: int) -> Value:
        """Refuses: what is shared comes as an argument."""
        raise SharingError(
            "a function on shares shares nothing itself: give it the tensor in shares as an argument"
        )

    def open(self, handle: Value) -> tuple[torch.Tensor, int]:
        """Refuses: there are no values yet."""
        raise SharingError(
            "a function on shares opens nothing while it is lowered: return what is to be opened"
        )

    def _run_program(
        self, program: Program, operands: Sequence[Value | torch.Tensor], results: Sequence[Value | None]
    ) -> None:
        self.kept = program, list(operands), list(results)

    def _forget(self, place: Any) -> None:
        """Nothing: there are no parts."""


def lower(function: Callable[..., Any], args: Sequence[Any], *, scale: int) -> Lowered:
    """Returns `function` as a program, for arguments like `args` (nested; `SharedTensor`s, tensors and numbers).

    Raises:
        SharingError: it does what shares cannot, opens or shares something, or returns no tensor in shares.
    """
    session = _Lowering(scale)
    given: list[Value] = []

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, SharedTensor):
            return leaf
        given.append(Value(session, place=len(given) + 1))
        return SharedTensor(session, given[-1], leaf.shape, leaf.dtype, requires_grad=leaf.requires_grad)

    made = function(*map_leaves(list(args), stand_in))
    shared = [one for one in leaves(made) if isinstance(one, SharedTensor)]
    if not shared or any(one.session is not session for one in shared):
        raise SharingError("a function on shares returns tensors in shares, of its own arguments")
    session.flush()
    if session.kept is None:
        raise SharingError("the function computes nothing on its arguments in shares")
    program, operands, results = session.kept
    numbers: dict[int, int] = {}
    taken: list[torch.Tensor | int] = []
    for number, operand in enumerate(operands):
        if isinstance(operand, Value):
            numbers[id(operand)] = number
            taken.append(operand.place - 1)
        else:
            taken.append(operand)
    numbers |= {id(one): number for number, one in enumerate(results, len(operands)) if one is not None}

    def number_of(leaf: Any) -> Any:
        if not isinstance(leaf, SharedTensor):
            return leaf
        if id(leaf.handle) not in numbers:
            raise SharingError(
                "a function on shares returns an argument as it is: leave that out of its results"
            )
        return numbers[id(leaf.handle)]

    return Lowered(program, tuple(taken), map_leaves(made, number_of))
