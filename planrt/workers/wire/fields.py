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


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every message."""


class PeerAddress(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Another worker, as its id and an address that can be dialled."""

    worker: Id
    address: Annotated[str, Meta(min_length=1, max_length=1000)]
