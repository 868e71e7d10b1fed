"""What correlated randomness a protocol can ask for: masks, coins, and values that the dealer computes from them.

A request has two groups of parts. The *free* ones are whatever the parties' seeds say: masks. The *fixed* ones are
parts of values that the dealer computes from masks: a product of two, the comparison table of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch

from planrt.sharing import ring
from planrt.sharing.bilinear import bilinear_shape, bilinear_value
from planrt.sharing.randomness import Stream

Kind: TypeAlias = Literal["ring", "short", "bits", "words"]
Part: TypeAlias = Any
"""A torch.Tensor of int64 (ring) or int16 (short), or a numpy array of uint8 (packed bits) or uint16 (tables)."""


class Spec(NamedTuple):
    """Kind and shape of one part: ring elements add up modulo 2**64, short ones modulo 2**16; bits and 16-bit words
    combine by XOR.
    """

    kind: Kind
    shape: tuple[int, ...]

    def draw(self, stream: Stream) -> Part:
        """Returns the next random numbers of `stream` in this form."""
        if self.kind == "ring":
            return stream.ring(self.shape)
        if self.kind == "short":
            return stream.short(self.shape)
        return stream.bits(self.shape) if self.kind == "bits" else stream.words(self.shape)


_BYTES = {"ring": 8, "short": 2, "words": 2, "bits": 1}


def size_of(specs: Iterable[Spec]) -> int:
    """Returns how many bytes parts of these forms take."""
    return sum(_BYTES[spec.kind] * math.prod(spec.shape) for spec in specs)


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
        return Known(self.number, self.source, shape, (*self.changes, (name, *arguments)))


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
    "divide": lambda value, divisor: ring.floor_divided(value, divisor, signed=True),
    "top": lambda value: (value < 0).to(torch.int64),
    "divide_unsigned": lambda value, divisor: ring.floor_divided(value, divisor, signed=False),
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
class Low:
    """Parts of the low 16 bits of the product of two values that the dealer knows: what is multiplied by 2**48 or more
    needs no others.
    """

    left: Known
    right: Known

    @property
    def free(self) -> tuple[Spec, ...]:
        """Nothing."""
        return ()

    @property
    def fixed(self) -> tuple[Spec, ...]:
        """The low bits."""
        return (Spec("short", bilinear_shape("mul", self.left.shape, self.right.shape)),)

    def targets(self, free: Sequence[Part], look: Callable[[Known], torch.Tensor]) -> list[Part]:
        """Returns the low bits."""
        left, right = (look(one).to(torch.int16) for one in (self.left, self.right))
        return [left * right]


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


@cache
def fields_of(kind: type[Any]) -> tuple[tuple[str, bool], ...]:
    """Returns the fields of a kind of request, each with whether it is a known value."""
    return tuple((field.name, field.type == Known.__name__) for field in fields(kind))


@dataclass(frozen=True, slots=True)
class Base:
    """The meaning of numbers that are counted from where a run of a program begins: these are the same in each run."""

    start: int = 0
    """The number of the first request of the run."""
    masks: Sequence[int] = ()
    """The numbers of masks that were made before: -1 - their place here stands for them."""

    def number(self, told: int) -> int:
        """Returns the number that `told` stands for."""
        return self.start + told if told >= 0 else self.masks[-1 - told]

    def request(self, told: Request) -> Request:
        """Returns a request whose known values have such numbers with the numbers that these stand for."""
        moved = {}
        for name, is_known in fields_of(type(told)):
            if is_known:
                known = getattr(told, name)
                moved[name] = Known(self.number(known.number), known.source, known.shape, known.changes)
        return replace(told, **moved) if moved else told  # type: ignore[type-var]

    def means(self, told: Request, request: Request) -> bool:
        """Returns whether `request(told)` is equal to `request`; faster."""
        if type(told) is not type(request):
            return False
        start, masks = self.start, self.masks
        for name, is_known in fields_of(type(told)):
            one, other = getattr(told, name), getattr(request, name)
            if not is_known:
                if one != other:
                    return False
                continue
            number = one.number
            if (
                (start + number if number >= 0 else masks[-1 - number]) != other.number
                or one.shape != other.shape
                or one.changes != other.changes
                or one.source != other.source
            ):
                return False
        return True


ALL = Base()
"""Numbers that stand for themselves."""
