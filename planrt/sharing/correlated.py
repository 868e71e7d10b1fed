"""Correlated randomness: what the dealer hands out, as seeds and one party's corrections.

A request says what is needed; the parties make the same requests in the same order, so each has a number. Everything
random of request `k` at party `i` comes from the stream of that party's seed with number `k`: the dealer, who knows all
seeds, can tell what the parts are and what they must add up to, and sends the difference to the last party alone.
All other parties receive nothing but their seed. Source: the pseudorandom sharing of correlated randomness with a
dealer of Boyle et al., "Compressing Vector OLE" (CCS 2018), section 1, in the simple form of one correction per
request, as in SPU's and CrypTen's trusted third party.

A request has two groups of parts. The *free* ones are whatever the seeds say: masks. The *fixed* ones are parts of
values that the dealer computes from the masks: a product of two masks, the comparison table of one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch

from planrt.errors import RandomnessError
from planrt.sharing import ring
from planrt.sharing.bilinear import bilinear_shape, bilinear_value
from planrt.sharing.randomness import Stream

Kind: TypeAlias = Literal["ring", "bits", "words"]
Part: TypeAlias = Any
"""A torch.Tensor of int64 (ring), or a numpy array of uint8 (packed bits) or uint16 (tables)."""


@dataclass(frozen=True, slots=True)
class Spec:
    """Kind and shape of one part: ring elements add up, bits and 16-bit words combine by XOR."""

    kind: Kind
    shape: tuple[int, ...]

    def draw(self, stream: Stream) -> Part:
        """Returns the next random numbers of `stream` in this form."""
        if self.kind == "ring":
            return stream.ring(self.shape)
        return stream.bits(self.shape) if self.kind == "bits" else stream.words(self.shape)


_DTYPES = {"ring": torch.int64, "bits": torch.uint8, "words": torch.int16}


def _to_tensor(part: Part) -> torch.Tensor:
    if isinstance(part, torch.Tensor):
        return part
    return torch.from_numpy(part.view(np.int16) if part.dtype == np.uint16 else part)


def _from_tensor(spec: Spec, tensor: torch.Tensor) -> Part:
    if spec.kind == "ring":
        return tensor
    array: np.ndarray = tensor.numpy()
    return array if spec.kind == "bits" else array.view(np.uint16)


def _combined(parts: Sequence[Part]) -> Part:
    return reduce(lambda a, b: a + b if isinstance(a, torch.Tensor) else a ^ b, parts)


def _difference(target: Part, parts: Sequence[Part]) -> Part:
    total = _combined(parts)
    return target - total if isinstance(target, torch.Tensor) else target ^ total


@dataclass(frozen=True, slots=True)
class Known:
    """A value that the dealer knows and nobody else does: a mask or a coin, or a function of one.

    `changes` are applied in order; each is a name of the table `CHANGES` with its arguments.
    """

    number: int
    """Of the request that made it."""
    source: Mask | Coin
    shape: tuple[int, ...]
    changes: tuple[tuple[Any, ...], ...] = ()

    def changed(self, name: str, *arguments: Any, shape: Sequence[int] | None = None) -> Known:
        """Returns the same value after one more change."""
        shape = self.shape if shape is None else tuple(shape)
        return replace(self, shape=shape, changes=(*self.changes, (name, *arguments)))


def _below(values: torch.Tensor, divisor: int) -> torch.Tensor:
    return ring.from_unsigned(ring.unsigned(values) // np.uint64(divisor))


def pair_differences(values: torch.Tensor) -> torch.Tensor:
    """Returns the differences value[i] - value[j] along the first dimension, for all pairs i < j, row by row."""
    first, second = pairs(len(values))
    return values[first] - values[second]


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the indices i < j of all pairs among `count`."""
    first, second = torch.triu_indices(count, count, 1)
    return first, second


