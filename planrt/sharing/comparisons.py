"""Signs and equality of secrets, exact for every value from -2**63 to 2**63 - 1.

The sign of x is the top bit of c - r, where c = x + r was opened: it is the top bits of c and r, and the borrow
[c < r] of the 63 bits below, all combined by XOR. Per element and party, sent to each other party: 8 bytes for c and
4.4 for the rest, in four rounds; the last party alone receives 53 bytes from the dealer (tables 32, gates 13, the daBit
8), all others a seed.

A relu takes 61 bytes from the dealer. One that is scaled down besides, as after a layer, takes 73, or 62 at scales from
2**16 on, as the low 15 bits say nothing there that is left. What else was measured or estimated for relu, two parties,
per element and party:

    | protocol                                            | rounds | online | offline | computing, 100,000 elements |
    |-----------------------------------------------------|--------|--------|---------|-----------------------------|
    | this one                                            | 4      | 12.4 B | 61 B    | 8 ms, dealer 6 ms           |
    | the same c, the dealer's bits of r, and a tree of   |        |        |         |                             |
    | two-input gates on packed planes (measured)         | 8      | 31.8 B | 40 B    | 17 ms, dealer 18 ms         |
    | CrypTen 0.4, Boolean adder (measured)               | 9      | 464 B  | -       | -                           |
    | SecretFlow SPU 0.9.5, SEMI2K (measured)             | -      | 144 B  | -       | -                           |
    | distributed comparison function (estimated)         | 2      | 8 B    | 1.3 kB  | 200 - 400 ms                |

Computing is processor time on one core of a two-core server, seeds expanded and corrections there. With n parties each
sends the online bytes to n - 1 others.

All work on values that are masked already; thresholds share one opening and one table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from planrt.sharing import ring
from planrt.sharing.gates import Tables, compared
from planrt.sharing.masked import Bit, Masked, mask
from planrt.sharing.requests import Coin, Known
from planrt.sharing.ring import Bits
from planrt.sharing.rounds import Party, Protocol


def negative(party: Party, value: Masked) -> Protocol[Bit]:
    """Returns [x < 0] of a masked secret, in three rounds.

    1. Find the borrow u = [c < r] on the low 63 bits (`gates.compared`).
    2. The sign is u XOR the top bits of c and r; hide it with a coin (`to_bit`).
    """
    bit = yield from below(party, value, (0,))
    return bit.reshape(value.shape)


def below(party: Party, value: Masked, thresholds: Sequence[int], *, coarse: int = 0) -> Protocol[Bit]:
    """Returns [x < t] for each of several public t: bits of shape (thresholds, *shape), in three rounds.

    Exact where x - t does not leave -2**63 .. 2**63 - 1. One table serves all: c - t is public as c is. With `coarse`
    so many low bits are not looked at, and for t - 2**coarse <= x < t either answer may come: the difference of c - t
    and r, both divided by 2**coarse and rounded down, is x - t so divided, or one more.
    """
    count, rows = value.opened.numel(), len(thresholds)
    moved = torch.tensor(list(thresholds), dtype=torch.int64)
    opened = value.opened.reshape(1, count) - moved[:, None]
    mask = value.mask.changed("reshape", (1, count), shape=(1, count))
    if coarse:
        opened, mask = opened >> coarse, mask.changed("divide", 1 << coarse)
    found = yield from signs(party, opened, mask, 63 - coarse)
    return (yield from to_bit(party, found, (rows, *value.shape)))


def signs(party: Party, opened: torch.Tensor, mask: Known, bits: int = 63) -> Protocol[Bits]:
    """Returns this party's XOR part of [x < 0] in packed rows, for x = opened - mask of shape (rows, n), in two rounds.
    The mask may be one row for all. All bits of the two above the low `bits` are as their top bits are.

    1. Find the borrow [c < r] on the low `bits` bits.
    2. Combine it with the top bits of c and r.
    """
    tables = Tables(mask, bits, len(opened))
    material = party.supply.take(tables)
    borrowed = yield from compared(party, material, opened, tables)
    found: Bits = borrowed ^ material.fixed[1]
    if party.first:
        found ^= ring.packed(opened.numpy() < 0)
    return found


def zero(party: Party, value: Masked) -> Protocol[Bit]:
    """Returns [x == 0] of a masked secret, in three rounds: [c == r] on all 64 bits, chunk by chunk.

    1. Look up the chunks; combine by two levels of gates.
    2. Hide the result with a coin.
    """
    flat = value.reshape((1, value.opened.numel()))
    tables, opened = Tables(flat.mask, 64, equality=True), flat.opened
    found = yield from compared(party, party.supply.take(tables), opened, tables)
    return (yield from to_bit(party, found, tuple(value.shape)))


def equal_to(party: Party, value: Masked, thresholds: Sequence[int], bits: int = 64) -> Protocol[Bit]:
    """Returns [x == t] for each of several public t: bits of shape (thresholds, *shape), in three rounds, or two for
    `bits` up to 16. Compared are the low `bits` bits.
    """
    count, rows = value.opened.numel(), len(thresholds)
    opened = value.opened.reshape(1, count) - torch.tensor(list(thresholds), dtype=torch.int64)[:, None]
    flat = value.mask.changed("reshape", (1, count), shape=(1, count))
    tables = Tables(flat, bits, rows, equality=True)
    found = yield from compared(party, party.supply.take(tables), opened, tables)
    return (yield from to_bit(party, found, (rows, *value.shape)))


def borrow(party: Party, value: Masked, bits: int) -> Protocol[Bit]:
    """Returns [c < r] on the low `bits` bits: what a division by 2**bits borrows. It takes two rounds up to 16 bits,
    else three.
    """
    flat = value.reshape((1, value.opened.numel()))
    tables, opened = Tables(flat.mask, bits), flat.opened
    found = yield from compared(party, party.supply.take(tables), opened, tables)
    return (yield from to_bit(party, found, tuple(value.shape)))


def to_bit(party: Party, found: Bits, shape: tuple[int, ...]) -> Protocol[Bit]:
    """Returns a bit that is shared by XOR, packed in rows, as a `Bit`, in one round.

    1. Take a coin beta.
    2. Open d = b XOR beta.
    """
    coin = Coin(shape, rows=len(found))
    taken = party.supply.take(coin)
    (answer,) = yield [torch.from_numpy(found ^ taken.free[0])]
    return Bit(coin.value(answer.numpy()), taken.fixed[0], Known(taken.number, coin, shape))


def less_than_zero(party: Party, value: torch.Tensor) -> Protocol[torch.Tensor]:
    """Returns [x < 0] as the integer 0 or 1, in four rounds."""
    (masked,) = yield from mask(party, value)
    bit = yield from negative(party, masked)
    return bit.share(party)


def less_than(party: Party, left: torch.Tensor, right: torch.Tensor) -> Protocol[torch.Tensor]:
    """Returns [x < y] as the integer 0 or 1, in four rounds; exact where x - y does not leave -2**63 .. 2**63 - 1."""
    return (yield from less_than_zero(party, left - right))


def equal(party: Party, left: torch.Tensor, right: torch.Tensor) -> Protocol[torch.Tensor]:
    """Returns [x == y] as the integer 0 or 1, in four rounds, for all values."""
    (masked,) = yield from mask(party, left - right)
    bit = yield from zero(party, masked)
    return bit.share(party)
