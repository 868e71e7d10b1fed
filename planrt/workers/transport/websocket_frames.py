"""Websocket frames (RFC 6455, section 5) as bytes: headers and masking; no sockets."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from planrt.errors import WireError

CONTINUATION, TEXT, BINARY = 0x0, 0x1, 0x2
"""Opcodes of data frames (section 5.2)."""
_LAST_DATA, _LAST_CONTROL = BINARY, 0xA
_CONTROL = 0x8

MAX_HEADER = 14
"""Bytes of the longest header."""

_TILE = 1 << 16
"""Bytes masked at a time: a multiple of the key's four, and small enough to stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The header of a frame whose payload has `nbytes` bytes; it has `size` bytes itself."""

    opcode: int
    final: bool
    nbytes: int
    key: bytes
    """What the payload is masked with: 4 bytes, or none."""
    size: int

    @property
    def control(self) -> bool:
        """True for a close, a ping or a pong: these may come between the frames of a message."""
        return bool(self.opcode & _CONTROL)


def read_header(data: memoryview, *, address: str = "") -> FrameHeader | None:
    """Reads the header that `data` begins with; returns None if there is more of it to come.

    Raises:
        WireError: reserved bits, an unknown opcode, or a control frame that is long or in pieces.
    """
    if len(data) < 2:
        return None
    first, second = data[0], data[1]
    opcode, nbytes = first & 0x0F, second & 0x7F
    if first & 0x70:
        raise WireError("malformed websocket frame: reserved bits are set", address=address)
    if not (opcode <= _LAST_DATA or _CONTROL <= opcode <= _LAST_CONTROL):
        raise WireError(f"malformed websocket frame: unknown opcode {opcode}", address=address)
    final = bool(first & 0x80)
    if opcode & _CONTROL and (nbytes > 125 or not final):
        raise WireError(
            "malformed websocket frame: a control frame that is long or in pieces", address=address
        )
    lengths = {126: 2, 127: 8}.get(nbytes, 0)
    keys = 4 if second & 0x80 else 0
    size = 2 + lengths + keys
    if len(data) < size:
        return None
    if lengths:
        nbytes = int.from_bytes(data[2 : 2 + lengths], "big")
    return FrameHeader(opcode, final, nbytes, bytes(data[size - keys : size]), size)


def header_bytes(opcode: int, nbytes: int, *, final: bool, key: bytes = b"") -> bytes:
    """Returns the header of a data frame with `nbytes` of payload, masked with `key` if there is one."""
    first, masked = opcode | 0x80 * final, 0x80 if key else 0
    if nbytes < 126:
        return struct.pack("!BB", first, masked | nbytes) + key
    if nbytes < 1 << 16:
        return struct.pack("!BBH", first, masked | 126, nbytes) + key
    return struct.pack("!BBQ", first, masked | 127, nbytes) + key


def mask(source: bytes | memoryview, key: bytes, target: memoryview, *, position: int = 0) -> None:
    """Writes `source`, masked or unmasked with `key`, to `target` of the same length; they may be the same memory.

    `source` begins at the payload's byte `position` (section 5.3).
    """
    nbytes = len(source)
    if not nbytes:
        return
    offset = position % 4
    tile = np.frombuffer(key * (min(nbytes, _TILE) // 4 + 2), dtype=np.uint8)[offset:]
    before, after = np.frombuffer(source, dtype=np.uint8), np.frombuffer(target, dtype=np.uint8)
    for start in range(0, nbytes, _TILE):
        piece = before[start : start + _TILE]
        np.bitwise_xor(piece, tile[: len(piece)], out=after[start : start + _TILE])