CHANGES: dict[str, Callable[..., torch.Tensor]] = {
    "transpose": lambda value, first, second: value.transpose(first, second),
    "permute": lambda value, dims: value.permute(dims),
    "reshape": lambda value, shape: value.reshape(shape),
    "expand": lambda value, shape: value.expand(shape),
    "flip": lambda value, dims: value.flip(dims),
    "narrow": lambda value, dim, start, length: value.narrow(dim, start, length),
    "pairs": lambda value: pair_differences(value),
    "times": lambda value, factor: value * factor,
    "divide": lambda value, divisor: torch.div(value, divisor, rounding_mode="floor"),
    "divide_unsigned": _below,
}
"""What can be done to a known value. Views are what a party does to its own part alike; the divisions are not linear,
so parts of their results are asked for with `Given`.
"""


class Request(Protocol):
    """One piece of correlated randomness."""

    @property
    def free(self) -> tuple[Spec, ...]:
        """The parts that are whatever the seeds say."""

    @property
    def fixed(self) -> tuple[Spec, ...]:
        """The parts of what the dealer computes."""

    def targets(self, free: Sequence[Part], look: Callable[[Known], torch.Tensor]) -> list[Part]:
        """Returns what the fixed parts add up to. `look` tells what a known value is."""


@dataclass(frozen=True, slots=True)
class Mask:
    """A uniformly random tensor that nobody but the dealer knows."""

    shape: tuple[int, ...]

    @property
    def free(self) -> tuple[Spec, ...]:
        """The mask."""
        return (Spec("ring", self.shape),)

    @property
    def fixed(self) -> tuple[Spec, ...]:
        """Nothing: it costs no correction."""
        return ()

    def targets(self, free: Sequence[Part], look: Callable[[Known], torch.Tensor]) -> list[Part]:
        """Nothing."""
        return []

    def value(self, drawn: torch.Tensor) -> torch.Tensor:
        """Returns the mask."""
        return drawn


