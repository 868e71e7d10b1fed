"""Private set intersection between two parties: both learn which of their own ids the other one has, or how many.

Each party blinds its ids and sends them, shuffled (`planrt.sharing.columns.curve`). It blinds what it gets once more,
and sends that back: in the same order, and the other party knows which of its ids are in both tables; sorted, and it
knows how many. Both work at the same time, and either computes two multiplications for each of its own ids and two for
each of the other's; nothing else is as dear.

**What a party learns**, besides its result: how many ids the other table has. Of an id that is in one table only, the
other party sees a point that it cannot tell from a random one without the secret (the decisional Diffie-Hellman
assumption on Curve25519). **What this does not stop**: parties are taken to follow the protocol. One that puts ids into
its table which it only guesses learns whether the other has these; one that asks for sizes again and again, with one id
more or less, learns the same. Owners see every run before it begins, and can deny it.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterator, Sequence
from typing import Final

import numpy as np
import torch

from planrt.errors import AlignmentError, JointError
from planrt.sharing.columns.curve import WIDTH, Blinder, PointSet
from planrt.sharing.columns.ids import order_in_turns
from planrt.sharing.columns.steps import Role, Send, Take, Tensors, Turn, take_one

MAX_IDS: Final = 20_000_000
"""Ids of one table."""
_TURN: Final = 512
"""Points between two turns: about 0.03 seconds."""
_PARCEL: Final = 16_384
"""Points of one parcel: 512 KiB."""


def intersect(keys: Sequence[bytes], other: int, names: Sequence[str], *, size_only: bool = False) -> Role:
    """Does one party's part of an intersection with party `other`; both run the same.

    Returns ``size``, and without `size_only` also ``rows``: the positions in `keys` that the other party has, int64.

    Raises:
        JointError: the other party sends what is no part of the protocol. AlignmentError: nobody is in both tables.
    """
    whose, secret = names[other], Blinder()
    yield Send(other, "count", [torch.tensor([len(keys)])])
    count = int((yield from take_one(other, "count", torch.int64, [1], names))[0])
    if not 0 <= count <= MAX_IDS:
        raise JointError(f"party {whose!r} says that it has {count} ids; there can be {MAX_IDS:,}")
    # Sorting by random numbers is a shuffle: of 64 bits, as good as never are two the same.
    order = np.argsort(np.frombuffer(secrets.token_bytes(8 * len(keys)), np.uint64))
    for parcel in _parts(len(keys), _PARCEL):
        made = []
        for part in _parts(parcel.stop, _TURN, parcel.start):
            made.append(secret.blind([keys[row] for row in order[part].tolist()]))
            yield Turn("ids blinded", part.start, len(keys) + count)
        yield Send(other, "blinded ids", [torch.cat(made)])
    twice: list[torch.Tensor] = []
    for parcel in _parts(count, _PARCEL):
        size = parcel.stop - parcel.start
        points = yield from take_one(other, "blinded ids", torch.uint8, [size, WIDTH], names)
        again = []
        for part in _parts(size, _TURN):
            again.append(secret.blind_again(points[part], whose=whose))
            yield Turn("ids blinded", len(keys) + parcel.start + part.start, len(keys) + count)
        twice.append(torch.cat(again))
        if not size_only:
            yield Send(other, "ids blinded twice", [twice[-1]])
    theirs = PointSet(twice)
    del twice
    if theirs.has_duplicates:
        raise JointError(f"party {whose!r} sent one id twice")
    if size_only:
        yield Send(other, "ids blinded twice", [theirs.sorted])
        points = yield from take_one(other, "ids blinded twice", torch.uint8, [len(keys), WIDTH], names)
        size = 0
        for parcel in _parts(len(keys), _PARCEL):
            size += int(theirs.has(points[parcel]).sum())
            yield Turn("ids compared", parcel.start, len(keys))
        return {"size": size}
    found = np.zeros(len(keys), np.bool_)
    for parcel in _parts(len(keys), _PARCEL):
        points = yield from take_one(
            other, "ids blinded twice", torch.uint8, [parcel.stop - parcel.start, WIDTH], names
        )
        found[order[parcel]] = theirs.has(points)
        yield Turn("ids compared", parcel.start, len(keys))
    rows = np.flatnonzero(found)
    if not len(rows):
        raise AlignmentError(
            f"nobody is in both tables, that of {names[other]!r} and this one: look at which columns hold the ids and "
            "how they are normalised"
        )
    return {"size": len(rows), "rows": torch.from_numpy(rows)}


def align(keys: Sequence[bytes], me: int, owners: int, names: Sequence[str], seed: int) -> Role:
    """Does one owner's part of finding the people that all `owners` tables have; party 0 intersects with each other.

    Returns ``rows``: positions in `keys`, int64, in an order that is the same for all owners (`order_of`), and
    ``size``. With more than two owners, each but party 0 also learns which of its ids party 0 has, and party 0 which
    each other has.

    Raises:
        AlignmentError, JointError: as `intersect`.
    """
    if me:
        found: torch.Tensor = (yield from intersect(keys, 0, names))["rows"]
        ordered = yield from _ordered(keys, found, seed)
        kept = yield from take_one(0, "who is in all tables", torch.bool, [len(ordered)], names)
        return {"rows": ordered[kept], "size": int(kept.sum())}
    pairs = []
    for other in range(1, owners):
        found = (yield from intersect(keys, other, names))["rows"]
        pairs.append((yield from _ordered(keys, found, seed)))
    common = pairs[0]
    for pair in pairs[1:]:
        common = common[torch.isin(common, pair)]
    if not len(common):
        raise AlignmentError("nobody is in all tables, though each two have people in common")
    for other, pair in enumerate(pairs, 1):
        yield Send(other, "who is in all tables", [torch.isin(pair, common)])
    return {"rows": common, "size": len(common)}


def _ordered(
    keys: Sequence[bytes], rows: torch.Tensor, seed: int
) -> Generator[Send | Take | Turn, Tensors | None, torch.Tensor]:
    order = yield from order_in_turns(keys, rows.tolist(), seed)
    return rows[torch.from_numpy(order)]


def _parts(stop: int, size: int, start: int = 0) -> Iterator[slice]:
    """The places from `start` to `stop`, so many at a time."""
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))
