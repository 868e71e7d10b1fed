"""How one party runs a program: as one protocol, in which calls that do not depend on each other share rounds.

The order in which calls begin, and with it the number of every piece of correlated randomness, follows from the program
and from what its operands are like; never from time. So all parties open the same things in the same order.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from planrt.errors import PlanrtError, RandomnessError, SharingError
from planrt.sharing.kernels.parts import Context, Share, masked
from planrt.sharing.kernels.table import VIEWS, call_kernel
from planrt.sharing.programs.ahead import factors, only_copies
from planrt.sharing.programs.calls import Call, Program
from planrt.sharing.rounds import Opening, Protocol
from planrt.types import Ref, map_leaves


@dataclass(frozen=True, slots=True)
class Failed:
    """Stands for a value that is not there, because a call failed: at all parties alike, as it depends on no secret."""

    error: Exception


def run_program(
    context: Context, program: Program, operands: Sequence[Any], alike: Hashable = None
) -> Protocol[list[Any]]:
    """Runs `program` on this party's parts; returns the values of the program by their numbers.

    Operands are `Share`s, public torch.Tensors, or `Failed`. What a call changes in place is changed in the `Share`
    that was given; where such a call fails, its operand's place in the values has a `Failed`. Runs for which
    `alike`, of `needs.alike`, is the same begin calls in the same order: only the first one finds it out.

    1. Begin every call whose operands are there, in the order of the program.
    2. Open what these yield at once; give each its own; go on until all have returned.

    A kernel brings a share to the session's scale and opens it under a mask once, and keeps that with the share. So two
    calls with a common operand run one after the other, unless both has been done before. For factors of products that
    are there at the beginning it is done then (`ahead`).
    """
    values: list[Any] = [*operands, *[None] * (program.values - program.operands)]
    known = _ORDERS.get(alike)
    if known is not None:
        yield from _Run(context, program, values, known.first).steps(known.rounds)
        return values
    finding = _Finding(context, program, values)
    found = yield from _Run(context, program, values, finding.first, finding).steps()
    if alike is not None:
        _ORDERS[alike] = _Order(finding.first, found)
        if len(_ORDERS) > _MOST:
            _ORDERS.popitem(last=False)
    return values


_Rounds: TypeAlias = Sequence[Sequence[int]]
"""The calls that begin before the first opening, after that, after the next one, ..."""


class _Order(NamedTuple):
    first: Sequence[int]
    """The operands that are opened before a call needs that. To open one is a call, too: they come before the others.
    """
    rounds: _Rounds


MANY = 6
"""Calls of a program from which on it takes less to tell that it is known than to find out what begins when."""

_ORDERS: OrderedDict[Hashable, _Order] = OrderedDict()
_MOST = 256


class _Finding:
    """Finds out which calls can begin, of one run. `values` are those of the run, as they are at the time."""

    def __init__(self, context: Context, program: Program, values: list[Any]) -> None:
        self._context, self._values = context, values
        writes = _written(program, values[: program.operands])
        reads = [
            tuple(dict.fromkeys((*reads, *written))) if written else reads
            for reads, written in zip(program.reads, writes, strict=True)
        ]
        self.first = self._opened_first(program, writes)
        calls = len(self.first) + len(program.calls)
        self._calls: list[Call | None] = [*[None] * len(self.first), *program.calls]
        self._reads = [*[(operand,) for operand in self.first], *reads]
        self._writes = [*[()] * len(self.first), *writes]
        self._makes = [*[()] * len(self.first), *program.makes]
        self._users: list[list[int]] = [[] for _ in range(program.values)]
        """Value -> calls that use it and have not ended, in order; who makes it comes first."""
        for number in range(calls):
            for value in (*self._makes[number], *self._reads[number]):
                self._users[value].append(number)
        self._begun = [False] * calls

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

    def all(self) -> Iterator[int]:
        """Yields the calls that can begin at first, each to be begun before the next one is asked for."""
        return self._can_begin(list(range(len(self._begun))))

    def after(self, advanced: Iterable[int]) -> Iterator[int]:
        """Yields the calls that can begin now that others have `advanced`, and what can once these have ended."""
        return self._can_begin(sorted({user for number in advanced for user in self._next_users(number)}))

    def end(self, number: int) -> None:
        """Takes note that a call has ended."""
        for value in (*self._makes[number], *self._reads[number]):
            self._users[value].remove(number)

    def _can_begin(self, candidates: list[int]) -> Iterator[int]:
        known = set(candidates)
        while candidates:  # a heap
            number = heapq.heappop(candidates)
            known.discard(number)
            if self._begun[number] or not self._may_begin(number):
                continue
            self._begun[number] = True
            yield number
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


class _Run:
    def __init__(
        self,
        context: Context,
        program: Program,
        values: list[Any],
        first: Sequence[int],
        finding: _Finding | None = None,
    ) -> None:
        self._context, self._program, self._values, self._first = context, program, values, first
        self._finding = finding
        self._running: dict[int, Protocol[Any]] = {}
        self._waiting: dict[int, Opening] = {}

    def steps(self, rounds: _Rounds = ()) -> Protocol[_Rounds]:
        """Runs it, as in `rounds` where it is not to be found out; returns those that it was."""
        finding = self._finding
        found: list[Sequence[int]] = []
        begin: Iterable[int] = rounds[0] if finding is None else finding.all()
        while True:
            begun = []
            for number in begin:
                begun.append(number)
                self._start(number)
            found.append(begun)
            if not self._waiting:
                return found
            asked = sorted(self._waiting.items())
            self._waiting = {}
            opened = yield [part for _, parts in asked for part in parts]
            start = 0
            for number, parts in asked:
                self._advance(number, opened[start : start + len(parts)])
                start += len(parts)
            begin = rounds[len(found)] if finding is None else finding.after([number for number, _ in asked])

    def _start(self, number: int) -> None:
        if number < len(self._first):
            self._running[number] = masked(self._context, self._values[self._first[number]])
            self._advance(number, None)
            return
        call = self._program.calls[number - len(self._first)]
        values = self._values
        failed = [values[one] for one in call.reads if type(values[one]) is Failed]
        if failed:
            self._fail(number, failed[0].error)
            return
        args: list[Any] = [*call.args]
        for place, one in call.direct:
            args[place] = values[one]
        kwargs = call.kwargs
        if call.nested:

            def value_of(leaf: Any) -> Any:
                return values[leaf.index] if type(leaf) is Ref else leaf

            args, kwargs = map_leaves(args, value_of), map_leaves(kwargs, value_of)
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

    def _call(self, number: int) -> Call | None:
        """None where an operand is opened that calls will need."""
        place = number - len(self._first)
        return self._program.calls[place] if place >= 0 else None

    def _finish(self, number: int, made: Any) -> None:
        call = self._call(number)
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
        call = self._call(number)
        if call is not None and not isinstance(error, PlanrtError):  # torch's, of the arguments
            error = _told(call.name, error)
        for value in call.makes if call is not None else ():
            self._values[value] = Failed(error)
        if call is not None and call.in_place:
            self._values[call.args[0].index] = Failed(error)
        self._end(number)

    def _end(self, number: int) -> None:
        self._running.pop(number, None)
        if self._finding is not None:
            self._finding.end(number)


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