@dataclass(frozen=True, slots=True)
class Coin:
    """Random bits, shared by XOR and in the ring alike: a daBit.

    Source: Rotaru and Wood, "MArBled Circuits" (INDOCRYPT 2019), section 3.
    """

    shape: tuple[int, ...]
    rows: int = 1
    """The bits are packed in so many rows of equal length, which is how comparisons pack them."""

    @property
    def free(self) -> tuple[Spec, ...]:
        """The bits, packed."""
        return (Spec("bits", (self.rows, -(-math.prod(self.shape) // self.rows // 8))),)

    @property
    def fixed(self) -> tuple[Spec, ...]:
        """The bits as ring elements, 0 or 1."""
        return (Spec("ring", self.shape),)

    def targets(self, free: Sequence[Part], look: Callable[[Known], torch.Tensor]) -> list[Part]:
        """Returns the bits as ring elements."""
        return [self.value(free[0])]

    def value(self, bits: ring.Bits) -> torch.Tensor:
        """Returns packed bits as ring elements of this shape."""
        flags = ring.unpacked(bits, math.prod(self.shape) // self.rows).astype(np.int64)
        return torch.from_numpy(flags).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Product:
    """The product of two known values, by a function of `bilinear.BILINEAR`: what Beaver's triples have third."""

    function: str
    left: Known
    right: Known
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def free(self) -> tuple[Spec, ...]:
        """Nothing: the factors are masks that were asked for before."""
        return ()

    @property
    def fixed(self) -> tuple[Spec, ...]:
        """The product."""
        return (Spec("ring", bilinear_shape(self.function, self.left.shape, self.right.shape, self.options)),)

    def targets(self, free: Sequence[Part], look: Callable[[Known], torch.Tensor]) -> list[Part]:
        """Returns the product."""
        return [bilinear_value(self.function, look(self.left), look(self.right), self.options)]


@dataclass(frozen=True, slots=True)
class Given:
    """Parts of a value that the dealer knows, such as a mask after a division."""

    known: Known

    @property
    def free(self) -> tuple[Spec, ...]:
        """Nothing."""
        return ()

    @property
    def fixed(self) -> tuple[Spec, ...]:
        """The value."""
        return (Spec("ring", self.known.shape),)

    def targets(self, free: Sequence[Part], look: Callable[[Known], torch.Tensor]) -> list[Part]:
        """Returns the value."""
        return [look(self.known)]


@dataclass(frozen=True, slots=True)
class Zero:
    """Uniformly random parts that add up to nothing."""

    shape: tuple[int, ...]

    @property
    def free(self) -> tuple[Spec, ...]:
        """Nothing."""
        return ()

    @property
    def fixed(self) -> tuple[Spec, ...]:
        """The parts."""
        return (Spec("ring", self.shape),)

    def targets(self, free: Sequence[Part], look: Callable[[Known], torch.Tensor]) -> list[Part]:
        """Returns zero."""
        return [torch.zeros(self.shape, dtype=torch.int64)]


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
        self._seed = seed
        self._corrections = corrections
        self._next = 0
        self._ready: deque[tuple[Request, Material]] = deque()
        self.record: list[Request] | None = None
        """Set to a list, it gathers the requests: what another run of the same protocol will need."""

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
        stream = Stream(self._seed, number)
        free = [spec.draw(stream) for spec in request.free]
        specs = request.fixed
        if not specs:
            return Material(number, free, [])
        if self._corrections is None:
            return Material(number, free, [spec.draw(stream) for spec in specs])
        sent = self._corrections(number, request)
        check_correction(number, request, sent)
        return Material(number, free, [_from_tensor(*pair) for pair in zip(specs, sent, strict=True)])


def _other(number: int, made_for: Request, request: Request) -> RandomnessError:
    return RandomnessError(
        f"correlated randomness number {number} was made for another operation: {made_for}, not {request}"
    )


def check_correction(number: int, request: Request, tensors: Sequence[torch.Tensor]) -> None:
    """Raise RandomnessError unless `tensors` can be the correction of `request`."""
    want = [(_DTYPES[spec.kind], spec.shape) for spec in request.fixed]
    have = [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
    if want != have:
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
        self._kept: dict[int, tuple[Request, Sequence[torch.Tensor]]] = {}
        self._begun = -1

    def put(self, number: int, request: Request, tensors: Sequence[torch.Tensor]) -> None:
        """Keep the correction of a request to come.

        Raises:
            RandomnessError: it has been used or is here, or the tensors do not fit the request.
        """
        if number in self._kept or number <= self._begun:
            raise RandomnessError(f"correlated randomness number {number} was handed out before")
        check_correction(number, request, tensors)
        self._kept[number] = request, tensors

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
        made_for, tensors = self._kept.pop(number)
        self._begun = number
        if made_for != request:
            raise _other(number, made_for, request)
        return tensors


class Dealer:
    """Knows the seeds of all parties, in their order, and computes what the last party needs. Each number once."""

    def __init__(self, seeds: Sequence[bytes]) -> None:
        self._seeds = list(seeds)
        self._begun = -1

    def correction(self, number: int, request: Request) -> list[torch.Tensor]:
        """Returns the correction of request `number`, for the last party.

        Raises:
            RandomnessError: it was asked for before: a second answer for another request would tell the masks.
        """
        if number <= self._begun:
            raise RandomnessError(f"correlated randomness number {number} was handed out before")
        self._begun = number
        streams = [Stream(seed, number) for seed in self._seeds]
        free = [
            _combined(parts)
            for parts in zip(*(self._drawn(request.free, one) for one in streams), strict=True)
        ]
        fixed = [self._drawn(request.fixed, one) for one in streams[:-1]]
        targets = request.targets(free, self._look)
        return [
            _to_tensor(_difference(target, parts)) for target, *parts in zip(targets, *fixed, strict=True)
        ]

    def make(self, requests: Sequence[Request], stock: Stock, *, start: int = 0) -> None:
        """Puts what `requests` need, which begin with number `start`, into a stock ahead of time."""
        for number, request in enumerate(requests, start):
            if request.fixed:
                stock.put(number, request, self.correction(number, request))

    @staticmethod
    def _drawn(specs: Sequence[Spec], stream: Stream) -> list[Part]:
        return [spec.draw(stream) for spec in specs]

    def _look(self, known: Known) -> torch.Tensor:
        (spec,) = known.source.free
        total = _combined([spec.draw(Stream(seed, known.number)) for seed in self._seeds])
        value: torch.Tensor = known.source.value(total)
        for name, *arguments in known.changes:
            value = CHANGES[name](value, *arguments)
        return value
