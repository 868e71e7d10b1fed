"""Constants: what a plan's function captured from outside. An owner's approval is of their values too.

A mask, a table or fixed weights that a function finds outside itself are as much of the program as its ops:
``(x * mask).sum(0) / mask.sum()`` is a mean with one mask, and one row with another. So a decision about a
plan with constants is filed under a hash of the ops and of these values (`approval_hash`). Parameters and
buffers are what training changes: their values are the client's, and no part of what is approved.

What an approval binds, then:

    bound                                                  not bound
    the ops, their arguments and their order               names of the plan, of inputs and of state; the docstring
    dtype and shape of inputs (free sizes as free)         the values of inputs, the free sizes of a run
    dtype, shape, kind and trainability of state           the values of parameters and buffers
    dtype, shape and values of constants

Values of parameters are not bound because each round brings others; so a client may choose weights that make
of a plan what its owner did not think of. `planrt.plans.policy.rules` says so among what release rules do not
stop.

With constants c1, c2 ... in the order of the state, each as the SHA-256 of its dtype, shape and elements, the
key is

    approval_hash  =  SHA-256( hash "\n" digest(c1) "\n" digest(c2) ... )       in hex digits, as text

It is a hash of digests, and not of all the values, so that it can be checked without them: a plan that waits
keeps its constants only up to `KEPT` bytes.

A plan with constants waits for its owner as MessagePack of

    ["planrt-waiting", 1, plan, [[digest, bytes] ...]]

with the plan as it came (a `PlanRecord` or a graph, as bytes), and a pair for each constant in the order of
the state: `Constant.digest`, and its elements as they travel, or nil where the constants take more than
`KEPT` bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch

from planrt.errors import PlanFormatError
from planrt.plans.ir.graph import Graph, StateSpec
from planrt.plans.ir.record import state_hash
from planrt.serde.tensors import raw_bytes
from planrt.serde.values import pack, unpack_sections

KEPT: Final = 2**20
"""Bytes of a plan's constants that wait together with it, for its owner to look at."""
LISTED: Final = 1_000
"""Most values of a constant that `Constant.listed` returns."""
_SHOWN: Final = 12
_MAGIC: Final = "planrt-waiting"
_VERSION: Final = 1


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """One constant of a plan: the SHA-256 over its dtype, shape and values (64 hex digits), and these where
    they are at hand."""

    digest: str
    values: torch.Tensor | None = None

    def listed(self) -> list[float] | None:
        """Returns the values in one row, of at most `LISTED` of them; None of more, or where they are not at
        hand."""
        if self.values is None or self.values.numel() > LISTED:
            return None
        listed: list[float] = _flat(self.values).tolist()
        return listed

    def __str__(self) -> str:
        said = "values not kept: ask for the plan's file" if self.values is None else _summary(self.values)
        return f"sha256 {self.digest[:16]}  {said}"


def has_constants(graph: Graph) -> bool:
    """Returns whether the plan's state has constants."""
    return any(entry.kind == "constant" for entry in graph.state)


def constants_of(graph: Graph, state: Sequence[torch.Tensor]) -> tuple[Constant, ...]:
    """Returns the constants among the values of a plan's state, in their order.

    Raises:
        PlanFormatError: there are not as many values as the plan has state.
    """
    if len(state) != len(graph.state):
        raise PlanFormatError(f"a plan with {len(graph.state)} state entries, and the values of {len(state)}")
    return tuple(
        Constant(state_hash([tensor]), tensor.detach())
        for entry, tensor in zip(graph.state, state, strict=True)
        if entry.kind == "constant"
    )


def known_constants(graph: Graph) -> tuple[Constant, ...] | None:
    """Returns the constants of a graph that has the values of its state; None where it has constants and no
    values."""
    if not has_constants(graph):
        return ()
    return constants_of(graph, graph.state_values) if graph.state_values else None


