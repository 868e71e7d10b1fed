"""Correlated randomness: what the dealer hands out, as seeds and one party's corrections.

A request says what is needed; the parties make the same requests in the same order, so each has a number. Everything
random of request `k` at party `i` comes from the stream of that party's seed with number `k`: the dealer, who knows all
seeds, can tell what the parts are and what they must add up to, and sends the difference to the last party alone.
All other parties receive nothing but their seed. Source: the pseudorandom sharing of correlated randomness with a
dealer of Boyle et al., "Compressing Vector OLE" (CCS 2018), section 1, in the simple form of one correction per
request, as in SPU's and CrypTen's trusted third party.

`requests` has what can be asked for.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import torch

from planrt.errors import RandomnessError
from planrt.sharing import ring
from planrt.sharing.randomness import Stream, Streams
from planrt.sharing.requests import ALL, CHANGES, Base, Known, Part, Request, Spec

_LATELY = 1 << 24
"""Bytes of masks that a dealer keeps."""

_DTYPES = {"ring": torch.int64, "short": torch.int16, "bits": torch.uint8, "words": torch.int16}


def _to_tensor(part: Part) -> torch.Tensor:
    if isinstance(part, torch.Tensor):
        return part
    return torch.from_numpy(part.view(np.int16) if part.dtype == np.uint16 else part)


def _from_tensor(spec: Spec, tensor: torch.Tensor) -> Part:
    if spec.kind in ("ring", "short"):
        return tensor
    array: np.ndarray = tensor.numpy()
    return array if spec.kind == "bits" else array.view(np.uint16)


def _combined(parts: Sequence[Part]) -> Part:
    return reduce(lambda a, b: ring.plus(a, b) if isinstance(a, torch.Tensor) else a ^ b, parts)


def _difference(target: Part, parts: Sequence[Part]) -> Part:
    total = _combined(parts)
    return ring.minus(target, total) if isinstance(target, torch.Tensor) else target ^ total


@dataclass(slots=True)
class Material:
    """A party's parts of one request."""

    number: int
    free: list[Part]
    fixed: list[Part]


Corrections: TypeAlias = Callable[[int, Request], Sequence[torch.Tensor]]
"""Number and request -> what the dealer sends to the last party."""


class Supply:
    """One party's correlated randomness: each number once, in order. The last party is given `corrections`."""

    def __init__(self, seed: bytes, corrections: Corrections | None = None) -> None:
        self._streams = Streams(seed)
        self._corrections = corrections
        self._next = 0
        self._ready: deque[tuple[Request, Material]] = deque()
        self.record: list[Request] | None = None
        """Set to a list, it gathers the requests: what another run of the same protocol will need."""

    @property
    def next_number(self) -> int:
        """The number of the next request."""
        return self._next - len(self._ready)

    def take(self, request: Request) -> Material:
        """Returns this party's parts of the next request.

        Raises:
            RandomnessError: the dealer's correction is missing, for another request, or of another shape; or something
                else was prepared.
        """
        if self.record is not None:
            self.record.append(request)
        if not self._ready:
            return self._expanded(request)
        made_for, material = self._ready.popleft()
        if made_for != request:
            raise _other(material.number, made_for, request)
        return material

    def prepare(self, requests: Sequence[Request]) -> None:
        """Does ahead of time what `take` will need for the next requests: seeds expanded, corrections taken in."""
        self._ready.extend([(request, self._expanded(request)) for request in requests])

    def _expanded(self, request: Request) -> Material:
        number, self._next = self._next, self._next + 1
        stream = self._streams.stream(number)
        free = [spec.draw(stream) for spec in request.free]
        specs = request.fixed
        if not specs:
            return Material(number, free, [])
        if self._corrections is None:
            return Material(number, free, [spec.draw(stream) for spec in specs])
        sent = self._corrections(number, request)
        if not isinstance(self._corrections, Stock):  # which has checked them
            check_correction(number, request, sent)
        return Material(number, free, [_from_tensor(*pair) for pair in zip(specs, sent, strict=True)])


def _other(number: int, made_for: Request, request: Request) -> RandomnessError:
    return RandomnessError(
        f"correlated randomness number {number} was made for another operation: {made_for}, not {request}"
    )


