"""Sessions that gather kernel calls into programs, and have a program run when somebody wants to see a result.

Calls that stand in one program share rounds where they do not depend on each other (`programs.running`). Which calls
stand together is decided here, once for all parties: each is given the same programs in the same order.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from planrt.errors import SharingError
from planrt.sharing.kernels.shapes import are_mixed, flags_of
from planrt.sharing.kernels.sizes import Drawn
from planrt.sharing.kernels.table import VIEWS
from planrt.sharing.programs.calls import Call, Program
from planrt.sharing.programs.looks import NUMBERS, may_vary, varies
from planrt.sharing.tensors.places import AT_PLACES
from planrt.sharing.tensors.sessions import Secret, SharingSession
from planrt.types import Ref, leaves, map_leaves


@dataclass(frozen=True, slots=True)
class _Operand:
    """Among the arguments of a call that waits: something that the parties hold, or that all know."""

    number: int


@dataclass(frozen=True, slots=True)
class _Result:
    """Among these: a result of a call that waits."""

    number: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: Any
    in_place: bool

    @property
    def reads(self) -> list[_Operand | _Result]:
        return [one for one in leaves((self.args, self.kwargs)) if isinstance(one, _Operand | _Result)]

    @property
    def makes(self) -> list[_Result]:
        return [one for one in leaves(self.results) if isinstance(one, _Result)]


class Value:
    """A handle: one secret. `place` is what the session knows the parts by, once they are there; until then it is
    result `number` of the calls that wait.
    """

    __slots__ = ("__weakref__", "number", "place", "session")

    def __init__(self, session: BatchedSession, *, place: Any = None, number: int | None = None) -> None:
        self.session = session
        self.place = place
        self.number = number

    def __deepcopy__(self, memo: dict[int, Any]) -> Value:
        return self  # one handle for one secret: what there are two of would be forgotten when the first one goes

    def __copy__(self) -> Value:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SharingError("shares of all parties are not saved in one place: save what get() returns")

    def __del__(self) -> None:
        place = getattr(self, "place", None)  # torch.compile makes some without __init__
        if place is not None:
            self.session._forget(place)


Number: TypeAlias = float | int
"""A float, or a seed."""
Operand: TypeAlias = Value | torch.Tensor | Number
"""Of a program: a secret, a tensor that all know, or a number that varies."""


class BatchedSession(SharingSession):
    """A session in which calls wait until there are `at_once` of them, or somebody wants to see a result. Those that
    wait make one program; what nobody has any more by then is not computed.

    Numbers in it that were others the last time, such as a learning rate that decays or the seed of a dropout, are
    operands of the program: it is the same in every step then, and what the parties know of it serves again.
    """

    numbers_vary = True
    """Whether they are, of a session with more than one call at once."""

    def __init__(self, *, at_once: int) -> None:
        self._at_once = at_once
        self._lock = threading.RLock()
        self._templates: OrderedDict[Any, _Template] = OrderedDict()
        self._begin()

    def _begin(self) -> None:
        self._waiting: list[_Waiting] = []
        self._operands: list[Operand] = []
        self._operand_numbers: dict[int, int] = {}
        """id of a handle -> its number among the operands, which keep it."""
        self._results: list[weakref.ref[Value]] = []

    def names_of(self, handle: Value) -> Sequence[tuple[int, str, int]]:
        """Returns the ids of a secret's parts, which are there when the calls that wait have run; see
        `SharingSession.names_of`.
        """
        self.flush()
        place = handle.place if isinstance(handle.place, int) else id(handle)
        return [(place ^ (number + 1), party, place) for number, party in enumerate(self.parties)]

    @abstractmethod
    def _run_program(
        self, program: Program, operands: Sequence[Operand], results: Sequence[Value | None]
    ) -> None:
        """Has a program run, and sets the `place` of its results; None is for those that nobody has."""

    @abstractmethod
    def _forget(self, place: Any) -> None:
        """Nobody has the secret at `place` any more. Called by finalizers: in any thread, at any time."""

    def run(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, *, in_place: bool
    ) -> Any:
        """Has a call wait; see `SharingSession.run`."""
        with self._lock:
            named = self._named_at_places if name in AT_PLACES else self._named
            given, options = map_leaves(args, named), map_leaves(kwargs, named)
            if name == "ones_like" and self._operand_numbers:
                # Their values depend on no other call: gradients, which begin with these, do not wait for the loss.
                first = next(iter(self._operand_numbers.values()))
                name, given, options = "new_ones", (_Operand(first), list(shapes)), {}
            if name == "bernoulli":
                options = {**options, "seed": _drawn(options["seed"], shapes, *given[1:])}
            made = None if in_place else self._made(shapes)
            results = map_leaves(made, lambda one: None if one is None else _Result(one.number))
            self._waiting.append(_Waiting(name, given, options, results, in_place))
            if len(self._waiting) >= self._at_once:
                self.flush()
            return made

    def flush(self) -> None:
        """Has the calls that wait run, without waiting for them."""
        with self._lock:
            if not self._waiting:
                return
            waiting, operands = self._waiting, self._operands
            alive = [one() for one in self._results]
            self._begin()
            wanted = tuple([number for number, one in enumerate(alive) if one is not None])
            program, used, made, numbers = self._program(waiting, wanted, operands)
            results = [alive[number] for number in made]
            for value in results:
                if value is not None:
                    value.number = None
            given = [*operands, *numbers]
            self._run_program(program, [given[number] for number in used], results)

    def _program(
        self, waiting: Sequence[_Waiting], wanted: tuple[int, ...], operands: Sequence[Operand]
    ) -> _Found:
        """The program of the calls that wait. Its numbers come after the `operands`."""

        def is_share(one: Any) -> bool:
            return type(one) is _Result or (type(one) is _Operand and isinstance(operands[one.number], Value))

        def plain() -> list[_Waiting]:
            return [_with_numbers(one, is_share, _itself) for one in waiting]

        if not self.numbers_vary or self._at_once < 2 or len(waiting) > _LONGEST_KEPT:
            return _program(plain(), wanted)
        numbers: list[Number] = []

        def away(number: Number) -> Any:
            numbers.append(number)
            return _NUMBER

        try:
            key = wanted, len(operands), *[_look_of(_with_numbers(one, is_share, away)) for one in waiting]
            template = self._templates.get(key)
        except TypeError:  # an argument that has no hash
            return _new_program(plain(), wanted)
        if template is None:
            template = self._templates[key] = _Template(numbers, [], _new_program(plain(), wanted))
            if len(self._templates) > _MOST_KEPT:
                self._templates.popitem(last=False)
            return template.found
        others = [place for place, one in enumerate(numbers) if one != template.numbers[place]]
        if not set(others).issubset(template.varying):
            template.varying = sorted({*template.varying, *others})
            names = {place: _Operand(number) for number, place in enumerate(template.varying, len(operands))}
            places = itertools.count()

            def named(number: Number) -> Any:
                return names.get(next(places), number)

            template.found = _new_program([_with_numbers(one, is_share, named) for one in waiting], wanted)
        return template.found._replace(numbers=[numbers[place] for place in template.varying])

    def _named(self, leaf: Any) -> Any:
        if isinstance(leaf, Secret):
            value: Value = leaf.handle
            if value.number is not None:
                return _Result(value.number)
            number = self._operand_numbers.get(id(value))
            if number is None:
                number = self._operand_numbers[id(value)] = len(self._operands)
                self._operands.append(value)
            return _Operand(number)
        if isinstance(leaf, torch.Tensor):
            if not leaf.dim():
                return leaf.item()
            self._operands.append(leaf.detach().clone())  # its owner may change it before the call runs
            return _Operand(len(self._operands) - 1)
        return leaf

    def _named_at_places(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and not leaf.is_floating_point():
            self._operands.append(leaf.detach().clone())
            return _Operand(len(self._operands) - 1)
        return self._named(leaf)

    def _made(self, shapes: Any) -> Any:
        if shapes is None:
            return None
        if isinstance(shapes, tuple) and not isinstance(shapes, torch.Size):
            return tuple(self._made(one) for one in shapes)
        value = Value(self, number=len(self._results))
        self._results.append(weakref.ref(value))
        return value


def _origins(waiting: Sequence[_Waiting]) -> dict[_Operand | _Result, _Operand | _Result]:
    """What results that are views are views of, in the end: changed in place, they change it."""
    found: dict[_Operand | _Result, _Operand | _Result] = {}
    for call in waiting:
        first = call.args[0] if call.args else None
        if call.name in VIEWS and isinstance(first, _Operand | _Result):
            found.update((one, found.get(first, first)) for one in call.makes)
    return found


class _Found(NamedTuple):
    program: Program
    used: list[int]
    """The numbers of its operands among those that waited."""
    made: list[int]
    """The numbers of its results among these."""
    numbers: Sequence[Number] = ()
    """Operands that are numbers, which come after those that waited."""


@dataclass(slots=True)
class _Template:
    """Calls that waited, but for the numbers in them that may vary."""

    numbers: list[Number]
    """Those of the first time."""
    varying: list[int]
    """Which of them have been others since: those are operands."""
    found: _Found


_NUMBER = object()


def _itself(number: Number) -> Number:
    return int(number) if type(number) is Drawn else number


def _drawn(seed: int, shape: Any, p: Any = 0.5) -> int:
    """The seed of flags, as one that may be an operand where it can be."""
    if not isinstance(shape, torch.Size) or not isinstance(p, float):
        return seed
    return Drawn(seed) if are_mixed(flags_of(seed, shape, p)) else seed


def _with_numbers(
    call: _Waiting, is_share: Callable[[Any], bool], other: Callable[[Number], Any]
) -> _Waiting:
    """A call with something else for each of its numbers that may vary."""
    places = NUMBERS.get(call.name)
    if places is None:
        return call

    def fits(place: int | str, value: Any) -> bool:
        return place in places and varies(value) and may_vary(call.name, place, call.args, is_share)

    args = [other(one) if fits(place, one) else one for place, one in enumerate(call.args)]
    kwargs = {name: other(one) if fits(name, one) else one for name, one in call.kwargs.items()}
    return _Waiting(call.name, tuple(args), kwargs, call.results, call.in_place)


_KEPT: OrderedDict[Any, _Found] = OrderedDict()
"""Calls that waited -> their program: steps of a loop have the same."""
_MOST_KEPT = 64
_LONGEST_KEPT = 512
"""Calls."""


def _program(waiting: Sequence[_Waiting], wanted: tuple[int, ...]) -> _Found:
    """The program of those calls that the results `wanted` depend on, or that change an operand; for the same calls the
    same one.
    """
    if len(waiting) > _LONGEST_KEPT:
        return _new_program(waiting, wanted)
    try:
        key = wanted, *[_look_of(one) for one in waiting]
        found = _KEPT.get(key)
    except TypeError:  # an argument that has no hash
        return _new_program(waiting, wanted)
    if found is None:
        found = _KEPT[key] = _new_program(waiting, wanted)
        if len(_KEPT) > _MOST_KEPT:
            _KEPT.popitem(last=False)
    return found


def _look_of(call: _Waiting) -> Any:
    return _look((call.name, call.args, call.kwargs, call.results, call.in_place))


def _look(value: Any) -> Any:
    """What is equal for equal arguments only: 1, 1.0 and True are not, 0.0 and -0.0 neither."""
    kind = type(value)
    if kind is str:
        return value
    if kind is float:
        return kind, value.hex()
    if kind is _Operand or kind is _Result:
        return kind, value.number
    if isinstance(value, tuple | list):
        return kind, *[_look(one) for one in value]
    if kind is dict:
        return kind, *[(name, _look(one)) for name, one in value.items()]
    if kind is slice:
        return kind, _look(value.start), _look(value.stop), _look(value.step)
    return kind, value


def _new_program(waiting: Sequence[_Waiting], wanted: Sequence[int]) -> _Found:
    needed = {_Result(number) for number in wanted}
    origins = _origins(waiting)
    kept: list[_Waiting] = []
    for call in reversed(waiting):
        target = call.args[0] if call.in_place else None
        changes = False
        if target is not None:
            changed = origins.get(target, target)
            changes = isinstance(changed, _Operand) or any(origins.get(one, one) == changed for one in needed)
        if changes or needed.intersection(call.makes):
            kept.append(call)
            needed.update(one for one in call.reads if isinstance(one, _Result))
    kept.reverse()
    used = sorted({one.number for call in kept for one in call.reads if isinstance(one, _Operand)})
    made = [one.number for call in kept for one in call.makes]
    numbers: dict[_Operand | _Result, Ref] = {_Operand(one): Ref(place) for place, one in enumerate(used)}
    numbers |= {_Result(one): Ref(len(used) + place) for place, one in enumerate(made)}

    def numbered(value: Any) -> Any:
        return map_leaves(value, lambda leaf: numbers[leaf] if isinstance(leaf, _Operand | _Result) else leaf)

    calls = [
        Call(one.name, numbered(one.args), numbered(one.kwargs), numbered(one.results), one.in_place)
        for one in kept
    ]
    return _Found(Program.of(len(used), calls), used, made)
