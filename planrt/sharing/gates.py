"""AND gates over four shared bits at once, on packed planes, and tables of four-bit chunks: what comparisons run on.

A comparison of a public number c with a number r that only the dealer knows reads both as chunks of four bits, the
highest first. The dealer shares, for each chunk j, the 16-bit truth table of v -> [v < r_j] (for equality: [v == r_j]);
looking it up at the public c_j costs nothing. Gates of four chunks then combine "less" and "equal" upwards.

Sources: one-time truth tables of Ishai, Kushilevitz, Meldgaard, Orlandi and Paskin-Cherniavsky, "On the power of
correlated randomness in secure computation" (TCC 2013), section 3, here with a public index, so that the table needs no
rotation; gates of more than two inputs as in ABY2.0 (Patra, Schneider, Suresh and Yalame, USENIX Security 2021),
section 3.1.4; the order of the combination as in CrypTFlow2's millionaires' protocol (Rathee et al., CCS 2020),
section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from planrt.sharing import ring
from planrt.sharing.correlated import Material
from planrt.sharing.requests import Known, Part, Spec
from planrt.sharing.ring import Bits, Words
from planrt.sharing.rounds import Party, Protocol

_ONE = np.uint16(1)
_LESS, _EQUAL, _BOTH = 6, 4, 7
"""Masks that a gate of four opens: three "equal" bits and three "less" bits, all four "equal" bits, or all seven."""


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables and gates that compare the low `bits` bits of public tensors of shape (rows, n) with those of a known
    value of shape (rows, n), or (1, n) for all rows alike.
    """

    known: Known
    bits: int
    rows: int = 1
    equality: bool = False

    @property
    def chunks(self) -> int:
        """4, 12 or 16: so many chunks as one level of gates takes, or two."""
        return 4 if self.bits <= 16 else 12 if self.bits <= 48 else 16

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Per level of gates: how many masks each has, and how many gates stand side by side."""
        last = (_EQUAL if self.equality else _LESS, 1)
        if self.chunks == 4:
            return (last,)
        return (_EQUAL if self.equality else _BOTH, self.chunks // 4), last

    @property
    def planes(self) -> tuple[int, int]:
        """The shape of packed bits of all rows."""
        return self.rows, -(-self.known.shape[1] // 8)

    @property
    def free(self) -> tuple[Spec, ...]:
        """The gates' masks."""
        return tuple(Spec("bits", (masks, gates, *self.planes)) for masks, gates in self.levels)

    @property
    def fixed(self) -> tuple[Spec, ...]:
        """The tables, the top bits of the known value, and the products of the gates' masks."""
        return (
            Spec("words", (self.chunks, *self.known.shape)),
            Spec("bits", (self.known.shape[0], self.planes[1])),
            *(Spec("bits", (_PRODUCTS[masks], gates, *self.planes)) for masks, gates in self.levels),
        )

    def targets(self, free: Sequence[Part], look: Callable[[Known], torch.Tensor]) -> list[Part]:
        """See `fixed`."""
        value = look(self.known)
        exact = _ONE << chunked(value, self.bits, self.chunks)
        table = exact if self.equality else exact - _ONE
        return [
            table,
            ring.packed(value.numpy() < 0),
            *(mask_products(masks) for masks in free),
        ]