def check_correction(number: int, request: Request, tensors: Sequence[torch.Tensor]) -> None:
    """Raise RandomnessError unless `tensors` can be the correction of `request`."""
    specs = request.fixed
    fits = len(specs) == len(tensors)
    for spec, tensor in zip(specs, tensors, strict=False):
        fits = fits and tensor.dtype == _DTYPES[spec.kind] and tensor.shape == spec.shape
    if not fits:
        want = [(_DTYPES[spec.kind], spec.shape) for spec in specs]
        have = [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        raise RandomnessError(
            f"correlated randomness number {number} ({type(request).__name__}) has the wrong shape: "
            f"wanted {_shown(want)}, got {_shown(have)}"
        )


def _shown(specs: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> str:
    return (
        ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for dtype, shape in specs) or "nothing"
    )


class Stock:
    """Corrections that were made ahead of time, as plain tensors: each is taken out once."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Request, Base, Sequence[torch.Tensor]]] = {}
        self._begun = -1

    def put(self, number: int, request: Request, tensors: Sequence[torch.Tensor], base: Base = ALL) -> None:
        """Keep the correction of a request to come; `base` tells what the numbers in it mean.

        Raises:
            RandomnessError: it has been used or is here, or the tensors do not fit the request.
        """
        if number in self._kept or number <= self._begun:
            raise RandomnessError(f"correlated randomness number {number} was handed out before")
        check_correction(number, request, tensors)
        self._kept[number] = request, base, tensors

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, number: int, request: Request) -> Sequence[torch.Tensor]:
        """Takes out the correction `number`.

        Raises:
            RandomnessError: it is not there, or was made for another request.
        """
        if number <= self._begun:
            raise RandomnessError(f"correlated randomness number {number} was used before")
        if number not in self._kept:
            raise RandomnessError(
                f"the dealer's correlated randomness is used up (number {number} is asked for)"
            )
        made_for, base, tensors = self._kept.pop(number)
        self._begun = number
        if not base.means(made_for, request):
            raise _other(number, base.request(made_for), request)
        return tensors


class Dealer:
    """Knows the seeds of all parties, in their order, and computes what the last party needs. Each number once."""

    def __init__(self, seeds: Sequence[bytes]) -> None:
        self._streams = [Streams(seed) for seed in seeds]
        self._begun = -1
        self._lately: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()
        """Masks and coins that were looked at lately: most are asked about several times in a row."""
        self._lately_bytes = 0

    def correction(self, number: int, request: Request, base: Base = ALL) -> list[torch.Tensor]:
        """Returns the correction of request `number`, for the last party; `base` tells what the numbers in it mean.

        Raises:
            RandomnessError: it was asked for before: a second answer for another request would tell the masks.
        """
        self.hand_out(number)
        return self.made(number, request, base)

    def hand_out(self, number: int) -> None:
        """Takes note that the correction of request `number` leaves.

        Raises:
            RandomnessError: one left before, or that of a later one.
        """
        if number <= self._begun:
            raise RandomnessError(f"correlated randomness number {number} was handed out before")
        self._begun = number

    def made(self, number: int, request: Request, base: Base = ALL) -> list[torch.Tensor]:
        """Returns what `correction` does, which is nobody's to have before `hand_out` says so."""
        streams = [one.stream(number) for one in self._streams]
        free = [
            _combined(parts)
            for parts in zip(*(self._drawn(request.free, one) for one in streams), strict=True)
        ]
        fixed = [self._drawn(request.fixed, one) for one in streams[:-1]]
        targets = request.targets(free, lambda known: self._look(known, base.number(known.number)))
        return [
            _to_tensor(_difference(target, parts)) for target, *parts in zip(targets, *fixed, strict=True)
        ]

    def make(self, requests: Sequence[Request], stock: Stock, *, start: int = 0) -> None:
        """Puts what `requests` need, which begin with number `start`, into a stock ahead of time."""
        for number, request in enumerate(requests, start):
            if request.fixed:
                stock.put(number, request, self.correction(number, request))

    def _drawn_value(self, known: Known, number: int) -> torch.Tensor:
        key = number, type(known.source), known.source.shape
        value = self._lately.get(key)
        if value is None:
            (spec,) = known.source.free
            total = _combined([spec.draw(one.stream(number)) for one in self._streams])
            value = known.source.value(total)
            self._lately[key] = value
            self._lately_bytes += value.nbytes
            while self._lately_bytes > _LATELY:
                self._lately_bytes -= self._lately.popitem(last=False)[1].nbytes
        self._lately.move_to_end(key)  # a weight's is asked about again and again, those of a batch no more
        return value

    @staticmethod
    def _drawn(specs: Sequence[Spec], stream: Stream) -> list[Part]:
        return [spec.draw(stream) for spec in specs]

    def _look(self, known: Known, number: int) -> torch.Tensor:
        value = self._drawn_value(known, number)
        for name, *arguments in known.changes:
            value = CHANGES[name](value, *arguments)
        return value
