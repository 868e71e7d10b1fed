"""How one party runs a program: as one protocol, in which calls that do not depend on each other share rounds.

The order in which calls begin, and with it the number of every piece of correlated randomness, follows from the program
and from what its operands are like; never from time. So all parties open the same things in the same order.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planrt.errors import PlanrtError, RandomnessError, SharingError
from planrt.sharing.kernels.parts import Context, Share, masked
from planrt.sharing.kernels.table import VIEWS, call_kernel
from planrt.sharing.programs.ahead import factors, only_copies
from planrt.sharing.programs.calls import Call, Program
from planrt.sharing.rounds import Opening, Protocol
from planrt.types import SINGLE, Ref, map_leaves


@dataclass(frozen=True, slots=True)
class Failed:
    """Stands for a value that is not there, because a call failed: at all parties alike, as it depends on no secret."""

    error: Exception


def run_program(context: Context, program: Program, operands: Sequence[Any]) -> Protocol[list[Any]]:
    """Runs `program` on this party's parts; returns the values of the program by their numbers.

    Operands are `Share`s, public torch.Tensors, or `Failed`. What a call changes in place is changed in the `Share`
    that was given; where such a call fails, its operand's place in the values has a `Failed`.

    1. Begin every call whose operands are there, in the order of the program.
    2. Open what these yield at once; give each its own; go on until all have returned.

    A kernel brings a share to the session's scale and opens it under a mask once, and keeps that with the share. So two
    calls with a common operand run one after the other, unless both has been done before. For factors of products that
    are there at the beginning it is done then (`ahead`).
    """
    return (yield from _Run(context, program, operands).steps())


class _Run:
    def __init__(self, context: Context, program: Program, operands: Sequence[Any]) -> None:
        self._context = context
        self._values: list[Any] = [*operands, *[None] * (program.values - program.operands)]
        self._users: list[list[int]] = [[] for _ in range(program.values)]
        """Value -> calls that use it and have not ended, in order; who makes it comes first."""
        writes = _written(program, operands)
        reads = [
            tuple(dict.fromkeys((*reads, *written))) if written else reads
            for reads, written in zip(program.reads, writes, strict=True)
        ]
        first = self._opened_first(program, writes)
        self._calls: list[Call | None] = [*[None] * len(first), *program.calls]
        """None stands for the opening of an operand that a call will need."""
        self._reads = [*[(operand,) for operand in first], *reads]
        self._writes = [*[()] * len(first), *writes]
        self._makes = [*[()] * len(first), *program.makes]
        for number in range(len(self._calls)):
            for value in (*self._makes[number], *self._reads[number]):
                self._users[value].append(number)
        self._running: dict[int, Protocol[Any]] = {}
        self._waiting: dict[int, Opening] = {}
        self._begun = [False] * len(self._calls)

    def _opened_first(self, program: Program, writes: list[tuple[int, ...]]) -> list[int]:
        """The operands that are opened under masks at once, as a product will need them as they are now, while those
        that come before it open others. What the first products take they open themselves.
        """
        found: dict[int, int] = {}
        opens = False
        for operand, other, user, late in factors(program):
            of_call = [self._values[one] for one in (operand, other) if one is not None]
            if any(not isinstance(one, Share) or one.known is not None for one in of_call):
                continue
            if self._settled(operand):
                continue
            opens = opens or not late
            if late and not any(operand in written for written in writes[:user]):
                found.setdefault(id(self._values[operand].origin), operand)
        return list(found.values()) if opens else []

    def steps(self) -> Protocol[list[Any]]:
        self._begin(list(range(len(self._calls))))
        while self._waiting:
            asked = sorted(self._waiting.items())
            self._waiting = {}
            opened = yield [part for _, parts in asked for part in parts]
            start = 0
            for number, parts in asked:
                self._advance(number, opened[start : start + len(parts)])
                start += len(parts)
            touched = {user for number, _ in asked for user in self._next_users(number)}
            self._begin(sorted(touched))
        return self._values

    def _begin(self, candidates: list[int]) -> None:
        """Begins those of `candidates` (a heap) that can, and what can begin once they have ended."""
        known = set(candidates)
        while candidates:
            number = heapq.heappop(candidates)
            known.discard(number)
            if self._begun[number] or not self._may_begin(number):
                continue
            self._begun[number] = True
            self._start(number)
            for user in self._next_users(number):
                if user not in known:
                    known.add(user)
                    heapq.heappush(candidates, user)

    def _next_users(self, number: int) -> list[int]:
        """Calls that may be able to begin, now that call `number` has come further."""
        return [
            user
            for value in (*self._makes[number], *self._reads[number])
            for user in self._users[value]
            if not self._begun[user]
        ]

    def _may_begin(self, number: int) -> bool:
        for value in self._reads[number]:
            users = self._users[value]
            if users[0] == number:
                continue
            if value in self._writes[number] or not (self._settled(value) or self._copied(value, number)):
                return False
            for user in users:
                if user == number:
                    break
                if value in self._makes[user] or value in self._writes[user]:
                    return False
        return True

    def _settled(self, value: int) -> bool:
        """Whether no kernel changes what is kept of it."""
        share = self._values[value]
        if isinstance(share, Share):
            return share.scale <= self._context.scale and share.masked is not None
        return share is not None

    def _copied(self, value: int, number: int) -> bool:
        """Whether a call does nothing with a value that is there but copy it."""
        call = self._calls[number]
        return self._values[value] is not None and call is not None and only_copies(call)

    def _start(self, number: int) -> None:
        call = self._calls[number]
        if call is None:
            (operand,) = self._reads[number]
            self._running[number] = masked(self._context, self._values[operand])
            self._advance(number, None)
            return
        failed: list[Failed] = []

        def value_of(leaf: Any) -> Any:
            if type(leaf) is not Ref:
                return leaf
            value = self._values[leaf.index]
            if isinstance(value, Failed):
                failed.append(value)
            return value

        args = [value_of(one) if type(one) in SINGLE else map_leaves(one, value_of) for one in call.args]
        kwargs = map_leaves(call.kwargs, value_of) if call.kwargs else {}
        if failed:
            self._fail(number, failed[0].error)
            return
        self._running[number] = call_kernel(self._context, call.name, args, kwargs, in_place=call.in_place)
        self._advance(number, None)

    def _advance(self, number: int, answer: Opening | None) -> None:
        protocol = self._running[number]
        try:
            self._waiting[number] = next(protocol) if answer is None else protocol.send(answer)
        except StopIteration as done:
            self._finish(number, done.value)
        except (RandomnessError, MemoryError):  # of this party alone
            raise
        except Exception as error:
            self._fail(number, error)

    def _finish(self, number: int, made: Any) -> None:
        call = self._calls[number]
        try:
            if call is not None and not call.in_place:
                self._keep(call, call.results, made)
        except SharingError as error:
            self._fail(number, error)
            return
        self._end(number)

    def _keep(self, call: Call, results: Any, made: Any) -> None:
        if type(results) is Ref:
            if not isinstance(made, Share):
                raise SharingError(f"{call.name} of shares gives no share where one is expected")
            self._values[results.index] = made
        elif isinstance(results, tuple | list):
            if not isinstance(made, tuple | list) or len(made) != len(results):
                raise SharingError(f"{call.name} of shares gives another number of results")
            for part, one in zip(results, made, strict=True):
                self._keep(call, part, one)

    def _fail(self, number: int, error: Exception) -> None:
        call = self._calls[number]
        if call is not None and not isinstance(error, PlanrtError):  # torch's, of the arguments
            error = _told(call.name, error)
        for value in self._makes[number]:
            self._values[value] = Failed(error)
        if call is not None and call.in_place:
            self._values[call.args[0].index] = Failed(error)
        self._end(number)

    def _end(self, number: int) -> None:
        self._running.pop(number, None)
        for value in (*self._makes[number], *self._reads[number]):
            self._users[value].remove(number)


def _told(name: str, error: Exception) -> SharingError:
    """What a caller is told of an error that torch raised in a kernel."""
    told = SharingError(f"{name}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
    told.__cause__ = error
    return told


def _written(program: Program, operands: Sequence[Any]) -> list[tuple[int, ...]]:
    """For each call, the values that it changes: that of an operation in place, its views, and what it is a view of."""
    origins: list[Any] = [
        id(one.origin) if isinstance(one, Share) else number for number, one in enumerate(operands)
    ]
    found = []
    for call, makes in zip(program.calls, program.makes, strict=True):
        changed: tuple[int, ...] = ()
        if call.in_place:
            origin = origins[call.args[0].index]
            changed = tuple(number for number, one in enumerate(origins) if one == origin)
        found.append(changed)
        first = call.args[0] if call.args else None
        shows = call.name in VIEWS and type(first) is Ref
        origins += [origins[first.index] if shows and first is not None else ("made", made) for made in makes]
    return found


def shown_parts(parts: Sequence[torch.Tensor]) -> str:
    """Returns what parts of an opening look like, for messages."""
    looks = [f"{str(part.dtype).removeprefix('torch.')}{list(part.shape)}" for part in parts[:4]]
    return ", ".join([*looks, *(["..."] if len(parts) > 4 else [])]) or "nothing"