def chunked(value: torch.Tensor, bits: int, chunks: int) -> Words:
    """Returns the low `bits` bits of int64 (rows, n) in chunks of four, the highest first: uint16 (chunks, rows, n)."""
    quarters = ring.unsigned(value).view(np.uint16).reshape(*value.shape, 4)
    out = np.empty((chunks, *value.shape), np.uint16)
    for chunk in range(chunks):
        low = 4 * (chunks - 1 - chunk)
        if low % 16 == 12 or not chunk:  # side by side, they are shifted ten times as fast
            quarter = np.ascontiguousarray(quarters[..., low // 16])
        np.right_shift(quarter, np.uint16(low % 16), out=out[chunk])
    out &= np.uint16(15)
    for chunk in range(chunks - bits // 4):
        out[chunk] &= np.uint16((1 << max(0, bits - 4 * (chunks - 1 - chunk))) - 1)
    return out


def looked_up(party: Party, table: Words, at: Words, equality: bool) -> tuple[Bits | None, Bits]:
    """Returns this party's parts of "less" and "equal" of each chunk, packed: shape (chunks, rows, ceil(n / 8)).

    [v == r] is [v - 1 < r] XOR [v < r], with 1 for the first where v = 0: one table gives both.
    """
    if equality:
        return None, _bit(table, at)
    before = table << _ONE
    if party.first:
        before |= _ONE
    return _bit(table, at), _bit(before ^ table, at)


def _bit(table: Words, at: Words) -> Bits:
    shifted = (table >> at).astype(np.uint8)
    shifted &= np.uint8(1)
    return ring.packed(shifted.view(np.bool_))


def compared(party: Party, material: Material, opened: torch.Tensor, tables: Tables) -> Protocol[Bits]:
    """Returns this party's XOR part of [c < r] (or [c == r]) on the low bits, after one or two rounds.

    `opened` is c, of shape (rows, n).

    1. Look the chunks of c up in the tables.
    2. Open the inputs of the gates under their masks; combine. Until one gate is left.
    """
    at = chunked(opened, tables.bits, tables.chunks)
    less: Bits | None
    equal: Bits | None
    less, equal = looked_up(party, material.fixed[0], at, tables.equality)
    for masks, products in zip(material.free, material.fixed[2:], strict=True):
        if equal is not None and len(equal) == 3:
            # A gate takes four: the lowest chunk of all is one that is equal, and not less.
            equal = np.concatenate([equal, np.full_like(equal[:1], 255 if party.first else 0)])
            less = None if less is None else np.concatenate([less, np.zeros_like(less[:1])])
        less, equal = yield from _gates(party, less, equal, masks, products)
    last = equal if less is None else less
    assert last is not None  # noqa: S101 - the last gate gives what was asked for
    found: Bits = last[0]
    return found


@dataclass(frozen=True, slots=True)
class Conjunction:
    """The gates that AND `inputs` planes of packed bits, each of shape `planes`."""

    inputs: int
    planes: tuple[int, int]

    @property
    def gates(self) -> tuple[int, ...]:
        """Gates of each level: four planes become one."""
        found, left = [], self.inputs
        while left > 1:
            left = -(-left // 4)
            found.append(left)
        return tuple(found)

    @property
    def free(self) -> tuple[Spec, ...]:
        """The gates' masks."""
        return tuple(Spec("bits", (_EQUAL, gates, *self.planes)) for gates in self.gates)

    @property
    def fixed(self) -> tuple[Spec, ...]:
        """The products of these."""
        return tuple(Spec("bits", (_PRODUCTS[_EQUAL], gates, *self.planes)) for gates in self.gates)

    def targets(self, free: Sequence[Part], look: Callable[[Known], torch.Tensor]) -> list[Part]:
        """Returns the products of the masks."""
        return [mask_products(masks) for masks in free]


def all_of(party: Party, bits: Bits) -> Protocol[Bits]:
    """Returns this party's XOR part of the AND of all planes of `bits`, (inputs, rows, n / 8).

    It takes one round for every factor of 4.

    1. Fill up to a multiple of four with ones.
    2. Open four planes each under their masks; combine. Until one is left.
    """
    taken = party.supply.take(Conjunction(len(bits), (bits.shape[1], bits.shape[2])))
    for masks, products in zip(taken.free, taken.fixed, strict=True):
        missing = 4 * masks.shape[1] - len(bits)
        if missing:
            ones = np.full((missing, *bits.shape[1:]), 255 if party.first else 0, np.uint8)
            bits = np.concatenate([bits, ones])
        _, combined = yield from _gates(party, None, bits, masks, products)
        assert combined is not None  # noqa: S101 - all four were asked for
        bits = combined
    found: Bits = bits[0]
    return found


_Pair: TypeAlias = tuple[Bits | None, Bits | None]


def _gates(
    party: Party, less: Bits | None, equal: Bits | None, masks: Bits, products: Bits
) -> Protocol[_Pair]:
    """One level: groups of four chunks become one. With E and L of chunks 0 (highest) to 3:

        L = L0 ^ E0 (L1 ^ E1 (L2 ^ E2 L3)),   E = E0 E1 E2 E3

    1. Open E0, E1, E2 and, as far as asked for, L1, L2, L3 and E3, each under its mask.
    2. Fold from the innermost outwards: an expression is kept as its coefficients of all products S of the masks of the
       outer variables; v * T with v = X ^ m becomes T[S and m] ^ X T[S].
    """
    assert equal is not None  # noqa: S101 - only the last level has none, and it is the last
    e = _grouped(equal)
    inputs = [e[:3]] if less is None else [e[:3], _grouped(less)[1:]]
    if len(masks) != _LESS:
        inputs.append(e[3:])
    (answer,) = yield [torch.from_numpy(np.concatenate(inputs) ^ masks)]
    x = answer.numpy()
    named = _Named(party, masks, products, x)
    both = named.equal() if len(masks) != _LESS else None
    if less is None:
        return None, both
    return _grouped(less)[0] ^ named.less(), both


def _grouped(bits: Bits) -> Bits:
    """(4 * gates, ...) -> (4, gates, ...): what is at one place of all gates stands together."""
    return np.moveaxis(bits.reshape(len(bits) // 4, 4, *bits.shape[1:]), 1, 0)


_PRODUCTS = {_LESS: 15, _EQUAL: 11, _BOTH: 22}
"""Masks of a gate -> products of them that the dealer shares."""


def mask_products(masks: Bits) -> Bits:
    """Returns the products of a gate's masks, in the order in which `_Named` reads them."""
    e = _subsets(masks[:3])
    outer = [e[3:4], e[5:8]]
    if len(masks) != _EQUAL:
        outer += [masks[3] & e[1:2], masks[4] & e[1:4], masks[5] & e[1:8]]
    if len(masks) != _LESS:
        outer.append(masks[-1] & e[1:8])
    return np.concatenate(outer)


def _subsets(masks: Bits) -> Bits:
    """The products of all subsets of three masks; bit k of the index says that mask k is a factor."""
    one = np.full_like(masks[0], 255)
    found = [one]
    for mask in masks:
        found += [mask & product for product in found]
    return np.stack(found)


class _Named:
    """A party's parts of a gate's masks and their products, by name, and what was opened."""

    def __init__(self, party: Party, masks: Bits, products: Bits, opened: Bits) -> None:
        one = np.full_like(masks[:1], 255 if party.first else 0)
        self._e = np.concatenate([one, masks[:2], products[:1], masks[2:3], products[1:4]])
        self._masks, self._rest, self._x = masks, products[4:], opened

    def less(self) -> Bits:
        """Returns E0 (L1 ^ E1 (L2 ^ E2 L3))"""
        rest = self._rest
        folded = self._variable(5, rest[4:11])
        folded = self._folded(folded, 2) ^ self._variable(4, rest[1:4])
        folded = self._folded(folded, 1) ^ self._variable(3, rest[:1])
        found: Bits = self._folded(folded, 0)[0]
        return found

    def equal(self) -> Bits:
        """Returns E0 E1 E2 E3"""
        folded = self._variable(len(self._masks) - 1, self._rest[-7:])
        for place in (2, 1, 0):
            folded = self._folded(folded, place)
        found: Bits = folded[0]
        return found

    def _variable(self, index: int, products: Bits) -> Bits:
        """The coefficients of one variable: its mask times each product, and what was opened times each."""
        times = np.concatenate([self._masks[index : index + 1], products])
        found: Bits = times ^ (self._x[index] & self._e[: len(times)])
        return found

    def _folded(self, folded: Bits, place: int) -> Bits:
        """The coefficients of variable E_place times what `folded` has."""
        half = len(folded) // 2
        found: Bits = folded[half:] ^ (self._x[place] & folded[:half])
        return found
