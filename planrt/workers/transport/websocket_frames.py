"""Websocket frames (RFC 6455, section 5) as bytes: headers and masking; no sockets."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from planrt.errors import WireError

CONTINUATION, TEXT, BINARY = 0x0, 0x1, 0x2
"""Opcodes of data frames (section 5.2)."""
_LAST_DATA, _LAST_CONTROL = BINARY, 0xA
_CONTROL = 0x8


@dataclass(slots=True)
class FrameHeader:
    """The header of a frame whose payload has `nbytes` bytes; it has `size` bytes itself."""

    opcode: int
    final: bool
    nbytes: int
    key: bytes
    """What the payload is masked with: 4 bytes, or none."""
    size: int
    control: bool
    """True for a close, a ping or a pong: these may come between the frames of a message."""


def read_header(data: memoryview, *, address: str = "") -> FrameHeader | None:
    """Reads the header that `data` begins with; returns None if there is more of it to come.

    Raises:
        WireError: reserved bits, an unknown opcode, or a control frame that is long or in pieces.
    """
    arrived = len(data)
    if arrived < 2:
        return None
    first, second = data[0], data[1]
    opcode, nbytes = first & 0x0F, second & 0x7F
    if first & 0x70:
        raise WireError("malformed websocket frame: reserved bits are set", address=address)
    if not (opcode <= _LAST_DATA or _CONTROL <= opcode <= _LAST_CONTROL):
        raise WireError(f"malformed websocket frame: unknown opcode {opcode}", address=address)
    final, control = first >= 0x80, opcode >= _CONTROL
    if control and (nbytes > 125 or not final):
        raise WireError(
            "malformed websocket frame: a control frame that is long or in pieces", address=address
        )
    lengths = 0 if nbytes < 126 else 2 if nbytes == 126 else 8
    keys = 4 if second & 0x80 else 0
    size = 2 + lengths + keys
    if arrived < size:
        return None
    if lengths:
        nbytes = int.from_bytes(data[2 : 2 + lengths], "big")
    return FrameHeader(opcode, final, nbytes, bytes(data[size - keys : size]), size, control)


def header_bytes(opcode: int, nbytes: int, *, final: bool, key: bytes = b"") -> bytes:
    """Returns the header of a data frame with `nbytes` of payload, masked with `key` if there is one."""
    first, masked = opcode | 0x80 * final, 0x80 if key else 0
    if nbytes < 126:
        return struct.pack("!BB", first, masked | nbytes) + key
    if nbytes < 1 << 16:
        return struct.pack("!BBH", first, masked | 126, nbytes) + key
    return struct.pack("!BBQ", first, masked | 127, nbytes) + key


def masked_frame(
    opcode: int, pieces: Iterable[bytes | memoryview], nbytes: int, *, final: bool
) -> memoryview:
    """Returns a data frame with the `nbytes` of `pieces` as its payload, in a copy, masked with a key of its own."""
    key = os.urandom(4)
    header = header_bytes(opcode, nbytes, final=final, key=key)
    start = -len(header) % 4  # so that the payload begins at a multiple of four: it is masked word by word
    begin = start + len(header)
    frame = bytearray().join([bytes(start), header, *pieces, bytes(-nbytes % 4)])
    payload = np.frombuffer(frame, np.uint32, offset=begin)
    np.bitwise_xor(payload, np.frombuffer(key, np.uint32), out=payload)
    return memoryview(frame)[start : begin + nbytes]


def mask(data: memoryview, key: bytes) -> None:
    """Masks `data`, or unmasks it, where it is. `key` is the one for its first bytes: see `turned`."""
    array = np.frombuffer(data, np.uint8)
    nbytes = array.size
    start = min(-array.__array_interface__["data"][0] % 4, nbytes)
    end = nbytes - (nbytes - start) % 4
    words = array[start:end].view(np.uint32)  # where they are aligned, they take a quarter of the time
    np.bitwise_xor(words, np.frombuffer(turned(key, start), np.uint32), out=words)
    for place in (*range(start), *range(end, nbytes)):
        data[place] ^= key[place % 4]


def turned(key: bytes, nbytes: int) -> bytes:
    """Returns what masks a payload from its byte `nbytes` on, if `key` masks all of it (section 5.3)."""
    return key[nbytes % 4 :] + key[: nbytes % 4]
