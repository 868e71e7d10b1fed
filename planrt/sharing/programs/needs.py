"""What a run of a program will need of the dealer, how many rounds it takes and what it sends: told without secrets.

A protocol depends on no secret, so its run on zeros asks for the same correlated randomness, in the same order, as its
run on what is shared. Requests name masks that were made before by their numbers; what is kept here has places in their
stead, so that one dry run serves every run of a program on operands that are alike: the steps of a training loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from planrt.sharing.correlated import Material
from planrt.sharing.kernels.parts import Context, Share
from planrt.sharing.kernels.table import call_kernel
from planrt.sharing.programs.calls import Program
from planrt.sharing.programs.looks import public_looks
from planrt.sharing.programs.running import run_program
from planrt.sharing.requests import Base, Known, Part, Request, Spec, size_of
from planrt.sharing.rounds import Opening, Party, Protocol
from planrt.types import Ref, map_leaves

T = TypeVar("T")

Numbered: TypeAlias = tuple[int, Request]
"""A request with its number."""

MOST_REQUESTS = 256
MOST_BYTES = 1 << 23
"""Of these the dealer is told at once: it makes the next ones while what it has made is used."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Requests that the dealer is told of at once. Their numbers, and those of the masks in them, need a `Base`: they
    are the same in each step of a training loop.
    """

    requests: tuple[Numbered, ...]
    size: int
    """Bytes of the corrections that it takes."""


@dataclass(frozen=True)
class Needs:
    """The needs of one run of a program."""

    requests: tuple[Request, ...]
    """All of them, in order. Of a mask that was made before the run, the number is -1 - its place in `masks_of`."""
    taken: tuple[int, ...]
    """How many of them are taken before the first opening, before the second one, ..., in all."""
    sent: tuple[int, ...]
    """Bytes of each opening, as one party sends them to each other one."""

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The requests that the dealer has something to send for, in order, as it is told of them."""
        found: list[Piece] = []
        told: list[Numbered] = []
        size = 0
        for number, request in enumerate(self.requests):
            if not request.fixed:
                continue
            if len(told) == MOST_REQUESTS or size >= MOST_BYTES:
                found.append(Piece(tuple(told), size))
                told, size = [], 0
            told.append((number, request))
            size += size_of(request.fixed)
        return tuple([*found, Piece(tuple(told), size)] if told else found)

    def numbered(self, start: int, masks: Sequence[int]) -> list[Numbered]:
        """Returns the requests that the dealer has something to send for, if the first one has the number `start` and
        the masks from before have the numbers `masks`.
        """
        base = Base(start, masks)
        return [
            (base.number(number), base.request(request))
            for piece in self.pieces
            for number, request in piece.requests
        ]


def masks_of(operands: Sequence[Any]) -> list[int]:
    """Returns the numbers of the masks and coins that are kept with `operands`, each once, in their order."""
    found: dict[int, None] = {}
    for operand in operands:
        if isinstance(operand, Share):
            found.update((one.number, None) for one in operand.randomness())
    return list(found)


_KEPT: OrderedDict[Any, Needs] = OrderedDict()
_SAME: OrderedDict[Any, Needs] = OrderedDict()
"""What runs need -> that, once: the dealer is told of it, and makes it ahead, by what it is."""
_MOST = 256


def alike(program: Program, operands: Sequence[Any], *, party: int, count: int, scale: int) -> Hashable:
    """Returns what a run of `program` depends on, the secrets in `operands` apart: equal for runs that open the same,
    need the same, and begin their calls in the same order. `party` is which one of `count` it is.
    """
    places = _places(operands)
    origins = {id(one.origin): None for one in operands if isinstance(one, Share)}
    order = {origin: place for place, origin in enumerate(origins)}
    shared = tuple(
        [(order[id(one.origin)], one.looks(_named(places))) for one in operands if isinstance(one, Share)]
    )
    return program, party, count, scale, shared, tuple(public_looks(program, operands, scale=scale))


def needs_of(program: Program, operands: Sequence[Any], *, party: int, count: int, scale: int) -> Needs:
    """Returns what party `party` of `count` needs to run `program` on such operands: on values of these shapes, scales
    and masks. Nothing is computed with the operands themselves, public tensors excepted.
    """
    key = alike(program, operands, party=party, count=count, scale=scale)
    kept = kept_needs(key)
    if kept is not None:
        return kept
    places = _places(operands)
    twins: dict[int, Share] = {}
    kept, _ = dry_run(
        program,
        [_twin(operand, places, twins) for operand in operands],
        party=party,
        count=count,
        scale=scale,
    )
    kept = _SAME.setdefault((kept.requests, kept.taken, kept.sent), kept)
    for one in (_SAME, _KEPT):
        if len(one) > _MOST:
            one.popitem(last=False)
    _KEPT[key] = kept
    return kept


