"""Messages and plan values to bytes and back; nothing here opens a socket or runs an op."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("serialize", "deserialize"):  # later: they need torch, and what knows bytes does not always
        from planrt.serde import objects

        return getattr(objects, name)
    raise AttributeError(f"module 'planrt.serde' has no attribute {name!r}")
