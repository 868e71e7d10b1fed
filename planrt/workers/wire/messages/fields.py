"""The kinds of fields that messages have, and the base of all messages: what every module of messages begins with."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Id = Annotated[str, Meta(min_length=1, max_length=200)]
Hash = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, Meta(max_length=64_000)]
Count = Annotated[int, Meta(ge=0)]
Number = bool | int | float | None
Options = dict[Annotated[str, Meta(max_length=64)], Number | Annotated[list[Number], Meta(max_length=8)]]
"""Keyword arguments of an optimizer."""
Purpose = Annotated[str, Meta(max_length=1000)]
Token = Annotated[str, Meta(max_length=200)]
CountOrAll = Annotated[int, Meta(ge=-1)]
"""A count, or -1 for all."""
ObjectId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""The number of an object on a worker, chosen at random by whoever makes it."""
Tags = Annotated[list[Annotated[str, Meta(min_length=1, max_length=200)]], Meta(max_length=64)]
Users = Annotated[list[Id], Meta(max_length=1000)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every message."""


class PeerAddress(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Another worker, as its id and an address that can be dialled."""

    worker: Id
    address: Annotated[str, Meta(min_length=1, max_length=1000)]


class ObjectSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The facts of an object that are known without its values."""

    shape: Annotated[list[Count], Meta(max_length=64)]
    stride: Annotated[list[Count], Meta(max_length=64)]
    dtype: Id
    requires_grad: bool = False
    leaf: bool = True