def approval_hash(graph: Graph, constants: Sequence[Constant]) -> str:
    """Returns the hash under which an owner's decision about a plan is filed, as 64 hex digits.

    That is the plan's hash, if it has no constants. Else it is the SHA-256 of the hash and the constants'
    digests, a line each.
    """
    if not constants:
        return graph.hash
    return hashlib.sha256("\n".join([graph.hash, *(one.digest for one in constants)]).encode()).hexdigest()


def waiting_bytes(plan: bytes, constants: Sequence[Constant]) -> bytes:
    """Returns the file of a plan that waits; `plan` as it came, if it has no constants."""
    if not constants:
        return plan
    sizes = [0 if one.values is None else one.values.nbytes for one in constants]
    pairs = [
        [one.digest, None if one.values is None or sum(sizes) > KEPT else bytes(raw_bytes(one.values))]
        for one in constants
    ]
    return pack([_MAGIC, _VERSION, plan, pairs])


def is_waiting(data: bytes) -> bool:
    """Returns whether these bytes begin as those of a plan that waits with its constants."""
    return bytes(data[:32]).find(_MAGIC.encode()) in range(8)


def plan_that_waits(data: bytes) -> tuple[bytes, list[tuple[str, bytes | None]]]:
    """Returns what `waiting_bytes` was given: the plan's bytes, and of each constant its digest and elements.

    Raises:
        PlanFormatError: other bytes.
    """
    parts = unpack_sections(data, _MAGIC, _VERSION, 4, what="plan that waits")
    match parts[2:]:
        case [bytes(plan), list(pairs)] if all(_is_pair(one) for one in pairs):
            return plan, [(digest, raw) for digest, raw in pairs]
    raise PlanFormatError("malformed plan that waits")


def _is_pair(pair: Any) -> bool:
    match pair:
        case [str(digest), bytes() | None] if len(digest) == 64:
            return True
    return False


def decoded(graph: Graph, pairs: Sequence[tuple[str, bytes | None]]) -> tuple[Constant, ...]:
    """Returns the constants of `graph` from what `plan_that_waits` returned.

    Raises:
        PlanFormatError: they are not the plan's, or their values have another digest.
    """
    entries = [entry for entry in graph.state if entry.kind == "constant"]
    if len(entries) != len(pairs):
        raise PlanFormatError(f"a plan with {len(entries)} constants, and the values of {len(pairs)}")
    return tuple(_decoded(entry, *pair) for entry, pair in zip(entries, pairs, strict=True))


def _decoded(entry: StateSpec, digest: str, raw: bytes | None) -> Constant:
    if raw is None:
        return Constant(digest)
    if len(raw) != prod(entry.spec.shape) * entry.spec.dtype.itemsize:
        raise PlanFormatError("malformed plan that waits: a constant of another size")
    values = (
        torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(entry.spec.dtype).view(entry.spec.shape)
        if raw
        else torch.zeros(entry.spec.shape, dtype=entry.spec.dtype)
    )
    if state_hash([values]) != digest:
        raise PlanFormatError("malformed plan that waits: a constant is not what its digest says")
    return Constant(digest, values)


def _summary(values: torch.Tensor) -> str:
    """A few values as they are, of many what their range is and how many are 0."""
    flat = _flat(values)
    if flat.numel() <= _SHOWN:
        return f"[{', '.join(map(_number, flat.tolist()))}]"
    known = flat[~flat.isnan()]
    said = [f"{flat.numel():,} numbers"]
    if known.numel():
        said.append(f"from {_number(known.min().item())} to {_number(known.max().item())}")
    said.append(f"{int((flat == 0).sum()):,} of them 0")
    if known.numel() < flat.numel():
        said.append(f"{flat.numel() - known.numel():,} no number")
    return ", ".join(said)


def _flat(values: torch.Tensor) -> torch.Tensor:
    """All values in one row, as numbers that torch can compare: of a complex one both parts."""
    flat = values.detach().cpu().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.to(torch.complex128)).reshape(-1)
    return flat.double() if flat.is_floating_point() else flat.long()


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.7g}"
