"""A function of tensors as a program on shares: run once on shares without parts, it gives the list of kernel calls.

torch's own autograd runs with it, so a training step lowers as a forward pass does. What comes out follows from the
function and from what its arguments are like; no values are seen, and nothing is sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from planrt.errors import SharingError
from planrt.sharing.kernels.parts import digest
from planrt.sharing.programs.calls import Program
from planrt.sharing.tensors.batches import BatchedSession, Operand, Value
from planrt.sharing.tensors.shared import SharedTensor
from planrt.types import leaves, map_leaves


@dataclass(frozen=True, slots=True)
class Looks:
    """All that lowering depends on, of an argument in shares."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False


@dataclass(frozen=True, slots=True)
class Argument:
    """Among results: an argument in shares, returned as it is. Arguments in shares are counted from 0."""

    number: int


@dataclass(frozen=True, slots=True)
class Made:
    """Among results: a value of the program, and the tensor that it stands for."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Lowered:
    """A function as a program, with what its results are made of."""

    program: Program
    operands: tuple[torch.Tensor | int, ...]
    """In the order of the program: the number of an argument in shares, or a tensor that all know."""
    results: Any
    """The results of the function, with a `Made` or an `Argument` in place of each in shares."""
    has_history: bool = False
    """Whether gradients of arguments flow through its results."""

    @property
    def wanted(self) -> frozenset[int]:
        """The values of the program that the results have."""
        return frozenset(one.number for one in leaves(self.results) if isinstance(one, Made))

    @property
    def changed(self) -> frozenset[int]:
        """The arguments in shares that it may change in place."""
        found = {call.args[0].index for call in self.program.calls if call.in_place}
        places = [one for number, one in enumerate(self.operands) if number in found]
        return frozenset(one for one in places if isinstance(one, int))

    @cached_property
    def identity(self) -> str:
        """SHA-256 of what runs: of the program, and of the tensors that all know. 64 hex digits."""
        known = hashlib.sha256(self.program.text.encode())
        for one in self.operands:
            if isinstance(one, torch.Tensor):
                known.update(f"{one.dtype} {tuple(one.shape)}".encode() + digest(one))
        return known.hexdigest()


class _Lowering(BatchedSession):
    """A session that keeps its program, and has no parties."""

    numbers_vary = False  # whoever lowers the same function is to find the same program, whatever came before

    def __init__(self, scale: int) -> None:
        super().__init__(at_once=2**31)
        self.scale = scale
        self.kept: tuple[Program, list[Operand], list[Value | None]] | None = None

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
        self, program: Program, operands: Sequence[Operand], results: Sequence[Value | None]
    ) -> None:
        self.kept = program, list(operands), list(results)

    def _forget(self, place: Any) -> None:
        """Nothing: there are no parts."""


def lower(function: Callable[..., Any], args: Sequence[Any], *, scale: int) -> Lowered:
    """Returns `function` as a program, for arguments like `args`.

    These are nested: `SharedTensor`s, or `Looks` of some, and tensors and numbers that all know, which are used as they
    are.

    Raises:
        SharingError: it does what shares cannot, opens or shares something, or returns no tensor in shares.
    """
    session = _Lowering(scale)
    given: list[SharedTensor] = []

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, SharedTensor | Looks):
            return leaf
        value = Value(session, place=len(given) + 1)
        given.append(SharedTensor(session, value, leaf.shape, leaf.dtype, requires_grad=leaf.requires_grad))
        return given[-1]

    made = function(*map_leaves(list(args), stand_in))
    shared = [one for one in leaves(made) if isinstance(one, SharedTensor)]
    session.flush()
    program, operands, results = session.kept or (Program.of(0, []), [], [])
    if not (shared or program.calls) or any(one.session is not session for one in shared):
        raise SharingError("a function on shares returns tensors in shares, of its own arguments")
    taken = tuple([one.place - 1 if isinstance(one, Value) else torch.as_tensor(one) for one in operands])
    numbers = {id(one): number for number, one in enumerate(results, len(operands)) if one is not None}

    def result(leaf: Any) -> Any:
        if not isinstance(leaf, SharedTensor):
            return leaf
        if leaf.handle.place is not None:
            return Argument(leaf.handle.place - 1)
        return Made(
            numbers[id(leaf.handle)], tuple(leaf.shape), leaf.dtype, leaf.stride(), int(leaf.storage_offset())
        )

    history = any(_reaches(one, given) for one in shared)
    return Lowered(program, taken, map_leaves(made, result), history)


def _reaches(result: torch.Tensor, arguments: Sequence[torch.Tensor]) -> bool:
    """Returns whether a backward pass from `result` would come to one of `arguments`."""
    if any(result is one for one in arguments):
        return False
    known = {id(one) for one in arguments}
    seen: set[Any] = set()
    todo = [result.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in known:
            return True
        todo += [one for one, _ in node.next_functions]
    return False
