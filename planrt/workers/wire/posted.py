"""One posted op as bytes, and back: MessagePack of [drop, name, args, kwargs, results, grad mode, seed].

Clients pack an op at the line that makes it, so that a list changed afterwards changes nothing; workers unpack
and check it when its turn comes. `Ref`s stand for objects of the worker by their ids, in arguments and results;
None among the results stands for one that needs no id (an operand that was changed in place).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from types import CodeType
from typing import Any

from planrt.errors import PlanFormatError
from planrt.plans.ir.graph import Graph
from planrt.serde.values import decode, encode, pack, unpack
from planrt.types import Nested

Line = tuple[CodeType, int] | tuple[CodeType, int, weakref.ref[Graph]]
"""Where in the user's code an op was made, and the plan that it calls."""

PROGRAM = "sharing.program"
"""The name of the op that runs a program on shares, of args (group, program as text, its operands): these are
references to objects, or numbers."""

MAX_OP_BYTES = 1 << 19
"""Longest packed op: several fit into a message's header."""

_FIELDS = 7


@dataclass(slots=True)
class PostedOp:
    """An op on the objects of one worker. Nobody changes one; it is not frozen, because a frozen one takes a
    microsecond more to make, twice for each op."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: Nested
    grad: bool
    """The client's grad mode."""
    seed: int | None = None
    """For ops that draw random numbers."""
    drop: tuple[int, ...] = ()
    """Objects to free before the op: nobody points at them any more."""

    def pack(self) -> bytes:
        """Returns the op's bytes.

        Raises:
            PlanFormatError: an argument that cannot travel, or too many of them.
        """
        packed = pack([
            list(self.drop), self.name, encode(self.args), encode(self.kwargs), encode(self.results), self.grad,
            self.seed,
        ])  # fmt: skip
        if len(packed) > MAX_OP_BYTES:
            raise PlanFormatError(f"an op of {len(packed):,} bytes, over the limit of {MAX_OP_BYTES:,}")
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> PostedOp:
        """Returns the op that `pack` was called on.

        Raises:
            PlanFormatError: anything else.
        """
        fields = unpack(data)
        if not isinstance(fields, list) or len(fields) != _FIELDS:
            raise PlanFormatError(f"a posted op has {_FIELDS} fields")
        drop, name, args, kwargs, results, grad, seed = fields
        if not isinstance(drop, list) or not all(type(id) is int for id in drop):
            raise PlanFormatError("malformed op: what it drops is not a list of ids")
        args, kwargs, results = decode(args), decode(kwargs), decode(results)
        if not (
            isinstance(name, str)
            and isinstance(args, tuple)
            and isinstance(kwargs, dict)
            and isinstance(grad, bool)
            and (seed is None or (type(seed) is int and 0 <= seed < 2**63))
        ):
            raise PlanFormatError("malformed op: a field of the wrong type")
        return cls(name, args, kwargs, results, grad, seed, tuple(drop))