def kept_needs(key: Hashable) -> Needs | None:
    """Returns what `needs_of` does for a run of which `alike` is `key`, where that is known since one has run; else
    None: to find out takes about as long as to run it.
    """
    return _KEPT.get(key)


def _places(operands: Sequence[Any]) -> dict[int, int]:
    """Returns the numbers that stand for those of masks from before."""
    return {number: -1 - place for place, number in enumerate(masks_of(operands))}


def dry_run(
    program: Program,
    operands: Sequence[Any],
    *,
    party: int,
    count: int,
    scale: int,
) -> tuple[Needs, list[Any]]:
    """Runs `program` on zeros, as party `party` of `count`; returns what that needs, and the values of the program.

    `operands` are shares of zeros, and tensors that all know.
    """
    return needs_of_protocol(
        lambda one: run_program(Context(one, scale), program, operands), party=party, count=count
    )


def needs_of_protocol(make: Callable[[Party], Protocol[T]], *, party: int, count: int) -> tuple[Needs, T]:
    """Runs the protocol that `make` gives, of zeros, as party `party` of `count`; returns its needs and its result."""
    noting = _Noting()
    protocol = make(Party(party, count, noting))  # type: ignore[arg-type]  # it is one, as far as it is used
    taken: list[int] = []
    sent: list[int] = []
    answer: Opening | None = None
    while True:
        try:
            parts = next(protocol) if answer is None else protocol.send(answer)
        except StopIteration as done:
            taken.append(len(noting.requests))
            return Needs(tuple(noting.requests), tuple(taken), tuple(sent)), done.value
        taken.append(len(noting.requests))
        sent.append(sum(part.nbytes for part in parts))
        answer = [torch.zeros_like(part) for part in parts]


def widest_scales(program: Program, operands: Sequence[Any], *, scale: int) -> dict[tuple[int, int], int]:
    """Runs the calls of `program` on zeros, one by one; returns for each call and each value that it makes or changes
    the finest scale that the call had it at, on its way too. `operands` are as for `dry_run`, and are changed.
    """
    noted: list[tuple[Share, int]] = []
    context = Context(Party(1, 2, _Noting()), scale, noted)  # type: ignore[arg-type]
    values: list[Any] = [*operands, *[None] * (program.values - program.operands)]
    found: dict[tuple[int, int], int] = {}

    def keep(number: int, results: Any, made: Any, inner: int) -> None:
        if type(results) is Ref:
            values[results.index] = made
            found[number, results.index] = max(made.scale, inner)
        elif isinstance(results, tuple | list):
            for one, two in zip(results, made, strict=True):
                keep(number, one, two, inner)

    for number, call in enumerate(program.calls):
        given = {id(values[one]) for one in call.reads}
        noted.clear()
        args, kwargs = (
            map_leaves(one, lambda leaf: values[leaf.index] if type(leaf) is Ref else leaf)
            for one in (call.args, call.kwargs)
        )
        protocol = call_kernel(context, call.name, args, kwargs, in_place=call.in_place)
        answer: Opening | None = None
        while True:
            try:
                parts = next(protocol) if answer is None else protocol.send(answer)
            except StopIteration as done:
                inner = max((one for share, one in noted if id(share) not in given), default=0)
                results = call.args[0] if call.in_place else call.results
                keep(number, results, done.value, inner)
                break
            answer = [torch.zeros_like(part) for part in parts]
    return found


class _Noting:
    """A supply that gives zeros, and notes what was asked for."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def take(self, request: Request) -> Material:
        """Returns nothing but zeros."""
        self.requests.append(request)
        number = len(self.requests) - 1
        return Material(number, [_zeros(one) for one in request.free], [_zeros(one) for one in request.fixed])


_TENSORS = {"ring": torch.int64, "short": torch.int16}
_DTYPES = {"bits": np.uint8, "words": np.uint16}


def _zeros(spec: Spec) -> Part:
    if spec.kind in _TENSORS:
        return torch.zeros(spec.shape, dtype=_TENSORS[spec.kind])
    return np.zeros(spec.shape, _DTYPES[spec.kind])


def _named(places: dict[int, int]) -> Callable[[Known], Known]:
    return lambda known: replace(known, number=places[known.number])


def _twin(operand: Any, places: dict[int, int], made: dict[int, Share]) -> Any:
    """Returns an operand of the same looks, of zeros."""
    return operand.twin(_named(places), made) if isinstance(operand, Share) else operand
